"""The scripts beside the tests, which made what is published, still run."""

import json
import re
import sys

import benchmark
import compare
import denominator
import pytest
from test_resume import read


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Calls the `main` of a script with these words; what it has printed."""

    def run(module: object, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        module.main()
        return capsys.readouterr().out

    return run


def test_a_network_is_compared_with_the_predictions_of_another(
    ck, run_script, small, trained, tmp_path
):
    labels = ck.read_dataset(str(small)).test_labels.tolist()
    (tmp_path / "perfect.json").write_text(json.dumps(labels))
    out = run_script(compare, trained / "best.pt", tmp_path / "perfect.json")
    summary = read(trained / "summary.json")
    assert re.search(rf"single view +error {summary['test_error']:.2f} %, theirs 0.00 %", out)
    assert re.search(rf"10 views +error {summary['test_error_multi_view']:.2f} %", out)
    assert out.count("only we are right 0,") == 2


def test_the_denominators_of_a_network_are_measured_on_its_held_out_images(run_script, trained):
    out = run_script(denominator, trained / "best.pt")
    assert re.search(r"(?m)^norm1 +\d", out) and re.search(r"(?m)^norm2 +\d", out)
    (accuracy,) = re.findall(r"(?m)^none +([\d.]+) %", out)
    assert float(accuracy) == pytest.approx(read(trained / "summary.json")["best_val_accuracy"])


def test_a_contender_of_the_benchmark_takes_a_step(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as it sets it in a process of its own
    words = ("--contender", "fp32-eager", "--steps", 1, "--device", "cpu", "--data-dir", tmp_path)
    assert json.loads(run_script(benchmark, *words))["images_per_second"] > 0
