"""Merges that are killed, asked to stop, or find their checkpoints damaged, and go on."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import killed_merge
from fastmerge import merge
from fastmerge.checkpoints import Interrupted, Snapshots, StopRequests, read_snapshot
from fastmerge.evaluation import Tally
from fastmerge.files import atomic
from full_disk import files_of_at_most
from killed_merge import run, run_until
from killing import assert_killed
from small_task import X, Y

pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


@pytest.fixture(scope="module")
def whole():
    """What the merge gives when nothing happens."""
    return run(None)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A directory with the checkpoints of a merge that Ctrl-C ended in its linked epochs, and the error."""
    directory = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Interrupted) as caught:
        run(directory, 18, lambda: os.kill(os.getpid(), signal.SIGINT), checkpoint_seconds=0)
    return directory, caught.value


@pytest.fixture
def copied(interrupted, tmp_path):
    """A copy of that directory."""
    return Path(shutil.copytree(interrupted[0], tmp_path / "copy"))


def last(directory: Path) -> dict:
    return read_snapshot(Snapshots(directory, {}).files()[-1])[1]


def place(directory: Path) -> tuple[str, int, int]:
    state = last(directory)
    return state["stage"], state["epoch"], state["step"]


def assert_same(result, whole) -> None:
    (student, history), (expected, record) = result, whole
    for (name, value), other in zip(student.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    a, b = history.record(), record.record()
    for epoch in (*a["epochs"], *b["epochs"]):
        del epoch["images_per_second"]
    assert a == b


def test_killed_in_every_stage_it_ends_as_if_it_had_not_been(tmp_path):
    # Calls of the criterion in a process, the checks before the merge included, and how far that brings it.
    for calls, where in [
        (8, ("merge", 0, 2)),
        (12, ("merge", 2, 1)),
        (15, ("finetune", 0, 2)),
        (5, ("finetune", 0, 4)),
    ]:
        assert_killed(run_until, tmp_path, calls)
        assert place(tmp_path) == where
    assert_same(run(tmp_path, resume=True, num_workers=0), run(None, num_workers=0))


def test_a_signal_ends_it_after_the_step_with_a_checkpoint(interrupted, whole, copied):
    directory, error = interrupted
    assert error.number == signal.SIGINT
    assert place(directory) == ("merge", 2, 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(run(copied, resume=True), whole)


def test_a_signal_that_a_loaders_workers_had_too_ends_it_with_a_checkpoint(interrupted, tmp_path):
    """PyTorch raises an error in this process when a worker ends, wherever it is; the request to stop came before."""

    def end_all() -> None:
        children = multiprocessing.active_children()
        assert children
        os.kill(os.getpid(), signal.SIGTERM)
        for child in children:
            subprocess.run(["kill", str(child.pid)], check=True)
        time.sleep(0.5)  # they end

    with pytest.raises(Interrupted):
        run(tmp_path, 18, end_all, checkpoint_seconds=0)
    assert place(tmp_path) == place(interrupted[0])


def test_sigterm_in_an_evaluation_and_no_checkpoint_before(whole, tmp_path):
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.number == signal.SIGTERM
    assert place(tmp_path) == ("merge", 0, 4)  # all steps, and the validation to be done again
    assert_same(run(tmp_path, resume=True), whole)


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, 3, lambda: os.kill(os.getpid(), signal.SIGTERM), num_workers=0)
    assert not list(tmp_path.iterdir())


def test_stages_end_with_a_checkpoint_and_the_last_two_stay(whole, tmp_path):
    result = run(tmp_path)
    assert_same(result, whole)
    assert [path.name for path in Snapshots(tmp_path, {}).files()] == ["000001.safetensors", "000002.safetensors"]
    assert place(tmp_path) == ("finetune", 3, 0)
    assert_same(run(tmp_path, resume=True, num_workers=0), whole)  # nothing is left to train

    (tmp_path / "000002.safetensors").unlink()
    assert place(tmp_path) == ("merge", 4, 0)
    assert_same(run(tmp_path, resume=True), whole)


def test_checkpoints_are_not_written_over(interrupted):
    with pytest.raises(
        ValueError, match=r"holds the checkpoints of a merge, the last one 0000\d\d.safetensors; continue it"
    ):
        run(interrupted[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.5}, "with lr 0.01; this one has 0.5"),
        ({"seed": 6}, "with seed 5; this one has 6"),
        ({"milestones": [1]}, r"with milestones None; this one has \[1\]"),
        ({"autocast": torch.bfloat16}, "with autocast None; this one has 'torch.bfloat16'"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(interrupted, changes, message):
    with pytest.raises(ValueError, match=message):
        run(interrupted[0], resume=True, num_workers=0, **changes)


def test_a_checkpoint_of_other_teachers_is_refused(interrupted, monkeypatch):
    monkeypatch.setattr(killed_merge.DropNet, "__init__", _wider(killed_merge.DropNet.__init__))
    with pytest.raises(ValueError, match=r"with teacher 0 '[0-9a-f]{16}'; this one has '[0-9a-f]{16}'"):
        run(interrupted[0], resume=True, num_workers=0)


def _wider(init):
    def changed(network):
        init(network)
        network.head.bias.data += 1

    return changed


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def replace(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def age(path: Path) -> None:
    content = path.read_bytes()
    old, new = b'"version":"2"', b'"version":"9"'
    assert old in content
    path.write_bytes(content.replace(old, new))


def rename(path: Path) -> None:
    """One bit of a tensor's name."""
    path.write_bytes(path.read_bytes().replace(b'weight":{"dtype"', b'weighu":{"dtype"', 1))


def retype(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))


def reshape(path: Path) -> None:
    content = path.read_bytes()
    shape = re.search(rb'"shape":\[(\d+),(\d+)\]', content)
    path.write_bytes(content.replace(shape[0], b'"shape":[%s,%s]' % (shape[2], shape[1]), 1))


DAMAGES = [
    (truncate, "is damaged"),
    (flip, "its checksum does not fit its content"),
    (replace, "is no checkpoint of a fastmerge run"),
    (age, "is of version 9 of the format, and this fastmerge reads version 2"),
    (rename, "its checksum does not fit its content"),
    (retype, "its checksum does not fit its content"),
    (reshape, "its checksum does not fit its content"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_bad_checkpoint_is_passed_over_with_a_warning_and_refused_where_there_is_no_other(copied, damage, message):
    snapshots = Snapshots(copied, read_snapshot(Snapshots(copied, {}).files()[-1])[0]["options"])
    before, newest = snapshots.files()
    expected = read_snapshot(before)[1]["step"]
    damage(newest)
    with pytest.warns(UserWarning, match=rf"{newest.name} .*{message}.*going back to .*{before.name}"):
        assert snapshots.load()["step"] == expected
    damage(before)
    with pytest.raises(ValueError, match=rf"no good checkpoint .*{newest.name} .*{message}.*{before.name}"):
        snapshots.load()


def test_bad_checkpoints_take_no_place_of_good_ones_and_half_written_ones_go(copied):
    options = read_snapshot(Snapshots(copied, {}).files()[-1])[0]["options"]
    snapshots = Snapshots(copied, options)
    before, newest = snapshots.files()
    age(newest)
    half_written, others = (snapshots.directory / name for name in (".000007-x1_y.safetensors", ".mine-7.safetensors"))
    half_written.write_bytes(b"x")
    others.write_bytes(b"x")
    with pytest.warns(UserWarning, match="going back to"):
        state = snapshots.load()
    snapshots.save(state)
    *_, last = after = snapshots.files()
    assert after == [before, newest, last]  # two good ones
    truncate(last)
    with pytest.warns(UserWarning, match=rf"going back to .*{before.name}"):
        assert Snapshots(snapshots.directory, options).load()["step"] == state["step"]
    assert not half_written.exists()
    assert others.exists()


def test_no_bit_of_the_header_matters_without_being_noticed(tmp_path):
    snapshots, state = Snapshots(tmp_path, {"lr": 0.1}), {"n": 3, "weight": torch.arange(6.0).view(2, 3)}
    snapshots.save(state)
    (file,), messages = snapshots.files(), []
    whole = file.read_bytes()
    for bit in range(0, 8 * (len(whole) - 24), 7):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            _, found = read_snapshot(file)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert found["n"] == state["n"]
            assert torch.equal(found["weight"], state["weight"])
    assert len(messages) > 100
    assert all(message.startswith(f"{file} ") for message in messages)


def test_after_the_millionth_checkpoint_comes_the_next(tmp_path):
    snapshots = Snapshots(tmp_path, {})
    snapshots.save({"n": 0})
    snapshots.files()[0].rename(tmp_path / "999998.safetensors")
    for number in range(1, 5):
        snapshots.save({"n": number})
        assert Snapshots(tmp_path, {}).load() == {"n": number}
    assert [path.stem for path in snapshots.files()] == ["1000001", "1000002"]


def test_a_full_disk_is_named(tmp_path):
    fails = pytest.raises(OSError, match=r"File too large: '.*/record.json'")
    with fails, files_of_at_most(10), atomic(tmp_path / "record.json") as temporary:
        temporary.write_text("x" * 100)
    assert not list(tmp_path.iterdir())


def test_only_regular_files_are_replaced(tmp_path):
    file, link = tmp_path / "mine", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for path in (link, tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=f"{path} is no regular file and is not replaced"), atomic(path):
            raise AssertionError
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "pipe"]


def test_a_safetensors_file_that_only_claims_the_format_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "000001.safetensors", metadata={"format": "fastmerge checkpoint"})
    with pytest.raises(ValueError, match=r"000001.safetensors is no checkpoint of a fastmerge run"):
        Snapshots(tmp_path, {}).load()


def test_other_data_is_found_out_within_an_epoch(copied, monkeypatch):
    monkeypatch.setattr(killed_merge.Noisy, "__len__", lambda data: 20)
    with pytest.raises(ValueError, match="after 3 steps of an epoch, and an epoch now has 2"):
        run(copied, resume=True)


@pytest.mark.parametrize("call", ["os.fsync", "safetensors.torch.save_file", "os.replace"])
def test_a_full_disk_costs_no_checkpoint(copied, monkeypatch, call):
    snapshots = Snapshots(copied, {})
    before = {path.name: path.read_bytes() for path in snapshots.directory.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.warns(UserWarning, match=rf"could not write .*No space left on device.*{max(before)}, stays"):
        snapshots.save({"weight": torch.zeros(3)})
    assert {path.name: path.read_bytes() for path in snapshots.directory.iterdir()} == before


def test_a_checkpoint_that_fits_in_part_leaves_nothing(copied):
    snapshots = Snapshots(copied, {})
    before = {path.name: path.read_bytes() for path in snapshots.directory.iterdir()}
    with (
        files_of_at_most(50_000),
        pytest.warns(UserWarning, match=rf"could not write .*File too large.*{max(before)}, stays"),
    ):
        snapshots.save({"weight": torch.zeros(100_000)})
    assert {path.name: path.read_bytes() for path in snapshots.directory.iterdir()} == before


def test_a_merge_on_a_full_disk_goes_on(whole, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.warns(UserWarning, match="could not write .*No space left on device.*; there is none yet"):
        assert_same(run(tmp_path), whole)
    assert not list(tmp_path.iterdir())


def test_within_an_epoch_it_goes_on_with_another_number_of_batches_per_step(tmp_path, monkeypatch):
    """The same steps of eight samples, in one batch each and then in two."""
    x, y = torch.randn(48, 1, 6, 6), torch.arange(48) % 3
    seen, score = [], Tally.score

    def spy(tally, processes=None):
        seen.append((tally.steps, tally.samples))
        return score(tally, processes)

    def go(batch, accumulate, stop_at=None, **options):
        calls = itertools.count()

        def criterion(output, target):
            if next(calls) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return cross_entropy(output, target)

        loader = list(zip(x.split(batch), y.split(batch), strict=True))
        teachers = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            teachers.append(killed_merge.DropNet().eval())
        numbers = {"merge_epochs": 1, "finetune_epochs": 0, "seed": 0, "accumulate": accumulate}
        return merge(teachers, loader, criterion=criterion, checkpoint_dir=tmp_path, **numbers, **options)

    with pytest.raises(Interrupted):
        go(8, 1, stop_at=1 + 2)  # the check, and two steps
    monkeypatch.setattr(Tally, "score", spy)
    go(4, 2, resume=True)
    assert seen[0] == (12, 48)


def test_an_epoch_that_ends_with_a_part_of_a_step_goes_on_with_other_steps(tmp_path):
    """Three batches are one step and a half of two."""

    def go(callback=None, **options):
        loader = list(zip(X[:48].split(16), Y[:48].split(16), strict=True))
        torch.manual_seed(1)
        teachers = [killed_merge.DropNet().eval() for _ in range(2)]
        numbers = {"merge_epochs": 1, "finetune_epochs": 0, "seed": 0, "checkpoint_seconds": 0}
        return merge(teachers, loader, checkpoint_dir=tmp_path, callback=callback, **numbers, **options)

    def stop(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(callback=stop)
    assert place(tmp_path) == ("merge", 0, 3)
    _, history = go(resume=True, accumulate=2)
    assert len(history.epochs) == 1


def test_within_the_fine_tuning_it_goes_on_with_the_same_kind_of_schedule(copied):
    def stop(record):
        if record.stage == "finetune":
            raise KeyboardInterrupt

    options = {"resume": True, "num_workers": 0, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        run(copied, **options, callback=stop)
    with pytest.raises(
        ValueError, match=r"the state of a LambdaLR as the scheduler of the finetune stage, .* makes a StepLR"
    ):
        run(copied, **options, schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))


def test_nan_gets_into_no_checkpoint(tmp_path, monkeypatch):
    original, calls = killed_merge.Noisy.__getitem__, itertools.count()

    def nan_from_the_second_step_on(data, index):
        x, y = original(data, index)
        return x * (1 if next(calls) < 16 else torch.nan), y

    def callback(record):
        if record.epoch == 2:
            monkeypatch.setattr(killed_merge.Noisy, "__getitem__", nan_from_the_second_step_on)

    with pytest.raises(
        FloatingPointError,
        match=r"in step 2 of epoch 3 of the merge stage.*; the last checkpoint is .*/\d+.safetensors",
    ):
        run(tmp_path, checkpoint_seconds=0, num_workers=0, callback=callback)
    assert place(tmp_path) == ("merge", 2, 1)
    network = last(tmp_path)["network"]
    assert all(value.isfinite().all() for value in network.values() if value.is_floating_point())


def test_the_scale_of_float16_and_generators_of_the_data_are_kept(tmp_path):
    whole = run(None, autocast=torch.float16, num_workers=0)
    with pytest.raises(Interrupted):
        run(tmp_path, 16, lambda: os.kill(os.getpid(), signal.SIGINT), autocast=torch.float16, num_workers=0)
    assert last(tmp_path)["parts"]["scaler"]["scale"] > 0
    assert_same(run(tmp_path, resume=True, autocast=torch.float16, num_workers=0), whole)


def test_a_budgets_multipliers_are_kept(tmp_path):
    options = {"gate_schedule": "budget", "num_workers": 0}
    whole = run(None, **options)
    with pytest.raises(Interrupted):
        run(tmp_path, 16, lambda: os.kill(os.getpid(), signal.SIGINT), **options)
    assert last(tmp_path)["parts"]["lambda"]["multipliers"].abs().sum() > 0
    assert_same(run(tmp_path, resume=True, **options), whole)


def test_stop_requests_leave_other_handlers_alone():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            stop.raise_if_any()
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_acts_at_once():
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Interrupted)
