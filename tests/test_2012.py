"""Krizhevsky's networks of 2012: layers against plain formulas, inputs, crops, and whole runs of their recipes."""

import functools
import json
import re

import pytest
import torch
from conftest import call, one_line_error, start
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = ("80sec", "18pct", "13pct", "11pct")
SIZES = {"80sec": 32, "18pct": 32, "13pct": 24, "11pct": 24}
PARAMETERS = {"80sec": 145_578, "18pct": 89_578, "13pct": 1_116_490, "11pct": 2_112_970}


@pytest.fixture
def network(ck):
    """The network of a recipe, for ten classes."""
    return lambda name, **changes: ck.build_model(ck.Config(**ck.RECIPES[name] | changes), 10)


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def flags(small, recipe: str) -> list[object]:
    """The flags of a run of a recipe that takes seconds."""
    return [
        *f"--recipe {recipe} --epochs 2 --batch-size 32 --device cpu --compile off".split(),
        "--dataset",
        small,
    ]


# ---- Layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_parameters_are_those_of_his_files(network, name):
    model = network(name)
    size = SIZES[name]
    sizes = []
    for layer in model.modules():
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            layer.register_forward_hook(
                lambda _layer, _inputs, output: sizes.append(output.size(-1))
            )
    assert model(random_tensor(2, 3, size, size)).shape == (2, 10)
    assert sizes == ([16, 8, 4] if size == 32 else [12, 6])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("size", [32, 24, 16, 12, 8])
def test_an_average_at_the_edge_divides_by_the_pixels_that_are_there(network, size):
    pool = network("18pct").pool2
    x = random_tensor(1, 2, size, size)
    y = pool(x)
    for row in range(size // 2):
        for column in range(size // 2):
            window = x[
                0, :, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3
            ]  # smaller at the edge
            torch.testing.assert_close(y[0, :, row, column], window.mean((1, 2)))


def test_rnorm_is_within_a_map_and_cmrnorm_across_maps(network):
    x = 30 * random_tensor(1, 64, 4, 5)
    within = network("18pct").norm1(x)
    across = network("11pct").norm1(x)
    padded = F.pad(x, (1, 1, 1, 1))
    for row in range(4):
        for column in range(5):
            squares = padded[0, :, row : row + 3, column : column + 3].square().sum((1, 2))
            expected = x[0, :, row, column] / (1 + 5e-5 / 9 * squares) ** 0.75
            torch.testing.assert_close(within[0, :, row, column], expected)
    for channel in range(64):
        squares = x[0, max(0, channel - 4) : channel + 5].square().sum(0)
        expected = x[0, channel] / (1 + 0.001 / 9 * squares) ** 0.75
        torch.testing.assert_close(across[0, channel], expected)


def test_a_locally_connected_layer_is_36_small_products_with_biases_of_their_own(network):
    layer = network("13pct").local4
    layer.bias.data = random_tensor(*layer.bias.shape)
    x = random_tensor(3, 32, 6, 6)
    y = layer(x)
    padded = F.pad(x, (1, 1, 1, 1))
    for place in range(36):
        row, column = divmod(place, 6)
        patch = padded[:, :, row : row + 3, column : column + 3].flatten(
            1
        )  # (3, 32 * 9), as F.unfold
        expected = patch @ layer.weight[place] + layer.bias[place]
        torch.testing.assert_close(y[:, :, row, column], expected, atol=1e-5, rtol=1e-5)
    y.sum().backward()
    assert layer.bias.grad.shape == (36, 1, 32) and (layer.bias.grad == 3).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_forward_pass_is_his_layers_in_his_order(network, name):
    """ReLU before max pooling, as he has it, and the order of pooling and normalization."""
    model = network(name).double()
    for parameter in model.parameters():  # so that the first layers matter
        parameter.data = random_tensor(*parameter.shape).double() / parameter[0].numel() ** 0.5
    layers = dict(model.named_children())
    x = 50 * random_tensor(2, 3, SIZES[name], SIZES[name]).double()

    def maximum(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 2, ceil_mode=True)

    def norm(layer: str, x: Tensor) -> Tensor:
        return layers[layer](x)

    conv1, conv2 = layers["conv1"], layers["conv2"]
    if name == "80sec":
        y = average(conv2(maximum(conv1(x)).relu()).relu())
        y = average(layers["conv3"](y).relu()).flatten(1)
        y = layers["fc64"](y).relu()
    elif name == "18pct":
        y = norm("norm1", maximum(conv1(x)).relu())
        y = norm("norm2", average(conv2(y).relu()))
        y = average(layers["conv3"](y).relu()).flatten(1)
    else:
        y = norm("norm1", maximum(conv1(x).relu()))
        y = maximum(norm("norm2", conv2(y).relu()))
        y = layers["local4"](layers["local3"](y).relu()).relu().flatten(1)
    torch.testing.assert_close(model(x), layers["fc10"](y))


@pytest.mark.parametrize(
    ("name", "stds", "decays"),
    [
        ("80sec", (1e-4, 0.01, 0.01, 0.1, 0.1), (0.004, 0.004, 0.004, 0.03, 0.03)),
        ("18pct", (1e-4, 0.01, 0.01, 0.01), (0.004, 0.004, 0.004, 1)),
        ("13pct", (1e-4, 0.01, 0.04, 0.04, 0.01), (0, 0, 0.004, 0.004, 0.004)),
        ("11pct", (1e-4, 0.01, 0.04, 0.04, 0.01), (0, 0, 0.004, 0.004, 0.01)),
    ],
)
def test_initial_weights_decay_and_two_steps_of_sgd_are_his(ck, network, name, stds, decays):
    model = network(name).double()
    parameters = list(model.parameters())
    weights, biases = parameters[::2], parameters[1::2]
    for weight, std in zip(weights, stds, strict=True):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5
    assert all((bias == 0).all() for bias in biases)

    recipe = ck.RECIPES[name]
    groups = ck.parameter_groups(model, recipe["lr"], recipe["weight_decay"])
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    expected = [p.detach().clone() for p in parameters]
    velocities = [torch.zeros_like(p) for p in parameters]
    rates = [0.001, 0.002] * len(weights)
    penalties = [penalty for decay in decays for penalty in (decay, 0)]
    assert [group["lr"] for group in groups] == pytest.approx(rates)
    assert [group["weight_decay"] for group in groups] == pytest.approx(penalties)
    for step in range(2):
        optimizer.zero_grad()
        images = 50 * random_tensor(4, 3, SIZES[name], SIZES[name]).double()
        model(images).square().sum().backward()
        for i, p in enumerate(parameters):
            # cuda-convnet's step: the velocity contains the learning rate
            velocities[i] = 0.9 * velocities[i] - rates[i] * (penalties[i] * expected[i] + p.grad)
            expected[i] = expected[i] + velocities[i]
        optimizer.step()
        for i, p in enumerate(parameters):
            told = {"msg": f"step {step}, parameter {i}"}
            torch.testing.assert_close(p.detach(), expected[i], rtol=1e-7, atol=1e-12, **told)


def test_lr_and_weight_decay_scale_every_group_and_a_network_without_factors_has_one(ck, network):
    once = ck.parameter_groups(network("11pct"), 0.001, 0.004)
    twice = ck.parameter_groups(network("11pct"), 0.002, 0.008)
    for one, two in zip(once, twice, strict=True):
        assert two["lr"] == pytest.approx(2 * one["lr"])
        assert two["weight_decay"] == pytest.approx(2 * one["weight_decay"])
    (group,) = ck.parameter_groups(ck.KrizhevskyNet(), 0.01, 5e-4)
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (0.01, 5e-4, 12)


@pytest.mark.parametrize(
    ("name", "epochs", "drops", "augment"),
    [
        ("80sec", 10, [8], "none"),
        ("18pct", 140, [120, 130], "none"),
        ("13pct", 140, [120, 130], "crop-flip"),
        ("11pct", 450, [430, 440], "crop-flip"),
    ],
)
def test_inputs_and_schedules_are_his(ck, name, epochs, drops, augment):
    config = ck.Config(**ck.RECIPES[name])
    assert (config.inputs, config.augment, config.val_size) == ("mean-image", augment, 0)
    assert (config.epochs, config.batch_size) == (epochs, 128)
    assert (config.lr, config.momentum, config.gamma) == (0.001, 0.9, 0.1)
    assert ck.resolve_milestones(config.milestones, epochs) == drops


# ---- Inputs, crops, views ------------------------------------------------------------------------


def test_crops_of_24_are_of_the_image_and_the_mean_image_is_cropped_at_its_center(ck, small):
    options = {"val_size": 0, "inputs": "mean-image", "augment": "none"}
    whole, _, _ = ck.get_cifar_data_loaders(500, str(small), **options)
    data = ck.read_dataset(str(small))
    mean = data.images.float().mean(0)
    for images, labels in [next(iter(whole))]:  # one batch: all images, unchanged but shuffled
        found = (images + mean).round().to(torch.uint8)
        assert {i.numpy().tobytes() for i in found.contiguous()} == {
            i.numpy().tobytes() for i in data.images.contiguous()
        }
        assert not torch.equal(labels, data.labels)

    options |= {"augment": "crop-flip", "crop_size": 24}
    cropped, _, test = ck.get_cifar_data_loaders(500, str(small), **options)
    assert tuple(cropped.mean.shape) == (3, 24, 24)
    places = set()
    for epoch in range(1, 5):
        cropped.set_epoch(epoch)
        for images, labels in cropped:
            pixels = (images + mean[:, 4:28, 4:28]).round().to(torch.uint8)
            same_label = [data.images[data.labels == label] for label in range(10)]
            for image, label in zip(pixels[:20], labels[:20], strict=True):
                windows = (
                    same_label[label].unfold(2, 24, 1).unfold(3, 24, 1)
                )  # (n, 3, 9, 9, 24, 24)
                for flipped in (False, True):
                    wanted = image.flip(2) if flipped else image
                    match = (windows == wanted[:, None, None]).all(-1).all(-1).all(1).nonzero()
                    places |= {(y, x, flipped) for _, y, x in match.tolist()}
    assert len({place[:2] for place in places}) > 40 and {place[2] for place in places} == {
        False,
        True,
    }
    (images, _), *_ = test
    expected = data.test_images[: len(images), :, 4:28, 4:28].float() - mean[:, 4:28, 4:28]
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)


def test_augment_decides_what_is_trained_on_and_how_many_views_are_tested(ck, small):
    data = ck.read_dataset(str(small))
    one_class = data.labels == 3  # 20 images
    images, labels = data.images[one_class], data.labels[one_class]
    constants = (images, labels, data.classes, (0.0,) * 3, (1 / 255,) * 3)
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (20, 3, 9, 9, 32, 32)
    crops = {
        crop.contiguous().numpy().tobytes()
        for crop in crops.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    }
    originals = {image.contiguous().numpy().tobytes() for image in images}
    seen = {}
    for augment in ("crop-flip", "crop", "none"):
        loader = ck.CifarLoader(*constants, batch_size=20, shuffle=True, augment=augment)
        plain = mirrored = centered = 0
        for epoch in (1, 2, 3):
            loader.set_epoch(epoch)
            for image in next(iter(loader))[0].round().to(torch.uint8):
                plain += image.contiguous().numpy().tobytes() in crops
                mirrored += image.flip(2).contiguous().numpy().tobytes() in crops
                centered += image.contiguous().numpy().tobytes() in originals
        seen[augment] = (plain, mirrored, centered)
    assert seen["none"] == (60, 0, 60)
    assert seen["crop"][:2] == (60, 0) and seen["crop"][2] < 10
    assert sum(seen["crop-flip"][:2]) == 60 and 15 < seen["crop-flip"][0] < 45
    assert [len(ck.VIEWS[augment]) for augment in seen] == [10, 5, 1]
    assert not any(flipped for _, _, flipped in ck.VIEWS["crop"])
    with pytest.raises(ValueError, match="augment must be one of"):
        ck.CifarLoader(*constants, shuffle=True, augment=True)


def test_flips_are_off_for_classes_that_are_mirror_images(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("test", 20)):
        for label in ("left", "right"):
            (tmp_path / "arrows" / part / label).mkdir(parents=True)
            for number in range(count):
                image = torch.full((32, 32, 3), 200, dtype=torch.uint8)
                y, x = torch.randint(6, 18, (2,), generator=generator).tolist()
                for step in range(8):
                    image[y + 8 - step : y + 8 + step, x + step] = 20
                image = image if label == "left" else image.flip(1)
                Image.fromarray(image.numpy()).save(
                    tmp_path / "arrows" / part / label / f"{number}.png"
                )
    errors = {}
    for augment in ("crop-flip", "crop"):
        words = f"--dataset arrows --augment {augment} --epochs 12 --batch-size 8 --lr 0.02 --output-dir {augment} --compile off --device cpu"
        assert call(*words.split(), cwd=tmp_path).code == 0
        summary = json.loads((tmp_path / augment / "summary.json").read_text())
        errors[augment] = summary["test_error"]
        assert summary["test_views"] == {"crop-flip": 10, "crop": 5}[augment]
    assert errors["crop"] <= 10 < 25 <= errors["crop-flip"]


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["80sec", "11pct"])
def test_a_recipe_trains_resumes_to_the_same_bits_evaluates_and_predicts(ck, small, tmp_path, name):
    result = call(*flags(small, name), "--output-dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    views = 1 if SIZES[name] == 32 else 10
    assert summary["test_views"] == views and summary["parameters"] == PARAMETERS[name]
    assert ("error, 10 views" in result.out) == (views == 10)
    if views == 1:
        assert summary["test_error_multi_view"] == summary["test_error"]
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert tuple(best["mean"].shape) == (3, SIZES[name], SIZES[name])

    words = [*flags(small, name), "--output-dir", "stopped"]
    process = start(*words, cwd=tmp_path)
    for line in process.stdout:
        if "1/2" in line:
            process.kill()
            break
    process.communicate()
    assert call(*words, "--resume", cwd=tmp_path).code == 0
    resumed = torch.load(tmp_path / "stopped/best.pt", weights_only=True)
    for key, value in best["model"].items():
        assert torch.equal(value, resumed["model"][key]), key

    words = "--checkpoint run/best.pt --evaluate --compile off --device cpu --output-dir again"
    evaluated = call(*words.split(), cwd=tmp_path)
    (error,) = re.findall(r"error, one view +([\d.]+) %", evaluated.out)
    assert float(error) == pytest.approx(summary["test_error"], abs=0.005)
    pictures = call(
        "--checkpoint", "run/best.pt", "--image-dir", small / "test", "--json", cwd=tmp_path
    )
    assert len(json.loads(pictures.out)) == 50
    for plot in ("curves", "predictions", "confusion", "filters"):
        assert (tmp_path / f"run/{plot}.png").exists()


def test_a_network_that_is_no_class_is_trained_on_images_of_its_size(
    ck, small, tmp_path, monkeypatch
):
    monkeypatch.setitem(ck.MODELS, "narrow", functools.partial(ck.Net11pct, local3_maps=8))
    words = [*flags(small, "11pct"), "--model", "narrow", "--epochs", 1, "--output-dir", "run"]
    result = call(*words, cwd=tmp_path)
    assert result.code == 0, result.err
    best = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert tuple(best["mean"].shape) == (3, 24, 24)
    words = [*flags(small, "11pct"), "--init-from", "run/best.pt", "--model", "narrow", "--no-test"]
    assert call(*words, cwd=tmp_path).code == 0


@pytest.mark.parametrize("name", ["18pct", "11pct"])
def test_norm_none_takes_the_normalization_out_and_nothing_else(network, name):
    with_norm, without = network(name), network(name, norm="none")
    for (key, one), (other_key, other) in zip(
        with_norm.state_dict().items(), without.state_dict().items(), strict=True
    ):
        assert key == other_key and torch.equal(one, other)
    assert type(without.norm1) is type(without.norm2) is nn.Identity
    x = 50 * random_tensor(2, 3, SIZES[name], SIZES[name])
    for model in (with_norm, without):
        for parameter in model.parameters():
            parameter.data = random_tensor(*parameter.shape) / 10
    assert not torch.allclose(with_norm(x), without(x))


def test_an_unknown_way_to_augment_is_one_line(tmp_path):
    result = call("--augment", "flip", cwd=tmp_path)
    assert "--augment" in one_line_error(result, 2)


@pytest.mark.parametrize("side", [20, 32])
def test_a_local_network_refuses_images_of_another_size(ck, side):
    """Larger ones were classified without a word by weights of other places."""
    model = ck.build_model(ck.Config(model="13pct"), 10)
    with pytest.raises(AssertionError, match="6x6"):
        model(torch.zeros(2, 3, side, side))
