"""Which implementation of a convolution runs: measuring, remembering, and the file in which choices are kept."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from fastmerge.kernels.block_conv import choice
from fastmerge.kernels.block_conv.cache import cache_file, read_entries, versions, write_entries
from fastmerge.kernels.block_conv.choice import SPLIT, Choices, compile_beside_each_other, only_compiles

KEY = "card | forward float16 | 2 streams | 1x8x1x1 to 8"
RIGHT = torch.tensor([1.0, 2.0], dtype=torch.float16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    yield tmp_path / "fastmerge" / "convolutions.json"
    cudnn.benchmark, cudnn.deterministic = before


class Bench:
    """Candidates that say when they run, and a timer that looks their times up."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.results = dict.fromkeys(milliseconds, RIGHT)
        self.ran: list[str] = []
        self.timed: list[str] = []

    def candidates(self) -> dict[str, Callable[[], list[torch.Tensor]]]:
        def run(name: str) -> Callable[[], list[torch.Tensor]]:
            def result() -> list[torch.Tensor]:
                self.ran.append(name)
                if isinstance(self.results[name], Exception):
                    raise self.results[name]
                return [self.results[name]]

            return result

        return {name: run(name) for name in self.milliseconds}

    def timer(self, run: Callable[[], list[torch.Tensor]]) -> float:
        run()
        self.timed.append(self.ran[-1])
        return self.milliseconds[self.ran[-1]]

    def choices(self, measuring: bool | None = True) -> Choices:
        choices = Choices(self.timer)
        choices.set_measuring(measuring)
        return choices

    def pick(self, choices: Choices, key: str = KEY, **options: str) -> str:
        return choices.pick(key, self.candidates(), self.candidates, **options)


@pytest.fixture
def bench() -> Bench:
    """Triton's kernel is twice as fast."""
    return Bench(split=2.0, triton_a=1.0)


def test_the_fastest_wins_and_is_timed_once() -> None:
    bench = Bench(split=2.0, triton_a=1.0, triton_b=1.5)
    choices = bench.choices()
    assert choices.pick(KEY, bench.candidates(), None) == "split"
    assert [bench.pick(choices) for _ in range(3)] == ["triton_a"] * 3
    assert bench.timed == ["split", "triton_a", "triton_b"]
    assert choices.table() == [{"key": KEY, "winner": "triton_a", "milliseconds": bench.milliseconds}]


def test_candidates_are_prepared_together() -> None:
    bench, prepared = Bench(split=2.0, triton_a=1.0, triton_b=3.0), []
    choices = Choices(bench.timer, lambda runs: prepared.extend(run() for run in runs))
    choices.set_measuring(True)
    bench.pick(choices)
    assert len(prepared) == 2
    assert bench.ran[:3] == ["split", "triton_a", "triton_b"]


def test_compiling_beside_each_other_outlives_failures() -> None:
    def fail() -> list[torch.Tensor]:
        raise RuntimeError

    done: list[tuple[int, bool]] = []
    compile_beside_each_other(
        [fail, lambda: done.append((1, only_compiles())) or [], fail, lambda: done.append((2, only_compiles())) or []]
    )
    assert sorted(done) == [(1, True), (2, True)]
    assert not only_compiles()


@pytest.mark.parametrize(
    ("plain", "fast", "winner"),
    [
        (1.0, 0.94, "triton_a"),
        (1.0, 0.96, "split"),  # not 5 %
        (0.1, 0.089, "triton_a"),
        (0.1, 0.091, "split"),  # not 10 microseconds
        (1.0, 1.0, "split"),
    ],
)
def test_what_is_hardly_faster_than_plain_pytorch_does_not_win(plain: float, fast: float, winner: str) -> None:
    bench = Bench(split=plain, triton_a=fast)
    assert bench.pick(bench.choices()) == winner


def test_plain_pytorch_of_joined_streams_is_groups() -> None:
    bench = Bench(split=0.98, groups=1.0, triton_a=3.0)
    assert bench.pick(bench.choices(), plain="groups") == "groups"
    bench = Bench(split=0.5, groups=1.0, triton_a=3.0)
    assert bench.pick(bench.choices(), "another", plain="groups") == "split"


def due(choices: Choices, batch: int, layers: int = 4) -> bool:
    """Whether measuring is due anywhere in a training step of so many layers of one shape."""
    choices.begins(backward=False)
    found = []
    for _ in range(layers):
        choices.meets("layer", batch)
        found.append(choices.due("layer", batch))
    choices.begins(backward=True)
    return any([*found, choices.due("layer", batch)])


def test_the_last_batch_of_an_epoch_starts_no_race() -> None:
    choices = Bench().choices()
    assert [due(choices, batch) for batch in (8, 8, 8, 3) * 3] == [False, True, True, False] * 3


def test_a_batch_size_that_stays_is_measured_in_its_second_step() -> None:
    choices = Bench().choices()
    assert [due(choices, batch) for batch in (2, 8, 8, 3, 3)] == [False, False, True, False, True]


def test_where_nothing_is_differentiated_a_size_is_measured_after_many_calls() -> None:
    choices, found = Bench().choices(), []
    for _ in range(70):
        choices.meets("layer", 8)
        found.append(choices.due("layer", 8))
    assert found == [False] * 64 + [True] * 6


def test_a_size_that_was_not_measured_runs_what_won_at_another(bench: Bench) -> None:
    choices = bench.choices()
    bench.pick(choices)
    choices.set_measuring(False)
    other = KEY.replace("| 1x", "| 80x")
    assert other != KEY
    assert choices.known(other) == "triton_a"
    assert choices.known(other.replace("float16", "bfloat16")) is None
    assert choices.known(other.replace("to 8", "to 16")) is None


@pytest.mark.parametrize("where", ["trial", "split", "triton_a"])
def test_without_memory_for_a_trial_training_goes_on(
    bench: Bench, where: str, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    choices = bench.choices()
    error = torch.OutOfMemoryError("CUDA out of memory")
    if where != "trial":
        bench.results[where] = error
    trial = mock.Mock(side_effect=error if where == "trial" else bench.candidates)
    with caplog.at_level("WARNING", "fastmerge"):
        assert [choices.pick(KEY, bench.candidates(), trial) for _ in range(3)] == ["split"] * 3
    assert trial.call_count == 1
    assert [message for message in caplog.messages if "not enough memory" in message]
    assert not choices.table()
    assert not cache.exists()


def test_where_nothing_can_be_timed_training_goes_on(bench: Bench, cache: Path) -> None:
    """As where a card or driver captures no graphs."""
    choices = Choices(mock.Mock(side_effect=RuntimeError("operation not permitted when stream is capturing")))
    choices.set_measuring(True)
    with pytest.warns(RuntimeWarning, match="not permitted") as warned:
        assert [bench.pick(choices) for _ in range(3)] == ["split"] * 3
    assert len(warned) == 2
    assert not choices.table()
    assert not cache.exists()


def test_an_error_that_cuda_does_not_recover_from_names_its_candidate() -> None:
    bench = Bench(split=2.0, triton_a=1.0, triton_b=1.5)
    bench.results["triton_a"] = RuntimeError("an illegal memory access was encountered")
    with (
        mock.patch.object(torch.cuda, "is_initialized", return_value=True),
        mock.patch.object(torch.cuda, "synchronize", side_effect=RuntimeError("an illegal memory access")),
        pytest.raises(RuntimeError, match=rf"{re.escape(KEY)}: triton_a left the GPU in an error"),
    ):
        bench.pick(bench.choices())
    assert bench.timed == ["split"]


@pytest.mark.parametrize("asked", [True, None])
def test_processes_do_not_choose_apart(bench: Bench, asked: bool | None, caplog: pytest.LogCaptureFixture) -> None:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = True, False
    bench.pick(bench.choices())
    bench.ran.clear()
    choices = bench.choices(asked)
    several = mock.patch.multiple(torch.distributed, is_initialized=lambda: True, get_world_size=lambda: 2)
    with several, caplog.at_level("INFO", "fastmerge"):
        assert bench.pick(choices, "another layer") == SPLIT
        # What one process measured before holds.
        assert bench.pick(choices) == "triton_a"
    assert not bench.ran
    (message,) = caplog.messages
    assert "not timed in runs of several processes" in message


def test_times_are_the_devices_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which flushing takes 0.08 ms, the function 0.03 ms, and starting either from Python 1 ms."""
    clock, captured = [0.0], [False]

    def spend(milliseconds: float) -> None:
        clock[0] += milliseconds if captured[0] else milliseconds + 1

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def capture(run: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], None]:
        def replay() -> None:
            captured[0] = True
            run()
            captured[0] = False

        return replay, None

    flushed = mock.Mock()
    flushed.zero_ = lambda: spend(0.08)
    monkeypatch.setattr(choice, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: flushed)
    assert choice.device_milliseconds(lambda: spend(0.03)) == pytest.approx(0.03)


def test_cudnn_wins_a_draw() -> None:
    bench = Bench(split=1.0, triton_a=1.0)
    assert bench.pick(bench.choices()) == SPLIT


def test_the_default_is_the_callers() -> None:
    bench = Bench(split=2.0, groups=3.0, triton_a=1.0)
    choices = bench.choices(False)
    assert bench.pick(choices, default="groups") == "groups"
    with choices.fixed("triton_gone"):
        assert bench.pick(choices, default="groups") == "groups"
    choices.set_measuring(True)
    assert bench.pick(choices, default="groups") == "triton_a"


def test_what_takes_minutes_is_said_once(bench: Bench, caplog: pytest.LogCaptureFixture, cache: Path) -> None:
    choices = bench.choices(False)
    with caplog.at_level("INFO", "fastmerge"):
        bench.pick(choices)
        assert not caplog.messages
        choices.set_measuring(True)
        with mock.patch.object(Choices, "_measure", autospec=True, side_effect=Choices._measure) as measure:
            bench.pick(choices, "one")
            bench.pick(choices, "other")
    assert measure.call_count == 2
    (message,) = caplog.messages
    assert "timed at their first use" in message
    assert str(cache) in message


def test_keys_are_measured_apart() -> None:
    fast, slow = Bench(split=2.0, triton_a=1.0), Bench(split=1.0, triton_a=2.0)
    choices = Choices(lambda run: next(b for b in (fast, slow) if run() and b.ran).timer(run))
    choices.set_measuring(True)
    assert fast.pick(choices, "one") == "triton_a"
    fast.ran.clear()
    assert slow.pick(choices, "other") == SPLIT
    assert choices.known("one") == "triton_a"
    assert choices.known("third") is None


def test_nothing_is_measured_by_default(bench: Bench) -> None:
    choices = bench.choices(None)
    torch.backends.cudnn.benchmark = False
    assert bench.pick(choices) == SPLIT
    assert not bench.ran
    assert choices.known(KEY) is None


def test_cudnn_benchmark_switches_measuring_on_and_determinism_off(bench: Bench) -> None:
    choices = bench.choices(None)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True
    assert bench.pick(choices) == SPLIT
    torch.backends.cudnn.deterministic = False
    with mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=True):
        assert bench.pick(choices) == SPLIT
    assert not bench.ran
    choices.set_measuring(False)
    assert bench.pick(choices) == SPLIT
    choices.set_measuring(None)
    assert bench.pick(choices) == "triton_a"


def test_never_while_a_graph_is_captured(bench: Bench) -> None:
    choices = bench.choices()
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        assert bench.pick(choices) == SPLIT
        assert not bench.ran
    # What was measured before holds there too.
    assert bench.pick(choices) == "triton_a"
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        assert bench.pick(choices) == "triton_a"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([1.0, 2.1], dtype=torch.float16), "off by 0.1"),
        (torch.tensor([1.0, float("nan")], dtype=torch.float16), "off by nan"),
        (RIGHT.float(), "shape"),
        (RIGHT[:1], "shape"),
        (RuntimeError("out of shared memory"), "RuntimeError: out of shared memory"),
    ],
)
def test_a_wrong_candidate_is_reported_and_never_chosen(wrong: torch.Tensor | Exception, message: str) -> None:
    bench = Bench(split=2.0, triton_a=1.0, triton_b=1.5)
    bench.results["triton_a"] = wrong
    choices = bench.choices()
    with pytest.warns(RuntimeWarning, match=f"triton_a is not used: .*{message}"):
        assert bench.pick(choices) == "triton_b"
    assert bench.timed == ["split", "triton_b"]


def test_an_error_of_cudnn_is_not_hidden(bench: Bench) -> None:
    bench.results["split"] = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.pick(bench.choices())


def test_fixed_choice() -> None:
    bench = Bench(split=1.0, triton_a=3.0, triton_b=2.0)
    choices = bench.choices()
    with choices.fixed("triton_b"):
        assert bench.pick(choices) == "triton_b"
        with choices.fixed("triton"):
            assert bench.pick(choices) == "triton_a"
        with choices.fixed("groups"):
            assert bench.pick(choices) == SPLIT
        assert bench.pick(choices) == "triton_b"
    assert not bench.ran
    assert bench.pick(choices) == SPLIT
    assert bench.timed == ["split", "triton_a", "triton_b"]


def test_choices_outlive_a_process(bench: Bench, cache: Path) -> None:
    bench.pick(bench.choices())
    later = Bench(split=2.0, triton_a=1.0)
    assert later.pick(later.choices(False)) == "triton_a"
    assert not later.ran
    assert later.choices(False).table() == [{"key": KEY, "winner": "triton_a", "milliseconds": later.milliseconds}]
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_candidate_that_is_gone_leaves_split(bench: Bench) -> None:
    write_entries({KEY: {"winner": "triton_gone", "milliseconds": {}}})
    assert bench.pick(bench.choices(False)) == SPLIT


def test_idle_where_there_is_nothing_to_choose(bench: Bench) -> None:
    choices = bench.choices(False)
    assert choices.idle()
    with choices.fixed("triton"):
        assert not choices.idle()
    choices.set_measuring(True)
    assert not choices.idle()
    bench.pick(choices)
    choices.set_measuring(False)
    assert not choices.idle()
    with choices.fixed(SPLIT):
        assert not choices.idle()  # plain PyTorch runs groups where streams are joined
    assert not bench.choices(False).idle()


def test_forgotten_choices_are_measured_again(bench: Bench) -> None:
    choices = bench.choices()
    bench.pick(choices)
    choices.forget()
    assert choices.known(KEY) is None
    bench.pick(choices)
    assert bench.timed == ["split", "triton_a"] * 2


def test_other_versions_keep_their_choices_to_themselves() -> None:
    ours = {"winner": "split", "milliseconds": {"split": 1.0}}
    with mock.patch("fastmerge.kernels.block_conv.cache.versions", return_value="older"):
        write_entries({KEY: {"winner": "triton_a", "milliseconds": {}}})
    assert read_entries() == {}
    write_entries({KEY: ours, "another": ours})
    write_entries({"third": ours})
    assert read_entries() == {KEY: ours, "another": ours, "third": ours}
    with mock.patch("fastmerge.kernels.block_conv.cache.versions", return_value="older"):
        assert read_entries()[KEY]["winner"] == "triton_a"


def test_versions_name_what_matters() -> None:
    assert torch.__version__ in versions()
    assert all(word in versions() for word in ("triton", "cuda", "cudnn", "driver", "kernels"))


def test_versions_are_found_where_there_is_a_card() -> None:
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert re.search(r"driver (\d+|unknown), ", versions.__wrapped__())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 1, "choices": {"a": {"b": {"winner"',
        b"\xff\xfe",
        b"[]",
        b'{"format": 2, "choices": {}}',
        b'{"format": 1, "choices": []}',
        b'{"format": 1, "choices": {"a": {"b": "split"}}}',
        b'{"format": 1, "choices": {"a": {"b": {"winner": 3, "milliseconds": {}}}}}',
        b'{"format": 1, "choices": {"a": {"b": {"winner": "split", "milliseconds": {}, "more": 1}}}}',
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(bench: Bench, content: bytes, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(UserWarning, match="is ignored"):
        assert bench.pick(bench.choices()) == "triton_a"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_entries()[KEY]["winner"] == "triton_a"


def test_a_file_that_cannot_be_written_is_only_a_warning(bench: Bench, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="can't be kept"):
        assert bench.pick(bench.choices()) == "triton_a"


def test_a_failed_write_leaves_the_old_file(cache: Path) -> None:
    entry = {"winner": "split", "milliseconds": {}}
    write_entries({"first": entry})
    with mock.patch.object(json, "dump", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        write_entries({"second": entry})
    assert read_entries() == {"first": entry}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_the_file_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == tmp_path / "fastmerge" / "convolutions.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache" / "fastmerge" / "convolutions.json"
