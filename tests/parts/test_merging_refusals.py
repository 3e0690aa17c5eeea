"""merge() where it can't go: bad input is refused before the first epoch, divergence stops it with step and cause."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import fastmerge.merging.stages as module
from fastmerge import BigStudent, recalibrate
from fastmerge.evaluation import Setting
from fastmerge.merging import merge
from fastmerge.merging.checks import check_loader
from small_task import SHORT, SmallNet, X, Y, copies, train_loader, train_teachers

# Stages this short leave the gates where they are, which only some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:P.g>0. is:UserWarning", "ignore:P.g>0. did not move:UserWarning")


@pytest.fixture(scope="module")
def trained():
    return train_teachers(2)


@pytest.fixture
def teachers(trained):
    return copies(trained[:2])


def test_a_loader_that_runs_dry_is_said_to(teachers):
    class Once:
        batches = iter([(X[:8], Y[:8])])

        def __iter__(self):
            yield from self.batches

    with pytest.raises(ValueError, match="no samples in this epoch"):
        merge(teachers, Once(), **SHORT)


def test_a_batch_without_samples_is_said_to_be_one(teachers):
    with pytest.raises(ValueError, match="batch 2 of an epoch has no samples"):
        merge(teachers, [(X[:8], Y[:8]), (X[:0], Y[:0]), (X[8:16], Y[8:16])], **SHORT)


@pytest.mark.parametrize(
    ("schedule", "failed"),
    [
        (lr_scheduler.ReduceLROnPlateau, "its step after epoch 1 of 2 failed (TypeError"),
        (lr_scheduler.StepLR, "making it failed (TypeError"),
        (lambda optimizer: None, "making it failed (AttributeError"),
        (
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=1),
            "its step after epoch 2 of 2 failed",
        ),
    ],
    ids=["needs a loss", "needs arguments", "no scheduler", "too short"],
)
def test_a_schedule_that_can_not_work_is_found_before_the_first_epoch(teachers, schedule, failed):
    seen = []
    with pytest.raises(ValueError, match="merge needs a schedule, a function of the optimizer") as error:
        merge(teachers, train_loader(), **SHORT | {"finetune_epochs": 2}, schedule=schedule, callback=seen.append)
    assert failed in str(error.value)
    assert not seen


class NaNFromTheSecondPassOn:
    """A loader whose first pass, which merge() checks, is not like the others."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        yield X[:8] * (1 if self.passes == 1 else torch.nan), Y[:8]


def test_a_diverging_loss_stops_with_step_stage_and_cause(teachers, monkeypatch):
    with pytest.raises(
        FloatingPointError, match=r"the loss became \w+ in step \d+ of epoch 1 of the merge stage; the learn"
    ):
        merge(teachers, train_loader(), **SHORT | {"lr": 1e30})
    with pytest.raises(
        FloatingPointError, match=r"step 1 of epoch 1 of the merge stage, its first; look for NaN or Inf in"
    ):
        merge(teachers, NaNFromTheSecondPassOn(), **SHORT)
    monkeypatch.setattr(module.BigStudent, "gate_loss", lambda big: torch.tensor(torch.inf))
    with pytest.raises(FloatingPointError, match=r"the gate loss became inf in step 1 .*lower gate_lr or lam_step"):
        merge(teachers, train_loader(), **SHORT)


def test_nan_in_the_validation_says_whose_score_and_which_batch(teachers, monkeypatch):
    good, bad = (X[:8], Y[:8]), (X[:8] * torch.nan, Y[:8])
    where = "the validation loss of teacher 0 became nan in batch 2"
    with pytest.raises(FloatingPointError, match=f"{where}, whose inputs hold NaN or Inf$"):
        merge(teachers, train_loader(), val_loader=[good, bad], **SHORT)
    with torch.no_grad():
        huge = [teachers[0], copy.deepcopy(teachers[1])]
        for parameter in huge[1].parameters():
            parameter.fill_(1e30)
    with pytest.raises(
        FloatingPointError,
        match=r"teacher 1 became nan in batch 1, whose inputs are finite now: the weights of teacher 1 are",
    ):
        merge(huge, train_loader(), val_loader=[good, good], **SHORT)

    class NaNWhenItIsReadForTheSixthTime(list):
        passes = 0  # the check, two teachers, the mean of them, and the first epoch

        def __iter__(self):
            self.passes += 1
            return iter([good, bad] if self.passes == 6 else [good, good])

    with pytest.raises(
        FloatingPointError,
        match=r"the validation loss after epoch 2 of the merge stage became nan in batch 2, .*learning rate 0.0\d+ may be",
    ):
        merge(teachers, train_loader(), val_loader=NaNWhenItIsReadForTheSixthTime(), **SHORT | {"merge_epochs": 2})


def test_a_batch_of_one_is_said_to_be_that():
    """BatchNorm1d, or maps of one pixel: torch's message is about sizes."""

    def net():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    loader = [(X[:8], Y[:8]), (X[:1], Y[:1])]
    with pytest.raises(
        ValueError, match=r"^the loader gave a batch of one sample, .* \(DataLoader\(drop_last=True\)\)"
    ):
        merge([net(), net()], loader, **SHORT)
    with pytest.raises(ValueError, match="batch of one sample"):
        recalibrate(net(), loader)


@pytest.mark.parametrize(
    ("bad", "where"),
    [(3 + 8 + 1, r"step 4 of epoch 2 of the merge"), (16 + 1 + 1, "step 2 of epoch 1 of the finetune")],
)
def test_the_step_that_is_named_is_the_one_that_was_bad(teachers, bad, where):
    steps = 0

    def criterion(output, target):
        nonlocal steps
        steps += output.requires_grad
        return cross_entropy(output, target) * (torch.nan if output.requires_grad and steps == bad else 1)

    with pytest.raises(FloatingPointError, match=where):
        merge(teachers, train_loader(), criterion=criterion, **SHORT)


def classes(n):
    return [(X[:8], torch.arange(8) % n)]


class Several:
    """A metric, and a network, that give a dict."""

    class Network(SmallNet):
        def forward(self, x):
            return {"logits": super().forward(x)}

    def update(self, output, target):
        pass

    def reset(self):
        pass

    def compute(self):
        return {"precision": 1.0, "recall": 0.0}


class AuxiliaryInTraining(SmallNet):
    def forward(self, x):
        output = super().forward(x)
        return (output, output) if self.training else output


class Rateless(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, 0.1)
        del self.param_groups[0]["lr"]


class UnkeptSGD(torch.optim.SGD):
    def state_dict(self):
        return {"state": set()}


class Unkept(lr_scheduler.LambdaLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, lambda epoch: 1.0)
        self.seen = {1}


BAD = [
    ("no list", lambda t: {"teachers": t[0]}, TypeError, r"merge\(\[t1, t2\], loader\); got a SmallNet"),
    ("one", lambda t: {"teachers": t[:1]}, ValueError, "at least two teachers; got 1"),
    ("no network", lambda t: {"teachers": [t[0], 3]}, TypeError, "teacher 1 is a int"),
    (
        "no values",
        lambda t: {"teachers": [copy.deepcopy(t[0]).to("meta"), t[1]]},
        ValueError,
        r"'conv\.weight' of teacher 0 is on the meta device, which holds no values",
    ),
    (
        "big student",
        lambda t: {"teachers": [BigStudent(*t, example_inputs=X[:2]), t[0]]},
        TypeError,
        r"teacher 0 is a BigStudent, .*pass the network that its compress\(\) returns",
    ),
    ("other width", lambda t: {"teachers": [t[0], SmallNet(width=8)]}, ValueError, r"conv\.weight is \(6, 1, 3, 3\)"),
    ("no epoch", lambda t: {"merge_epochs": 0}, ValueError, "merge_epochs, .* a whole number of at least 1; got 0"),
    (
        "half epochs",
        lambda t: {"finetune_epochs": 1.5},
        ValueError,
        "finetune_epochs, .* a whole number of at least 0; got 1.5",
    ),
    ("lr 0", lambda t: {"lr": 0.0}, ValueError, "lr, .* a finite number above 0; got 0"),
    ("lr nan", lambda t: {"finetune_lr": float("nan")}, ValueError, "finetune_lr, .* a finite number above 0; got nan"),
    ("lr beyond float32", lambda t: {"lr": 1e40}, ValueError, r"lr, .* a finite number above 0; got 1e\+40"),
    ("device meta", lambda t: {"device": "meta"}, ValueError, "can't use device meta: it holds no values"),
    (
        "negative",
        lambda t: {"weight_decay": -1.0},
        ValueError,
        "weight_decay, .* a finite number of at least 0; got -1",
    ),
    ("compact_at", lambda t: {"compact_at": 1.5}, ValueError, "compact_at, the fraction .* in 0..1, .*; got 1.5"),
    ("compact_at word", lambda t: {"compact_at": "late"}, ValueError, "'settled' or None; got 'late'"),
    ("val_every", lambda t: {"val_every": 0}, ValueError, "val_every, epochs between .* at least 1; got 0"),
    ("link_at", lambda t: {"link_at": 1.5}, ValueError, "link_at, the fraction .* in 0..1; got 1.5"),
    ("device", lambda t: {"device": "gpu"}, ValueError, "can't use device gpu"),
    ("no loader", lambda t: {"train_loader": 3}, TypeError, "needs train_loader, a DataLoader or the like; got a int"),
    ("iterator", lambda t: {"train_loader": iter(train_loader())}, TypeError, "train_loader can be iterated only once"),
    ("empty", lambda t: {"train_loader": []}, ValueError, "train_loader is empty"),
    (
        "no pair",
        lambda t: {"train_loader": [X[:8]]},
        TypeError,
        r"must yield pairs \(input, target\); it yields \(8, 1, 6, 6\)",
    ),
    ("no tensor", lambda t: {"train_loader": [("x", Y[:8])]}, TypeError, "must yield tensors .* it yields a str"),
    ("uint8", lambda t: {"train_loader": [(X[:8].byte(), Y[:8])]}, ValueError, "uint8 inputs; convert them"),
    ("inf", lambda t: {"train_loader": [(X[:8] / 0, Y[:8])]}, ValueError, "NaN or Inf in the inputs"),
    (
        "channels",
        lambda t: {"train_loader": [(X[:8].expand(-1, 3, -1, -1), Y[:8])]},
        ValueError,
        r"of shape \(8, 3, 6, 6\)",
    ),
    (
        "classes",
        lambda t: {"train_loader": classes(5)},
        ValueError,
        r"targets 0\.\.4; the teachers have 3 classes, 0\.\.2",
    ),
    ("val classes", lambda t: {"val_loader": classes(4)}, ValueError, r"val_loader has targets 0\.\.3"),
    (
        "target shape",
        lambda t: {"train_loader": [(X[:8], Y[:7])]},
        ValueError,
        r"criterion failed .*target \(7,\) int64",
    ),
    (
        "criterion",
        lambda t: {"criterion": nn.CrossEntropyLoss(reduction="none")},
        ValueError,
        r"0-d tensor.*returned \(32,\)",
    ),
    (
        "no samples",
        lambda t: {"val_loader": [(torch.zeros(0, 1, 6, 6), torch.zeros(0).long())]},
        ValueError,
        "val_loader's first batch has no samples",
    ),
    (
        "sum",
        lambda t: {"criterion": functools.partial(cross_entropy, reduction="sum")},
        ValueError,
        "a criterion that is the mean over the batch; this one has reduction='sum'",
    ),
    ("criterion's name", lambda t: {"criterion": "cross_entropy"}, TypeError, "needs criterion, a function; got a str"),
    ("callback", lambda t: {"callback": 3}, TypeError, "needs callback, a function; got a int"),
    ("autocast", lambda t: {"autocast": "bfloat16"}, ValueError, "torch.bfloat16 or torch.float16; got 'bfloat16'"),
    ("milestones", lambda t: {"milestones": ["a"]}, ValueError, r"milestones, whole numbers of epochs .* got \['a'\]"),
    ("one milestone", lambda t: {"merge_milestones": 3}, ValueError, "merge_milestones, whole numbers .*; got 3"),
    ("seconds", lambda t: {"checkpoint_seconds": "5"}, ValueError, "checkpoint_seconds, .* of at least 0; got '5'"),
    ("resume", lambda t: {"resume": True}, ValueError, "resume=True needs the checkpoint_dir"),
    (
        "directory",
        lambda t: {"checkpoint_dir": __file__},
        ValueError,
        "checkpoint_dir, a directory that can be written",
    ),
    ("metrics", lambda t: {"metrics": {"a": cross_entropy}}, ValueError, "pass a val_loader"),
    (
        "metric of several",
        lambda t: {"metrics": {"a": Several()}, "val_loader": [(X[:8], Y[:8])]},
        ValueError,
        r"'a' must give one number from compute\(\); it gave a dict",
    ),
    (
        "schedule and warmup",
        lambda t: {"schedule": functools.partial(lr_scheduler.StepLR, step_size=1), "warmup": 1},
        ValueError,
        "takes schedule or warmup, not both",
    ),
    (
        "optimizer and finetune_lr",
        lambda t: {"optimizer": torch.optim.Adam, "finetune_lr": 0.1},
        ValueError,
        "takes optimizer or finetune_lr, not both",
    ),
    ("closure", lambda t: {"optimizer": torch.optim.LBFGS}, ValueError, r"LBFGS's failed \(TypeError: .*closure"),
    (
        "state by row",
        lambda t: {"optimizer": torch.optim.Adafactor, "compact_at": 0.5},
        ValueError,
        "can't carry Adafactor's 'row_var' .* pass link_at=0 and no compact_at, or another optimizer",
    ),
    (
        "dict batch",
        lambda t: {"train_loader": [{"image": X[:8], "label": Y[:8]}]},
        TypeError,
        r"it yields a dict\. Let its collate_fn give pairs",
    ),
    ("dict input", lambda t: {"train_loader": [({"image": X[:8]}, Y[:8])]}, TypeError, "Let its collate_fn give pairs"),
    (
        "not initialised",
        lambda t: {"teachers": [nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.LazyLinear(3))]},
        ValueError,
        r"parameter '0\.weight' of teacher 0 is not initialised",
    ),
    (
        "no learning rate",
        lambda t: {"optimizer": Rateless},
        ValueError,
        r"needs an optimizer with a learning rate, 'lr' in each of its param_groups",
    ),
    (
        "a schedule of another optimizer",
        lambda t: {
            "optimizer": torch.optim.Adagrad,
            "schedule": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9),
        },
        ValueError,
        r"making it failed \(ValueError: optimizer must support momentum",
    ),
    (
        "a schedule that no checkpoint holds",
        lambda t: {"schedule": Unkept, "checkpoint_dir": "nowhere"},
        ValueError,
        r"needs a schedule whose state_dict\(\) a checkpoint can hold; that of this Unkept it can't",
    ),
    (
        "an optimizer that no checkpoint holds",
        lambda t: {"optimizer": UnkeptSGD, "checkpoint_dir": "nowhere"},
        ValueError,
        r"needs an optimizer whose state_dict\(\) a checkpoint can hold; that of this UnkeptSGD it can't",
    ),
    (
        "no key for the criterion",
        lambda t: {
            "teachers": [Several.Network(), Several.Network()],
            "criterion": lambda o, y: cross_entropy(o["x"], y),
        },
        ValueError,
        "the criterion failed on train_loader's first batch, output a dict",
    ),
    (
        "another output in training mode",
        lambda t: {"teachers": [AuxiliaryInTraining(), AuxiliaryInTraining()]},
        ValueError,
        "the criterion failed on train_loader's first batch, in training mode the teachers give a tuple of 2, in eval mode",
    ),
    (
        "several outputs in training mode to distil",
        lambda t: {
            "teachers": [AuxiliaryInTraining(), AuxiliaryInTraining()],
            "criterion": lambda o, y: cross_entropy(o if isinstance(o, torch.Tensor) else o[0], y),
            "distill": 0.5,
        },
        ValueError,
        "distillation needs networks with one output.*; in training mode the teachers give a tuple of 2",
    ),
    (
        "no logits to distil",
        lambda t: {
            "teachers": [Several.Network(), Several.Network()],
            "criterion": lambda o, y: cross_entropy(o["logits"], y),
            "distill": 0.5,
        },
        ValueError,
        r"needs networks with one output, logits \(N, K\); got dict\. Wrap the networks",
    ),
    ("nan", lambda t: {"criterion": lambda o, y: o.sum() * torch.nan}, ValueError, "teacher 0's loss on train_loader"),
]


@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_can_not_work_is_refused_before_the_first_epoch(teachers, change, error, message):
    def never(record):
        raise AssertionError("an epoch was trained")

    arguments = {"teachers": teachers, "train_loader": train_loader()} | SHORT | change(teachers)
    with pytest.raises(error, match=message):
        merge(arguments.pop("teachers"), arguments.pop("train_loader"), **{"callback": never} | arguments)


def test_parameters_of_the_criterion_are_not_trained_and_it_says_so(teachers):
    class Margin(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output, target):
            return cross_entropy(output * self.scale, target)

    with pytest.warns(UserWarning, match="trains no parameters of the criterion; it has scale, which stay as they are"):
        merge(teachers, train_loader(), criterion=Margin(), **SHORT)
    merge(teachers, train_loader(), criterion=Margin().requires_grad_(False), **SHORT)


def test_an_optimizer_whose_state_is_not_carried_may_keep_what_it_likes(teachers):
    merge(teachers, train_loader(), optimizer=torch.optim.Adafactor, link_at=0.0, **SHORT)


def test_an_input_without_values_is_none_without_samples():
    class TwoInputs(nn.Linear):
        def forward(self, x, more):
            return super().forward(torch.cat([x, more], 1))

    inputs, setting = (torch.randn(4, 3), torch.zeros(4, 0)), Setting(torch.device("cpu"), cross_entropy)
    found = check_loader("train_loader", [(inputs, torch.zeros(4).long())], TwoInputs(3, 2), setting)
    assert [x.shape for x in found] == [(4, 3), (4, 0)]


def test_one_class_and_the_default_criterion_are_refused():
    teachers = [nn.Linear(3, 1) for _ in range(2)]
    with pytest.raises(ValueError, match=r"always 0 for one class; the output for train_loader is \(8, 1\) float32"):
        merge(teachers, [(torch.randn(8, 3), torch.ones(8, 1))], **SHORT)


def test_weights_that_are_not_finite_are_refused(teachers):
    with torch.no_grad():
        teachers[1].head.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"head\.bias' of teacher 1 holds NaN"):
        merge(teachers, train_loader(), **SHORT)
