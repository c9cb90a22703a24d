"""Pictures of one's own as a data set: layouts, gray of many bits, identity, size, and what is said of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import call, one_line_error
from PIL import Image

FLAGS = ("--epochs", 1, "--batch-size", 4, "--compile", "off", "--device", "cpu")


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    """Write an array as a picture, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_set(folder: Path, *classes: str, **counts: int) -> Path:
    """A data set with so many pictures of each class in each part; each class has its color."""
    chance = np.random.default_rng(0)
    for part, count in (counts or {"train": 10, "test": 5}).items():
        for label, name in enumerate(classes):
            for number in range(count):
                color = np.full((32, 32, 3), 20 + 200 * label // len(classes), np.uint8)
                noise = chance.integers(0, 20, color.shape, np.uint8)
                write(folder / part / name / f"{number:02}.png", color + noise)
    return folder


@pytest.fixture(autouse=True)
def no_plots(ck, monkeypatch):
    monkeypatch.setattr(ck, "save_plot", lambda *_: None)


def train(dataset: Path, *flags: object, cwd: Path) -> str:
    """What a short training prints."""
    result = call("--dataset", dataset, *FLAGS, *flags, cwd=cwd)
    assert result.code == 0, result.err
    return result.out


def refusal(dataset: Path, *flags: object, cwd: Path) -> str:
    message = one_line_error(call("--dataset", dataset, *FLAGS, *flags, cwd=cwd))
    assert not (cwd / "runs").exists()
    return message


def notes(out: str) -> list[str]:
    return re.findall("(?m)^note: .*", out)


# Layouts


def test_val_is_the_validation_set(ck, tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, val=3, test=5)
    out = train(data, "--output-dir", "run", cwd=tmp_path)
    assert "20 training, 6 validation, 10 test images of 2 classes" in out and notes(out) == []
    expected = [ck.read_picture(path) for path in sorted((data / "val").rglob("*.png"))]
    _, val_loader, _ = ck.get_cifar_data_loaders(dataset_name=str(data))
    assert all((val_loader.images[i] == image).all() for i, image in enumerate(expected))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["val_size"], summary["train_images"]) == (6, 20)
    assert call("--resume", "run", "--epochs", 2, cwd=tmp_path).code == 0


def test_a_validation_size_beside_val_is_refused_and_one_of_a_recipe_is_a_note(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, val=3, test=5)
    for size in (0, 3, 6):
        message = refusal(data, "--val-size", size, cwd=tmp_path)
        assert f"--val-size {size}" in message and str(data / "val") in message
    (note,) = notes(train(data, "--recipe", "best", cwd=tmp_path))
    assert "val/ is the validation set" in note


def test_a_class_without_validation_images_is_named_and_one_that_is_not_trained_refused(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, val=3, test=5)
    shutil.rmtree(data / "val" / "b")
    assert notes(train(data, cwd=tmp_path)) == ["note: no validation images of b"]
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(data / "val" / "a", data / "val" / "c")
    message = refusal(data, cwd=tmp_path)
    assert "(c)" in message and "DIR/val/CLASS" in message


def test_without_test_pictures_there_is_training_with_no_test(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10)
    message = refusal(data, cwd=tmp_path)
    assert str(data / "test") in message and "--no-test" in message
    assert "DIR/train/CLASS" in message and "DIR/test/CLASS" in message
    assert "18 training, 2 validation, 0 test images" in train(data, "--no-test", cwd=tmp_path)


@pytest.mark.parametrize(
    ("moves", "named"),
    [
        ({"train": "."}, "train"),  # DIR/CLASS
        ({"train": "Train", "test": "Test"}, "Test"),
        ({"train": "training"}, "training"),
        ({"val": "valid"}, "valid"),
        ({"train": "set/train", "test": "set/test"}, "set/train"),  # an archive in a folder
        ({"train/a": "a/train", "train/b": "b/train"}, "no pictures in"),
        ({"train/a": "train/images/a", "train/b": "train/images/b"}, "one class (images)"),
        ({"test/a": "elsewhere"}, "(a)"),
        ({"test/a/00.png": "test/00.png", "test/a": "a", "test/b": "b"}, "1 pictures"),
        ({"train/a": "elsewhere"}, "one class (b)"),
    ],
)
def test_another_layout_is_refused_in_a_line_that_shows_the_right_one(moves, named, tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=2, val=1, test=1)
    for old, new in moves.items():
        (data / new).parent.mkdir(parents=True, exist_ok=True)
        if new == ".":
            shutil.copytree(data / old, data, dirs_exist_ok=True)
            shutil.rmtree(data / old)
        else:
            (data / old).rename(data / new)
    message = refusal(data, cwd=tmp_path)
    assert named in message and "DIR/train/CLASS/*, DIR/test/CLASS/*" in message
