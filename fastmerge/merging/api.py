"""From trained teachers to one student: the merge stage, compression and fine-tuning, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastmerge.checkpoints import Snapshots, StopRequests, fingerprints
from fastmerge.data.epochs import readers_watched
from fastmerge.evaluation import Criterion, Setting
from fastmerge.history import EpochRecord, History
from fastmerge.merging.checks import (
    check_checkpoints,
    check_criterion,
    check_each_teacher,
    check_loader,
    check_metrics,
    check_optimizer,
    check_processes,
    check_schedule,
    check_together,
    examples_of,
)
from fastmerge.merging.label_sets import with_label_sets
from fastmerge.merging.options import CompactAt, GateSchedule, Options
from fastmerge.merging.progress import Progress
from fastmerge.merging.stages import finetune, train_student
from fastmerge.merging.state import MergeState
from fastmerge.merging.trainer import Trainer
from fastmerge.processes import Processes
from fastmerge.wide.heads import SeparateHeads
from fastmerge.wide.population import Keep


def merge(
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    *,
    val_loader: Iterable[Any] | None = None,
    merge_epochs: int = 10,
    finetune_epochs: int = 50,
    link_at: float = 0.25,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    gate_lr: float | None = None,
    lam_start: float = 0.01,
    lam_step: float | None = None,
    gate_schedule: GateSchedule = "quadratic",
    finetune_lr: float | None = None,
    milestones: Sequence[int] | None = None,
    warmup: int = 0,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    optimizer: Callable[..., Optimizer] | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    metrics: Mapping[str, Any] | None = None,
    criterion: Criterion = cross_entropy,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    channels_last: bool = False,
    cuda_graph: bool | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    callback: Callable[[EpochRecord], object] | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
    accumulate: int = 1,
    compact_at: CompactAt = None,
    merge_milestones: Sequence[int] | None = None,
    val_every: int = 1,
    compile: bool = False,
    sync_batch_norm: bool = False,
    recalibrate: bool = True,
    distill: float = 0.0,
    temperature: float = 2.0,
    heads: Literal["average", "concatenate", "separate"] = "average",
    all_classes: bool = False,
    keep: Keep = None,
    tie_streams: bool = False,
    layerwise: int = 1,
) -> tuple[nn.Module, History]:
    """Merges trained teachers of one architecture into a student of that architecture.

    The merge stage trains the big student with the loss ``criterion + λ · gate_loss``; compression keeps the best 1/T
    of its channels; fine-tuning trains the student as usual. The teachers are never changed.

    With a ``checkpoint_dir``, a merge that was killed at any time continues with ``resume=True``. It repeats at most the
    last ``checkpoint_seconds`` of work; on a CPU the student has the same bits as without the kill. Ctrl-C and SIGTERM
    write a checkpoint after the current step. Without a ``checkpoint_dir``, Ctrl-C stops at once and leaves nothing behind.

    Within a process group of torch.distributed (``torchrun``) the processes merge together, with
    DistributedDataParallel. Each reads its own share of the data, in training equally many batches, and gets the same
    student. Where loaders have no length, an epoch ends for all when it ends for the first. Each draws its own gates. The
    first one writes checkpoints, shows progress and calls the callback. A merge may continue with fewer or more processes.

    Args:
        teachers: Two or more trained networks of one architecture.
        train_loader: Yields (input, target) batches, once over the data per ``iter``. A tuple of tensors in place of
            the input goes to a network of several inputs. With ``heads``, a list of loaders, one per teacher (each
            step takes a batch of each), or one loader whose targets number the classes of all teachers, teacher 0's first.
        val_loader: The same for validation: scored after epochs (see ``val_every``), and before and after each stage.
        merge_epochs: Length of the merge stage, at least 1. An epoch of it costs as much as two to four of the fine-tuning,
            so it pays to make it short and the fine-tuning long; but gates need about a hundred steps to settle, and more than
            one epoch: λ only grows between epochs.
        finetune_epochs: Length of the fine-tuning, at least 0.
        link_at: Fraction of the merge stage in which the big student is block-diagonal, which costs less compute; the
            off-diagonal weights are trained after it. It becomes dense at the first epoch that starts at or after this
            fraction, or at the last one; 0 is the paper, 1 is never. With a quarter, docs/ablations.md saw no loss of accuracy.
        lr: Learning rate of the weights' SGD, in both stages.
        momentum: Of the weights' SGD, in both stages.
        weight_decay: Of the weights' SGD, in both stages. Gates get none.
        gate_lr: Of the gates' own SGD, whose momentum is 0.9. None is the paper's 0.2, or more in a stage of few steps, so
            that its gates open or close for good; see :func:`~fastmerge.schedules.fitting_gate_lr`.
        lam_start: λ in the first epoch.
        lam_step: λ grows by ``lam_step · √λ`` per epoch; the paper's is 0.05. None fits it to this stage's length, so
            that a short stage too brings the gates to 1/T; see :func:`~fastmerge.schedules.fitting_lam_step`.
        gate_schedule: "quadratic" weighs the gate loss by the growing λ, as the paper does; "budget" steers every channel
            group to 1/T by a :class:`~fastmerge.GateBudget` and needs no λ, but a loader with a length.
        finetune_lr: Learning rate at the start of the fine-tuning; None is ``lr``.
        milestones: Epochs of the fine-tuning after which the learning rate is divided by ten; None is at two thirds.
        warmup: Epochs of the fine-tuning in which the learning rate rises to its value, linearly from 0.0001, or from
            a tenth of it where that is less.
        schedule: Makes a learning rate scheduler for the fine-tuning, stepped once an epoch, in place of milestones.
            It is tried out before the first epoch, on a throw-away optimizer.
        optimizer: ``optimizer(parameters)`` makes the optimizer of the weights, in both stages, in place of SGD, such as
            ``functools.partial(torch.optim.AdamW, lr=1e-3)``; it then sets its own lr, momentum and weight decay.
            Milestones, warm-up and ``schedule`` scale its learning rate. The gates keep their own SGD.
        clip_norm: Largest norm of the weights' gradients, in both stages; larger gradients are scaled down to it.
        ema: Decay of a moving average over the weights of the fine-tuning, above 0 and below 1. The average is what is
            scored, and what the student becomes.
        metrics: What else is measured on the validation data, by name: functions ``f(output, target)`` that return the mean
            over a batch, or ``(mean, samples)`` where it is over fewer samples than the batch has; or objects with
            ``update(output, target)``, ``compute()`` and ``reset()`` such as torchmetrics'. ``history`` has them as
            ``score.metrics``.
        criterion: ``criterion(output, target)``, the mean over a batch.
        device: Where to train; None is where the first teacher is.
        autocast: Dtype for ``torch.autocast``; None for none. float16 uses a gradient scaler.
        channels_last: Trains in the channels-last layout, which convolutions on a GPU prefer.
        cuda_graph: Whether training steps are captured as a CUDA graph, which spares small networks the wait for the CPU.
            None: on a CUDA device, in one process without accumulation, and if it is at least 5 % faster (five replays
            against five eager steps). A step that waits for the device can't be captured; it runs eagerly, and a warning names
            the line. A graph keeps the memory of one step, in addition to that of eager steps such as an epoch's last.
        seed: Makes the merge repeatable; the caller's random state is restored. None draws from the caller's.
        progress: Whether to show a progress bar on stderr; None shows it on a terminal.
        callback: Called with the record of each epoch. If it returns True, the stage ends with that epoch. An exception in it
            ends the merge. After a crash an epoch may be repeated, and then the callback gets its record again.
        checkpoint_dir: A directory for this merge's checkpoints, at the end of each stage and in between; the last two
            stay. Random changes of the data are repeated where they come from torch's, Python's or NumPy's generators of
            this process or a DataLoader's processes that start anew each epoch (``persistent_workers=False``).
        checkpoint_seconds: At least so many seconds between two checkpoints.
        resume: Whether to go on from the last good checkpoint there; where there is none yet, the merge begins.
        accumulate: Batches per optimizer step. k batches of n samples train as one of k·n would, but for what a network
            computes over a batch (BatchNorm's statistics), in the memory of one.
        compact_at: Fraction of the merge stage after which channels whose gates are closed for good are dropped, at the
            end of every epoch but the last (see :meth:`BigStudent.compact`): epochs get cheaper, and the student differs
            only by the little that nearly closed gates let through. "settled" drops a group's channels as soon as all its
            gates are either closed or open for good; None drops nothing. ``history.compactions`` tells what went when.
        merge_milestones: Epochs of the merge stage after which the weights' learning rate is divided by ten; None is none.
        val_every: Epochs of a stage between two scores on the validation data; its last epoch always has one.
        compile: Whether networks run under torch.compile, which takes a minute or so for each stage and shape of batch; the
            log says what was compiled, and a warning what could not be and runs eagerly. Random gates differ from those
            without it. Other code that was compiled before is compiled again afterwards. A CUDA graph then needs
            ``cuda_graph=True``.
        sync_batch_norm: Whether BatchNorm takes its statistics in training over the batches of all processes, instead of each
            process over its own. On CUDA devices it is then not fused with what follows it.
        recalibrate: Whether the student's BatchNorm statistics are estimated anew after compression, on some thousand training
            samples (:func:`fastmerge.recalibrate`); the paper does not do this. It helps students with few epochs of
            fine-tuning or none; longer fine-tuning estimates them anyway.
        distill: Weight w of distillation in the fine-tuning's loss, ``(1 - w) · criterion + w · τ² KL``, from the teachers'
            mean logits; 0 is none. For classifiers with one output; classes lie along dimension 1, or along the one that
            class numbers lack, as in (N, L, K) with targets (N, L). Each step of the fine-tuning then also runs a forward pass
            of each teacher.
        temperature: τ, of the teachers' and of the student's softmax.
        heads: "concatenate" merges teachers of different label sets, whose last layers may differ in their number of classes,
            into a student with the classes of all, side by side in the teachers' order; "separate" lets it give a tuple of
            them (see :class:`BigStudent`). Each sample then trains only its own teacher's part of the output; with
            ``distill`` the other parts learn their teachers' outputs. Accuracies are over all classes. ``score.metrics`` also
            has the accuracy among the classes of each sample's own teacher: "own part" for all samples, "part t" for those of
            teacher t. Teachers are not scored by themselves: see "part t" of the big student with open gates.
        all_classes: With ``heads``, whether each sample is trained among the classes of all teachers instead.
        keep: How many channels the student has, as a fraction of a teacher's, or by name of the channel group; None is as
            many as a teacher (see :class:`BigStudent`).
        tie_streams: Whether channels that a LayerNorm takes together are kept together (see :class:`BigStudent`). With
            teachers that had not converged, a transformer's student was better for it (docs/evidence.md).
        layerwise: Number K of consecutive parts of the depth whose gates are learned one after another, in 1/K of the merge
            stage each. Only one part at a time has the channels of all teachers, so a step takes less memory and time; the
            student is a different one (see :mod:`fastmerge.merging.layerwise`, and docs/layerwise.md for what it costs). Where
            the teachers are on the CPU and ``device`` is a card, no more than one part's big student is ever on the card.
            ``link_at`` and ``compact_at`` are then fractions of each part, of which all but the first are linked. A callback
            that returns True ends a part.

    Returns:
        (student, history): the student is on ``device``, in eval mode.

    Raises:
        TypeError, ValueError: Teachers, data or options don't fit together. What can be checked is checked before the first
            epoch, and so are checkpoints of another merge.
        FloatingPointError: A loss became NaN or Inf; the last checkpoint is from before.
        ProcessLostError: A RuntimeError: another process of the group ended.
        ReaderLostError: A RuntimeError: a worker of a DataLoader ended.
        Interrupted: A KeyboardInterrupt: a signal came, and a checkpoint was written.

    Source: M. Pašen, V. Boža, "Merging of neural networks" (arXiv 2204.09973), section 2.
    """
    given = {name: value for name, value in locals().items() if name not in ("teachers", "train_loader", "val_loader")}
    options = Options(**given)
    check_together(vars(options))
    return merge_by(options, teachers, train_loader, val_loader)


def merge_by(
    options: Options,
    teachers: Sequence[nn.Module],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    processes: Processes | None = None,
    also: dict[str, Any] | None = None,
    count: Callable[[nn.Module], float] | None = None,
) -> tuple[nn.Module, History]:
    """:func:`merge` of networks, or of stacks of them with stacked batches: replicate by replicate.

    Args:
        options: of the merge.
        teachers, train_loader, val_loader: as :func:`merge`'s; stacks of equally many teachers, and batches (R, N, ...).
        processes: that merge together; None is all there are.
        also: what checkpoints are compared by besides, JSON values.
        count: operations per sample of a network's training, for the history.
    """
    check_each_teacher(teachers)
    check_criterion(options.criterion)
    check_metrics(options.metrics, val_loader)
    with torch.random.fork_rng([], enabled=options.seed is not None):  # a loader that is looked at may draw
        options, teachers, train_loader, val_loader, parts = with_label_sets(
            options, teachers, train_loader, val_loader
        )
    setting = options.setting(teachers[0])
    kept = options.checkpoint_dir is not None
    make = partial(options.optimizer_of, lr=options.finetune_plan.lr)
    optimizer = check_optimizer(make, setting.device, carried=options.carries_optimizer, kept=kept)
    check_schedule(options.schedule, options.finetune_epochs, optimizer, kept=kept)
    history = History(len(teachers))
    same = (also or {}) | fingerprints(teachers)
    with trainer_for(options, setting, train_loader, val_loader, history, processes, same, count) as trainer:
        check_processes(trainer.processes, train_loader, teachers)
        inputs = check_loader(
            "train_loader", train_loader, teachers[0], setting, trained=True, distilled=options.distill > 0
        )
        if val_loader is not None:
            check_loader("val_loader", val_loader, teachers[0], setting)
        trainer.resume()
        student = train_student(teachers, examples_of(inputs, teachers[0]), options, trainer)
    if options.heads == "separate" and parts is not None:
        student = SeparateHeads(student, parts)
    return student, history


def train_by(
    options: Options,
    network: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    teachers: Sequence[nn.Module] = (),
    processes: Processes | None = None,
    also: dict[str, Any] | None = None,
    count: Callable[[nn.Module], float] | None = None,
    title: str | None = None,
) -> History:
    """Trains a network, or a stack of them, in place: the fine-tuning of :func:`merge_by`, by itself.

    Args:
        options: of a merge, whose fine-tuning says how.
        network: fresh or trained.
        train_loader, val_loader, processes, also, count: as :func:`merge_by`'s.
        teachers: to learn from, by the options' ``distill`` and ``temperature``.
        title: of the progress bar.
    """
    setting = options.setting(network)
    same = (also or {}) | fingerprints([network])
    setting.place(network)
    history = History(1)
    with trainer_for(options, setting, train_loader, val_loader, history, processes, same, count, title) as trainer:
        trainer.resume()
        finetune(network, options, trainer, teachers)
    network.eval()
    return history


@contextmanager
def trainer_for(
    options: Options,
    setting: Setting,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    history: History,
    processes: Processes | None,
    same: dict[str, Any],
    count: Callable[[nn.Module], float] | None,
    title: str | None = None,
) -> Iterator[Trainer]:
    """What trains: with checkpoints, signals that are kept until a step's end, progress, and the seed's random numbers."""
    processes = Processes(setting.device) if processes is None else processes
    options.check_cuda_graph(setting.device, processes)
    snapshots = None
    if options.checkpoint_dir is not None:
        snapshots = Snapshots(options.checkpoint_dir, options.compared() | same)
        check_checkpoints(snapshots, options.resume)
    state = MergeState(
        snapshots, options.checkpoint_seconds, setting.device, train_loader, history, processes, options.accumulate
    )
    cuda = [setting.device] if setting.device.type == "cuda" else []
    shown = options.progress if Processes(setting.device).is_first else False
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        readers_watched(),
        torch.random.fork_rng(cuda, enabled=options.seed is not None),
        StopRequests(enabled=snapshots is not None) as stop,
        Progress(shown, title) as bar,
    ):
        if options.seed is not None:
            torch.manual_seed(options.seed)
        yield Trainer(options, setting, train_loader, val_loader, history, state, stop, processes, bar, count)
