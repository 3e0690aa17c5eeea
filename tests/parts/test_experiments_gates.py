"""What the student strategy says of gates that did not do their part."""

import pytest

from fastmerge.experiments.run import run
from tiny_recipes import images_recipe


def warnings_of(**changes) -> list[str]:
    with pytest.warns(UserWarning, match=r"P\[g>0\]") as found:
        run(images_recipe(**changes), ["student"], replicates=1, workers=1, progress=False)
    return [str(warning.message) for warning in found]


def test_gates_that_do_not_move():
    (warning,) = warnings_of(gate_lr=1e-9)
    assert warning.startswith("mean of 1 replicates: P[g>0] did not move in 4 of 4 channel groups")


def test_gates_that_do_not_arrive():
    assert any("is above 1/T = 0.50" in warning for warning in warnings_of(gate_lr=10.0, lam_start=1.0))


def test_gates_that_close_too_far():
    assert any("is below 1/T = 0.50" in warning for warning in warnings_of(gate_lr=50.0, lam_start=1.0))
