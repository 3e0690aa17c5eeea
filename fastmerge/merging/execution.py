"""How the steps of a merge are run. But for rounding, and for what BatchNorm computes over a batch, the same comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmerge.merging.checks import check_count
from fastmerge.processes import Processes


@dataclass(frozen=True)
class Execution:
    """The choices that :func:`fastmerge.merge` explains, for plain training too.

    Attributes:
        accumulate: batches per optimizer step.
        cuda_graph: whether steps are captured as a CUDA graph; None: where that is measured to be faster, and nothing is
            compiled.
        compile: whether networks are compiled by torch.compile.
        sync_batch_norm: whether BatchNorm takes its statistics over the batches of all processes.
    """

    accumulate: int = 1
    cuda_graph: bool | None = None
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_count("accumulate", "the batches per step", self.accumulate)

    def check(self, device: torch.device, processes: Processes) -> None:
        """Raises where it can't be.

        Raises:
            ValueError: A CUDA graph is wanted where there can be none.
        """
        if not self.cuda_graph:
            return
        if device.type != "cuda":
            raise ValueError(f"cuda_graph=True needs a CUDA device; got {device}")
        if processes.size > 1 or self.accumulate > 1:
            raise ValueError(
                f"cuda_graph=True needs one process and accumulate=1; got {processes.size} processes and "
                f"accumulate={self.accumulate}"
            )
