"""What is printed as a probability: its views, its temperature, and the tables that hold it."""

import json
import math

import pytest
import torch
from conftest import ROOT, call, quick_flags
from test_resume import finish, read
from torch import nn

PUBLISHED = sorted((ROOT / "results").rglob("best.pt"))


def by_hand(ck, checkpoint, images, temperature=None):
    """The probabilities of images (N, 3, 32, 32) uint8, by the formula of Classifier's docstring."""
    model, trained = ck.load_trained(checkpoint, torch.device("cpu"))
    mean, std = (torch.tensor(trained[name]).view(3, 1, 1) for name in ("mean", "std"))
    inputs = (images / 255 - mean) / std
    views = [inputs, inputs.flip(3)] if trained["config"].augment == "crop-flip" else [inputs]
    with torch.no_grad():
        by_view = [model(view) / (temperature or trained["temperature"]) for view in views]
    return torch.stack([logits.double().softmax(1) for logits in by_view]).mean(0)


def likelihood_is_greatest(ck, checkpoint, val_loader):
    """Whether no other temperature gives the held-out labels a greater likelihood."""
    best = read(checkpoint)["temperature"]
    picked = torch.arange(len(val_loader.labels)), val_loader.labels
    losses = {}
    for factor in (0.5, 0.8, 0.95, 0.99, 1, 1.01, 1.05, 1.25, 2):
        p = by_hand(ck, checkpoint, val_loader.images, factor * best)
        losses[factor] = -p[picked].log().mean().item()
    return best != 1 and min(losses, key=losses.get) == 1


@pytest.mark.parametrize("longer", [False, True])
def test_the_temperature_is_the_best_one_for_the_held_out_images_as_they_are_printed(
    ck, small, trained, longer, tmp_path
):
    if longer:
        finish("--resume", "run/last.pt", "--epochs", 3, "--no-test", cwd=tmp_path)
    _, val_loader, _ = ck.get_cifar_data_loaders(dataset_name=str(small))
    assert likelihood_is_greatest(ck, trained / "best.pt", val_loader)
    summary = read(trained / "summary.json")
    assert summary["temperature"] == read(trained / "best.pt")["temperature"]


@pytest.mark.parametrize("augment", ["crop-flip", "crop"])
def test_classifier_and_image_average_the_mirror_image_where_training_flipped(
    ck, augment, small, tmp_path
):
    run = (*quick_flags(small), "--epochs", 1, "--augment", augment, "--no-test")
    assert call(*run, "--output-dir", "run", cwd=tmp_path).code == 0
    best = tmp_path / "run" / "best.pt"
    paths = sorted((small / "test").rglob("*.png"))[:5]
    expected = by_hand(ck, best, torch.stack([ck.read_picture(path) for path in paths]))
    printed = call(
        "--checkpoint", best, "--image", *paths, "--json", "--show-all-probs", cwd=tmp_path
    )
    classifier = ck.Classifier(best, "cpu")
    for path, row, p in zip(paths, json.loads(printed.out), expected, strict=True):
        wanted = dict(zip(classifier.classes, p.tolist()))
        assert row["classes"] == pytest.approx(wanted, abs=1e-5)
        assert classifier(path) == pytest.approx(wanted, abs=1e-5)


def test_without_held_out_images_and_in_old_files_the_temperature_is_1(
    ck, small, trained, tmp_path
):
    run = (*quick_flags(small), "--val-size", 0, "--output-dir", "all", "--no-test")
    assert "note: probabilities are not calibrated" in finish(*run, cwd=tmp_path)
    assert read(tmp_path / "all" / "best.pt")["temperature"] == 1
    best = read(trained / "best.pt")
    del best["temperature"]
    torch.save(best, tmp_path / "old.pt")
    assert ck.Classifier(tmp_path / "old.pt", "cpu").temperature == 1


def test_a_network_without_a_mistake_on_held_out_images_does_not_become_certain(ck):
    """The likelihood alone would ask for a temperature of 0, and print 100 % for everything."""
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    images[5:] = 255
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[0] = -0.1
        model[2].weight[1] = 0.1
        model[2].bias[:] = 0
    for wrong in (0, 1):
        labels = torch.tensor([0] * 5 + [1] * 5)
        labels[:wrong] = 1
        loader = ck.CifarLoader(images, labels, ["dark", "light"], [0.5] * 3, [0.5] * 3)
        temperature = ck.find_temperature(model, loader, "fp32", [ck.CENTER])
        assert (temperature == 1) == (wrong == 0)
        assert 0.1 < temperature < 10
    # one of ten wrong: 90 % is what makes that most likely, which logits of ±0.3 / T give
    assert 1 / (1 + math.exp(-0.6 / temperature)) == pytest.approx(0.9, abs=1e-3)


def test_calibration_error_is_the_gap_between_probability_and_accuracy_by_bins(ck):
    p = torch.tensor([[0.95, 0.05], [0.96, 0.04], [0.45, 0.55], [0.41, 0.59], [0.3, 0.7]])
    labels = torch.tensor([0, 1, 1, 1, 1])
    # bins of 1/15: .95 and .96 (one right), .55 and .59 (both right), .7 (right)
    expected = 100 * (abs(1.91 - 1) + abs(1.14 - 2) + abs(0.7 - 1)) / 5
    assert ck.calibration_error(p.log(), labels) == pytest.approx(expected, rel=1e-5)
