"""Each method to make one network of several, against what its paper says of it."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import architectures
import fastmerge
from architectures import BY_NAME, ZOO, Architecture
from fastmerge import methods
from fastmerge.evaluation import Setting, evaluate
from fastmerge.lock_step import Family
from fastmerge.merging.api import merge_by
from fastmerge.merging.options import Options
from fastmerge.methods.cost import Meter, step_operations
from fastmerge.methods.repair import restore_statistics
from fastmerge.methods.samples import check_batches
from fastmerge.methods.zipit import zipped
from small_task import VAL, X, Y, train_teachers
from teachers import make_batch, make_teachers, relative_error

NETWORKS = ("lenet", "resnet_projected_shortcut", "vision_transformer")  # no channel of theirs is 0 on all samples


@cache
def teachers_of(name: str) -> tuple[nn.Module, ...]:
    teachers = copy.deepcopy(architectures.teachers_of(name))
    if name == "lenet":  # no channel may be 0 on all samples: it could be any other
        for teacher in teachers:
            for layer, least in ((teacher.fc1, 20.0), (teacher.fc2, 200.0)):
                nn.init.uniform_(layer.bias, least, 2 * least)
    return teachers


def batches_of(name: str, samples: int = 24) -> list[tuple[Tensor, Tensor]]:
    (x,) = BY_NAME[name].inputs(samples, seed=3)
    return [(x, torch.zeros(samples, dtype=torch.long))]


@cache
def trained() -> list[nn.Module]:
    return list(train_teachers())


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + 64], Y[i : i + 64]) for i in range(0, 256, 64)]


def shuffled(network: nn.Module, name: str, seed: int = 0) -> nn.Module:
    groups = Family.of([network], BY_NAME[name].inputs(2)).groups  # traced once for all tests
    generator = torch.Generator().manual_seed(seed)
    orders = {group.name: torch.randperm(group.size, generator=generator) for group in groups}
    return fastmerge.permute(network, groups, orders)


def assert_equal(network: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(network.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rebasin_of_a_permuted_network_is_the_network(name: str, by: str) -> None:
    teacher = teachers_of(name)[0]
    merged = methods.rebasin([teacher, shuffled(teacher, name)], batches_of(name, 200), by=by)
    assert_equal(merged, teacher)


def test_rebasin_matches_three_networks() -> None:
    teacher = teachers_of("lenet")[0]
    several = [teacher, shuffled(teacher, "lenet", 1), shuffled(teacher, "lenet", 2)]
    merged, (x,) = methods.rebasin(several, batches_of("lenet")), BY_NAME["lenet"].inputs(6)
    with torch.no_grad():
        assert relative_error(merged(x), teacher(x)) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_zipit_of_a_permuted_network_is_the_network(name: str) -> None:
    teacher = teachers_of(name)[0]
    both = [teacher, shuffled(teacher, name)]
    merged = methods.zipit(both, batches_of(name))
    statistics = {n for n, _ in teacher.named_buffers()}  # are taken anew, on the samples
    for (key, a), b in zip(merged.state_dict().items(), teacher.state_dict().values(), strict=True):
        assert key in statistics or torch.equal(a, b), key
    assert_equal(methods.zipit(both, batches_of(name), recalibrate=False), teacher)


def test_zipit_of_three_copies_is_the_network_where_channels_may_be_merged_again() -> None:
    teacher = teachers_of("lenet")[0]
    copies, (x,) = [teacher, *(shuffled(teacher, "lenet", seed) for seed in (1, 2))], BY_NAME["lenet"].inputs(6)
    with torch.no_grad():
        for again, exact in ((1.0, True), (0.3, False)):
            merged = methods.zipit(copies, batches_of("lenet", 200), again=again)
            assert (relative_error(merged(x), teacher(x)) < 1e-12) is exact


def test_zipit_merges_within_a_network_too() -> None:
    first, other = (copy.deepcopy(teacher) for teacher in teachers_of("lenet")[:2])
    with torch.no_grad():  # channels 0 and 1 of the first say the same
        first.conv1.weight[1], first.conv1.bias[1] = first.conv1.weight[0], first.conv1.bias[0]
    merged = methods.zipit([first, other], batches_of("lenet", 200), within=1.0)
    assert torch.equal(merged.conv1.weight[0], first.conv1.weight[0])
    apart = methods.zipit([first, other], batches_of("lenet", 200), within=0.0)
    assert not torch.equal(apart.conv1.weight[0], first.conv1.weight[0])


def test_zipped_keeps_to_its_budget_and_merges_the_most_alike_first() -> None:
    alike = torch.tensor([[1, 0.9, 0.5, 0.1], [0.9, 1, 0.2, 0.6], [0.5, 0.2, 1, 0.8], [0.1, 0.6, 0.8, 1]])
    assert zipped(alike, 2, 0.3, 1.0).tolist() == [[0, 0], [1, 1]]  # 0 and 1, then 2 and 3
    assert zipped(alike, 2, 0.3, 0.0).tolist() == [[0, 1], [0, 1]]  # of different networks: 1 and 3, then 0 and 2


@pytest.mark.parametrize("name", NETWORKS[:2])
def test_repair_restores_means_and_deviations_of_channels(name: str) -> None:
    teachers, data = teachers_of(name)[:2], batches_of(name, 200)
    merged = methods.average(teachers)
    family = Family.of(teachers, data[0][0])
    before, wanted = moments(family, [merged]), moments(family, teachers)
    restore_statistics(merged, teachers, family)
    after = moments(family, [merged])
    assert wanted.keys() == after.keys()
    assert max((before[key] - wanted[key]).abs().max() for key in wanted) > 0.05
    for key, value in wanted.items():
        assert (after[key] - value).abs().max() < 1e-9, key
    assert_equal(methods.repair(teachers, data, by=None, samples=200), merged)


def test_repair_of_batch_norm_without_scales_is_in_its_statistics() -> None:
    torch.manual_seed(0)
    teachers = [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        .double()
        .eval()
        for _ in range(2)
    ]
    for teacher in teachers:
        teacher[1].running_mean.uniform_(-1, 1)
        teacher[1].running_var.uniform_(0.5, 2)
    data = [(torch.randn(100, 3, 6, 6, dtype=torch.double), None)]
    family = Family.of(teachers, data[0][0])
    merged, wanted = methods.repair(teachers, data, by=None), moments(family, teachers)
    for key, value in moments(family, [merged]).items():
        assert (value - wanted[key]).abs().max() < 1e-9, key


def test_what_repair_can_not_do_is_said() -> None:
    torch.manual_seed(0)
    normed = [
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
        for _ in range(2)
    ]
    with pytest.raises(ValueError, match=r"that of 0 is computed by weight normalisation"):
        methods.repair(normed, [(torch.randn(8, 3), None)])
    for network in normed:
        nn.utils.parametrizations.weight_norm(network[2], dim=None)  # one magnitude for all channels
    for method in (methods.zipit, methods.transplant, methods.reconstruct):
        with pytest.raises(ValueError, match=r"layer '0' computes its weights, so its channels can't be combined"):
            method(normed, [(torch.randn(8, 3), None)])
    plain = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    for method in (methods.repair, methods.zipit, methods.reconstruct):
        with pytest.raises(ValueError, match="needs two samples or more; the loader has one"):
            method(plain, [(torch.randn(1, 3), None)])
        with pytest.raises(ValueError, match="samples of at least 2; got -5"):
            method(plain, [(torch.randn(8, 3), None)], samples=-5)


def moments(family: Family, networks: list[nn.Module]) -> dict[str, Tensor]:
    """Means and deviations of what layers and BatchNorms write, by name of the node, averaged over networks."""
    found = {}
    for moment in family.run(networks):
        named = str(moment.node.target)
        norm = "batch_norm" in named
        if norm or (
            moment.call is not None and not any("batch_norm" in str(user.target) for user in moment.node.users)
        ):
            if moment.call is not None and (family.groups.outputs[moment.call.weight].group < 0).any():
                continue
            dim = 1 if norm else moment.call.geometry.channel_dim
            flat = [y.movedim(dim, 0).flatten(1) for y in moment.compute()]
            both = [torch.stack([y.mean(1), y.std(1, correction=0)]) for y in flat]
            found[moment.node.name] = torch.stack(both).mean(0)
    return found


def test_transplant_follows_its_papers_rule_on_an_mlp() -> None:
    """Both networks side by side, the last layer's weights halved; of each hidden layer the neurons with the largest sums of
    squares of weights in and out stay."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    (a1, a2, a3), (b1, b2, b3) = ([net[i].weight.detach() for i in (0, 2, 4)] for net in nets)
    w1, w2, w3 = torch.cat([a1, b1]), torch.block_diag(a2, b2), torch.cat([a3, b3], 1) / 2
    c1, c2 = (torch.cat([net[i].bias.detach() for net in nets]) for i in (0, 2))
    top1 = (w1.square().sum(1) + w2.square().sum(0)).topk(6).indices.sort().values
    top2 = (w2.square().sum(1) + w3.square().sum(0)).topk(5).indices.sort().values
    fused = methods.transplant(nets, [(torch.randn(2, 4), torch.zeros(2))])
    assert torch.equal(fused[0].weight, w1[top1])
    assert torch.equal(fused[0].bias, c1[top1])
    assert torch.equal(fused[2].weight, w2[top2][:, top1])
    assert torch.equal(fused[2].bias, c2[top2])
    assert torch.allclose(fused[4].weight, w3[:, top2], rtol=0, atol=1e-8)
    assert torch.allclose(fused[4].bias, (nets[0][4].bias + nets[1][4].bias) / 2, rtol=0, atol=1e-7)
    assert 0 < (top1 < 6).sum() < 6  # of both


@pytest.mark.parametrize("name", NETWORKS)
def test_reconstruct_of_a_permuted_network_computes_the_same(name: str) -> None:
    teacher, data = teachers_of(name)[0], batches_of(name, 200)
    merged = methods.reconstruct([teacher, shuffled(teacher, name)], data, samples=200, ridge=1e-12)
    x = data[0][0]
    with torch.no_grad():
        assert relative_error(merged(x), teacher(x)) < 1e-4


def test_reconstruct_of_two_equal_networks_with_layer_norm_is_the_network() -> None:
    """A channel that is a sum of the others is kept, not the other network's copy of one that is kept already."""
    x = make_batch(100, (4,))
    (first,) = make_teachers(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (x,), 1)
    merged = methods.reconstruct([first, copy.deepcopy(first)], [(x, None)], ridge=1e-10)
    with torch.no_grad():
        assert relative_error(merged(x), first(x)) < 1e-6


def test_reconstruct_is_nearer_to_the_teachers_mean_than_other_one_shot_merges() -> None:
    teachers, data = trained(), batches()
    x = VAL[0][0]
    with torch.no_grad():
        mean = methods.ensemble(teachers)(x)
        errors = {
            name: (methods.apply(name, teachers[:2], data).network(x) - mean).square().mean().item()
            for name in ("reconstruct", "average", "transplant", "rebasin")
        }
    assert min(errors, key=lambda name: errors[name]) == "reconstruct"
    assert errors["reconstruct"] < 0.5 * errors["transplant"]


def loss_of(network: nn.Module) -> float:
    return evaluate(network, VAL, Setting(torch.device("cpu"), nn.functional.cross_entropy)).loss


@pytest.mark.parametrize("method", ["rebasin", "repair", "zipit", "transplant", "reconstruct"])
def test_the_default_device_of_the_process_does_not_matter(method: str) -> None:
    teachers, data = teachers_of(NETWORKS[0]), batches_of(NETWORKS[0])
    expected = methods.apply(method, teachers, data).network
    torch.set_default_device("meta")
    try:
        found = methods.apply(method, teachers, data).network
    finally:
        torch.set_default_device(None)
    assert_equal(found, expected)


class AnyLength(nn.Module):
    """Its graph is of one length of the sequence, so that a big student traces it again for another."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = [torch.relu(self.hidden(x[:, t])) for t in range(x.shape[1])]
        return self.head(torch.stack(steps).sum(0))


def test_batches_of_several_shapes() -> None:
    teachers = [AnyLength(), AnyLength()]
    data = [(torch.randn(4, length, 3), torch.randint(0, 2, (4,))) for length in (3, 4, 5)]

    class OtherFirst:
        """Every pass begins with a new shape."""

        length = 3

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.length += 1
            return iter([(torch.randn(4, self.length, 3), data[0][1]), *data])

        def __len__(self) -> int:
            return 4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        outcome = methods.apply("gates", teachers, OtherFirst(), epochs=2)
    assert outcome.cost > 0
    with pytest.raises(
        ValueError, match=r"needs them of one shape; those of batch 0 are \[\(3, 3\)\], of batch 1 \[\(4, 3\)\]"
    ):
        methods.apply("repair", teachers, data)


@pytest.mark.parametrize("start", [0, None])
def test_distill_learns_what_the_teachers_say(start: int | None) -> None:
    teachers = trained()[:2]
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    torch.manual_seed(0)
    student = methods.distill(teachers, batches(), epochs=8, start=start, lr=0.05, weight=1.0, temperature=1.0)
    x = X[:256]
    with torch.no_grad():
        wanted = methods.ensemble(teachers)(x).softmax(1)
        far = [
            (net(x).softmax(1) - wanted).square().mean() for net in (student, teachers[0], type(teachers[0])().eval())
        ]
    assert far[0] < 0.8 * far[1 if start == 0 else 2]
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in teacher.state_dict().items())


def test_soup_leaves_out_what_does_not_help() -> None:
    *_, far, best = sorted(trained(), key=loss_of, reverse=True)
    assert_equal(methods.soup([far, best, copy.deepcopy(best)], batches(), held_out=VAL), best)


def test_soup_leaves_out_what_gives_no_number() -> None:
    """Of each network alone the losses are finite; of their mean they are not."""
    networks = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for network, weight in zip(networks, (-1.0, 3.0), strict=True):
        nn.init.constant_(network.weight, weight)
    data = [(torch.ones(4, 1), torch.zeros(4, 1))]
    merged = methods.soup(networks, data, criterion=lambda output, _: (output - 1).abs().mean() / (output != 1).all())
    assert merged.weight.item() == -1.0


def test_gates_are_a_method_like_the_others() -> None:
    teachers = trained()[:2]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"P\[g>0\]"):
        outcome = methods.apply("gates", teachers, batches(), epochs=3, lr=0.01)
    assert type(outcome.network) is type(teachers[0])
    assert 3 * 2 < outcome.cost < 3 * 4.5  # linked from the start, an epoch costs up to four of a network


def test_a_cost_does_not_depend_on_how_the_samples_are_batched() -> None:
    """An epoch of training is one, whatever the last batch lacks."""
    teachers = trained()[:2]
    whole = [(X[:96], Y[:96])]
    for data in (
        whole,
        [(X[:64], Y[:64]), (X[64:96], Y[64:96])],
        [(X[:1], Y[:1]), (X[1:96], Y[1:96])],
        DataLoader(TensorDataset(X[:96], Y[:96]), 64),
        DataLoader(TensorDataset(X[:120], Y[:120]), 32, drop_last=True),
    ):
        with Meter() as meter:
            methods.train(copy.deepcopy(teachers[0]), data, epochs=2)
        assert meter.epochs(teachers[0], whole) == pytest.approx(2)


def test_what_a_merge_will_cost_is_what_it_costs() -> None:
    """Counted beforehand, from two samples, and while it trains; nothing is changed."""
    teachers, random = trained()[:2], torch.get_rng_state()
    before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
    setting = Setting(torch.device("cpu"), nn.functional.cross_entropy)
    chosen = Options(merge_epochs=4, finetune_epochs=3, link_at=0.5, distill=0.5)
    found = methods.predict(teachers, batches(), setting, chosen)
    assert torch.equal(torch.get_rng_state(), random)
    few = [(X[:2], None)]
    unit = step_operations(teachers[0], few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gates don't arrive in so short a stage
        _, history = merge_by(chosen, teachers, batches(), count=lambda network: step_operations(network, few) / unit)
    costs = [record.operations for record in history.epochs]
    assert found.merge == pytest.approx(sum(costs[:4]))
    assert found.epoch == pytest.approx((costs[0], costs[3]))
    assert found.epoch[0] < found.epoch[1]
    assert found.finetune == pytest.approx(3 * (1 + 2 / 3))
    assert sum(costs[4:]) == pytest.approx(3 + 2)  # the same: teachers are asked in every epoch
    big = fastmerge.BigStudent(*teachers, example_inputs=X[:2])
    big.link()
    weights = [3 * sum(parameter.nbytes for parameter in network.parameters()) for network in (big, teachers[0])]
    half = methods.predict(teachers, [(x[:32], y[:32]) for x, y in batches()], setting, chosen)
    for whole, less, fixed in zip(found.memory, half.memory, weights, strict=True):
        assert whole - fixed == pytest.approx(2 * (less - fixed), rel=0.01)  # what the forward keeps, by samples
        assert less > fixed
    narrow = methods.predict(teachers, batches(), setting, replace(chosen, keep=0.5))
    assert narrow.merge == found.merge
    assert 2 < narrow.finetune < found.finetune - 1
    assert str(found).startswith(
        f"cost: {found.merge + 5:.0f} epochs of training one network, by counted operations (4 of "
    )
    assert "; a plain run as long costs 7. A step takes about " in str(found)
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


def test_what_a_merge_in_float64_will_cost_is_counted_in_float32() -> None:
    setting, chosen = Setting(torch.device("cpu"), nn.functional.cross_entropy), Options(merge_epochs=2)
    teachers = trained()[:2]
    found = methods.predict(teachers, batches(), setting, chosen)
    double = [copy.deepcopy(teacher).double() for teacher in teachers]
    assert methods.predict(double, [(x.double(), y) for x, y in batches()], setting, chosen) == found


def test_costs_are_in_epochs_of_a_teacher() -> None:
    teachers = trained()[:2]
    with Meter() as meter, torch.no_grad():
        teachers[0](X[:256])
    forward = meter.epochs(teachers[0], batches())
    assert 0.3 < forward < 0.5  # the first layer's inputs need no gradients
    assert methods.apply("average", teachers, batches()).cost == 0
    assert methods.apply("distill", teachers, batches(), epochs=3).cost == pytest.approx(3 + 3 * 2 * forward)
    outcome = methods.apply("repair", teachers, batches(), by=None, samples=256)
    assert (
        3 * forward < outcome.cost < 5 * forward
    )  # of two teachers and the student, whose layers run again when changed
    assert outcome.seconds > 0
    assert outcome.memory is None or outcome.memory >= 0


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_every_method_takes_three_teachers_and_leaves_them_alone(name: str) -> None:
    teachers = trained()
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    options = {"epochs": 1} if methods.METHODS[name].needs == "training" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gates, in so short a stage
        network = methods.apply(name, teachers, batches(), **options).network
    with torch.no_grad():
        assert network(X[:4]).isfinite().all()
    if methods.METHODS[name].one_network:
        assert type(network) is type(teachers[0])
        teachers[0].load_state_dict(copy.deepcopy(network.state_dict()))
        teachers[0].load_state_dict(before[0])
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in teacher.state_dict().items())
    assert methods.METHODS[name].summary.endswith(".")


def test_methods_by_name() -> None:
    with pytest.raises(ValueError, match="there is no method 'glue'; there are average, distill"):
        methods.apply("glue", trained(), batches())
    with pytest.raises(ValueError, match="method 'rebasin' has no option again; it has by, samples, seed"):
        methods.apply("rebasin", trained(), batches(), again=1)
    with pytest.raises(ValueError, match="there is a method 'average' already"):
        methods.register("average", needs="weights", source="")(lambda teachers, batches: teachers[0])
    with pytest.raises(ValueError, match=r"needs a name of letters, .*; got 'a/b'"):
        methods.register("a/b", needs="weights", source="")
    with pytest.raises(ValueError, match="one of weights, samples, training; got 'luck'"):
        methods.register("lucky", needs="luck", source="")
    with pytest.raises(ValueError, match=r"method 'late': options are keyword-only arguments; put a \* before samples"):
        methods.register("late", needs="weights", source="")(lambda teachers, batches, samples=2: teachers[0])
    methods.register("nothing", needs="weights", source="")(lambda teachers, batches: None)
    try:
        with pytest.raises(TypeError, match=r"'nothing' must return a network .*; it returned a NoneType"):
            methods.apply("nothing", trained(), batches())
    finally:
        del methods.METHODS["nothing"]
    for function, wrong in ((methods.rebasin, {"by": "names"}), (methods.reconstruct, {"keep": "all"})):
        with pytest.raises(ValueError, match=repr(next(iter(wrong.values())))):
            function(trained(), batches(), **wrong)
    with pytest.raises(ValueError, match="batches is empty"):
        methods.zipit(trained(), [])


@pytest.mark.parametrize("name", methods.METHODS)
def test_methods_by_name_take_networks_of_one_architecture(name: str) -> None:
    first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"teachers 0 and 1|teacher 1"):
        methods.apply(name, [first, other], [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))])


@dataclasses.dataclass
class Answer:
    """What some networks give."""

    logits: Tensor
    classes: Tensor
    flag: bool = True


class Answering(nn.Module):
    """A network with an output of a class of its own, and a state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Answer:
        logits = self.last(self.body(x).relu())
        return Answer(logits, logits.argmax(1))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}


def test_an_ensembles_outputs_are_the_mean_whatever_holds_them() -> None:
    torch.manual_seed(0)
    teachers, x = [Answering() for _ in range(3)], torch.randn(20, 3)
    output, each = methods.ensemble(teachers)(x), [teacher(x) for teacher in teachers]
    assert torch.equal(output.logits, torch.stack([one.logits for one in each]).mean(0))
    counts = torch.stack([(torch.stack([one.classes for one in each]) == k).sum(0) for k in range(4)])
    assert torch.equal(output.classes, counts.argmax(0))  # what most say
    assert not torch.equal(output.classes, each[0].classes)
    assert output.flag


def test_weights_are_averaged_beside_states_that_are_no_tensors() -> None:
    teachers = [Answering(), Answering()]
    merged = methods.average(teachers)
    assert torch.equal(merged.last.weight, (teachers[0].last.weight + teachers[1].last.weight) / 2)
    assert merged.state_dict()["_extra_state"] == {"version": 3}
    with pytest.raises(ValueError, match=r"0.weight is \(4, 3\) in teacher 0 and \(5, 3\) in teacher 1"):
        methods.average([nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 5))])


@pytest.mark.parametrize("name", ["soup", "distill"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: iter(batches()), "the loader can be iterated only once"),
        (lambda: [{"input": X, "target": Y}], "the loader must yield pairs .*; it yields a dict"),
        (lambda: [(X[:32], Y[:32], Y[:32])], "the loader must yield pairs .*; it yields a tuple of 3"),
        (lambda: [(X[:32].double(), Y[:32])], "the teachers can't read the loader's inputs of shape"),
        (lambda: [(X[:32], Y[:32] + 3)], "the loader has targets 4..5; the teachers have 3 classes"),
        (list, "the loader is empty"),
    ],
)
def test_data_that_does_not_fit_is_named_before_anything_is_computed(name: str, data: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        methods.apply(name, trained(), data())


class AuxiliaryInTraining(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return (self.network(x), x) if self.training else self.network(x)


def test_outputs_of_training_mode_are_looked_at_before_a_network_learns() -> None:
    teachers = [AuxiliaryInTraining(teacher) for teacher in trained()[:2]]
    message = "distillation needs networks with one output.*; in training mode the teachers give a tuple of 2"
    with pytest.raises(ValueError, match=message):
        methods.apply("distill", teachers, batches(), epochs=1)
    methods.apply("soup", teachers, batches())  # which trains nothing


def test_looking_at_the_data_leaves_random_numbers_as_they_are() -> None:
    data = DataLoader(TensorDataset(X[:96], Y[:96]), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    before, own = torch.get_rng_state(), data.generator.get_state()
    check_batches("the loader", data, trained()[0], nn.functional.cross_entropy)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(data.generator.get_state(), own)


@pytest.mark.parametrize("name", ["repair", "zipit", "reconstruct"])
def test_samples_that_statistics_are_taken_of_are_finite(name: str) -> None:
    data = [(X[:32], Y[:32]), (torch.full_like(X[:32], torch.nan), Y[:32])]
    with pytest.raises(ValueError, match="needs finite samples; batch 1 holds NaN or Inf"):
        methods.apply(name, trained(), data)


def test_teachers_come_as_a_list() -> None:
    with pytest.raises(TypeError, match=r"merge needs a list of teachers, .*; got a SmallNet"):
        methods.apply("average", trained()[0], batches())
    assert type(methods.apply("rebasin", (teacher for teacher in trained()), batches()).network) is type(trained()[0])


def test_a_cost_is_counted_in_batches_of_one_and_in_inference_mode() -> None:
    teachers = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in range(2)]
    x = torch.randn(20, 3)
    found = [methods.apply("reconstruct", teachers, [(x[i : i + n], None) for i in range(0, 20, n)]) for n in (1, 20)]
    with torch.inference_mode():
        found.append(methods.apply("reconstruct", teachers, [(x, None)]))
    assert [outcome.cost for outcome in found] == [pytest.approx(found[0].cost, rel=0.05)] * 3
    assert not any(parameter.is_inference() for outcome in found for parameter in outcome.network.parameters())


def test_products_of_attention_are_counted() -> None:
    """On a CPU, too; and in an encoder, which has an operation of its own where it needs no gradients."""
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
    forward = 4 * 5 * (4 * 8 * 8 + 2 * 8 * 16 + 2 * 5 * 8)  # weights, then scores and their products with values
    x = torch.randn(4, 5, 8)
    found = step_operations(layers[0], [(x, None)], backward=False), step_operations(layers[0], [(x, None)])
    assert found[0] == 2 * forward
    assert found[1] == pytest.approx(
        6 * forward, rel=0.1
    )  # the inputs need no gradients, the scores are computed again
    outcome = methods.apply("soup", layers, [(x, torch.randn(4, 5, 8))], criterion=nn.functional.mse_loss)
    assert outcome.cost == pytest.approx(3 * found[0] / found[1])


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_each_part_of_a_teacher_stays_in_its_mode(name: str) -> None:
    teachers = [copy.deepcopy(teacher).train() for teacher in trained()[:2]]
    for teacher in teachers:
        next(teacher.children()).eval()
    modes = [[module.training for module in teacher.modules()] for teacher in teachers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods.apply(name, teachers, batches(), **{"epochs": 1} if methods.METHODS[name].needs == "training" else {})
    assert [[module.training for module in teacher.modules()] for teacher in teachers] == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_16_bits_are_matched_as_others(dtype: torch.dtype) -> None:
    """The products of their values are too large for 16 bits."""
    teacher = copy.deepcopy(teachers_of("lenet")[0])
    other, teacher = shuffled(teacher, "lenet").to(dtype), teacher.to(dtype)
    data = [(batches_of("lenet", 200)[0][0].to(dtype), torch.zeros(200))]
    x = data[0][0]
    for name, options, most in (
        ("rebasin", {}, 0.0),
        ("rebasin", {"by": "activations"}, 0.0),
        ("zipit", {}, 0.0),
        ("repair", {}, 0.0),
        ("reconstruct", {}, 0.3),
    ):
        with torch.no_grad():
            merged = methods.apply(name, [teacher, other], data, **options).network(x)
            assert relative_error(merged.double(), teacher(x).double()) <= most, name


DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_the_docs_example_of_a_method_runs() -> None:
    *_, block = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(block.splitlines()) <= 40
    t1, t2 = trained()[:2]
    names = {"t1": t1, "t2": t2, "train_loader": batches()}
    try:
        exec(block, names)
        network = names["outcome"].network
    finally:
        methods.METHODS.pop("lively", None)
    spread = torch.cat([fastmerge.activations(t, X[:256])["hidden"].std(1) for t in (t1, t2)])
    rows = torch.cat([t1.hidden.weight, t2.hidden.weight]).norm(dim=1)[spread.topk(16).indices.sort().values]
    # columns of the other teacher's channels are 0, so that norms can only fall
    assert (network.hidden.weight.norm(dim=1) <= rows + 1e-6).all()
    assert names["outcome"].cost > 0


def test_the_docs_list_every_method_with_what_it_needs_and_its_source() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted((m.name, m.needs, m.source) for m in methods.METHODS.values())


def test_own_places_make_the_plain_average() -> None:
    teachers = teachers_of("resnet_projected_shortcut")
    groups = fastmerge.channel_groups(teachers[0], BY_NAME["resnet_projected_shortcut"].inputs(2))
    combined = methods.combine(teachers, groups, methods.own_places(groups, 3)).state_dict()
    for name, tensor in methods.average(teachers).state_dict().items():
        assert torch.allclose(tensor, combined[name], rtol=0, atol=1e-14), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ZOO, ids=lambda architecture: architecture.name)
@torch.no_grad()
def test_every_network_takes_every_method_without_training(architecture: Architecture) -> None:
    """Re-Basin finds a permuted copy; the others give networks that run."""
    x = architecture.inputs(64, seed=3)
    first, other = make_teachers(architecture.make, architecture.inputs(6), 2)
    data = [(x, torch.zeros(64))]
    groups = Family.of([first], x).groups
    generator = torch.Generator().manual_seed(0)
    orders = {group.name: torch.randperm(group.size, generator=generator) for group in groups}
    assert_equal(methods.rebasin([first, fastmerge.permute(first, groups, orders)], data), first)
    computed = any("parametrizations" in name for name in first.state_dict())
    for name in ("zipit", "repair", "transplant", "reconstruct", "average", "ensemble"):
        if computed and name in ("zipit", "repair", "transplant", "reconstruct"):
            refused = (
                "is computed by weight normalisation" if name == "repair" else "computes its weights, so its channels"
            )
            with pytest.raises(ValueError, match=refused):
                methods.METHODS[name].function([first, other], data)
            continue
        outputs = pytree.tree_leaves(methods.METHODS[name].function([first, other], data)(*x))
        assert all(y.isfinite().all() for y in outputs), name
