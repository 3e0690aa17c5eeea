"""A recipe is every choice of one experiment; the experiments by name are functions that return one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmerge.data.arrays import load_npz
from fastmerge.data.augmentation import AUGMENTATIONS, Augmentation, flip_and_shift
from fastmerge.data.dataset import Dataset, image_dataset, load_digits, sine_curve, sine_dataset
from fastmerge.data.decoding import OnBadImage
from fastmerge.data.trees import load_folder
from fastmerge.evaluation import Criterion
from fastmerge.merging.options import Options, Plan
from fastmerge.networks import LeNet, ResNet18, SineMLP, resnet20, small_lenet
from fastmerge.schedules import scaled_lam_step


class LoadData(Protocol):
    """Gives a data set.

    Args:
        path: where it is; None where it comes from nowhere.
        seed: for what is drawn.
        on_bad_image: what a file that can't be read does, where there are files.
    """

    def __call__(self, path: Path | None, seed: int, on_bad_image: OnBadImage = "raise", /) -> Dataset: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice of one experiment; strategies are compared at equal epochs or at equal cost.

    A recipe either loads a data set that stays in memory, and trains its replicates as stacks, or it reads images by
    loaders, and trains one network after another.

    Attributes:
        name: as on the command line.
        make_network: ``make_network(classes, width)``, a network with fresh weights.
        merge: the options of the merge, as :func:`fastmerge.merge` takes them; momentum and weight decay are those of all
            networks.
        teacher: each of the teachers.
        long: one network for all epochs.
        third: each of the three of which the best counts; None is ``teacher``.
        batch_size: samples per step.
        teachers: how many the student has.
        metric: what strategies are compared by, on the test data.
        held_out: fraction of the training data that no network trains on, for strategies that choose among networks.
        test_every: epochs between two looks at the test data; the end of a stage always has one.
        load_data: ``load_data(path, seed, on_bad_image)``, for data in memory; None for images by loaders.
        augment: random changes of images in memory.
        stack: replicates in memory that train as one. Results depend on it only by rounding and by gates' draws.
        curve: for a regression of one variable, ``curve()`` gives inputs (points, 1) and the true values to draw.
        image_size, augmentation, most_classes: of images by loaders.
        source: where the choices come from.
    """

    name: str
    make_network: Callable[[int, int], nn.Module]
    merge: Options
    teacher: Plan
    long: Plan
    batch_size: int
    source: str
    third: Plan | None = None
    teachers: int = 2
    metric: Literal["test_loss", "test_accuracy"] = "test_accuracy"
    held_out: float = 0.1
    test_every: int = 1
    load_data: LoadData | None = None
    augment: Callable[[Tensor, Any], Tensor] | None = None
    stack: int = 1
    curve: Callable[[], tuple[Tensor, Tensor]] | None = None
    image_size: int = 0
    augmentation: Augmentation | None = None
    most_classes: int = 0

    def __post_init__(self) -> None:
        student = self.teachers * self.teacher.epochs + self.merge.merge_epochs + self.merge.finetune_epochs
        if self.long.epochs != student or not student <= 3 * self.best_of.epochs < student + 3:
            raise ValueError(
                f"a recipe needs strategies of equal epochs: the student has {student}, one has {self.long.epochs}, the "
                f"best of three has 3 x {self.best_of.epochs}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a fraction of the training data, above 0 and below 1; got {self.held_out}")
        if self.batch_size < 1:
            raise ValueError(f"a recipe needs a batch_size of at least 1; got {self.batch_size}")

    @property
    def in_memory(self) -> bool:
        """Whether its data is loaded as a whole, and its replicates train as stacks."""
        return self.load_data is not None

    @property
    def best_of(self) -> Plan:
        """Each of three networks of which the best counts."""
        return self.teacher if self.third is None else self.third

    @property
    def criterion(self) -> Criterion:
        """The loss of all networks."""
        return self.merge.criterion

    @property
    def epochs(self) -> int:
        """In all, of each strategy."""
        return self.long.epochs

    def scaled(self, budget: float) -> Recipe:
        """The same experiment with a fraction of the epochs.

        Every stage and milestone shrinks by the budget, rounded so that the strategies stay equal, and λ grows faster, so
        that it ends where it would have.

        Raises:
            ValueError: the budget is not above 0.
        """
        if not budget > 0:
            raise ValueError(f"a budget must be above 0; got {budget}")
        merge, finetune = self.merge.merge_plan.scaled(budget), self.merge.finetune_plan
        # Where stages are multiples of the merge stage, they stay so.
        even = all(
            plan.epochs % self.merge.merge_epochs == 0 for plan in (self.teacher, finetune, self.long, self.best_of)
        )
        factor = merge.epochs / self.merge.merge_epochs if even else budget
        finetune, teacher = finetune.scaled(factor), self.teacher.scaled(factor)
        epochs = self.teachers * teacher.epochs + merge.epochs + finetune.epochs
        step = self.merge.lam_step
        if step is not None:
            step = scaled_lam_step(self.merge.lam_start, step, self.merge.merge_epochs, merge.epochs)
        return replace(
            self,
            teacher=teacher,
            long=self.long.scaled(epochs / self.long.epochs),
            third=None if self.third is None else self.third.scaled(-(-epochs // 3) / self.third.epochs),
            merge=replace(
                self.merge,
                merge_epochs=merge.epochs,
                merge_milestones=merge.milestones or None,
                finetune_epochs=finetune.epochs,
                milestones=finetune.milestones,
                warmup=finetune.warmup,
                lam_step=step,
            ),
            test_every=max(1, round(self.test_every * epochs / self.epochs)),
        )

    def varied(self, paper: bool = False, batch_size: int | None = None, **options: Any) -> Recipe:
        """The same with other options of the merge, or another batch size in all stages.

        Args:
            paper: takes the paper's, see :meth:`Options.as_in_the_paper`.
            batch_size: samples per step; of all processes together where they share a network. Learning rates stay.
            options: of :class:`Options`; None is the recipe's own.

        Raises:
            ValueError: the paper's choices and others are asked for, or one is out of range.
        """
        changes = {name: value for name, value in options.items() if value is not None}
        if paper and changes:
            raise ValueError(f"--paper sets {', '.join(options)} itself; leave them out, or leave out --paper")
        merge = self.merge.as_in_the_paper() if paper else replace(self.merge, **changes)
        size = self.batch_size if batch_size is None else batch_size
        return replace(self, merge=merge, batch_size=size)

    def training(self, plan: Plan) -> Options:
        """How a network trains by itself: the fine-tuning of a merge of this plan.

        What concerns gates and students alone is left at its default: checkpoints of such networks don't depend on it.
        """
        defaults: dict[str, Any] = {each.name: each.default for each in fields(Options) if each.metadata["merging"]}
        return replace(
            self.merge,
            **defaults,
            finetune_epochs=plan.epochs,
            finetune_lr=plan.lr,
            milestones=tuple(plan.milestones),
            warmup=plan.warmup,
        )

    def config(self) -> dict[str, Any]:
        """The choices as JSON values; functions by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: _plain(value) for name, value in values.items() if value is not None}
        return {"epochs": self.epochs, **plain, "merge": self.merge.compared()}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


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
