"""Handwritten digits that scikit-learn ships."""

from __future__ import annotations

from fastmerge.data.arrays import ImageArrays, check_arrays

TRAIN_IMAGES = 1200


def load_digits() -> ImageArrays:
    """Loads scikit-learn's 1,797 grey 8×8 images of handwritten digits (UCI, E. Alpaydin and C. Kaynak).

    The first 1,200 images, in scikit-learn's order, are for training, the other 597 for testing. The order goes by
    writer, so most of the test images are by people whose digits were not trained on. Pixels of 0..16 become 0..240.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    images = (digits.images * 15).astype("uint8")
    labels = digits.target
    arrays = {
        "train_images": images[:TRAIN_IMAGES],
        "train_labels": labels[:TRAIN_IMAGES],
        "test_images": images[TRAIN_IMAGES:],
        "test_labels": labels[TRAIN_IMAGES:],
    }
    return check_arrays("scikit-learn's digits", arrays)
