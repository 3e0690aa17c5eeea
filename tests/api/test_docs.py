"""The pages and notebooks say what is true: their code runs, their links lead somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmerge.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def test_getting_started_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "get-started.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*P\\[g>0\\].*")  # three epochs are too few for the gates
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)
    assert type(names["student"]) is type(names["t1"])
    assert (tmp_path / "student.pt").exists()


@pytest.fixture
def own_methods() -> Iterator[None]:
    """Methods that a notebook registers are gone afterwards."""
    known = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(known)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("own_methods")
def test_notebook(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, and what it says is what the committed outputs were made by."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert cell["execution_count"], "run the notebook before committing it, so that readers see its outputs"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_of_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http|#)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link.partition("#")[0]).resolve()
        assert target.exists(), link
        assert target.is_relative_to(DOCS), f"{link} is outside of the site"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs: make docs-site")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path], cwd=ROOT, check=True)
    assert "compress" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
