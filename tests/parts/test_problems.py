"""``fastmerge.check``: every problem at once, and how much there is to choose; a merge with little to choose warns."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmerge
from fastmerge.channels.groups import Choice
from fastmerge.cli import main
from fastmerge.problems import Problem, UnmergeableError
from fastmerge.weights import save_weights

IMAGES = torch.randn(2, 3, 8, 8)
WORDS = torch.randn(2, 4, 5)


class Residual(nn.Module):
    def __init__(self, classes: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 10, 1), nn.Conv2d(10, 6, 1)
        self.head = nn.Linear(6, classes)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.scale * self.outer(F.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(5, 8), nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(torch.relu(self.embed(x)))  # line of the call
        return self.head(states[:, -1])


def line_of(text: str) -> str:
    """``file:line`` of the one line of this file that ends with a text."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, start=1) if line.endswith(text)]
    return f"{__file__}:{number}"


def test_several_problems_are_all_listed() -> None:
    teachers = [Residual() for _ in range(4)]
    teachers[1].stem.weight.data[0, 0] = torch.nan
    teachers[1].inner.register_forward_hook(lambda module, args, output: 2 * output)
    teachers[2].inner.register_full_backward_hook(lambda module, into, out: None)
    teachers[2].register_full_backward_pre_hook(lambda module, out: None)
    teachers[2].head = nn.Linear(6, 5)
    teachers[2].outer.bias = teachers[1].outer.bias
    teachers[3].scale = 0.5
    report = fastmerge.check(*teachers, "a.pt", example_inputs=IMAGES)
    assert not report.ok
    found = {(problem.where, problem.what) for problem in report.problems}
    for where, what in [
        ("stem.weight", "'stem.weight' of teacher 1 holds NaN"),
        ("inner", "layer 'inner' of teacher 1 has forward hooks"),
        ("inner", "layer 'inner' of teacher 2 has backward hooks"),
        ("", "teacher 2 has backward hooks"),
        ("head.weight", "head.weight is (4, 6) in teacher 0 and (5, 6) in teacher 2"),
        ("outer.bias", "teachers 1 and 2 share the memory of 'outer.bias'"),
        ("", "teacher 4 is a str"),
    ]:
        assert any(where == place and what in text for place, text in found), what
    different = next(problem for problem in report.problems if "teachers 0 and 3 compute" in problem.what)
    assert different.code == line_of("x = x + self.scale * self.outer(F.relu(self.inner(x)))")
    assert all(problem.remedy for problem in report.problems)
    for problem in report.problems:
        assert problem.what in str(report)
        assert problem.remedy in str(report)
    assert report.choice == Choice(2, 22, 0)
    with pytest.raises(UnmergeableError, match="layer 'inner' of teacher 1 has forward hooks"):  # the first one
        fastmerge.BigStudent(*teachers, "a.pt", example_inputs=IMAGES)
    with pytest.raises(TypeError, match="teacher 1 is a str"):
        fastmerge.BigStudent(Residual(), "a.pt")


class Scaled(nn.Module):
    """Has a buffer of numbers that PyTorch does not add up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.ones(4).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)) * self.scale.to(x.dtype))


def test_numbers_of_one_byte_are_looked_through() -> None:
    teachers = [Scaled(), Scaled()]
    assert fastmerge.check(*teachers, example_inputs=WORDS[0], verify=False).ok
    teachers[1].scale = torch.full((4,), torch.nan).to(torch.float8_e4m3fn)
    (problem,) = fastmerge.check(*teachers, example_inputs=WORDS[0], verify=False).problems
    assert "'scale' of teacher 1 holds NaN" in problem.what


def test_a_layer_that_one_network_lacks_is_said_once() -> None:
    teachers = [Residual(), Residual()]
    teachers[1].extra = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    (problem,) = fastmerge.check(*teachers, example_inputs=IMAGES).problems
    assert problem.where == "extra"
    teachers = [Residual(), Residual(classes=5)]
    found = [problem.where for problem in fastmerge.check(*teachers, example_inputs=IMAGES).problems]
    assert found == ["head.weight", "head.bias"]


def test_networks_that_can_be_merged() -> None:
    teachers = [Residual(), Residual()]
    before = copy.deepcopy(teachers[0].state_dict())
    report = fastmerge.check(*teachers)
    assert report.ok
    assert report.problems == report.notes == report.mixing == ()
    assert report.groups is not None
    assert [(group.name, group.size) for group in report.groups] == [("stem", 6), ("inner", 10)]
    assert report.choice == Choice(groups=2, channels=6 + 6 + 10, fixed=0)
    assert str(report) == "Residual can be merged\nto choose: 2 channel groups, 22 hidden channels"
    assert all(torch.equal(before[key], value) for key, value in teachers[0].state_dict().items())


def test_outputs_and_inputs_that_do_not_fit_are_problems() -> None:
    (problem,) = fastmerge.check(Residual(), Residual(), example_inputs=torch.randn(2, 5, 8, 8)).problems
    assert "(2, 5, 8, 8)" in problem.what
    (problem,) = fastmerge.check(Residual(), Residual(), outputs=["logits"]).problems
    assert "logits" in problem.what
    report = fastmerge.check()
    assert not report.ok
    assert report.choice is None
    assert "at least two teachers" in str(report)


def test_a_network_passed_twice_is_noted() -> None:
    teacher = Residual()
    report = fastmerge.check(teacher, teacher)
    assert report.ok
    assert any("the same network" in note for note in report.notes)


class TwoHeads(nn.Module):
    """Two layers that make outputs in a way that can't be averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.both = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 8, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.stem(x))
        first, hidden = self.both(x).chunk(2, 1)
        return self.grouped(x), first, self.head(F.relu(hidden))


def test_all_outputs_that_cannot_be_averaged_are_listed() -> None:
    report = fastmerge.check(TwoHeads(), TwoHeads(), example_inputs=IMAGES)
    assert {problem.where for problem in report.problems} == {"grouped", "both"}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


def test_untraceable_code_is_a_problem_with_its_line() -> None:
    teachers = [nn.Sequential(nn.Conv2d(3, 6, 3), Branching()) for _ in range(2)]
    teachers[1][0].weight.data[0] = torch.inf
    report = fastmerge.check(*teachers, example_inputs=IMAGES)
    assert [problem.where for problem in report.problems] == ["0.weight", "1"]
    assert report.problems[1].code == line_of("if x.sum() > 0 else self.conv(-x)")
    assert "could not be read" in str(report)


def test_wrapped_networks_are_looked_into() -> None:
    teachers = [nn.DataParallel(Residual()), Residual()]
    report = fastmerge.check(*teachers, example_inputs=IMAGES)
    assert any("DataParallel" in problem.what for problem in report.problems)
    assert report.network == "Residual"
    assert report.choice == Choice(2, 22, 0)


class Sneaky(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if type(x) is Tensor and not torch.compiler.is_exporting() else 2 * x


def test_what_the_self_check_finds_is_a_problem() -> None:
    teachers = [Sneaky(), Sneaky()]
    (problem,) = fastmerge.check(*teachers, example_inputs=IMAGES).problems
    assert "would not be the mean" in problem.what
    assert fastmerge.check(*teachers, example_inputs=IMAGES, verify=False).ok


def test_a_network_kept_whole() -> None:
    report = fastmerge.check(Tagger(), Tagger(), example_inputs=WORDS)
    assert report.ok
    assert report.choice is not None
    assert report.choice.fixed_share == 1
    (mixing,) = report.mixing
    assert (mixing.where, mixing.code) == ("lstm", line_of("# line of the call"))
    (note,) = report.notes
    assert "(100%)" in note
    assert note in str(report)


@pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")
@pytest.mark.parametrize(("network", "inputs"), [(Tagger, WORDS), (Residual, IMAGES)])
def test_a_merge_that_merges_little_says_so(network: type[nn.Module], inputs: Tensor, recwarn) -> None:
    data = [(inputs, torch.tensor([0, 1]))]
    _, history = fastmerge.merge([network(), network()], data, merge_epochs=1, finetune_epochs=0, seed=0)
    found = [warning for warning in history.warnings if "little to gain" in warning]
    said = [str(warning.message) for warning in recwarn if "little to gain" in str(warning.message)]
    assert found == said
    assert len(found) == (network is Tagger)
    assert all("12 of them (100%)" in warning and "lstm" in warning for warning in found)


def test_errors_pickle() -> None:
    error = pickle.loads(pickle.dumps(UnmergeableError(Problem("a is b", "make it c", "a"), Problem("d"))))
    assert str(error) == "a is b; make it c"
    assert [problem.where for problem in error.problems] == ["a", ""]


class WordsMean(nn.Module):
    def __init__(self, length: int = 20) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 6), nn.Parameter(torch.randn(length, 6))
        self.hidden, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.words(words) + self.places)).mean(1))


class WithQueries(Residual):
    """An embedding that is no input, before the layer that reads the images."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.queries = nn.Embedding(6, 6)
        others = Residual()
        for name, module in others.named_children():
            self.add_module(name, module)
        self.scale = others.scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.queries.weight.mean()


def check_words(network: type[nn.Module], module: str) -> list[str]:
    """The command line that checks two networks of a class of this file, whose weights it writes to the working directory."""
    Path(f"{module}.py").write_text(f"from test_problems import {network.__name__}\n")
    teachers = ["a.safetensors", "b.safetensors"]
    for teacher in teachers:
        save_weights(network(), teacher)
    return ["check", "--model", f"{module}:{network.__name__}", "--teachers", *teachers]


def test_words_are_inferred_where_an_embedding_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fastmerge.check(WordsMean(16), WordsMean(16)).ok
    assert fastmerge.check(WithQueries(), WithQueries()).ok
    monkeypatch.chdir(tmp_path)
    words = check_words(WordsMean, "fastmerge_check_test_words")
    assert main(words) == 1
    assert "pass example_inputs=x" in capsys.readouterr().out
    assert main([*words, "--input", "20"]) == 0


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = check_words(Residual, "fastmerge_check_test_net")
    assert main(words) == 0
    assert "22 hidden channels" in capsys.readouterr().out
    assert main([*words, "--input", "3", "9", "9"]) == 0
    capsys.readouterr()
    assert main([*words, "--input", "5", "9", "9"]) == 1
    assert "(2, 5, 9, 9)" in capsys.readouterr().out
    assert main([*words, "--keep", "0.5"]) == 0
    capsys.readouterr()
    assert main([*words, "--keep", "first=0.5"]) == 1
    assert "keep needs names of channel groups; got 'first'" in capsys.readouterr().out
    assert main([*words, "--model-args", "classes=9"]) == 2
