"""The environment of a run: true, plain, and quick to ask for."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from fastmerge import environment as module
from fastmerge.environment import environment


def test_it_is_plain_json_and_names_the_versions_in_use():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["packages"]["numpy"] == __import__("numpy").__version__
    assert found["cpu"]["cores"] >= 1
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_what_is_missing_is_none_and_nothing_raises(monkeypatch):
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-distribution",))
    monkeypatch.setattr(module, "_ROOT", Path("/nonexistent"))
    monkeypatch.setattr(module.importlib.metadata, "distributions", list)
    monkeypatch.setattr(module.shutil, "which", lambda command: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = environment()
    assert found["packages"] == {"no-such-distribution": None}
    assert found["dali"] is None
    assert found["commit"] is None
    assert found["gpus"] == []
    assert found["driver"] is None


def test_the_commit_is_the_checkouts_own(monkeypatch, tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert environment()["commit"] == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert environment()["commit"] == git("rev-parse", "HEAD") + "-dirty"
    inside = tmp_path / "site-packages"  # an installed package in somebody else's repository is not that repository
    inside.mkdir()
    monkeypatch.setattr(module, "_ROOT", inside)
    assert environment()["commit"] is None


def test_asking_imports_none_of_the_optional_packages():
    heavy = "torchvision", "matplotlib", "sklearn", "nvidia.dali"
    code = (
        "import sys; from fastmerge.environment import environment; environment();"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
