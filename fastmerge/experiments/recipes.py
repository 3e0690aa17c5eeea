"""The experiments, by name: functions that return a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmerge.data.arrays import load_npz
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation, flip_and_shift
from fastmerge.data.dataset import Dataset, image_dataset, load_digits, sine_curve, sine_dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.data.folders import load_folder
from fastmerge.experiments.recipe import Recipe
from fastmerge.merging.options import Options, Plan
from fastmerge.networks import LeNet, ResNet18, SineMLP, resnet20, small_lenet

LENET_SIZE, LENET_CLASSES = 28, 10


def sine() -> Recipe:
    """The paper's first experiment at its full length: regression of a noisy sine by a network with one hidden layer.

    A run draws its points once, for all strategies and replicates, and every network reads them in an order of its own
    (the authors' script draws points per network and reads them in one order).
    """
    return Recipe(
        name="sine",
        metric="test_loss",
        make_network=_sine_network,
        load_data=_sine_data,
        teacher=Plan(epochs=300, lr=0.01, milestones=(250,)),
        long=Plan(epochs=900, lr=0.01, milestones=(800,)),
        merge=Options(
            link_at=0.0,
            merge_epochs=150,
            finetune_epochs=150,
            milestones=(100,),
            criterion=F.mse_loss,
            gate_lr=0.1,
            lam_step=0.05,
        ),
        batch_size=32,
        test_every=15,
        stack=25,
        source="Pašen & Boža, Merging of neural networks, section 3.1 (50 replicates)",
        curve=curve,
    )


def curve() -> tuple[Tensor, Tensor]:
    """500 inputs from 0 to 1 and the sine there, each (500, 1)."""
    x = torch.linspace(0, 1, 500)[:, None]
    return x, sine_curve(x)


def _sine_network(classes: int, width: int) -> nn.Module:
    return SineMLP(width)


def _sine_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    if path is not None:
        raise ValueError(f"sine makes its own data; it takes no path, such as {path}")
    return sine_dataset(seed)


def digits() -> Recipe:
    """Our own experiment, in the form of the paper's: a small LeNet on the handwritten digits of scikit-learn, in seconds.

    The network is so small that it does not learn the digits as well as they can be learned, which is where choosing among
    twice the channels helps. Five replicates are too few to be sure of the order of the strategies. At a learning rate of
    0.05 some long runs diverge.
    """
    return Recipe(
        name="digits",
        make_network=_digits_network,
        load_data=_digits_data,
        teacher=Plan(epochs=60, lr=0.02, milestones=(40,)),
        long=Plan(epochs=180, lr=0.02, milestones=(150,)),
        merge=Options(link_at=0.0, merge_epochs=30, finetune_epochs=30, milestones=(20,), lr=0.02, lam_step=1.5),
        batch_size=60,  # divides the 1,080 images that networks train on
        test_every=6,
        stack=10,
        source="our own; the data is scikit-learn's",
    )


def _digits_network(classes: int, width: int) -> nn.Module:
    return small_lenet(width=width)


def _digits_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    if path is not None:
        raise ValueError(f"digits come with scikit-learn; the recipe takes no path, such as {path}")
    return image_dataset(load_digits())


def lenet_imagewoof() -> Recipe:
    """The paper's second experiment: LeNet on Imagewoof, ten breeds of dogs, at 28×28 pixels.

    On a CPU take a budget of a few percent.
    """
    return Recipe(
        name="lenet-imagewoof",
        make_network=_lenet,
        load_data=_imagewoof_data,
        teacher=Plan(epochs=2000, lr=0.01, milestones=(1000, 1500)),
        long=Plan(epochs=6000, lr=0.01, milestones=(3000, 4500)),
        merge=Options(link_at=0.0, merge_epochs=1000, finetune_epochs=1000, milestones=(500, 750), lam_step=0.05),
        batch_size=32,
        augment=flip_and_shift,
        test_every=100,
        stack=5,
        source="Pašen & Boža, Merging of neural networks, section 3.2 (10 replicates)",
    )


def _lenet(classes: int, width: int) -> nn.Module:
    return LeNet(3, LENET_SIZE, LENET_CLASSES, width)


def _imagewoof_data(path: Path | None, seed: int, on_bad_image: OnBadImage = "raise") -> Dataset:
    if path is None:
        raise ValueError(
            "lenet-imagewoof needs data: an .npz of uint8 arrays, or a tree train/<class>/<image>, val/<class>/<image>"
        )
    arrays = load_folder(path, LENET_SIZE, on_bad_image) if path.is_dir() else load_npz(path)
    shape = arrays.train_images.shape[1:]
    if shape != (LENET_SIZE, LENET_SIZE, 3) or arrays.classes > LENET_CLASSES:
        raise ValueError(
            f"lenet-imagewoof needs {LENET_SIZE}x{LENET_SIZE} images with 3 channels of at most {LENET_CLASSES} classes; "
            f"{path} has {shape[0]}x{shape[1]} with {shape[2]}, and {arrays.classes} classes"
        )
    return image_dataset(arrays)


def resnet20_cifar100() -> Recipe:
    """The paper's experiment with residual networks of 0.28 million parameters, ResNet-20 on CIFAR-100.

    Its authors' scripts train for two thirds as long as the paper says; their milestones are kept as fractions of each
    stage, the merge stage's too. The images stay on the device, normalised by CIFAR's own statistics.
    """
    return Recipe(
        name="resnet20-cifar100",
        make_network=resnet20,
        most_classes=100,
        image_size=32,
        augmentation=AUGMENTATIONS["cifar"],
        batch_size=128,
        teacher=Plan(epochs=300, lr=0.1, milestones=(150, 225)),
        long=Plan(epochs=900, lr=0.1, milestones=(450, 675)),
        merge=Options(
            link_at=0.0,
            merge_epochs=150,
            finetune_epochs=150,
            lr=0.1,
            merge_milestones=(75, 105),
            milestones=(75, 113),
            weight_decay=1e-4,
            lam_start=0.05,
            lam_step=0.05,
        ),
        test_every=10,
        source="Pašen & Boža, Merging of neural networks, section 3.3 (5 replicates), and its code, cifar100/",
    )


def resnet18_imagewoof() -> Recipe:
    """The paper's third experiment: ResNet-18 on Imagewoof, ten breeds of dogs, at 224×224 pixels.

    Images of 160 pixels a side are what its authors used, cut and enlarged to 224.
    """
    return Recipe(
        name="resnet18-imagewoof",
        make_network=ResNet18,
        most_classes=10,
        image_size=224,
        augmentation=AUGMENTATIONS["imagewoof"],
        batch_size=32,
        teacher=Plan(epochs=200, lr=0.01, milestones=(100, 150)),
        long=Plan(epochs=600, lr=0.01, milestones=(300, 450)),
        merge=Options(link_at=0.0, merge_epochs=100, finetune_epochs=100, milestones=(50, 75), lam_step=0.05),
        test_every=10,  # there are nearly half as many images to test on as to train on
        source="Pašen & Boža, Merging of neural networks, section 3.2 (5 replicates), and its code, imagewoof/",
    )


def resnet18_imagenet() -> Recipe:
    """The paper's last experiment, ResNet-18 on ImageNet-1k: teachers of 20 epochs each, 20 of merging, 90 of fine-tuning.

    ``one`` trains for the same 150 epochs, ``bo3`` for 50 each; the paper's figure beside ``bo3`` is that of a network
    trained for 90. The authors trained with timm: random crops, mirroring and a colour jitter of 0.4, as here. Its SGD has
    Nesterov's momentum, and their gates were in the weights' optimizer; here gates have an optimizer of their own, without
    decay, as everywhere.
    """
    return Recipe(
        name="resnet18-imagenet",
        make_network=ResNet18,
        most_classes=1000,
        image_size=224,
        augmentation=Augmentation(
            scale=(0.08, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, shorter_side=1 / 0.95
        ),
        batch_size=256,
        held_out=0.02,
        teacher=Plan(epochs=20, lr=0.1, milestones=(9, 18)),
        long=Plan(epochs=150, lr=0.1, milestones=(50, 100)),
        third=Plan(epochs=50, lr=0.1, milestones=(17, 34)),
        merge=Options(
            link_at=0.0,
            merge_epochs=20,
            finetune_epochs=90,
            lr=0.1,
            finetune_lr=0.07,
            milestones=(30, 60),
            warmup=2,
            weight_decay=1e-4,
            lam_start=0.3,
            lam_step=0.2,
        ),
        source="Pašen & Boža, Merging of neural networks, section 3.4, and its code, imagenet/ (1 replicate)",
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "sine": sine,
    "digits": digits,
    "lenet-imagewoof": lenet_imagewoof,
    "resnet20-cifar100": resnet20_cifar100,
    "resnet18-imagewoof": resnet18_imagewoof,
    "resnet18-imagenet": resnet18_imagenet,
}
