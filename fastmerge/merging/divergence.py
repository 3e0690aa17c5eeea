"""Where a loss became NaN or Inf, and what is likely to blame, in a sentence."""

from __future__ import annotations

import torch

from fastmerge.evaluation import NotFiniteError
from fastmerge.history import Stage


def blame_training(error: NotFiniteError, stage: Stage, epoch: int, lr: float, autocast: torch.dtype | None) -> str:
    """Of a loss in training, in an epoch counted from 1, with the learning rate ``lr``."""
    step, loss, value = error.args
    where = f"the {loss.replace('_', ' ')} became {value} in step {step} of epoch {epoch} of the {stage} stage"
    if loss == "gate_loss":
        return f"{where}; the gates moved too far: try a lower gate_lr or lam_step"
    if autocast is torch.float16:
        return f"{where}; float16 may have overflowed: try autocast=torch.bfloat16, or a learning rate below {lr:g}"
    if step == epoch == 1:
        return f"{where}, its first; look for NaN or Inf in the data, or for training-mode layers that give them"
    return f"{where}; the learning rate {lr:g} is likely too high, or a batch holds NaN or Inf"


def blame_scoring(error: NotFiniteError, whose: str, lr: float | None, autocast: torch.dtype | None) -> str:
    """Of a loss on validation data; ``whose`` it is, and the learning rate of the network if it was trained before."""
    batch, _, value, has_finite_inputs = error.args
    where = f"the validation loss {whose} became {value} in batch {batch}"
    if has_finite_inputs is False:
        return f"{where}, whose inputs hold NaN or Inf"
    causes = []
    if lr is None:
        causes.append(f"the weights {whose} are too large")
    if autocast is torch.float16:
        causes.append("float16 may have overflowed: try autocast=torch.bfloat16")
    if lr is not None:
        causes.append(f"the learning rate {lr:g} may be too high")
    again = (
        "; look for NaN or Inf in its inputs, or " if has_finite_inputs is None else ", whose inputs are finite now: "
    )
    return f"{where}{again}{', or '.join(causes)}"
