"""Merge trained networks of one architecture into one of the same architecture.

  fastmerge merge --model resnet18 --teachers a.safetensors b.pt --data imagewoof/ --out merged/
  fastmerge merge --model mynets:SmallNet --model-args width=32 --teachers a.pt b.pt c.pt --data x.npz --out merged/

Checkpoints are .safetensors, an index of sharded ones, or .pt and .ckpt files loaded with weights_only=True, as training
programs (DistributedDataParallel, torch.compile, Lightning, timm) write them. Data is a directory with
train/<class>/<image> and val/<class>/<image>, one with CIFAR's pickles, or an .npz of uint8 arrays train_images,
train_labels, test_images and test_labels. DIR gets student.safetensors, history.json, log.jsonl, report.md and plots;
of another --method than gates student.safetensors, compare.json, compare.md and compare.png.

Teachers of different classes: fastmerge merge --heads concatenate --teachers a.pt b.pt --data a/ --data b/ ...

Killed or interrupted, it goes on with: fastmerge merge --out DIR --resume
Several GPUs: torchrun --nproc-per-node 8 -m fastmerge merge ... with the same options; --batch-size is that of all together.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmerge.cli import compare, resume
from fastmerge.cli.arguments import add_images, add_options, add_teachers, chosen, integer, load_teachers, precision
from fastmerge.cli.dry_run import add_planning, checked_images, plan
from fastmerge.cli.torchrun import at_work
from fastmerge.data.decoding import ON_BAD_IMAGE
from fastmerge.data.loading import LOADERS, image_loaders
from fastmerge.environment import environment
from fastmerge.history import EpochRecord
from fastmerge.merging import merge
from fastmerge.merging.checks import check_device
from fastmerge.merging.estimate import estimate
from fastmerge.merging.options import Options
from fastmerge.methods import METHODS
from fastmerge.methods.cost import predict
from fastmerge.processes import Processes, share_of
from fastmerge.reporting.report import write_report
from fastmerge.reporting.results import EpochLog, write_json
from fastmerge.weights import save_weights
from fastmerge.wide.heads import SeparateHeads

SUMMARY = "merge your own trained networks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastmerge merge``."""
    add = resume.adder(parser)
    add_teachers(add)
    add(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="PATH",
        help="image tree or .npz; with --heads, once for each teacher",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="where the student goes")
    add(
        "--method",
        default="gates",
        metavar="NAME",
        help=f"how: {', '.join(METHODS)}, or one that the module of --model registers; default gates",
    )
    compare.add_method_options(add)
    add_options(add)
    add_images(add)
    add(
        "--loader",
        choices=("auto", *LOADERS),
        default="auto",
        help="which loader reads images; auto chooses by data and machine",
    )
    add("--workers", type=integer(0), metavar="N", help="threads or processes that decode; default one per core")
    add(
        "--on-bad-image",
        choices=ON_BAD_IMAGE,
        default="raise",
        help="what to do at a file that can't be read; default raise",
    )
    add("--autocast", choices=("bfloat16", "float16"), help="mixed precision")
    add_planning(add)
    resume.add_tensorboard(add)
    add("--quiet", action="store_true", help="no progress bar")


def command(options: argparse.Namespace) -> int:
    """Merges, writes the student and its history, and prints the scores; returns the exit status."""
    if options.method != "gates":
        if options.method in METHODS and not METHODS[options.method].one_network:
            raise ValueError(
                f"--method {options.method} makes no network of the teachers' class; fastmerge compare scores it"
            )
        others = resume.chosen_beyond(options, compare.READS | {"method", "merge_epochs"})
        if others:
            raise ValueError(f"--method {options.method} takes no {', '.join(others)}: only --method gates does")
        (options.data,) = _one_or_each(options, 1)
        return compare.run(options, [options.method], options.merge_epochs, student="student.safetensors")
    if options.set:
        raise ValueError("--set is for other methods than gates, whose options have flags of their own")
    with at_work(options, options.device or ("cuda" if torch.cuda.is_available() else "cpu")) as (device, processes):
        _merge(options, device, processes)
    return 0


def _merge(options: argparse.Namespace, device: str, processes: Processes) -> None:
    if options.dry_run:
        resume.check(options)
    elif resume.begin(options, processes):
        if processes.is_first:
            print(f"the merge in {options.out} is finished\n\n{write_report(options.out)}")
        return
    check_device(device, nn.Identity())
    size = options.processes if options.dry_run else processes.size
    paths = _one_or_each(options, 1 if options.heads == "average" else len(options.teachers))
    images = "\n".join(checked_images(options, path) for path in paths) if options.dry_run else ""
    each = [
        image_loaders(
            path,
            share_of(options.batch_size, size, options.accumulate, len(paths)),
            image_size=options.image_size,
            augmentation=options.augmentation,
            loader=options.loader,
            device=device,
            channels_last=options.channels_last,
            seed=options.seed or 0,
            workers=options.workers,
            on_bad_image=options.on_bad_image,
            mean=options.mean,
            std=options.std,
            shard=processes.rank,
            shards=size,
        )
        for path in paths
    ]
    why = "\n".join(dict.fromkeys(loaders.why for loaders in each))
    columns: Any = zip(*((loaders.train, loaders.val, loaders.classes) for loaders in each), strict=True)
    train, val, classes = (column[0] if len(each) == 1 else list(column) for column in columns)
    teachers = load_teachers(options, classes)
    given: dict[str, Any] = chosen(options) | {"device": device, "autocast": precision(options)}
    wanted = Options(**given)
    setting = wanted.setting(teachers[0])
    cost = None
    if processes.is_first and not options.resume:
        cost = predict(teachers, train, setting, wanted)
    if options.dry_run:
        found = estimate(teachers, train, val, setting, wanted)
        print(f"{plan(options, images, why, found)}\n{cost}")
        return
    if processes.is_first:
        print("\n".join(map(str, filter(None, (why, cost)))))
    with resume.epoch_log(options, processes, ("stage", "epoch")) as log:
        note = None if log is None else _noting(log, options.merge_epochs)
        student, history = merge(
            teachers,
            train,
            val_loader=val,
            **given | {"progress": False if options.quiet else None, "callback": note},
            checkpoint_dir=options.out / resume.CHECKPOINTS,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
        )
    left_out = processes.joined({k: v for loaders in each for k, v in loaders.bad_images.found.items()})
    if not processes.is_first:
        return
    network = student.network if isinstance(student, SeparateHeads) else student  # of the teachers' class
    save_weights(network, options.out / "student.safetensors")
    config = resume.config(options) | {"device": device, "processes": processes.size}
    config["data"] = paths[0] if len(paths) == 1 else paths
    config |= {"images_left_out": len(left_out)} if left_out else {}
    more = {"left_out": left_out, "config": config, "environment": environment()}
    write_json(options.out / "history.json", history.to_dict() | more)
    print(write_report(options.out))
    print(f"\nstudent.safetensors, history.json, log.jsonl, report.md and plots in {options.out}")
    resume.finish(options)


def _one_or_each(options: argparse.Namespace, count: int) -> list[Path]:
    """The paths of the data: one, whose classes then count those of all teachers through, or one per teacher.

    Raises:
        ValueError: There are others than one or ``count``.
    """
    paths: list[Path] = options.data
    if len(paths) not in (1, count):
        per = "--data once, or with --heads concatenate or separate once for each teacher"
        raise ValueError(f"fastmerge merge needs {per}; got it {len(paths)} times for {len(options.teachers)} teachers")
    return paths


def _noting(log: EpochLog, merge_epochs: int) -> Callable[[EpochRecord], None]:
    def note(record: EpochRecord) -> None:
        log.write(dataclasses.asdict(record), record.epoch + (merge_epochs if record.stage == "finetune" else 0))

    return note
