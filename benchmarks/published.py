"""How fast others have measured plain networks to train, for cards that this project has not run on.

From the images per second of a plain network follows which share of a card's data sheet such a training reaches, and from that
share what the steps of another network of the kind are to be expected to take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.cases import Case
from benchmarks.counting import Ceilings, step_work


@dataclass(frozen=True)
class Measurement:
    """The training of one plain network on one GPU, in mixed precision and channels-last.

    Attributes:
        card: the GPU.
        sheet: by its maker's data sheet: dense float16 on tensor cores with float32 sums, memory, last cache.
        case: what was trained; ``teachers`` is 1.
        rate: images per second.
        source: where it is published.
        gpus: with so many GPUs of one machine, each with the whole batch, ...
        gpus_rate: ... so many images per second; both 0 where nothing is published.
    """

    card: str
    sheet: Ceilings
    case: Case
    rate: float
    source: str
    gpus: int = 0
    gpus_rate: float = 0.0

    @property
    def efficiency(self) -> float:
        """The least time of a step by the data sheet / the time that it took."""
        return self.sheet.seconds(step_work(self.case, False)) * self.rate / self.case.batch

    def seconds(self, case: Case, dense: bool) -> float:
        """What a step of T networks side by side takes with the same efficiency.

        Args:
            case: the task; its device does not matter.
            dense: as for :func:`benchmarks.counting.step_work`.
        """
        return self.sheet.seconds(step_work(case, dense)) / self.efficiency


def _plain(network: str, batch: int) -> Case:
    return replace(Case(network, batch, 224, "fp16", "cuda"), teachers=1)


MEASUREMENTS = (
    Measurement(
        card="GeForce RTX 3090",
        sheet=Ceilings(flops=71e12, bandwidth=936e9, cache=6 * 2**20),
        case=_plain("resnet18", 512),
        rate=3481.78,
        source="https://github.com/huggingface/pytorch-image-models/blob/main/results/"
        "benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv",
    ),
    Measurement(
        card="A100 (SXM, 80 GB)",
        sheet=Ceilings(flops=312e12, bandwidth=2.039e12, cache=40 * 2**20),
        case=_plain("resnet50", 256),
        rate=2470,
        source="https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/Classification/ConvNets/resnet50v1.5",
        gpus=8,
        gpus_rate=16621,
    ),
)
