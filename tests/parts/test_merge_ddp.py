"""Several processes that merge together are one with the same batches; when one is lost, the checkpoint is not."""

import functools
import re
import signal
import time

import pytest

import ddp_merge
from ddp_merge import (
    assert_close,
    diverging,
    draws,
    interrupted,
    label_sets,
    merged,
    normed,
    other_teachers,
    shown,
    streamed,
    uneven,
)
from gloo import together

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


@pytest.fixture(scope="module")
def alone():
    """What one process does with whole batches."""
    return merged(0, 1)


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (3, 2)])
def test_processes_are_one_with_the_same_batches(alone, size, accumulate):
    found = together(size, merged, None, accumulate)
    for rank in range(size):
        assert isinstance(found[rank], dict), found
        assert_close(found[rank], alone)
        assert all((found[rank]["student"][name] == value).all() for name, value in found[0]["student"].items())


@pytest.mark.parametrize(
    ("one_loader", "options"),
    [(True, {}), pytest.param(False, {"distill": 0.3}, marks=pytest.mark.slow)],
)
def test_processes_merge_teachers_of_different_label_sets_as_one_does(one_loader, options):
    work = functools.partial(label_sets, one_loader=one_loader, **options)
    found, alone = together(2, work), work(0, 1)
    for rank in range(2):
        assert isinstance(found[rank], dict), found
        assert_close(found[rank], alone)
    assert alone["history"]["epochs"][-1]["val"]["metrics"].keys() == {"own part", "part 0", "part 1"}


def test_accumulated_batches_are_one(alone):
    assert_close(merged(0, 1, None, 3), alone)


def test_every_process_draws_its_own_gates():
    found = together(2, draws)
    assert found[0] != found[1]
    assert len(found[0]) == len(found[1]) == 3 * ddp_merge.BATCH


def test_running_statistics_end_the_same_in_every_process():
    found = together(2, normed)
    assert isinstance(found[0], dict), found
    assert found[0] == found[1]


def test_the_bar_has_figures_within_an_epoch_too():
    found = together(2, shown)
    within = [part for part in found[0].split("\r") if "loss=" in part and " 25/25 " not in part]
    assert within
    assert all("images/s=" in part and "memory=" in part for part in within)
    assert found[1] == ""


def test_processes_with_unequal_loaders_are_refused():
    found = together(2, uneven)
    assert set(found.values()) == {
        "ValueError: processes that merge together need equally many batches each; they have [4, 3]. Use a DistributedSampler"
    }


def test_processes_whose_loaders_have_no_length_end_an_epoch_together():
    found, alone = together(2, streamed), streamed(0, 1)
    for rank in range(2):
        assert isinstance(found[rank], dict), found
        assert_close(found[rank], alone)


def test_processes_with_unequal_teachers_are_refused():
    (found,) = set(together(2, other_teachers).values())
    assert found.startswith("ValueError: all processes must have the same teacher 0; they have ")


@pytest.mark.parametrize("training", [True, False])
def test_nan_in_one_process_ends_all_with_the_same_error(training):
    found = together(2, diverging, training)
    assert len(set(found.values())) == 1, found
    if training:
        assert found[0].startswith("FloatingPointError: the loss became nan in step 3 of epoch 1 of the merge stage")
    else:
        said = (
            "FloatingPointError: the validation loss after epoch 1 of the merge stage became nan in batch 1, "
            "whose inputs are finite now: the learning rate 0.05 may be too high"
        )
        assert found[0].startswith(said)


def test_a_signal_to_one_stops_all_and_any_number_of_processes_go_on(alone, tmp_path):
    found = together(2, interrupted, tmp_path, signal.SIGTERM, 20)
    assert set(found.values()) == {"Interrupted: interrupted by SIGTERM"}
    assert ddp_merge.has_checkpoint(tmp_path)
    assert_close(together(3, merged, tmp_path)[0], alone)


def test_a_process_that_dies_ends_the_others_with_a_checkpoint_to_go_on_from(alone, tmp_path):
    started = time.monotonic()
    found = together(2, interrupted, tmp_path, ddp_merge.KILL, 25, missing=1)
    assert time.monotonic() - started < 200
    assert found[0].startswith("ProcessLostError: process 0 of 2 lost another one, which ended or hangs (")
    assert re.search(r"; the last checkpoint is \S+\.safetensors$", found[0])
    assert_close(merged(0, 1, tmp_path), alone)
