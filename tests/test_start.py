"""How a run begins: in a folder of one's own, from trained weights, from Python, and what its log says at once."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPT, call, one_line_error, quick_flags, run, start

PUBLISHED = ROOT / "results" / "cifar100-best" / "best.pt"
OWN_FILES = (
    "summary.json",
    "metrics.csv",
    "confusion.png",
    ".draft.12.tmp",
    ".summary.json.draft.tmp",
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- A folder with files of one's own ------------------------------------------------------------


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_a_folder_with_files_that_a_run_would_write_is_refused_untouched(small, tmp_path, resume):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in OWN_FILES:
        (mine / name).write_text(f"my {name}")
    before = contents(mine)
    message = one_line_error(
        call(*quick_flags(small), "--output-dir", "mine", *resume, cwd=tmp_path), 2
    )
    assert "mine" in message and "metrics.csv" in message and "--output-dir" in message
    assert contents(mine) == before
    for name in ("summary.json", "metrics.csv", "confusion.png"):
        (mine / name).unlink()
        if contents(mine).keys() & {"summary.json", "metrics.csv", "confusion.png"}:
            one_line_error(
                call(*quick_flags(small), "--output-dir", "mine", *resume, cwd=tmp_path), 2
            )


def test_other_files_in_the_folder_of_a_run_stay_and_its_own_log_is_no_reason(small, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("notes.txt", ".draft.12.tmp"):
        (mine / name).write_text(f"my {name}")
    with open(mine / "log.txt", "w") as log:  # as a shell makes it
        result = run(*quick_flags(small), "--output-dir", "mine", cwd=tmp_path, stdout=log)
    assert result.code == 0, result.err
    assert call(*quick_flags(small), "--output-dir", "mine", "--resume", cwd=tmp_path).code == 0
    assert (mine / "notes.txt").read_text() == "my notes.txt"
    assert (mine / ".draft.12.tmp").read_text() == "my .draft.12.tmp"
    assert "2/2" in (mine / "log.txt").read_text()


def test_a_folder_of_seeds_is_refused_where_one_of_them_is(small, tmp_path):
    (tmp_path / "many" / "seed1").mkdir(parents=True)
    flags = [*quick_flags(small), "--seeds", 2, "--output-dir", "many"]
    assert "seed1" in one_line_error(call(*flags, cwd=tmp_path), 2)
    assert not (tmp_path / "many" / "seed0").exists()


def test_metrics_that_another_program_holds_open_are_a_note_and_written_later(trained, monkeypatch):
    replace = os.replace
    held = iter([True, False, False])  # when the run goes on, and after epochs 3 and 4

    def held_at_first(source, target):
        if Path(target).name == "metrics.csv" and next(held):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, target)

    monkeypatch.setattr(os, "replace", held_at_first)
    result = call("--resume", "last.pt", "--epochs", 4, cwd=trained)
    assert result.code == 0, result.err
    assert "note: cannot write" in result.out and "metrics.csv" in result.out
    assert len((trained / "metrics.csv").read_text().splitlines()) == 5


# ---- From Python ---------------------------------------------------------------------------------


def test_a_recipe_by_name_alone_is_refused_in_python_with_the_way(ck, tmp_path):
    for config in (ck.Config(recipe="quick", epochs=1), ck.Config(recipe="quick")):
        with pytest.raises(ck.UserError, match="is only a name") as refused:
            ck.train(config)
        assert "RECIPES[" in str(refused.value)
    with pytest.raises(ck.UserError, match="must be one of quick"):
        ck.train(ck.Config(recipe="fast"))


def test_a_recipe_with_its_settings_trains_in_python(ck, small, tmp_path):
    settings = {**ck.RECIPES["quick"], "epochs": 1, "dataset": str(small), "compile": "off"}
    summary = ck.train(ck.Config(**settings, output_dir=str(tmp_path / "run"), no_test=True))
    assert summary["recipe"] is None and summary["batch_size"] == 32 and summary["epochs"] == 1


def test_settings_from_python_are_checked_as_flags_are_and_stored_as_plain_values(
    ck, small, tmp_path
):
    wrong = ({"select": "acc"}, {"inputs": "mean_image"}, {"precision": "bfloat16"}, {"lr": -0.01},
             {"model": "nope"}, {"norm": "None"}, {"epochs": 2.5}, {"epochs": "2"}, {"dataset": 5},
             {"seeds": 2}, {"seed": None}, {"milestones": None}, {"milestones": [0.5, None]}, {"lr": [0.1]})  # fmt: skip
    for settings in wrong:
        (name,) = settings
        with pytest.raises(ck.UserError, match=f"--{name}"):
            ck.train(ck.Config(**settings))
    config = ck.Config(dataset=small, epochs=np.int64(1), lr=np.float64(0.01), gamma=np.float32(0.5),
                       milestones=0.5, output_dir=tmp_path / "run", no_test=np.bool_(True),
                       compile="off")  # fmt: skip
    ck.train(config)
    for name in ("last.pt", "best.pt"):
        torch.load(tmp_path / "run" / name, weights_only=True)
    ck.load_trained(tmp_path / "run" / "best.pt")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_number_of_epochs_is_infinite_or_nan(value, ck):
    with pytest.raises(ck.UserError, match=f"--epochs {value}: must be of type int"):
        ck.train(ck.Config(epochs=value))


def test_a_notebook_keeps_its_backend_for_plots_of_its_own(tmp_path):
    program = (
        "from pathlib import Path\n"
        "import cifar_krizhevsky as ck\n"
        "assert ck.save_plot(Path('plot.png'), 'title', lambda figure: figure.subplots())\n"
        "import matplotlib\n"
        "print(matplotlib.rcParams['backend'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", program]
    assert subprocess.check_output(command, cwd=tmp_path, env=environment) == b"svg\n"


@pytest.mark.parametrize("precision", ["bfloat16", "auto"])
def test_another_name_of_a_precision_is_no_fp32(precision, ck):
    loader, _, _ = ck.get_cifar_data_loaders(dataset_name="cifar10-mini")
    with pytest.raises(ValueError, match=f"fp32 or bf16, not {precision}"):
        ck.evaluate_model(ck.KrizhevskyNet(), loader, precision=precision)


def test_main_leaves_the_process_as_it_was(ck, small, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    stream = io.TextIOWrapper(io.BytesIO(), errors="strict")
    with contextlib.redirect_stderr(stream):
        assert ck.main(["--lr", "0"]) == 2
    assert (stream.errors, stream.line_buffering) == ("strict", False)
    result = call(*quick_flags(small), "--deterministic", "--output-dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert {number: signal.getsignal(number) for number in before} == before
    assert dict(os.environ) == environment
    assert not torch.are_deterministic_algorithms_enabled()


# ---- What is said --------------------------------------------------------------------------------


def test_a_log_has_its_first_lines_before_the_first_epoch_ends(small, tmp_path):
    (tmp_path / "endless.py").write_text(
        f"import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"import cifar_krizhevsky as ck\n"
        f"ck.train_one_epoch = lambda *args, **options: time.sleep(600)\n"
        f"ck.main(sys.argv[1:])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "endless.py", *map(str, quick_flags(small))]
    log = tmp_path / "log.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, env=environment)
    deadline = time.monotonic() + 120
    while "folder    runs" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert "folder    runs" in log.read_text()


@pytest.mark.parametrize("flag", ["--resume", "--checkpoint"])
def test_a_checkpoint_of_another_program_is_called_that(ck, tmp_path, flag):
    weights = ck.KrizhevskyNet().state_dict()
    for number, other in enumerate(({"net": weights}, {"state_dict": weights}, weights, [1, 2])):
        torch.save(other, tmp_path / f"{number}.pt")
        words = [flag, f"{number}.pt", *(["--evaluate"] if flag == "--checkpoint" else [])]
        message = one_line_error(call(*words, cwd=tmp_path), 1)
        assert f"{number}.pt is no best.pt or last.pt" in message


# ---- From trained weights ------------------------------------------------------------------------


def test_init_from_takes_over_the_network_and_copies_what_fits(ck, small, tmp_path):
    flags = [*quick_flags(small), "--init-from", PUBLISHED, "--epochs", 1, "--lr", 1e-9]
    result = call(*flags, "--output-dir", "run", "--no-test", cwd=tmp_path)
    assert result.code == 0, result.err
    line = f"weights   from {PUBLISHED}; with new values: fc3.weight, fc3.bias\n"
    assert line in result.out
    source = torch.load(PUBLISHED, weights_only=True)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    for name in ck.NETWORK:
        assert best["config"][name] == source["config"][name], name
    assert best["mean"] == source["mean"] and best["std"] == source["std"]
    for name, value in best["model"].items():
        if name.startswith("fc3"):
            assert len(value) == 10
        else:
            torch.testing.assert_close(value, source["model"][name], atol=1e-6, rtol=1e-4)


def test_a_passed_flag_wins_over_the_trained_network_with_a_note_and_a_recipe_does_not(
    small, tmp_path
):
    flags = [*quick_flags(small), "--init-from", PUBLISHED, "--no-test", "--output-dir", "run"]
    result = call(*flags, "--recipe", "quick", "--lrn-k", 3, cwd=tmp_path)
    assert result.code == 0, result.err
    assert f"note: {PUBLISHED} has --lrn-k 1.0" in result.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    source = torch.load(PUBLISHED, weights_only=True)["config"]
    assert summary["lrn_k"] == 3 and summary["lrn_alpha"] == source["lrn_alpha"]
    assert summary["dropout"] == source["dropout"] and summary["label_smoothing"] == 0.1


def test_a_run_from_trained_weights_is_resumed_without_their_file(small, tmp_path):
    shutil.copy(PUBLISHED, tmp_path / "source.pt")
    flags = [*quick_flags(small), "--init-from", "source.pt"]
    assert call(*flags, "--output-dir", "whole", cwd=tmp_path).code == 0
    process = start(*flags, "--output-dir", "run", cwd=tmp_path)
    for line in process.stdout:
        if "1/2" in line:
            process.kill()
            break
    process.communicate()
    (tmp_path / "source.pt").unlink()
    result = call(*flags, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    whole, resumed = (
        torch.load(tmp_path / name / "best.pt", weights_only=True) for name in ("whole", "run")
    )
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name])
    assert whole["mean"] == resumed["mean"]


def test_images_that_trained_the_first_network_and_are_held_out_now_are_a_note(small, tmp_path):
    flags = [*quick_flags(small), "--model", "compact", "--epochs", 1, "--no-test"]
    for size in (0, 20):
        source = [*flags, "--val-size", size, "--output-dir", f"held-out-{size}"]
        assert call(*source, cwd=tmp_path).code == 0
    noted = {}
    for size in (0, 20):
        for size_now in (0, 20, 30):
            command = [*flags, "--init-from", f"held-out-{size}/best.pt", "--val-size", size_now]
            command += ["--dataset", small / ".." / small.name]  # the same, written otherwise
            result = call(*command, cwd=tmp_path)
            assert result.code == 0, result.err
            noted[size, size_now] = "was trained on images that are held out here" in result.out
    assert {pair for pair, is_noted in noted.items() if is_noted} == {(0, 20), (0, 30), (20, 30)}


def test_a_run_is_resumed_that_took_its_network_over(small, tmp_path):
    flags = [*quick_flags(small), "--epochs", 1, "--no-test"]
    source = [*flags, "--model", "five-conv", "--output-dir", "source"]
    assert call(*source, cwd=tmp_path).code == 0
    command = [*flags, "--init-from", "source/best.pt"]
    assert call(*command, cwd=tmp_path).code == 0
    result = call(*command, "--resume", "--epochs", 2, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "resuming after epoch 1" in result.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small-five-conv-seed0"]


def test_seeds_from_trained_weights_are_resumed_where_one_is_missing(small, tmp_path):
    flags = [
        *quick_flags(small),
        "--init-from",
        PUBLISHED,
        "--seeds",
        2,
        "--no-test",
        "--output-dir",
        "many",
    ]
    assert call(*flags, cwd=tmp_path).code == 0
    shutil.rmtree(tmp_path / "many" / "seed1")
    result = call(*flags, "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    seeds = [
        torch.load(tmp_path / f"many/seed{seed}/best.pt", weights_only=True) for seed in (0, 1)
    ]
    assert seeds[0]["config"]["lrn_alpha"] == seeds[1]["config"]["lrn_alpha"] == 1.0
    shutil.rmtree(tmp_path / "many")
    assert call(*flags, "--resume", cwd=tmp_path).code == 0  # nothing to resume: the same network
    best = torch.load(tmp_path / "many/seed0/best.pt", weights_only=True)
    assert best["config"]["lrn_alpha"] == 1.0


def test_the_last_layer_is_new_where_the_same_classes_have_another_order(ck, small, tmp_path):
    assert call(*quick_flags(small), "--output-dir", "source", "--no-test", cwd=tmp_path).code == 0
    source = torch.load(tmp_path / "source/best.pt", weights_only=True)
    source["classes"] = source["classes"][::-1]
    torch.save(source, tmp_path / "reversed.pt")
    for path, new in (
        ("source/best.pt", ""),
        ("reversed.pt", "; with new values: fc3.weight, fc3.bias"),
    ):
        words = [*quick_flags(small), "--init-from", path, "--no-test", "--epochs", 1]
        assert f"weights   from {path}{new}\n" in call(*words, cwd=tmp_path).out


def test_a_mean_image_of_another_size_is_not_taken_over(small, tmp_path):
    words = [
        *quick_flags(small),
        "--recipe",
        "11pct",
        "--epochs",
        1,
        "--no-test",
        "--output-dir",
        "run",
    ]
    assert call(*words, cwd=tmp_path).code == 0
    words = [*quick_flags(small), "--init-from", "run/best.pt", "--model", "80sec", "--no-test"]
    result = call(*words, "--output-dir", "next", cwd=tmp_path)
    assert result.code == 0, result.err
    best = torch.load(tmp_path / "next/best.pt", weights_only=True)
    assert tuple(best["mean"].shape) == (3, 32, 32)


def test_a_folder_that_another_run_took_meanwhile_is_refused(ck, small, tmp_path, monkeypatch):
    make_loaders = ck.make_loaders

    def meanwhile(*args, **options):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "last.pt").write_bytes(b"of the other")
        return make_loaders(*args, **options)

    monkeypatch.setattr(ck, "make_loaders", meanwhile)
    message = one_line_error(call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path), 2)
    assert "last.pt" in message
    assert (tmp_path / "run" / "last.pt").read_bytes() == b"of the other"


def test_a_finished_run_that_is_resumed_keeps_its_best_pt_until_it_is_tested_again(
    ck, trained, monkeypatch
):
    best = torch.load(trained / "best.pt", weights_only=True)
    best["temperature"] = 0.8
    torch.save(best, trained / "best.pt")
    monkeypatch.setattr(ck, "report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call("--resume", "last.pt", cwd=trained).code == 130
    assert torch.load(trained / "best.pt", weights_only=True)["temperature"] == 0.8


def test_lrn_that_was_made_fast_twice_gives_the_same_values(ck):
    model, _ = ck.load_trained(PUBLISHED)
    images = torch.randn(4, 3, 32, 32)
    expected = model(images)
    for wanted in ("auto", "off", "auto"):
        ck.speed_up_lrn(model, wanted, torch.device("cpu"), "fp32")
        torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_an_even_size_of_lrn_within_maps_is_one_line(small, tmp_path):
    words = [*quick_flags(small), "--recipe", "18pct", "--lrn-size", 4]
    assert "size must be odd" in one_line_error(call(*words, cwd=tmp_path), 2)


def test_weights_of_which_none_fits_are_refused(small, tmp_path):
    flags = [*quick_flags(small), "--init-from", PUBLISHED, "--model", "compact"]
    message = one_line_error(call(*flags, cwd=tmp_path), 2)
    assert "none of its weights fits" in message
    assert not (tmp_path / "runs").exists()
    message = one_line_error(call("--init-from", "missing.pt", cwd=tmp_path))
    assert "missing.pt" in message


# ---- The changes that the README suggests ---------------------------------------------------------


def test_the_lines_that_the_readme_replaces_are_in_the_script():
    (diff,) = re.findall(r"(?ms)^```diff\n(.*?)^```", (ROOT / "README.md").read_text())
    replaced = re.findall(r"(?m)^- (.+)$", diff)
    assert len(replaced) == 3
    for line in replaced:
        assert line in SCRIPT.read_text()


def test_a_cosine_instead_of_milestones_is_resumed_to_the_same_bits(
    ck, small, tmp_path, monkeypatch
):
    def cosine(optimizer, milestones, gamma):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    monkeypatch.setattr(torch.optim.lr_scheduler, "MultiStepLR", cosine)
    flags = [*quick_flags(small), "--epochs", 4, "--no-test"]
    result = call(*flags, "--output-dir", "whole", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "CosineAnnealingLR" in result.out and "after epochs" not in result.out

    print_epoch = ck.print_epoch

    def stop_after_two(run):
        print_epoch(run)
        if run["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ck, "print_epoch", stop_after_two)
    assert call(*flags, "--output-dir", "run", cwd=tmp_path).code == 130
    monkeypatch.setattr(ck, "print_epoch", print_epoch)
    assert call(*flags, "--output-dir", "run", "--resume", cwd=tmp_path).code == 0
    whole = (tmp_path / "whole/metrics.csv").read_text().splitlines()
    resumed = (tmp_path / "run/metrics.csv").read_text().splitlines()
    columns = [[line.split(",")[:6] for line in lines] for lines in (whole, resumed)]
    assert columns[0] == columns[1]
    rates = [float(row[1]) for row in columns[0][1:]]
    assert rates == pytest.approx([0.01, 0.00853553, 0.005, 0.00146447], rel=1e-4)


def test_a_schedule_whose_state_could_not_be_loaded_again_ends_the_run_at_once(
    small, tmp_path, monkeypatch
):
    def schedule(factor):
        def make(optimizer, milestones, gamma):
            return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

        monkeypatch.setattr(torch.optim.lr_scheduler, "MultiStepLR", make)

    flags = [*quick_flags(small), "--output-dir", "run"]
    schedule(lambda epoch: np.float64(0.5))
    result = call(*flags, cwd=tmp_path)
    message = one_line_error(result, 1)
    assert "could not be resumed" in message and "numpy" in message
    assert "train loss" not in result.out and not list((tmp_path / "run").iterdir())
    schedule(lambda epoch: 0.5 if epoch < 2 else np.float64(0.5))
    assert "could not be resumed" in one_line_error(call(*flags, cwd=tmp_path), 1)
    schedule(lambda epoch: 0.5)
    result = call(*flags, "--resume", cwd=tmp_path)
    assert result.code == 0 and "resuming after epoch 1" in result.out


def test_a_schedule_that_moves_the_momentum_too_is_resumed(ck, small, tmp_path, monkeypatch):
    def one_cycle(optimizer, milestones, gamma):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=4)

    monkeypatch.setattr(torch.optim.lr_scheduler, "MultiStepLR", one_cycle)
    flags = [*quick_flags(small), "--no-test", "--output-dir", "run"]
    assert call(*flags, cwd=tmp_path).code == 0
    result = call("--resume", "run", "--epochs", 4, "--no-test", cwd=tmp_path)
    assert result.code == 0, result.err


def test_batch_normalization_in_place_of_lrn_trains_resumes_and_predicts(
    ck, small, tmp_path, monkeypatch
):
    class WithBatchNorm(ck.KrizhevskyNet):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.norm1 = torch.nn.BatchNorm2d(96)
            self.norm2 = torch.nn.BatchNorm2d(96)

    monkeypatch.setitem(ck.MODELS, "krizhevsky", WithBatchNorm)
    result = call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    network = [line for line in result.out.splitlines() if line.startswith("network ")]
    assert "krizhevsky, BatchNorm2d, " in network[0], network
    assert call("--resume", "run", "--epochs", 3, cwd=tmp_path).code == 0
    result = call(
        "--checkpoint", "run/best.pt", "--image-dir", small / "test", "--json", cwd=tmp_path
    )
    assert len(json.loads(result.out)) == 50, result.err


def test_crops_of_24_in_the_default_network(ck, small, tmp_path, monkeypatch):
    class Smaller(ck.KrizhevskyNet):
        input_size = 24

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.fc1 = torch.nn.Linear(192 * 2 * 2, 256)

    monkeypatch.setitem(ck.MODELS, "krizhevsky", Smaller)
    result = call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "error, 10 views" in result.out


def test_weights_are_refused_where_the_network_was_edited_and_the_shapes_still_fit(
    ck, small, tmp_path, monkeypatch
):
    trained = tmp_path / "run"
    active = ("--lrn-alpha", 1.0, "--lrn-k", 1.0)
    assert call(*quick_flags(small), *active, "--output-dir", trained, cwd=tmp_path).code == 0
    uses = [
        ["--resume", trained, "--epochs", 3],
        ["--checkpoint", trained / "best.pt", "--evaluate"],
        ["--checkpoint", trained / "best.pt", "--image-dir", small / "test"],
    ]

    class Averaging(ck.KrizhevskyNet):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.pool1 = torch.nn.AvgPool2d(3, stride=2)

    class Reordered(ck.KrizhevskyNet):
        def forward(self, x):
            x = self.norm1(self.pool1(self.relu1(self.conv1(x))))
            x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
            x = self.pool3(self.relu3(self.conv3(x))).flatten(1)
            return self.fc3(self.relu5(self.fc2(self.relu4(self.fc1(x)))))

    before = {path: path.read_bytes() for path in trained.iterdir()}
    for network in (Averaging, Reordered):
        monkeypatch.setitem(ck.MODELS, "krizhevsky", network)
        for words in uses:
            assert "edited" in one_line_error(call(*words, cwd=trained.parent))
    assert {path: path.read_bytes() for path in trained.iterdir()} == before
    monkeypatch.setitem(ck.MODELS, "krizhevsky", type("Renamed", (ck.KrizhevskyNet,), {}))
    for words in reversed(uses):
        result = call(*words, cwd=trained.parent)
        assert result.code == 0, result.err


def test_a_network_with_other_outputs_than_classes_is_refused(ck, small, tmp_path, monkeypatch):
    class Hundred(ck.KrizhevskyNet):
        def __init__(self, num_classes, **options):
            super().__init__(100, **options)

    monkeypatch.setitem(ck.MODELS, "krizhevsky", Hundred)
    error = one_line_error(call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path), code=2)
    assert "(2, 100), not (2, 10)" in error and not (tmp_path / "run").exists()


def test_a_network_that_wants_batches_is_one(ck, small, tmp_path, monkeypatch):
    class Squeezing(ck.KrizhevskyNet):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.norm1 = torch.nn.BatchNorm1d(256, track_running_stats=False)

        def forward(self, x):
            x = self.pool3(self.conv3(self.pool2(self.conv2(self.pool1(self.conv1(x))))))
            return self.fc3(self.norm1(self.fc1(x.flatten(1))[:, :, None, None].squeeze()))

    monkeypatch.setitem(ck.MODELS, "krizhevsky", Squeezing)
    assert call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path).code == 0
    assert call("--resume", "run", "--epochs", 3, cwd=tmp_path).code == 0


def test_a_network_for_a_gpu_only_is_left_to_the_gpu(ck, monkeypatch):
    class OnlyThere(ck.KrizhevskyNet):
        def forward(self, x):
            raise RuntimeError("no CPU")

    monkeypatch.setitem(ck.MODELS, "krizhevsky", OnlyThere)
    with pytest.raises(RuntimeError, match="no CPU"):
        ck.build_model(ck.Config(), 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ck.build_model(ck.Config(), 10).training


def test_the_number_of_classes_goes_in_by_its_name(ck, monkeypatch):
    class Wide(ck.KrizhevskyNet):
        def __init__(self, width=64, num_classes=10, **options):
            super().__init__(num_classes, **options)
            self.width = width

    monkeypatch.setitem(ck.MODELS, "krizhevsky", Wide)
    assert ck.build_model(ck.Config(), 3).width == 64


def test_a_network_that_cannot_run_fails_before_anything_is_written(
    ck, small, tmp_path, monkeypatch
):
    """PyTorch's own error, with the line of the network: `view` of images in channels_last."""

    class Viewing(ck.KrizhevskyNet):
        def forward(self, x):
            x = self.pool3(self.conv3(self.pool2(self.conv2(self.pool1(self.conv1(x))))))
            return self.fc3(self.fc2(self.fc1(x.view(len(x), -1))))

    monkeypatch.setitem(ck.MODELS, "krizhevsky", Viewing)
    with pytest.raises(RuntimeError, match="reshape"):
        call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [22, 25, 64])
def test_crops_that_the_images_do_not_have_are_refused(ck, small, tmp_path, monkeypatch, size):
    network = type("Sized", (ck.KrizhevskyNet,), {"input_size": size})
    monkeypatch.setitem(ck.MODELS, "krizhevsky", network)
    error = one_line_error(call(*quick_flags(small), "--output-dir", "run", cwd=tmp_path), code=2)
    assert "input_size" in error and not (tmp_path / "run").exists()


def test_an_empty_list_of_milestones_is_a_constant_rate(ck, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"dataset": str(small), "epochs": 2, "val_size": 20, "batch_size": 64}
    options = {"milestones": [], "no_test": True, "compile": "off", "device": "cpu"}
    summary = ck.train(ck.Config(**settings, **options, output_dir="run"))
    assert summary["milestones"] == []
    _, *lines = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["0.01", "0.01"]


def test_a_checkpoint_of_a_network_that_is_gone_is_told_in_one_line(
    ck, small, tmp_path, monkeypatch
):
    monkeypatch.setitem(ck.MODELS, "mynet", ck.Net80sec)
    flags = [*quick_flags(small), "--model", "mynet", "--no-test", "--output-dir", "run"]
    assert call(*flags, cwd=tmp_path).code == 0
    monkeypatch.delitem(ck.MODELS, "mynet")
    for words in (["--resume", "run"], [*quick_flags(small), "--init-from", "run/best.pt"]):
        assert "mynet" in one_line_error(call(*words, cwd=tmp_path))
