"""Images from .npz files: what is read, and what is refused by name."""

import io
import zipfile

import numpy as np
import pytest
import torch

from fastmerge.data.arrays import load_npz
from fastmerge.data.dataset import image_dataset
from image_files import noise_arrays


def arrays(**changes):
    made = noise_arrays(12, 6, (5, 4, 3), classes=3)
    made["test_labels"] = made["test_labels"].astype(np.uint8)
    return made | changes


def save(path, made):
    np.savez(path, **made)
    return path


def test_arrays_come_back(tmp_path):
    made = arrays(class_names=np.array(["a", "b", "c"]))  # what else is in the file does no harm
    loaded = load_npz(save(tmp_path / "data.npz", made))
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert np.array_equal(getattr(loaded, name), made[name])
    assert loaded.test_labels.dtype == np.int64
    assert loaded.classes == 3


def test_grey_images_get_a_channel(tmp_path):
    grey = arrays(train_images=np.zeros((12, 5, 4), np.uint8), test_images=np.zeros((6, 5, 4), np.uint8))
    assert load_npz(save(tmp_path / "data.npz", grey)).train_images.shape == (12, 5, 4, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((12, 5, 4, 3), np.float32)}, "train_images must be uint8, 0..255; it is float32"),
        ({"test_images": np.zeros((6, 5, 4, 7), np.uint8)}, "test_images must have shape"),
        ({"test_images": np.zeros((6, 5), np.uint8)}, "test_images must have shape"),
        ({"test_images": np.zeros((6, 9, 4, 3), np.uint8)}, r"one height, width and channels.*5, 4, 3.*9, 4, 3"),
        ({"test_images": np.zeros((0, 5, 4, 3), np.uint8), "test_labels": np.zeros(0, int)}, "test_images is empty"),
        ({"train_labels": np.zeros(12)}, "train_labels must be integers; it is float64"),
        ({"train_labels": np.zeros(11, int)}, r"train_labels must have shape \(12,\)"),
        ({"train_labels": np.zeros((12, 1), int)}, r"train_labels must have shape \(12,\)"),
        ({"train_labels": np.arange(12) - 1}, "train_labels must be at least 0; it holds -1"),
        ({"test_labels": np.arange(6)}, "test_labels go up to 5, train_labels only to 2"),
        ({"train_labels": np.array([{}] * 12, object)}, "can't be read"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_npz(save(tmp_path / "data.npz", arrays(**changes)))


def test_missing_arrays_are_named(tmp_path):
    made = arrays()
    del made["train_labels"], made["test_images"]
    with pytest.raises(ValueError, match="lacks train_labels, test_images"):
        load_npz(save(tmp_path / "data.npz", made))


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.npz"):
        load_npz(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text.npz is no .npz file"):
        load_npz(tmp_path / "text.npz")
    whole = save(tmp_path / "data.npz", arrays()).read_bytes()
    (tmp_path / "damaged.npz").write_bytes(whole[:700] + b"\xff" * 40 + whole[740:])
    with pytest.raises(ValueError, match=r"damaged.npz can't be read"):
        load_npz(tmp_path / "damaged.npz")
    (tmp_path / "damaged.npz").write_bytes(whole.replace(b"PK\1\2", b"PK\1\3"))  # its table of contents
    with pytest.raises(ValueError, match=r"damaged.npz can't be read"):  # and is closed again
        load_npz(tmp_path / "damaged.npz")
    compressible = {name: values % 3 for name, values in arrays().items()}
    np.savez_compressed(tmp_path / "packed.npz", **compressible)
    whole = (tmp_path / "packed.npz").read_bytes()
    (tmp_path / "packed.npz").write_bytes(whole[:60] + b"\xff" * 20 + whole[80:])
    with pytest.raises(ValueError, match=r"packed.npz can't be read: Error -3 "):  # zlib has errors of its own
        load_npz(tmp_path / "packed.npz")


def test_a_header_that_claims_more_than_there_can_be_is_named(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 3)})
    save(tmp_path / "data.npz", arrays())
    with zipfile.ZipFile(tmp_path / "data.npz") as whole, zipfile.ZipFile(tmp_path / "claims.npz", "w") as claims:
        for name in whole.namelist():
            claims.writestr(name, header.getvalue() if "train_images" in name else whole.read(name))
    with pytest.raises(ValueError, match=r"claims.npz can't be read: Unable to allocate 27.3 TiB"):
        load_npz(tmp_path / "claims.npz")


def test_data_sets_are_normalised_by_the_training_images(tmp_path):
    loaded = load_npz(save(tmp_path / "data.npz", arrays()))
    data = image_dataset(loaded)
    assert data.train_inputs.dtype == torch.uint8
    assert data.classes == 3
    images = data.normalise(data.train_inputs)
    assert images.shape == (12, 3, 5, 4)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))
    back = data.normalise(data.test_inputs) * data.std + data.mean
    torch.testing.assert_close(back, torch.from_numpy(loaded.test_images).permute(0, 3, 1, 2).float())


def test_a_constant_channel_becomes_zero(tmp_path):
    images = arrays()["train_images"]
    images[..., 1] = 7
    data = image_dataset(load_npz(save(tmp_path / "data.npz", arrays(train_images=images))))
    assert not data.normalise(data.train_inputs)[:, 1].any()
