"""What can't be merged is refused before anything is built, by an error that names the layer and says what is needed."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.hooks import RemovableHandle

import fastmerge
from architectures import BY_NAME
from refusing import IMAGES, conv_network, refusal, resnet


@pytest.mark.parametrize(
    ("teachers", "says"),
    [
        ([resnet(), "resnet18"], "teacher 1"),
        ([resnet(), None], "teacher 1"),
        ([resnet(), 3], "teacher 1"),
        ([resnet(), nn.Module], "teacher 1"),
        ([[resnet(), resnet()]], "list"),
        ([resnet(), BY_NAME["lenet"].make()], r"class.*ResNet.*LeNet"),
        ([resnet(), type("Other", (type(resnet()),), {})(shortcut="project")], "Other"),
    ],
    ids=["a name", "nothing", "a number", "a class", "a list of them", "another class", "a subclass"],
)
def test_what_is_no_network_of_the_class(teachers: list[object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        fastmerge.BigStudent(*teachers)  # type: ignore[arg-type]


class Scaled(nn.Module):
    """Its code differs with an option that no parameter shows."""

    def __init__(self, factor: float, again: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.factor, self.again = factor, again

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) * self.factor)
        return self.conv2(torch.tanh(x) if self.again else x)


class ComplexFilter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.filter = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)


def changed(path: str, change: Callable[[nn.Module], object]) -> nn.Module:
    """A network of which one module was changed."""
    network = resnet()
    change(network.get_submodule(path))
    return network


def sharing(path: str, through: Callable[[nn.Module], nn.Parameter]) -> list[nn.Module]:
    first, second = resnet(), resnet()
    second.get_submodule(path).weight = through(first.get_submodule(path))  # type: ignore[assignment]
    return [first, second]


REFUSED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[str, ...]]] = {
    "no teacher": (list, ("at least two teachers",)),
    "one teacher": (lambda: [resnet()], ("at least two teachers", "got 1")),
    "shapes": (
        lambda: [resnet(), resnet(), resnet(widths=(4, 10))],
        ("layer2.0.conv1", "(8, 4, 3, 3)", "(10, 4, 3, 3)"),
    ),
    "a layer inside": (lambda: [resnet(), resnet(excite=True)], ("excitation",)),
    "a layer more": (lambda: [resnet(), changed("layer1", lambda m: m.append(nn.Conv2d(4, 4, 1)))], ("layer1.2",)),
    "bias": (lambda: [conv_network(), conv_network(bias=False)], ("0.bias",)),
    "activation": (lambda: [conv_network(nn.ReLU()), conv_network(nn.Tanh())], ("'1'",)),
    "slope": (lambda: [conv_network(nn.LeakyReLU(slope)) for slope in (0.1, 0.2)], ("'1'",)),
    "stride": (lambda: [conv_network(nn.MaxPool2d(2, stride)) for stride in (2, 1)], ("'1'",)),
    "affine": (lambda: [conv_network(nn.BatchNorm2d(6, affine=affine)) for affine in (True, False)], ("1.weight",)),
    "eps": (lambda: [conv_network(nn.BatchNorm2d(6, eps=eps)) for eps in (1e-5, 0.1)], ("'1'",)),
    "padding_mode": (lambda: [conv_network(padding_mode=mode) for mode in ("zeros", "reflect")], ("'0'",)),
    "dilation": (lambda: [conv_network(), conv_network(dilation=2)], ("'0'",)),
    "constant": (lambda: [Scaled(1.0), Scaled(2.0)], ("mul",)),
    "code": (lambda: [Scaled(1.0), Scaled(1.0, again=True)], ("architecture",)),
    "a shared parameter": (lambda: sharing("fc", lambda layer: layer.weight), ("fc.weight", "deepcopy")),
    "shared memory": (lambda: sharing("fc", lambda layer: nn.Parameter(layer.weight.detach())), ("fc.weight",)),
    "devices": (lambda: [resnet(), resnet().to("meta")], ("device", "cpu", "meta")),
    "devices of one": (
        lambda: [resnet(), changed("fc", lambda layer: layer.to("meta"))],
        ("teacher 1 lies on several devices",),
    ),
    "no values": (
        lambda: [conv_network().to("meta"), conv_network().to("meta")],
        ("the weights of teacher 0 are on the meta device, without values",),
    ),
    "dtypes": (lambda: [resnet(), resnet().double()], ("dtype", "float64")),
    "complex weights": (
        lambda: [ComplexFilter(), ComplexFilter()],
        ("'filter' of teacher 0 is torch.complex64",),
    ),
    "uninitialised": (
        lambda: [nn.Sequential(nn.LazyConv2d(6, 3), nn.ReLU(), nn.LazyConv2d(4, 3)) for _ in range(2)],
        ("0.weight", "initialised"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_differs_or_is_shared_is_named(what: str) -> None:
    teachers, says = REFUSED[what]
    message = refusal(*teachers())
    assert all(words in message for words in says), message


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "fc.bias", "bn1.running_var"])
def test_not_finite(name: str, value: float, text: str) -> None:
    teachers = [resnet(), resnet()]
    with torch.no_grad():
        teachers[1].state_dict()[name].view(-1)[-1] = value
    message = refusal(*teachers)
    assert name in message
    assert text in message
    assert "teacher 1" in message


def test_layers_shared_as_modules() -> None:
    first, second = resnet(), resnet()
    second.layer1 = first.layer1
    assert "layer1.0.conv1.weight" in refusal(first, second)


def test_one_teacher_twice_is_a_warning() -> None:
    teacher = resnet().eval()
    with pytest.warns(UserWarning, match="same network"):
        big = fastmerge.BigStudent(teacher, teacher, example_inputs=IMAGES)
    with torch.no_grad(), big.eval().open_gates():
        torch.testing.assert_close(big(IMAGES), teacher(IMAGES))


def test_a_copy_is_no_warning() -> None:
    teacher = resnet()
    fastmerge.BigStudent(teacher, copy.deepcopy(teacher), example_inputs=IMAGES)


def test_parametrized_wrapped_and_compiled_teachers() -> None:
    normed = [conv_network(), conv_network()]
    for network in normed:
        parametrizations.spectral_norm(network[0])
    message = refusal(*normed)
    assert "'0'" in message
    assert "remove_parametrizations(teacher.0, 'weight') on every teacher in eval mode" in message
    with torch.no_grad():
        mean = sum(network.eval()(IMAGES) for network in normed) / 2
    for network in normed:  # as the message says
        parametrize.remove_parametrizations(network[0], "weight")
    big = fastmerge.BigStudent(*normed, example_inputs=IMAGES)
    with torch.no_grad(), big.open_gates():
        torch.testing.assert_close(big(IMAGES), mean)
    wrapped = [nn.DataParallel(conv_network()) for _ in range(2)]
    assert "teacher.module" in refusal(*wrapped)
    compiled = [torch.compile(conv_network(), backend="eager") for _ in range(2)]
    assert "compile" in refusal(*compiled)


@pytest.mark.parametrize("inner", [False, True], ids=["network", "layer"])
def test_compiled_by_torch_jit(inner: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = [torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1))) for _ in range(2)]
    message = refusal(*([conv_network(network) for network in compiled] if inner else compiled))
    assert "is compiled by torch.jit" in message
    assert "layer '1'" in message or not inner


class GivesItsCache(nn.Module):
    """Returns an object that PyTorch knows nothing of, as Hugging Face's language models do with use_cache."""

    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.head, self.use_cache = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), True

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        keys = self.keys(x)
        return self.head(keys.relu()), self.Cache(keys) if self.use_cache else None


def test_an_output_that_is_no_container() -> None:
    teachers = [GivesItsCache(), GivesItsCache()]
    message = refusal(*teachers)
    assert "returns a test_refusals.GivesItsCache.Cache" in message
    assert "use_cache = False" in message
    for teacher in teachers:  # as the message says
        teacher.use_cache = False
    fastmerge.BigStudent(*teachers, example_inputs=IMAGES)


def scaled(*_: object) -> Tensor:
    return torch.ones(2, 4)


@pytest.mark.parametrize(
    "register", [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook], ids=["hook", "pre-hook"]
)
@pytest.mark.parametrize("path", ["", "0"], ids=["network", "layer"])
def test_hooks(path: str, register: Callable[..., object]) -> None:
    teachers = [conv_network(), conv_network()]
    register(teachers[1].get_submodule(path), scaled)
    message = refusal(*teachers)
    assert "teacher 1" in message
    assert "layer '0'" in message or not path
    assert "handle.remove()" in message


def test_hooks_that_only_note_outputs() -> None:
    """Hugging Face's networks have them from the first call on that asks for attentions or router logits."""

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        return None

    note.__module__ = "transformers.utils.output_capturing"
    teachers = [conv_network(), conv_network()]
    teachers[0][0].register_forward_hook(note)
    fastmerge.BigStudent(*teachers)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_of_all_modules(register: Callable[..., RemovableHandle]) -> None:
    handle = register(scaled)
    try:
        assert "for all modules" in refusal(conv_network(), conv_network())
    finally:
        handle.remove()


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (old_weight_norm, "torch.nn.utils.remove_weight_norm"),
        (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm"),
        (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove"),
    ],
)
def test_hooks_of_torch_say_what_removes_them(change: Callable[[nn.Module], object], remedy: str) -> None:
    teachers = [conv_network(), conv_network()]
    for teacher in teachers:
        change(teacher[0])
    assert remedy in refusal(*teachers)


@pytest.mark.parametrize("path", ["", "0"], ids=["network", "layer"])
def test_a_forward_replaced_on_the_instance(path: str) -> None:
    teachers = [conv_network(), conv_network()]
    module = teachers[1].get_submodule(path)
    module.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 3, module)  # type: ignore[method-assign]
    message = refusal(*teachers)
    assert "teacher 1" in message
    assert "layer '0'" in message or not path
    assert "replaced on the instance" in message
    del module.forward
    fastmerge.BigStudent(*teachers, example_inputs=IMAGES)


class TwoForwards(nn.Module):
    """Chooses one of its own methods when it is made, as some libraries' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)
        self.forward = self.forward_twice  # type: ignore[method-assign]

    def forward_twice(self, x: Tensor) -> Tensor:
        return 2 * F.relu(self.conv(x))


def test_a_block_that_chooses_its_own_method_is_merged() -> None:
    teachers = [conv_network(TwoForwards()), conv_network(TwoForwards())]
    with torch.no_grad(), fastmerge.BigStudent(*teachers, example_inputs=IMAGES).open_gates() as big:
        torch.testing.assert_close(big(IMAGES), (teachers[0](IMAGES) + teachers[1](IMAGES)) / 2)


class TiedEmbedding(nn.Module):
    """A layer whose output is hidden has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False), nn.Linear(9, 4)
        self.hidden.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.embed(x).mean(1))))


def test_a_hidden_layer_with_the_weight_of_an_embedding() -> None:
    teachers, x = [TiedEmbedding(), TiedEmbedding()], torch.randint(9, (5, 4))
    message = refusal(*teachers, example_inputs=x)
    assert "'embed'" in message
    assert "shares its weight with an embedding" in message
    for teacher in teachers:  # as the message says
        teacher.hidden.weight = nn.Parameter(teacher.embed.weight.detach().clone())
    fastmerge.BigStudent(*teachers, example_inputs=x)


class TiedSlope(nn.Module):
    """A PReLU whose slopes are a layer's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.PReLU(6), nn.Linear(4, 6), nn.Linear(6, 9)
        self.embed.weight = self.hidden.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(self.hidden(x.float())))


def test_a_layers_bias_that_another_module_uses() -> None:
    teachers, x = [TiedSlope(), TiedSlope()], torch.randint(9, (5, 4))
    message = refusal(*teachers, example_inputs=x)
    assert "'embed'" in message
    assert "use one parameter (" in message
    for teacher in teachers:  # as the message says
        teacher.embed.weight = nn.Parameter(teacher.embed.weight.detach().clone())
    fastmerge.BigStudent(*teachers, example_inputs=x)


def test_a_refused_merge_leaves_the_teachers_alone() -> None:
    teachers = [resnet().train(), resnet(widths=(4, 10)).train()]
    states = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    refusal(*teachers)
    for teacher, state in zip(teachers, states, strict=True):
        assert teacher.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_quantised_layers_are_named() -> None:
    teachers = [torch.ao.quantization.quantize_dynamic(resnet(), {nn.Linear}) for _ in range(2)]
    with pytest.raises(
        ValueError,
        match=r"layer 'fc' of teacher 0 is quantised \(Linear\)\. Merge the networks before they are quantised",
    ):
        fastmerge.BigStudent(*teachers)


def test_graph_modules_are_compared_by_their_code() -> None:
    """Each has a class of its own."""

    class Net(nn.Module):
        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.last, self.function = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), function

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.function(self.first(x)))

    one, two, other = (fx.symbolic_trace(Net(function)) for function in (torch.relu, torch.relu, torch.tanh))
    student = fastmerge.BigStudent(one, two).compress()
    one.load_state_dict(student.state_dict())
    with pytest.raises(ValueError, match="teachers 0 and 1 compute 'relu' differently"):
        fastmerge.BigStudent(one, other)
