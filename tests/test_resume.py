"""A run that is killed, stopped and resumed, however often and wherever, ends as if nothing had happened.

The runs are processes of their own, forked from a server that has imported the script and has not computed anything:
each is as fresh as one from the shell, without the seconds that importing PyTorch takes.
"""

import csv
import json
import os
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import SMALL_RUN, one_line_error, server, start

import cifar_krizhevsky

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")

# 48 training images in four batches, the last one short; a best epoch that changes
RUN = ["--dataset", "synthetic", "--val-size", "20", "--batch-size", "14", "--select", "loss", "--lr", "0.02"]
RUN += ["--compile", "off", "--epochs", "3"]
COUNTS = (68, 10)
EPOCH_1, EPOCH_2, EPOCH_3 = 2, 3, 4  # the how-manieth write of last.pt that is; the first comes before the training

# what two equal runs do not share: times, and what a resumed run may change
UNEQUAL = {"images_per_second", "seconds", "training_seconds", "command", "output_dir"}


def contents(value: object) -> object:
    """A checkpoint, table or summary as plain values that compare bit by bit, without what may differ."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items() if key not in UNEQUAL}
    if isinstance(value, list | tuple):
        return [contents(item) for item in value]
    return value


def results(folder: Path) -> dict[str, object]:
    """What a finished run has written: its state, the best network, the table and the summary."""
    with (folder / "metrics.csv").open(newline="") as table:
        found = {
            "metrics.csv": list(csv.DictReader(table)),
            "summary.json": json.loads((folder / "summary.json").read_text()),
        }
    found |= {name: torch.load(folder / name, weights_only=True) for name in ("last.pt", "best.pt")}
    return {name: contents(value) for name, value in found.items()}


def differences(folder: Path, other: Path) -> list[str]:
    """The files of two finished runs that are not the same bits."""
    these, those = results(folder), results(other)
    return [name for name in these if these[name] != those[name]]


def send_itself(number: int, moment: str, count: int, times: int = 1) -> None:
    """Have this process receive a signal at the count-th "step", or when it writes a file for the count-th time.

    "torn last.pt" is when half of the new file is written, "before last.pt" when all of it is but the old one still
    stands in its place, "after last.pt" when it has replaced the old one.
    """
    when, _, name = moment.partition(" ")
    step, replace_file = torch.optim.SGD.step, os.replace

    def reached(source: Path | None = None) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            if when == "torn":
                os.truncate(source, Path(source).stat().st_size // 2)
            for _ in range(times):
                os.kill(os.getpid(), number)

    def counted_step(*arguments: object, **options: object) -> object:
        reached()
        return step(*arguments, **options)

    def counted_replace(source: Path, target: Path) -> None:
        if Path(target).name == name and when != "after":
            reached(source)
        replace_file(source, target)
        if Path(target).name == name and when == "after":
            reached()

    if when == "step":
        torch.optim.SGD.step = counted_step
    else:
        os.replace = counted_replace


def _child(arguments: list[str], cwd: Path, blow: tuple | None) -> None:
    os.chdir(cwd)
    torch.set_num_threads(2)  # also where the tests run side by side: the bits must not depend on which is faster
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would not have
    with open("stdout", "w", buffering=1) as sys.stdout, open("stderr", "w", buffering=1) as sys.stderr:
        cifar_krizhevsky.SYNTHETIC_COUNTS = COUNTS
        cifar_krizhevsky.save_pictures = lambda *_: []  # they take longer than such a run
        if blow:
            send_itself(*blow)
        sys.exit(cifar_krizhevsky.main(arguments))


def train(*arguments: object, cwd: Path, blow: tuple | None = None) -> CompletedProcess:
    """Run the command line in a process of its own, which may receive a blow: a signal, a moment and a count."""
    words = [str(argument) for argument in arguments]
    process = server.Process(target=_child, args=(words, cwd, blow))
    process.start()
    process.join(300)
    process.kill()
    out, err = ((cwd / name).read_text() for name in ("stdout", "stderr"))
    return CompletedProcess(words, process.exitcode, out, err)


def killed(moment: str, count: int) -> tuple:
    return signal.SIGKILL, moment, count


def command_in(out: str) -> list[str]:
    """The arguments of the command to go on with that a stopped run prints, as its last line."""
    python, script, *arguments = shlex.split(out.splitlines()[-1])
    assert (python, script) == ("python", "cifar_krizhevsky.py")
    return arguments


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that was left in peace."""
    cwd = tmp_path_factory.mktemp("whole")
    result = train(*RUN, "--output-dir", "run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (cwd / "run").iterdir()} >= {"last.pt", "best.pt", "metrics.csv", "summary.json"}
    return cwd / "run"


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """The folder of a run that was killed in its second epoch; for tests that only read it."""
    cwd = tmp_path_factory.mktemp("halfway")
    assert train(*RUN, "--output-dir", "run", cwd=cwd, blow=killed("step", 6)).returncode == -signal.SIGKILL
    return cwd / "run"


# ----------------------------------------------------------------------------------------------------------------------
# Kills
# ----------------------------------------------------------------------------------------------------------------------

MOMENTS = [
    ("step", 1),  # before anything is trained
    ("step", 3),  # in the first epoch
    ("step", 4),  # in its short last batch
    ("step", 7),
    ("torn last.pt", EPOCH_1),
    ("torn last.pt", EPOCH_3),
    ("before last.pt", EPOCH_2),
    ("after last.pt", 1),
    ("after last.pt", EPOCH_2),  # best.pt and metrics.csv are still those of the first epoch
    ("after last.pt", EPOCH_3),  # nothing is left to train, but they are behind
    ("torn best.pt", 2),
    ("before metrics.csv", EPOCH_3),
    ("before summary.json", 1),
]


@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_a_killed_and_resumed_run_ends_with_the_bits_of_one_that_was_not(moment, count, whole, tmp_path):
    command = [*RUN, "--output-dir", "run"]
    assert train(*command, cwd=tmp_path, blow=killed(moment, count)).returncode == -signal.SIGKILL
    resumed = train(*command, "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(tmp_path / "run", whole) == []


def test_a_run_killed_before_its_first_save_starts_from_the_first_epoch(whole, tmp_path):
    command = [*RUN, "--output-dir", "run"]
    train(*command, cwd=tmp_path, blow=killed("torn last.pt", 1))
    resumed = train(*command, "--resume", cwd=tmp_path)
    assert "nothing to resume" in resumed.stdout
    assert differences(tmp_path / "run", whole) == []


def test_a_run_killed_again_and_again_ends_with_the_same_bits(whole, tmp_path):
    command = [*RUN, "--output-dir", "run", "--resume"]
    blows = [
        ("step", 2),
        ("step", 2),
        ("torn last.pt", 1),
        ("after last.pt", 2),
        ("step", 4),
        ("before metrics.csv", 2),
    ]
    for blow in blows:
        assert train(*command, cwd=tmp_path, blow=killed(*blow)).returncode == -signal.SIGKILL
    assert train(*command, cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", whole) == []


def test_a_run_with_fused_kernels_is_resumed_exactly_too(tmp_path):
    fused = [*RUN, "--compile", "on", "--epochs", "2", "--output-dir"]
    uninterrupted = train(*fused, "whole", cwd=tmp_path)
    if "torch.compile does not work here" in uninterrupted.stderr:
        pytest.skip("no compiler")
    assert train(*fused, "run", cwd=tmp_path, blow=killed("step", 6)).returncode == -signal.SIGKILL
    assert train(*fused, "run", "--resume", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_run_from_a_device_with_another_memory_layout_goes_on_as_if_it_had_been_here(halfway, whole, tmp_path):
    shutil.copytree(halfway, tmp_path / "run")
    last = torch.load(halfway / "last.pt", weights_only=True)
    momenta = last["optimizer"]["state"].values()
    assert not all(state["momentum_buffer"].is_contiguous() for state in momenta)
    for state in momenta:
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    last["model"] = {name: weights.contiguous() for name, weights in last["model"].items()}
    torch.save(last, tmp_path / "run" / "last.pt")
    resumed = train(*RUN, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(tmp_path / "run", whole) == []


def test_what_a_killed_save_leaves_behind_is_cleared_away(whole, tmp_path):
    def strangers() -> set[str]:
        return {path.name for path in (tmp_path / "run").iterdir()} - {path.name for path in whole.iterdir()}

    command = [*RUN, "--output-dir", "run", "--resume"]
    train(*command, cwd=tmp_path, blow=killed("torn last.pt", EPOCH_1))
    assert len(strangers()) == 1
    train(*command, cwd=tmp_path)
    assert not strangers()


def test_resume_says_at_which_epoch_and_learning_rate_it_goes_on(tmp_path):
    command = [*RUN, "--milestones", "1", "--gamma", "0.5", "--output-dir", "run"]
    train(*command, cwd=tmp_path, blow=killed("step", 6))
    out = train(*command, "--resume", cwd=tmp_path).stdout
    assert "resuming run/last.pt at epoch 2, learning rate 0.01\n" in out


def test_the_seeds_go_on_where_they_were_killed(tmp_path):
    seeds = [*RUN, "--epochs", "2", "--seeds", "2", "--output-dir"]
    uninterrupted = train(*seeds, "whole", cwd=tmp_path)
    blow = killed("step", 4 * 2 + 6)
    assert train(*seeds, "run", cwd=tmp_path, blow=blow).returncode == -signal.SIGKILL
    first_written = (tmp_path / "run" / "seed0" / "last.pt").stat().st_mtime_ns
    resumed = train(*seeds, "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for seed in ("seed0", "seed1"):
        assert differences(tmp_path / "run" / seed, tmp_path / "whole" / seed) == []
    assert (tmp_path / "run" / "seed0" / "last.pt").stat().st_mtime_ns == first_written
    assert resumed.stdout.split("2 seeds of synthetic,")[1] == uninterrupted.stdout.split("2 seeds of synthetic,")[1]


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C and SIGTERM
# ----------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_stops_a_run_that_the_printed_command_goes_on_with(tmp_path):
    def stopped_after(epoch: int, *arguments: str) -> str:
        """What a run prints that receives Ctrl-C when it has finished this epoch."""
        process, out = start(*arguments, cwd=tmp_path), ""
        try:
            while f" {epoch}/1000 " not in out:
                out += (line := process.stdout.readline())
                assert line, out + process.stderr.read()
            process.send_signal(signal.SIGINT)
            rest, err = process.communicate(timeout=300)
        finally:
            process.kill()
        assert (process.returncode, err) == (130, ""), out + rest
        return out + rest

    long = ("--epochs", "1000", "--milestones", "1000", "--no-test", "--output-dir", "a run")
    out = stopped_after(1, *SMALL_RUN, *long)
    done = torch.load(tmp_path / "a run" / "last.pt", weights_only=True)["epoch"]
    resumed = stopped_after(done + 1, *command_in(out))
    assert f"resuming a run/last.pt at epoch {done + 1}," in resumed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("moment", "count", "epochs"),
    [("step", 2, 0), ("step", 6, 1), ("after last.pt", 3, 2), ("before summary.json", 1, 3)],
)
def test_a_stopped_run_keeps_the_finished_epochs_and_loses_nothing(
    number, code, moment, count, epochs, whole, tmp_path
):
    stopped = train(*RUN, "--output-dir", "run", cwd=tmp_path, blow=(number, moment, count))
    assert (stopped.returncode, stopped.stderr) == (code, "")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == epochs
    assert train(*command_in(stopped.stdout), cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", whole) == []


def test_a_second_ctrl_c_ends_the_run_at_once_and_finished_epochs_are_kept(tmp_path):
    stopped = train(*RUN, "--output-dir", "run", cwd=tmp_path, blow=(signal.SIGINT, "step", 6, 2))
    assert stopped.returncode == -signal.SIGINT
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_a_run_that_was_given_more_epochs_can_be_stopped_too(whole, tmp_path):
    train(*RUN, "--epochs", "1", "--milestones", "1", "2", "--output-dir", "run", cwd=tmp_path)
    longer = ["--resume", "run/last.pt", "--epochs", "3"]
    stopped = train(*longer, cwd=tmp_path, blow=(signal.SIGINT, "step", 2))
    assert train(*command_in(stopped.stdout), cwd=tmp_path).returncode == 0
    assert len(results(tmp_path / "run")["metrics.csv"]) == 3


def test_stopped_seeds_go_on_by_the_printed_command(tmp_path):
    seeds = [*RUN, "--epochs", "1", "--seeds", "2", "--output-dir", "some seeds"]
    stopped = train(*seeds, cwd=tmp_path, blow=(signal.SIGTERM, "step", 6))
    assert stopped.returncode == 143
    resumed = train(*command_in(stopped.stdout), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "some seeds" / "seed1" / "summary.json").exists()


def test_the_printed_command_keeps_what_was_passed_even_if_it_is_the_default(tmp_path):
    train(*RUN, "--epochs", "1", "--milestones", "1", "--output-dir", "run", cwd=tmp_path)
    longer = ["--resume", "run", "--epochs", "200", "--milestones", "1"]
    stopped = train(*longer, cwd=tmp_path, blow=(signal.SIGINT, "before last.pt", 1))
    assert stopped.returncode == 130
    assert "--epochs 200" in " ".join(command_in(stopped.stdout))


def test_the_printed_command_of_several_seeds_names_their_folder(tmp_path):
    folder = "runs/synthetic-krizhevsky-seed0"
    stopped = train(*RUN, "--seeds", "2", "--output-dir", folder, cwd=tmp_path, blow=(signal.SIGINT, "step", 1))
    assert f"--output-dir {folder}" in " ".join(command_in(stopped.stdout))


def test_seeds_do_not_go_on_with_a_run_of_other_settings(tmp_path):
    train(*RUN, "--epochs", "1", "--lr", "0.5", "--output-dir", "runs/seed0", cwd=tmp_path)
    before = (tmp_path / "runs" / "seed0" / "last.pt").read_bytes()
    for flags, name in ((["--epochs", "1"], "--lr"), (["--epochs", "2", "--lr", "0.5"], "--epochs")):
        refused = train(*RUN, *flags, "--seeds", "2", "--output-dir", "runs", cwd=tmp_path)
        assert refused.returncode == 2
        assert name in one_line_error(refused)
    assert (tmp_path / "runs" / "seed0" / "last.pt").read_bytes() == before


def test_a_stopped_run_goes_on_on_the_device_it_was_started_on(tmp_path):
    stopped = train(*RUN, "--device", "cpu", "--output-dir", "run", cwd=tmp_path, blow=(signal.SIGINT, "step", 2))
    assert "--device cpu" in stopped.stdout.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# More epochs, other flags, other files
# ----------------------------------------------------------------------------------------------------------------------


def test_more_epochs_continue_a_run_as_if_it_had_been_that_long(tmp_path):
    command = [*RUN, "--milestones", "1", "3", "--output-dir"]
    train(*command, "long", "--epochs", "4", cwd=tmp_path)
    train(*command, "run", "--epochs", "2", cwd=tmp_path)
    resumed = train(*command, "run", "--epochs", "4", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(tmp_path / "run", tmp_path / "long") == []


def test_more_epochs_are_refused_where_milestones_follow_them_with_those_to_pass(whole, tmp_path):
    for name in ("last.pt", "best.pt", "metrics.csv"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    longer = ["--resume", "last.pt", "--epochs", "4"]
    refused = train(*longer, cwd=tmp_path)
    assert refused.returncode == 2
    milestones = " ".join(map(str, cifar_krizhevsky.drop_epochs(cifar_krizhevsky.Config(epochs=3))))
    assert f"--milestones {milestones}" in one_line_error(refused)
    assert train(*longer, "--milestones", *milestones.split(), cwd=tmp_path).returncode == 0
    assert [row["epoch"] for row in results(tmp_path)["metrics.csv"]] == ["1", "2", "3", "4"]


def test_fewer_epochs_than_are_done_are_refused(whole, ck, capsys):
    assert ck.main(["--resume", str(whole / "last.pt"), "--epochs", "2", "--milestones", "1", "2"]) == 2
    assert "3 epochs behind it" in capsys.readouterr().err


def test_resuming_a_finished_run_evaluates_it_and_says_so(whole, tmp_path):
    (tmp_path / "run").mkdir()
    for path in whole.glob("*.*"):
        (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run" / "summary.json").unlink()
    result = train("--resume", "run/last.pt", cwd=tmp_path)
    assert "finished after 3 epochs" in result.stdout
    assert "images/s" not in result.stdout  # nothing was trained
    assert differences(tmp_path / "run", whole) == []


def test_a_run_with_no_test_is_tested_afterwards_without_that_flag(whole, tmp_path):
    command = [*RUN, "--output-dir", "run"]
    assert train(*command, "--no-test", cwd=tmp_path).returncode == 0
    assert "test_error" not in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert train(*command, "--resume", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", whole) == []


# a value that contradicts the run, for every flag that is part of what it computes
OTHER = {"dataset": "cifar10", "val_size": 10, "norm": "none", "batch_size": 48, "lr": 0.01, "momentum": 0.5}
OTHER |= {"weight_decay": 0.0, "gamma": 0.5, "milestones": 2, "seed": 1, "select": "accuracy", "precision": "fp32"}
OTHER |= {"compile": "auto", "model": "alexnet", "inputs": "0-255", "init": "he", "dropout": 0.25}
OTHER |= {"lrn_size": 9, "lrn_alpha": 0.001, "lrn_beta": 0.5, "lrn_k": 1.0, "label_smoothing": 0.1}
OTHER |= {"deterministic": True}


def test_no_flag_that_a_run_depends_on_is_forgotten_here(ck):
    assert {option.name for option in ck.fields(ck.Config) if not option.metadata.get("free")} <= set(OTHER)


@pytest.mark.parametrize("name", OTHER)
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(name, whole, ck, capsys):
    before = (whole / "last.pt").read_bytes()
    flag = "--" + name.replace("_", "-")
    value = [] if OTHER[name] is True else [str(OTHER[name])]
    assert ck.main(["--resume", str(whole / "last.pt"), flag, *value]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {flag} ")
    assert err.count("\n") == 1
    assert (whole / "last.pt").read_bytes() == before


def test_what_is_not_passed_is_taken_from_the_checkpoint_and_named(halfway, tmp_path):
    (tmp_path / "last.pt").write_bytes((halfway / "last.pt").read_bytes())
    result = train("--resume", "last.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note: batch_size is 14, as in last.pt (the default here is 128)\n" in result.stdout


def test_a_run_goes_on_in_another_folder_and_leaves_the_first_alone(halfway, whole, tmp_path):
    before = {path.name: path.read_bytes() for path in halfway.iterdir()}
    command = [*RUN, "--output-dir", "other", "--resume"]
    assert train(*command, halfway / "last.pt", cwd=tmp_path, blow=killed("step", 2)).returncode == -signal.SIGKILL
    assert train(*command, cwd=tmp_path).returncode == 0  # killed in its first epoch there, it goes on from there
    assert differences(tmp_path / "other", whole) == []
    assert {path.name: path.read_bytes() for path in halfway.iterdir()} == before


def test_a_finished_run_resumed_in_another_folder_is_whole_there(whole, tmp_path):
    assert train(*RUN, "--output-dir", "other", "--resume", whole / "last.pt", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "other", whole) == []


@pytest.mark.parametrize(
    ("key", "then"),
    [("threads", 97), ("torch_version", "1.0"), ("precision_used", "fp64"), ("processor", "Z80"), ("compiled", True)],
)
def test_what_keeps_the_bits_from_being_the_same_is_named_in_one_line(key, then, halfway, tmp_path):
    last = torch.load(halfway / "last.pt", weights_only=True)
    is_now, last["hardware"][key] = last["hardware"][key], then
    if key == "precision_used":  # what was used then is used again, unless a flag says otherwise
        last["config"]["precision"] = is_now
    torch.save(last, tmp_path / "last.pt")
    result = train("--resume", "last.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (note,) = [line for line in result.stdout.splitlines() if "bit for bit" in line]
    assert f"{key} was {then}, is {is_now}" in note


# ----------------------------------------------------------------------------------------------------------------------
# One folder, one run
# ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_out(whole, ck, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert ck.main([*RUN, "--output-dir", str(whole)]) == 2
    message = capsys.readouterr().err
    assert all(way in message for way in ("--resume", "--overwrite", "--output-dir"))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


@pytest.mark.parametrize("moment", ["before last.pt", "after last.pt", "step"])
def test_an_overwriting_run_that_is_stopped_goes_on_by_the_printed_command(moment, whole, tmp_path):
    assert train(*RUN, "--lr", "0.5", "--output-dir", "run", cwd=tmp_path).returncode == 0
    stopped = train(*RUN, "--output-dir", "run", "--overwrite", cwd=tmp_path, blow=(signal.SIGINT, moment, 1))
    assert stopped.returncode == 130
    left = {"best.pt", "summary.json"} & {path.name for path in (tmp_path / "run").iterdir()}
    assert left == (set() if moment == "step" else {"best.pt", "summary.json"})
    resumed = train(*command_in(stopped.stdout), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert differences(tmp_path / "run", whole) == []


def test_resume_never_replaces_a_best_network_whose_last_pt_is_gone(whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes((whole / "best.pt").read_bytes())
    result = train(*RUN, "--output-dir", "run", "--resume", cwd=tmp_path)
    assert result.returncode == 2
    assert "run holds a run already: it has no last.pt" in one_line_error(result)
    assert (tmp_path / "run" / "best.pt").read_bytes() == (whole / "best.pt").read_bytes()


def test_a_second_process_in_the_same_folder_is_refused_until_the_first_ends(ck, tmp_path):
    (tmp_path / "run").mkdir()
    with ck.locked(tmp_path / "run"):  # by this process
        refused = train(*RUN, "--output-dir", "run", cwd=tmp_path)
        assert refused.returncode == 1
        assert "another process is writing to run" in one_line_error(refused)
    assert train(*RUN, "--epochs", "1", "--output-dir", "run", cwd=tmp_path).returncode == 0


def test_a_run_holds_its_folder_while_it_trains(ck, tmp_path, capsys):
    stands_still = (signal.SIGSTOP, "step", 2)
    process = server.Process(target=_child, args=([*RUN, "--output-dir", "run"], tmp_path, stands_still))
    process.start()
    try:
        while not (tmp_path / "run" / "metrics.csv").exists() and process.is_alive():
            time.sleep(0.05)
        assert ck.main([*RUN, "--output-dir", str(tmp_path / "run"), "--resume"]) == 1
    finally:
        process.kill()
        process.join()
    assert "another process" in capsys.readouterr().err


def test_the_lock_file_of_a_killed_run_is_no_obstacle(whole, tmp_path):
    train(*RUN, "--output-dir", "run", cwd=tmp_path, blow=killed("torn last.pt", 1))
    assert (tmp_path / "run").exists()
    assert train(*RUN, "--output-dir", "run", cwd=tmp_path).returncode == 0
    assert differences(tmp_path / "run", whole) == []
