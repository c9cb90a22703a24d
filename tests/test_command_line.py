"""A run as its user meets it: what it prints and writes, its flags, its plots, the commands shown."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, call, one_line_error, quick_flags, run
from PIL import Image

PLOTS = {"curves.png", "predictions.png", "confusion.png", "filters.png"}
TABLES = {"predictions.csv", "confusion.csv"}  # of the test
FILES = {"last.pt", "best.pt", "metrics.csv", "summary.json", *TABLES, *PLOTS}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def results(folder: Path) -> tuple[dict, list[dict[str, str]]]:
    """The summary and the metrics of a run."""
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return json.loads((folder / "summary.json").read_text()), list(rows)


@pytest.fixture(scope="module")
def unvalidated(ck, small, tmp_path_factory):
    """The folder and output of a run without validation or LRN, flags spelled with underscores."""
    cwd = tmp_path_factory.mktemp("unvalidated")
    flags = ("--val_size=0", "--norm", "none", "--precision", "fp32", "--output_dir=my_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck, "save_plot", lambda *_: True)
        result = call(*quick_flags(small), *flags, cwd=cwd)
    assert result.code == 0, result.err
    return cwd / "my_run", result


def test_a_run_writes_its_files_and_no_others(trained_once):
    folder, result = trained_once
    assert names(folder) == FILES and names(folder.parent) == {folder.name}
    assert all(name in re.search("(?m)^wrote .*", result.out)[0] for name in FILES)


def test_a_run_begins_with_its_data_network_training_hardware_and_folder(trained_once, small):
    lines = dict(line.split(maxsplit=1) for line in trained_once[1].out.splitlines()[:6])
    assert f"{small}: 180 training, 20 validation, 50 test images" in lines["data"]
    assert "krizhevsky, LRN, 762,794 parameters" in lines["network"]
    for setting in ("2 epochs", "batch size 32", "rate 0.01,", "epochs 1, 2"):
        assert setting in lines["training"]
    assert "cpu" in lines["hardware"] and torch.__version__ in lines["hardware"]
    assert lines["folder"] == "run"


def test_the_header_is_printed_once_and_each_epoch_is_a_line_and_a_row(trained_once):
    summary, rows = results(trained_once[0])
    lines = trained_once[1].out.splitlines()
    (header,) = [i for i, line in enumerate(lines) if "train loss" in line]
    columns = ("learning_rate", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
    assert list(rows[0]) == ["epoch", *columns, "images_per_second", "seconds"]
    assert [(row["epoch"], row["learning_rate"]) for row in rows] == [("1", "0.01"), ("2", "0.001")]
    for line, row in zip(lines[header + 1 :], rows):
        epoch, *cells = re.sub("[%|]", "", line).split()[:6]
        assert epoch == f"{row['epoch']}/2"
        expected = [float(row[column]) for column in columns]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.006)
    best = [line.split()[0] for line in lines if line.endswith(" *")]
    assert best[0] == "1/2" and best[-1] == f"{summary['best_epoch']}/2"


def test_the_summary_has_every_setting_under_the_name_of_its_flag(ck, trained_once, unvalidated):
    for folder, val_size in ((trained_once[0], 20), (unvalidated[0], 0)):
        summary, _ = results(folder)
        config = asdict(ck.parse_arguments(shlex.split(summary["command"])[2:])[0])
        chosen = {"milestones": [1, 2], "val_size": val_size, "precision": summary["precision"]}
        assert {name: summary[name] for name in config} == config | chosen


def test_the_summary_has_the_published_keys_and_errors_in_per_cent_as_printed(trained_once):
    summary, rows = results(trained_once[0])
    published, _ = results(ROOT / "results" / "cifar10-default")
    assert summary.keys() >= published.keys() - {"init", "show", "overwrite"} | {"setup_seconds"}
    for key in ("test_error", "test_error_multi_view"):
        assert summary[key] / 2 == pytest.approx(round(summary[key] / 2))  # of 50 images
        low, high = summary[f"{key}_interval"]
        text = f"{summary[key]:.2f} %  (95 % interval {low:.2f} to {high:.2f})"
        assert low < summary[key] < high and text in trained_once[1].out
    assert summary["test_top5_error"] <= summary["test_top3_error"] <= summary["test_error"] <= 100
    assert summary["best_val_accuracy"] == max(float(row["val_accuracy"]) for row in rows)
    assert summary["torch_version"] == torch.__version__


def test_plots_are_images_of_plausible_size_and_color(trained_once):
    for name in PLOTS:
        with Image.open(trained_once[0] / name) as plot:
            assert plot.format == "PNG", name
            assert 400 <= plot.width <= 4000 and 300 <= plot.height <= 4000, name
            pixels = np.asarray(plot.convert("RGB")).astype(int)
        assert ((pixels.max(2) - pixels.min(2)) > 30).mean() > 0.002, name
        if name == "predictions.png":  # most are mistakes, after two epochs
            assert (pixels == (214, 39, 40)).all(2).sum() > 100


def test_without_validation_there_are_no_columns_of_it_and_the_last_epoch_is_kept(unvalidated):
    summary, rows = results(unvalidated[0])
    assert (summary["train_images"], summary["best_epoch"]) == (200, 2)
    files = [unvalidated[0] / name for name in ("best.pt", "last.pt")]
    best, last = (torch.load(file, weights_only=True) for file in files)
    torch.testing.assert_close(best["model"], last["model"], rtol=0, atol=0)
    assert summary["test_error"] == summary["last_test_error"]
    assert {(row["val_loss"], row["val_accuracy"]) for row in rows} == {("", "")}
    assert "train loss" in unvalidated[1].out and "val loss" not in unvalidated[1].out


def test_norm_none_trains_the_network_without_lrn(ck, unvalidated, small):
    model = ck.KrizhevskyNet(10, lrn=None)
    model.load_state_dict(torch.load(unvalidated[0] / "best.pt", weights_only=True)["model"])
    _, _, test = ck.get_cifar_data_loaders(dataset_name=str(small), val_size=0)
    expected = results(unvalidated[0])[0]["test_loss"]
    assert ck.evaluate_model(model, test).loss == pytest.approx(expected, rel=1e-5)


def test_no_test_never_evaluates_the_test_images(ck, small, tmp_path, monkeypatch):
    def loaders(*args, **options):
        train, val, test = get_loaders(*args, **options)
        test.__class__ = type("Untouchable", (ck.CifarLoader,), {"view": None, "__iter__": None})
        return train, val, test

    get_loaders = ck.make_loaders
    monkeypatch.setattr(ck, "make_loaders", loaders)
    flags = (*quick_flags(small), "--epochs", 1, "--no-test", "--output-dir", "run")
    result = call(*flags, cwd=tmp_path)
    assert result.code == 0 and "test of" not in result.out
    assert names(tmp_path / "run") == FILES - TABLES
    assert "test_error" not in results(tmp_path / "run")[0]


def test_the_whole_of_cifar10_mini_trains_from_a_clone_and_beats_chance(tmp_path):
    flags = ("--dataset", "cifar10-mini", "--recipe", "quick", "--epochs", 1, "--compile", "off")
    result = run(*flags, "--no-test", cwd=tmp_path, timeout=900)  # in half the time
    assert (result.code, result.err) == (0, "")
    assert "4,500 training, 500 validation, 1,000 test images" in result.out
    folder = tmp_path / "runs" / "cifar10-mini-krizhevsky-seed0"
    assert names(folder) == FILES - TABLES and results(folder)[0]["best_val_accuracy"] > 15


@pytest.mark.parametrize("level", [0, 2], ids=["plain", "OO"])
def test_pasted_into_a_notebook_cell_the_script_trains(level, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell = {"__name__": "cell"}  # and no __file__; level 2: as `python -OO`, without docstrings
    exec(compile(SCRIPT.read_text(), "cell", "exec", optimize=level), cell)
    if level:
        cell["save_plot"] = lambda *_: True
    assert cell["main"]([*quick_flags(small), "--epochs", "1", "--output-dir", "run"]) == 0
    assert names(tmp_path / "run") == (FILES - PLOTS if level else FILES)
    with pytest.raises(SystemExit, match="0"):
        cell["main"](["--help"])
    assert len(cell["read_dataset"]("cifar10-mini", ROOT / "data").labels) == 5000


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_without_a_working_matplotlib_only_the_plots_are_lost(error, trained, monkeypatch):
    (trained.parent / "matplotlib.py").write_text(f"raise {error}('no fonts')")
    monkeypatch.syspath_prepend(trained.parent)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    before, _ = results(trained)
    for name in ("summary.json", *PLOTS):
        (trained / name).unlink()
    result = call("--resume", trained / "last.pt", cwd=trained.parent)  # only tests it again
    assert result.code == 0, result.err
    assert names(trained) == FILES - PLOTS
    assert all(re.search(f"note: .*{name}.*no fonts", result.out) for name in PLOTS)
    assert results(trained)[0]["test_loss"] == before["test_loss"]


def test_neither_odd_names_nor_settings_of_matplotlib_lose_a_plot(small, tmp_path):
    classes = ["$5^$", "a_b $ $", "飞机", "x" * 80]
    if sys.platform == "linux":
        classes.append(os.fsdecode(b"caf\xe9"))
    for part in ("train", "test"):
        for name, pictures in zip(classes, sorted((small / part).iterdir())):
            shutil.copytree(pictures, tmp_path / "$a^$" / part / name)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    env = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "that_of_a_notebook"}
    env["PYTHONIOENCODING"] = "ascii"  # a terminal that cannot show the names
    flags = (*quick_flags(tmp_path / "$a^$"), "--epochs", 1, "--val-size", 4)
    result = run(*flags, "--output-dir", "run", cwd=tmp_path, env=env)
    assert (result.code, result.err) == (0, "")  # and no warning
    assert names(tmp_path / "run") == FILES, result.out


def test_tensorboard_has_each_metric_of_each_epoch_once(trained):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for epochs in (3, 4):
        flags = ("--resume", trained / "last.pt", "--epochs", epochs, "--tensorboard")
        assert call(*flags, "--no-test", cwd=trained).code == 0
    _, rows = results(trained)
    log = events.EventAccumulator(str(trained)).Reload()
    assert {*log.Tags()["scalars"]} == rows[0].keys() - {"epoch"}
    for name in log.Tags()["scalars"]:
        found = [(event.step, event.value) for event in log.Scalars(name)]
        assert found == [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in rows]


def test_without_tensorboard_one_line_says_how_to_install_it(small, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python marks what is not there
    result = call(*quick_flags(small), "--tensorboard", cwd=tmp_path)
    assert "pip install tensorboard" in one_line_error(result)
    assert not names(tmp_path)


ALL = ["krizhevsky", "80sec", "18pct", "13pct", "11pct", "five-conv", "alexnet", "compact"]


@pytest.mark.parametrize("model", ALL)
def test_summary_prints_the_layers_of_each_network_and_writes_nothing(ck, model, tmp_path):
    result = call("--model", model, "--dataset", "cifar100", "--summary", cwd=tmp_path)
    assert (result.code, result.err, names(tmp_path)) == (0, "", set())
    *rows, total = [line.replace(",", "").split() for line in result.out.splitlines()[1:]]
    with torch.device("meta"):
        count = sum(p.numel() for p in ck.MODELS[model](100).parameters())
    assert int(total[-1]) == sum(int(row[-1]) for row in rows) == count
    assert rows[-1][1:3] == ["Linear", "100"]


def test_a_hyphen_and_an_underscore_are_the_same_in_a_flag(ck):
    words = shlex.split("--data_dir a_b --val_size 7 --no_test --lrn_k=1.5 --batch_size 64")
    hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    assert ck.parse_arguments(words) == ck.parse_arguments(hyphens)


def test_help_shows_every_flag_with_a_text_and_its_default(ck, capsys):
    with pytest.raises(SystemExit, match="0"):
        ck.main(["--help"])
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    shown = {re.match(r"--([\w-]+)", entry)[1]: " ".join(entry.split()) for entry in entries}
    defaults = {name.replace("_", "-"): value for name, value in asdict(ck.Config()).items()}
    assert shown.keys() == defaults.keys()
    for name, default in defaults.items():
        assert len(re.sub(r"\(default.*", "", shown[name]).split()) > 2, name
        if default is not None and default is not False:
            said = re.search(r"\(default: (.*?)\)", shown[name])[1]
            first = default[0] if isinstance(default, list) else default
            assert type(first)(said.split()[0]) == first, name


def test_help_has_the_groups_of_config_and_recipes_as_commands(ck, capsys):
    with pytest.raises(SystemExit, match="0"):
        ck.main(["--help"])
    out = capsys.readouterr().out
    block = SCRIPT.read_text().split("class Config:")[1].split("\n\n\n")[0]
    titles = re.findall(r"(?m)^    # ([a-z ]+)(?:: SGD.*)?$\n    (\w+):", block)
    shown = re.findall(r"(?m)^([a-z ]+):$\n  --([\w-]+)", out)
    assert shown == [(title, name.replace("_", "-")) for title, name in titles]
    commands = dict(re.findall(r"(?m)^    (\w+) +python \S+ (--.*)$", out.split("recipes:")[1]))
    assert commands.keys() == ck.RECIPES.keys()
    for name, words in commands.items():
        spelled_out, _ = ck.parse_arguments(shlex.split(words))
        named, _ = ck.parse_arguments(["--recipe", name])
        assert asdict(spelled_out) | {"recipe": name} == asdict(named)


def test_pictures_may_be_given_one_by_one_and_of_a_setting_the_last_flag_counts(ck):
    words = ["--checkpoint", "best.pt", "--image", "a.png", "b.png", "--image", "c.png"]
    assert ck.parse_arguments(words)[0].image == ["a.png", "b.png", "c.png"]
    words = ["--recipe", "short", "--milestones", "3", "4", "--milestones", "5"]
    assert ck.parse_arguments(words)[0].milestones == [5]


def test_a_class_that_is_added_to_models_is_a_choice_of_model(ck, monkeypatch):
    monkeypatch.setitem(ck.MODELS, "mine", torch.nn.Identity)
    assert ck.parse_arguments(["--model", "mine"])[0].model == "mine"


def test_editing_the_block_and_passing_the_flag_are_the_same(ck):
    edits = {"dataset": "cifar100", "lr": 0.05, "val_size": 0, "no_test": True, "epochs": 7}
    text = SCRIPT.read_text()
    for name, value in (edits | {"milestones": [2, 5]}).items():
        entry = rf"(?m)^(    {name}: .*?flag\()(\[.*?\]|[^,]+),"
        text, found = re.subn(entry, rf"\g<1>{value!r},", text)
        assert found == 1, name
    edited = {"__name__": "edited"}
    exec(text, edited)
    flags = "--dataset cifar100 --lr 0.05 --val-size 0 --no-test --epochs 7 --milestones 2 5"
    assert asdict(edited["parse_arguments"]([])[0]) == asdict(ck.parse_arguments(flags.split())[0])


def test_a_flag_of_lrn_is_refused_where_the_network_has_none(tmp_path):
    for words in (["--model", "compact", "--norm", "none"], ["--recipe", "80sec", "--lrn-size", 3]):
        assert "has no LRN" in one_line_error(call(*words, cwd=tmp_path), code=2)


USES = "--checkpoint goes with --image FILE, --image-dir DIR or --evaluate"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--image cat.png", "--image needs --checkpoint best.pt"),
        ("--checkpoint best.pt", USES),
        ("--checkpoint best.pt --json", USES),
    ],
)
def test_a_network_and_what_it_is_for_need_each_other(words, message, tmp_path):
    assert one_line_error(call(*words.split(), cwd=tmp_path), code=2) == f"error: {message}"


def test_the_pep_723_block_is_requirements_txt():
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", SCRIPT.read_text())[1]
    dependencies = ast.literal_eval(re.search(r"(?s)dependencies = (\[.*?\])", block)[1])
    assert dependencies == (ROOT / "requirements.txt").read_text().split()


def test_every_command_that_is_shown_is_one_that_the_script_takes(ck):
    paths = [ROOT / "README.md", *ROOT.glob("results/**/*.md")]
    pages = [path.read_text() for path in paths]
    examples = re.sub(" +#.*", "", ck.__doc__)  # the pages have none: not every shell skips them
    shown = re.sub(r"\$\w+", "1", "\n".join([examples, *pages]).replace("\\\n", " "))
    lines = re.findall(rf"(?:python3?|uv run|torchrun[^`\n]*) {SCRIPT.name}([^`\n]*)", shown)
    assert len(lines) > 15
    for line in lines:
        config, _ = ck.parse_arguments(shlex.split(re.split("[;&|<>)]", line)[0]))
        if str(config.checkpoint).startswith("results/"):
            assert (ROOT / config.checkpoint).exists(), line
