"""BigStudent is exact for random networks (``-m slow``: for very many)."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import fastmerge
from teachers import (
    depends_on_input,
    disturb_weights,
    make_batch,
    make_teachers,
    mean_output,
    relative_error,
    select_gates,
)
from zoo_random import RandomNetwork

X = (make_batch(6, (3, 6, 6)),)


@torch.no_grad()
def check(seed: int, length: int) -> None:
    teachers = make_teachers(partial(RandomNetwork, seed, length), X, count=2)
    expected = mean_output(teachers, X)
    if not depends_on_input(expected):
        pytest.skip("the random network is dead")
    big = fastmerge.BigStudent(*teachers, example_inputs=X).eval()
    for link in (lambda: None, big.link):
        link()
        with big.open_gates():
            assert relative_error(big(*X), expected) < 1e-9
        select_gates(big, X, seed)
        assert relative_error(big.compress()(*X), big(*X)) < 1e-9
    disturb_weights(big)
    select_gates(big, X, seed + 1)
    assert relative_error(big.compress()(*X), big(*X)) < 1e-9


@pytest.mark.parametrize("seed", range(60))
def test_random_network(seed: int) -> None:
    check(seed, length=15)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2000, 50))
def test_many_random_networks(start: int) -> None:
    for seed in range(start, start + 50):
        try:
            check(seed, length=8 + seed % 25)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise AssertionError(f"RandomNetwork({seed}, {8 + seed % 25}): {error}") from error
        except pytest.skip.Exception:
            continue
