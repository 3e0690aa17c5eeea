"""The check that a big student passes before anybody uses it: it is its teachers' mean, and it compresses to what it computes.

Both are run on the example inputs, on copies, in eval mode and in training mode with everything random held still:

* with open gates, against the mean of the teachers' outputs;
* linked, with other weights and with random gates at 0 and 1, against the network that ``compress()`` gives. A wrong channel
  group passes the first comparison.

Errors count against the part of an output that differs from sample to sample, since a network's logits may be nearly
constant. Rounding alone can be large by that measure, so a difference is an error only if it is the same in float64 and in
float32: rounding is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge.channels.examples import Inputs
from fastmerge.cpu_convolutions import faster
from fastmerge.isolation import copied, undisturbed
from fastmerge.problems import Problem, UnmergeableError

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_ALONE = 0.05  # tolerance of a network that runs in one of the two precisions only
_SMALL = 2**20  # parameters of a teacher up to which every big student is compressed
_PRECISE = 2**23  # up to which float64 is tried first: it costs less than a second try where float32 is too coarse
_LINKED = 2**28  # parameters up to which the copy that is compressed is linked: 1 GiB
_OPEN = 40.0  # a loc whose gate is exactly 1, drawn or deterministic
_CHECKED: set[tuple[Any, ...]] = set()

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def check_exact(teachers: Sequence[nn.Module], big: Any, example_inputs: Inputs) -> None:
    """Compares a new big student with its teachers, and with what it compresses to.

    Args:
        teachers: it was built from; like their random numbers, they are left alone.
        big: the :class:`~fastmerge.BigStudent`; it is copied.
        example_inputs: the positional and keyword arguments that the teachers' forward takes.

    Raises:
        ValueError: saying by how much an output differs, and which layer is the first to differ where that can be found.
    """
    size, own = sum(p.numel() for p in teachers[0].parameters()), next(teachers[0].parameters()).dtype
    inputs = _varied(example_inputs)
    leaves = pytree.tree_leaves(inputs)
    trials = [
        _Trial(teachers, big, inputs, torch.float64),
        *(_Trial(teachers, big, inputs, d, True) for d in _TOLERANCE),
    ]
    if size > _PRECISE and own != torch.float64:
        trials.insert(0, _Trial(teachers, big, inputs, torch.float32))
    shapes = [[name, tuple(p.shape)] for name, p in teachers[0].named_parameters()] + [_shape(x) for x in leaves]
    asked = big.heads, big._blueprint.tie_streams, tuple(big.widths.values())
    known = (type(teachers[0]), repr(teachers[0]), str(shapes), len(teachers), asked)
    with undisturbed([*teachers[0].parameters(), *leaves]):
        _compare(trials, _Trial.open_gates, own)
        if size <= _SMALL or known not in _CHECKED:
            _compare(trials, _Trial.hard_gates, own)
            _CHECKED.add(known)


@dataclass(frozen=True)
class _Pair:
    """One output of two networks that should be the same.

    Attributes:
        mode: "eval" or "training".
        path: of the output among several, as Python code.
        actual, expected: the big student's, and what it should be.
    """

    mode: str
    path: str
    actual: Tensor | None
    expected: Tensor

    def difference(self) -> Tensor:
        """In float64. Equal infinities and NaNs are no difference; where one alone is not finite, it is as large as can be."""
        scale = self.scale()
        if self.actual is None or self.actual.shape != self.expected.shape:
            return torch.full(self.expected.shape, scale, dtype=torch.float64, device="cpu")
        a, e = self.actual.double(), self.expected.double()
        same = (a == e) | (a.isnan() & e.isnan())
        return torch.where(same, 0, a - e).nan_to_num(scale, scale, -scale).cpu()

    def scale(self) -> float:
        """The norm of what differs from sample to sample; of everything where the samples' outputs are the same."""
        e = self.expected.double()
        e = torch.where(e.isfinite(), e, 0)
        whole, centred = e.norm().item(), (e - e.mean(0)).norm().item() if e.dim() else 0.0
        return centred if centred > 1e-12 * whole else whole if whole > 0 else 1.0

    def error(self) -> float:
        """The relative difference."""
        return self.difference().norm().item() / self.scale()


def _everything(output: Any) -> Any:
    return output


Comparison = Callable[["_Trial"], list[_Pair]]


class _TeacherFails(Exception):  # noqa: N818
    """A teacher does not run in a precision: nothing can be said of it there."""


class _Trial:
    """Copies of everything in one precision, made when they are needed.

    Args:
        teachers, big: what is copied.
        inputs: of the teachers.
        dtype: float64 or float32.
        rebuilt: whether the big student is built anew, from the teachers in this precision.
    """

    def __init__(
        self, teachers: Sequence[nn.Module], big: Any, inputs: Inputs, dtype: torch.dtype, rebuilt: bool = False
    ) -> None:
        self.dtype, self.rebuilt, self._given = dtype, rebuilt, (teachers, big, inputs)
        self.compared: tuple[Sequence[nn.Module], bool]

    @cached_property
    def inputs(self) -> Inputs:
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: _cast(x, self.dtype), self._given[2])
        return args, kwargs

    @cached_property
    def teachers(self) -> list[nn.Module]:
        return [copied(teacher)._apply(lambda t: _cast(t, self.dtype)) for teacher in self._given[0]]

    @cached_property
    def big(self) -> Any:
        big = self._given[1]
        if self.rebuilt:
            plan = big._blueprint
            options = {"outputs": plan.outputs, "heads": big.heads, "keep": big._asked, "tie_streams": plan.tie_streams}
            return self._joined(type(big)(*self.teachers, example_inputs=self.inputs, **options, verify=False))
        cast = self._joined(copied(big)._apply(lambda t: _cast(t, self.dtype)))
        # the graphs as they are: what their code does in another precision is tried later
        cast._blueprint.dtype = self.dtype
        return cast

    @property
    def questions(self) -> list[str]:
        """Where the teachers' code asks whether it is being compiled or exported."""
        questions: list[str] = self._given[1]._blueprint.traced.questions
        return questions

    @property
    def aim(self) -> str:
        """What the big student must be."""
        return "the mean of its teachers" if self._given[1].heads == "average" else "its teachers side by side"

    @staticmethod
    def _joined(big: Any) -> Any:
        """The big student with its outputs in one tensor."""
        big.heads = "concatenate" if big.heads == "separate" else big.heads
        return big

    def tolerance(self, comparison: Comparison, own: torch.dtype) -> float:
        """The largest error that is none; a mean of weights has the rounding of their own precision."""
        is_rounded = comparison is _Trial.open_gates and not self.rebuilt and own != self.dtype
        return _TOLERANCE[torch.float32 if is_rounded else self.dtype]

    def open_gates(self) -> list[_Pair]:
        """The big student with open gates against the mean of the teachers."""
        self.compared = self.teachers, True
        pairs = []
        for mode in ("eval", "training"):
            outputs = [self._expected(teacher.train(mode == "training")) for teacher in self.teachers]
            with self.big.train(mode == "training").open_gates():
                actual = self._run(self.big)
            together = _mean if self.big.heads == "average" else _side_by_side
            expected = {
                path: together([output[path] for output in outputs], actual.get(path))
                for path in outputs[0]
                if all(path in output for output in outputs)
            }
            pairs += _pairs(mode, actual, expected)
        return pairs

    def hard_gates(self) -> list[_Pair]:
        """The big student with other weights, and gates at 0 and 1, against the network it compresses to."""
        big = self.big
        if sum(p.numel() for p in big.weight_parameters()) * big.num_teachers <= _LINKED:
            big.link()
        for module in big.modules():  # the statistics shall be those of the weights
            if isinstance(getattr(module, "momentum", None), float) and hasattr(module, "running_var"):
                module.momentum = 1.0
        for seed in range(3):
            _disturb(big, seed)
            self._run(big.train())
            evaluated = self._run(big.eval(), big.predictions)
            if all(_depends_on_input(output) for output in evaluated.values()):
                break
        student = big.compress()
        self.compared = [student], False
        pairs = _pairs("eval", evaluated, self._expected(student.eval(), big.predictions))
        # from the buffers that the student has, if it changes others than statistics
        actual = self._run(big.train(), big.predictions)
        return pairs + _pairs("training", actual, self._expected(student.train(), big.predictions))

    def first_difference(self, mode: str) -> tuple[str | None, str | None]:
        """The first layer whose output differs in the latest comparison, and the one before it; None for none."""
        originals, gates_are_open = self.compared
        layers = {name: m for name, m in originals[0].named_modules() if isinstance(m, _LAYERS)}
        training = mode == "training"
        theirs = [self._record(original.train(training), original, layers) for original in originals]
        big = self.big.train(training)
        with big.open_gates() if gates_are_open else nullcontext():
            ours = self._record(big, big.network, layers)
        before = None
        for path in theirs[0]:
            dim = -1 if isinstance(layers[path], nn.Linear) else 1
            if path in ours and not _occur([recorded[path] for recorded in theirs], ours[path], dim, self.dtype):
                return path, before
            before = path
        return None, before

    def _expected(self, network: nn.Module, select: Callable[[Any], Any] = _everything) -> dict[str, Tensor]:
        try:
            return self._run(network, select)
        except Exception as error:  # whatever the user's forward raises
            raise _TeacherFails from error

    def _run(self, network: nn.Module, select: Callable[[Any], Any] = _everything) -> dict[str, Tensor]:
        """The floating point tensors of a network's output, of those that are selected."""
        with _HeldStill():
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, self.inputs)
            output = network(*args, **kwargs)
        return dict(_leaves(select(output)))

    def _record(self, network: nn.Module, tree: nn.Module, paths: Iterable[str]) -> dict[str, list[Tensor]]:
        """What layers gave when they were first called, in this order."""
        modules = dict(tree.named_modules())
        found: dict[str, list[Tensor]] = {}

        def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(path, [t.clone() for _, t in _leaves(output)])

        handles = [modules[path].register_forward_hook(partial(note, path)) for path in paths if path in modules]
        try:
            self._run(network)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _compare(trials: Sequence[_Trial], comparison: Comparison, own: torch.dtype) -> None:
    """Raises if no trial finds two networks to be the same, and those from the teachers on find the same difference."""
    found: list[tuple[_Trial, dict[tuple[str, str], _Pair]]] = []
    failure = None
    for trial in trials:
        try:
            pairs = comparison(trial)
        except _TeacherFails:
            continue
        except Exception as error:  # whatever a precision that is not the network's own comes upon
            failure = error
            continue
        if all(pair.error() <= trial.tolerance(comparison, own) for pair in pairs):
            return
        if trial.rebuilt:
            found.append((trial, {(pair.mode, pair.path): pair for pair in pairs}))
    if not found and failure is not None and own in _TOLERANCE:
        raise ValueError(
            f"a big student of {type(trials[0].teachers[0]).__name__} does not run on the example inputs, on which its "
            f"teachers do ({type(failure).__name__}: {failure}). BigStudent(..., verify=False) builds it without trying"
        ) from failure
    if not found:
        return
    (trial, first), *others = found
    for key, pair in first.items():
        difference, is_known = pair.difference(), pair.error() > _ALONE
        for _, other in others:
            same = key in other and (difference - other[key].difference()).norm() <= difference.norm() / 2
            is_known = pair.error() > trial.tolerance(comparison, own) and same
        if is_known:
            raise UnmergeableError(_problem(pair, trial, comparison is _Trial.open_gates))


def _problem(pair: _Pair, trial: _Trial, against_teachers: bool) -> Problem:
    try:
        layer, before = trial.first_difference(pair.mode)
    except Exception:  # what the search for a place comes upon is not what is wrong
        layer = before = None
    if pair.actual is None:
        problem = "is missing"
    elif pair.actual.shape != pair.expected.shape:
        problem = f"is of shape {tuple(pair.actual.shape)}, not {tuple(pair.expected.shape)}"
    else:
        problem = f"is off by {pair.error():.2g} times what it varies by from sample to sample"
    where = ""
    if layer is not None:
        where = f" The first layer whose output differs is '{layer}'" + (f", after '{before}'." if before else ".")
    elif before is not None:
        where = f" All layers give what they should, up to the last, '{before}'."
    name, output = type(trial.teachers[0]).__name__, f"output{pair.path}" if pair.path else "output"
    if against_teachers:
        questions = ", ".join(trial.questions)
        hidden = (
            "a question about a tensor's type, an option that differs between teachers, or a tensor that modules share"
        )
        if questions:
            hidden = f"a question whether it is being compiled or exported ({questions}), {hidden}"
        return Problem(
            f"{name} can't be merged: the big student would not be {trial.aim}. In {pair.mode} mode its {output} "
            f"{problem}.{where} The network's code does something that tracing does not see, such as {hidden}",
            "Write it in another way; BigStudent(..., verify=False) skips this check",
            layer or before or "",
            questions,
        )
    return Problem(
        f"{name} can't be merged: compress() would give a network that computes something else. In {pair.mode} mode the "
        f"big student's {output} {problem}.{where} fastmerge has misunderstood how channels belong together",
        "please report this network. BigStudent(..., verify=False) skips this check",
        layer or before or "",
    )


def _side_by_side(outputs: Sequence[Tensor], like: Tensor | None) -> Tensor:
    """The teachers' outputs along the dimension in which a big student's differs; their mean where none does."""
    shape = outputs[0].shape if like is None or like.dim() != outputs[0].dim() else like.shape
    dims = [d for d, size in enumerate(shape) if any(size != output.shape[d] for output in outputs)]
    return torch.cat(list(outputs), dims[0]) if dims else _mean(outputs)


def _mean(outputs: Sequence[Tensor], like: Tensor | None = None) -> Tensor:
    return torch.stack(list(outputs)).mean(0)


def _pairs(mode: str, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[_Pair]:
    return [_Pair(mode, path, actual.get(path), value) for path, value in expected.items()]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The floating point tensors of a network's output, by where they are."""
    if isinstance(value, Tensor):
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        if value.is_floating_point() and value.numel():
            yield path, value.detach()
    elif isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name, None), f"{path}[{field.name!r}]")


def _varied(example_inputs: Inputs) -> Inputs:
    """The inputs; where all samples of a batch are the same, with each of them a little different."""
    generator = torch.Generator().manual_seed(0)

    def varied(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.dim() and bool((x == x[:1]).all()):
            factors = 0.5 + 0.5 * torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
            return factors if not x.any() else x * factors
        return x

    args, kwargs = pytree.tree_map_only(Tensor, varied, example_inputs)
    return args, kwargs


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _depends_on_input(output: Tensor) -> bool:
    finite = torch.where(output.isfinite(), output, 0)
    return output.dim() == 0 or bool((finite - finite.mean(0)).norm() > 1e-6 * finite.norm())


def _disturb(big: Any, seed: int) -> None:
    """Gives every weight another value, off-diagonal ones too, and opens n of the T·n gates of every group, by chance."""
    generator = torch.Generator().manual_seed(seed)
    # a prime number of values: no two rows are the same
    values = torch.randn(2**16 + 1, generator=generator, dtype=torch.float64, device="cpu")
    for parameter in big.weight_parameters():
        size = parameter.norm().item() / max(1, parameter.numel()) ** 0.5
        noise, flat = values.to(parameter).clamp(-2, 2), parameter.detach().contiguous().view(-1)
        for part in flat.split(len(noise)):
            if parameter.dim() > 1:
                part.add_(noise[: len(part)], alpha=max(size, (len(flat) / len(parameter)) ** -0.5))
            else:  # scales keep their sign, and nothing stays zero
                part.mul_(1 + 0.3 * noise[: len(part)]).add_(noise[: len(part)], alpha=0.3 if size < 0.1 else 0)
        if not parameter.is_contiguous():
            parameter.copy_(flat.view_as(parameter))
        values = values.roll(int(torch.randint(len(values), (), generator=generator, device="cpu")))
    for name, gate in big.gates.items():
        chosen = torch.randperm(len(gate.loc), generator=generator, device="cpu")[: big.widths[name]]
        gate.loc.fill_(-_OPEN)
        gate.loc[chosen.to(gate.loc.device)] = _OPEN


def _occur(theirs: Sequence[Sequence[Tensor]], ours: Sequence[Tensor], dim: int, dtype: torch.dtype) -> bool:
    """Whether each channel that the originals' layer gave is among the big student's, or their mean is what it gave."""
    tolerance = 10 * _TOLERANCE[dtype]
    if len(ours) == 1 and ours[0].shape == theirs[0][0].shape:
        return _Pair("", "", ours[0], torch.stack([outputs[0] for outputs in theirs]).mean(0)).error() <= tolerance
    rows = torch.cat([y.movedim(dim, 0).flatten(1) for y in ours]).double()
    wanted = torch.cat([outputs[0].movedim(dim, 0).flatten(1) for outputs in theirs]).double()
    if rows.shape[1] != wanted.shape[1]:
        return True  # they can't be compared
    distance = torch.cdist(wanted, rows, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    return bool((distance <= tolerance * wanted.norm() / len(wanted) ** 0.5).all())


_HELD = {
    "bernoulli": 1.0,
    "rand": 0.5,
    "rand_like": 0.5,
    "uniform": 0.5,
    "randn": 0.0,
    "randn_like": 0.0,
    "normal": 0.0,
}


class _HeldStill(TorchDispatchMode):
    """Within it, dropout drops nothing and the usual random numbers are constants, whoever draws them, in whatever order.

    A difference that other random numbers make is another one in each precision.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            other = faster(func, args)
            return func(*args, **kwargs) if other is None else other(*args[:6])
        name = func._schema.name.partition("::")[2].rstrip("_")
        given = dict(kwargs)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            given[argument.name] = value
        still = {"dropout_p": 0.0, "dropout": 0.0}
        still |= {"p": 0.0} if "dropout" in name else {"training": False} if name.startswith("rrelu") else {}
        out = func(**{key: still.get(key, value) for key, value in given.items()})
        if name == "randperm":
            return out.sort(descending=True).values
        return out.fill_(_HELD[name]) if name in _HELD else out
