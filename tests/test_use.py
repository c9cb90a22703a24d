"""Using a trained network: pictures of any kind, evaluation, Python, the other networks, own pictures."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, one_line_error, quick_flags
from PIL import Image
from torch import nn

BEST = ROOT / "results" / "cifar10-best" / "best.pt"
SAMPLES = ROOT / "data" / "samples"


@pytest.fixture
def no_plots(ck, monkeypatch):
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)


def classify(checkpoint: Path, *flags: object, cwd: Path, code: int = 0) -> dict[str, dict]:
    """The classes that --json has for each picture, and no other output than that."""
    result = call("--checkpoint", checkpoint, "--json", *flags, cwd=cwd)
    assert result.code == code, result.err
    return {row["file"]: row["classes"] for row in json.loads(result.out)}


def evaluate(checkpoint: Path, *flags: object, cwd: Path) -> str:
    result = call("--checkpoint", checkpoint, "--evaluate", "--compile", "off", *flags, cwd=cwd)
    assert (result.code, result.err) == (0, "")
    return result.out


def write_picture(folder: Path, name: str, picture: Image.Image, **options: object) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture.save(folder / name, **options)
    return folder / name


def gradient() -> Image.Image:
    """32x32 pixels that look otherwise from every side."""
    y, x = np.mgrid[0:32, 0:32] * 8
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def pixels(ck, path: Path) -> np.ndarray:
    """A picture as the script reads it, (32, 32, 3)."""
    return ck.read_picture(path).permute(1, 2, 0).numpy().astype(int)


# A classifier in Python


def test_a_classifier_is_three_lines_of_python(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
    (program,) = [block for block in blocks if "Classifier(" in block]
    exec(program, {})
    shown = dict(re.findall(r"(\w+) +([\d.]+) ?%", capsys.readouterr().out))
    assert "chelsea.png" in program and next(iter(shown)) == "cat"
    percents = [float(value) for value in shown.values()]
    assert len(shown) == 10 and percents == sorted(percents, reverse=True)


def test_the_class_printed_is_the_one_that_the_network_sees(ck, tmp_path):
    best = torch.load(BEST, weights_only=True)
    constants = {name: best["config"][f"lrn_{name}"] for name in ("size", "alpha", "beta", "k")}
    model = ck.KrizhevskyNet(10).eval()
    model.norm1 = model.norm2 = nn.LocalResponseNorm(**constants)
    model.load_state_dict(best["model"])
    found = classify(
        BEST, "--image-dir", SAMPLES, "--show-all-probs", "--precision", "fp32", cwd=tmp_path
    )
    assert len(found) == 101 and found.pop(str(SAMPLES / "chelsea.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in found])
    mean, std = torch.tensor(best["mean"]), torch.tensor(best["std"])
    with torch.no_grad():
        inputs = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
        by_view = [model(view) / best.get("temperature", 1) for view in (inputs, inputs.flip(3))]
        expected = torch.stack(by_view).softmax(2).mean(0)
    ours = torch.tensor([[found[path][name] for name in best["classes"]] for path in found])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    right = [Path(path).parent.name == max(row, key=row.get) for path, row in found.items()]
    assert sum(right) >= 80


# Pictures


@pytest.mark.parametrize(
    "name", ["1.png", "L.bmp", "P.gif", "PA.tif", "LA.png", "RGB.webp", "RGBA.png", "CMYK.tif"]
)
def test_a_picture_of_any_mode_and_format_is_read_as_it_looks(ck, name, tmp_path):
    mode = name.split(".")[0]
    picture = gradient().convert("P").convert("PA") if mode == "PA" else gradient().convert(mode)
    path = write_picture(tmp_path, name, picture, **{"lossless": True} if "webp" in name else {})
    assert Image.open(path).mode == mode
    assert np.abs(pixels(ck, path) - np.array(picture.convert("RGB"))).max() <= (
        2 if mode == "CMYK" else 0
    )


@pytest.mark.parametrize(
    ("dtype", "maximum", "top"),
    [("f4", 1, 1), ("f4", 200, 255), ("u2", 4000, 4095), ("u2", 60000, 65535)],
)
def test_gray_of_other_ranges_is_scaled_by_the_one_that_holds_it(ck, dtype, maximum, top, tmp_path):
    values = np.linspace(0, maximum, 32).astype(dtype)
    path = write_picture(tmp_path, "a.tif", Image.fromarray(np.tile(values, (32, 1))))
    assert Image.open(path).mode == {"f4": "F", "u2": "I;16"}[dtype]
    assert np.abs(pixels(ck, path) - (values / top * 255)[None, :, None]).max() <= 0.51


@pytest.mark.parametrize("name", ["RGBA.png", "LA.png", "PA.tif", "P.png", "RGB.png"])
def test_what_is_transparent_is_white(ck, name, tmp_path):
    mode, options = name.split(".")[0], {}
    picture = Image.new("P", (50, 40)).convert("PA") if mode == "PA" else Image.new(mode, (50, 40))
    if "A" in mode:
        picture.putalpha(0)
    else:
        options = {"transparency": 0 if mode == "P" else (0, 0, 0)}
    assert (pixels(ck, write_picture(tmp_path, name, picture, **options)) == 255).all()


def test_a_picture_is_rotated_as_its_camera_says(ck, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    path = write_picture(tmp_path, "a.png", gradient(), exif=exif)
    assert np.array_equal(pixels(ck, path), np.rot90(np.array(gradient()), -1))


def test_a_large_picture_is_scaled_by_its_shorter_side_and_cropped_in_the_center(ck, tmp_path):
    picture = np.zeros((640, 1280, 3), np.uint8)
    picture[:, 320:960] = (0, 255, 0)
    picture[:, :320] = picture[:, 960:] = (255, 0, 0)
    for name in ("a.png", "a.jpg"):
        read = pixels(ck, write_picture(tmp_path, name, Image.fromarray(picture)))
        assert (read[:, 2:-2, 1] > 250).all() and (read[:, 2:-2, 0] < 5).all()
    tall = Image.fromarray(picture.transpose(1, 0, 2))
    assert (pixels(ck, write_picture(tmp_path, "tall.png", tall))[2:-2, :, 1] > 250).all()


def test_pictures_come_in_the_order_of_the_flags_and_a_folder_with_what_is_below(tmp_path):
    for name in ("b.png", "a/z.jpg", "a/b/c.PNG", "one pixel.bmp"):
        size = (1, 1) if "one" in name else (90, 33)
        write_picture(tmp_path, name, gradient().resize(size))
    (tmp_path / "a" / "notes.txt").write_text("no picture\n")
    flags = ("--image", "one pixel.bmp", "b.png", "--image-dir", "a")
    expected = ["one pixel.bmp", "b.png", "a/b/c.PNG", "a/z.jpg"]
    assert [*classify(BEST, *flags, cwd=tmp_path)] == expected


def test_three_classes_are_printed_or_all_and_as_json_the_same(tmp_path):
    write_picture(tmp_path, "a long name.png", gradient())
    write_picture(tmp_path, "b.png", gradient().convert("L"))
    flags = ("--image", "a long name.png", "b.png")
    for more, count in (((), 3), (("--show-all-probs",), 10)):
        lines = call("--checkpoint", BEST, *flags, *more, cwd=tmp_path).out.splitlines()
        assert len({len(line) for line in lines}) == 1  # aligned
        found = classify(BEST, *flags, *more, cwd=tmp_path)
        for line, (name, classes) in zip(lines, found.items(), strict=True):
            assert line.startswith(name)
            cells = re.findall(r"(\w+) +(\d+\.\d) ?%", line[len(name) :])
            assert cells == [(label, f"{100 * p:.1f}") for label, p in classes.items()]
            assert len(cells) == count


def test_a_picture_that_cannot_be_read_is_named_and_the_others_are_classified(
    tmp_path, monkeypatch
):
    good = write_picture(tmp_path, "good.png", gradient()).read_bytes()
    broken = {"cut.png": good[:60], "text.jpg": b"no picture", "empty.gif": b""}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    write_picture(tmp_path, "absurd.png", gradient().resize((100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    names = [*broken, "missing.png", "folder.png", "absurd.png"]
    result = call("--checkpoint", BEST, "--image", *names, "good.png", "--json", cwd=tmp_path)
    assert result.code == 1
    assert [row["file"] for row in json.loads(result.out)] == ["good.png"]
    errors = result.err.splitlines()
    assert len(errors) == len(names)
    for error, name in zip(errors, names):
        assert error.startswith("error: ") and name in error


# Evaluation


def test_evaluation_gives_the_errors_of_the_run_and_draws_its_plots_again(
    ck, trained, tmp_path, monkeypatch
):
    summary = json.loads((trained / "summary.json").read_text())
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    drawn = {"predictions.png", "confusion.png", "filters.png"}
    tables = {"predictions.csv", "confusion.csv"}
    for name in drawn | tables:
        (trained / name).unlink()
    out = evaluate(trained / "best.pt", cwd=tmp_path)
    for key in ("test_error", "test_error_multi_view"):
        low, high = summary[f"{key}_interval"]
        text = f"{summary[key]:.2f} %  (95 % interval {low:.2f} to {high:.2f})"
        assert text in out
    assert f"{summary['test_loss']:.4f}" in out
    assert {path.name for path in trained.iterdir()} == before.keys()
    for name in before.keys() - drawn:
        assert (trained / name).read_bytes() == before[name]
    monkeypatch.setattr(ck, "save_plot", lambda path, *_: path.touch() is None)
    evaluate("run/best.pt", "--output-dir", "other/place", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "other" / "place").iterdir()} == drawn | tables
    monkeypatch.chdir(tmp_path)
    of_runs = ck.Config(checkpoint="run/best.pt", compile="off", output_dir="edited")
    assert ck.evaluate_checkpoint(of_runs, {}) == 0  # where a Config has runs go is not for this
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize("spelling", ["{}", "~/data"])
def test_evaluation_finds_the_data_where_the_run_had_them(ck, spelling, tmp_path, monkeypatch):
    def read_dataset(name, data_dir, *_):
        raise ck.UserError(f"looked in {Path(data_dir).expanduser().resolve()}")

    monkeypatch.setattr(ck, "read_dataset", read_dataset)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    best = torch.load(BEST, weights_only=True)
    best["config"]["data_dir"] = spelling.format(tmp_path / "data")
    torch.save(best, tmp_path / "best.pt")
    for flags, place in (((), "data"), (("--data-dir", tmp_path / "here"), "here")):
        flags = ("--checkpoint", "../best.pt", "--evaluate", *flags)
        message = one_line_error(call(*flags, cwd=tmp_path / "elsewhere"))
        assert message == f"error: looked in {tmp_path.resolve() / place}"


# Other networks and own pictures


@pytest.mark.parametrize("model", ["five-conv", "compact"])
def test_another_network_trains_resumes_evaluates_and_classifies(
    ck, model, small, tmp_path, no_plots
):
    flags = (*quick_flags(small), "--model", model)
    assert call(*flags, "--epochs", 1, cwd=tmp_path).code == 0
    resumed = call(*flags, "--epochs", 2, "--resume", cwd=tmp_path)
    assert resumed.code == 0 and "resuming after epoch 1" in resumed.out
    best = tmp_path / "runs" / f"small-{model}-seed0" / "best.pt"
    summary = json.loads((best.parent / "summary.json").read_text())
    out = evaluate(best, cwd=tmp_path)
    assert f"{summary['test_error']:.2f} %" in out and f"{summary['test_loss']:.4f}" in out
    assert isinstance(ck.load_trained(best, torch.device("cpu"))[0], ck.MODELS[model])
    found = classify(best, "--image-dir", small / "test", cwd=tmp_path)
    wrong = [Path(path).parent.name != max(row, key=row.get) for path, row in found.items()]
    assert 100 * np.mean(wrong) == pytest.approx(summary["test_error"])


def test_own_pictures_are_a_data_set_up_to_the_command_that_is_printed(ck, tmp_path, no_plots):
    colors = {"light": 200, "dark": 40, "a third": 120}
    formats = (("png", "RGB"), ("bmp", "L"), ("jpg", "CMYK"), ("gif", "P"), ("png", "RGBA"))
    for part, count in (("train", 10), ("test", 5)):
        for name, color in colors.items():
            for i in range(count):
                suffix, mode = formats[i % 5]
                picture = Image.new("RGB", (32 + 9 * i, 40), (color, color, 90)).convert(mode)
                write_picture(tmp_path / "my pictures" / part / name, f"{i}.{suffix}", picture)
    flags = ("--dataset", "my pictures", "--epochs", 2, "--batch-size", 8, "--compile", "off")
    result = call(*flags, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "27 training, 3 validation, 15 test images" in result.out
    folder = tmp_path / "runs" / "my pictures-krizhevsky-seed0"
    summary = json.loads((folder / "summary.json").read_text())
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["classes"] == [*summary["test_class_accuracy"]] == sorted(colors)
    paths = sorted((tmp_path / "my pictures" / "train").rglob("*.*"))
    train = np.stack([pixels(ck, path) for path in paths]) / 255
    assert best["mean"] == pytest.approx(train.mean((0, 1, 2)), abs=1e-6)
    assert best["std"] == pytest.approx(train.std((0, 1, 2)), abs=1e-6)
    assert f"{summary['test_error']:.2f} %" in evaluate(folder / "best.pt", cwd=tmp_path)
    (command,) = [line for line in result.out.splitlines() if "--checkpoint" in line]
    words = shlex.split(command[command.index("python ") :])[2:]
    picture = "my pictures/test/dark/0.png"
    printed = call(*[picture if word == "FILE" else word for word in words], cwd=tmp_path)
    assert printed.code == 0 and printed.out.startswith(picture)
    assert all(name in printed.out for name in colors)


def test_a_tilde_is_the_home_folder_in_every_path(ck, small, tmp_path, monkeypatch, no_plots):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for picture in small.rglob("0[01].png"):
        write_picture(home / "set", str(picture.relative_to(small)), Image.open(picture))
    flags = ("--epochs", 1, "--compile", "off", "--model", "compact", "--output-dir", "~/run")
    assert call("--dataset", "~/set", "--data-dir", "~/data", *flags, cwd=cwd).code == 0
    assert call("--resume", "~/run", "--epochs", 2, cwd=cwd).code == 0
    flags = ("--image", "~/set/test/cat/00.png", "--image-dir", "~/set/test")
    assert len(classify("~/run/best.pt", *flags, cwd=cwd)) == 21
    evaluate("~/run/best.pt", "--dataset", "~/set", "--output-dir", "~/again", cwd=cwd)
    assert call("--dataset", "~/set", "--summary", cwd=cwd).code == 0
    assert {path.name for path in home.iterdir()} == {"set", "run", "again"}
    assert not [*cwd.iterdir()]


# Devices


@pytest.mark.skipif(os.name == "nt" or torch.backends.mps.is_available(), reason="not there")
def test_a_gpu_that_pytorch_cannot_use_is_one_note_beside_the_json(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    flags = ("--checkpoint", BEST, "--image", sorted(SAMPLES.glob("cat/*"))[0], "--json")
    result = call(*flags, cwd=tmp_path)
    assert result.code == 0 and len(json.loads(result.out)) == 1
    (note,) = result.err.splitlines()
    assert note.startswith("note: ") and "NVIDIA GPU" in note


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "meta", "toaster"])
def test_a_device_that_is_not_there_is_one_error_line(device, tmp_path):
    flags = ("--checkpoint", BEST, "--image", sorted(SAMPLES.glob("cat/*"))[0])
    assert device in one_line_error(call(*flags, "--device", device, cwd=tmp_path), 2)


def test_a_classifier_may_be_made_and_used_in_inference_mode(ck):
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    expected = ck.Classifier(BEST, "cpu").classify(image)
    with torch.inference_mode():
        assert ck.Classifier(BEST, "cpu").classify(image) == expected


def test_pictures_with_the_class_of_their_folder_are_counted(ck, capsys):
    row = {"cat": 0.9, "dog": 0.1}
    paths = [Path(path) for path in ("cat/a", "dog/b", "x/c")]
    ck.print_folder_accuracy(dict.fromkeys(paths, row), ["cat", "dog"])
    assert capsys.readouterr().out.startswith("1 of 2 have the class")
