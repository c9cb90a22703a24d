"""The other networks, a look at their layers, evaluation, prediction, one's own pictures, and TensorBoard."""

import contextlib
import copy
import csv
import json
import re
import shlex
import shutil
import signal
import struct
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPT, SMALL_RUN, run, start
from PIL import Image
from test_command_line import FILES, PICTURES, Finished
from test_resume import RUN as RESUMABLE_RUN
from test_resume import differences, killed, train
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

LAST_MAP = {  # the layer whose output is the last map of the network, and the pixels that a value of it sees
    "krizhevsky": ("pool3", 29),
    "five-conv": ("conv5", 24),
    "compact": ("standard3", 46),
}
PARAMETERS = {"krizhevsky": 762_794, "five-conv": 2_791_434, "alexnet": 58_322_314, "compact": 397_450}
SMALL_NETWORKS = ("five-conv", "compact")
FLAGS = {"five-conv": (), "compact": ("--inputs", "0-255")}  # so that prediction too has to know of them
COUNTS = (600, 200)  # training and test images of the small synthetic data

posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


@pytest.fixture
def call(ck, monkeypatch, capsys):
    """Call the command line on the small synthetic data; returns what it printed on both streams."""
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", COUNTS)

    def call(*arguments: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found, (out, err) = ck.main([str(argument) for argument in arguments]), capsys.readouterr()
        assert found == code, out + err
        return out, err

    return call


@pytest.fixture
def fails(call):
    """Call it where it must fail with this exit code, one line and no other output; returns the line."""

    def fails(*arguments: object, code: int = 2) -> str:
        out, err = call(*arguments, code=code)
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return fails


@pytest.fixture(scope="module", params=SMALL_NETWORKS)
def trained(request, tmp_path_factory):
    """A run of one of the small networks, two epochs, in the folder that the script chooses."""
    cwd, model = tmp_path_factory.mktemp(request.param), request.param
    result = run(*SMALL_RUN, "--model", model, *FLAGS[model], cwd=cwd)
    return Finished(result, cwd / "runs" / f"synthetic-{model}-seed0")


def save_pictures_of(images: torch.Tensor, folder: Path) -> None:
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04}.png")


# ----------------------------------------------------------------------------------------------------------------------
# The networks
# ----------------------------------------------------------------------------------------------------------------------


def documented(network: type) -> str:
    return re.sub(r"\s+", " ", network.__doc__).replace("( ", "(")


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_network_has_the_number_of_parameters_of_its_docstring(ck, name):
    with torch.device("meta"):  # shapes without numbers
        model = ck.MODELS[name](10)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS[name]
    in_millions = re.search(r"([\d.]+) M parameters", documented(ck.MODELS[name]))[1]
    assert float(in_millions) == pytest.approx(count / 1e6, abs=0.5 if count > 1e7 else 0.05)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_network_has_an_output_for_each_class(ck, name):
    with torch.device("meta"):
        assert ck.MODELS[name](100)(torch.zeros(3, 3, 32, 32)).shape == (3, 100)


def convolution(layer: nn.Conv2d) -> tuple:
    assert layer.kernel_size[0] == layer.kernel_size[1] and layer.stride[0] == layer.stride[1]
    return layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0]


def test_five_conv_has_the_layers_of_its_document(ck):
    model = ck.FiveConvNet()
    layers = [*model.modules()]
    assert [convolution(layer) for layer in layers if isinstance(layer, nn.Conv2d)] == [
        (3, 8, 3, 1, 1),
        (8, 32, 3, 1, 1),
        (32, 64, 3, 1, 1),
        (64, 128, 3, 1, 1),
        (128, 256, 3, 1, 0),
    ]
    linear = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    assert linear == [(6 * 6 * 256, 256), (256, 128), (128, 64), (64, 10)]
    assert (model.pool.kernel_size, model.pool.stride) == (2, 2)
    assert isinstance(model.dropout, nn.Dropout2d) and model.dropout.p == 0.5


def test_five_conv_is_the_plain_composition_of_its_layers(ck):
    model, x = ck.FiveConvNet().eval(), torch.rand(3, 3, 32, 32)
    h = F.max_pool2d(model.conv2(model.conv1(x).relu()).relu(), 2)
    assert h.shape[1:] == (32, 16, 16)
    h = F.max_pool2d(model.conv4(model.conv3(h).relu()).relu(), 2)
    assert h.shape[1:] == (128, 8, 8)
    h = model.conv5(h).relu()
    assert f"(N, {', '.join(map(str, h.shape[1:]))})" in documented(ck.FiveConvNet)
    for layer in (model.fc1, model.fc2, model.fc3):
        h = layer(h.flatten(1)).relu()
    torch.testing.assert_close(model(x), model.fc4(h))


def test_alexnet_has_the_layers_of_its_paper(ck):
    with torch.device("meta"):
        model = ck.AlexNet()
    kinds = [type(layer).__name__ for layer in model.features]
    norm, block = "LocalResponseNormalization", ["Conv2d", "ReLU"]
    assert kinds == [*block, norm, "MaxPool2d"] * 2 + block * 3 + ["MaxPool2d"]
    assert [convolution(layer) for layer in model.features if isinstance(layer, nn.Conv2d)] == [
        (3, 96, 11, 4, 0),
        (96, 256, 5, 1, 2),
        (256, 384, 3, 1, 1),
        (384, 384, 3, 1, 1),
        (384, 256, 3, 1, 1),
    ]
    assert {(pool.kernel_size, pool.stride) for pool in model.features if isinstance(pool, nn.MaxPool2d)} == {(3, 2)}
    block = ["Dropout", "Linear", "ReLU"]
    assert [type(layer).__name__ for layer in model.classifier] == [*block, *block, "Linear"]
    assert [layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    linear = [layer.out_features for layer in model.classifier if isinstance(layer, nn.Linear)]
    assert linear == [4096, 4096, 10]


def test_alexnet_enlarges_the_image_to_227x227(ck):
    with torch.device("meta"):
        model, images = ck.AlexNet(), torch.zeros(2, 3, 32, 32)
    seen = []
    model.features.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    for layer in (model.features[0], model.features):
        layer.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape)))
    model(images)
    assert seen == [(2, 3, 227, 227), (2, 96, 55, 55), (2, 256, 6, 6)]


def test_alexnet_makes_a_step_of_training(ck):
    torch.manual_seed(0)
    model = ck.build_model(ck.Config(model="alexnet"), 10)
    before, optimizer = ck.weights_of(model), torch.optim.SGD(model.parameters(), 0.01)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    loss, _ = ck.train_one_epoch(model, [(images, labels)], nn.CrossEntropyLoss(), optimizer, "cpu")
    assert 2 < loss < 3  # about log 10
    assert [name for name, value in model.state_dict().items() if torch.equal(value, before[name])] == []


def blocks(model: nn.Module) -> dict[str, nn.Sequential]:
    return {name: layer for name, layer in model.named_children() if isinstance(layer, nn.Sequential)}


def test_compact_has_less_than_a_million_parameters_for_a_hundred_classes_too(ck):
    assert sum(p.numel() for p in ck.CompactNet(100).parameters()) < 1_000_000


def test_every_block_of_compact_has_batch_normalisation_and_3_percent_dropout(ck):
    for block in blocks(ck.CompactNet()).values():
        *convolutions, norm, relu, dropout = block
        assert convolutions and all(isinstance(layer, nn.Conv2d) and layer.bias is None for layer in convolutions)
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)
        assert isinstance(dropout, nn.Dropout2d) and dropout.p == 0.03


def test_compact_has_dilated_and_depthwise_separable_convolutions(ck):
    dilated, separable = set(), set()
    for name, block in blocks(ck.CompactNet()).items():
        first, second = block[0], block[1]
        if first.dilation == (2, 2):
            dilated.add(name)
        if first.groups > 1:
            separable.add(name)
            assert first.groups == first.in_channels == first.out_channels and first.kernel_size == (3, 3)
            assert second.kernel_size == (1, 1) and second.groups == 1
    assert dilated == {"dilated1", "dilated2"} and separable == {"separable1", "separable2"}


@torch.no_grad()
def test_compact_has_a_residual_connection_around_the_end_of_each_part(ck):
    around = {"dilated2", "separable2", "standard2", "standard3"}
    images = torch.rand(8, 3, 32, 32)
    for name in blocks(ck.CompactNet()):
        model = ck.CompactNet().eval()
        nn.init.zeros_(getattr(model, name)[-3].weight)  # of the batch normalisation: now the block is silent
        assert (model(images).std(0).max() > 1e-6) == (name in around), name


@torch.no_grad()
def test_compact_has_the_shapes_of_its_docstring_and_averages_the_last_map(ck):
    model, outputs = ck.CompactNet().eval(), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.setdefault(name, []).append(output))
    images = torch.rand(2, 3, 32, 32)
    logits = model(images)
    found = [outputs["dilated2"][0], outputs["pool"][0], outputs["separable2"][0], outputs["pool"][1]]
    shapes = [(32, 32, 32), (32, 16, 16), (64, 16, 16), (64, 8, 8), (128, 8, 8)]
    assert [tuple(output.shape[1:]) for output in [*found, outputs["standard3"][0]]] == shapes
    for shape in [*shapes, (128,)]:
        assert f"(N, {', '.join(map(str, shape))})" in documented(ck.CompactNet)
    last = outputs["standard1"][0] + outputs["standard3"][0]
    torch.testing.assert_close(logits, model.fc(F.adaptive_avg_pool2d(last, 1).flatten(1)))


def seen_pixels(model: nn.Module, layer: str) -> torch.Tensor:
    """Which pixels of an image of 96x96 the value in the middle of a layer's output depends on."""
    outputs, images = [], torch.rand(1, 3, 96, 96, requires_grad=True)
    getattr(model, layer).register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()  # so that nothing is cut off or cancelled
    with contextlib.suppress(RuntimeError):  # linear layers behind it take one size of image only
        model.eval()(images)
    middle = outputs[0].size(2) // 2
    (gradient,) = torch.autograd.grad(outputs[0][0, :, middle, middle].sum(), images)
    return gradient[0].abs().sum(0) > 0


@pytest.mark.parametrize("name", LAST_MAP)
def test_the_receptive_field_of_the_summary_is_the_one_that_gradients_measure(ck, name):
    layer, size = LAST_MAP[name]
    torch.manual_seed(0)
    seen = torch.zeros(96, 96, dtype=torch.bool)
    for _ in range(12):  # a maximum passes its gradient to one pixel only
        seen |= seen_pixels(ck.MODELS[name](), layer)
    rows, columns = (seen.any(axis).nonzero().flatten() for axis in (1, 0))
    assert rows[-1] - rows[0] + 1 == columns[-1] - columns[0] + 1 == size
    said = [row["receptive_field"] for row in ck.summarize(ck.MODELS[name]()) if row["receptive_field"]]
    assert said[-1] == max(said) == size
    assert name != "compact" or f"{size}x{size} pixels" in documented(ck.CompactNet)


# ----------------------------------------------------------------------------------------------------------------------
# Their flags
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_flag_dropout_sets_the_share_of_every_dropout_layer(ck, name):
    config, _ = ck.parse_arguments(["--model", name, "--dropout", "0.25"])
    with torch.device("meta"):
        model = ck.build_model(config, 10)
    kinds = (nn.Dropout, nn.Dropout2d)
    assert {layer.p for layer in model.modules() if isinstance(layer, kinds)} == {0.25}


@pytest.mark.parametrize("name", ["krizhevsky", *SMALL_NETWORKS])
def test_dropout_is_drawn_in_training_and_absent_in_evaluation(ck, name):
    model, images = ck.build_model(ck.Config(model=name, dropout=0.5, init="he"), 10), torch.rand(4, 3, 32, 32)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))
    without = ck.build_model(ck.Config(model=name, dropout=0.0, init="he"), 10)
    assert torch.equal(without.train()(images), without(images))


def test_five_conv_drops_whole_channels_and_scales_the_others(ck):
    model, pairs = ck.FiveConvNet(dropout=0.5).train(), []
    model.dropout.register_forward_hook(lambda _, inputs, output: pairs.append((inputs[0], output)))
    torch.manual_seed(0)
    model(torch.rand(32, 3, 32, 32))
    assert len(pairs) == 2
    for before, after in pairs:
        dropped = (after == 0).all((2, 3))
        torch.testing.assert_close(after, 2 * before * ~dropped[:, :, None, None])
        alive = (before != 0).any(3).any(2)
        assert 0.4 < (dropped & alive).sum() / alive.sum() < 0.6


@pytest.mark.parametrize("name", ["krizhevsky", *SMALL_NETWORKS])
def test_he_gives_weights_of_deviation_root_2_over_fan_in_and_no_bias(ck, name):
    he, default = (ck.build_model(ck.Config(model=name, init=init), 10) for init in ("he", "pytorch"))
    for ours, theirs in zip(he.modules(), default.modules(), strict=True):
        if isinstance(ours, nn.Conv2d | nn.Linear):
            count = ours.weight.numel()
            expected = (2 / ours.weight[0].numel()) ** 0.5
            assert ours.weight.std().item() == pytest.approx(expected, rel=5 / (2 * count) ** 0.5)
            assert theirs.weight.std() < 0.7 * ours.weight.std()
            assert ours.bias is None or not ours.bias.any()
            assert theirs.bias is None or theirs.bias.any()


def test_the_lrn_flags_are_the_constants_of_every_normalisation(ck):
    flags = ["--lrn-size", "3", "--lrn-alpha", "0.5", "--lrn-beta", "0.6", "--lrn-k", "1.5"]
    for name in ck.MODELS_WITH_LRN:
        config, _ = ck.parse_arguments(["--model", name, *flags])
        with torch.device("meta"):
            model = ck.build_model(config, 10)
        layers = [layer for layer in model.modules() if isinstance(layer, ck.LocalResponseNormalization)]
        assert [(layer.size, layer.alpha, layer.beta, layer.k) for layer in layers] == [(3, 0.5, 0.6, 1.5)] * 2


def test_inputs_0_255_are_pixels_minus_their_mean(ck, monkeypatch):
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (100, 50))
    loaders = ck.get_cifar_data_loaders(dataset_name="synthetic", val_size=20, inputs="0-255")
    pixels = ck.draw_shapes(100, 1)[0].double()
    for loader in loaders:
        torch.testing.assert_close(torch.tensor(loader.mean).double() * 255, pixels.mean((0, 2, 3)))
    images, _ = next(iter(loaders[2]))
    expected = ck.draw_shapes(50, 2)[0] - pixels.mean((0, 2, 3)).view(3, 1, 1)
    torch.testing.assert_close(images.double(), expected, atol=1e-4, rtol=0)


def test_label_smoothing_is_in_the_training_loss_and_not_in_the_validation_loss(ck, call, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (80, 10))
    monkeypatch.setattr(ck, "save_pictures", lambda *_: [])
    losses, smoothing = {}, 0.4
    still = ("--lr", "1e-20", "--weight-decay", 0, "--val-size", 20, "--epochs", 1)
    still += ("--device", "cpu", "--precision", "fp32")
    for share in (0, smoothing):
        folder = tmp_path / str(share)
        call(*SMALL_RUN, *still, "--label-smoothing", share, "--output-dir", folder)
        with open(folder / "metrics.csv", newline="") as file:
            (losses[share],) = csv.DictReader(file)
    assert losses[0]["val_loss"] == losses[smoothing]["val_loss"]
    model = ck.build_model(ck.Config(), 10)
    loader, _, _ = ck.get_cifar_data_loaders(dataset_name="synthetic", val_size=20)
    with torch.no_grad():
        logits, labels = (torch.cat(parts) for parts in zip(*((model(x), y) for x, y in loader)))
    expected = [F.cross_entropy(logits, labels, label_smoothing=share).item() for share in losses]
    assert [float(row["train_loss"]) for row in losses.values()] == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-5 * expected[0]


REFUSED = [  # flags that do not go together, and the one that the message names
    *(f"--model {model} --norm {norm}: --norm" for model in SMALL_NETWORKS for norm in ("lrn", "none")),
    "--model compact --lrn-size 5: --lrn-size",
    "--model five-conv --lrn-alpha 1e-4: --lrn-alpha",
    "--model five-conv --lrn-beta 0.75: --lrn-beta",
    "--model compact --lrn-k 2: --lrn-k",
    "--norm none --lrn-size 3: --lrn-size",
    "--model alexnet --norm none --lrn-k 1: --lrn-k",
    "--select loss --val-size 0: --select",
    "--dropout 1: --dropout",
    "--label-smoothing 1: --label-smoothing",
    "--init xavier: --init",
    "--inputs 0-1: --inputs",
    "--lrn-size 0: --lrn-size",
    "--json: --json",
    "--evaluate: --evaluate",
    "--show-all-probs: --show-all-probs",
    "--checkpoint none.pt --json: --checkpoint",
    "--checkpoint none.pt --evaluate --image a.png: --checkpoint",
    "--checkpoint none.pt --evaluate --show-all-probs: --show-all-probs",
    *(f"--checkpoint none.pt --evaluate {flag}: {flag.split()[0]}" for flag in ("--lr 1", "--epochs 9", "--resume")),
    *(f"--checkpoint none.pt --evaluate {flag}: {flag}" for flag in ("--summary", "--tensorboard", "--overwrite")),
    *(f"--checkpoint none.pt --image a.png {flag}: {flag.split()[0]}" for flag in ("--seed 1", "--model compact")),
    *(f"--checkpoint none.pt --image a.png {flag}: {flag.split()[0]}" for flag in ("--dataset cifar10", "--norm none")),
]


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_go_together_are_refused_by_name(flags, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, named = flags.split(": ")
    assert named in fails(*flags.split())
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The layers, printed
# ----------------------------------------------------------------------------------------------------------------------


def counted_multiply_adds(model: nn.Module) -> int:
    """By PyTorch's own counter, which has a multiplication and an addition as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PARAMETERS)
def test_summary_prints_every_layer_and_the_true_totals_and_writes_nothing(ck, name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, err = call("--model", name, "--summary")
    assert err == "" and not list(tmp_path.iterdir())
    *rows, total = [line.split() for line in out.splitlines()[1:]]
    parameters, multiply_adds = (int(number.replace(",", "")) for number in total[1:3])
    assert parameters == PARAMETERS[name]
    with torch.device("meta"):
        model = ck.MODELS[name]()
    assert multiply_adds == counted_multiply_adds(model.to_empty(device="cpu"))
    named = dict(model.named_modules())
    for layer, kind, *_ in rows:
        assert type(named[layer]).__name__ == kind
    weighted = {layer for layer, module in named.items() if list(module.parameters(recurse=False))}
    assert weighted <= {layer for layer, *_ in rows}
    assert len({len(line) for line in out.splitlines()[:-1]}) == 1  # aligned


def test_the_multiply_adds_of_the_main_network_are_those_of_a_count_by_hand(ck):
    rows = {row["layer"]: row for row in ck.summarize(ck.KrizhevskyNet())}
    by_hand = {
        "conv1": 32 * 32 * 96 * 3 * 9,
        "conv2": 15 * 15 * 96 * 96 * 9,
        "conv3": 7 * 7 * 192 * 96 * 9,
        "fc1": 1728 * 256,
        "fc2": 256 * 256,
        "fc3": 256 * 10,
    }
    assert {name: row["multiply_adds"] for name, row in rows.items() if row["multiply_adds"]} == by_hand
    assert rows["conv2"]["output"] == [96, 15, 15] and rows["fc3"]["output"] == [10]


def test_summary_as_json_has_the_same_rows(ck, tmp_path):
    result = run("--model", "compact", "--summary", "--json", "--dataset", "cifar100", cwd=tmp_path, small=False)
    assert (result.returncode, result.stderr) == (0, "")
    rows = json.loads(result.stdout)
    assert rows == ck.summarize(ck.CompactNet(100))
    assert rows[-1]["output"] == [100] and rows[-1]["receptive_field"] is None
    assert not list(tmp_path.iterdir())


def test_summarizing_leaves_the_network_as_it_was(ck):
    model = ck.CompactNet().train()
    before = copy.deepcopy(model.state_dict())
    ck.summarize(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_hooks for layer in model.modules())


# ----------------------------------------------------------------------------------------------------------------------
# Training, evaluation and prediction by each small network
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_of_another_network_writes_the_same_files(ck, trained):
    assert trained.files == FILES | PICTURES
    summary, best = trained.summary, trained.checkpoint("best.pt")
    assert summary["parameters"] == PARAMETERS[summary["model"]]
    assert summary["norm"] == best["config"]["norm"] == "none"
    ck.MODELS[summary["model"]](10).load_state_dict(best["model"], strict=True)


@posix
@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_another_network_resumes_after_a_kill_with_the_bits_of_a_run_in_peace(name, tmp_path):
    arguments = (*RESUMABLE_RUN, "--model", name)
    assert train(*arguments, "--output-dir", "whole", cwd=tmp_path).returncode == 0
    blow = killed("step", 6)  # in the second of three epochs
    assert train(*arguments, "--output-dir", "run", cwd=tmp_path, blow=blow).returncode == -signal.SIGKILL
    assert train(*arguments, "--output-dir", "run", "--resume", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []
    if name == "compact":  # whose batch normalisation has a state besides the weights
        weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"]
        assert weights["stem.1.num_batches_tracked"] == 12
        assert weights["stem.1.running_mean"].any()


def test_the_command_in_the_summary_is_one_that_makes_the_run_again(ck, trained):
    python, script, *arguments = shlex.split(trained.summary["command"])
    assert (python, script) == ("python", SCRIPT.name)
    config, _ = ck.parse_arguments(arguments)
    made = replace(config, output_dir=str(trained.folder.relative_to(trained.folder.parent.parent)))
    assert asdict(made) == trained.checkpoint("best.pt")["config"]


def test_evaluation_alone_gives_the_figures_of_the_run_and_draws_its_pictures_again(trained, call, monkeypatch):
    summary, again = trained.summary, PICTURES - {"curves.png"}
    before = {name: (trained.folder / name).read_bytes() for name in FILES}
    for name in again:
        (trained.folder / name).unlink()
    monkeypatch.chdir(trained.folder.parent.parent)
    out, err = call("--checkpoint", trained.folder / "best.pt", "--evaluate")
    assert err == ""
    for key in ("test_error", "test_error_multi_view"):
        low, high = summary[f"{key}_interval"]
        assert f"{summary[key]:.2f} %  (95 % interval {low:.2f} to {high:.2f})" in out
    for key in ("test_top3_error", "test_top5_error"):
        assert f"{summary[key]:.2f} %" in out
    assert f"{summary['test_loss']:.4f}" in out
    printed = dict(re.findall(r"(\w+ \w+) +(\d+\.\d) %", out[out.index("by class") :]))
    assert printed == {name: f"{value:.1f}" for name, value in summary["test_class_accuracy"].items()}
    for name in again:
        with Image.open(trained.folder / name) as picture:
            picture.load()
            assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5
    assert trained.files == FILES | PICTURES
    assert {name: (trained.folder / name).read_bytes() for name in FILES} == before


def test_evaluation_finds_the_data_where_the_run_had_them(ck, checkpoint, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    best = torch.load(checkpoint, weights_only=True)
    best["config"]["data_dir"] = str(elsewhere := tmp_path / "elsewhere")
    ck.save_checkpoint(tmp_path / "best.pt", best)
    asked = []
    monkeypatch.setattr(ck, "read_dataset", lambda name, data_dir: asked.append(data_dir) or 1 / 0)
    for make, flags in ((elsewhere.exists, ()), (elsewhere.mkdir, ()), (elsewhere.exists, ("--data-dir", "here"))):
        make()
        with pytest.raises(ZeroDivisionError):
            call("--checkpoint", "best.pt", "--evaluate", *flags)
    assert asked == ["data", str(elsewhere), "here"]


def test_evaluation_as_json_is_nothing_but_json_whatever_happens(ck, trained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "plot_filters", lambda *_: 1 / 0)
    folder = tmp_path / "new" / "folder"
    out, err = call("--checkpoint", trained.folder / "best.pt", "--evaluate", "--json", "--output-dir", folder)
    assert "no filters.png" in err
    figures, summary = json.loads(out), trained.summary
    assert figures.keys() >= {"test_error", "test_error_multi_view", "test_loss", "test_class_accuracy"}
    assert figures == {key: summary[key] for key in figures}
    assert {path.name for path in folder.iterdir()} == {"predictions.png", "confusion.png"}


def test_predictions_on_png_files_are_those_of_the_evaluation(ck, trained, call, tmp_path):
    images, labels = ck.draw_shapes(COUNTS[1], 2)
    save_pictures_of(images, tmp_path)
    path = trained.folder / "best.pt"
    out, err = call("--checkpoint", path, "--image-dir", tmp_path, "--show-all-probs", "--json")
    assert err == ""
    guesses = json.loads(out)
    assert [Path(guess["file"]).name for guess in guesses] == [f"{i:04}.png" for i in range(COUNTS[1])]
    device = ck.choose_device("auto")
    model, checkpoint, _ = ck.load_trained(path, device)
    assert [guess["classes"].keys() for guess in guesses] == [set(checkpoint["classes"])] * COUNTS[1]
    constants = (checkpoint["classes"], checkpoint["mean"], checkpoint["std"], 250)
    loader = ck.CifarLoader(images, labels, *constants, device=device)
    evaluation = ck.evaluate_model(model, loader, trained.summary["precision_used"])
    found = torch.tensor([[guess["classes"][name] for name in loader.classes] for guess in guesses])
    torch.testing.assert_close(found, evaluation.log_probabilities.exp(), atol=1e-6, rtol=1e-5)
    predicted = [next(iter(guess["classes"])) for guess in guesses]
    assert predicted == [loader.classes[i] for i in evaluation.log_probabilities.argmax(1)]
    wrong = np.mean([guess != loader.classes[label] for guess, label in zip(predicted, labels)])
    assert 100 * wrong == pytest.approx(trained.summary["test_error"])


# ----------------------------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(ck, tmp_path_factory):
    """A best.pt of untrained weights: what is tested with it does not depend on them."""
    folder, config = tmp_path_factory.mktemp("checkpoint"), ck.Config(model="compact", norm="none", compile="off")
    best = {"model": ck.build_model(config, 10).state_dict(), "config": asdict(config), "classes": ck.SHAPE_CLASSES}
    best |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "epoch": 1}
    ck.save_checkpoint(folder / "best.pt", {"format": ck.MODEL_FORMAT, **best})
    return folder / "best.pt"


@pytest.fixture
def album(ck, tmp_path):
    """Pictures in folders within folders, one of them damaged, and a file that is none."""
    names = ["b.png", "a/z.png", "a/b/c.png", "a/y.jpg", "c.PNG"]
    for name, image in zip(names, ck.draw_shapes(len(names), 3)[0]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
    (tmp_path / "a" / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:150])
    (tmp_path / "a" / "notes.txt").write_text("no picture\n")
    return tmp_path


def test_pictures_come_in_the_order_of_the_flags_and_those_of_a_folder_sorted(checkpoint, album, call, monkeypatch):
    monkeypatch.chdir(album)
    (album / "a" / "broken.png").unlink()
    single = ["c.PNG", "a/y.jpg"]
    out, _ = call("--checkpoint", checkpoint, "--image", *single, "--json")
    assert [guess["file"] for guess in json.loads(out)] == single
    assert call("--checkpoint", checkpoint, "--image", single[0], "--image", single[1], "--json")[0] == out
    in_folder = ["a/b/c.png", "a/y.jpg", "a/z.png", "b.png", "c.PNG"]
    out, _ = call("--checkpoint", checkpoint, "--image-dir", ".", "--json")
    assert [guess["file"] for guess in json.loads(out)] == in_folder
    out, _ = call("--checkpoint", checkpoint, "--image-dir", ".")
    assert [line.split()[0] for line in out.splitlines()] == in_folder
    out, _ = call("--checkpoint", checkpoint, "--image", "b.png", "--image-dir", "a", "--json")
    assert [guess["file"] for guess in json.loads(out)] == ["b.png", *in_folder[:3]]


def test_the_table_is_aligned_and_has_the_three_likeliest_classes_of_the_json(ck, checkpoint, album, call):
    arguments = ("--checkpoint", checkpoint, "--image", album / "c.PNG", album / "a" / "b" / "c.png")
    lines, guesses = call(*arguments)[0].splitlines(), json.loads(call(*arguments, "--json")[0])
    assert len({len(line) for line in lines}) == 1
    for line, guess in zip(lines, guesses, strict=True):
        cells = re.findall(r"(\w+ \w+) +(\d+\.\d) %", line)
        assert cells == [(name, f"{100 * share:.1f}") for name, share in guess["classes"].items()]
        assert len(cells) == 3
    everything = json.loads(call(*arguments, "--json", "--show-all-probs")[0])
    for three, all_of_them in zip(guesses, everything, strict=True):
        shares = [*all_of_them["classes"].values()]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
        assert [*all_of_them["classes"].items()][:3] == [*three["classes"].items()]
        assert all_of_them["classes"].keys() == set(ck.SHAPE_CLASSES)


def test_with_a_broken_picture_the_json_has_the_others_and_the_exit_code_is_1(checkpoint, album, call):
    out, err = call("--checkpoint", checkpoint, "--image-dir", album, "--json", code=1)
    assert [Path(guess["file"]).name for guess in json.loads(out)] == ["c.png", "y.jpg", "z.png", "b.png", "c.PNG"]
    assert err.startswith("error: ") and str(album / "a" / "broken.png") in err and err.count("\n") == 1


def png_of(width: int, height: int) -> bytes:
    """The beginning of a picture of that size."""
    chunks = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(50)
    lengths_and_sums = [(struct.pack(">I", len(c) - 4), struct.pack(">I", zlib.crc32(c))) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(n + c + s for c, (n, s) in zip(chunks, lengths_and_sums))


def test_a_reader_that_leaves_early_is_told_nothing_about_going_on(checkpoint, album, tmp_path):
    process = start("--checkpoint", checkpoint, "--image", album / "b.png", cwd=tmp_path)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_an_absurdly_large_picture_is_named_and_the_others_go_on(side, checkpoint, album, call):
    large = album / "large.png"
    large.write_bytes(png_of(side, side))
    out, err = call("--checkpoint", checkpoint, "--image", large, album / "b.png", "--json", code=1)
    assert [Path(guess["file"]).name for guess in json.loads(out)] == ["b.png"]
    assert err.startswith(f"error: cannot read {large}") and "pixels" in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# One's own pictures
# ----------------------------------------------------------------------------------------------------------------------


def draw_folder(ck, folder: Path, counts: dict[str, int]) -> Path:
    """A folder of pictures as --dataset takes it: four classes, in several sizes, modes and formats."""
    for seed, (part, count) in enumerate(counts.items(), start=7):
        for number, (image, label) in enumerate(zip(*ck.draw_shapes(count * 10 // 4, seed))):
            if label < 4:
                place = folder / part / ck.SHAPE_CLASSES[label]
                place.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                if number % 5 == 0:
                    picture = picture.resize((50, 70)).convert(("L", "P", "RGBA")[number % 3])
                picture.save(place / f"{number:03}.{'bmp' if number % 5 == 1 else 'png'}")
    return folder


OWN_FLAGS = ("--val-size", 20, "--epochs", 2, "--batch-size", 16, "--compile", "off", "--dropout", 0.2)


@pytest.fixture(scope="module")
def own(ck, tmp_path_factory):
    """A run of the main network on such a folder, with other constants in its normalisation."""
    cwd = tmp_path_factory.mktemp("own")
    draw_folder(ck, cwd / "my pictures", {"train": 80, "test": 24})
    flags = (*OWN_FLAGS, "--lrn-size", 3, "--lrn-k", 1)
    result = run("--dataset", "my pictures", *flags, cwd=cwd, small=False)
    return Finished(result, cwd / "runs" / "my pictures-krizhevsky-seed0")


def test_a_folder_of_pictures_trains_a_network_for_its_classes(ck, own):
    assert own.files == FILES | PICTURES
    assert "my pictures: 60 training, 20 validation, 24 test images of 4 classes" in own.out
    assert own.summary["test_images"] == 24 and own.summary["train_images"] == 60
    assert own.checkpoint("best.pt")["classes"] == sorted(ck.SHAPE_CLASSES[:4])
    assert own.summary["test_class_accuracy"].keys() == set(ck.SHAPE_CLASSES[:4])


def test_names_that_look_like_a_formula_are_drawn(ck, tmp_path, capsys):
    labels, classes = torch.tensor([0, 1, 1]), ["$5^$", "a_b $ $"]
    makers = {"confusion.png": lambda: ck.plot_confusion_matrix(labels, labels, classes, "any")}
    assert ck.save_pictures(tmp_path, makers) == ["confusion.png"]
    assert capsys.readouterr().out == ""


def test_mean_and_deviation_are_those_of_the_training_images_of_the_folder(ck, own):
    paths = sorted((own.folder.parent.parent / "my pictures" / "train").rglob("*.*"))
    assert len(paths) == 80
    pixels = np.stack([ck.read_picture(path).numpy() for path in paths]) / 255
    best = own.checkpoint("best.pt")
    assert best["mean"] == pytest.approx(pixels.mean((0, 2, 3)))
    assert best["std"] == pytest.approx(pixels.std((0, 2, 3)))


def test_a_network_of_own_pictures_is_evaluated_and_classifies(ck, own, call, monkeypatch):
    monkeypatch.chdir(own.folder.parent.parent)
    path = own.folder / "best.pt"
    figures = json.loads(call("--checkpoint", path, "--evaluate", "--json")[0])
    assert figures == {key: own.summary[key] for key in figures}
    guesses = json.loads(call("--checkpoint", path, "--image-dir", "my pictures/test", "--json")[0])
    right = [Path(guess["file"]).parent.name == next(iter(guess["classes"])) for guess in guesses]
    assert len(right) == 24
    assert 100 - 100 * np.mean(right) == pytest.approx(figures["test_error"])


def test_a_trained_network_is_evaluated_on_another_folder_of_the_same_classes(ck, own, call, tmp_path):
    draw_folder(ck, tmp_path / "others", {"train": 8, "test": 16})
    best, flags = own.folder / "best.pt", ("--evaluate", "--json", "--output-dir", tmp_path / "out")
    figures = json.loads(call("--checkpoint", best, *flags, "--dataset", tmp_path / "others")[0])
    assert figures["test_images"] == 16
    assert (tmp_path / "out" / "predictions.png").exists()


def test_the_picture_of_predictions_shows_every_class_of_a_set_in_their_order(ck):
    labels = torch.arange(3).repeat_interleave(50)
    images, classes, ones = torch.zeros(150, 3, 32, 32, dtype=torch.uint8), ["ant", "bee", "cow"], (1.0, 1.0, 1.0)
    loader = ck.CifarLoader(images, labels, classes, ones, ones)
    guesses = torch.eye(3)[(labels + (labels == 2)) % 3].add(1e-9).log()  # every cow is taken for an ant
    titles = [axes.get_title() for axes in ck.plot_predictions(loader, guesses, "").axes[:40]]
    counts = {title: titles.count(title) for title in titles}
    assert counts == {"ant\n100%": 14, "bee\n100%": 13, "ant 100%\n(is cow)": 13}


def test_a_data_set_of_other_classes_than_the_checkpoint_is_refused(own, fails):
    message = fails("--checkpoint", own.folder / "best.pt", "--evaluate", "--dataset", "synthetic")
    assert str(own.folder / "best.pt") in message and "classes" in message


def test_summary_takes_the_number_of_classes_from_the_folder(own, call):
    out, _ = call("--dataset", own.folder.parent.parent / "my pictures", "--summary", "--json")
    assert json.loads(out)[-1]["output"] == [4]


@posix
def test_a_run_on_a_folder_resumes_after_a_kill_with_the_bits_of_a_run_in_peace(own, tmp_path):
    arguments = ("--dataset", own.folder.parent.parent / "my pictures", *OWN_FLAGS)
    assert train(*arguments, "--output-dir", "whole", cwd=tmp_path).returncode == 0
    blow = killed("step", 6)  # in the second of two epochs
    assert train(*arguments, "--output-dir", "run", cwd=tmp_path, blow=blow).returncode == -signal.SIGKILL
    assert train(*arguments, "--output-dir", "run", "--resume", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []


@pytest.mark.parametrize("same", [True, False])
def test_a_run_on_a_folder_that_has_moved_goes_on_if_it_holds_the_same(own, same, call, tmp_path):
    shutil.copytree(own.folder, tmp_path / "run")
    moved = shutil.copytree(own.folder.parent.parent / "my pictures", tmp_path / "moved")
    arguments = ("--resume", tmp_path / "run", "--dataset", f"{moved}/")
    if same:
        call(*arguments)
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["dataset"] == f"{moved}/"
    else:
        next((moved / "train").rglob("*.png")).unlink()
        assert "other images" in call(*arguments, code=1)[1]


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}/../{1}", "../{2}/{1}", "./{1}", "{1}/train/.."])
def test_the_run_of_a_folder_lies_in_runs_however_the_folder_is_spelled(ck, spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "train").mkdir(parents=True)
    dataset = spelling.format(tmp_path / "mine", "mine", tmp_path.name)
    assert ck.default_folder(ck.Config(dataset=dataset)) == Path("runs") / "mine-krizhevsky-seed0"


@pytest.fixture
def folder(ck, tmp_path):
    return draw_folder(ck, tmp_path / "mine", {"train": 40, "test": 8})


def test_a_name_that_is_neither_a_data_set_nor_a_folder_is_refused(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ((), ("--summary",)):
        message = fails("--dataset", "mnist", *flags)
        assert "mnist" in message and "cifar10" in message and "train/CLASS" in message
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_without_train_or_test_is_refused_with_how_it_should_be(part, folder, fails, tmp_path):
    (folder / part).rename(tmp_path / "away")
    message = fails("--dataset", folder, "--output-dir", tmp_path / "run", "--val-size", 4)
    assert str(folder / part) in message and "one folder of pictures for each class" in message


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_without_pictures_is_named(part, folder, fails, tmp_path):
    (folder / part / "a new class").mkdir()
    (folder / part / "a new class" / "notes.txt").touch()
    message = fails("--dataset", folder, "--output-dir", tmp_path / "run", "--val-size", 4)
    assert str(folder / part) in message and "a new class" in message


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_of_one_part_only_is_named(part, folder, fails, tmp_path):
    (folder / part / "a new class").mkdir()
    Image.new("RGB", (32, 32)).save(folder / part / "a new class" / "black.png")
    message = fails("--dataset", folder, "--output-dir", tmp_path / "run", "--val-size", 4)
    assert "a new class" in message and "striped" not in message


def test_a_broken_picture_in_a_folder_is_named(folder, fails, tmp_path):
    path = next((folder / "train").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:200])
    message = fails("--dataset", folder, "--output-dir", tmp_path / "run", "--val-size", 4, code=1)
    assert str(path) in message


def test_a_validation_size_too_large_for_a_folder_is_refused_with_one_that_fits(ck, folder, fails, tmp_path):
    message = fails("--dataset", folder, "--output-dir", tmp_path / "run")
    assert "--val-size 5000" in message and "40 training images" in message
    proposed = int(re.search(r"try (\d+)", message)[1])
    loaders = ck.get_cifar_data_loaders(dataset_name=str(folder), val_size=proposed)
    assert [len(loader.labels) for loader in loaders] == [40 - proposed, proposed, 8]


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard
# ----------------------------------------------------------------------------------------------------------------------


def events(folder: Path):
    """What TensorBoard itself reads in a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_every_figure_once(folder: Path, epochs: int) -> None:
    """That of each figure in metrics.csv TensorBoard has one value for each epoch, and that it is the same one."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [values for tag, values in scalars(folder).items() if not tag.startswith("result/")]
    assert len(rows) == epochs and len(found) == len(rows[0]) - 1
    assert all([step for step, _ in values] == list(range(1, epochs + 1)) for values in found)
    ours = sorted([np.float32(row[name]).item() for row in rows] for name in rows[0] if name != "epoch")
    assert sorted([value for _, value in values] for values in found) == ours


def test_tensorboard_has_the_figures_of_each_epoch_the_pictures_and_the_hyperparameters(call, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder = tmp_path / "run"
    call(*SMALL_RUN, "--model", "compact", "--lr", 0.02, "--tensorboard", "--output-dir", folder)
    assert_every_figure_once(folder, 2)
    summary, found = json.loads((folder / "summary.json").read_text()), events(folder)
    for name in PICTURES:
        (event,) = found.Images(Path(name).stem)
        with Image.open(folder / name) as picture:
            assert (event.width, event.height) == picture.size
    results = {tag: values for tag, values in scalars(folder).items() if tag.startswith("result/")}
    assert results.keys() >= {"result/test_error", "result/test_error_multi_view", "result/best_val_accuracy"}
    for tag, values in results.items():
        assert [value for _, value in values] == [pytest.approx(summary[tag.removeprefix("result/")])]
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lr"].number_value == 0.02
    assert hparams["model"].string_value == "compact"


@posix
def test_tensorboard_has_every_epoch_once_after_a_kill_and_resumption_too(tmp_path):
    pytest.importorskip("tensorboard")
    arguments = (*RESUMABLE_RUN, "--model", "compact", "--output-dir", "run", "--tensorboard")
    blow = killed("step", 10)  # in the last of three epochs
    assert train(*arguments, cwd=tmp_path, blow=blow).returncode == -signal.SIGKILL
    assert_every_figure_once(tmp_path / "run", 2)
    assert train(*arguments, "--resume", cwd=tmp_path).returncode == 0
    assert_every_figure_once(tmp_path / "run", 3)


def test_overwriting_a_run_clears_its_figures_from_tensorboard_too(ck, call, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (80, 10))
    monkeypatch.setattr(ck, "save_pictures", lambda *_: [])
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "curves.png", "events.out.tfevents.1.host.2.0"):
        (tmp_path / "run" / name).write_bytes(b"of an earlier run")
    arguments = ("--model", "compact", "--val-size", 20, "--epochs", 1, "--overwrite", "--output-dir", tmp_path / "run")
    call(*SMALL_RUN, *arguments)
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES | {".lock"}


def test_overwriting_where_no_run_was_leaves_the_files_of_others(ck, call, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (80, 10))
    monkeypatch.setattr(ck, "save_pictures", lambda *_: [])
    others = tmp_path / "events.out.tfevents.1.host.2.0"
    others.write_bytes(b"of another program")
    call(*SMALL_RUN, "--model", "compact", "--val-size", 20, "--epochs", 1, "--overwrite", "--output-dir", tmp_path)
    assert others.read_bytes() == b"of another program"


def test_without_tensorboard_one_line_says_how_to_install_it(fails, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python marks what is not to be found
    message = fails(*SMALL_RUN, "--tensorboard", "--output-dir", tmp_path / "run")
    assert "pip install tensorboard" in message
    assert not list(tmp_path.iterdir())


def test_a_picture_that_a_link_leads_to_again_counts_once_and_every_format_counts(ck, tmp_path):
    images, labels = ck.draw_shapes(8, seed=1)
    for part in ("train", "test"):
        for image, label in zip(images, labels % 2, strict=True):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{len(list(folder.iterdir()))}.{'gif' if label else 'png'}"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        (tmp_path / part / "class0" / "again").symlink_to(".")
    data = ck.read_dataset(str(tmp_path))
    assert (len(data.images), len(data.test_images)) == (8, 8)


def test_a_colour_that_is_the_same_everywhere_does_not_divide_by_zero(ck):
    images = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    images[:, 2] = 0
    assert ck.channel_statistics(images)[1][2] == pytest.approx(1 / 255)


def test_a_run_is_not_resumed_on_other_pictures_or_classes(ck, tmp_path, capsys):
    images, labels = ck.draw_shapes(40, seed=1)
    for part in ("train", "test"):
        for number, (image, label) in enumerate(zip(images, labels % 2, strict=True)):
            folder = tmp_path / "set" / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    flags = ["--val-size", "4", "--compile", "off", "--no-test", "--milestones", "1"]
    flags += ["--dataset", str(tmp_path / "set"), "--output-dir", str(tmp_path / "run")]
    assert ck.main([*flags, "--epochs", "1"]) == 0
    next((tmp_path / "set" / "train" / "class0").iterdir()).unlink()
    capsys.readouterr()
    assert ck.main([*flags, "--epochs", "2", "--resume"]) == 1
    assert "other images or classes" in capsys.readouterr().err
