"""Instructions that move data between registers, shared and global memory, and those that order them."""

from __future__ import annotations

import re

import numpy as np

from ptx_emulator.decode import TYPES, UNSIGNED, Operands, Source, instruction, members
from ptx_emulator.machine import WARP, Barrier, EmulationError, Machine, Step
from ptx_emulator.memory import TensorMap
from ptx_emulator.parse import Instruction, UnsupportedError

_MAP = re.compile(r"\[\s*([^,\s]+)\s*,\s*\{([^}]*)\}\s*\]")


def _lanes(m: Machine, mask: np.ndarray | None) -> np.ndarray:
    return np.arange(m.lanes) if mask is None else np.flatnonzero(mask)


def _programs(m: Machine, lanes: np.ndarray) -> np.ndarray:
    return m.program[lanes]


def _warps(m: Machine, lanes: np.ndarray) -> np.ndarray:
    return m.thread[lanes].astype(np.int64) // WARP


def _warp_heads(m: Machine, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Program and number of each warp of which a lane is in the mask."""
    lanes = np.flatnonzero(m.lanes_of(mask).reshape(-1, WARP).any(1)) * WARP
    return _programs(m, lanes), _warps(m, lanes)


def _vector(i: Instruction) -> tuple[int, type]:
    """How many registers a load or store has, and of which type each is."""
    count = next((int(part[1:]) for part in i.parts if re.fullmatch("v[248]", part)), 1)
    return count, TYPES[i.parts[-1]]


@instruction("ld.param")
def _parameter(i: Instruction, operands: Operands) -> Step:
    dtype = TYPES[i.parts[-1]]
    name = i.operands[1].strip("[]")
    source, target = (
        operands.source(name, UNSIGNED[8 * np.dtype(dtype).itemsize]),
        operands.target(i.operands[0], dtype),
    )
    return lambda m, mask: target(m, source(m).view(dtype), mask)


@instruction("ld.global", "ld.shared")
def _load(i: Instruction, operands: Operands) -> Step:
    count, dtype = _vector(i)
    size, shared = np.dtype(dtype).itemsize, i.parts[1].startswith("shared")
    place = operands.place(i.operands[1])
    targets = [operands.target(name, dtype) for name in members(i.operands[0])]
    word = UNSIGNED[8 * size]

    def step(m: Machine, mask: np.ndarray | None) -> None:
        lanes = _lanes(m, mask)
        addresses = place(m)[lanes]
        if shared:
            programs = _programs(m, lanes)
            m.hazards.read(programs, addresses, size * count, _warps(m, lanes))
            values = m.shared.load(programs, addresses, size, count)
        else:
            values = m.launch.memory.load(addresses, size, count)
        for target, value in zip(targets, values, strict=True):
            whole = value
            if mask is not None:
                whole = np.zeros(m.lanes, word)
                whole[lanes] = value
            target(m, whole.view(dtype), mask)

    return step


@instruction("st.global", "st.shared")
def _store(i: Instruction, operands: Operands) -> Step:
    count, dtype = _vector(i)
    size, shared = np.dtype(dtype).itemsize, i.parts[1].startswith("shared")
    place = operands.place(i.operands[0])
    sources = [operands.source(name, UNSIGNED[8 * size]) for name in members(i.operands[1])]

    def step(m: Machine, mask: np.ndarray | None) -> None:
        lanes = _lanes(m, mask)
        addresses = place(m)[lanes]
        values = [np.broadcast_to(source(m), (m.lanes,))[lanes] for source in sources]
        if shared:
            programs = _programs(m, lanes)
            m.hazards.write(programs, addresses, size * count, _warps(m, lanes))
            m.shared.store(programs, addresses, size, values)
            m.hazards.check_agreed(values, m.shared.load(programs, addresses, size, count))
        else:
            m.launch.memory.store(addresses, size, values)

    return step


@instruction("ldmatrix", "stmatrix")
def _matrices(i: Instruction, operands: Operands) -> Step:
    """8 × 8 matrices of 16 bits, a row at the address of each lane in turn; transposed, a thread holds two of a column."""
    loads = i.parts[0] == "ldmatrix"
    names, place = members(i.operands[0 if loads else 1]), operands.place(i.operands[1 if loads else 0])
    transposed = "trans" in i.parts
    lane = np.arange(WARP)
    column, row = 2 * (lane % 4), lane // 4
    halves = [(column + half, row) if transposed else (row, column + half) for half in range(2)]
    sources = [operands.source(name, np.uint32) for name in names]
    targets = [operands.target(name, np.uint32) for name in names]

    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.check_whole(mask, WARP)
        lanes = _lanes(m, mask)
        programs = _programs(m, lanes)
        rows = place(m)[lanes].reshape(-1, WARP)[:, : 8 * len(names)]
        m.shared.check(rows, 16, 16, f"{i.parts[0]} of")
        at = lanes.reshape(-1, WARP)[:, : rows.shape[1]].ravel()
        (m.hazards.read if loads else m.hazards.write)(_programs(m, at), rows.ravel(), 16, _warps(m, at))
        for matrix in range(len(names)):
            places = [(rows[:, 8 * matrix + r] + 2 * c).ravel() for r, c in halves]
            if loads:
                low, high = (m.shared.load(programs, at, 2)[0].astype(np.uint32) for at in places)
                whole = np.zeros(m.lanes, np.uint32)
                whole[lanes] = low | (high << np.uint32(16))
                targets[matrix](m, whole, mask)
            else:
                value = np.broadcast_to(sources[matrix](m), (m.lanes,))[lanes]
                for at, by in zip(places, (0, 16), strict=True):
                    m.shared.store(programs, at, 2, [(value >> np.uint32(by)).astype(np.uint16)])

    return step


@instruction("cp.async.ca", "cp.async.cg")
def _copy(i: Instruction, operands: Operands) -> Step:
    """Global to shared memory; what lies beyond the bytes to be read becomes 0."""
    to, of, size = operands.place(i.operands[0]), operands.place(i.operands[1]), int(i.operands[2], 0)
    given = operands.source(i.operands[3], np.uint32) if len(i.operands) > 3 else None

    def step(m: Machine, mask: np.ndarray | None) -> None:
        lanes = _lanes(m, mask)
        programs, places = _programs(m, lanes), to(m)[lanes]
        some = np.ones(len(lanes), bool)
        if given is not None:
            read = np.broadcast_to(given(m), (m.lanes,))[lanes]
            if not np.isin(read, (0, size)).all():
                raise UnsupportedError("a copy of a part of its bytes")
            some = read > 0
        values = [np.zeros(len(lanes), np.uint32) for _ in range(size // 4)]
        for value, word in zip(values, m.launch.memory.load(of(m)[lanes][some], 4, size // 4), strict=True):
            value[some] = word
        m.hazards.copy(programs, places, size, _warps(m, lanes))
        m.shared.store(programs, places, 4, values)

    return step


@instruction("cp.async.bulk.tensor")
def _box(i: Instruction, operands: Operands) -> Step:
    loads = i.opcode.count("complete_tx") == 1
    to, of = i.operands[:2]
    found = _MAP.fullmatch(of if loads else to)
    if found is None or (loads and len(i.operands) != 3):
        raise UnsupportedError(str(i))
    handle = operands.source(found[1], np.uint64)
    corner = [operands.source(text, np.int32) for text in members(found[2])]
    place = operands.place(to if loads else of)
    arrive = operands.place(i.operands[2]) if loads else None

    def step(m: Machine, mask: np.ndarray | None) -> None:
        lanes = _lanes(m, mask)
        corners = np.stack([np.broadcast_to(c(m), (m.lanes,))[lanes] for c in corner], 1).astype(np.int64)
        maps, places = np.broadcast_to(handle(m), (m.lanes,))[lanes], place(m)[lanes]
        bars = arrive(m)[lanes] if arrive else np.zeros_like(places)
        for key in sorted(set(zip(maps.tolist(), places.tolist(), bars.tolist(), strict=True))):
            same = (maps == key[0]) & (places == key[1]) & (bars == key[2])
            tensor_map = m.launch.maps.get(key[0])
            if tensor_map is None or len(corner) != len(tensor_map.box):
                raise EmulationError(f"TMA is given {key[0]:#x}, which is no tensor map of {len(corner)} dimensions")
            if loads:
                _fetch(m, lanes[same], tensor_map, corners[same], key[1], key[2])
            else:
                _send(m, lanes[same], tensor_map, corners[same], key[1])

    return step


def _fetch(
    m: Machine, lanes: np.ndarray, tensor_map: TensorMap, corners: np.ndarray, place: int, mbarrier: int
) -> None:
    programs, element = _programs(m, lanes), tensor_map.element
    m.shared.check(np.array([place]), tensor_map.bytes, 128, "a box fetched to")
    barrier = _barrier(m, programs, mbarrier)
    m.hazards.fetch(programs, place, tensor_map.bytes, _warps(m, lanes), mbarrier)
    at, inside = m.launch.memory.box(tensor_map, corners)
    values = np.where(inside, m.launch.memory.words(element)[np.where(inside, at, 0)], 0)
    m.shared.rows(element)[programs[:, None], tensor_map.places(place)[None, :]] = values
    barrier.bytes[programs] -= tensor_map.bytes
    barrier.complete()
    m.release()


def _send(m: Machine, lanes: np.ndarray, tensor_map: TensorMap, corners: np.ndarray, place: int) -> None:
    programs, element = _programs(m, lanes), tensor_map.element
    m.shared.check(np.array([place]), tensor_map.bytes, 128, "a box stored from")
    m.hazards.send(programs, place, tensor_map.bytes, _warps(m, lanes))
    at, inside = m.launch.memory.box(tensor_map, corners)
    values = m.shared.rows(element)[programs[:, None], tensor_map.places(place)[None, :]]
    m.launch.memory.words(element)[at[inside]] = values[inside]


@instruction("cp.async.bulk.commit_group", "cp.async.commit_group", "wgmma.commit_group")
def _commit(i: Instruction, operands: Operands) -> Step:
    kind = _kind(i)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.hazards.commit(kind, *_warp_heads(m, mask))

    return step


@instruction("cp.async.bulk.wait_group", "cp.async.wait_group", "cp.async.wait_all", "wgmma.wait_group")
def _wait(i: Instruction, operands: Operands) -> Step:
    kind, left = _kind(i), int(i.operands[0]) if i.operands else 0

    def step(m: Machine, mask: np.ndarray | None) -> None:
        if i.parts[2] == "wait_all":
            m.hazards.commit(kind, *_warp_heads(m, mask))
        m.hazards.wait(kind, *_warp_heads(m, mask), left)

    return step


def _kind(i: Instruction) -> str:
    return "products" if i.parts[0] == "wgmma" else "stores" if "bulk" in i.parts else "copies"


@instruction("fence.proxy.async")
def _fence(i: Instruction, operands: Operands) -> Step:
    def step(m: Machine, mask: np.ndarray | None) -> None:
        m.hazards.fence(*_warp_heads(m, mask))

    return step


@instruction("wgmma.fence", "fence", "membar", "griddepcontrol")
def _nothing(i: Instruction, operands: Operands) -> Step:
    """Orders registers, or global memory: threads run in step here."""
    return lambda m, mask: None


def _barrier(m: Machine, programs: np.ndarray, address: int) -> Barrier:
    found = m.barriers.get(address)
    if found is None or not found.valid[programs].all():
        raise EmulationError(f"no mbarrier at {address}: it was not initialised, or is invalid by now")
    return found


def _mbarriers(m: Machine, mask: np.ndarray | None, place: Source) -> list[tuple[int, np.ndarray]]:
    """The addresses that lanes name, each with the lanes that do."""
    lanes = _lanes(m, mask)
    addresses = place(m)[lanes]
    return [(int(address), lanes[addresses == address]) for address in np.unique(addresses)]


@instruction("mbarrier.init")
def _initialise(i: Instruction, operands: Operands) -> Step:
    place, count = operands.place(i.operands[0]), int(i.operands[1], 0)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        for address, lanes in _mbarriers(m, mask, place):
            m.shared.check(np.array([address]), 8, 8, "an mbarrier in")
            programs = _programs(m, lanes)
            new = m.barriers.get(address)
            if new is None or not new.valid.any():
                zeros = np.zeros(m.programs, np.int64)
                new = m.barriers[address] = Barrier(count, zeros.copy(), zeros.copy(), zeros.copy(), zeros.astype(bool))
            if new.count != count or new.valid[programs].any():
                raise EmulationError(f"the mbarrier at {address} is initialised while it is in use")
            new.arrivals[programs], new.bytes[programs], new.phase[programs] = count, 0, 0
            new.valid[programs] = True
            m.hazards.mbarrier(programs, address, _warps(m, lanes), there=True)

    return step


@instruction("mbarrier.inval")
def _invalidate(i: Instruction, operands: Operands) -> Step:
    place = operands.place(i.operands[0])

    def step(m: Machine, mask: np.ndarray | None) -> None:
        for address, lanes in _mbarriers(m, mask, place):
            programs = _programs(m, lanes)
            _barrier(m, programs, address).valid[programs] = False
            m.hazards.mbarrier(programs, address, _warps(m, lanes), there=False)

    return step


@instruction("mbarrier.arrive")
def _arrive(i: Instruction, operands: Operands) -> Step:
    place = operands.place(i.operands[1])
    expected = operands.source(i.operands[2], np.uint32) if "expect_tx" in i.parts else None

    def step(m: Machine, mask: np.ndarray | None) -> None:
        for address, lanes in _mbarriers(m, mask, place):
            programs = _programs(m, lanes)
            barrier = _barrier(m, programs, address)
            m.hazards.use(programs, address, _warps(m, lanes))
            np.subtract.at(barrier.arrivals, programs, 1)
            if expected is not None:
                np.add.at(barrier.bytes, programs, np.broadcast_to(expected(m), (m.lanes,))[lanes].astype(np.int64))
            if (barrier.arrivals[programs] < 0).any():
                raise EmulationError(f"more threads arrive at the mbarrier at {address} than it waits for")
            barrier.complete()
        m.release()

    return step


@instruction("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")
def _await(i: Instruction, operands: Operands) -> Step:
    done, place = operands.target(i.operands[0], np.bool_), operands.place(i.operands[1])
    parity = operands.source(i.operands[2], np.uint32)

    def step(m: Machine, mask: np.ndarray | None) -> None:
        wanted, waiting = np.broadcast_to(parity(m), (m.lanes,)), np.zeros(m.lanes, bool)
        for address, lanes in _mbarriers(m, mask, place):
            programs = _programs(m, lanes)
            phase = _barrier(m, programs, address).phase[programs]
            ended = phase % 2 != wanted[lanes] % 2
            waiting[lanes[~ended]] = True
            m.hazards.use(programs, address, _warps(m, lanes))
            m.hazards.arrived(np.unique(programs[ended]), address)
        done(m, True, mask)
        if waiting.any():
            m.hold(waiting)

    return step
