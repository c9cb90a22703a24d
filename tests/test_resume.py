"""A run that is killed, stopped or continued, wherever, ends as if nothing had happened."""

import contextlib
import csv
import functools
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import Result, call, one_line_error, start
from test_training import tiny_network

import cifar_krizhevsky

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")

# processes that have imported PyTorch and computed nothing: fresh ones, without seconds of imports
server = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else None)
if hasattr(os, "fork"):
    server.set_forkserver_preload(["torch._dynamo", "torchvision.transforms.v2", "pytest"])

# three batches an epoch, the last one short; each epoch is a new best one
RUN = "--model alexnet --epochs 3 --batch-size 64 --lr 0.02 --dropout 0.3 --select loss"
TINY = {"alexnet": tiny_network, "compact": tiny_network}  # with and without LRN
EPOCH_2, EPOCH_3 = 3, 4  # which write of last.pt that is; the first precedes training
UNEQUAL = "images_per_second seconds training_seconds setup_seconds command output_dir asked"


def contents(value: object) -> object:
    """A checkpoint or table as plain values that compare bit by bit, without what may differ."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items() if key not in UNEQUAL.split()}
    return [contents(item) for item in value] if isinstance(value, list | tuple) else value


def read(path: Path) -> list | dict:
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text().splitlines()))
    return json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path)


def differences(folder: Path, other: Path) -> list[str]:
    """The files of two finished runs that are not the same bits."""
    names = ("last.pt", "best.pt", "metrics.csv", "summary.json")
    return [n for n in names if contents(read(folder / n)) != contents(read(other / n))]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def strike(number: int, moment: str, count: int) -> None:
    """Have this process receive a signal at the count-th "step", or "before FILE" or "after FILE":
    when a file replaces the one of that name for the count-th time."""
    when, _, name = moment.partition(" ")
    owner, attribute = (torch.optim.SGD, "step") if when == "step" else (os, "replace")
    function, counter = getattr(owner, attribute), itertools.count(1)

    def struck(*args: object, **options: object) -> object:
        hit = (when == "step" or Path(args[1]).name == name) and next(counter) == count
        if hit and when != "after":
            os.kill(os.getpid(), number)
        result = function(*args, **options)
        if hit:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, attribute, struck)


def child(flags: list[str], cwd: Path, blow: tuple | None) -> None:
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    with open("out", "w", 1) as sys.stdout, open("err", "w", 1) as sys.stderr:
        cifar_krizhevsky.save_plot = lambda *_: True
        cifar_krizhevsky.MODELS |= TINY
        if blow:
            strike(*blow)
        sys.exit(cifar_krizhevsky.main(flags))


def train(*flags: object, cwd: Path, blow: tuple | None = None) -> Result:
    """Run the command line in a process, which may receive a blow: signal, moment, count."""
    process = server.Process(target=child, args=([*map(str, flags)], cwd, blow))
    process.start()
    process.join(300)
    process.kill()
    return Result(process.exitcode, (cwd / "out").read_text(), (cwd / "err").read_text())


def kill(moment: str, count: int, *flags: object, cwd: Path) -> None:
    assert train(*flags, cwd=cwd, blow=(signal.SIGKILL, moment, count)).code == -signal.SIGKILL


def finish(*flags: object, cwd: Path) -> str:
    """Run the command line to its end, in this process; returns what it printed."""
    result = call(*flags, cwd=cwd)
    assert result.code == 0, result.err
    return result.out


@pytest.fixture(autouse=True)
def tiny(ck, monkeypatch):
    """Runs in this process are as those in `child`."""
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)
    monkeypatch.setattr(ck, "MODELS", ck.MODELS | TINY)


@pytest.fixture(scope="module")
def flags(small) -> list[str]:
    return [*RUN.split(), "--compile", "off", "--dataset", str(small)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """The folder of a run that was left in peace."""
    cwd = tmp_path_factory.mktemp("whole")
    assert train(*flags, "--output-dir", "run", cwd=cwd).code == 0
    return cwd / "run"


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of it, to do with as one likes."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def halfway(flags, tmp_path) -> Path:
    """The folder of a run that was killed in its second epoch."""
    kill("step", 5, *flags, "--output-dir", "run", cwd=tmp_path)
    return tmp_path / "run"


MOMENTS = [("step", 2), ("step", 5), ("before last.pt", EPOCH_2), ("before best.pt", 2)]
MOMENTS += [("after last.pt", EPOCH_2)]  # best.pt and metrics.csv are of the epoch before,
MOMENTS += [("after last.pt", EPOCH_3)]  # and here nothing is left to train
MOMENTS += [("before metrics.csv", EPOCH_3), ("before summary.json", 1)]
MOMENTS += [("before best.pt", 4)]  # which would have given it its temperature


@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_a_killed_and_resumed_run_ends_with_the_bits_of_one_that_was_not(
    moment, count, flags, whole, tmp_path
):
    command = [*flags, "--output-dir", "run"]
    kill(moment, count, *command, cwd=tmp_path)
    finish(*command, "--resume", cwd=tmp_path)
    assert differences(tmp_path / "run", whole) == []
    assert len([*(tmp_path / "run").iterdir()]) == len([*whole.iterdir()])  # no half file


def test_the_real_network_with_compiled_kernels_is_resumed_exactly_too(flags, tmp_path):
    command = [*flags, "--model", "krizhevsky", "--compile", "auto", "--epochs", 2, "--no-test"]
    command += ["--val-size", 150, "--batch-size", 20, "--output-dir"]
    if "without torch.compile" in finish(*command, "whole", cwd=tmp_path):
        pytest.skip("no compiler")
    kill("step", 5, *command, "run", cwd=tmp_path)
    finish("--resume", "run/last.pt", "--no-test", cwd=tmp_path)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_run_from_another_machine_continues_with_a_note_on_its_bits(halfway, whole, tmp_path):
    last = read(halfway / "last.pt")
    last["hardware"]["threads"] = 97
    last["optimizer"]["param_groups"][0]["fused"] = True  # as CUDA has it
    for state in last["optimizer"]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()  # as MPS has it
    torch.save(last, halfway / "last.pt")
    out = finish("--resume", "run/last.pt", cwd=tmp_path)
    (note,) = [line for line in out.splitlines() if "bit for bit" in line]
    assert note.startswith("note: ") and "threads" in note
    assert differences(halfway, whole) == []
    first = read(halfway / "last.pt")["optimizer"]["state"][0]["momentum_buffer"]
    assert first.is_contiguous(memory_format=torch.channels_last)  # as CUDA's kernel wants it


def test_a_second_experiment_needs_no_flag_and_the_newest_is_continued(flags, tmp_path):
    once, runs = [*flags, "--epochs", 1, "--no-test"], tmp_path / "runs"
    names = [f"small-alexnet-seed0{number}" for number in ("", "-2", "-3")]
    for name in names:
        assert (f"goes to runs/{name}" in finish(*once, cwd=tmp_path)) == (name != names[0])
    newest = (runs / names[2]).rename(runs / f"{names[0]}-10")  # after -2, though not as text
    older = files(runs / names[0]), files(runs / names[1])
    finish(*once, "--epochs", 2, "--resume", cwd=tmp_path)
    assert [row["epoch"] for row in read(newest / "metrics.csv")] == ["1", "2"]
    assert (files(runs / names[0]), files(runs / names[1])) == older
    assert len([*runs.iterdir()]) == 3


def test_of_several_runs_the_one_of_this_commands_settings_is_continued(flags, small, tmp_path):
    one = [*flags, "--epochs", 1, "--no-test"]
    other = [*one, "--momentum", 0.5]
    first, second = (tmp_path / "runs" / f"small-alexnet-seed0{number}" for number in ("", "-2"))
    for command in (one, other):
        finish(*command, cwd=tmp_path)
    for command, folder, not_this in ((one, first, second), (other, second, first)):
        before = files(not_this)
        finish(*command, "--epochs", 2, "--resume", cwd=tmp_path)
        assert len(read(folder / "metrics.csv")) == 2 and files(not_this) == before
    before = files(first)
    no_settings = ["--dataset", small, "--model", "alexnet", "--epochs", 3, "--no-test", "--resume"]
    finish(*no_settings, cwd=tmp_path)  # the newest
    assert len(read(second / "metrics.csv")) == 3 and files(first) == before


def test_resume_file_continues_in_its_folder_with_its_settings_and_one_note_of_them(
    halfway, whole, tmp_path
):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    out = finish("--resume", halfway / "last.pt", cwd=elsewhere)
    assert differences(halfway, whole) == []
    assert not [*elsewhere.iterdir()]
    (note,) = [line for line in out.splitlines() if "Config" in line]
    for setting in ("batch.size 64", "lr 0.02", "dropout 0.3", "select loss"):
        assert re.search(setting, note)
    assert note.startswith("note: ") and "momentum" not in note


WRONG = ["--resume missing.pt", "--dataset nonsense", "--dataset nonsense --seeds 2"]
WRONG += ["--dataset nonsense --output-dir new", "--val-size 191", "--device nonsense"]


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_is_made_before_everything_is_checked(wrong, flags, tmp_path):
    message = one_line_error(call(*flags, *wrong.split(), cwd=tmp_path))
    assert wrong.split()[1] in message
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out(flags, finished, tmp_path):
    for _ in range(2):
        before = files(finished)
        message = one_line_error(call(*flags, "--output-dir", "run", cwd=tmp_path), code=2)
        assert ("--resume" in message) == (finished / "last.pt").exists()
        assert "--output-dir" in message
        assert files(finished) == before
        (finished / "last.pt").unlink(missing_ok=True)  # as the folders of published runs


def test_more_epochs_move_no_milestone_and_end_as_a_run_that_was_as_long(flags, finished, tmp_path):
    longer, milestones = [*flags, "--epochs", 5], read(finished / "summary.json")["milestones"]
    finish(*longer, "--milestones", *milestones, "--output-dir", "long", cwd=tmp_path)
    for _ in range(2):  # the fractions of the command are those of the shorter run
        again = [*longer, "--milestones", "0.3", "0.6", "0.8", "--output-dir", "run", "--resume"]
        finish(*again, cwd=tmp_path)
    assert differences(finished, tmp_path / "long") == []


def test_the_command_of_a_recipe_resumes_its_run_and_another_recipe_is_refused(small, tmp_path):
    command = ["--dataset", small, "--no-test", "--compile", "off", "--resume", "--recipe"]
    for words, epochs in ((["quick"], 4), (["quick", "--epochs", 5], 5)):
        finish(*command, *words, cwd=tmp_path)
        (path,) = tmp_path.glob("runs/*/summary.json")
        assert (read(path)["epochs"], read(path)["milestones"]) == (epochs, [3])
    message = one_line_error(call(*command, "short", cwd=tmp_path), code=2)
    assert "--batch-size 32" in message


def test_a_recipe_that_differs_in_its_epochs_alone_is_another(ck, small, tmp_path, monkeypatch):
    shorter = ck.RECIPES["quick"] | {"epochs": 2}
    monkeypatch.setitem(ck.RECIPES, "shorter", shorter)
    command = ["--dataset", small, "--no-test", "--compile", "off", "--recipe"]
    finish(*command, "shorter", cwd=tmp_path)
    message = one_line_error(call(*command, "quick", "--resume", cwd=tmp_path), code=2)
    assert "--recipe shorter" in message
    finish(*command, "quick", "--epochs", 1, cwd=tmp_path)
    finish(*command, "shorter", "--epochs", 3, "--resume", cwd=tmp_path)  # not the newest
    finish(*command, "quick", "--resume", cwd=tmp_path)
    runs = {path.parent.name: read(path) for path in tmp_path.glob("runs/*/summary.json")}
    assert [runs[name]["epochs"] for name in sorted(runs)] == [3, 1]


OTHER = """--val-size 10; --inputs 0-255; --model compact; --norm none; --lrn-size 9; --lrn-alpha 1
    --lrn-beta 0.5; --lrn-k 1; --dropout 0.25; --recipe quick; --batch-size 48; --lr 0.01
    --momentum 0.5; --weight-decay 0; --label-smoothing 0.1; --gamma 0.5; --milestones 1 3; --seed 1
    --select accuracy; --precision {precision}; --deterministic; --epochs 2"""


def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(flags, finished, tmp_path):
    for milestones in (read(finished / "summary.json")["milestones"], (0.3, 0.6, 0.8)):
        agreeing = (*flags, "--milestones", *milestones, "--precision", "auto")
        finish(*agreeing, "--output-dir", "run", "--resume", cwd=tmp_path)
    before = files(finished)
    precision = "fp32" if read(finished / "summary.json")["precision"] == "bf16" else "bf16"
    for words in map(str.split, OTHER.format(precision=precision).replace("\n", ";").split(";")):
        message = one_line_error(call("--resume", "run/last.pt", *words, cwd=tmp_path), code=2)
        assert words[0] in message
        assert words[0] == "--select" or "select" not in message  # differs, but was not passed
    assert files(finished) == before


def test_a_moved_data_set_is_fine_and_other_pixels_or_labels_are_refused(halfway, small, tmp_path):
    resume, before = ("--resume", "run/last.pt", "--dataset", "data"), files(halfway)
    data = Path(shutil.copytree(small, tmp_path / "data"))
    for old, new in (("train/cat/00", "train/cat/zz"), ("test/cat/00", "test/dog/zz")):
        (data / f"{old}.png").rename(data / f"{new}.png")  # another order, another label
        one_line_error(call(*resume, cwd=tmp_path))
        assert files(halfway) == before
        (data / f"{new}.png").rename(data / f"{old}.png")
    finish(*resume, cwd=tmp_path)


@pytest.mark.parametrize(
    "blow", [(signal.SIGINT, "step", 5), (signal.SIGTERM, "after last.pt", EPOCH_2)]
)
def test_a_stopped_run_says_how_to_continue_and_loses_nothing(blow, flags, whole, tmp_path):
    stopped = train(*flags, "--output-dir", "a run", cwd=tmp_path, blow=blow)
    assert stopped.code == 130 and "Traceback" not in stopped.err
    python, _, *words = shlex.split(stopped.err.splitlines()[-1])
    assert python == "python"
    finish(*words, cwd=tmp_path)
    assert differences(tmp_path / "a run", whole) == []


def test_a_stopped_run_names_its_own_folder_and_before_it_has_one_none(
    ck, flags, tmp_path, monkeypatch
):
    finish(*flags, "--epochs", 1, cwd=tmp_path)
    before = files(tmp_path)

    def stopped(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)  # a background job may ignore SIGINT

    with monkeypatch.context() as patch:
        patch.setattr(ck, "read_run_data", stopped)
        result = call(*flags, cwd=tmp_path)
    assert result.code == 130 and result.err == "\nstopped\n"
    assert files(tmp_path) == before
    result = train(*flags, cwd=tmp_path, blow=(signal.SIGINT, "step", 5))
    assert result.err.endswith("--resume runs/small-alexnet-seed0-2\n")
    finish(*flags, "--epochs", 1, cwd=tmp_path)  # a newer run of these settings
    before = files(tmp_path / "runs/small-alexnet-seed0-3")
    _, _, *words = shlex.split(result.err.splitlines()[-1])
    assert "resuming after epoch 1" in finish(*words, cwd=tmp_path)
    assert files(tmp_path / "runs/small-alexnet-seed0-3") == before


def test_a_stop_that_is_swallowed_on_its_way_still_stops(flags, tmp_path, monkeypatch):
    def swallowing(*_: object) -> None:  # as torch.compile's guards may do
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", swallowing)
        assert call(*flags, "--output-dir", "run", cwd=tmp_path).code == 130
    run = cifar_krizhevsky.Config(output_dir=str(tmp_path / "run"), resume="", epochs=3)
    assert cifar_krizhevsky.train(run)["epochs"] == 3  # nothing of the stop is left


def test_the_message_of_a_stopped_run_survives_a_tee_that_dies_first(small, tmp_path):
    flags = ["--dataset", small, "--val-size", 190, "--epochs", 1000, "--compile", "off"]
    process = start(*flags, cwd=tmp_path, env={"PYTHONUNBUFFERED": ""})
    try:
        while " 1/1000 " not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
        process.stdout.close()
        process.send_signal(signal.SIGTERM)
        err = process.stderr.read()
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert "Traceback" not in err and "Error" not in err
    assert err.rstrip().endswith("--resume runs/small-krizhevsky-seed0")


def test_seeds_continue_where_they_were_killed_and_finished_ones_stay(flags, tmp_path):
    seeds = [*flags, "--model", "compact", "--epochs", 2, "--seeds", 2, "--output-dir"]
    finish(*seeds, "whole", cwd=tmp_path)
    kill("step", 3 * 2 + 5, *seeds, "run", cwd=tmp_path)
    run, whole = tmp_path / "run", tmp_path / "whole"
    history = read(run / "seed0" / "last.pt")["history"]
    finish(*seeds, "run", "--resume", cwd=tmp_path)
    assert read(run / "seed0" / "last.pt")["history"] == history  # seconds too: not trained again
    assert differences(run / "seed0", whole / "seed0") == []
    assert differences(run / "seed1", whole / "seed1") == []
    values = [read(run / f"seed{seed}" / "summary.json")["test_error"] for seed in range(2)]
    mean, std = statistics.mean(values), statistics.stdev(values)
    results = read(run / "seeds.json")
    assert results == read(whole / "seeds.json")
    assert results["test_error"] == {"mean": mean, "std": std, "values": values}


def test_a_run_goes_on_with_no_other_schedule(ck, flags, tmp_path, monkeypatch):
    """As README's cosine, of three epochs, would from its end: up again."""
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    finish(*flags, "--output-dir", "milestones", "--no-test", cwd=tmp_path)
    for epochs in (3, 6):
        with monkeypatch.context() as patch:
            patch.setattr(
                ck.optim.lr_scheduler, "MultiStepLR", lambda o, *_, n=epochs: cosine(o, n)
            )
            command = [*flags, "--no-test", "--epochs", epochs, "--output-dir", "run", "--resume"]
            result = call(*command, cwd=tmp_path)
            assert (result.code == 0) == (epochs == 3)
            other = call("--resume", "milestones", "--epochs", 4, cwd=tmp_path)
            assert "T_max" in one_line_error(other, 2)
    assert "T_max 3, and not 6" in one_line_error(result, 2)


def test_a_run_goes_on_with_no_other_optimizer(ck, flags, tmp_path, monkeypatch):
    finish(*flags, "--output-dir", "run", "--no-test", cwd=tmp_path)
    before = files(tmp_path)
    nesterov = functools.partial(torch.optim.SGD, nesterov=True)
    monkeypatch.setattr(ck.optim, "SGD", nesterov)
    result = call("--resume", "run", "--epochs", 4, cwd=tmp_path)
    assert "nesterov False, and not True" in one_line_error(result, 2)
    assert files(tmp_path) == before


@pytest.mark.parametrize("has_last", [True, False])
def test_a_copy_in_the_folder_of_a_run_does_not_replace_its_files(finished, has_last):
    shutil.copy(finished / "last.pt", finished / "copy.pt")
    if not has_last:
        (finished / "last.pt").unlink()
    before = files(finished)
    one_line_error(call("--resume", finished / "copy.pt", "--epochs", 4, cwd=finished), 2)
    assert files(finished) == before


def test_a_finished_run_keeps_where_it_was_trained(finished, tmp_path):
    last = read(finished / "last.pt")
    last["hardware"]["processor"] = "another one"
    torch.save(last, finished / "last.pt")
    out = finish("--resume", finished, cwd=tmp_path)
    assert "bit for bit" not in out
    assert read(finished / "summary.json")["processor"] == "another one"


def test_seeds_continue_in_the_newest_folder_with_the_settings_of_the_command(flags, tmp_path):
    seeds = [*flags, "--model", "compact", "--epochs", 1, "--no-test", "--seeds"]
    finish(*seeds, 1, cwd=tmp_path)
    finish(*seeds, 1, "--momentum", 0.5, cwd=tmp_path)
    other = files(tmp_path / "runs/small-compact-seeds-2")
    out = finish(*seeds, 2, "--resume", cwd=tmp_path)
    assert (tmp_path / "runs/small-compact-seeds/seed1").is_dir() and "(n = 2)" in out
    assert files(tmp_path / "runs/small-compact-seeds-2") == other
    longer = [*flags, "--model", "compact", "--epochs", 2, "--no-test", "--seeds", 3, "--resume"]
    longer += ["--output-dir", "runs/small-compact-seeds"]
    message = one_line_error(call(*longer, cwd=tmp_path), 2)
    assert message.endswith("pass --epochs 2 --milestones 1")  # seeds 0 and 1 keep theirs
    assert not (tmp_path / "runs/small-compact-seeds/seed2").exists()
    assert "(n = 3)" in finish(*longer, "--milestones", 1, cwd=tmp_path)


def test_no_average_is_taken_over_runs_of_changed_settings_or_data(small, tmp_path):
    data = Path(shutil.copytree(small, tmp_path / "data"))
    seeds = ["--model", "compact", "--epochs", 1, "--dataset", "data", "--output-dir", "run"]
    finish(*seeds, "--seeds", 1, "--dropout", 0.3, cwd=tmp_path)
    before = (tmp_path / "run" / "seeds.json").read_bytes()
    resume = [*seeds, "--seeds", 2, "--resume"]
    assert "--lr" in one_line_error(call(*resume, "--lr", 0.5, cwd=tmp_path), code=2)
    message = one_line_error(call(*resume, cwd=tmp_path))  # the default dropout in the new seed
    assert "--dropout 0.3" in message
    (data / "test/cat/00.png").rename(data / "test/cat/zz.png")
    assert "other images" in one_line_error(call(*resume, "--dropout", 0.3, cwd=tmp_path))
    assert (tmp_path / "run" / "seeds.json").read_bytes() == before


def test_a_tested_run_is_not_made_one_without_test(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = files(tmp_path / "run")
    message = one_line_error(call("--resume", "run", "--no-test", cwd=tmp_path), 2)
    assert "--no-test" in message and files(tmp_path / "run") == before


def test_a_run_without_test_is_tested_afterwards(flags, whole, tmp_path):
    command = [*flags, "--output-dir", "run"]
    finish(*command, "--no-test", cwd=tmp_path)
    assert "test_error" not in read(tmp_path / "run" / "summary.json")
    finish(*command, "--resume", cwd=tmp_path)
    assert differences(tmp_path / "run", whole) == []
