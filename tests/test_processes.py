"""Several processes train one network as one process does, and a process that dies takes nothing along but itself.

All on the CPU, with gloo. What concerns the launcher is started by PyTorch's own, torchrun. The other groups of
processes are forked from a server that has imported the script and are told who they are in the words of torchrun,
without the seconds that it takes to start.
"""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import torch.distributed.run
from conftest import ROOT, server
from torch import distributed

import cifar_krizhevsky

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not distributed.is_available() or not distributed.is_gloo_available(),
    reason="needs POSIX and gloo",
)

# 77 training images: three batches of 25, which no number of processes divides, and one of 2, too few for three; five
# epochs are 20 steps at one learning rate
RUN = ["--dataset", "synthetic", "--val-size", "20", "--batch-size", "25", "--epochs", "5", "--milestones", "5"]
RUN += ["--init", "he", "--lr", "0.0005", "--precision", "fp32", "--compile", "off"]
RUN += ["--seed", "1"]  # with 0 one step is so sensitive to rounding that the weights differ by 1 % of what they learn
COUNTS, EVAL_BATCH_SIZE = (97, 12), 8
STEPS = 20
ROUNDING = 1e-4  # relative, of weights to what they have learned; less than 1e-5 is seen

PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_processes
test_processes.work(sys.argv[1:])
"""


def work(arguments: list[str]) -> None:
    """Run the command line in this process. It writes down what its steps see and give; at one, a blow may fall."""
    torch.set_num_threads(1)
    cifar_krizhevsky.SYNTHETIC_COUNTS, cifar_krizhevsky.EVAL_BATCH_SIZE = COUNTS, EVAL_BATCH_SIZE
    cifar_krizhevsky.save_pictures = lambda *_: []  # they take longer than such a run
    number, train_step, steps = os.environ.get("RANK", "0"), cifar_krizhevsky.train_step, []
    Path(f"pid-{number}").write_text(str(os.getpid()))

    def recorded(model, images, labels, *others):
        result = train_step(model, images, labels, *others)
        steps.append((images.clone(), labels.clone(), result.clone(), torch.initial_seed()))
        blow, *place = os.environ.get("BLOW", "none").split()
        if place == [number, str(len(steps))]:
            fall(blow)
        return result

    def recorded_write(path, content):
        with open(f"written-{number}", "a") as file:
            print(path.name, file=file)
        write_atomically(path, content)

    def recorded_download(*_):
        with open(f"downloads-{number}", "a") as file:
            print("one", file=file)
        raise cifar_krizhevsky.Problem("no network")

    cifar_krizhevsky.download = recorded_download
    write_atomically = cifar_krizhevsky.write_atomically
    cifar_krizhevsky.train_step, cifar_krizhevsky.write_atomically = recorded, recorded_write
    code = cifar_krizhevsky.main(arguments)
    torch.save(steps, f"steps-{number}.pt")
    sys.exit(code)


def fall(blow: str) -> None:
    """What a blow does to the process: SIGKILL kills it, a problem is raised in it, another signal hits torchrun."""
    if blow == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if blow == "problem":
        raise cifar_krizhevsky.Problem("only this process has it")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    os.kill(os.getppid(), getattr(signal, blow))
    while before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]:
        time.sleep(0.01)  # until torchrun has passed it on; the next one would end the process at once


def _child(arguments: list[str], cwd: Path, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    number = environment.get("RANK", "0")
    with open(f"out-{number}", "w") as sys.stdout, open(f"err-{number}", "w") as sys.stderr:
        work(arguments)


def together(count: int, *arguments: object, cwd: Path, blow: str = "none") -> CompletedProcess:
    """Run the command line in so many processes that train together; stdout and stderr are lists, one for each."""
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "BLOW": blow}
    words, group = [str(argument) for argument in arguments], []
    for number in range(count):
        environment = {**shared, "RANK": number, "LOCAL_RANK": number} if count > 1 else {}
        environment = {key: str(value) for key, value in environment.items()}
        group.append(server.Process(target=_child, args=(words, cwd, environment)))
        group[-1].start()
    for process in group:
        process.join(120)
    for process in group:
        process.kill()
        process.join()
    out, err = ([(cwd / f"{name}-{number}").read_text() for number in range(count)] for name in ("out", "err"))
    return CompletedProcess(words, max(abs(process.exitcode) for process in group), out, err)


def _launch(arguments: list[str], cwd: Path, environment: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(environment)
    for stream, name in enumerate(("out", "err"), start=1):
        with open(name, "w") as file:
            os.dup2(file.fileno(), stream)
    torch.distributed.run.main(["--standalone", "--nproc-per-node=2", "program.py", *arguments])


def torchrun(*arguments: object, cwd: Path, blow: str = "none") -> CompletedProcess:
    """Run the command line in two processes under torchrun, and see that it leaves none behind."""
    (cwd / "program.py").write_text(PROGRAM)
    environment = {"OMP_NUM_THREADS": "1", "OMP_PROC_BIND": "false", "BLOW": blow}
    process = server.Process(target=_launch, args=([str(argument) for argument in arguments], cwd, environment))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    left = alive(cwd)
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert left == []
    return CompletedProcess(arguments, process.exitcode, (cwd / "out").read_text(), (cwd / "err").read_text())


def alive(cwd: Path) -> list[int]:
    """Which of the processes that have worked in a folder still live."""

    def is_alive(number: int) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, 0)
            return True
        return False

    found = [int(path.read_text() or 0) for path in cwd.glob("pid-*")]
    return [number for number in found if number and is_alive(number)]


def errors(result: CompletedProcess) -> list[str]:
    """The error messages of the script among what torchrun itself has to say."""
    assert result.returncode != 0, result.stdout
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


def command_in(text: str) -> list[str]:
    """The arguments of the command to go on with, which is that of two processes."""
    (line,) = [line for line in text.splitlines() if line.endswith(" --resume")]
    launcher, processes, script, *arguments = shlex.split(line)
    assert (launcher, processes, script) == ("torchrun", "--nproc-per-node=2", "cifar_krizhevsky.py")
    return arguments


def steps(cwd: Path, count: int) -> list[tuple]:
    """What the steps of a run saw and gave: a tuple for each step, of what each process wrote down."""
    return list(zip(*(torch.load(cwd / f"steps-{i}.pt") for i in range(count)), strict=True))


def last(cwd: Path) -> dict:
    return torch.load(cwd / "run" / "last.pt", weights_only=True)


def assert_same_but_for_rounding(cwd: Path, other: Path) -> None:
    """That two finished runs have the same weights, momentum and figures."""
    these, those = last(cwd), last(other)
    initial = cifar_krizhevsky.build_model(cifar_krizhevsky.saved_config(those), 10).state_dict()
    for name, weight in those["model"].items():
        assert (these["model"][name] - weight).norm() <= ROUNDING * (weight - initial[name]).norm(), name
    for i, state in those["optimizer"]["state"].items():
        difference = these["optimizer"]["state"][i]["momentum_buffer"] - state["momentum_buffer"]
        assert difference.norm() <= ROUNDING * state["momentum_buffer"].norm(), i
    for row, expected in zip(these["history"], those["history"], strict=True):
        for key in {*row} - {"images_per_second", "seconds"}:
            assert row[key] == pytest.approx(expected[key], rel=ROUNDING), key
    figures, expected = (json.loads((folder / "run" / "summary.json").read_text()) for folder in (cwd, other))
    for key in ("best_epoch", "test_error", "test_error_multi_view", "test_loss", "test_loss_multi_view"):
        assert figures[key] == pytest.approx(expected[key], rel=ROUNDING), key


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder in which one process has trained."""
    cwd = tmp_path_factory.mktemp("one")
    result = together(1, *RUN, "--output-dir", "run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have trained under torchrun, and what they printed."""
    cwd = tmp_path_factory.mktemp("two")
    result = torchrun(*RUN, "--output-dir", "run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd, result


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder in which three processes have trained, one of which has no share of the last batch."""
    cwd = tmp_path_factory.mktemp("three")
    result = together(3, *RUN, "--output-dir", "run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd, result


@pytest.fixture(scope="module")
def several(two, three):
    """The folders of the runs of two and of three processes."""
    return {2: two[0], 3: three[0]}


# ----------------------------------------------------------------------------------------------------------------------
# The same training
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_twenty_steps_have_the_losses_that_they_have_in_one_process(count, one, several):
    ours, theirs = (
        torch.stack([sum(result for _, _, result, _ in step)[:2] for step in steps(cwd, processes)])
        for cwd, processes in ((several[count], count), (one, 1))
    )
    assert len(theirs) == STEPS
    assert theirs[:, 0].diff().abs().min() > 0.1  # they do change
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("count", [2, 3])
def test_twenty_steps_end_with_the_weights_and_figures_of_one_process(count, one, several):
    assert_same_but_for_rounding(several[count], one)


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_a_batch_are_that_batch_with_the_same_crops_and_flips(count, one, several):
    for step, ((images, labels, *_),) in zip(steps(several[count], count), steps(one, 1), strict=True):
        assert torch.equal(torch.cat([images for images, *_ in step]), images)
        assert torch.equal(torch.cat([labels for _, labels, *_ in step]), labels)


def test_the_shares_differ_by_one_image_at_most_and_one_of_them_is_empty(three):
    sizes = [[len(labels) for _, labels, *_ in step] for step in steps(three[0], 3)]
    assert sizes == [[9, 8, 8], [9, 8, 8], [9, 8, 8], [1, 1, 0]] * 5


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_an_epoch_has_every_image_once_whatever_the_number_of_processes(ck, count, monkeypatch):
    loader = ck.CifarLoader(
        torch.zeros(77, 3, 32, 32, dtype=torch.uint8), torch.arange(77), ["any"], [0.5] * 3, [1] * 3
    )
    loader.batch_size, loader.augment, seen = 25, True, []
    for number in range(count):
        monkeypatch.setattr(ck, "training_group", lambda number=number: (number, count))
        batches = [labels for _, labels in loader]
        assert len(batches) == 4  # also where its shares are empty: every process takes every step
        seen += batches
    assert torch.cat(seen).sort().values.tolist() == [*range(77)]


@pytest.mark.parametrize("count", [2, 3])
def test_dropout_drops_other_units_in_each_process_and_in_the_first_those_of_one_process(count, one, several):
    for step, ((*_, seed),) in zip(steps(several[count], count), steps(one, 1), strict=True):
        seeds = [seed for *_, seed in step]
        assert seeds[0] == seed
        assert len({*seeds}) == count


def measured_alone(ck, monkeypatch, folder: Path) -> dict[str, float]:
    """The figures of the best network of a run, measured anew by this one process in batches of another size."""
    monkeypatch.setattr(ck, "SYNTHETIC_COUNTS", COUNTS)
    model, *_ = ck.load_trained(folder / "best.pt", torch.device("cpu"))
    _, val_loader, test_loader = ck.get_cifar_data_loaders(dataset_name="synthetic", val_size=20)
    validation = ck.evaluate_model(model, val_loader)
    figures = ck.test_figures(model, test_loader, "fp32")[0]
    return figures | {"best_val_loss": validation.loss, "best_val_accuracy": validation.top1}


def assert_evaluation_is_exact(ck, monkeypatch, folder: Path) -> None:
    figures, written = measured_alone(ck, monkeypatch, folder), json.loads((folder / "summary.json").read_text())
    assert figures["test_images"] == COUNTS[1]
    for key, value in figures.items():
        if isinstance(value, float):
            assert written[key] == pytest.approx(value, rel=1e-6), key
        else:
            assert json.loads(json.dumps(value)) == written[key], key


@pytest.mark.parametrize("count", [2, 3])
def test_the_evaluation_that_several_processes_share_is_that_of_one(ck, count, several, monkeypatch):
    assert_evaluation_is_exact(ck, monkeypatch, several[count] / "run")


def test_batch_normalisation_trains_and_says_what_is_different(ck, tmp_path, monkeypatch):
    result = together(3, *RUN, "--epochs", "2", "--model", "compact", "--init", "pytorch", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [out.count("note: batch normalisation") for out in result.stdout] == [1, 0, 0]
    (folder,) = (tmp_path / "runs").iterdir()
    state = torch.load(folder / "last.pt", weights_only=True)["model"]
    assert state.keys() == ck.CompactNet().state_dict().keys()
    assert all(value.isfinite().all() for value in state.values())  # an empty share has no mean
    assert state["stem.1.num_batches_tracked"] == 8
    assert_evaluation_is_exact(ck, monkeypatch, folder)  # all processes evaluate with the same statistics


# ----------------------------------------------------------------------------------------------------------------------
# One of them prints and writes
# ----------------------------------------------------------------------------------------------------------------------


def shapes(out: str) -> list[str]:
    """The lines that were printed, without the figures."""
    return [" ".join(re.sub(r"[\d.,:]+", "0", line).replace("*", "").split()) for line in out.splitlines()]


def test_two_processes_print_the_lines_that_one_prints(one, two):
    assert shapes(two[1].stdout) == shapes((one / "out-0").read_text())


def test_only_the_first_process_prints(three):
    assert three[1].stdout[0].count("wrote run") == 1
    assert three[1].stdout[1:] == ["", ""]
    assert three[1].stderr == ["", "", ""]


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_the_files_that_one_writes(count, one, several):
    names, expected = ({path.name for path in (cwd / "run").iterdir()} for cwd in (several[count], one))
    assert names == expected >= {"last.pt", "best.pt", "metrics.csv", "summary.json"}
    with (several[count] / "run" / "metrics.csv").open(newline="") as table:
        assert [row["epoch"] for row in csv.DictReader(table)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("count", [2, 3])
def test_the_first_process_writes_what_one_writes_and_the_others_nothing(count, one, several):
    assert (several[count] / "written-0").read_text() == (one / "written-0").read_text()
    assert {path.name for path in several[count].glob("written-*")} == {"written-0"}


def test_the_summary_says_how_many_processes_there_were(one, several):
    for count, cwd in {1: one, **several}.items():
        assert json.loads((cwd / "run" / "summary.json").read_text())["processes"] == count


def test_only_the_first_process_uses_a_trained_network(one, tmp_path):
    (tmp_path / "best.pt").write_bytes((one / "run" / "best.pt").read_bytes())
    result = together(2, "--checkpoint", "best.pt", "--evaluate", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout[0])["test_images"] == COUNTS[1]
    assert (result.stdout[1], result.stderr[1]) == ("", "")


# ----------------------------------------------------------------------------------------------------------------------
# Stops and ends
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_another_number_of_processes_as_if_it_had_not_changed(one, tmp_path):
    command = [*RUN, "--output-dir", "run"]
    assert together(2, *command, "--epochs", "2", cwd=tmp_path).returncode == 0
    for before, now, epochs in ((2, 1, 3), (1, 3, 5)):
        result = together(now, *command, "--epochs", epochs, "--resume", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (note,) = [line for line in "".join(result.stdout).splitlines() if "bit for bit" in line]
        assert note.endswith(f": processes was {before}, is {now}")
    assert_same_but_for_rounding(tmp_path, one)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_run_with_a_message_and_last_pt_goes_on(number, one, tmp_path):
    result = torchrun(*RUN, "--output-dir", "run", cwd=tmp_path, blow=f"SIGKILL {number} 10")  # in the third epoch
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun says that
    assert last(tmp_path)["epoch"] == 2
    arguments = [*RUN, "--output-dir", "run", "--resume"]
    if number > 0:  # the first process lives to tell
        arguments = command_in(result.stdout + result.stderr)
    resumed = together(2, *arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming run/last.pt at epoch 3" in resumed.stdout[0]
    assert_same_but_for_rounding(tmp_path, one)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_torchrun_keeps_the_finished_epochs_and_loses_nothing(name, one, tmp_path):
    result = torchrun(*RUN, "--output-dir", "run", cwd=tmp_path, blow=f"{name} 0 10")
    assert result.returncode != 0
    assert errors(result) == []
    assert result.stdout.count("stopped; finished epochs are kept") == 1
    assert last(tmp_path)["epoch"] == 2
    resumed = together(2, *command_in(result.stdout), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_but_for_rounding(tmp_path, one)


def test_a_wrong_flag_is_told_once(tmp_path):
    assert errors(torchrun("--lr", "0", cwd=tmp_path)) == ["error: --lr 0.0: must be above 0"]


def test_a_loss_that_is_not_finite_is_told_once(tmp_path):
    result = torchrun(*RUN, "--lr", "1e6", "--output-dir", "run", cwd=tmp_path)
    (message,) = errors(result)
    assert "epoch 1: the loss is not finite" in message
    assert last(tmp_path)["epoch"] == 0


def test_a_folder_that_holds_a_run_already_is_told_once(one, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((one / "run" / "last.pt").read_bytes())
    result = torchrun(*RUN, "--output-dir", "run", cwd=tmp_path)
    (message,) = errors(result)
    assert "run holds a run already" in message
    assert (tmp_path / "run" / "last.pt").read_bytes() == (one / "run" / "last.pt").read_bytes()


def test_only_the_first_process_downloads_and_its_failure_is_told_once(tmp_path):
    result = torchrun("--epochs", 1, "--no-test", "--output-dir", "run", cwd=tmp_path)
    assert errors(result) == ["error: no network"]
    assert [path.name for path in tmp_path.glob("downloads-*")] == ["downloads-0"]
    assert (tmp_path / "downloads-0").read_text() == "one\n"


def test_what_goes_wrong_in_another_process_alone_is_told_too(tmp_path):
    result = together(2, *RUN, "--output-dir", "run", cwd=tmp_path, blow="problem 1 6")
    assert result.returncode == 1
    assert result.stderr[1] == "error: epoch 2: only this process has it; run/last.pt holds the epochs before\n"
    assert re.match(r"error: another process of this run has ended \(\w.*\)\. To go on:\n", result.stderr[0])
    assert last(tmp_path)["epoch"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Seeds
# ----------------------------------------------------------------------------------------------------------------------


def test_seeds_are_spread_over_the_processes_and_give_what_they_give_in_one(tmp_path):
    command = [*RUN[:-2], "--epochs", "1", "--seeds", "3", "--output-dir", "run"]  # without --seed
    written = {}
    for count in (1, 2):
        (cwd := tmp_path / str(count)).mkdir()
        result = together(count, *command, cwd=cwd)
        assert result.returncode == 0, result.stderr
        seeds = [json.loads((cwd / "run" / f"seed{i}" / "summary.json").read_text()) for i in range(3)]
        told = result.stdout[0].split("\n3 seeds of synthetic,")[1]
        written[count] = [summary["test_loss"] for summary in seeds], told
        assert result.stdout[1:] == [""] * (count - 1)
    assert written[1] == written[2]
    assert "± " in written[2][1]
    assert "(n = 3)" in written[2][1]
