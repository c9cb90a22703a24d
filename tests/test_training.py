"""Schedule, training, evaluation, and the use of the module in other people's code."""

import copy
import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL_RUN, one_line_error, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

CPU = torch.device("cpu")
CLASSES = [str(label) for label in range(10)]


@pytest.fixture(scope="module")
def loader(ck):
    """503 images of noise in their order, in batches of which the last is short."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (503, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (503,), generator=generator)
    return ck.CifarLoader(images, labels, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), batch_size=100)


@pytest.fixture
def linear():
    """Somebody else's network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))


@pytest.fixture
def in_process(ck, monkeypatch, tmp_path):
    """The command line in this process, on the smallest synthetic data; returns what it wrote."""

    def in_process(*arguments: str) -> tuple[list[dict], dict]:
        monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (60, 20))
        monkeypatch.setattr(ck, "save_pictures", lambda *_: [])
        folder = tmp_path / "out"
        command = ["--dataset", "synthetic", "--val-size", "20", "--compile", "off", "--precision", "fp32"]
        assert ck.main([*command, *arguments, "--output-dir", str(folder)]) == 0
        with open(folder / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file)), json.loads((folder / "summary.json").read_text())

    return in_process


def all_of(loader) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*loader))


def separable(count: int = 96) -> TensorDataset:
    """Noise around one of two colours, and which of the two."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    return TensorDataset(
        torch.randn(count, 3, 32, 32, generator=generator) + (2 * labels - 1).view(-1, 1, 1, 1), labels
    )


# ----------------------------------------------------------------------------------------------------------------------
# Schedule
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "drops"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2]), (4, [1, 2, 3]), (10, [3, 6, 8]), (100, [30, 60, 80]), (200, [60, 120, 160])],
)
def test_the_rate_drops_after_30_60_and_80_percent_of_the_epochs(ck, epochs, drops):
    assert ck.drop_epochs(ck.Config(epochs=epochs)) == drops


@pytest.mark.parametrize("epochs", range(1, 60))
def test_no_milestone_is_0_or_doubled_or_beyond_the_end(ck, epochs):
    drops = ck.drop_epochs(ck.Config(epochs=epochs))
    assert drops == sorted(set(drops)) and drops[0] >= 1 and drops[-1] <= epochs


def test_given_milestones_are_taken_in_order_and_once(ck):
    assert ck.drop_epochs(ck.Config(epochs=10, milestones=[7, 2, 7])) == [2, 7]


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        (["--epochs", "1"], [0.01]),
        (["--epochs", "3"], [0.01, 0.001, 0.0001]),
        (["--epochs", "5"], [0.01, 0.01, 0.001, 0.0001, 0.00001]),
        (["--epochs", "4", "--milestones", "1", "3"], [0.01, 0.001, 0.001, 0.0001]),
        (["--epochs", "3", "--milestones", "9"], [0.01, 0.01, 0.01]),
        (["--epochs", "3", "--milestones", "1", "2", "--gamma", "0.5", "--lr", "0.08"], [0.08, 0.04, 0.02]),
    ],
    ids=str,
)
def test_learning_rates_are_those_of_the_schedule(in_process, arguments, rates):
    metrics, _ = in_process(*arguments)
    assert [int(row["epoch"]) for row in metrics] == list(range(1, len(rates) + 1))
    assert [float(row["learning_rate"]) for row in metrics] == pytest.approx(rates, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def test_the_loss_of_an_epoch_is_the_mean_over_images_not_over_batches(ck, linear):
    data = separable(9)
    data.tensors[0][8] *= 50  # the last batch holds this image alone, and its loss is far from the others'
    frozen = torch.optim.SGD(linear.parameters(), lr=0.0)
    batches = DataLoader(data, batch_size=4)
    loss, accuracy = ck.train_one_epoch(linear, batches, nn.CrossEntropyLoss(), frozen, "cpu")
    with torch.no_grad():
        logits = linear(data.tensors[0])
        losses = nn.functional.cross_entropy(logits, data.tensors[1], reduction="none")
    over_batches = torch.stack([part.mean() for part in losses.split(4)]).mean().item()
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert abs(over_batches - loss) > 0.5
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == data.tensors[1]).float().mean().item())


def test_an_epoch_is_plain_sgd_over_its_batches(ck, loader, linear):
    twin = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    twin.load_state_dict(linear.state_dict())
    first, second = (
        torch.optim.SGD(model.parameters(), 0.001, momentum=0.9, weight_decay=5e-4) for model in (linear, twin)
    )
    ck.train_one_epoch(linear, loader, nn.CrossEntropyLoss(), first, "cpu")
    for images, labels in loader:
        second.zero_grad()
        nn.functional.cross_entropy(twin(images), labels).backward()
        second.step()
    torch.testing.assert_close(linear.state_dict(), twin.state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_network_learns_in_both_precisions(ck, precision):
    model = ck.build_model(ck.Config(), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    batches = DataLoader(separable(), batch_size=16)
    losses = [
        ck.train_one_epoch(model, batches, nn.CrossEntropyLoss(), optimizer, "cpu", precision)[0] for _ in range(4)
    ]
    assert losses[0] > 0.4
    assert losses[-1] < 0.1
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 2, 7, 1024])
def test_any_batch_size_trains_and_the_last_batch_of_a_single_image_too(ck, batch_size):
    count, classes = batch_size + 1, ["a", "b"]
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loader = ck.CifarLoader(images, torch.arange(count) % 2, classes, (0.5,) * 3, (0.25,) * 3, batch_size, augment=True)
    model = ck.build_model(ck.Config(), 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    assert [len(labels) for _, labels in loader] == [batch_size, 1]
    loss, accuracy = ck.train_one_epoch(model, loader, nn.CrossEntropyLoss(), optimizer, "cpu", "bf16")
    assert loss == pytest.approx(math.log(2), abs=0.05) and 0 <= accuracy <= 100
    assert all((a != b).any() for a, b in zip(model.parameters(), before.parameters()))
    assert ck.predict(model, loader, "bf16").exp().sum(1).tolist() == pytest.approx([1] * count, abs=1e-5)


def test_a_loss_that_is_not_finite_names_the_step_and_the_learning_rate(ck, linear):
    images, labels = separable(12).tensors
    images[9] = float("nan")
    batches = DataLoader(TensorDataset(images, labels), batch_size=4)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.025)
    with pytest.raises(ck.Problem, match=r"step 3\b.*learning rate 0\.025\b"):
        ck.train_one_epoch(linear, batches, nn.CrossEntropyLoss(), optimizer, "cpu")


def test_training_stops_at_the_first_step_whose_loss_is_not_finite(ck, linear):
    images, labels = separable(4).tensors
    steps = []

    def batches():
        for number in range(5):
            steps.append(number)
            yield images * (float("inf") if number == 1 else 1), labels

    with pytest.raises(ck.Problem, match=r"step 2\b"):
        ck.train_one_epoch(
            linear, batches(), nn.CrossEntropyLoss(), torch.optim.SGD(linear.parameters(), lr=0.1), "cpu"
        )
    assert steps == [0, 1]


def test_a_run_whose_loss_is_not_finite_ends_in_one_line_and_keeps_its_last_epoch(tmp_path):
    result = run(*SMALL_RUN, "--lr", "1e12", "--output-dir", "out", cwd=tmp_path)
    message = one_line_error(result)
    assert "learning rate 1e+12" in message and "epoch 1" in message and "step" in message and "--lr" in message
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["epoch"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


def test_evaluation_is_the_straightforward_computation(ck, loader, linear):
    evaluation = ck.evaluate_model(linear, loader)
    with torch.no_grad():
        log_probabilities = linear(all_of(loader)[0]).double().log_softmax(1)
    truth = log_probabilities[torch.arange(503), loader.labels]
    rank = (log_probabilities > truth[:, None]).sum(1)  # how many classes are likelier than the true one
    assert evaluation.loss == pytest.approx(-truth.mean().item(), rel=1e-5)
    for k, accuracy in ((1, evaluation.top1), (3, evaluation.top3), (5, evaluation.top5)):
        assert accuracy == pytest.approx(100 * (rank < k).double().mean().item(), rel=1e-6)
    torch.testing.assert_close(evaluation.log_probabilities.double(), log_probabilities, atol=1e-5, rtol=1e-5)


def test_with_three_classes_the_true_one_is_always_in_the_top_5(ck, loader):
    few = ck.CifarLoader(loader.images, loader.labels % 3, CLASSES[:3], loader.mean, loader.std)
    evaluation = ck.evaluate_model(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), few)
    assert evaluation.top1 < 60
    assert evaluation.top3 == evaluation.top5 == pytest.approx(100)


@pytest.mark.parametrize("views", [1, 10])
def test_evaluation_sees_every_image_once_per_view(ck, loader, linear, views):
    seen = []
    linear.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].clone()))
    evaluation = ck.evaluate_model(linear, loader, views=ck.TEN_VIEWS if views == 10 else None)
    assert sum(map(len, seen)) == 503 * views
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 503 * views
    assert evaluation.log_probabilities.shape == (503, 10)


def test_multi_view_is_the_mean_of_the_probabilities_of_the_ten_views(ck, loader, linear):
    evaluation = ck.evaluate_model(linear, loader, views=ck.TEN_VIEWS)
    views = v2.TenCrop(32)(v2.functional.pad(loader.images, [4]))
    with torch.no_grad():
        batches = [v2.functional.normalize(view / 255, loader.mean, loader.std) for view in views]
        mean = torch.stack([linear(batch).double().softmax(1) for batch in batches]).mean(0)
    torch.testing.assert_close(evaluation.log_probabilities.double().exp(), mean, atol=1e-6, rtol=1e-4)
    assert evaluation.top1 == pytest.approx(100 * (mean.argmax(1) == loader.labels).double().mean().item(), rel=1e-6)
    assert evaluation.loss == pytest.approx(-mean[torch.arange(503), loader.labels].log().mean().item(), rel=1e-5)


def test_evaluation_trains_nothing_and_drops_nothing_out(ck, loader):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(3072), nn.Linear(3072, 10)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = ck.evaluate_model(model, loader), ck.evaluate_model(model, loader)
    assert torch.equal(first.log_probabilities, second.log_probabilities)
    assert not first.log_probabilities.requires_grad
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("errors", "count", "low", "high"),
    [
        (10, 100, 5.522914, 17.436566),
        (50, 100, 40.383153, 59.616847),
        (0, 10, 0, 27.753279),
        (5, 5, 56.551751, 100),
        (0, 20, 0, 16.112515),
        (20, 20, 83.887485, 100),
    ],
)
def test_wilson_interval_has_the_known_values(ck, errors, count, low, high):
    interval = ck.wilson_interval(100 * errors / count, count)
    assert interval == pytest.approx((low, high), abs=1e-4)
    assert 0 <= interval[0] < interval[1] <= 100


def test_the_ends_of_wilsons_interval_are_the_rates_that_the_measured_one_just_does_not_contradict(ck):
    count, measured = 10_000, 0.15
    for end in ck.wilson_interval(100 * measured, count):
        rate = end / 100
        assert abs(measured - rate) == pytest.approx(1.959964 * (rate * (1 - rate) / count) ** 0.5, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Choice of the epoch
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("select", "best"), [("accuracy", 3), ("loss", 2)])
def test_the_best_epoch_has_the_highest_accuracy_or_the_lowest_loss(ck, in_process, monkeypatch, select, best):
    figures = [(1.0, 50.0), (0.8, 40.0), (0.9, 60.0), (0.8, 60.0)]  # the last only equals them: the first one counts
    evaluations = iter(figures)

    def scripted(model, *arguments):
        loss, accuracy = next(evaluations, figures[best - 1])
        return evaluate(model, *arguments)._replace(loss=loss, top1=accuracy)

    evaluate = ck.evaluate_model
    monkeypatch.setattr(ck, "evaluate_model", scripted)
    metrics, summary = in_process("--epochs", "4", "--select", select)
    assert [(float(row["val_loss"]), float(row["val_accuracy"])) for row in metrics] == figures
    assert (summary["best_epoch"], summary["best_val_accuracy"]) == (best, figures[best - 1][1])


def test_best_pt_is_the_network_of_the_best_epoch(ck, in_process, monkeypatch, tmp_path):
    weights, evaluate = [], ck.evaluate_model

    def remembering(model, *arguments):
        weights.append(ck.weights_of(model))
        return evaluate(model, *arguments)._replace(top1=[50.0, 70.0, 60.0, 0.0, 0.0, 0.0][len(weights) - 1])

    monkeypatch.setattr(ck, "evaluate_model", remembering)
    in_process("--epochs", "3")
    best, last = (torch.load(tmp_path / "out" / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert best["epoch"] == 2
    torch.testing.assert_close(best["model"], weights[1], atol=0, rtol=0)
    torch.testing.assert_close(last["model"], weights[2], atol=0, rtol=0)
    for evaluated, epoch in zip(weights[3:], (1, 1, 2), strict=True):  # on the test set: best, best in ten views, last
        torch.testing.assert_close(evaluated, weights[epoch], atol=0, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Hardware
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bf16", "amx", "chosen"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")]
)
def test_precision_on_a_cpu_is_bf16_where_it_computes_in_it(ck, monkeypatch, bf16, amx, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert ck.choose_precision("auto", CPU) == chosen


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_on_a_gpu_is_bf16_from_ampere_on(ck, monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ck.choose_precision("auto", torch.device("cuda", 0)) == chosen


def test_a_precision_that_is_asked_for_is_taken(ck):
    for device in ("cpu", "cuda", "mps"):
        for precision in ("fp32", "bf16"):
            assert ck.choose_precision(precision, torch.device(device)) == precision
    assert ck.choose_precision("auto", torch.device("mps")) == "fp32"


def test_every_hyperparameter_reaches_the_training(ck, monkeypatch):
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (60, 20))
    flags = "--dataset synthetic --val-size 20 --compile off --inputs 0-255 --batch-size 7 --seed 3"
    sgd = "--lr 0.25 --momentum 0.8 --weight-decay 0.02 --gamma 0.5 --milestones 4 2"
    config, _ = ck.parse_arguments([*flags.split(), *sgd.split(), "--output-dir", "run"])
    run = ck.prepare(config, {})
    (group,) = run.optimizer.param_groups
    assert [group[name] for name in ("lr", "momentum", "weight_decay")] == [0.25, 0.8, 0.02]
    assert not group["nesterov"] and not group["dampening"]
    assert {*map(id, group["params"])} == {*map(id, run.model.parameters())}
    assert (run.scheduler.gamma, sorted(run.scheduler.milestones)) == (0.5, [2, 4])
    assert (run.train_loader.seed, run.train_loader.batch_size) == (3, 7)
    for loader in (run.train_loader, run.val_loader, run.test_loader):
        assert loader.std == (1 / 255,) * 3


def test_the_flag_deterministic_asks_pytorch_for_it(ck, in_process, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    in_process("--epochs", "1", "--no-test")
    assert asked == []
    in_process("--epochs", "1", "--no-test", "--deterministic", "--overwrite")
    assert asked == [True]


# ----------------------------------------------------------------------------------------------------------------------
# Use in other people's code
# ----------------------------------------------------------------------------------------------------------------------

STATE = """
import os, random, signal, sys, threading, warnings
import numpy, torch
sys.path.insert(0, {root!r})
sys.argv = ["other.py", "--no-such-flag", "--help"]

def state():
    return {{
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "streams": (sys.stdout.errors, sys.stderr.errors),
        "warnings": list(warnings.filters),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "backends": (torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled, torch.backends.mkldnn.enabled),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "cuda": torch.cuda.is_initialized(),
        "files": sorted(os.listdir()),
        "slow modules": {{"matplotlib", "torchvision", "torch._dynamo", "tensorboard"}} & {{*sys.modules}},
    }}

before = state()
import cifar_krizhevsky
after = state()
print([name for name in before if before[name] != after[name]], "matplotlib" in sys.modules)
"""


def test_importing_the_module_does_nothing(tmp_path):
    result = subprocess.run(
        [sys.executable, "-B", "-c", STATE.format(root=str(ROOT))], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.stdout, result.stderr, result.returncode) == ("[] False\n", "", 0)


@pytest.mark.parametrize("batches", [DataLoader, list], ids=["DataLoader", "list"])
def test_training_takes_any_network_any_optimizer_and_any_batches(ck, linear, batches):
    dataloader = DataLoader(separable(), batch_size=10, shuffle=True)
    dataloader = dataloader if batches is DataLoader else list(dataloader)
    optimizer = torch.optim.Adam(linear.parameters(), 0.001)
    losses = [ck.train_one_epoch(linear, dataloader, nn.CrossEntropyLoss(), optimizer, "cpu")[0] for _ in range(3)]
    assert losses[-1] < 0.5 * losses[0]


def test_training_takes_another_loss(ck, linear):
    optimizer = torch.optim.SGD(linear.parameters(), 0.0)
    loss, _ = ck.train_one_epoch(
        linear, DataLoader(separable(), batch_size=10), nn.CrossEntropyLoss(label_smoothing=0.5), optimizer, "cpu"
    )
    images, labels = separable().tensors
    assert loss == pytest.approx(nn.functional.cross_entropy(linear(images), labels, label_smoothing=0.5).item(), 1e-5)


def test_the_normalisation_serves_in_another_network(ck):
    model = nn.Sequential(nn.Conv2d(3, 7, 3), ck.LocalResponseNormalization(3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.002)
    losses = [
        ck.train_one_epoch(model, DataLoader(separable(), batch_size=16), nn.CrossEntropyLoss(), optimizer, "cpu")[0]
        for _ in range(4)
    ]
    assert losses[-1] < 0.5 * losses[0]
