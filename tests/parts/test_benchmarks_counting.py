"""The counted work of a step is that of the layer table which the targets were derived from."""

from __future__ import annotations

import pytest

from benchmarks.cases import Case
from benchmarks.counting import Ceilings, Work, step_work

pytest.importorskip("torchvision")
RESNET18 = Case("resnet18", 256, 224, "bf16", "cuda")
H200 = Ceilings(790e12, 4.3e12)


def find(works: list[Work], name: str) -> Work:
    (work,) = [work for work in works if work.layer == name]
    return work


def convolutions(works: list[Work]) -> list[Work]:
    return [work for work in works if work.layer.split()[1:] in (["forward"], ["dgrad"], ["wgrad"])]


@pytest.mark.parametrize(
    ("layer", "block", "dense"),
    [
        ("conv1 forward", 0.209, 0.209),
        ("layer1.0.conv1 forward", 0.150, 0.300),
        ("layer2.0.conv1 dgrad", 0.075, 0.150),
        ("layer2.0.downsample.0 forward", 0.036, 0.036),
        ("layer2.0.downsample.0 dgrad", 0.072, 0.072),
        ("layer4.0.downsample.0 wgrad", 0.009, 0.017),
        ("layer4.1.conv2 wgrad", 0.150, 0.300),
    ],
)
def test_milliseconds_of_single_passes(layer: str, block: float, dense: float) -> None:
    for expected, is_dense in ((block, False), (dense, True)):
        milliseconds = 1e3 * H200.seconds([find(step_work(RESNET18, is_dense), layer)])
        assert milliseconds == pytest.approx(expected, abs=0.0006)


def test_milliseconds_of_all_convolutions_and_of_the_step() -> None:
    block, dense = step_work(RESNET18, False), step_work(RESNET18, True)
    assert 1e3 * H200.seconds(convolutions(block)) == pytest.approx(7.2, abs=0.1)
    assert 1e3 * H200.seconds(convolutions(dense)) == pytest.approx(13.7, abs=0.1)
    assert 1e3 * H200.seconds(block) == pytest.approx(12.4, rel=0.02)
    assert 256 / H200.seconds(block) == pytest.approx(20.6e3, rel=0.02)  # img/s that no card of this class reaches
    assert 1e3 * H200.seconds(dense) == pytest.approx(19.1, rel=0.02)


def test_the_first_layer_has_no_gradient_of_its_input() -> None:
    assert not [work for work in step_work(RESNET18, False) if work.layer == "conv1 dgrad"]


def test_the_last_layer_gives_one_output() -> None:
    case = Case("lenet", 10, 28)
    assert find(step_work(case, True), "fc3 forward").flops == 2 * 2 * 10 * 84 * 10
    assert find(step_work(case, True), "fc2 forward").flops == 4 * 2 * 10 * 120 * 84
    assert find(step_work(case, False), "fc2 forward").flops == 2 * 2 * 10 * 120 * 84


def test_what_fits_the_cache_is_not_held_to_the_bandwidth() -> None:
    work = [Work("a", 1.0, 100.0)]
    assert Ceilings(1.0, 1.0, cache=99).seconds(work) == 100
    assert Ceilings(1.0, 1.0, cache=100).seconds(work) == 1
