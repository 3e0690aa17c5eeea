"""Instructions by which threads go their ways, wait for each other, and exchange registers."""

from __future__ import annotations

import numpy as np

from ptx_emulator.decode import Operands, instruction
from ptx_emulator.machine import PARTED, WARP, Machine, Step
from ptx_emulator.parse import Instruction, UnsupportedError


@instruction("bra")
def _branch(i: Instruction, operands: Operands) -> Step:
    goal = operands.kernel.labels[i.operands[-1]]
    if i.guard is None:

        def jump(m: Machine, mask: np.ndarray | None) -> None:
            m.jump = goal

        return jump
    guard = operands.guard(i)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        taken = guard(m)
        if mask is not None:
            taken = taken & mask
        if not taken.any():
            return
        rest = m.lanes_of(mask) & ~taken
        if rest.any():
            m.wait(goal, taken)
            m.wait(m.at + 1, rest)
            m.jump = PARTED
        else:
            m.jump = goal

    return step


@instruction("brx.idx")
def _branch_by_table(i: Instruction, operands: Operands) -> Step:
    index = operands.source(i.operands[0], np.uint32)
    goals = [operands.kernel.labels[label] for label in operands.kernel.tables[i.operands[1]]]

    def step(m: Machine, mask: np.ndarray | None) -> None:
        chosen, lanes = np.broadcast_to(index(m), (m.lanes,)), m.lanes_of(mask)
        for place in np.unique(chosen[lanes]):
            m.wait(goals[place], lanes & (chosen == place))
        m.jump = PARTED

    return step


@instruction("ret", "exit")
def _end(i: Instruction, operands: Operands) -> Step:
    return lambda m, mask: m.end(m.lanes_of(mask))


@instruction("bar.sync", "barrier.sync")
def _synchronise(i: Instruction, operands: Operands) -> Step:
    if len(i.operands) != 1 or i.operands[0] != "0":
        raise UnsupportedError(str(i))

    def step(m: Machine, mask: np.ndarray | None) -> None:
        if mask is not None:
            here = mask.reshape(m.programs, -1).sum(1)
            short = (here > 0) & (here < m.alive.reshape(m.programs, -1).sum(1))
            if short.any():
                m.hold(mask & short[m.program])
                mask = mask & ~short[m.program]
        m.hazards.barrier(np.unique(m.program[m.lanes_of(mask)]))

    return step


@instruction("bar.warp.sync")
def _synchronise_warp(i: Instruction, operands: Operands) -> Step:
    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.check_whole(mask, WARP)

    return step


@instruction("shfl.sync")
def _shuffle(i: Instruction, operands: Operands) -> Step:
    mode = i.parts[2]
    value = operands.source(i.operands[1], np.uint32)
    by, clamp = (operands.source(text, np.uint32) for text in i.operands[2:4])
    result, _, found = i.operands[0].partition("|")
    target = operands.target(result, np.uint32)
    present = operands.target(found, np.bool_) if found else None
    if mode not in ("bfly", "idx", "down", "up"):
        raise UnsupportedError(str(i))

    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.check_whole(mask, WARP)
        lane, distance = np.arange(m.lanes) % WARP, np.asarray(by(m)).astype(np.int64)
        if np.any((np.asarray(clamp(m)) & np.uint32(31)) != (0 if mode == "up" else 31)):
            raise UnsupportedError("a shuffle within parts of a warp")
        at = {"bfly": lane ^ distance, "idx": distance % WARP, "down": lane + distance, "up": lane - distance}[mode]
        inside = (at >= 0) & (at < WARP)
        at = np.where(inside, at, lane)
        target(m, np.broadcast_to(value(m), (m.lanes,))[np.arange(m.lanes) - lane + at], mask)
        if present is not None:
            present(m, inside, mask)

    return step


@instruction("elect.sync")
def _elect(i: Instruction, operands: Operands) -> Step:
    result, _, chosen = i.operands[0].partition("|")
    target, leads = operands.target(result, np.uint32), operands.target(chosen, np.bool_)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.check_whole(mask, WARP)
        target(m, np.uint32(0), mask)
        leads(m, m.thread % WARP == 0, mask)

    return step
