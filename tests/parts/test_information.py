"""fastmerge.info(): of the machine, and of a big student."""

from __future__ import annotations

import json

import pytest

import fastmerge
from architectures import merged
from fastmerge.cli import main


def test_without_argument_it_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    assert capsys.readouterr().out.rstrip("\n") == str(fastmerge.info()) == repr(fastmerge.info())
    main(["info", "--json"])
    assert json.loads(capsys.readouterr().out) == fastmerge.info().data


def test_of_a_big_student() -> None:
    big = merged("resnet_squeeze_excitation")
    found = fastmerge.info(big)
    assert json.loads(json.dumps(found.data)) == found.data
    names = [norm["name"] for norm in found.data["normalisations"]]
    fused = [norm["name"] for norm in found.data["normalisations"] if norm["fused"]]
    assert set(names) == {name.rpartition(".")[0] for name, _ in big.network.named_parameters() if "bn" in name} | {
        "layer2.0.shortcut.1"
    }
    assert found.data["normalisations_fused"] == len(fused)
    assert 0 < len(fused) < len(names)
    for norm in found.data["normalisations"]:
        assert bool(norm["fused"]) != bool(norm["reason"])
        assert norm["fused"] or norm["name"] in str(found)
    assert f"{len(fused)} of {len(names)} normalisations" in str(found)


def test_says_whether_it_is_linked_and_fused() -> None:
    big = merged("vgg")
    assert "block-diagonal" in str(fastmerge.info(big))
    assert "on CUDA devices" in str(fastmerge.info(big))
    big.link()
    big.fused = False
    assert fastmerge.info(big).data["linked"]
    assert "never" in str(fastmerge.info(big))
    assert "block-diagonal" not in str(fastmerge.info(big))
