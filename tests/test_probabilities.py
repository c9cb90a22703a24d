"""What is printed as a probability: its views, its temperature, and the tables that hold it."""

import collections
import csv
import io
import json
import math
import re
import shutil
from pathlib import Path

import data_facts
import numpy as np
import pytest
import torch
from conftest import ROOT, call, quick_flags
from PIL import Image
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
def test_the_temperature_is_the_best_one_for_the_views_of_the_held_out_images(
    ck, small, longer, tmp_path
):
    flags = (*quick_flags(small), "--val-size", 100, "--no-test", "--precision", "fp32")
    finish(*flags, "--output-dir", "run", cwd=tmp_path)
    if longer:
        finish("--resume", "run/last.pt", "--epochs", 3, "--no-test", cwd=tmp_path)
    _, val_loader, _ = ck.get_cifar_data_loaders(dataset_name=str(small), val_size=100)
    assert likelihood_is_greatest(ck, tmp_path / "run" / "best.pt", val_loader)
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["temperature"] == read(tmp_path / "run" / "best.pt")["temperature"]


def test_few_held_out_images_give_no_temperature_but_a_note(trained_once, trained):
    assert read(trained / "best.pt")["temperature"] == 1  # of 20 images
    assert "note: probabilities are not calibrated: that takes 100 held-out" in trained_once[1].out


@pytest.mark.parametrize("augment", ["crop-flip", "crop"])
def test_classifier_and_image_average_the_mirror_image_where_training_flipped(
    ck, augment, small, tmp_path
):
    run = (*quick_flags(small), "--epochs", 1, "--augment", augment, "--no-test")
    fp32 = ("--precision", "fp32", "--output-dir", "run")
    assert call(*run, *fp32, cwd=tmp_path).code == 0
    best = tmp_path / "run" / "best.pt"
    torch.save(read(best) | {"temperature": 0.5}, best)
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
        temperature = ck.find_temperature(*ck.predict_logits(model, loader, views=[ck.CENTER]))
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


# What Classifier takes


def test_a_classifier_takes_paths_pictures_arrays_bytes_files_and_lists_of_them(ck, small, trained):
    classifier = ck.Classifier(trained / "best.pt", "cpu")
    path = next(small.rglob("*.png"))
    content = path.read_bytes()
    picture = Image.open(path)
    pixels = np.array(picture.convert("RGB"))
    with open(path, "rb") as file:
        sources = [path, str(path), content, io.BytesIO(content), file, picture, pixels]
        results = classifier(sources)
        singles = [classifier(source) for source in sources]
    assert classifier([]) == []
    assert len(results) == len(sources) and isinstance(results[0], dict)
    for result in results + singles:
        assert result == pytest.approx(results[0], abs=1e-6)
    assert [*singles[0].values()] == sorted(singles[0].values(), reverse=True)


def test_a_picture_that_is_passed_is_left_as_it_is(ck, trained, tmp_path):
    """Even one that has only been opened: a JPEG would be decoded smaller, a file closed."""
    Image.new("RGB", (1000, 800), "red").save(tmp_path / "a.jpg")
    classifier = ck.Classifier(trained / "best.pt", "cpu")
    with Image.open(tmp_path / "a.jpg") as picture:
        classifier(picture)
        assert picture.size == (1000, 800)
        picture.load()
    with open(tmp_path / "a.jpg", "rb") as file:
        classifier(file)
        assert not file.closed


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (5, TypeError, "int"),
        (None, TypeError, "NoneType"),
        (torch.zeros(3, 32, 32), TypeError, "Tensor"),
        ({"a": 1}, TypeError, "dict"),
        (np.zeros((32, 32), np.uint8), ValueError, r"\(32, 32\) uint8"),
        (np.zeros((3, 32, 32), np.uint8), ValueError, r"\(3, 32, 32\) uint8"),
        (np.zeros((32, 32, 3)), ValueError, "float64"),
        (np.zeros((0, 32, 3), np.uint8), ValueError, r"\(0, 32, 3\)"),
        (b"no picture", OSError, "image"),
        ("missing.png", OSError, "missing.png"),
    ],
)
def test_anything_else_is_an_error_that_says_what_it_takes(ck, wrong, error, says, trained):
    classifier = ck.Classifier(trained / "best.pt", "cpu")
    for argument in (wrong, [wrong]):
        with pytest.raises(error, match=says) as caught:
            classifier(argument)
        if error is not OSError:
            assert "(H, W, 3) uint8" in str(caught.value)


# The tables of a test


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_csv_has_for_each_picture_what_image_prints(small, trained, tmp_path):
    table = rows(trained / "predictions.csv")
    best = trained / "best.pt"
    printed = call("--checkpoint", best, "--image-dir", small / "test", "--json", cwd=tmp_path)
    by_file = {row["file"]: row["classes"] for row in json.loads(printed.out)}
    assert [row["file"] for row in table] == [*by_file] and len(table) == 50
    for row in table:
        name, probability = next(iter(by_file[row["file"]].items()))
        assert row["predicted_class"] == name
        assert float(row["probability"]) == pytest.approx(probability, abs=1e-5)
        assert row["true_class"] == Path(row["file"]).parent.name
    wrong = sum(row["true_class"] != row["predicted_class"] for row in table)
    assert read(trained / "summary.json")["test_error_with_mirror"] == pytest.approx(2 * wrong)


def test_the_temperature_reaches_the_table_of_the_test(ck, small, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "calibrate", lambda *_: 0.5)
    finish(*quick_flags(small), "--precision", "fp32", "--output-dir", "run", cwd=tmp_path)
    use = ("--checkpoint", "run/best.pt", "--image-dir", small / "test", "--json")
    printed = json.loads(call(*use, cwd=tmp_path).out)
    largest = {row["file"]: max(row["classes"].values()) for row in printed}
    table = rows(tmp_path / "run" / "predictions.csv")
    assert len(table) == 50
    for row in table:
        assert float(row["probability"]) == pytest.approx(largest[row["file"]], abs=1e-5)


def test_the_calibration_error_follows_from_predictions_csv(trained):
    bins = collections.defaultdict(list)
    for row in rows(trained / "predictions.csv"):
        p = float(row["probability"])
        bins[int(15 * p)].append(p - (row["true_class"] == row["predicted_class"]))
    expected = 100 * sum(abs(sum(gaps)) for gaps in bins.values()) / 50
    error = read(trained / "summary.json")["test_calibration_error"]
    assert error == pytest.approx(expected, abs=0.01)


def test_confusion_csv_counts_the_images_of_the_error_to_report(trained):
    table = rows(trained / "confusion.csv")
    summary = read(trained / "summary.json")
    classes = [*table[0]][1:]
    assert [row["true \\ predicted"] for row in table] == classes == [*summary["test_class_images"]]
    counts = np.array([[int(row[name]) for name in classes] for row in table])
    assert (counts.sum(1) == 5).all() and len(counts) == 10
    assert 100 - 2 * counts.trace() == pytest.approx(summary["test_error"])
    percent = 100 * counts / counts.sum(1, keepdims=True)
    assert [*summary["test_class_accuracy"].values()] == pytest.approx(percent.diagonal())
    assert len(summary["test_most_confused"]) == 10
    for pair, value in summary["test_most_confused"].items():
        true, predicted = map(classes.index, pair.split(" as "))
        assert value == pytest.approx(percent[true, predicted])


def test_evaluate_writes_the_same_tables_and_with_indices_where_no_file_is(trained, tmp_path):
    evaluate = ("--checkpoint", trained / "best.pt", "--evaluate", "--compile", "off")
    result = call(*evaluate, "--output-dir", "again", cwd=tmp_path)
    assert result.code == 0 and "predictions.csv, confusion.csv" in result.out
    for name in ("predictions.csv", "confusion.csv"):
        assert (tmp_path / "again" / name).read_text() == (trained / name).read_text()
    result = call(*evaluate, "--dataset", "cifar10-mini", "--output-dir", "mini", cwd=tmp_path)
    assert result.code == 0
    table = rows(tmp_path / "mini" / "predictions.csv")
    assert [row["index"] for row in table] == [str(i) for i in range(1000)]


def test_a_run_that_goes_on_without_a_test_keeps_no_table_of_the_shorter_one(trained, tmp_path):
    finish("--resume", "run/last.pt", "--epochs", 3, "--no-test", cwd=tmp_path)
    assert not [*trained.glob("predictions.csv")] and not [*trained.glob("confusion.csv")]


def test_a_name_that_is_not_unicode_is_in_the_table_as_it_is(ck, tmp_path):
    name = b'\xff, "a"'.decode(errors="surrogateescape")
    assert ck.save_table(tmp_path / "a.csv", [{"file": name}])
    assert b"\xff" in (tmp_path / "a.csv").read_bytes()


@pytest.mark.parametrize("blocked", [["confusion.png"], ["predictions.csv", "filters.png"]])
def test_evaluate_lists_what_it_wrote_and_the_exit_code_tells_of_the_rest(
    blocked, trained, tmp_path
):
    for name in blocked:
        (tmp_path / "out" / name).mkdir(parents=True)  # where no file can be
    evaluate = ("--checkpoint", trained / "best.pt", "--evaluate", "--compile", "off")
    result = call(*evaluate, "--output-dir", "out", cwd=tmp_path)
    assert result.code == 1
    (wrote,) = [line for line in result.out.splitlines() if line.startswith("wrote ")]
    notes = [line for line in result.out.splitlines() if line.startswith("note: ")]
    names = {"predictions.csv", "confusion.csv", "predictions.png", "confusion.png", "filters.png"}
    assert {name for name in names if name in wrote} == names - {*blocked}
    assert len(notes) == len(blocked) and all(name in "".join(notes) for name in blocked)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no file")
def test_evaluate_into_a_folder_that_cannot_be_written_claims_nothing(trained, tmp_path):
    evaluate = ("--checkpoint", trained / "best.pt", "--evaluate", "--compile", "off")
    result = call(*evaluate, "--output-dir", "/proc", cwd=tmp_path)
    assert result.code == 1 and "wrote" not in result.out
    assert "error, one view" in result.out


# Classes


@pytest.fixture
def unequal(small, tmp_path) -> Path:
    """Two classes of pictures, one with five times as many for the test."""
    folder = tmp_path / "unequal"
    for part, name, count in (
        ("train", "cat", 20), ("train", "ship", 20), ("test", "cat", 5), ("test", "ship", 1)
    ):  # fmt: skip
        (folder / part / name).mkdir(parents=True)
        for path in sorted((small / part / name).glob("*.png"))[:count]:
            shutil.copy(path, folder / part / name)
    return folder


def test_balanced_accuracy_stands_beside_the_error_where_classes_are_unequal(
    unequal, trained_once, tmp_path
):
    out = finish(*quick_flags(unequal), "--output-dir", "run", cwd=tmp_path)
    summary = read(tmp_path / "run" / "summary.json")
    mean = np.mean([*summary["test_class_accuracy"].values()])
    assert summary["test_class_images"] == {"cat": 5, "ship": 1}
    assert summary["test_balanced_accuracy"] == pytest.approx(mean)
    assert re.search(rf"balanced accuracy +{mean:.2f} %", out)
    assert "balanced accuracy" not in trained_once[1].out


def test_no_class_is_called_the_weakest_by_few_images(ck, trained_once, capsys):
    assert "too few test images of a class (5)" in trained_once[1].out
    assert "lowest accuracy" not in trained_once[1].out
    summary = read(trained_once[0] / "summary.json")
    many = dict.fromkeys(summary["test_class_images"], 1000)
    ck.print_test("many", {**summary, "test_class_images": many})
    out = capsys.readouterr().out
    assert "lowest accuracy" in out and "too few" not in out
    weakest = min(summary["test_class_accuracy"].items(), key=lambda item: item[1])
    assert re.search(rf"{weakest[0]} +{weakest[1]:.1f} %", out)


# What is published


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: str(path.parent.name))
def test_published_weights_have_a_temperature_where_images_were_held_out(ck, path):
    _, best = ck.load_trained(path, torch.device("cpu"))
    same_recipe = path.parent.with_name(f"{path.parent.name}-held-out") / "summary.json"
    if same_recipe.exists():
        assert best["temperature"] == read(same_recipe)["temperature"] != 1
    else:
        assert (best["temperature"] != 1) == (best["config"].val_size > 0)


def test_the_published_calibration_is_of_these_files_and_within_what_readme_says(ck):
    entries = json.loads((ROOT / "results" / "calibration.json").read_text())
    of_2012 = tuple(f"cifar10-{name}" for name in ("80sec", "18pct", "13pct", "11pct"))
    trained_on_all = {path for path in PUBLISHED if path.parts[-3].startswith(of_2012)}
    assert {ROOT / "results" / entry["file"] for entry in entries} == {*PUBLISHED} - trained_on_all
    for entry in entries:
        _, best = ck.load_trained(ROOT / "results" / entry["file"], torch.device("cpu"))
        assert entry["temperature"] == best["temperature"]
        if best["temperature"] != 1:
            assert entry["test"]["calibration_error_after"] < 2.1


@pytest.mark.parametrize("mirrored", [False, True])
def test_data_facts_finds_every_close_pair(mirrored):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 3, 32, 32), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-30, 31, (60, 3, 32, 32), generator=generator)  # 17.6 of RMS
    originals = images[:60].flip(3) if mirrored else images[:60]
    images[200:260] = (originals + noise).clamp(0, 255).to(torch.uint8)
    images[260] = originals[0]
    found = {(i, j): rms for i, j, rms in data_facts.close_pairs(images, mirrored)}
    expected = {(i, 200 + i) for i in range(60)} | {(0, 260)}
    if not mirrored:
        expected.add((200, 260))
    assert found.keys() == expected
    assert found[0, 260] == 0 and 15 < found[1, 201] < 20
