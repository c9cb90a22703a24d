"""Pictures of one's own as a data set: layouts, gray of many bits, identity, size, and what is said of them."""

import json
import re
import shutil
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, one_line_error
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)


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
    """The notes about the data."""
    return re.findall("(?m)^note: (?!probabilities).*", out)


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
        ({"train": "."}, "set/train; a data set"),  # DIR/CLASS
        ({"train": "Train", "test": "Test"}, "Test"),
        ({"train": "training"}, "training"),
        ({"val": "valid"}, "valid"),
        ({"train": "set/train", "test": "set/test"}, "set/set/train"),  # an archive in a folder
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


# Gray of more than 8 bits


def gray_set(folder: Path, dtype: str, tops: dict[str, float]) -> Path:
    """A data set of gray TIFFs: ramps from 0 to a value by which alone the classes differ."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for name, top in tops.items():
            for number in range(count):
                ramp = chance.permutation(32 * 32).reshape(32, 32) / 1023
                write(folder / part / name / f"{number}.tif", (top * ramp).astype(dtype))
    return folder


def class_means(ck, folder: Path) -> list[float]:
    data = ck.read_dataset(str(folder))
    return [data.images[data.labels == i].double().mean().item() for i in range(2)]


@pytest.mark.parametrize(
    ("dtype", "tops"),
    [
        ("u2", {"cold": 250, "warm": 4000}),
        ("u2", {"cold": 5000, "warm": 60000}),
        ("f4", {"cold": 0.9, "warm": 14.4}),
        ("i4", {"cold": 20_000, "warm": 80_000}),
    ],
)
def test_gray_of_a_data_set_has_one_white(ck, dtype, tops, tmp_path):
    cold, warm = class_means(ck, gray_set(tmp_path / "set", dtype, tops))
    assert warm == pytest.approx(127.5, abs=1)
    assert cold == pytest.approx(warm * tops["cold"] / tops["warm"], abs=1)


def test_a_network_sees_new_gray_as_it_saw_that_of_its_training(ck, tmp_path):
    data = gray_set(tmp_path / "set", "u2", {"cold": 250, "warm": 4000})
    shutil.rmtree(data / "test" / "warm")
    shutil.copytree(data / "test" / "cold", data / "test" / "warm")  # all are cold: half is wrong
    flags = ("--output-dir", "run", "--epochs", 8, "--lr", 0.02, "--batch-size", 8)
    assert "test error 50.00 %" in train(data, *flags, cwd=tmp_path)
    use = ("--checkpoint", "run/best.pt", "--compile", "off")
    assert " 50.00 %" in call(*use, "--evaluate", cwd=tmp_path).out
    result = call(*use, "--image-dir", data / "test", "--json", cwd=tmp_path)
    rows = json.loads(result.out)
    assert {next(iter(row["classes"])) for row in rows} == {"cold"}
    classifier = ck.Classifier(tmp_path / "run" / "best.pt")
    assert classifier(rows[0]["file"]) == pytest.approx(rows[0]["classes"], abs=1e-4)
    assert "resuming" in call("--resume", "run", "--epochs", 9, cwd=tmp_path).out


def test_a_file_that_knows_no_white_takes_each_pictures_own_range_as_before(ck, tmp_path):
    data = gray_set(tmp_path / "set", "u2", {"cold": 250, "warm": 4000})
    train(data, "--output-dir", "run", cwd=tmp_path)
    path = tmp_path / "run" / "best.pt"
    best = torch.load(path)
    assert best.pop("white") == {"I": 4000.0}
    torch.save(best, path)
    cold = data / "test" / "cold" / "0.tif"
    assert ck.read_picture(cold, {"I": 4000.0}).max() == 16
    assert ck.read_picture(cold).max() == 250
    classifier = ck.Classifier(path)
    assert classifier(cold) == classifier.classify(ck.read_picture(cold)[None])[0]


def test_pictures_of_8_bits_beside_them_stay_as_they_are(ck, tmp_path):
    data = gray_set(tmp_path / "set", "u2", {"cold": 250, "warm": 4000})
    pixels = np.random.default_rng(0).integers(0, 200, (32, 32), np.uint8)
    write(data / "train" / "cold" / "8bit.png", pixels)
    images = ck.read_dataset(str(data)).images.numpy()
    assert any((image == pixels).all() for image in images)


def test_what_is_not_finite_or_negative_in_a_picture_changes_no_other(ck, tmp_path):
    data = gray_set(tmp_path / "set", "f4", {"cold": 0.5, "warm": 2.0})
    odd = np.full((32, 32), 1.0, np.float32)
    odd[0, :4] = (np.nan, np.inf, -np.inf, -5)
    write(data / "train" / "cold" / "odd.tif", odd)
    pixels = ck.read_picture(data / "train" / "cold" / "odd.tif", {"F": 2.0})[0]
    assert pixels[0, :5].tolist() == [0, 255, 0, 0, 128]
    out = train(data, "--output-dir", "run", cwd=tmp_path)
    assert len(notes(out)) == 1 and "1 pictures have values below 0" in notes(out)[0]
    assert torch.load(tmp_path / "run" / "best.pt")["white"] == {"F": 2.0}


def test_black_pictures_of_16_bits_are_black(ck, tmp_path):
    data = gray_set(tmp_path / "set", "u2", {"cold": 0, "warm": 0})
    assert ck.read_dataset(str(data)).images.max() == 0


# Class names


def test_numbered_classes_are_in_natural_order(ck, tmp_path):
    data = make_set(tmp_path / "set", "10", "11", "0", "1", "2", train=2, test=1)
    assert ck.read_dataset(str(data)).classes == ["0", "1", "2", "10", "11"]
    data = make_set(tmp_path / "other", "b10", "b9", "a", "b9 c", "C", train=2, test=1)
    assert ck.read_dataset(str(data)).classes == ["C", "a", "b9", "b9 c", "b10"]


def test_a_run_with_its_classes_in_another_order_is_evaluated_and_resumed(
    ck, tmp_path, monkeypatch
):
    names = ["0", "1", "10", "11", "2"]
    data = make_set(tmp_path / "set", *names, train=20, val=2, test=5)
    flags = ("--output-dir", "run", "--epochs", 12, "--lr", 0.03, "--batch-size", 10)
    monkeypatch.setattr(ck, "natural_order", str)
    train(data, *flags, cwd=tmp_path)
    monkeypatch.undo()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_error"] < 40 and [*summary["test_class_accuracy"]] == names
    result = call("--checkpoint", "run/best.pt", "--evaluate", "--compile", "off", cwd=tmp_path)
    assert f"{summary['test_error']:.2f} %" in result.out
    assert f"{summary['test_loss']:.4f}" in result.out
    assert call("--resume", "run", "--epochs", 13, cwd=tmp_path).code == 0
    assert torch.load(tmp_path / "run" / "best.pt")["classes"] == names


# The identity of a data set


def rewrite_with_other_pixels(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[3, 4] ^= 1
    Image.fromarray(pixels).save(path)


def test_files_that_decode_differently_are_a_note_and_other_files_are_refused(
    ck, tmp_path, monkeypatch
):
    data = make_set(tmp_path / "set", "a", "b")
    train(data, "--output-dir", "run", cwd=tmp_path)
    resume = ("--resume", "run", "--epochs")
    read_picture = ck.read_picture
    monkeypatch.setattr(ck, "read_picture", lambda *args: read_picture(*args) ^ 1)
    assert "other pixels" in "".join(notes(call(*resume, 2, cwd=tmp_path).out))
    assert "other pixels" not in call(*resume, 3, cwd=tmp_path).out
    rewrite_with_other_pixels(data / "test" / "b" / "00.png")
    assert "other images" in one_line_error(call(*resume, 4, cwd=tmp_path))


def test_a_test_that_is_there_later_tests_the_run_and_other_training_pictures_do_not(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, test=2)
    (data / "test").rename(tmp_path / "test")
    (data / "test").mkdir()  # as contests have it: pictures without classes
    shutil.copy(tmp_path / "test/a/00.png", data / "test")
    (data / "test" / ".ipynb_checkpoints").mkdir()
    train(data, "--no-test", "--output-dir", "run", cwd=tmp_path)
    shutil.rmtree(data / "test")
    (tmp_path / "test").rename(data / "test")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    result = call("--dataset", data, "--resume", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "test of the best epoch" in result.out and "other pixels" not in result.out
    assert call("--resume", "run", cwd=tmp_path).code == 0
    rewrite_with_other_pixels(data / "test" / "b" / "00.png")
    assert "other images" in one_line_error(call("--resume", "run", cwd=tmp_path))
    rewrite_with_other_pixels(data / "train" / "b" / "00.png")
    assert "other images" in one_line_error(call("--resume", "other", cwd=tmp_path))


def test_the_identity_of_cifar_are_its_pixels_as_in_published_summaries(ck):
    published = json.loads((ROOT / "results" / "cifar10-mini-128" / "summary.json").read_text())
    loaders = ck.get_cifar_data_loaders(dataset_name="cifar10-mini")
    assert ck.digest_of_pixels(*loaders) == published["data_digest"]
    assert ck.read_dataset("cifar10-mini").files_digest == ""


# Evaluation with other data


def test_a_data_set_that_is_not_where_the_run_had_it_is_said_to_be_the_files(tmp_path):
    make_set(tmp_path / "v", "a", "b")
    train("v", "--output-dir", "run", cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for use in ("--checkpoint ../run/best.pt --evaluate", "--resume ../run/last.pt"):
        message = one_line_error(call(*use.split(), cwd=tmp_path / "elsewhere"))
        assert use.split()[1] in message and "--dataset v" in message
        found = call(*use.split(), "--dataset", "../v", cwd=tmp_path / "elsewhere")
        assert found.code == 0, found.err


def test_other_pictures_in_the_same_folder_are_a_note_of_evaluate(tmp_path):
    data = make_set(tmp_path / "set", "a", "b")
    train(data, "--output-dir", "run", cwd=tmp_path)
    evaluate = ["--checkpoint", "run/best.pt", "--evaluate"]
    assert "other pictures" not in call(*evaluate, cwd=tmp_path).out
    (data / "train/a/00.png").rename(data / "test/a/99.png")
    assert "note: other pictures than the run had" in call(*evaluate, cwd=tmp_path).out


def test_other_data_is_evaluated_into_a_folder_of_its_own(ck, tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "save_plot", lambda path, *_: path.write_text("plot"))
    data = make_set(tmp_path / "set", "a", "b")
    other = make_set(tmp_path / "other", "b", "a")
    train(data, "--output-dir", "run", cwd=tmp_path)

    def drawn(*flags: object) -> list[str]:
        for path in tmp_path.rglob("*.png"):
            if path.read_bytes() == b"plot":
                path.unlink()
        use = ("--checkpoint", "run/best.pt", "--evaluate", "--compile", "off", *flags)
        assert call(*use, cwd=tmp_path).code == 0
        return [str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("filters.png")]

    moved = shutil.copytree(data, tmp_path / "moved")
    assert drawn() == drawn("--dataset", data) == drawn("--dataset", moved) == ["run"]
    assert drawn("--dataset", other) == ["run/other"]
    assert drawn("--dataset", other, "--output-dir", "new") == ["new"]


# What a data set is said to lose by


def test_small_jpegs_are_a_note_and_larger_ones_and_pngs_are_none(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, test=1)
    assert notes(train(data, cwd=tmp_path)) == []
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        picture = Image.open(path)
        if number % 2:
            picture = picture.resize((64, 40))
        picture.save(path.with_suffix(".jpg"))
        path.unlink()
    (note,) = [line for line in notes(train(data, cwd=tmp_path)) if "JPEG" in line]
    assert "10 pictures" in note and "PNG" in note


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a color, which Pillow does not write, of an array (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        length, check = len(data), zlib.crc32(kind + data)
        return struct.pack(">I", length) + kind + data + struct.pack(">I", check)

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_colors_of_16_bits_are_a_note(ck, tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, test=1)
    path = data / "train" / "a" / "deep.png"
    path.write_bytes(png_of_16_bits(np.full((32, 32, 3), 4095)))
    assert ck.read_picture(path).max() == 15
    (note,) = notes(train(data, cwd=tmp_path))
    assert "1 pictures have 16 bits for each color" in note


def test_a_picture_with_broken_metadata_is_read_and_with_broken_pixels_is_not(ck, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    path = tmp_path / "one.png"
    metadata = PngInfo()
    metadata.add_text("exif", "b'Exif")  # as some programs write it
    Image.fromarray(pixels).save(path, pnginfo=metadata)
    assert torch.equal(ck.read_picture(path), torch.from_numpy(pixels).permute(2, 0, 1))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(OSError, match=r"truncated|broken"):
        ck.read_picture(path)


def test_a_link_to_nothing_is_a_broken_picture(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, test=1)
    (data / "train" / "a" / "gone.png").symlink_to(tmp_path / "nothing.png")
    assert str(data / "train" / "a" / "gone.png") in refusal(data, cwd=tmp_path)


def test_pictures_come_in_their_order_whatever_takes_longest(ck, tmp_path, monkeypatch):
    data = make_set(tmp_path / "set", "a", "b", train=20, test=1)
    expected = ck.read_dataset(str(data))
    read_picture = ck.read_picture

    def slow_at_times(path: Path, white: dict) -> torch.Tensor:
        time.sleep(0.02 if path.stem.endswith("0") else 0)
        return read_picture(path, white)

    monkeypatch.setattr(ck, "read_picture", slow_at_times)
    found = ck.read_dataset(str(data))
    assert (
        torch.equal(found.images, expected.images) and found.files_digest == expected.files_digest
    )


def test_a_batch_of_all_training_images_is_a_note(tmp_path):
    data = make_set(tmp_path / "set", "a", "b", train=10, val=1, test=1)
    assert notes(train(data, "--batch-size", 19, cwd=tmp_path)) == []
    for size in (20, 128):
        out = train(data, "--batch-size", size, "--output-dir", f"run{size}", cwd=tmp_path)
        assert "one step" in "".join(notes(out))


def test_the_most_confused_are_the_largest_and_of_equals_the_first(ck):
    chance = torch.Generator().manual_seed(0)
    for size, values in ((2, 3), (3, 2), (7, 1), (30, 5), (30, 1000)):
        matrix = torch.randint(0, values, (size, size), generator=chance).double()
        pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
        expected = sorted(pairs, key=lambda pair: -matrix[pair])[:10]
        assert ck.most_confused(matrix) == expected


def test_a_thousand_classes_cost_no_list_of_all_pairs(ck):
    images = torch.zeros(3000, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(3000) % 1000
    classes = [f"class {number}" for number in range(1000)]
    loader = ck.CifarLoader(images, labels, classes, (0.5,) * 3, (0.25,) * 3, 500)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 1000))
    tracemalloc.start()
    metrics, *_ = ck.compute_test_metrics(model, loader, "fp32", "none", temperature=1.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(metrics["test_most_confused"]) == 10 and peak < 20e6  # the pairs alone take 80 MB
