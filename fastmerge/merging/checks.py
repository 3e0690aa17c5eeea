"""What merge() finds out before its first epoch: options, data and networks that can't work."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map, tree_structure

from fastmerge.batch_statistics import single_samples_named
from fastmerge.channels.examples import few_samples
from fastmerge.checkpoints import Snapshots, fingerprints, pack
from fastmerge.data.epochs import EpochLoader
from fastmerge.evaluation import Setting, as_tuple, class_dimension, has_classes, length_of, logits_of
from fastmerge.isolation import quietly, undisturbed
from fastmerge.narrowing.optimizer_state import check_state
from fastmerge.processes import Processes
from fastmerge.stack import Stack
from fastmerge.validation import errors_of_teacher

Schedule = Callable[[Optimizer], LRScheduler]

_AS_PAIRS = (
    ". Let its collate_fn give pairs, such as ((batch['input_ids'], batch['attention_mask']), batch['labels']) of a dict, with "
    "several inputs in the order of the forward's arguments"
)


def listed_teachers(teachers: Sequence[nn.Module]) -> list[nn.Module]:
    """Returns the teachers as a list; whether they fit together is for BigStudent to say."""
    if isinstance(teachers, nn.Module) or not isinstance(teachers, Iterable):
        raise TypeError(
            f"merge needs a list of teachers, as in merge([t1, t2], loader); got a {type(teachers).__name__}"
        )
    teachers = list(teachers)
    for number, teacher in enumerate(teachers):
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"merge needs networks (torch.nn.Module); teacher {number} is a {type(teacher).__name__}")
    if len(teachers) < 2:
        raise ValueError(f"merge needs at least two teachers; got {len(teachers)}")
    return teachers


def check_device(device: torch.device | str | None, teacher: nn.Module) -> torch.device:
    """The device asked for, else the teachers' own."""
    if device is None:
        parameter = next(teacher.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise ValueError("it holds no values")
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(f"merge can't use device {device}: {str(error).splitlines()[0]}") from error
    return device


def examples_of(inputs: Sequence[Tensor], teacher: nn.Module) -> Tensor | tuple[Tensor, ...]:
    """What networks are traced on, where the teachers are: two samples, which tell as much as a batch."""
    device = check_device(None, teacher)
    each = tuple(value[0] if isinstance(teacher, Stack) else value for value in inputs)
    examples = tuple(value.to(device) for value in few_samples(each))
    return examples[0] if len(examples) == 1 else examples


def check_schedule(schedule: Schedule | None, epochs: int, optimizer: Optimizer, *, kept: bool) -> None:
    """Makes a fine-tuning's learning rate scheduler for a throw-away optimizer, and steps it as often as it will be.

    Args:
        schedule: the user's function.
        epochs: of the fine-tuning.
        optimizer: of the kind that it will be for, as :func:`check_optimizer` returns it.
        kept: whether its state has to fit into a checkpoint.

    Raises:
        ValueError: it can't be made of an optimizer alone, can't be stepped so often without arguments, or keeps what a
            checkpoint can't hold.
    """
    if schedule is None:
        return
    what = "making it"
    try:
        scheduler = schedule(optimizer)
        step = scheduler.step
        with quietly("Detected call of .lr_scheduler.step"):
            for epoch in range(epochs):
                what = f"its step after epoch {epoch + 1} of {epochs}"
                step()
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            "merge needs a schedule, a function of the optimizer that makes a scheduler whose step() takes no arguments; "
            f"{what} failed ({type(error).__name__}: {error}). Pass its arguments by functools.partial or a lambda; a "
            "scheduler that needs a loss, such as ReduceLROnPlateau, can't be used"
        ) from error
    if kept:
        _check_kept("a schedule", scheduler)


def _check_kept(option: str, made: Any) -> None:
    """Raises a ValueError where a checkpoint can't hold the state of what an option made."""
    try:
        pack(made.state_dict())
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"merge with a checkpoint_dir needs {option} whose state_dict() a checkpoint can hold; that of this "
            f"{type(made).__name__} it can't ({error})"
        ) from error


def check_each_teacher(teachers: Sequence[Any]) -> None:
    """Raises what is wrong with one of the teachers by itself, such as a parameter that is not initialised."""
    for number, teacher in enumerate(teachers if isinstance(teachers, (list, tuple)) else ()):
        if isinstance(teacher, nn.Module) and not isinstance(teacher, Stack):
            error = next(errors_of_teacher(number, teacher), None)
            if error is not None:
                raise error
            without_values = [name for name, tensor in teacher.named_parameters() if tensor.is_meta]
            if without_values:
                raise ValueError(
                    f"merge needs teachers with weights; parameter '{without_values[0]}' of teacher {number} is on the meta "
                    "device, which holds no values. Load its weights first"
                )


def check_together(options: Mapping[str, Any]) -> None:
    """Raises a ValueError where one argument of merge() would be passed over because of another."""

    def given(*names: str) -> str:
        return next((name for name in names if options[name]), "")

    if options["resume"] and options["checkpoint_dir"] is None:
        raise ValueError("resume=True needs the checkpoint_dir that the merge wrote its checkpoints to")
    if options["schedule"] is not None and (name := given("warmup", "milestones")):
        raise ValueError(f"merge takes schedule or {name}, not both; write the {name} into the schedule")
    if options["optimizer"] is not None and (name := given("weight_decay", "finetune_lr")):
        raise ValueError(
            f"merge takes optimizer or {name}, not both: an optimizer sets its own, in both stages. A schedule can scale its "
            "learning rate"
        )


def check_criterion(criterion: Any) -> None:
    """Looks at a criterion that says what it does: a module, or a partial of a function.

    Raises:
        ValueError: It is a sum over the batch.
    """
    keywords = criterion.keywords if isinstance(criterion, partial) else {}
    reduction = keywords.get("reduction", getattr(criterion, "reduction", "mean"))
    if reduction == "sum":
        raise ValueError("merge needs a criterion that is the mean over the batch; this one has reduction='sum'")
    trained = (
        [name for name, p in criterion.named_parameters() if p.requires_grad]
        if isinstance(criterion, nn.Module)
        else []
    )
    if trained:
        warnings.warn(
            f"merge trains no parameters of the criterion; it has {', '.join(trained[:3])}, which stay as they are. Call "
            "requires_grad_(False) on it if that is meant, or move them into the networks",
            stacklevel=4,
        )


def check_optimizer(make: Callable[..., Optimizer], device: torch.device, *, carried: bool, kept: bool) -> Optimizer:
    """Makes an optimizer of throw-away parameters, and lets it take a step.

    Args:
        make: the user's function.
        device: of the parameters.
        carried: whether its state has to follow parameters that change their shape.
        kept: whether its state has to fit into a checkpoint.

    Returns:
        The throw-away optimizer.

    Raises:
        ValueError: it can't be made of parameters alone, is none, has no learning rate, can't take a step alone, or keeps what
            can't be carried or what a checkpoint can't hold.
    """
    parameters = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((3, 2), (3,))]
    try:
        made = make(parameters)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            "merge needs an optimizer, a function of parameters that makes an optimizer, such as "
            f"functools.partial(torch.optim.AdamW, lr=1e-3); it failed ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(made, Optimizer):
        raise ValueError(
            f"merge needs an optimizer, a function that makes an optimizer; it returned a {type(made).__name__}"
        )
    if not all("lr" in group for group in made.param_groups):
        raise ValueError(
            f"merge needs an optimizer with a learning rate, 'lr' in each of its param_groups, which its schedules scale; this "
            f"{type(made).__name__} has none"
        )
    try:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with torch.enable_grad():
            made.step()
    except Exception as error:  # whatever an optimizer asks for
        raise ValueError(
            f"merge needs an optimizer whose step() takes no arguments and dense gradients; {type(made).__name__}'s failed "
            f"({type(error).__name__}: {error})"
        ) from error
    if carried:
        try:
            check_state("merge", made, dict.fromkeys(parameters, "a weight"))
        except ValueError as error:
            raise ValueError(
                f"{str(error).partition('. Leave')[0]}. In the merge stage weights grow by linking and shrink by compact_at: "
                "pass link_at=0 and no compact_at, or another optimizer"
            ) from error
    if kept:
        _check_kept("an optimizer", made)
    return made


def check_metrics(metrics: Any, val_loader: Any) -> None:
    """Raises a TypeError where metrics are not functions or objects by name, a ValueError where nothing is measured."""
    if metrics is None:
        return
    if val_loader is None and metrics:
        raise ValueError("metrics are measured on the validation data; pass a val_loader")
    if not isinstance(metrics, Mapping):
        raise TypeError(f"merge needs metrics by name, such as {{'top5': f}}; got a {type(metrics).__name__}")
    for name, metric in metrics.items():
        if not callable(metric) and not all(hasattr(metric, method) for method in ("update", "compute", "reset")):
            raise TypeError(
                f"merge needs metrics that are functions of (output, target) or have update, compute and reset; "
                f"{name!r} is a {type(metric).__name__}"
            )


def check_processes(processes: Processes, train_loader: Iterable[Any], teachers: Sequence[nn.Module]) -> None:
    """Processes that merge together need the same teachers and equally many batches: they meet in every step."""
    if processes.size == 1:
        return
    lengths = processes.gather("an unknown number" if (length := length_of(train_loader)) is None else length)
    if len(set(lengths)) > 1:
        raise ValueError(
            f"processes that merge together need equally many batches each; they have {lengths}. Use a DistributedSampler"
        )
    for name, value in fingerprints(teachers).items():
        processes.check_same(name, value)


def check_checkpoints(snapshots: Snapshots, resume: bool) -> None:
    """Checkpoints are only gone on from, never written over: a merge without resume needs a directory without any."""
    there = next(path for path in (snapshots.directory, *snapshots.directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"merge needs a checkpoint_dir, a directory that can be written to; {there} can't be")
    files = snapshots.files()
    if files and not resume:
        raise ValueError(
            f"{snapshots.directory} holds the checkpoints of a merge, the last one {files[-1].name}; continue it "
            "(resume=True), remove them, or choose another directory"
        )


def check_loader(
    name: str,
    loader: Iterable[Any],
    teacher: nn.Module,
    setting: Setting,
    number: int = 0,
    *,
    trained: bool = False,
    distilled: bool = False,
) -> tuple[Tensor, ...]:
    """Runs a teacher and the criterion on the first batch of a loader.

    Args:
        name, loader, teacher, setting: What is checked together.
        number: Of the teacher, for errors.
        trained: Whether networks learn from this loader: then the criterion has to take outputs of training mode, too.
        distilled: Whether they learn from the teachers' logits as well: then outputs have to be logits.

    Returns:
        The batch's inputs, as the loader gave them.

    Raises:
        TypeError: The loader can't be iterated again and again, or does not yield (input, target).
        ValueError: It is empty, or the teacher or the criterion fails on its first batch, or gives NaN or Inf; or outputs
            that are ``distilled`` have no classes.
    """
    inputs, target = next(pairs(name, loader))
    for value in inputs:
        if value.dtype == torch.uint8:
            raise ValueError(f"{name} yields uint8 inputs; convert them to floating point and normalise them")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} yields NaN or Inf in the inputs of its first batch")
    probe = setting.place(copy.deepcopy(teacher)).eval()
    on_device, target = next(setting.batches([(inputs, target)]))
    shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
    with torch.no_grad():
        try:
            with setting.precision():
                output = probe(*on_device)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"the teachers can't read {name}'s inputs of shape {shapes}: {error}") from error
        if isinstance(probe, Stack):  # of whose networks the first stands for all
            output, target = tree_map(lambda value: value[0] if isinstance(value, Tensor) else value, (output, target))
        if (
            setting.criterion is cross_entropy
            and isinstance(output, Tensor)
            and output.dim() > 1
            and output.shape[1] == 1
        ):
            raise ValueError(
                f"cross_entropy, the default criterion, is always 0 for one class; the output for {name} is "
                f"{_describe(output)}. Pass another one, such as "
                "criterion=torch.nn.functional.binary_cross_entropy_with_logits"
            )
        if setting.criterion is cross_entropy and has_classes(output, target):
            # a batch may show some of the classes alone; our own loaders know all
            check_classes(name, loader.labels if isinstance(loader, EpochLoader) else target, output.shape[1])
        loss = _loss(name, setting, output, target, f"output {_describe(output)}, target {_describe(target)}")
    if distilled:
        class_dimension(logits_of(output), target, setting.criterion)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise ValueError(
            f"the criterion must return a 0-d tensor, the mean over the batch; it returned {_describe(loss)}"
        )
    if not loss.isfinite():
        raise ValueError(
            f"teacher {number}'s loss on {name}'s first batch is {loss.item()}; look at its weights and the targets"
        )
    if trained and not isinstance(probe, Stack):
        _check_in_training(name, probe, on_device, target, output, setting, distilled=distilled)
    return inputs


def _check_in_training(
    name: str,
    probe: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Any,
    output: Any,
    setting: Setting,
    *,
    distilled: bool,
) -> None:
    """What a network gives in training mode may be another structure than in eval mode; students are trained by it, too.

    Raises:
        ValueError: It can't be trained on: the criterion fails, or it is ``distilled`` and not one tensor of logits.
    """
    with undisturbed(inputs), single_samples_named(inputs):
        with setting.precision():
            trained = probe.train()(*inputs)
        if tree_structure(trained) == tree_structure(output):
            return
        what = f"in training mode the teachers give {_describe(trained)}, in eval mode {_describe(output)}"
        if distilled:
            raise ValueError(
                f"distillation needs networks with one output, logits (N, K); {what}. Wrap the networks in a module that "
                "returns the logits alone, or train without distillation"
            )
        _loss(name, setting, trained, target, f"{what}, and it has to take both")


def _loss(name: str, setting: Setting, output: Any, target: Any, came: str) -> Any:
    """What the criterion says of a loader's first batch; its errors say what came."""
    try:
        with setting.precision():
            return setting.criterion(output, target)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"the criterion failed on {name}'s first batch, {came}: {error}") from error


def pairs(name: str, loader: Iterable[Any]) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """Inputs and target of each batch of a loader.

    Raises:
        TypeError: It can't be iterated again and again, or does not yield (input, target).
        ValueError: It is empty, or the first batch is.
    """
    try:
        iterator = iter(loader)
    except TypeError:
        raise TypeError(f"merge needs {name}, a DataLoader or the like; got a {type(loader).__name__}") from None
    if iterator is loader:
        raise TypeError(
            f"{name} can be iterated only once (it is an iterator), merge needs more; pass a DataLoader or a list"
        )
    number = -1
    for number, batch in enumerate(iterator):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"{name} must yield pairs (input, target); it yields {_describe(batch)}{_AS_PAIRS}")
        inputs, target = as_tuple(batch[0]), batch[1]
        for value in inputs:
            if not isinstance(value, Tensor) or value.dim() == 0:
                raise TypeError(
                    f"{name} must yield tensors of shape (batch, ...) as inputs; it yields {_describe(value)}"
                    + (_AS_PAIRS if hasattr(value, "keys") else "")
                )
            if not number and not len(value):
                raise ValueError(f"{name}'s first batch has no samples: its input is {_describe(value)}")
        yield inputs, target
    if number < 0:
        raise ValueError(f"{name} is empty; merge needs at least one batch")


def check_classes(name: str, target: Tensor, classes: int) -> None:
    """Raises a ValueError where targets are not among so many classes."""
    counted = target[target != -100]  # cross_entropy's ignore_index
    if counted.numel() and (counted.min() < 0 or counted.max() >= classes):
        low, high = int(counted.min()), int(counted.max())
        raise ValueError(f"{name} has targets {low}..{high}; the teachers have {classes} classes, 0..{classes - 1}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
