"""The README says what is true: its examples run, and its tables and those of the docs are those of the committed results."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from docs_renderer import docs_renderer

README = Path(__file__).resolve().parents[2] / "README.md"


def test_examples_run_as_they_stand() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    x = torch.randn(32, 3, 8, 8)
    target = torch.randint(5, (32,))
    teachers = [
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        for _ in range(2)
    ]
    mean = (teachers[0](x) + teachers[1](x)) / 2
    names = {"t1": teachers[0], "t2": teachers[1], "x": x, "epochs": 2}
    names["train_loader"] = DataLoader(TensorDataset(x, target), batch_size=16)
    for block in blocks:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*P\\[g>0\\].*")  # two epochs are too few for the gates
            exec(block, names)
    assert isinstance(names["student"], nn.Sequential)
    assert names["big"].linked
    assert not torch.allclose(names["big"](x), mean)


@pytest.mark.parametrize("page", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs_renderer().rendered(text) == text


def test_a_changed_figure_is_noticed() -> None:
    text = README.read_text(encoding="utf-8")
    figure = re.search(r"\*\*\d\d\.\d\d ± \d\.\d\d\*\*", text)
    assert figure is not None
    changed = text.replace(figure[0], "**99.99**", 1)
    assert docs_renderer().rendered(changed) == text


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link: str) -> None:
    assert (README.parent / link.partition("#")[0]).exists()
