"""DistributedDataParallel: two processes on half a batch each have the gradients of one on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastmerge
from architectures import BY_NAME, merged
from killing import forkserver
from teachers import OPEN

NAME = "lenet"  # no BatchNorm, whose statistics would differ between halves and whole
BATCH = 8


def merge(linked: bool) -> fastmerge.BigStudent:
    """Gates are surely open or closed, so that drawing them gives the same in every process."""
    big = merged(NAME)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in big.gates.values():
            sign = torch.randint(0, 2, gate.loc.shape, generator=generator) * 2 - 1
            gate.loc.copy_(sign * OPEN)
    if linked:
        big.link()
    return big.train()


def batch() -> tuple[Tensor, Tensor]:
    (x,) = BY_NAME[NAME].inputs(BATCH, seed=30)
    return x, torch.randn(BATCH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model: torch.nn.Module, big: fastmerge.BigStudent, x: Tensor, y: Tensor) -> list[Tensor]:
    """Two steps, with gradients and losses of the second."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + 0.1 * big.gate_loss()).backward()
        optimizer.step()
    return [*(p.grad for p in big.parameters()), *(p.detach() for p in big.parameters())]


def worker(rank: int, linked: bool, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=2)
    try:
        big = merge(linked)
        x, y = (part.chunk(2)[rank] for part in batch())
        torch.manual_seed(rank)
        result = train(DistributedDataParallel(big), big, x, y)
        draws = merge(linked)
        for gate in draws.gates.values():
            torch.nn.init.zeros_(gate.loc)
        model = DistributedDataParallel(draws)
        same = model(batch()[0][:4]).detach()
        torch.save({"result": result, "draws": same, "student": big.compress().state_dict()}, f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("linked", [False, True], ids=["unlinked", "linked"])
def test_two_processes_are_one(linked: bool, tmp_path: Path) -> None:
    big = merge(linked)
    expected = train(big, big, *batch())
    with forkserver() as context:
        processes = [context.Process(target=worker, args=(rank, linked, str(tmp_path))) for rank in range(2)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b, e in zip(first["result"], second["result"], expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)
    student = big.compress().state_dict()
    assert all(torch.allclose(value, student[key], rtol=1e-9, atol=1e-12) for key, value in first["student"].items())
    assert not torch.equal(first["draws"], second["draws"]), "processes with different seeds must draw different gates"
