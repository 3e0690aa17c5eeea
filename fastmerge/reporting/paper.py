"""The paper's own figures, to stand beside a run's.

Source: M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973), Tables 1 and 2.
"""

from __future__ import annotations

_MEANS = {
    "sine": {"student": 0.077, "bo3": 0.240, "one": 0.249},
    "lenet-imagewoof": {"student": 0.399, "bo3": 0.385, "one": 0.378},
    "resnet18-imagewoof": {"student": 0.826, "bo3": 0.806, "one": 0.813},
    "resnet20-cifar100": {"student": 0.689, "bo3": 0.670, "one": 0.675},
    "resnet18-imagenet": {"student": 0.7047, "bo3": 0.6976, "one": 0.7028},
}


def paper_mean(recipe: str, strategy: str) -> float | None:
    """The paper's mean test loss (sine) or test accuracy of a strategy; None where the paper has none."""
    return _MEANS.get(recipe, {}).get(strategy)
