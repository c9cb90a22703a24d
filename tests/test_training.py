"""Schedule, training, evaluation, the choice of the epoch, and that every setting reaches them."""

import copy
import csv
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import call, one_line_error
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2


def tiny_network(num_classes: int, lrn=None, dropout: float = 0.0) -> nn.Module:
    """Stands in for the network where the run around it is tested."""
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=4, stride=4), nn.ReLU(), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(8 * 8 * 8, num_classes),
    )  # fmt: skip


@pytest.fixture
def finish(ck, small, tmp_path, monkeypatch):
    """Makes a run of a tiny network on 50 images; what it has written, by name."""
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)
    monkeypatch.setitem(ck.MODELS, "krizhevsky", tiny_network)

    def finish(*flags: object) -> SimpleNamespace:
        data = ("--dataset", small, "--val-size", 150, "--output-dir", "run")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        result = call(*data, "--precision", "fp32", "--compile", "off", *flags, cwd=tmp_path)
        assert result.code == 0, result.err
        with open(tmp_path / "run" / "metrics.csv", newline="") as file:
            rows = [*csv.DictReader(file)]
        return SimpleNamespace(
            metrics={key: [float(row[key] or "nan") for row in rows] for key in rows[0]},
            summary=json.loads((tmp_path / "run" / "summary.json").read_text()),
            best=torch.load(tmp_path / "run" / "best.pt"),
            last=torch.load(tmp_path / "run" / "last.pt"),
        )

    return finish


@pytest.fixture
def linear() -> nn.Module:
    """A user's own network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


@pytest.fixture(scope="module")
def loader(ck):
    """203 images of noise in their order, in batches of which the last is short."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (203, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (203,), generator=generator)
    return ck.CifarLoader(images, labels, [*"abcdefghij"], (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 100)


def two_colors(count: int) -> TensorDataset:
    """Noise around one of two colors, and which of the two."""
    labels = torch.arange(count) % 2
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + (2 * labels - 1).view(-1, 1, 1, 1), labels)


def test_the_rate_drops_after_30_60_and_80_percent_of_the_epochs(ck):
    assert ck.resolve_milestones(ck.Config().milestones, 200) == [60, 120, 160]
    assert ck.resolve_milestones([7, 2, 0.25, 7], 8) == [2, 7]  # in order, and once
    for epochs in range(1, 40):
        drops = ck.resolve_milestones(ck.Config().milestones, epochs)
        assert drops == sorted({max(1, round(share * epochs)) for share in (0.3, 0.6, 0.8)})


RATES = {
    "--epochs 1": [0.01],
    "--epochs 5": [0.01, 0.01, 0.001, 0.0001, 0.00001],
    "--epochs 4 --milestones 3 1 --gamma 0.5 --lr 0.08": [0.08, 0.04, 0.04, 0.02],
    "--epochs 2 --milestones 9": [0.01, 0.01],
}


@pytest.mark.parametrize(("flags", "rates"), RATES.items())
def test_a_run_has_the_learning_rates_of_its_schedule(finish, flags, rates):
    metrics = finish("--no-test", *flags.split()).metrics
    assert metrics["epoch"] == [*range(1, len(rates) + 1)]
    assert metrics["learning_rate"] == pytest.approx(rates, rel=1e-9)


def test_the_loss_of_an_epoch_is_the_mean_over_images_not_over_batches(ck, linear):
    images, labels = two_colors(9).tensors
    images[8] *= 50  # alone in the last batch, with a loss far from the others'
    batches = DataLoader(TensorDataset(images, labels), 4)
    frozen = torch.optim.SGD(linear.parameters(), lr=0.0)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
    loss, accuracy = ck.train_one_epoch(linear, batches, criterion, frozen, "cpu")
    logits = linear(images)
    assert loss == pytest.approx(criterion(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == labels).sum().item() / 9)


def test_an_epoch_is_plain_sgd_over_its_batches(ck, loader, linear):
    twin = copy.deepcopy(linear)
    options = {"lr": 0.001, "momentum": 0.9, "weight_decay": 5e-4}
    first, second = (torch.optim.SGD(net.parameters(), **options) for net in (linear, twin))
    ck.train_one_epoch(linear, loader, nn.CrossEntropyLoss(), first, "cpu")
    for images, labels in loader:
        second.zero_grad()
        nn.functional.cross_entropy(twin(images), labels).backward()
        second.step()
    assert_close(linear.state_dict(), twin.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_learns_in_both_precisions_from_a_plain_dataloader(ck, precision):
    model = ck.build_model(ck.Config(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    criterion, types, batches = nn.CrossEntropyLoss(), set(), DataLoader(two_colors(24), 4)
    model.fc1.register_forward_hook(lambda *call: types.add(call[2].dtype))
    for _ in range(2):
        ck.train_one_epoch(model, batches, criterion, optimizer, "cpu", precision)
    evaluation = ck.evaluate_model(model, batches, criterion, "cpu", precision=precision)
    assert (evaluation.loss < 0.3, evaluation.top1) == (True, 100)
    assert types == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "network"), [(1, "krizhevsky"), (7, "compact"), (300, "five-conv")]
)
def test_any_batch_size_trains_and_a_last_batch_of_one_image(ck, size, network):
    labels = torch.arange(size + 1) % 2
    images = torch.randint(0, 256, (len(labels), 3, 32, 32), dtype=torch.uint8)
    loader = ck.CifarLoader(
        images, labels, ["a", "b"], (0.5,) * 3, (0.3,) * 3, size, shuffle=True, augment="crop-flip"
    )
    model = ck.build_model(ck.Config(model=network), 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    assert [len(labels) for _, labels in loader] == [size, 1]
    loss, _ = ck.train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, "cpu")
    assert loss == pytest.approx(math.log(2), abs=0.7)
    assert all((a != b).any() for a, b in zip(model.parameters(), before.parameters()))


def test_weights_that_the_last_step_of_an_epoch_ruins_are_an_error(ck, linear):
    images, labels = two_colors(12).tensors
    batches, optimizer = [(1e3 * images, labels)], torch.optim.SGD(linear.parameters(), 3e38)
    with pytest.raises(ck.UserError, match=r"learning rate 3e\+38\b"):
        ck.train_one_epoch(linear, batches, nn.CrossEntropyLoss(), optimizer, "cpu")


def test_a_diverging_run_ends_in_one_line_and_keeps_its_last_finished_epoch(small, tmp_path):
    flags = ("--dataset", small, "--val-size", 150, "--compile", "off", "--output-dir", "run")
    flags += ("--epochs", 3, "--milestones", 1, "--gamma", 1e30, "--batch-size", 20)
    message = one_line_error(call(*flags, cwd=tmp_path), code=1)
    assert "learning rate 1e+28" in message and "--lr" in message
    last = torch.load(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 1
    assert all(weight.isfinite().all() for weight in last["model"].values())


@pytest.mark.parametrize("classes", [10, 3])  # of three, all are in the top 5
def test_evaluation_is_the_straightforward_computation(ck, loader, classes):
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
    images, labels = torch.cat([images for images, _ in loader]), loader.labels % classes
    batches = DataLoader(TensorDataset(images, labels), 100)
    model = nn.Sequential(nn.Dropout(0.5), *linear).train()  # drops nothing in an evaluation
    evaluation = ck.evaluate_model(model, batches)
    with torch.no_grad():
        expected = linear(images).double().log_softmax(1)
    truth = expected[torch.arange(203), labels]
    rank = (expected > truth[:, None]).sum(1)  # of the true class, from 0
    assert evaluation.loss == pytest.approx(-truth.mean().item(), rel=1e-5)
    for k, accuracy in ((1, evaluation.top1), (3, evaluation.top3), (5, evaluation.top5)):
        assert accuracy == pytest.approx(100 * (rank < k).double().mean().item(), rel=1e-6)
    output = evaluation.log_probabilities.double()
    assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_ten_views_are_the_mean_of_the_probabilities_on_ten_crops(ck, loader, linear):
    evaluation = ck.evaluate_model(linear, loader, views=ck.TEN_VIEWS)
    views = v2.TenCrop(32)(v2.functional.pad(loader.images, [4]))
    with torch.no_grad():
        batches = [v2.functional.normalize(view / 255, loader.mean, loader.std) for view in views]
        mean = torch.stack([linear(batch).double().softmax(1) for batch in batches]).mean(0)
    output = evaluation.log_probabilities.double()
    assert_close(output.exp(), mean, atol=1e-6, rtol=1e-4)
    hits = mean.argmax(1) == loader.labels
    assert evaluation.top1 == pytest.approx(100 * hits.double().mean().item(), rel=1e-6)
    loss = -mean[torch.arange(203), loader.labels].log().mean().item()
    assert evaluation.loss == pytest.approx(loss, rel=1e-5)


def test_wilson_interval_has_the_known_values(ck):
    assert ck.wilson_interval(10, 100) == pytest.approx((5.522914, 17.436566), abs=1e-4)
    assert ck.wilson_interval(0, 20) == pytest.approx((0, 16.112515), abs=1e-4)
    assert ck.wilson_interval(100, 20) == pytest.approx((83.887485, 100), abs=1e-4)


@pytest.mark.parametrize(("select", "best"), [("accuracy", 4), ("loss", 2)])
def test_best_pt_is_of_equal_accuracy_the_one_with_the_lower_loss_and_is_what_is_tested(
    ck, finish, small, tmp_path, monkeypatch, select, best
):
    validations = [(1.0, 50.0), (0.8, 40.0), (0.9, 60.0), (0.8, 60.0)]
    script, weights, evaluate = iter(validations), [], ck.evaluate_model

    def scripted(model, *args, **options):
        evaluation = evaluate(model, *args, **options)
        weights.append(copy.deepcopy(model.state_dict()))
        loss, top1 = next(script, evaluation[:2])
        return evaluation._replace(loss=loss, top1=top1)

    monkeypatch.setattr(ck, "evaluate_model", scripted)
    finished = finish("--epochs", 4, "--milestones", 4, "--select", select)
    assert [*zip(*(finished.metrics[key] for key in ("val_loss", "val_accuracy")))] == validations
    assert finished.summary["best_epoch"] == finished.best["epoch"] == best
    assert finished.summary["best_val_accuracy"] == validations[best - 1][1]
    assert_close(finished.best["model"], weights[best - 1], rtol=0, atol=0)
    assert_close(finished.last["model"], weights[3], rtol=0, atol=0)
    model, _ = ck.load_trained(tmp_path / "run" / "best.pt", "cpu")
    *_, test_loader = ck.get_cifar_data_loaders(dataset_name=str(small))
    loss = evaluate(model, test_loader).loss
    assert finished.summary["test_loss"] == pytest.approx(loss, rel=1e-6)


def test_the_validation_loss_is_not_smoothed(ck, finish, small, tmp_path):
    finished = finish("--epochs", 1, "--label-smoothing", 0.5)
    model, _ = ck.load_trained(tmp_path / "run" / "best.pt")
    _, val_loader, _ = ck.get_cifar_data_loaders(dataset_name=str(small), val_size=150)
    loss = ck.evaluate_model(model, val_loader).loss
    assert finished.metrics["val_loss"] == pytest.approx([loss], rel=1e-5)


def test_a_recipe_sets_what_no_flag_overrides_and_keeps_its_name_only_then(ck, finish):
    summary = finish("--recipe", "quick", "--no-test").summary
    assert summary["recipe"] == "quick"
    expected = ck.RECIPES["quick"] | {"milestones": [3]}  # 75 % of 4
    assert {name: summary[name] for name in expected} == expected
    finished = finish("--recipe", "best", "--epochs", 4, "--lrn-k", 3, "--no-test")
    assert (finished.summary["recipe"], finished.summary["milestones"]) == (None, [2, 3, 4])
    assert finished.metrics["learning_rate"] == pytest.approx([0.05, 0.05, 0.005, 0.0005])
    assert (finished.summary["lrn_k"], finished.summary["dropout"]) == (3, 0.3)


def test_every_hyperparameter_reaches_every_epoch(ck, small, tmp_path, monkeypatch):
    seen, batches = {}, []

    def look(model, dataloader, criterion, optimizer, device, precision):
        batches.append(next(iter(dataloader))[0])
        if len(batches) == 2:
            raise KeyboardInterrupt
        norm, group = model.norm2, optimizer.param_groups[0]
        assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert {*map(id, group["params"])} == {*map(id, model.parameters())}
        seen.update({name: group[name] for name in ("lr", "momentum", "weight_decay", "nesterov")})
        seen.update(smoothing=criterion.label_smoothing, precision=precision)
        seen.update(dropout=model.dropout2.p, lrn=(norm.size, norm.alpha, norm.beta, norm.k))
        optimizer.step()  # the scheduler wants one
        return 1.0, 10.0

    monkeypatch.setattr(ck, "train_one_epoch", look)
    network = "--dropout 0.25 --lrn-size 3 --lrn-alpha 0.5 --lrn-beta 0.6 --lrn-k 1.5"
    sgd = "--lr 0.25 --momentum 0.8 --weight-decay 0.02 --label-smoothing 0.1 --batch-size 7"
    flags = [*network.split(), *sgd.split(), "--inputs", "0-255", "--seed", "3"]
    flags += ["--dataset", str(small), "--precision", "bf16", "--compile", "off"]
    expected = ck.build_model(ck.parse_arguments(flags)[0], 10)
    assert call(*flags, cwd=tmp_path).code == 130
    assert seen == {
        "lr": 0.25, "momentum": 0.8, "weight_decay": 0.02, "nesterov": False, "smoothing": 0.1,
        "precision": "bf16", "dropout": 0.25, "lrn": (3, 0.5, 0.6, 1.5),
    }  # fmt: skip
    train_loader, *_ = ck.get_cifar_data_loaders(7, str(small), seed=3, inputs="0-255")
    for epoch, images in enumerate(batches, start=1):
        train_loader.set_epoch(epoch)
        assert torch.equal(images, next(iter(train_loader))[0])


def test_the_flag_deterministic_asks_pytorch_for_it(finish, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    for flags, expected in (((), []), (("--deterministic",), [True])):
        finish("--epochs", 1, "--no-test", *flags)
        assert asked == expected


def test_precision_is_bf16_where_the_hardware_computes_in_it(ck, monkeypatch):
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
    for capability, chosen in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert ck.choose_precision("auto", cuda) == chosen
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for supported in ((True, False), (False, True), (False, False)):
        for name, value in zip(checks, supported):
            monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
        assert ck.choose_precision("auto", cpu) == ("bf16" if any(supported) else "fp32")
    assert ck.choose_precision("auto", mps) == "fp32"
    assert [ck.choose_precision("bf16", device) for device in (cpu, cuda, mps)] == ["bf16"] * 3
