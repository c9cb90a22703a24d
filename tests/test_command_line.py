"""The script as its user meets it: run as a process, tiny, in each of its modes."""

import ast
import csv
import importlib.util
import json
import re
import shlex
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, SMALL_RUN, one_line_error, run
from PIL import Image

FILES = {"last.pt", "best.pt", "metrics.csv", "summary.json"}
PICTURES = {"curves.png", "predictions.png", "confusion.png", "filters.png"}
TEST_FIGURES = {
    *("test_error", "test_error_multi_view", "test_loss", "test_top3_error", "test_top5_error", "last_test_error")
}
FIGURES = {*TEST_FIGURES, "best_epoch", "best_val_accuracy", "parameters", "images_per_second"}
HEADER = re.compile(r"^ *epoch +lr +train loss", re.MULTILINE)
EPOCH_LINE = re.compile(r"^ *(\d+)/(\d+) +(\S+) +(\S+) +(\S+) % +(.*)$", re.MULTILINE)


class Finished:
    """A run that ended well, and what it wrote."""

    def __init__(self, result, folder: Path) -> None:
        assert result.returncode == 0, result.stdout + result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        self.out, self.err, self.folder = result.stdout, result.stderr, folder

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {".lock"}

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, str]]:
        with open(self.folder / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def checkpoint(self, name: str) -> dict:
        return torch.load(self.folder / name, weights_only=True)


def figures(metrics: list[dict[str, str]]) -> list[dict[str, str]]:
    """What training computed, without what it took."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in metrics]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs, in the folder that the script chooses."""
    folder = tmp_path_factory.mktemp("trained")
    return Finished(run(*SMALL_RUN, cwd=folder), folder / "runs" / "synthetic-krizhevsky-seed0")


@pytest.fixture(scope="module")
def without_validation(tmp_path_factory):
    """Another, of three epochs with --val-size 0 and --norm none, its flags spelled with underscores."""
    folder = tmp_path_factory.mktemp("without_validation")
    spelled = ("--val_size", "0", "--batch_size=50", "--output_dir=my_run", "--weight_decay", "0", "--norm", "none")
    result = run("--dataset", "synthetic", "--epochs", "3", *spelled, cwd=folder)
    return Finished(result, folder / "my_run")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two seeds, the same again, and the files as they were between."""
    folder = tmp_path_factory.mktemp("seeds")
    arguments = (*SMALL_RUN, "--epochs", "1", "--seeds", "2")
    folders = [folder / "runs" / f"synthetic-krizhevsky-seed{seed}" for seed in (0, 1)]
    first = run(*arguments, cwd=folder)
    between = {path: path.read_bytes() for one in folders for path in one.iterdir()}
    again = run(*arguments, cwd=folder)
    return [Finished(first, one) for one in folders], Finished(again, folders[0]), between


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_files_and_no_others(trained):
    assert trained.files == FILES | PICTURES
    assert {path.name for path in trained.folder.parent.parent.iterdir()} == {"runs"}


def test_a_run_says_what_it_does_on_what(trained):
    assert "synthetic: 500 training, 100 validation, 200 test images of 10 classes" in trained.out
    assert "762,794 parameters" in trained.out
    assert f"PyTorch {torch.__version__}" in trained.out
    for name in FILES | PICTURES:
        assert name in trained.out.splitlines()[-2]


def test_the_header_is_printed_once_above_one_line_per_epoch(trained):
    assert len(HEADER.findall(trained.out)) == 1
    lines = list(EPOCH_LINE.finditer(trained.out))
    assert [line.group(1, 2) for line in lines] == [("1", "2"), ("2", "2")]
    assert HEADER.search(trained.out).start() < lines[0].start()
    for line, row in zip(lines, trained.metrics, strict=True):
        rate, loss, accuracy = (float(number) for number in line.group(3, 4, 5))
        assert rate == pytest.approx(float(row["learning_rate"]), rel=1e-3)
        assert loss == pytest.approx(float(row["train_loss"]), abs=6e-5)
        assert accuracy == pytest.approx(float(row["train_accuracy"]), abs=6e-3)
        val_loss, val_accuracy = (float(number) for number in line.group(6).split()[:2])
        assert val_loss == pytest.approx(float(row["val_loss"]), abs=6e-5)
        assert val_accuracy == pytest.approx(float(row["val_accuracy"]), abs=6e-3)
    marked = [int(line[1]) for line in lines if line[0].endswith("*")]
    assert marked[0] == 1 and marked[-1] == trained.summary["best_epoch"]


def test_the_test_error_is_printed_with_its_interval(trained):
    summary = trained.summary
    low, high = summary["test_error_interval"]
    assert f"{summary['test_error']:.2f} %  (95 % interval {low:.2f} to {high:.2f})" in trained.out
    assert f"{summary['test_error_multi_view']:.2f} %" in trained.out
    assert low < summary["test_error"] < high


def test_metrics_csv_has_a_row_for_each_epoch(trained):
    columns = ["epoch", "learning_rate", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert [row["epoch"] for row in trained.metrics] == ["1", "2"]
    assert list(trained.metrics[0])[:6] == columns
    assert all(float(value) > 0 for row in trained.metrics for value in row.values())


def test_the_summary_has_every_hyperparameter_under_the_name_of_its_flag(ck, trained):
    given = {"dataset": "synthetic", "val_size": 100, "epochs": 2, "compile": "off", "milestones": [1, 2]}
    expected = asdict(replace(ck.Config(), **given))
    del expected["output_dir"]
    assert {key: trained.summary[key] for key in expected} == expected
    assert Path(trained.summary["output_dir"]).name == trained.folder.name


def test_the_summary_has_every_figure_in_per_cent(trained):
    summary = trained.summary
    assert summary.keys() >= FIGURES
    assert summary["parameters"] == 762_794
    assert summary["torch_version"] == torch.__version__
    assert summary["device_used"] in ("cpu", "cuda", "mps")
    for error in TEST_FIGURES - {"test_loss"}:
        assert 0 <= summary[error] <= 100
        assert 2 * summary[error] == pytest.approx(round(2 * summary[error]), abs=1e-3)  # of 200 images
    assert summary["test_top5_error"] <= summary["test_top3_error"] <= summary["test_error"]
    best = trained.metrics[summary["best_epoch"] - 1]
    assert summary["best_val_accuracy"] == float(best["val_accuracy"])
    assert float(best["val_accuracy"]) == max(float(row["val_accuracy"]) for row in trained.metrics)


def test_pictures_are_whole_and_of_plausible_size(trained):
    for name in PICTURES:
        with Image.open(trained.folder / name) as picture:
            assert picture.format == "PNG"
            assert 400 <= picture.width <= 4000 and 300 <= picture.height <= 4000
            assert np.asarray(picture.convert("L")).std() > 5  # not a blank one


def test_without_validation_the_last_epoch_is_kept(without_validation):
    summary, metrics = without_validation.summary, without_validation.metrics
    assert summary["train_images"] == 600
    assert summary["best_epoch"] == without_validation.checkpoint("best.pt")["epoch"] == 3
    assert summary["best_val_accuracy"] is None
    assert summary["test_error"] == summary["last_test_error"]
    assert {(row["val_loss"], row["val_accuracy"]) for row in metrics} == {("", "")}
    assert [line[1] for line in EPOCH_LINE.finditer(without_validation.out)] == ["1", "2", "3"]
    assert without_validation.files == FILES | PICTURES


def test_flags_may_be_spelled_with_underscores(without_validation):
    summary = without_validation.summary
    spelled = {"val_size": 0, "batch_size": 50, "output_dir": "my_run", "weight_decay": 0.0}
    assert {key: summary[key] for key in spelled} == spelled


def test_both_spellings_of_every_flag_are_the_same(ck):
    values = {bool: [], str: ["cpu"], float: ["0.5"], int: ["7"]}
    checkpoint, image = ["--checkpoint", "file"], ["--image", "file"]
    needs = {"image": checkpoint, "image_dir": checkpoint, "evaluate": checkpoint, "checkpoint": image}
    needs |= {"show_all_probs": [*checkpoint, *image], "json": [*checkpoint, *image]}
    for option in fields(ck.Config):
        kind = next(kind for kind in values if kind.__name__ in str(option.type))
        value = [option.metadata["choices"][-1]] if "choices" in option.metadata else values[kind]
        rest = needs.get(option.name, [])
        hyphen, underscore = f"--{option.name.replace('_', '-')}", f"--{option.name}"
        config, given = ck.parse_arguments([hyphen, *value, *rest])
        assert (config, given) == ck.parse_arguments([underscore, *value, *rest])
        assert option.name in given


def test_norm_none_trains_the_network_without_normalisation(ck, trained, without_validation):
    assert (trained.summary["norm"], without_validation.summary["norm"]) == ("lrn", "none")
    assert "norm none" in without_validation.out
    path, summary = without_validation.folder / "best.pt", without_validation.summary
    loaded, ours, _ = ck.load_trained(path, torch.device("cpu"))
    assert not any(isinstance(layer, ck.LocalResponseNormalization) for layer in loaded.modules())
    plain = ck.KrizhevskyNet(10, norm_layer=torch.nn.Identity)
    plain.load_state_dict(ours["model"])
    test = ck.CifarLoader(*ck.draw_shapes(200, 2), ours["classes"], ours["mean"], ours["std"])
    evaluation = ck.evaluate_model(plain, test, summary["precision_used"])
    assert evaluation.loss == pytest.approx(summary["test_loss"], rel=0.01)


def test_no_test_leaves_the_test_set_alone(ck, monkeypatch, tmp_path, capsys):
    def touched(*_):
        raise AssertionError("the test set was read")

    def loaders(*arguments, **options):
        train, validation, test = real(*arguments, **options)
        test.view = test._batches = touched
        test.images = test._crops = None
        return train, validation, test

    real = ck.get_cifar_data_loaders
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", (200, 100))
    monkeypatch.setattr(ck, "get_cifar_data_loaders", loaders)
    assert ck.main([*SMALL_RUN, "--epochs", "1", "--no-test", "--output-dir", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["no_test"] and not TEST_FIGURES & summary.keys()
    assert summary["best_val_accuracy"] > 0
    assert "test of" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES | PICTURES  # of the validation set


# ----------------------------------------------------------------------------------------------------------------------
# Several seeds
# ----------------------------------------------------------------------------------------------------------------------


def test_seeds_have_their_own_folders_and_differ(seeds):
    (zero, one), _, _ = seeds
    assert (zero.summary["seed"], one.summary["seed"]) == (0, 1)
    for seed in (zero, one):
        assert seed.files == FILES | PICTURES
    assert figures(zero.metrics) != figures(one.metrics)


def test_seeds_print_mean_and_standard_deviation(seeds):
    both, again, _ = seeds
    for key in ("best_val_accuracy", "test_error", "test_error_multi_view"):
        values = [seed.summary[key] for seed in both]
        figure = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"
        assert figure in both[0].out and figure in again.out


def test_seeds_run_again_train_nothing_again(seeds):
    _, again, between = seeds
    assert not EPOCH_LINE.search(again.out)
    assert {path: path.read_bytes() for path in between} == between


# ----------------------------------------------------------------------------------------------------------------------
# Flags and defaults
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def help_by_flag(tmp_path_factory):
    """What --help says of each flag."""
    result = run("--help", cwd=tmp_path_factory.mktemp("help"), small=False)
    assert result.returncode == 0
    entries = re.split(r"\n  (?=--|-h)", result.stdout)[1:]
    return {re.match(r"(?:-h, )?--([\w-]+)", entry)[1]: " ".join(entry.split()) for entry in entries}


def test_help_shows_every_flag_with_a_remark(ck, help_by_flag):
    assert help_by_flag.keys() - {"help"} == {option.name.replace("_", "-") for option in fields(ck.Config)}
    for option in fields(ck.Config):
        remark = " ".join((option.metadata["help"] % ()).split())
        assert remark in help_by_flag[option.name.replace("_", "-")]


def test_help_shows_every_default(ck, help_by_flag):
    for name, default in asdict(ck.Config()).items():
        told = {str(None): "none", str(False): "off"}.get(str(default), default)
        if name in ("dropout", "milestones", "output_dir"):  # which follow from other flags
            told = {"dropout": "0, five-conv", "milestones": "30, 60", "output_dir": "runs/"}[name]
        assert re.search(rf"\(default: {re.escape(str(told))}", help_by_flag[name.replace("_", "-")])


def test_editing_the_block_and_passing_the_flag_are_the_same(ck, monkeypatch, tmp_path):
    edits = {"dataset": "synthetic", "lr": 0.05, "batch_size": 64, "epochs": 7, "no_test": True, "milestones": [2, 5]}
    text = SCRIPT.read_text()
    for name, value in edits.items():
        text, found = re.subn(rf"(?m)^(    {name}: .*?flag\(\s*)[^,]+,", rf"\g<1>{value!r},", text)
        assert found == 1, name
    (tmp_path / "edited.py").write_text(text)
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    edited = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "edited", edited)
    spec.loader.exec_module(edited)
    flags = shlex.split("--dataset synthetic --lr 0.05 --batch-size 64 --epochs 7 --no-test --milestones 2 5")
    assert asdict(edited.parse_arguments([])[0]) == asdict(ck.parse_arguments(flags)[0])


def test_the_pep_723_block_is_requirements_txt():
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", SCRIPT.read_text())[1]
    block = re.sub(r"(?m)^# ?", "", block)
    dependencies = ast.literal_eval(re.search(r"(?s)^dependencies = (\[.*?\])", block, re.MULTILINE)[1])
    assert dependencies == (ROOT / "requirements.txt").read_text().split()
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in dependencies}
    assert names == {"torch", "torchvision", "matplotlib", "numpy"}
    python = re.search(r'requires-python = ">=(.+)"', block)[1]
    least = re.search(r"torch>=([\d.]+)", block)[1]
    assert f"Python {python} or newer, PyTorch {least} or newer." in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", ["README.md", "cifar_krizhevsky.py"])
def test_every_command_that_is_shown_is_one_that_the_script_takes(ck, file):
    lines = (ROOT / file).read_text().replace("\\\n", "").splitlines()
    commands = [line.strip() for line in lines if "cifar_krizhevsky.py" in line]
    commands = [line for line in commands if line.startswith(("python cifar", "torchrun "))]
    assert len(commands) > 6
    for command in commands:
        words = shlex.split(command, comments=True)
        ck.parse_arguments(words[words.index("cifar_krizhevsky.py") + 1 :])


def test_the_program_in_the_readme_classifies_a_picture(tmp_path):
    (program,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "README.md").read_text())
    program = program.replace("runs/cifar10-krizhevsky-seed0/best.pt", "results/cifar10-best/best.pt")
    program = program.replace("photo.jpg", str(next((ROOT / "data" / "samples").rglob("*.png"))))
    program += "print(tuple(probabilities.shape), round(probabilities.sum().item(), 3))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("(1, 10) 1.0\n", 0), result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Pictures of a broken matplotlib
# ----------------------------------------------------------------------------------------------------------------------


def test_a_failing_matplotlib_loses_neither_the_run_nor_its_numbers(trained, tmp_path):
    (tmp_path / "broken" / "matplotlib").mkdir(parents=True)
    (tmp_path / "broken" / "matplotlib" / "__init__.py").write_text("raise RuntimeError('no fonts today')\n")
    result = run(*SMALL_RUN, "--output-dir", "out", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "broken")})
    without = Finished(result, tmp_path / "out")
    assert without.files == FILES
    for name in PICTURES:
        assert f"note: no {name} (RuntimeError: no fonts today)" in without.out
    assert figures(without.metrics) == figures(trained.metrics)
    assert {key: without.summary[key] for key in TEST_FIGURES} == {key: trained.summary[key] for key in TEST_FIGURES}


# ----------------------------------------------------------------------------------------------------------------------
# Use of the trained network
# ----------------------------------------------------------------------------------------------------------------------


def test_best_pt_loads_into_the_plain_network_and_gives_the_test_error_of_the_summary(ck, trained):
    best, summary = trained.checkpoint("best.pt"), trained.summary
    assert best.keys() >= {"model", "config", "classes", "mean", "std", "epoch"}
    assert best["epoch"] == summary["best_epoch"]
    assert best["classes"] == ck.SHAPE_CLASSES
    model = ck.KrizhevskyNet(num_classes=10)
    model.load_state_dict(best["model"], strict=True)
    test = ck.CifarLoader(*ck.draw_shapes(200, 2), best["classes"], best["mean"], best["std"])
    for views, key in ((None, "test_error"), (ck.TEN_VIEWS, "test_error_multi_view")):
        evaluation = ck.evaluate_model(model, test, summary["precision_used"], views)
        assert 100 - evaluation.top1 == pytest.approx(summary[key], abs=1.01)  # two images of 200


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of many sizes, modes and formats, one of them in a folder within."""
    folder = tmp_path_factory.mktemp("my pictures")
    (folder / "more").mkdir()
    generator = np.random.RandomState(0)
    colour = Image.fromarray(generator.randint(0, 256, (60, 90, 3), dtype=np.uint8))
    grey16 = generator.randint(0, 65536, (40, 40)).astype(np.uint16)
    transparent = colour.convert("P")
    transparent.info["transparency"] = 3
    rotated = Image.Exif()
    rotated[0x0112] = 6
    colour.save(folder / "rgb.png")
    colour.resize((700, 33)).save(folder / "wide.jpg")
    colour.resize((1, 1)).save(folder / "one pixel.png")
    colour.resize((3, 500)).save(folder / "tall.bmp")
    colour.convert("L").save(folder / "grey.PNG")
    colour.convert("1").save(folder / "bits.png")
    colour.convert("P").save(folder / "palette.gif")
    transparent.save(folder / "palette with transparency.png")
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.convert("LA").save(folder / "grey with alpha.png")
    colour.convert("CMYK").save(folder / "cmyk.jpeg")
    Image.fromarray(grey16).save(folder / "sixteen bits.png")
    Image.fromarray(generator.rand(40, 40).astype(np.float32)).save(folder / "float.tiff")
    colour.save(folder / "rotated.jpg", exif=rotated)
    colour.save(folder / "more" / "inner.ppm")
    (folder / "notes.txt").write_text("not a picture\n")
    return folder


def predictions(out: str, classes: list[str]) -> dict[str, dict[str, float]]:
    """The classes and their probabilities in per cent that were printed for each file."""
    cell = re.compile(rf"({'|'.join(map(re.escape, classes))}) +(\d+\.\d) %")
    lines = [(line.split("  ")[0].strip(), cell.findall(line)) for line in out.splitlines() if "%" in line]
    return {Path(name).name: {label: float(percent) for label, percent in found} for name, found in lines}


def test_a_folder_of_pictures_of_any_size_mode_and_format_is_classified(ck, trained, pictures, tmp_path):
    best = trained.folder / "best.pt"
    result = run("--checkpoint", best, "--image-dir", pictures, "--show-all-probs", cwd=tmp_path, small=False)
    assert (result.returncode, result.stderr) == (0, "")
    found = predictions(result.stdout, ck.SHAPE_CLASSES)
    assert found.keys() == {path.name for path in pictures.rglob("*.*") if path.suffix != ".txt"}
    for probabilities in found.values():
        assert probabilities.keys() == set(ck.SHAPE_CLASSES)
        assert sum(probabilities.values()) == pytest.approx(100, abs=0.6)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
    assert not list(tmp_path.iterdir())


def test_a_broken_picture_is_named_and_the_others_go_on(ck, trained, pictures, tmp_path):
    (tmp_path / "cut.png").write_bytes((pictures / "rgb.png").read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("this is no picture\n")
    (tmp_path / "empty.gif").touch()
    broken = ["cut.png", "text.jpg", "missing.png", "empty.gif"]
    images = [broken[0], pictures / "rgb.png", *broken[1:], pictures / "grey.PNG"]
    result = run("--checkpoint", trained.folder / "best.pt", "--image", *images, cwd=tmp_path, small=False)
    assert result.returncode == 1
    assert predictions(result.stdout, ck.SHAPE_CLASSES).keys() == {"rgb.png", "grey.PNG"}
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(result.stderr.splitlines()) == 4
    for name, line in zip(broken, errors):
        assert name in line


def test_the_printed_command_works(ck, trained, pictures, monkeypatch, capsys):
    (command,) = [line for line in trained.out.splitlines() if "--checkpoint" in line]
    words = shlex.split(command[command.index("python ") :])
    assert words[:2] == ["python", SCRIPT.name] and words[-1] == "FILE"
    monkeypatch.chdir(trained.folder.parent.parent)
    assert ck.main([*words[2:-1], str(pictures / "rgb.png")]) == 0
    (found,) = predictions(capsys.readouterr().out, ck.SHAPE_CLASSES).values()
    assert len(found) == 3


def test_the_class_printed_is_the_one_that_the_network_sees(ck, trained, tmp_path, capsys):
    images, _ = ck.draw_shapes(8, 3)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    best = trained.checkpoint("best.pt")
    model = ck.KrizhevskyNet()
    model.load_state_dict(best["model"])
    mean, std = (torch.tensor(best[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = 100 * model((images / 255 - mean) / std).softmax(1)
    arguments = ["--checkpoint", str(trained.folder / "best.pt"), "--image-dir", str(tmp_path), "--show-all-probs"]
    assert ck.main(arguments) == 0
    found = predictions(capsys.readouterr().out, ck.SHAPE_CLASSES)
    for number, row in enumerate(expected):
        ours = [found[f"{number}.png"][name] for name in ck.SHAPE_CLASSES]
        assert ours == pytest.approx(row.tolist(), abs=0.2)


def test_a_folder_without_pictures_is_one_clear_line(trained, tmp_path):
    result = run("--checkpoint", trained.folder / "best.pt", "--image-dir", ".", cwd=tmp_path, small=False)
    assert "--image-dir" in one_line_error(result)


def gradient() -> Image.Image:
    """32x32 pixels that look otherwise from every side."""
    y, x = np.mgrid[0:32, 0:32] * 8
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def test_a_picture_of_32x32_is_read_as_it_is(ck, tmp_path):
    gradient().save(tmp_path / "a.png")
    assert torch.equal(ck.read_picture(tmp_path / "a.png"), torch.from_numpy(np.array(gradient())).permute(2, 0, 1))


def test_every_mode_of_a_picture_is_read_as_it_looks(ck, tmp_path):
    def read(picture: Image.Image, name: str = "a.png", **options) -> np.ndarray:
        picture.save(tmp_path / name, **options)
        return ck.read_picture(tmp_path / name).permute(1, 2, 0).numpy().astype(int)

    plain, grey = np.array(gradient()).astype(int), np.array(gradient().convert("L")).astype(int)
    assert np.array_equal(read(gradient().convert("L")), grey[..., None].repeat(3, 2))
    sixteen_bits = Image.fromarray((grey * 257).astype(np.uint16))
    assert np.abs(read(sixteen_bits)[..., 0] - grey).max() <= 1
    palette = gradient().quantize(64)
    assert np.array_equal(read(palette), np.array(palette.convert("RGB")))
    assert np.abs(read(gradient().convert("CMYK"), "a.tif") - plain).max() <= 2
    opaque, invisible = gradient().convert("RGBA"), gradient().convert("RGBA")
    invisible.putalpha(0)
    assert np.array_equal(read(opaque), plain)
    assert (read(invisible) == 255).all()
    assert (read(Image.new("LA", (50, 40), (0, 0))) == 255).all()
    turn = Image.Exif()
    turn[0x0112] = 6  # the camera was turned: to be shown a quarter turn clockwise
    assert np.abs(read(gradient(), exif=turn) - np.rot90(plain, -1)).max() == 0


def test_a_large_picture_is_scaled_by_its_shorter_side_and_cropped_in_the_centre(ck, tmp_path):
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = (0, 255, 0)
    picture[:, :32] = picture[:, 96:] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    read = ck.read_picture(tmp_path / "wide.png")
    assert read.shape == (3, 32, 32) and read.dtype == torch.uint8
    assert (read[1, :, 2:-2] > 250).all() and (read[0, :, 2:-2] < 5).all()


# ----------------------------------------------------------------------------------------------------------------------
# Real data
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "flags", "top5_error"),
    [
        ("cifar10", 2000, "--batch-size 16 --lr 0.02", 40),  # by chance 50 %
        ("cifar100", 3000, "--batch-size 8 --lr 0.03", 93.5),  # by chance 95 %
    ],
)
def test_a_few_seconds_of_real_data_beat_chance(
    ck, name, images, flags, top5_error, monkeypatch, tmp_path, capsys, request
):
    def part(loader, count):
        return ck.CifarLoader(
            *(loader.images[:count], loader.labels[:count], loader.classes, loader.mean, loader.std),
            batch_size=loader.batch_size,
            augment=loader.augment,
            seed=loader.seed,
        )

    def loaders(*arguments):
        return [part(loader, count) for loader, count in zip(real(*arguments), (images, 500, 1000))]

    data, real = request.getfixturevalue(f"{name}_dir"), ck.get_cifar_data_loaders
    monkeypatch.setattr(ck, "get_cifar_data_loaders", loaders)
    arguments = shlex.split(f"--dataset {name} --epochs 1 {flags} --device cpu --precision fp32 --compile off")
    assert ck.main([*arguments, "--data-dir", str(data), "--output-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{name}: {images:,} training" in out and "downloading" not in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["test_error"] < (90 if name == "cifar10" else 99.5)
    assert summary["test_top5_error"] < top5_error
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES | PICTURES
