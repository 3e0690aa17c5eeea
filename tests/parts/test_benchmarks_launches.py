"""What a step launches is counted by kernel, at full size, without a GPU; and a step that launches more is a regression."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmark_reports import raced, report, text_of
from benchmarks import contenders, names
from benchmarks.bench_launches import thin
from benchmarks.cases import NETWORKS, Case
from benchmarks.compare import compare
from benchmarks.launches import counted, pretending
from benchmarks.results import LAUNCHES, cases
from benchmarks.steps import Step
from fastmerge.networks import ResNetCifar

pytest.importorskip("triton")
CASE = Case("tiny", 128, 16, "bf16")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", lambda: ResNetCifar(1))


def test_a_teacher_launches_what_pytorch_does() -> None:
    counts = counted(CASE, CASE.make_teachers()[:1])
    # nine convolutions, of which the first has no gradient of its input, and as many BatchNorms
    assert counts.kernels["convolution"] == counts.kernels["native_batch_norm"] / 3 == 9
    assert counts.kernels["convolution_backward"] == 17
    assert counts.kernels["native_batch_norm_backward"] == 18
    assert not [name for name in counts.kernels if name.endswith("_kernel") or "view" in name or "empty" in name]
    elements = 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + output.numel() + sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        network = ResNetCifar(1)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(add)
        network(torch.empty(CASE.shape))
    assert counts.moved["convolution"] == 2 * elements  # of bfloat16


def test_the_kernels_of_a_big_student_are_counted_at_full_size() -> None:
    small = Case("tiny", 2, 16, "bf16")
    counts = counted(CASE, [contenders.big(small)])
    assert counts.kernels["normalize_kernel"] >= 9
    assert counts.kernels["sample_kernel"] == 1
    gates = 128 * 2 * (16 + 16 + 32 + 32 + 64 + 64) * 4
    assert gates < counts.moved["sample_kernel"] < 1.1 * gates


@pytest.mark.parametrize(
    ("tensors", "elements", "lists", "launches"),
    [(1, 1, 2, 1), (64, 1, 2, 1), (65, 1, 2, 2), (111, 10, 1, 2), (1, 65536 * 320, 2, 1), (1, 65536 * 320 + 1, 2, 2)],
)
def test_operations_over_many_tensors_are_cut_into_launches(
    tensors: int, elements: int, lists: int, launches: int
) -> None:
    from benchmarks.launches import _multi_tensor_launches

    assert _multi_tensor_launches([torch.empty(elements, device="meta")] * tensors, lists) == launches


def test_pretending_launches_nothing_and_leaves_nothing_behind() -> None:
    small = Case("tiny", 2, 8)
    step = Step(small, [contenders.big(small)])
    with pretending():
        assert step.x.is_cuda
        step()
    assert not step.x.is_cuda
    step = Step(small, [contenders.big(small)])
    step()
    assert torch.isfinite(step.loss)


def test_a_thinner_network_has_the_same_layers() -> None:
    network = thin(ResNetCifar(1), 4)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 100)
    assert [type(m) for m in network.modules()] == [type(m) for m in ResNetCifar(1).modules()]
    assert sum(p.numel() for p in network.parameters()) < sum(p.numel() for p in ResNetCifar(1).parameters()) / 8


def _run(launches: int, cpu: float = 2.0) -> list[dict]:
    facts = {names.TEACHERS: (100, 1.0), names.UNLINKED: (launches, cpu)}
    each = {n: {"launches": k, "moved_bytes": 1e9, "cpu_samples": [t]} for n, (k, t) in facts.items()}
    made = raced("launches, x cpu", {"stand-in": [1.0]})
    made["extra_info"]["contenders"] = each
    return [made]


def test_one_launch_more_is_worse_however_tolerant() -> None:
    base = cases(report(_run(80)))
    for count, expected in ((80, "same"), (81, "worse"), (79, "better")):
        found = {c.measure: c.verdict(0.5) for c in compare(base, cases(report(_run(count))))}
        assert found.pop(LAUNCHES) == expected
        assert set(found.values()) == {"same"}


def test_counts_stand_beside_those_of_an_earlier_commit() -> None:
    after = report(_run(80, 1.5)) | {"before": report(_run(90))}
    (row,) = [line for line in text_of({"launches": after}).splitlines() if line.startswith("| unlinked")]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["80", "90"]
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["1.50", "2.00"]
