"""The local response normalisation and the network."""

import random
import shutil

import numpy as np
import pytest
import torch
from torch import Tensor, nn

LAYERS = {  # output of each layer for one image, as the docstring of KrizhevskyNet has it
    "conv1": (96, 32, 32),
    "pool1": (96, 15, 15),
    "conv2": (96, 15, 15),
    "pool2": (96, 7, 7),
    "conv3": (192, 7, 7),
    "pool3": (192, 3, 3),
    "fc1": (256,),
    "fc2": (256,),
    "fc3": (10,),
}
WEIGHTS = {f"{layer}.{kind}" for layer in LAYERS if "pool" not in layer for kind in ("weight", "bias")}
SHAPES = [(2, 96, 15, 15), (3, 7, 5, 4), (5, 6, 32, 32), (2, 3, 1, 1), (1, 1, 1, 1)]


def rand(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def formula(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Section 3.3 of the AlexNet paper with alpha / size, channel by channel."""
    outputs = []
    for channel in range(x.size(1)):
        window = x[:, max(0, channel - size // 2) : channel + (size - 1) // 2 + 1]
        outputs.append(x[:, channel] / (k + alpha / size * window.square().sum(1)) ** beta)
    return torch.stack(outputs, 1)


def with_gradient(function, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The output and the gradient of its sum, weighted at random."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    y.backward(rand(*y.shape, seed=seed, dtype=y.dtype))
    return y.detach(), x.grad


def fuse(ck, model: nn.Module) -> None:
    """Where there is no compiler the test is skipped."""
    try:
        assert ck.fuse_layers(model, "on", torch.device("cpu"), "fp32")
    except ck.Problem as problem:
        if shutil.which("g++"):
            raise
        pytest.skip(str(problem))


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], **tolerance: float) -> None:
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# Normalisation
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 11])
def test_lrn_and_its_gradient_are_those_of_pytorch(ck, shape, size):
    constants = {"alpha": 0.3, "beta": 0.75, "k": 1.5}  # a large alpha, so that the denominator matters
    x = rand(*shape, scale=3)
    ours = with_gradient(ck.LocalResponseNormalization(size, **constants), x)
    assert_same(ours, with_gradient(nn.LocalResponseNorm(size, **constants), x), atol=2e-6, rtol=2e-5)


def test_lrn_with_the_constants_of_the_network_is_that_of_pytorch(ck):
    x = rand(2, 96, 9, 9, scale=40)
    layer = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
    assert_same(with_gradient(ck.LocalResponseNormalization(), x), with_gradient(layer, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0])
def test_lrn_is_the_formula_in_float64(ck, size, beta):
    x, constants = rand(2, 7, 3, 5, scale=4, dtype=torch.float64), (size, 0.2, beta, 2.0)
    ours = with_gradient(ck.LocalResponseNormalization(*constants), x)
    assert_same(ours, with_gradient(lambda x: formula(x, *constants), x), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("size", [14, 15, 10**9])
def test_a_window_wider_than_the_channels_takes_no_more_memory_than_they_do(ck, size):
    x, alpha = rand(2, 7, 3, 5, scale=4, dtype=torch.float64), 0.2 * size
    over_all_channels = with_gradient(lambda x: x / (2 + 0.2 * x.square().sum(1, keepdim=True)) ** 0.75, x)
    ours = with_gradient(ck.LocalResponseNormalization(size, alpha, 0.75, 2.0), x)
    assert_same(ours, over_all_channels, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("channels", [2, 7])
def test_gradcheck_in_float64(ck, size, channels):
    layer = ck.LocalResponseNormalization(size, alpha=0.4, beta=0.75, k=1.0)
    x = rand(2, channels, 2, 3, scale=2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_bf16_keeps_the_denominator_that_bf16_arithmetic_would_make_a_constant(ck):
    x = (rand(2, 96, 8, 8).abs() * 1.5 + 5).clamp(max=8).bfloat16()
    squares = torch.stack([x.square().roll(shift, 1) for shift in range(-2, 3)]).sum(0)
    in_bf16 = 2 + 1e-4 / 5 * squares
    assert in_bf16.dtype == torch.bfloat16 and in_bf16.unique().tolist() == [2.0]

    exact = formula(x.double(), 5, 1e-4, 0.75, 2.0)
    half_a_step = 2.0 ** (exact.abs().log2().floor() - 8)  # bf16 has 8 bits of significand
    constant = x.double() * 2**-0.75
    ours, _ = with_gradient(ck.LocalResponseNormalization(), x)
    assert ((ours.double() - exact).abs() <= 1.001 * half_a_step).all()
    wrongly_rounded = (constant.bfloat16().double() - exact).abs() > 1.001 * half_a_step
    assert wrongly_rounded.float().mean() > 0.1


@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_bf16_gives_the_fp32_result_rounded(ck, scale):
    layer, x = ck.LocalResponseNormalization(), rand(2, 24, 6, 6, scale=scale).bfloat16()
    output, gradient = with_gradient(layer, x)
    x = x.float().requires_grad_()
    exact = layer(x)
    exact.backward(rand(*x.shape, seed=1).bfloat16().float())
    torch.testing.assert_close(output.float(), exact, atol=0, rtol=2**-8)
    torch.testing.assert_close(gradient.float(), x.grad, atol=0.02 * x.grad.std().item(), rtol=2**-7)


def test_lrn_under_autocast_is_computed_in_fp32(ck):
    layer, x = ck.LocalResponseNormalization(), rand(2, 12, 4, 4, scale=30)
    for dtype in (torch.float32, torch.bfloat16):
        expected = with_gradient(layer, x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradient(layer, x.to(dtype))
        assert found[0].dtype == dtype
        assert_same(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_equals_eager(ck, dtype):
    fused, eager = ck.LocalResponseNormalization(), ck.LocalResponseNormalization()
    fuse(ck, fused)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.01, "rtol": 2**-7}
    for batch, memory_format in ((4, torch.channels_last), (4, torch.contiguous_format), (1, torch.channels_last)):
        x = rand(batch, 12, 6, 6, scale=30, seed=batch, dtype=dtype).contiguous(memory_format=memory_format)
        assert_same(with_gradient(fused, x), with_gradient(eager, x), **tolerance)


@pytest.mark.parametrize("size", [4, 5])
def test_a_fused_layer_gives_the_same_whatever_it_was_used_for_before(ck, size):
    """It uses memory again that nothing refers to any more, and no other."""
    layer, eager = (ck.LocalResponseNormalization(size, alpha=1.0, k=1.0) for _ in range(2))
    fuse(ck, layer)
    inputs = [rand(4, 12, 6, 6, scale=10, seed=seed).requires_grad_() for seed in range(3)]
    outputs, gradients = zip(*(with_gradient(eager, x) for x in inputs))
    weights = rand(*inputs[0].shape, seed=1)

    def assert_gradient(of: Tensor, i: int, **options: bool) -> None:
        torch.testing.assert_close(torch.autograd.grad(of, inputs[i], weights, **options)[0], gradients[i])

    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs[0]), outputs[0])
    for _ in range(3):
        layer(inputs[2])  # without its gradient
        together = [layer(x) for x in inputs]
        for i, output in enumerate(together):
            torch.testing.assert_close(output, outputs[i])
        assert_gradient(together[1], 1, retain_graph=True)
        assert_gradient(together[0], 0)
        with torch.no_grad():
            torch.testing.assert_close(layer(inputs[0]), outputs[0])
        assert_gradient(layer(inputs[2]), 2)
        assert_gradient(together[1], 1, retain_graph=True)
        assert_gradient(together[1], 1)
        assert_gradient(together[2], 2)


def test_the_fused_kernels_are_compiled_once_for_every_batch_size(ck):
    layer = ck.LocalResponseNormalization()
    fuse(ck, layer)
    graphs = []
    for batch in (128, 1, 7, 1024):
        with_gradient(layer, rand(batch, 12, 3, 3))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 32, 32), (4, 5, 15, 7), (2, 5, 3, 4), (0, 5, 6, 6)], ids=str)
def test_fused_max_pooling_is_that_of_pytorch(ck, shape, dtype):
    torch._dynamo.reset()  # after eight shapes it would go on without compiling
    fuse(ck, ck.LocalResponseNormalization())
    x = rand(*shape, scale=2).round().relu().to(dtype)  # with equal values in most windows
    for memory_format in (torch.contiguous_format, torch.channels_last):
        ours = x.clone(memory_format=memory_format).requires_grad_()
        theirs = x.float().clone().requires_grad_()
        output, expected = ck.FusedMaxPool()(ours), nn.MaxPool2d(kernel_size=3, stride=2)(theirs)
        assert output.dtype == dtype and torch.equal(output.float(), expected)
        weights = rand(*output.shape, seed=1, dtype=dtype)
        output.backward(weights)
        expected.backward(weights.float())  # of bf16 too the sum of the gradients is rounded once
        tolerance = {"atol": 1e-6, "rtol": 0 if dtype == torch.float32 else 2**-8}
        torch.testing.assert_close(ours.grad.float(), theirs.grad, **tolerance)


@pytest.mark.parametrize("size", [4, 5])
def test_memory_layout_does_not_matter(ck, size):
    layer, x = ck.LocalResponseNormalization(size, alpha=0.3), rand(3, 12, 6, 5)
    plain = with_gradient(layer, x)
    assert_same(with_gradient(layer, x.contiguous(memory_format=torch.channels_last)), plain, atol=0, rtol=0)
    assert_same(with_gradient(layer, x.mT.contiguous().mT), plain, atol=0, rtol=0)
    strided = torch.stack([x, rand(*x.shape, seed=2)], dim=-1)[..., 0]
    assert_same(with_gradient(layer, strided), plain, atol=0, rtol=0)


def test_with_the_plain_layout_every_layer_has_it_and_the_gradient_is_the_same(ck, monkeypatch):
    """As on MPS, where PyTorch's max-pooling needs it."""
    assert ck.memory_layout("mps") is torch.contiguous_format
    data = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def gradients(layout: torch.memory_format) -> tuple[list[Tensor], list[bool]]:
        monkeypatch.setattr(ck, "memory_layout", lambda device: layout)
        model, plain, half = ck.build_model(ck.Config(lrn_alpha=0.1), 10).to(memory_format=layout), [], (0.5, 0.5, 0.5)
        for pool in (model.pool1, model.pool2, model.pool3):
            pool.register_forward_hook(lambda layer, x, y: plain.append(x[0].is_contiguous()))
            pool.register_full_backward_hook(lambda layer, x, y: plain.append(y[0].is_contiguous()))
        for images, _ in ck.CifarLoader(data, torch.zeros(4).long(), ["a"], half, half):
            model(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()], plain

    (ours, plain), (theirs, others) = gradients(torch.contiguous_format), gradients(torch.channels_last)
    assert plain == [True] * 6 and not all(others)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_lrn_leaves_its_input_as_it_was(ck):
    x = rand(2, 8, 3, 3).requires_grad_()
    before = x.detach().clone()
    ck.LocalResponseNormalization()(x).sum().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("differentiate", ["by x", "by what x is made of"])
def test_a_second_derivative_is_refused_not_wrong(ck, differentiate):
    w, x = torch.ones(1, requires_grad=True), rand(2, 7, 3, 5).requires_grad_()
    y = ck.LocalResponseNormalization(5, 0.5)(x if differentiate == "by x" else w * x)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_lrn_of_no_images_is_no_images(ck):
    output, gradient = with_gradient(ck.LocalResponseNormalization(), torch.empty(0, 6, 3, 3))
    assert output.shape == gradient.shape == (0, 6, 3, 3)


@pytest.mark.parametrize("shape", [(3,), (2, 96), (96, 8, 8), (2, 96, 4, 4, 4)], ids=str)
def test_lrn_names_a_wrong_shape(ck, shape):
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)") as error:
        ck.LocalResponseNormalization()(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("size", [0, -1])
def test_lrn_refuses_a_window_of_no_channels(ck, size):
    with pytest.raises(ValueError, match="size"):
        ck.LocalResponseNormalization(size)


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["lrn", "none"])
def test_every_layer_has_the_shape_of_the_docstring(ck, norm):
    model, shapes = ck.build_model(ck.Config(norm=norm), 10), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.__setitem__(name, tuple(output.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert {name: shapes[name] for name in LAYERS} == {name: (2, *shape) for name, shape in LAYERS.items()}
    documented = " ".join(ck.KrizhevskyNet.__doc__.split()).replace("( ", "(")
    for name, shape in LAYERS.items():
        assert f"(N, {', '.join('num_classes' if name == 'fc3' else str(size) for size in shape)})" in documented


def test_every_layer_has_the_constants_of_the_document(ck):
    model = ck.KrizhevskyNet()
    for conv in (model.conv1, model.conv2, model.conv3):
        assert (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (1, 1))
    for pool in (model.pool1, model.pool2, model.pool3):
        assert (pool.kernel_size, pool.stride) == (3, 2)
    lrn = [layer for layer in model.modules() if isinstance(layer, ck.LocalResponseNormalization)]
    assert [(layer.size, layer.alpha, layer.beta, layer.k) for layer in lrn] == [(5, 1e-4, 0.75, 2.0)] * 2


def test_the_network_is_the_plain_composition_of_its_layers(ck):
    model, x = ck.KrizhevskyNet(), rand(4, 3, 32, 32, seed=5)
    lrn = nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0)
    h = x
    for conv, norm in ((model.conv1, lrn), (model.conv2, lrn), (model.conv3, nn.Identity())):
        h = nn.functional.max_pool2d(norm(conv(h).relu()), 3, 2)
    expected = model.fc3(model.fc2(model.fc1(h.flatten(1)).relu()).relu())
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("classes", "parameters"), [(10, 762_794), (100, 762_794 + 90 * 257)])
def test_number_of_parameters(ck, classes, parameters):
    for norm in ("lrn", "none"):
        assert sum(p.numel() for p in ck.build_model(ck.Config(norm=norm), classes).parameters()) == parameters


def test_the_name_in_the_architecture_document_is_an_alias(ck):
    assert ck.TinyImageNet is ck.KrizhevskyNet


def test_norm_none_is_the_same_network_without_normalisation(ck):
    with_norm, without = (ck.build_model(ck.Config(norm=norm), 10) for norm in ("lrn", "none"))
    assert not any(isinstance(layer, ck.LocalResponseNormalization) for layer in without.modules())
    for a, b in zip(with_norm.state_dict().values(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x = rand(2, 3, 32, 32)
    assert not torch.allclose(with_norm(x), without(x))


def test_state_dict_has_plain_keys(ck):
    model = ck.build_model(ck.Config(), 10)
    assert set(model.state_dict()) == WEIGHTS
    assert set(ck.weights_of(model)) == WEIGHTS
    for layer in (model.norm1, model.norm2):
        layer.fuse()
    assert set(model.state_dict()) == WEIGHTS


@pytest.mark.parametrize(("name", "norm"), [("krizhevsky", "lrn"), ("krizhevsky", "none"), ("alexnet", "lrn")])
def test_a_fused_network_is_the_same_network(ck, name, norm):
    # in fp64, for rounding not to make another of two nearly equal values the maximum of a window
    fused, eager = (ck.build_model(ck.Config(model=name, norm=norm, lrn_alpha=0.5), 10) for _ in range(2))
    fuse(ck, fused)
    results = []
    for model in (fused, eager):
        images = (
            rand(2, 3, 32, 32, scale=2, dtype=torch.float64)
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_()
        )
        logits = model.double().to(memory_format=torch.channels_last).eval()(images)
        logits.backward(rand(*logits.shape, seed=1, dtype=torch.float64))
        results.append([logits, images.grad, *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-4)
    assert results[0][1].abs().max() > 0
    assert [type(layer) for layer in fused.modules()].count(ck.FusedMaxPool) == 1
    assert list(fused.state_dict()) == list(eager.state_dict())


def test_fusing_a_fused_network_again_keeps_its_relus(ck):
    model = ck.build_model(ck.Config(lrn_alpha=0.5), 10)
    for _ in range(2):
        fuse(ck, model)
        assert model.norm1.relu and model.norm2.relu


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 3, 5, 6)])
def test_pooling_of_a_last_batch_of_one_image_is_not_compiled_anew(ck, shape, monkeypatch):
    monkeypatch.setattr(ck, "_fused", None)
    assert torch.equal(ck.FusedMaxPool()(rand(*shape)), nn.MaxPool2d(3, 2)(rand(*shape)))


@pytest.mark.parametrize("shape", [(2, 3, 2, 5), (3, 5)])
def test_pooling_refuses_what_pytorch_refuses(ck, shape):
    for pooling in (nn.MaxPool2d(3, 2), ck.FusedMaxPool()):
        with pytest.raises(RuntimeError):
            pooling(rand(*shape))


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_what_is_not_compiled_is_not_called_compiled(ck, name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    model = ck.build_model(ck.Config(), 10)
    assert not ck.fuse_layers(model, "auto", torch.device("cpu"), "fp32")
    assert name in capsys.readouterr().out and "FusedMaxPool" not in repr(model)


def test_a_network_is_left_as_it_was_where_the_compiler_is_broken(ck, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler\nand more lines")

    monkeypatch.setattr(ck, "_fused", broken)
    model = ck.build_model(ck.Config(), 10)
    before = repr(model)
    assert not ck.fuse_layers(model, "auto", torch.device("cpu"), "fp32")
    assert repr(model) == before
    assert capsys.readouterr().out == "note: running without torch.compile, about half as fast (no compiler)\n"
    with pytest.raises(ck.Problem, match=r"--compile on: torch\.compile does not work here \(no compiler\)$"):
        ck.fuse_layers(model, "on", torch.device("cpu"), "fp32")


def test_a_seed_gives_always_the_same_weights_and_another_seed_others(ck):
    weights = [ck.build_model(ck.Config(seed=seed), 10).state_dict() for seed in (0, 0, 1)]
    for name in WEIGHTS:
        assert torch.equal(weights[0][name], weights[1][name])
        assert not torch.equal(weights[0][name], weights[2][name])


def test_building_a_model_leaves_the_global_random_state_alone(ck):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    ck.build_model(ck.Config(seed=3), 10)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_the_global_random_state_does_not_change_the_weights(ck):
    torch.manual_seed(1)
    first = ck.build_model(ck.Config(), 10)
    torch.manual_seed(2)
    assert torch.equal(first.fc1.weight, ck.build_model(ck.Config(), 10).fc1.weight)
