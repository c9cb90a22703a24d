"""The published results: the figures of the README are those of the files, and the weights give them again."""

import csv
import json
import re

import pytest
from conftest import ROOT, run

RESULTS = sorted(path.parent for path in (ROOT / "results").glob("*/summary.json"))
NUMBER = r"[\d,]+(?:\.\d+)?(?:e-?\d+)?"


def table_rows() -> dict[str, dict[str, str]]:
    """The rows of the README's table of results: the cells by column, the rows by the name of their folder."""
    section = (ROOT / "README.md").read_text().split("\n## Results\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    columns, rows = lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert "folder" in columns
    return {re.fullmatch("`results/(.+)`", row["folder"])[1]: row for row in rows}


def numbers(cell: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, cell)]


def test_there_are_results_and_each_has_a_row():
    assert RESULTS
    assert {path.name for path in RESULTS} == set(table_rows())


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_every_figure_of_the_row_is_that_of_the_summary(folder):
    row, summary = table_rows()[folder.name], json.loads((folder / "summary.json").read_text())
    assert row["command"].strip("`") == summary["command"]
    assert numbers(row["epochs"]) == [summary["epochs"]]
    assert numbers(row["initial learning rate"]) == [summary["lr"]]
    assert numbers(row["weight decay"]) == [summary["weight_decay"]]
    assert row["best validation accuracy"] == f"{summary['best_val_accuracy']:.2f}"
    assert row["test accuracy"] == f"{100 - summary['test_error']:.2f}"
    for column, key in (("test error, single view", "test_error"), ("10 views", "test_error_multi_view")):
        low, high = summary[f"{key}_interval"]
        assert row[column] == f"{summary[key]:.2f} ({low:.2f} to {high:.2f})"
    assert row["last epoch"] == f"{summary['last_test_error']:.2f}"
    seconds = summary["training_seconds"]
    assert row["training time"] == (f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min")


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_the_table_of_epochs_belongs_to_the_summary(folder):
    summary = json.loads((folder / "summary.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        epochs = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in epochs] == list(range(1, summary["epochs"] + 1))
    best = max(epochs, key=lambda row: float(row["val_accuracy"]))
    assert (int(best["epoch"]), float(best["val_accuracy"])) == (summary["best_epoch"], summary["best_val_accuracy"])
    for picture in ("curves.png", "predictions.png", "confusion.png", "filters.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("folder", [f for f in RESULTS if (f / "best.pt").exists()], ids=lambda path: path.name)
def test_the_published_weights_give_the_published_error_again(folder, request, tmp_path):
    summary = json.loads((folder / "summary.json").read_text())
    data = request.getfixturevalue(f"{summary['dataset']}_dir")
    assert (folder / "best.pt").stat().st_size < 4e6
    flags = ("--checkpoint", folder / "best.pt", "--evaluate", "--json", "--data-dir", data, "--output-dir", tmp_path)
    result = run(*flags, "--compile", "off", cwd=tmp_path, small=False, timeout=900)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    # another processor rounds otherwise, which may move a handful of the 10,000 images
    for key in ("test_error", "test_error_multi_view", "test_top5_error"):
        assert figures[key] == pytest.approx(summary[key], abs=0.1)
    assert figures["test_loss"] == pytest.approx(summary["test_loss"], rel=0.01)
