"""Whatever goes wrong gets one line that names it, and nothing that was there before is lost."""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, one_line_error, run
from PIL import Image
from torch import nn

RUN = ["--dataset", "synthetic", "--val-size", "20", "--batch-size", "24", "--compile", "off", "--epochs", "2"]


class TinyNet(nn.Module):
    """Stands in for the network where only files and flags matter: its checkpoints have a few kilobytes."""

    def __init__(self, num_classes: int = 10, *_: object, **__: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, stride=4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv1(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def tiny(ck):
    """The script with that network, a data set of 68 drawn images, and no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck, "MODELS", {**ck.MODELS, "krizhevsky": TinyNet})
        patch.setattr(ck, "SYNTHETIC_COUNTS", (68, 10))
        patch.setattr(ck, "real_save_pictures", ck.save_pictures, raising=False)
        patch.setattr(ck, "save_pictures", lambda *_: [])
        yield ck


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The folder of a finished run; for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert tiny.main([*RUN, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def fails(tiny, capsys):
    """Call the command line, which must fail with this exit code and one line; returns the line."""

    def call(*arguments: object, code: int) -> str:
        capsys.readouterr()
        assert tiny.main([str(argument) for argument in arguments]) == code
        err = capsys.readouterr().err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        return err

    return call


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def size_limit(limit: int):
    """For a while this process cannot write files beyond this size: a write that fails half way, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def failing(function: str, number: int):
    """A function of `os` that fails as the system call does."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


@contextlib.contextmanager
def read_only():
    """A file system that has been made read-only: it even refuses to remove what is not there."""
    ordinary = open

    def refuse(file: object, mode: str = "r", *rest: object, **options: object) -> object:
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), file)
        return ordinary(file, mode, *rest, **options)

    with failing("unlink", errno.EROFS), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", refuse)
        yield


WRITE_FAULTS = {
    "read-only": read_only,
    "full in the middle": lambda: size_limit(5000),
    "full at the end": lambda: failing("fsync", errno.ENOSPC),
    "cannot be replaced": lambda: failing("replace", errno.EACCES),
}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_else(fault, ck, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with WRITE_FAULTS[fault](), pytest.raises(ck.Problem, match=r"cannot write .*file: "):
        ck.write_atomically(path, bytes(10_000))
    assert files_in(tmp_path) == {"file": b"old"}


def test_a_write_that_succeeds_is_synced_before_it_takes_the_name(ck, tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: done.append(name) or call(*a))
    ck.write_atomically(tmp_path / "file", b"new")
    assert done[:2] == ["fsync", "replace"]
    assert files_in(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_a_run_that_can_write_no_more_keeps_its_last_good_checkpoint(fault, tiny, fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = files_in(tmp_path / "run")
    longer = ["--resume", tmp_path / "run" / "last.pt", "--epochs", 4, "--milestones", 1, 2]
    with WRITE_FAULTS[fault]():
        assert str(tmp_path / "run" / "last.pt") in fails(*longer, code=1)
    assert files_in(tmp_path / "run") == before
    assert tiny.main(list(map(str, longer))) == 0  # once there is room again


def test_a_folder_that_cannot_be_made_is_named(fails, tmp_path):
    (tmp_path / "file").write_bytes(b"not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(folder) in fails(*RUN, "--output-dir", folder, code=1)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = files_in(tmp_path / "run")
    (tmp_path / "run").chmod(0o500)
    try:
        assert str(tmp_path / "run") in fails(*RUN, "--output-dir", tmp_path / "run", "--overwrite", code=1)
    finally:
        (tmp_path / "run").chmod(0o700)
    assert files_in(tmp_path / "run") == before


def test_overwrite_destroys_nothing_if_the_new_run_cannot_even_start(fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = files_in(tmp_path / "run")
    fails(*RUN, "--output-dir", tmp_path / "run", "--overwrite", "--val-size", 68, code=2)
    assert files_in(tmp_path / "run") == before


def test_a_failing_picture_is_named_and_loses_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "save_pictures", tiny.real_save_pictures)
    for plot in ("plot_results", "plot_predictions", "plot_confusion_matrix"):
        monkeypatch.setattr(tiny, plot, lambda *_: 1 / 0)
    assert tiny.main([*RUN, "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for name in ("curves.png", "predictions.png", "confusion.png"):
        assert f"note: no {name} (ZeroDivisionError" in out
    assert (tmp_path / "run" / "filters.png").exists()
    assert "test_error" in json.loads((tmp_path / "run" / "summary.json").read_text())


# ----------------------------------------------------------------------------------------------------------------------
# A loss that is not finite
# ----------------------------------------------------------------------------------------------------------------------


def diverge(tiny, fails, folder: Path, gamma: float, *flags: object) -> str:
    """A first good epoch, then a second with its learning rate multiplied by gamma; returns the message."""
    message = fails(*RUN, "--output-dir", folder, "--milestones", 1, "--gamma", gamma, *flags, code=1)
    last = tiny.load_checkpoint(folder / "last.pt", tiny.RUN_FORMAT)
    assert last["epoch"] == 1
    assert all(weight.isfinite().all() for weight in last["model"].values())
    assert str(folder / "last.pt") in message
    assert "epoch 2" in message
    assert "--lr" in message
    return message


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_good_checkpoint(tiny, fails, tmp_path):
    message = diverge(tiny, fails, tmp_path / "run", 1e38)
    assert "step 2" in message
    assert "learning rate 1e+36" in message


@pytest.mark.parametrize(
    ("gamma", "val_size"),
    [(1e38, 20), (1e41, 0)],
    ids=["they are finite and their logits are not", "they are not finite and nothing is validated"],
)
def test_weights_that_the_last_step_of_an_epoch_has_ruined_are_not_saved(gamma, val_size, tiny, fails, tmp_path):
    diverge(tiny, fails, tmp_path / "run", gamma, "--batch-size", 100, "--val-size", val_size)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints from strangers
# ----------------------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("it-ran",)


def zipped_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


NO_CHECKPOINTS = {
    "empty": b"",
    "text": b"<html>404 Not Found</html>\n",
    "noise": random.Random(0).randbytes(5000),
    "pickle": pickle.dumps({"model": {}}),
    "malicious pickle": pickle.dumps(Malicious()),
    "malicious checkpoint": zipped_by_torch({"format": "cifar_krizhevsky run 1", "config": Malicious()}),
    "a list": zipped_by_torch([1, 2, 3]),
    "somebody's weights": zipped_by_torch(nn.Linear(3, 4).state_dict()),
    "somebody's whole network": zipped_by_torch(nn.Linear(3, 4)),
    "another version": zipped_by_torch({"format": "cifar_krizhevsky run 999"}),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_never_run(kind, fails, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "stranger.pt"
    path.write_bytes(NO_CHECKPOINTS[kind])
    assert f"{path} is " in fails("--resume", path, code=1)
    assert f"{path} is " in fails("--checkpoint", path, "--image", picture, code=1)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_truncated_checkpoint_is_named_at_every_length(name, tiny, trained, tmp_path):
    content = (trained / name).read_bytes()
    expected = tiny.RUN_FORMAT if name == "last.pt" else tiny.MODEL_FORMAT
    for length in range(0, len(content), 97):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(tiny.Problem, match=f"{name} is damaged"):
            tiny.load_checkpoint(tmp_path / name, expected)


def test_missing_checkpoints_and_folders_are_named(fails, trained, picture):
    assert str(trained / "none.pt") in fails("--resume", trained / "none.pt", code=2)
    for path in (trained / "none.pt", trained):
        assert str(path) in fails("--checkpoint", path, "--image", picture, code=1)
    assert str(trained / "none") in fails("--checkpoint", trained / "best.pt", "--image-dir", trained / "none", code=1)


def test_resume_takes_the_folder_of_a_run_too(tiny, trained, capsys):
    assert tiny.main(["--resume", str(trained)]) == 0
    assert "is finished after 2 epochs" in capsys.readouterr().out


def test_a_file_system_that_does_not_synchronise_folders_costs_no_descriptors(ck, tmp_path, monkeypatch):
    def descriptor() -> int:
        os.close(lowest := os.open(os.devnull, os.O_RDONLY))
        return lowest

    def refuse_folders(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse_folders)
    before = descriptor()
    ck.write_atomically(tmp_path / "metrics.csv", b"1")
    assert (tmp_path / "metrics.csv").read_bytes() == b"1"
    assert descriptor() == before


def test_a_run_removes_no_file_that_is_not_its_own(tiny, tmp_path):
    mine = {".notes.tmp", ".last.pt.mine.tmp", "events.out.tfevents.mine", "best.pt.old"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    leftover = tmp_path / ".last.pt.123.tmp"
    leftover.write_text("of a process that was killed")
    assert tiny.main([*RUN, "--no-test", "--output-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= mine
    assert not leftover.exists()


def test_overwrite_that_cannot_write_leaves_the_old_run_whole(fails, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = files_in(tmp_path / "run")
    with size_limit(100):
        fails(*RUN, "--overwrite", "--output-dir", tmp_path / "run", code=1)
    assert files_in(tmp_path / "run") == before


def test_results_of_a_shorter_training_do_not_stay_beside_the_checkpoints_of_a_longer_one(tiny, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "curves.png").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "train", lambda run: 1 / 0)
        for flags in ((), ("--epochs", "3", "--milestones", "1", "2")):
            assert (tmp_path / "run" / "summary.json").exists()
            with contextlib.suppress(ZeroDivisionError):
                tiny.main(["--resume", str(tmp_path / "run"), *flags])
    assert {path.name for path in (tmp_path / "run").glob("*.*")} == {"best.pt", "last.pt", "metrics.csv", ".lock"}


def test_figures_of_the_test_stay_if_a_finished_run_is_resumed_with_no_test(tiny, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    before = files_in(tmp_path / "run")
    assert tiny.main(["--resume", str(tmp_path / "run"), "--no-test"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert files_in(tmp_path / "run") == before


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(fails, trained, picture, monkeypatch):
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", denied)
    for arguments in (("--resume", trained), ("--checkpoint", trained / "best.pt", "--image", picture)):
        message = fails(*arguments, code=1)
        assert ".pt: Permission denied" in message and "damaged" not in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize("use", ["resume", "image"])
def test_output_that_cannot_be_written_is_one_line_and_loses_nothing(
    buffering, use, fails, trained, picture, tmp_path, monkeypatch
):
    shutil.copytree(trained, tmp_path / "run")
    looks = ("--checkpoint", trained / "best.pt", "--image", picture)
    flags = ("--resume", tmp_path / "run") if use == "resume" else looks
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=buffering) as full:  # closing it fails
        monkeypatch.setattr(sys, "stdout", full)
        message = fails(*flags, code=1)
    assert "output" in message and os.strerror(errno.ENOSPC) in message
    assert {*files_in(tmp_path / "run")} >= {"last.pt", "best.pt", "metrics.csv"}
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 2


def test_a_gpu_that_is_there_and_cannot_be_used_is_told_with_the_reason(fails, tmp_path, monkeypatch):
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available\nmore about it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", refuses)
    for flags in ((), ("--device", "cuda"), ("--device", "cuda:0")):
        message = fails(*RUN, "--output-dir", tmp_path / "run", *flags, code=2)
        assert "(CUDA error: no kernel image is available), try --device cpu" in message
    assert "only cuda:0, cpu" in fails(*RUN, "--output-dir", tmp_path / "run", "--device", "cuda:1", code=2)


@pytest.mark.parametrize(("flag", "device"), [("cuda:0", "cuda:0"), ("auto", "mps")])
def test_torchrun_with_one_gpu_for_all_processes_is_refused(flag, device, tiny, fails, tmp_path, monkeypatch):
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(tiny, "choose_device", lambda _: torch.device(device))
    message = fails(*RUN, "--device", flag, "--output-dir", tmp_path / "run", code=2)
    assert f"--device {device}: under torchrun use --device cuda" in message


def test_a_process_of_torchrun_without_a_gpu_of_its_own_is_told_of_the_flag(fails, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--nproc-per-node" in fails(*RUN, "--device", "cuda:1", "--output-dir", tmp_path / "run", code=2)


def test_a_file_system_without_locks_is_a_note_and_no_error(tiny, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    assert tiny.main([*RUN, "--output-dir", str(tmp_path / "run")]) == 0
    assert f"note: the file system of {tmp_path / 'run'} has no locks" in capsys.readouterr().out


@pytest.mark.parametrize("summary", ["{}", "[1]", '{"epochs": "x"}', "half a fi"])
def test_a_damaged_summary_is_written_anew(summary, tiny, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "seed0")
    (tmp_path / "seed0" / "summary.json").write_text(summary)
    assert tiny.main([*RUN, "--seeds", "1", "--output-dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "seed0" / "summary.json").read_text())["epochs"] == 2


STRANGE_FLAGS = {"batch_size": 64.5, "seed": 1.5, "dataset": ["a"], "epochs": True, "milestones": "5", "lr": None}


@pytest.mark.parametrize("name", STRANGE_FLAGS)
def test_a_strange_value_in_a_stored_configuration_is_named(name, fails, trained, picture, tmp_path):
    for file, use in (("last.pt", ["--resume"]), ("best.pt", ["--image", picture, "--checkpoint"])):
        path = tmp_path / file
        config = {**changed(trained / file)["config"], name: STRANGE_FLAGS[name]}
        torch.save(changed(trained / file, config=config), path)
        assert str(path) in fails(*use, path, code=1)


def test_weights_or_constants_that_are_not_finite_or_classes_that_are_the_same_are_named(
    fails, trained, picture, tmp_path
):
    path, good = tmp_path / "best.pt", changed(trained / "best.pt")
    nan = {name: weights * float("nan") for name, weights in good["model"].items()}
    strange = [{"std": [0.0] * 3}, {"mean": [float("nan")] * 3}, {"mean": [0.5] * 2, "std": [0.5] * 4}]
    for change in (*strange, {"classes": ["a"] * 10}, {"classes": [*range(10)]}, {"model": nan}):
        torch.save({**good, **change}, path)
        assert str(path) in fails("--checkpoint", path, "--image", picture, code=1)


def test_without_a_standard_output_a_run_is_trained_all_the_same(tmp_path):
    code = "import sys; sys.stdout = None; import cifar_krizhevsky as ck; ck.SYNTHETIC_COUNTS = (68, 10)"
    flags = [*RUN, "--no-test", "--epochs", "1", "--output-dir", "run"]
    command = [sys.executable, "-c", f"{code}; sys.exit(ck.main({flags!r}))"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_world_size_that_torchrun_has_not_set_is_named(fails, tmp_path, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "torchrun" in fails(*RUN, "--output-dir", tmp_path / "one", code=2)
    assert "torchrun" in fails(*RUN, "--seeds", 2, "--output-dir", tmp_path / "several", code=2)


def test_best_and_last_are_told_apart(fails, trained, picture, tmp_path):
    assert "resumed from its last.pt" in fails("--resume", trained / "best.pt", "--output-dir", tmp_path, code=1)
    assert "best.pt" in fails("--checkpoint", trained / "last.pt", "--image", picture, code=1)


def changed(path: Path, **changes: object) -> dict:
    return {**torch.load(path, weights_only=True), **changes}


def without(path: Path, key: str) -> dict:
    return {name: value for name, value in torch.load(path, weights_only=True).items() if name != key}


STRANGE_VALUES = [None, 5, "text", [], {}, ["a", "b"], {"a": 1}, torch.zeros(3)]


@pytest.mark.parametrize(
    "key", ["config", "hardware", "epoch", "history", "model", "optimizer", "best_epoch", "best_model"]
)
def test_a_last_pt_with_a_strange_or_missing_part_is_named(key, fails, trained, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(without(trained / "last.pt", key), path)
    assert str(path) in fails("--resume", path, code=1)
    for value in STRANGE_VALUES:
        if not (key == "hardware" and isinstance(value, dict)) and (key, str(value)) != ("epoch", "5"):
            torch.save(changed(trained / "last.pt", **{key: value}), path)
            assert str(path) in fails("--resume", path, code=1)


@pytest.mark.parametrize("key", ["config", "classes", "model", "mean", "std", "epoch"])
def test_a_best_pt_with_a_strange_or_missing_part_is_named(key, fails, trained, picture, tmp_path):
    path = tmp_path / "best.pt"
    torch.save(without(trained / "best.pt", key), path)
    assert str(path) in fails("--checkpoint", path, "--image", picture, code=1)
    for value in STRANGE_VALUES:
        if not (key in ("mean", "std") and isinstance(value, torch.Tensor)) and (key, str(value)) != ("epoch", "5"):
            torch.save(changed(trained / "best.pt", **{key: value}), path)
            assert str(path) in fails("--checkpoint", path, "--image", picture, code=1)


def test_the_weights_of_another_network_or_class_count_are_named(tiny, fails, trained, picture, tmp_path):
    for model in (nn.Linear(3, 4), TinyNet(100), tiny.KrizhevskyNet()):
        weights = model.state_dict()
        torch.save(changed(trained / "last.pt", model=weights), tmp_path / "last.pt")
        assert "of another network" in fails("--resume", tmp_path / "last.pt", code=1)
        torch.save(changed(trained / "best.pt", model=weights), tmp_path / "best.pt")
        used = ["--checkpoint", tmp_path / "best.pt", "--image", picture]
        assert "of another network" in fails(*used, code=1)


@contextlib.contextmanager
def time_limit(seconds: int):
    """Whatever takes longer hangs, and fails the test."""

    def hangs(*_: object) -> None:
        pytest.fail(f"still at it after {seconds} s", pytrace=True)

    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, hangs)
        signal.alarm(seconds)
    try:
        yield
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)


def damage(content: bytes, other: bytes, chance: random.Random) -> bytes:
    """Flip bits, blank or cut out a stretch, cut the end off, or graft a piece of another file in."""
    damaged, at = bytearray(content), chance.randrange(len(content))
    end = min(len(content), at + chance.randint(1, 400))
    kind = chance.choice(["flips", "flip", "blank", "cut", "truncate", "graft"])
    if kind in ("flips", "flip"):
        for _ in range(chance.randint(2, 30) if kind == "flips" else 1):
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == "blank":
        damaged[at:end] = bytes(end - at)
    elif kind == "truncate":
        del damaged[at:]
    else:
        start = chance.randrange(len(other))
        damaged[at:end] = b"" if kind == "cut" else other[start : start + end - at]
    return bytes(damaged)


def plain(value: object) -> object:
    """A checkpoint as values that compare."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(key, plain(item)) for key, item in value.items()]
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_thousand_damaged_checkpoints_are_refused_or_read_as_they_were_written(tiny, trained, tmp_path):
    chance, refused = random.Random(5), 0
    kinds = {"last.pt": tiny.RUN_FORMAT, "best.pt": tiny.MODEL_FORMAT}
    content = {name: (trained / name).read_bytes() for name in kinds}
    written = {name: plain(torch.load(trained / name, weights_only=True)) for name in kinds}
    with time_limit(200):
        for name, other in (("last.pt", "best.pt"), ("best.pt", "last.pt")) * 600:
            (tmp_path / name).write_bytes(damage(content[name], content[other], chance))
            try:
                found = tiny.load_checkpoint(tmp_path / name, kinds[name])
            except tiny.Problem:
                refused += 1
            else:
                assert plain(found) == written[name]
    assert refused > 1000


# ----------------------------------------------------------------------------------------------------------------------
# Pictures from strangers
# ----------------------------------------------------------------------------------------------------------------------


def test_a_thousand_damaged_pictures_are_read_or_named_one_by_one(tiny, trained, tmp_path, capsys):
    chance, count = random.Random(6), 0
    noise = np.random.RandomState(0).randint(0, 256, (24, 30, 3), np.uint8)
    picture = Image.fromarray(noise).resize((60, 48))
    originals = {}
    for suffix, options in {
        "png": {},
        "jpg": {},
        "gif": {"save_all": True, "append_images": [picture.rotate(90)]},
        "bmp": {},
        "webp": {},
        "tif": {"compression": "tiff_lzw"},
        "tiff": {},
    }.items():
        buffer = io.BytesIO()
        picture.save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix), **options)
        originals[suffix] = buffer.getvalue()
    for suffix, content in originals.items():
        for number in range(150):
            count += 1
            other = originals[chance.choice(list(originals))]
            (tmp_path / f"{number:03}.{suffix}").write_bytes(damage(content, other, chance))
    command = ["--checkpoint", str(trained / "best.pt"), "--image-dir", str(tmp_path), "--device", "cpu"]
    with time_limit(200), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert tiny.main(command) == 1  # some could not be read
    out, err = capsys.readouterr()
    assert len(out.splitlines()) + len(err.splitlines()) == count
    assert len(out.splitlines()) > 100
    assert all(line.startswith(f"error: cannot read {tmp_path}") for line in err.splitlines())
    assert [str(warning.message) for warning in warned] == []


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


class FakeData:
    """A data set in CIFAR-10's format, of 50 training and 20 test images: its reader, files and archive."""

    def __init__(self) -> None:
        chance = np.random.RandomState(3)
        self.files = {"batches.meta": pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})}
        for name, count in (("data_batch_1", 50), ("test_batch", 20)):
            images = chance.randint(0, 256, (count, 3072), np.uint8)
            self.files[name] = pickle.dumps({"data": images, "labels": [i % 10 for i in range(count)]})
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, content in self.files.items():
                entry = tarfile.TarInfo(f"fake-batches/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        self.archive = buffer.getvalue()
        self.md5 = hashlib.md5(self.archive).hexdigest()
        sums = {name: hashlib.md5(content).hexdigest() for name, content in self.files.items()}

        class FakeReader(torchvision.datasets.CIFAR10):
            base_folder, filename, tgz_md5 = "fake-batches", "fake.tar.gz", self.md5
            train_list = (("data_batch_1", sums["data_batch_1"]),)
            test_list = (("test_batch", sums["test_batch"]),)
            meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}  # noqa: RUF012

        self.reader = FakeReader


@pytest.fixture(scope="module")
def fake():
    return FakeData()


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """Serves the fake archive, well or badly, by the first word of the path."""

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the script hangs up on most of these
            getattr(self, self.path.split("/")[1])(self.server.content)

    def good(self, content: bytes, code: int = 200, announced: int | None = None) -> None:
        self.send_response(code)
        if announced != 0:
            self.send_header("Content-Length", str(announced or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def html(self, _: bytes) -> None:
        self.good(b"<html>please log in</html>")

    def missing(self, _: bytes) -> None:
        self.good(b"<html>not found</html>", 404)

    def broken(self, _: bytes) -> None:
        self.good(b"<html>internal error</html>", 500)

    def altered(self, content: bytes) -> None:
        self.good(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])

    def short(self, content: bytes) -> None:
        self.good(content[: len(content) // 2], announced=len(content))

    def silent(self, _: bytes) -> None:
        self.server.released.wait()

    def stalls(self, content: bytes) -> None:
        self.short(content)
        self.server.released.wait()

    def drips(self, content: bytes) -> None:
        self.good(b"", announced=len(content))
        for byte in content:
            self.wfile.write(bytes([byte]))
            if self.server.released.wait(0.02):
                break

    def mumbles(self, _: bytes) -> None:  # headers without end
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Patience: ")
        while not self.server.released.wait(0.02):
            self.wfile.write(b"a")

    def endless(self, content: bytes) -> None:
        self.good(content, announced=0)
        while not self.server.released.is_set():
            self.wfile.write(bytes(1 << 16))

    def nonsense(self, _: bytes) -> None:
        self.wfile.write(b"\x00\xff 42\r\n\r\n")

    def redirects(self, _: bytes, to: str = "/good/fake.tar.gz") -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def circles(self, _: bytes) -> None:
        self.redirects(_, self.path)

    def misleads(self, _: bytes) -> None:
        self.redirects(_, "http://[::1/fake.tar.gz")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(fake):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.daemon_threads, server.content, server.released = True, fake.archive, threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def data(ck, fake, server, tmp_path, monkeypatch):
    """An empty folder for the fake data set, whose mirrors are that server's good one and no other."""
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake.reader)
    source = ck.SOURCES["cifar10"]._replace(archive_bytes=len(fake.archive))
    monkeypatch.setattr(ck, "SOURCES", {"cifar10": source})
    monkeypatch.setattr(ck, "DOWNLOAD_RATE", 100e3)
    use_mirrors(ck, server, monkeypatch, "good")
    return tmp_path / "data"


def use_mirrors(ck, server, monkeypatch, *words: str) -> None:
    """Mirrors that behave as these words say; "refuses" is a port where nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        ports = {word: nobody.getsockname()[1] if word == "refuses" else server.server_port for word in words}
    mirrors = tuple(f"http://127.0.0.1:{ports[word]}/{word}/{{filename}}" for word in words)
    monkeypatch.setattr(ck, "MIRRORS", mirrors)
    keeps_waiting = {"silent", "stalls", "drips", "mumbles"} & {*words}
    monkeypatch.setattr(ck, "DOWNLOAD_TIMEOUT", 0.5 if keeps_waiting else 10.0)


def unpack(fake: FakeData, data: Path) -> Path:
    """Put the batch files there, without the archive; returns their folder."""
    folder = data / "fake-batches"
    folder.mkdir(parents=True)
    for name, content in fake.files.items():
        (folder / name).write_bytes(content)
    return folder


def load(ck, data: Path) -> int:
    """Load the data set; returns its number of training images."""
    return len(ck.get_cifar_data_loaders(data_dir=data, val_size=10)[0].labels)


def assert_all_there(fake: FakeData, data: Path) -> None:
    """The files and the archive, and nothing else but a lock."""
    found = {name: content for name, content in files_in(data).items() if not name.endswith("lock")}
    assert found == {f"fake-batches/{name}": content for name, content in fake.files.items()} | {
        "fake.tar.gz": fake.archive
    }


MISBEHAVIOURS = ["html", "missing", "broken", "altered", "short", "silent", "stalls", "drips", "mumbles"]
MISBEHAVIOURS += ["endless", "nonsense", "circles", "misleads", "refuses"]


@pytest.mark.parametrize("word", MISBEHAVIOURS)
def test_where_a_mirror_misbehaves_the_next_one_is_taken(word, ck, fake, server, data, monkeypatch):
    use_mirrors(ck, server, monkeypatch, word, "good")
    with time_limit(60):
        assert load(ck, data) == 40
    assert_all_there(fake, data)


def test_a_mirror_that_redirects_is_followed(ck, fake, server, data, monkeypatch):
    use_mirrors(ck, server, monkeypatch, "redirects")
    assert load(ck, data) == 40
    assert_all_there(fake, data)


def test_without_a_mirror_that_works_the_message_says_what_to_fetch_and_where_to_put_it(
    ck, fake, server, data, monkeypatch, fails
):
    use_mirrors(ck, server, monkeypatch, "refuses", "html", "missing", "silent")
    message = fails("--data-dir", data, "--output-dir", data.parent / "run", "--val-size", 10, code=1)
    for part in ("fake.tar.gz", f"{len(fake.archive):,} bytes", fake.md5, str(data), "--dataset synthetic"):
        assert part in message
    for reason in ("refused", "not the official file", "404", "timed out"):
        assert reason in message
    assert not list(data.glob("fake*"))


def test_an_interrupted_download_leaves_nothing_that_a_new_start_would_trust(ck, fake, data, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ck, "show_progress", interrupt)
        load(ck, data)
    assert not (data / "fake.tar.gz").exists()
    (data / "fake.tar.gz.part").write_bytes(fake.archive[:1000])  # what a killed one leaves
    assert load(ck, data) == 40
    assert_all_there(fake, data)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_full_disk_ends_a_download_with_the_name_of_the_file(number, ck, server, data, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, _: bytes) -> int:
            raise OSError(number, os.strerror(number))

    use_mirrors(ck, server, monkeypatch, "good", "good")
    with monkeypatch.context() as patch:
        patch.setattr(ck, "locked", lambda *_, **__: contextlib.nullcontext())  # which opens a file too
        patch.setattr(ck, "open", lambda *_: FullDisk(), raising=False)
        with pytest.raises(ck.Problem) as problem:
            load(ck, data)
    assert str(problem.value) == f"cannot write {data / 'fake.tar.gz.part'}: {os.strerror(number)}"
    assert not list(data.glob("fake*"))
    assert load(ck, data) == 40


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
@pytest.mark.parametrize("fault", ["altered", "truncated", "missing"])
def test_a_damaged_or_missing_file_is_had_again_from_the_archive(file, fault, ck, fake, server, data, monkeypatch):
    load(ck, data)
    path = data / "fake-batches" / file
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if fault == "truncated" else path.read_bytes()[:-1] + b"?")
    use_mirrors(ck, server, monkeypatch, "refuses")
    assert load(ck, data) == 40
    assert_all_there(fake, data)


def test_a_damaged_file_without_archive_or_network_is_named_and_not_used(
    ck, fake, server, data, monkeypatch, fails, capsys
):
    path = unpack(fake, data) / "data_batch_1"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    use_mirrors(ck, server, monkeypatch, "refuses")
    with pytest.raises(ck.Problem, match=r"fake\.tar\.gz"):
        load(ck, data)
    assert f"{path}: damaged" in capsys.readouterr().out
    fails("--data-dir", data, "--output-dir", data.parent / "run", "--val-size", 10, code=1)


def test_of_two_runs_that_need_the_data_one_fetches_it_and_the_other_waits(ck, fake, server, data, monkeypatch):
    use_mirrors(ck, server, monkeypatch, "silent", "good")
    downloads = []
    download = ck.download
    monkeypatch.setattr(ck, "download", lambda *a: downloads.append(a) or download(*a))
    threads = [threading.Thread(target=ck.fetch_dataset, args=("cifar10", data)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(downloads) == 1
    assert_all_there(fake, data)


def test_an_extraction_that_was_interrupted_is_completed(ck, fake, server, data, monkeypatch):
    unpack(fake, data)
    (data / "fake-batches" / "test_batch").unlink()
    (data / "fake.tar.gz").write_bytes(fake.archive)
    use_mirrors(ck, server, monkeypatch, "refuses")
    assert load(ck, data) == 40
    assert_all_there(fake, data)


def test_an_archive_that_cannot_be_extracted_is_named(ck, fake, data, fails, monkeypatch):
    data.mkdir()
    (data / "fake.tar.gz").write_bytes(fake.archive)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", full)
    message = fails("--data-dir", data, "--output-dir", data.parent / "run", "--val-size", 10, code=1)
    assert f"cannot extract {data / 'fake.tar.gz'} to {data / 'fake-batches'}: No space left on device" in message
    assert [path.name for path in data.iterdir() if path.suffix] == ["fake.tar.gz"]


def test_a_truncated_archive_is_downloaded_again(ck, fake, data, capsys):
    data.mkdir()
    (data / "fake.tar.gz").write_bytes(fake.archive[:-100])
    assert load(ck, data) == 40
    assert f"{data / 'fake.tar.gz'}: damaged" in capsys.readouterr().out
    assert_all_there(fake, data)


def test_files_that_are_there_are_used_as_they_are_without_network_or_archive(ck, fake, server, data, monkeypatch):
    unpack(fake, data)
    use_mirrors(ck, server, monkeypatch)
    before = files_in(data)
    assert load(ck, data) == 40
    assert files_in(data) == before


def test_a_data_folder_that_cannot_be_made_is_named(data, fails, tmp_path):
    (tmp_path / "file").write_bytes(b"not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        assert str(folder) in fails("--data-dir", folder, "--output-dir", tmp_path / "run", code=1)


# ----------------------------------------------------------------------------------------------------------------------
# Flags
# ----------------------------------------------------------------------------------------------------------------------

WRONG_FLAGS = [
    "--dataset mnist",
    "--model resnet",
    "--norm batch",
    "--select error",
    "--precision fp8",
    "--compile maybe",
    "--val-size -1",
    "--val-size 5.5",
    "--val-size 68",
    "--val-size 1000000",
    "--epochs 0",
    "--epochs -1",
    "--epochs two",
    "--epochs 1.5",
    f"--epochs {10**400}",
    "--batch-size 0",
    "--batch-size -128",
    "--batch-size x",
    f"--batch-size {10**30}",
    "--lr 0",
    "--lr -0.1",
    "--lr nan",
    "--lr inf",
    "--lr fast",
    "--momentum 1",
    "--momentum -0.1",
    "--momentum nan",
    "--weight-decay -1",
    "--weight-decay inf",
    "--gamma 0",
    "--gamma -1",
    "--gamma nan",
    "--milestones 0",
    "--milestones 10 -1",
    "--milestones 1.5",
    "--milestones",
    "--seed -1",
    "--seed 0.5",
    "--seeds 0",
    "--seeds -2",
    "--device gpu",
    "--device cuda:7",
    "--device cuda:x",
    "--device cuda:-1",
    "--device mps:9",
    "--device meta",
    "--device hpu",
    "--device xpu:0",
    "--device privateuseone",
    "--resume none/last.pt",
    "--resume --overwrite",
    "--seeds 2 --seed 1",
    "--seeds 2 --overwrite",
    "--seeds 2 --resume none/last.pt",
    "--image picture.png",
    "--image-dir pictures",
    "--checkpoint best.pt",
    "--no-such-flag",
    "--batch_size 0",
    "--learning-rate 0.1",
    "--ep 2",
    "file.png",
]


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_a_wrong_flag_is_named_and_starts_nothing(flags, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = fails(*RUN, *flags.split(), code=2)
    assert flags.split()[0].replace("_", "-") in message
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("flag", ["--checkpoint", "--image", "--image-dir", "--data-dir", "--output-dir", "--dataset"])
def test_an_empty_variable_of_the_shell_is_not_taken_for_no_flag(flag, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{flag}: must not be empty" in fails(*RUN, flag, "", code=2)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_wrong_flag_ends_the_process_with_code_2_and_one_line(tmp_path):
    result = run("--lr", "-1", cwd=tmp_path, small=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert one_line_error(result) + "\n" == result.stderr


def test_a_milestone_past_the_last_epoch_is_a_note_and_no_error(tiny, tmp_path, capsys):
    assert tiny.main([*RUN, "--milestones", "1", "50", "--output-dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "note: milestone 50 is not reached within 2 epochs" in out


@pytest.mark.parametrize(("val_size", "note"), [(34, ""), (67, "note: only 1 images are trained on, 67 are held out")])
def test_more_images_held_out_than_trained_on_are_a_note_and_no_error(tiny, tmp_path, capsys, val_size, note):
    assert tiny.main([*RUN, "--val-size", str(val_size), "--output-dir", str(tmp_path / "run")]) == 0
    assert re.findall("note: only .*?out", capsys.readouterr().out) == [note] * bool(note)


def test_the_command_that_uses_the_network_names_the_script_as_it_was_called(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["../some where/cifar_krizhevsky.py"])
    assert tiny.main([*RUN, "--output-dir", str(tmp_path / "run")]) == 0
    best, out = tmp_path / "run" / "best.pt", capsys.readouterr().out
    assert f"use it: python '../some where/cifar_krizhevsky.py' --checkpoint {best} --image FILE" in out


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_running_out_of_memory_is_one_clear_line_and_the_finished_epochs_stay(tmp_path):
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import cifar_krizhevsky
cifar_krizhevsky.SYNTHETIC_COUNTS = (600, 10)
train_step = cifar_krizhevsky.train_step
def with_little_memory(*arguments):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
    return train_step(*arguments)
cifar_krizhevsky.train_step = with_little_memory
sys.exit(cifar_krizhevsky.main(sys.argv[1:]))
"""
    flags = "--dataset synthetic --model alexnet --val-size 10 --batch-size 512 --compile off --epochs 1"
    command = [sys.executable, "-c", program, *flags.split(), "--output-dir", "run"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "out of memory: a lower --batch-size needs less" in one_line_error(result)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 0
