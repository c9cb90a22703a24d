"""Several processes under torchrun train as one process does; it starts this file in each."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call, quick_flags
from torch import distributed

import cifar_krizhevsky as ck

gloo = distributed.is_available() and distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not gloo, reason="needs gloo")
RUN = "--output-dir run --precision fp32 --milestones 2 --lr 0.02 --seed 1"
ROUNDING = 1e-4  # of weights, relative to what they have learned; less than 1e-5 is seen
REFUSED = {  # flags, and what the message names
    "--seeds 2": "torchrun",
    "--checkpoint best.pt --evaluate": "torchrun",
    "--checkpoint best.pt --image cat.png": "torchrun",
    "--batch-size 25": "--batch-size 25",
    "--lr 0": "--lr 0",
}


def record(name: str, folder: Path, flags: list[str], rank: int = 0) -> SimpleNamespace:
    """Run a command line and record it; the second process of "killed" dies in epoch 2."""
    steps, written = [], []
    train_one_epoch, replace = ck.train_one_epoch, os.replace

    def recorded_epoch(model, batches, *others):
        if steps and (name, rank) == ("killed", 1):
            while not (folder / "run" / "best.pt").exists():  # the first process saves epoch 1
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        steps.extend(batches := list(batches))
        return train_one_epoch(model, batches, *others)

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck, "train_one_epoch", recorded_epoch)
        patch.setattr(os, "replace", lambda a, b: written.append(Path(b).name) or replace(a, b))
        patch.setattr(ck, "save_plot", lambda path, *_: path.touch() is None)
        return SimpleNamespace(**call(*flags, cwd=folder)._asdict(), steps=steps, written=written)


def work(folder: Path) -> None:
    """In each process of torchrun: the command lines of a plan, each in a group of its own."""
    rank = int(os.environ["RANK"])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for name, (flags, port) in json.loads((folder / "plan.json").read_text()).items():
        os.environ["MASTER_PORT"] = str(port)
        torch.save(vars(record(name, folder / name, flags, rank)), folder / f"{name}-{rank}.pt")
        if distributed.is_initialized():  # after an error, with which a process ends
            distributed.destroy_process_group()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def last(folder: Path) -> dict:
    return torch.load(folder / "run" / "last.pt", weights_only=True)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "run" / "summary.json").read_text())


def assert_same_but_for_rounding(folder: Path, other: Path) -> None:
    """That two finished runs have the same weights, momentum and metrics."""
    ours, theirs = last(folder), last(other)
    initial = ck.build_model(ck.Config(seed=1), 10).state_dict()
    for name, weight in theirs["model"].items():
        assert (ours["model"][name] - weight).norm() <= ROUNDING * (weight - initial[name]).norm()
    for i, state in theirs["optimizer"]["state"].items():
        difference = ours["optimizer"]["state"][i]["momentum_buffer"] - state["momentum_buffer"]
        assert difference.norm() <= ROUNDING * state["momentum_buffer"].norm()
    keys = {"train_loss", "train_accuracy", "val_loss", "best_epoch", "test_error", "test_loss"}
    rows = [*ours["history"], metrics(folder)], [*theirs["history"], metrics(other)]
    for row, expected in zip(*rows, strict=True):
        for key in keys & expected.keys():
            assert row[key] == pytest.approx(expected[key], rel=ROUNDING), key


@pytest.fixture(scope="module")
def flags(small) -> list[str]:
    """Of 180 images in batches of 32 and 20, twice, at one learning rate."""
    return [*quick_flags(small), *RUN.split()]


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The folder in which one process has trained, and what it did."""
    folder = tmp_path_factory.mktemp("one")
    return folder, record("one", folder, flags)


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """A folder with one for each command; what the two processes of each did; torchrun's errors."""
    folder = tmp_path_factory.mktemp("two")
    record("half", folder / "continued", [*flags, "--epochs", "1"])
    record("half", folder / "uneven", [*flags, "--epochs", "1", "--batch-size", "25"])
    short = [*flags, "--epochs", "1", "--no-test"]
    plan = {name: name.split() for name in REFUSED}
    plan |= {"train": flags, "odd": [*short, "--val-size", "151"]}
    plan |= {"compact": [*short, "--model", "compact", "--val-size", "168"]}
    plan |= {"uneven": ["--resume", "run", "--epochs", "2"]}
    plan |= {"continued": [*flags, "--resume"], "killed": flags}
    plan = {name: (words, free_port()) for name, words in plan.items()}
    (folder / "plan.json").write_text(json.dumps(plan))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*launcher, __file__, folder], capture_output=True, timeout=300)
    paths = {name: sorted(folder.glob(f"{name}-?.pt")) for name in plan}
    assert all(paths.values()), result.stderr
    did = {name: [SimpleNamespace(**torch.load(p)) for p in paths[name]] for name in plan}
    return folder, did, result.stderr.decode()


def test_two_processes_end_with_the_weights_and_metrics_of_one(one, two):
    assert_same_but_for_rounding(two[0] / "train", one[0])


def test_the_shares_of_a_batch_are_that_batch_with_the_same_crops_and_flips(one, two):
    shares = zip(*(each.steps for each in two[1]["train"]), strict=True)
    for step, (images, labels) in zip(shares, one[1].steps, strict=True):
        assert torch.equal(torch.cat([share for share, _ in step]), images)
        assert torch.equal(torch.cat([share for _, share in step]), labels)


def test_the_last_images_that_do_not_divide_are_left_out(two):
    for process in two[1]["odd"]:  # of 49 images
        assert [len(labels) for _, labels in process.steps] == [16, 8]


def test_only_the_first_process_prints_and_writes_and_it_does_as_one(one, two):
    first, second = two[1]["train"]
    assert (second.out, second.err, second.written) == ("", "", [])
    assert len(first.out.splitlines()) == len(one[1].out.splitlines())
    assert (first.err, first.written) == ("", one[1].written)
    names, expected = ({p.name for p in (f / "run").iterdir()} for f in (two[0] / "train", one[0]))
    assert names == expected >= {"last.pt", "best.pt", "metrics.csv", "summary.json", "curves.png"}
    assert metrics(two[0] / "train")["processes"] == 2
    assert "torchrun --nproc-per-node=2 " in metrics(two[0] / "train")["command"]
    assert ": python " in first.out.splitlines()[-1]  # to classify a picture takes one process


def test_a_run_continues_in_another_number_of_processes(one, two):
    assert re.search("note: .*bit for bit.* processes 1", two[1]["continued"][0].out)
    assert_same_but_for_rounding(two[0] / "continued", one[0])


@pytest.mark.parametrize("words", REFUSED)
def test_what_several_processes_cannot_do_is_told_once_and_makes_nothing(words, two):
    first, second = two[1][words]
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("error: ") and first.err.count("\n") == 1
    assert REFUSED[words] in first.err
    assert (first.out, second.out, second.err) == ("", "", "")
    assert not (two[0] / words / "runs").exists()


def test_a_run_whose_batches_cannot_be_shared_is_not_continued(two):
    first, second = two[1]["uneven"]
    assert (first.code, second.code) == (2, 2)
    assert "--batch-size 25" in first.err and first.err.count("\n") == 1
    assert last(two[0] / "uneven")["epoch"] == 1


def test_a_killed_process_ends_the_run_with_a_message_and_last_pt_continues(flags, one, two):
    folder = two[0] / "killed"
    assert "SIGKILL" in two[2]
    assert re.search("^(error: another process|stopped)", two[1]["killed"][0].err, re.MULTILINE)
    assert last(folder)["epoch"] == 1
    assert record("alone", folder, [*flags, "--resume"]).code == 0
    assert_same_but_for_rounding(folder, one[0])


def test_batch_normalization_on_cpus_is_noted_to_be_different(two):
    assert [process.code for process in two[1]["compact"]] == [0, 0]
    assert [two[1][name][0].out.count("note: on CPUs") for name in ("compact", "train")] == [1, 0]


def test_an_importer_with_variables_of_torchrun_is_not_disturbed(flags, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    result = record("importer", tmp_path, [*flags, "--epochs", "1", "--no-test"])
    assert result.code == 0 and " 1/1 " in result.out
    assert last(tmp_path)["epoch"] == 1


if __name__ == "__main__":
    work(Path(sys.argv[1]))
