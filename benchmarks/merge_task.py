"""A merge stage to be timed, of fastmerge and of the naive dense network, and what becomes of the student.

Both begin with the same trained teachers and take equally many steps on the same batches in the same order, with the same
learning rates and the same growth of λ. The naive network's channels that are most open go into a student as fastmerge's do.
Each student is then trained for as many steps, in the same way, and tested.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import fastmerge
from benchmarks.baselines.naive_dense import NaiveDense, naive_dense
from benchmarks.cases import Case
from benchmarks.learnable import Images, TimedBatches, images_of
from fastmerge.schedules import GATE_MOMENTUM, fitting_gate_lr, fitting_lam_step

LR, FINETUNE_LR, MOMENTUM, LAM_START = 0.03, 0.01, 0.9, 0.01
_TEACHERS_SEED, _STUDENTS_SEED = 500, 900
_TESTED = 256  # images of a batch


@dataclass
class MergeTask:
    """What is trained on what, and for how long.

    Attributes:
        case: network, batch, images.
        epochs: of the merge stage.
        steps: of each of its epochs.
        teacher_epochs: of each teacher's training.
        finetune_epochs: of a student's training after the stage.
        test: images to test on, at most.
    """

    case: Case
    epochs: int
    steps: int
    teacher_epochs: int
    finetune_epochs: int
    test: int = 2_000

    @cached_property
    def images(self) -> tuple[Images, Images]:
        """To train on and to test on."""
        return images_of(self.case, self.steps * self.case.batch, self.test)

    def batches(self, seed: int) -> TimedBatches:
        return TimedBatches(self.images[0], self.case.batch, seed)

    @cached_property
    def teachers(self) -> list[nn.Module]:
        """Trained teachers, in eval mode; not to be changed."""
        teachers = self.case.make_teachers()
        for number, teacher in enumerate(teachers):
            self._train(teacher, self.teacher_epochs, self.batches(_TEACHERS_SEED + number))
        return [teacher.eval() for teacher in teachers]

    def naive(self, batches: TimedBatches) -> NaiveDense:
        """The merge stage of the naive network."""
        network = self.case.place(naive_dense(self.teachers)).train()
        widest, steps = max(len(parameter) for parameter in network.gate_parameters()), self.epochs * self.steps
        gate_lr = fitting_gate_lr(steps)
        lam = fastmerge.QuadraticLambda(LAM_START, fitting_lam_step(self.epochs, steps, widest, LAM_START, gate_lr))
        optimizers: list[torch.optim.Optimizer] = [
            SGD(network.weight_parameters(), LR, MOMENTUM),
            SGD(network.gate_parameters(), gate_lr, GATE_MOMENTUM),
        ]
        for _ in range(self.epochs):
            self._epoch(network, optimizers, batches, lambda: lam * network.gate_loss())
            lam.step()
        return network

    def student_of(self, naive: NaiveDense) -> nn.Module:
        """A student of the naive network's most open channels, cut out by fastmerge."""
        examples, _ = self.images[0].batch(torch.arange(2, device=self.case.device))
        big = self.case.place(fastmerge.BigStudent(*self.teachers, example_inputs=examples.float()))
        big.link()
        wide = big.network.state_dict()
        tensors = {name: tensor.expand_as(wide[name]) for name, tensor in naive.network.state_dict().items()}
        big.network.load_state_dict(tensors)
        big.gates.load_state_dict(naive.gates.state_dict())
        return big.compress(in_place=True)

    def merged(self, batches: TimedBatches, **options: Any) -> tuple[nn.Module, float]:
        """The merge stage of fastmerge, and compression; what share of the channels left before it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "P.g>0.")  # it may be too short for the gates to arrive
            student, history = fastmerge.merge(
                self.teachers,
                batches,
                merge_epochs=self.epochs,
                finetune_epochs=0,
                lr=LR,
                momentum=MOMENTUM,
                lam_start=LAM_START,
                autocast=None if self.case.precision == "fp32" else self.case.dtype,
                channels_last=True,
                progress=False,
                **options,
            )
        dropped = sum(sum(each["dropped"].values()) for each in history.compactions)
        return student, dropped / (len(self.teachers) * sum(sum(counts) for counts in history.kept.values()))

    def accuracy(self, student: nn.Module, seed: int) -> float:
        """Share of the test images that a student knows after its fine-tuning."""
        self._train(student, self.finetune_epochs, self.batches(_STUDENTS_SEED + seed), FINETUNE_LR)
        return self.score(student)

    @torch.no_grad()
    def score(self, network: nn.Module) -> float:
        """Share of the test images that a network knows."""
        network.eval()
        test, right = self.images[1], 0.0
        for index in torch.arange(len(test), device=self.case.device).split(_TESTED):
            x, target = test.batch(index)
            with self._precision():
                right += float((network(x).argmax(1) == target).sum())
        return right / len(test)

    def _train(self, network: nn.Module, epochs: int, batches: Iterable[tuple[Tensor, Tensor]], lr: float = LR) -> None:
        """As networks are trained: with a learning rate that is a tenth in the last third."""
        optimizer = SGD(network.train().parameters(), lr, MOMENTUM)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = lr if epoch < 2 * epochs / 3 else lr / 10
            self._epoch(network, [optimizer], batches)

    def _epoch(
        self,
        network: nn.Module,
        optimizers: list[Optimizer],
        batches: Iterable[tuple[Tensor, Tensor]],
        further: Callable[[], Tensor] | None = None,
    ) -> None:
        for x, target in batches:
            for optimizer in optimizers:
                optimizer.zero_grad()
            with self._precision():
                loss = F.cross_entropy(network(x), target)
            (loss if further is None else loss + further()).backward()
            for optimizer in optimizers:
                optimizer.step()

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.case.device, self.case.dtype, enabled=self.case.precision != "fp32")
