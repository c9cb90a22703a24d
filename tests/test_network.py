"""The local response normalization, the four networks, and the compiled kernels."""

import contextlib
import copy
import functools
import itertools
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, quick_flags
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_krizhevsky import KrizhevskyNet, LocalResponseNormalization


def by_passes(layer: nn.Module) -> nn.Module:
    """The layer as a run on a CPU computes it."""
    from cifar_krizhevsky import FastLRN

    return FastLRN(layer, compiled=False, relu=False)


PATHS = {"plain formula": lambda layer: layer, "passes": by_passes}
both_paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def rand(*shape: int, seed: int = 0, scale: float = 1, dtype=torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def with_gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of its sum weighted at random."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    y.backward(rand(*y.shape, seed=1, dtype=y.dtype))
    return y.detach(), x.grad


def run_python(program: str, cwd: Path, environment=()) -> tuple[int, str, str]:
    """Run a program that imports the script; its exit code and output."""
    options = {"cwd": cwd, "env": {**os.environ, "PYTHONPATH": str(ROOT), **dict(environment)}}
    command = [sys.executable, "-B", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, **options)
    return result.returncode, result.stdout, result.stderr


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], **tolerance: float):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


# ---- Local response normalization ----------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("size", [1, 2, 4, 5, 11])
def test_lrn_and_its_gradient_are_those_of_pytorch(ck, path, size):
    for beta in (0.75, 0.5):
        constants = {"alpha": 0.3, "beta": beta, "k": 1.5}  # alpha so that the denominator matters
        ours = path(ck.LocalResponseNormalization(size, **constants))
        theirs = nn.LocalResponseNorm(size, **constants)
        for shape in ((2, 96, 7, 7), (5, 6, 32, 32), (3, 7, 5, 4), (1, 1, 1, 1), (0, 6, 3, 3)):
            x = rand(*shape, scale=3)
            assert_same(with_gradient(ours, x), with_gradient(theirs, x), atol=3e-6, rtol=3e-5)


@both_paths
@pytest.mark.parametrize("size", [1, 4, 5, 9])
def test_gradcheck_in_float64(ck, path, size):
    layer = path(ck.LocalResponseNormalization(size, alpha=0.4, beta=0.75, k=1.0))
    x = rand(2, 7, 2, 3, scale=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_second_derivative_is_right_or_an_error(ck):
    layer = ck.LocalResponseNormalization(5, alpha=0.5)
    x = rand(1, 6, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    for inputs in (x, w * x):
        with pytest.raises(RuntimeError, match="only once"):
            torch.autograd.grad(by_passes(layer)(inputs).sum(), x, create_graph=True)


@both_paths
def test_bf16_keeps_the_denominator_that_bf16_arithmetic_would_make_a_constant(ck, path):
    x = (rand(2, 96, 8, 8).abs() * 1.5 + 5).clamp(max=8).bfloat16()
    squares = F.pad(x.double().square(), (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
    assert (2 + (1e-4 / 5 * squares).bfloat16()).unique().tolist() == [2.0]
    exact = x.double() / (2 + 1e-4 / 5 * squares) ** 0.75
    half_a_step = 2.0 ** (exact.abs().log2().floor() - 8)  # bf16 has 8 bits of significand
    found, gradient = with_gradient(path(ck.LocalResponseNormalization()), x)
    assert found.dtype == gradient.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 1.001 * half_a_step).all()


@both_paths
@pytest.mark.parametrize("scale", [1, 1000])
def test_bf16_gives_the_fp32_result_rounded_also_under_autocast(ck, path, scale):
    layer = path(ck.LocalResponseNormalization())
    x = rand(2, 24, 6, 6, scale=scale).bfloat16()
    exact = with_gradient(layer, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(with_gradient(layer, x.float()), exact, atol=0, rtol=0)
        output, gradient = with_gradient(layer, x)
    torch.testing.assert_close(output.float(), exact[0], atol=0, rtol=2**-8)
    spread = exact[1].std().item()  # the weights of the gradient are rounded to bf16 too
    torch.testing.assert_close(gradient.float(), exact[1], atol=0.02 * spread, rtol=2**-7)


@both_paths
def test_lrn_takes_any_memory_layout_and_leaves_its_input_alone(ck, path):
    layer, x = path(ck.LocalResponseNormalization(4, alpha=0.3)), rand(3, 12, 6, 5)
    expected = with_gradient(layer, x)
    for same in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]):
        assert_same(with_gradient(layer, same), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(same, x)


def test_lrn_names_a_wrong_shape_or_size(ck):
    with pytest.raises(ValueError, match="expected 4, got 3"):
        ck.LocalResponseNormalization()(torch.zeros(96, 8, 8))
    with pytest.raises(ValueError, match="size"):
        ck.LocalResponseNormalization(0)


# ---- Networks ------------------------------------------------------------------------------------

PARAMETERS = {  # of all layers, and the inputs of the last one
    "krizhevsky": (762_794, 256),
    "five-conv": (2_791_434, 64),
    "alexnet": (58_322_314, 4096),
    "compact": (397_450, 128),
}
every_network = pytest.mark.parametrize("name", PARAMETERS)


@every_network
def test_every_network_has_its_number_of_parameters_and_an_output_for_each_class(ck, name):
    with torch.device("meta"):  # shapes without numbers
        ten, hundred = (ck.MODELS[name](classes) for classes in (10, 100))
        assert hundred(torch.zeros(3, 3, 32, 32)).shape == (3, 100)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ten, hundred)]
    number, inputs = PARAMETERS[name]
    assert counts == [number, number + 90 * (inputs + 1)]


def test_the_network_is_that_of_the_document(ck):
    assert ck.TinyImageNet is ck.KrizhevskyNet
    model = ck.build_model(ck.Config(), 10)
    x = rand(4, 3, 32, 32, scale=100)  # so that LRN's small alpha matters
    lrn = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
    h = x
    for conv, norm in ((model.conv1, lrn), (model.conv2, lrn), (model.conv3, nn.Identity())):
        h = F.max_pool2d(norm(F.conv2d(h, conv.weight, conv.bias, padding=1).relu()), 3, 2)
    expected = model.fc3(model.fc2(model.fc1(h.flatten(1)).relu()).relu())
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-5)


def test_alexnet_sees_images_of_227x227(ck):
    shapes = []
    with torch.device("meta"):
        model, images = ck.AlexNet(), torch.zeros(2, 3, 32, 32)
    model.features.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    model(images)
    assert shapes == [(2, 3, 227, 227)]


def test_a_value_of_compact_sees_more_than_44_pixels(ck):
    model, maps = ck.CompactNet().eval(), []
    # a maximum would pass its gradient to one pixel only
    model.pool1 = model.pool2 = nn.AvgPool2d(2)
    for parameter in model.parameters():
        parameter.data.abs_()  # so that nothing is cut off or cancelled
    model.standard3.register_forward_hook(lambda _, __, output: maps.append(output))
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    model(images)
    (gradient,) = torch.autograd.grad(maps[0][0, :, 12, 12].sum(), images)
    rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 46


@pytest.fixture(scope="module")
def images(ck):
    """Loaders of a few real images, each of another class."""
    data = ck.read_dataset("cifar10-mini", ROOT / "data")

    def loader(count: int, **options):
        chosen = torch.arange(count) * 500
        constants = (data.classes, data.mean, data.std)
        return ck.CifarLoader(data.images[chosen], data.labels[chosen], *constants, **options)

    return loader


@every_network
def test_every_network_learns_a_few_real_images(ck, images, name):
    loader, epochs = (images(2), 2) if name == "alexnet" else (images(8), 8)
    model = ck.build_model(ck.Config(model=name, dropout=0.0), 10)
    torch.manual_seed(0)
    [nn.init.kaiming_normal_(p) for p in model.parameters() if p.dim() > 1]  # learns faster
    sgd = torch.optim.SGD(model.parameters(), 0.002, 0.9)
    step = (model, loader, nn.CrossEntropyLoss(), sgd, "cpu")
    losses = [ck.train_one_epoch(*step)[0] for _ in range(epochs)]
    assert losses[-1] < 0.85 * losses[0], losses


def test_a_seed_gives_always_the_same_weights_and_another_seed_others(ck):
    state = torch.get_rng_state()
    first, other = (ck.build_model(ck.Config(seed=seed), 10).state_dict() for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    without = ck.build_model(ck.Config(norm="none"), 10)
    again = without.state_dict()
    assert first.keys() == again.keys() and "LocalResponse" not in repr(without)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and not torch.equal(weight, other[name])


class LeakyNet(KrizhevskyNet):
    """As edited by a user who likes leaky ReLUs."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.relu1 = nn.LeakyReLU(0.3)


class NormFirstNet(KrizhevskyNet):
    """LRN before the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.norm1(self.conv1(x))))
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)
        return self.fc3(self.relu5(self.fc2(self.relu4(self.fc1(x)))))


class SkipNet(KrizhevskyNet):
    """What the first ReLU gives is used beside LRN too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.pool1(x + self.norm1(x))
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)
        return self.fc3(self.relu5(self.fc2(self.relu4(self.fc1(x)))))


class SharedNet(KrizhevskyNet):
    """One ReLU for all places."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.relu2 = self.relu3 = self.relu4 = self.relu5 = self.relu1


class OneNormNet(KrizhevskyNet):
    """One LRN for two places, and not after the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))
        x = self.pool2(self.relu2(self.norm1(self.conv2(x))))
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)
        return self.fc3(self.relu5(self.fc2(self.relu4(self.fc1(x)))))


class InPlaceNet(KrizhevskyNet):
    """What goes into the first ReLU is used again, after it has changed it."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.relu1 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.pool1(self.norm1(self.relu1(x)) + x)
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)
        return self.fc3(self.relu5(self.fc2(self.relu4(self.fc1(x)))))


EDITED = [LeakyNet, NormFirstNet, SkipNet, SharedNet, OneNormNet, InPlaceNet]


@pytest.mark.parametrize("edited", EDITED)
def test_fast_lrn_takes_over_a_relu_only_where_an_edited_network_stays_the_same(ck, edited):
    """With the constants of his network and large inputs, so that LRN is far from a constant."""
    torch.manual_seed(0)
    model = edited(10, (5, 1.0, 0.75, 1.0)).eval()
    images = 5 * torch.randn(4, 3, 32, 32)
    expected = model(images)
    ck.replace_lrn(model, compiled=True)
    assert not model.norm1.relu
    assert model.norm2.relu == (edited not in (SharedNet, OneNormNet))
    for layer in (model.norm1, model.norm2):
        assert isinstance(layer, ck.FastLRN)
        layer.compiled = False  # the same passes, without the minute of a compiler
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_an_edited_lrn_is_left_as_it_is_with_a_note(ck, monkeypatch, capsys):
    class Residual(ck.LocalResponseNormalization):
        def forward(self, x: Tensor) -> Tensor:
            return x - super().forward(x)

    model = ck.build_model(ck.Config(lrn_alpha=1.0, lrn_k=1.0), 10).eval()
    model.norm1 = Residual(5, 1.0, 0.75, 1.0)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    ck.speed_up_lrn(model, "off", "cpu", "fp32")
    assert "norm1" in capsys.readouterr().err and isinstance(model.norm2, ck.FastLRN)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


plain_lrn = LocalResponseNormalization.forward


def scaled(layer, x: Tensor) -> Tensor:
    return 1.01 * plain_lrn(layer, x)


def blurred(layer, x: Tensor) -> Tensor:
    return plain_lrn(layer, 9 * F.avg_pool2d(x, 3, stride=1, padding=1))


def with_a_constant_denominator(layer, x: Tensor) -> Tensor:
    return x * (plain_lrn(layer, x) / x.where(x != 0, 1)).detach()


@pytest.mark.parametrize("edited", [scaled, blurred, with_a_constant_denominator])
def test_an_lrn_that_is_edited_in_its_class_is_left_as_it_is(ck, monkeypatch, capsys, edited):
    monkeypatch.setattr(ck.LocalResponseNormalization, "forward", edited)
    model = ck.build_model(ck.Config(lrn_alpha=1.0, lrn_k=1.0), 10)
    ck.speed_up_lrn(model, "off", "cpu", "fp32")
    assert "norm1" in capsys.readouterr().err
    assert type(model.norm1) is type(model.norm2) is ck.LocalResponseNormalization


def test_an_lrn_with_a_state_of_its_own_keeps_it(ck):
    model = ck.build_model(ck.Config(), 10)
    model.norm1.register_buffer("gain", torch.ones(1))
    ck.speed_up_lrn(model, "off", "cpu", "fp32")
    assert "norm1.gain" in model.state_dict() and isinstance(model.norm2, ck.FastLRN)


class ConstantNet(KrizhevskyNet):
    """One that the flags cannot reach."""

    def __init__(self, num_classes, dropout=0.0) -> None:
        super().__init__(num_classes, dropout=dropout)


def test_a_network_of_ones_own_is_given_the_constants_of_the_flags_or_refused(ck, monkeypatch):
    monkeypatch.setitem(ck.MODELS, "leaky", LeakyNet)  # its `lrn` is one of **options
    model = ck.build_model(ck.Config(model="leaky", lrn_alpha=0.5, lrn_k=1.0), 10)
    assert (model.norm1.alpha, model.norm1.k) == (0.5, 1.0)
    without = functools.partial(KrizhevskyNet, lrn=None)
    monkeypatch.setitem(ck.MODELS, "without", without)
    assert not ck.has_lrn(ck.build_model(ck.Config(model="without"), 10))
    monkeypatch.setitem(ck.MODELS, "constant", ConstantNet)
    with pytest.raises(ck.UserError, match="lrn"):
        ck.build_model(ck.Config(model="constant"), 10)


@every_network
def test_the_flags_of_the_network_reach_every_layer(ck, name):
    of_lrn = "--lrn-size 3 --lrn-alpha 0.5 --lrn-beta 0.6 --lrn-k 1.5" if ck.takes_lrn(name) else ""
    config, _ = ck.parse_arguments(f"--model {name} --dropout 0.25 {of_lrn}".split())
    with torch.device("meta"):
        layers = [*ck.build_model(config, 10).modules()]
    assert {m.p for m in layers if isinstance(m, nn.Dropout | nn.Dropout2d)} == {0.25}
    norms = [m for m in layers if isinstance(m, ck.LocalResponseNormalization)]
    assert len(norms) == (2 if name in ("krizhevsky", "alexnet") else 0)
    assert {(m.size, m.alpha, m.beta, m.k) for m in norms} <= {(3, 0.5, 0.6, 1.5)}


class NoHost(TorchDispatchMode):
    """Refuses every operation that has to do with a tensor on another device than `meta`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        assert all(leaf.is_meta for leaf in leaves if isinstance(leaf, Tensor)), operation
        return result


@every_network
def test_no_step_of_training_waits_for_the_device_or_uses_the_cpu(ck, images, name, monkeypatch):
    """On `meta`, which has no values: only the loss of the whole epoch is asked for, at the end."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    model = ck.build_model(ck.Config(model=name), 10)
    model = model.to("meta", memory_format=torch.channels_last)
    optimizer, steps = torch.optim.SGD(model.parameters(), 0.1, 0.9), []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    batches = iter(images(8, batch_size=3, shuffle=True, augment="crop-flip", device="meta"))
    first = next(batches)  # by then the order of the epoch is on the device
    with NoHost(), pytest.raises(NotImplementedError, match="meta"):
        batches = itertools.chain([first], batches)
        ck.train_one_epoch(model, batches, nn.CrossEntropyLoss(), optimizer, "meta")
    assert len(steps) == 3
    for parameter in model.parameters():  # else DistributedDataParallel copies them
        assert parameter.grad.stride() == parameter.stride()


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def networks(ck, request):
    """The network eager and compiled, the precision, and the number of graphs after the trial."""
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    counters.clear()
    eager = ck.build_model(ck.Config(lrn_alpha=1.0, lrn_k=1.0), 10)
    eager = eager.to(memory_format=torch.channels_last)
    model = copy.deepcopy(eager)
    assert ck.speed_up_lrn(model, "auto", torch.device("cpu"), request.param)
    return eager, model, request.param, counters["stats"]["unique_graphs"]


def test_compiled_is_eager(networks):
    eager, compiled, precision, _ = networks
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    one = {"atol": 1e-6, "rtol": 1e-5} if precision == "fp32" else {"atol": 0.01, "rtol": 2**-7}

    def autocast(function):
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")(function)

    for batch, layout in ((4, torch.channels_last), (3, torch.contiguous_format)):
        x = rand(batch, 96, 9, 8, scale=3, dtype=dtype).contiguous(memory_format=layout)
        ours = with_gradient(autocast(lambda x: compiled.norm1(compiled.relu1(x))), x)
        theirs = with_gradient(autocast(lambda x: eager.norm1(eager.relu1(x))), x)
        assert_same(ours, theirs, **one)
        assert ours[1].count_nonzero() > 0.4 * x.numel()
    images = rand(4, 3, 32, 32)
    torch.testing.assert_close(autocast(compiled)(images), autocast(eager)(images), **one)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


def test_nothing_is_compiled_after_the_trial(ck, networks, images):
    _, model, precision, graphs = networks
    optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9)
    criterion, loader = nn.CrossEntropyLoss(), images(8, batch_size=7)  # the last batch has one
    ck.train_one_epoch(model, loader, criterion, optimizer, "cpu", precision)
    ck.evaluate_model(model, images(5), precision=precision, views=ck.TEN_VIEWS[:2])
    batch, labels = next(iter(images(6)))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = criterion(model(batch), labels)
    model.zero_grad()
    thread = threading.Thread(target=loss.backward)  # as of a GPU
    thread.start()
    thread.join()
    assert model.conv1.weight.grad is not None
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs
    model.zero_grad()


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_more_layers_are_compiled_than_torch_compile_keeps_graphs_of_one_function(ck):
    torch._dynamo.reset()
    counters.clear()
    layers = []
    for channels in (4, 8, 12):
        lrn = ck.LocalResponseNormalization(5, 1.0, 0.75, 1.0)
        layers += [nn.LazyConv2d(channels, 3, padding=1), nn.ReLU(), lrn]
    model = nn.Sequential(*layers)
    model(rand(2, 3, 32, 32))
    assert ck.speed_up_lrn(model, "auto", "cpu", "fp32")
    assert counters["stats"]["unique_graphs"] == 3 * 3  # each has three passes


@pytest.mark.skipif(sys.platform != "linux", reason="another compiler")
def test_without_a_compiler_a_run_trains_with_a_note(small, tmp_path):
    program = f"import cifar_krizhevsky as ck; flags = {[*map(str, quick_flags(small))]}\n"
    program += "ck.save_plot = lambda *_: True\n"
    program += "print(ck.main([*flags, '--epochs', '1', '--no-test', '--compile', 'auto']))"
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    code, out, err = run_python(program, tmp_path, environment)
    assert code == 0 and out.splitlines()[-1] == "0", err  # the exit code of the run
    notes = [line for line in (out + err).splitlines() if line.startswith("note:")]
    (note,) = [line for line in notes if "probabilities" not in line]
    assert "without torch.compile" in note


STATE = """
import os, random, signal, sys, threading, warnings
import numpy, torch
sys.argv = ["other.py", "--no-such-flag", "--help"]

def state():
    return {
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "system": (dict(os.environ), list(sys.argv), sys.stdout.errors, sorted(os.listdir())),
        "warnings": list(warnings.filters),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.initial_seed()),
        "threads": (torch.get_num_threads(), threading.active_count()),
        "torch": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "backends": (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32),
        "slow modules": {"matplotlib", "torchvision", "torch._dynamo", "PIL"} & {*sys.modules},
    }

before = state()
import cifar_krizhevsky
after = state()
print([name for name in before if before[name] != after[name]])
"""


def test_importing_the_module_does_nothing(tmp_path):
    assert run_python(STATE, tmp_path) == (0, "[]\n", "")
