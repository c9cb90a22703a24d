"""Whatever goes wrong is one line that names it, and nothing that was there is lost."""

import contextlib
import errno
import http.server
import io
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, one_line_error, quick_flags, run
from PIL import Image
from torch import nn

CPU = torch.device("cpu")
BATCHES = "cifar-10-batches-py"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def saved_epoch(folder: Path) -> int:
    return torch.load(folder / "last.pt", weights_only=True)["epoch"]


@pytest.fixture
def one_minute():
    """Whatever takes longer hangs, and fails the test."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still at it after a minute"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def fails_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


FULL_FILE = type("FullFile", (io.BytesIO,), {"write": fails_with(errno.ENOSPC)})
WRITE_FAULTS = {
    "open": ("builtins.open", fails_with(errno.EACCES)),
    "write": ("builtins.open", lambda *_: FULL_FILE()),
    "fsync": ("os.fsync", fails_with(errno.ENOSPC)),
    "rename": ("os.replace", fails_with(errno.EACCES)),
}


@pytest.mark.parametrize("step", WRITE_FAULTS)
def test_a_write_that_fails_leaves_the_old_file_whole(step, ck, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with monkeypatch.context() as patch, pytest.raises(ck.UserError, match=r"cannot write .*file"):
        patch.setattr(*WRITE_FAULTS[step])
        ck.write_atomically(tmp_path / "file", b"new")
    assert files_in(tmp_path) == {"file": b"old"}


def test_a_virus_scanner_that_holds_the_file_for_a_moment_costs_nothing(ck, tmp_path, monkeypatch):
    replace, free_at = os.replace, time.monotonic() + 0.3

    def held(*paths: object) -> None:
        if time.monotonic() < free_at:
            raise PermissionError(errno.EACCES, "in use by another process")
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    ck.write_atomically(tmp_path / "file", b"new")
    assert files_in(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("writes", [0, 3], ids=["at the start", "after the first epoch"])
def test_a_run_whose_disk_fills_keeps_its_last_checkpoint(writes, ck, trained, monkeypatch):
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)
    before, fsync, count = files_in(trained), os.fsync, itertools.count()
    full, longer = fails_with(errno.ENOSPC), ("--resume", trained / "last.pt", "--epochs", 3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda n: fsync(n) if next(count) < writes else full())
        message = one_line_error(call(*longer, cwd=trained), 1)
    assert str(trained / "last.pt") in message and os.strerror(errno.ENOSPC) in message
    assert saved_epoch(trained) == 2
    assert writes or files_in(trained) == before
    assert call(*longer, cwd=trained).code == 0  # once there is room again
    assert saved_epoch(trained) == 3


def test_a_folder_that_cannot_be_made_is_named(small, tmp_path, one_minute):
    (tmp_path / "file").write_bytes(b"not a folder")
    (tmp_path / "runs").symlink_to(tmp_path / "not-mounted" / "runs")
    for flags in (("--output-dir", "file"), ("--output-dir", "file/run"), ()):
        message = one_line_error(call(*quick_flags(small), *flags, cwd=tmp_path), 1)
        assert message.startswith("error: file" if flags else "error: runs")


def test_a_plot_that_fails_is_a_note_and_loses_nothing(trained, monkeypatch):
    (trained / "summary.json").unlink()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    result = call("--resume", "last.pt", cwd=trained)
    assert result.code == 0, result.err
    assert result.out.count("note: no ") == 4
    assert "test_error" in json.loads((trained / "summary.json").read_text())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_output_that_cannot_be_written_is_one_line_and_loses_nothing(output, trained):
    if output == "full disk":
        use, why = ("--resume", "last.pt", "--epochs", 3), errno.ENOSPC  # seen at the first line
        writing = os.open("/dev/full", os.O_WRONLY)
    else:
        use, why = ("--checkpoint", "best.pt", "--image-dir", trained), errno.EPIPE
        reading, writing = os.pipe()
        os.close(reading)
    result = run(*use, cwd=trained, stdout=writing, env={"PYTHONUNBUFFERED": ""})
    os.close(writing)
    assert one_line_error(result, 1) == f"error: the output: {os.strerror(why)}"
    assert "Exception ignored" not in result.err
    assert saved_epoch(trained) == 2


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("it-ran",)


def saved_by_torch(value: object) -> bytes:
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


NO_CHECKPOINTS = {
    "empty": b"",
    "a web page": b"<html>404 Not Found</html>\n",
    "a pickle that runs code": pickle.dumps(Malicious()),
    "a checkpoint that runs code": saved_by_torch({"mean": Malicious(), "optimizer": Malicious()}),
    "a tensor": saved_by_torch(torch.zeros(3)),
    "another project's network": saved_by_torch(nn.Linear(3, 4)),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_named_and_never_run(kind, tmp_path):
    path = tmp_path / "stranger.pt"
    path.write_bytes(NO_CHECKPOINTS[kind])
    for use in (("--resume", path), ("--checkpoint", path, "--evaluate")):
        message = one_line_error(call(*use, cwd=tmp_path), 1)
        assert str(path) in message and message.isprintable()
        assert "weights_only" not in message  # as PyTorch puts it: by running its code
    assert [file.name for file in tmp_path.iterdir()] == ["stranger.pt"]


def test_the_wrong_file_and_a_missing_one_are_named(trained):
    resume, evaluate = ["--resume"], ["--evaluate", "--checkpoint"]
    wrong = [(resume, "best.pt", "takes a last.pt"), (evaluate, "last.pt", "takes a best.pt")]
    wrong += [(use, "missing.pt", "No such file") for use in (resume, evaluate)]
    for use, name, expected in wrong:
        message = one_line_error(call(*use, trained / name, cwd=trained))
        assert str(trained / name) in message and expected in message


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_truncated_checkpoint_and_the_weights_of_another_network_are_named(name, ck, trained):
    path = trained / name
    use = ["--resume"] if name == "last.pt" else ["--evaluate", "--checkpoint"]
    content, checkpoint = path.read_bytes(), torch.load(path, weights_only=True)
    strange = [content[:length] for length in (10, 5000, len(content) // 2, len(content) - 1)]
    for model in (nn.Linear(3, 4), ck.KrizhevskyNet(100)):
        strange.append(saved_by_torch({**checkpoint, "model": model.state_dict()}))
    (trained / "summary.json").unlink()
    for content in strange:
        path.write_bytes(content)
        message = one_line_error(call(*use, path, cwd=trained), 1)
        assert str(path) in message and "another network" in message


def test_a_flipped_bit_is_found_wherever_it_changes_anything(ck, trained):
    path, refused = trained / "best.pt", 0
    content = path.read_bytes()
    model, written = ck.load_trained(path, CPU)
    for place in (
        *range(0, 4000, 199),
        *range(10**5, 10**6, 50_001),
        *range(-4000, -100, 199),
        *range(-100, 0),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found, read = ck.load_trained(path, CPU)
        except ck.UserError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # it is in the padding, say
            assert {**read, "model": written["model"]} == written
            torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert refused >= 40


def test_hundreds_of_damaged_pictures_are_read_or_named_one_by_one(trained, tmp_path, one_minute):
    chance, noise = random.Random(6), np.random.RandomState(0).randint(0, 256, (48, 60, 3))
    (tmp_path / "damaged").mkdir()
    for suffix in ("png", "jpeg", "gif", "bmp", "webp", "tiff"):
        Image.fromarray(noise.astype(np.uint8)).save(file := io.BytesIO(), suffix)
        for number in range(50):
            picture = bytearray(file.getvalue())
            if number % 5 == 0:
                del picture[chance.randrange(len(picture)) :]
            for _ in range(chance.randint(1, 30)):
                picture[chance.randrange(len(picture))] ^= 1 << chance.randrange(8)
            (tmp_path / "damaged" / f"{number:02}.{suffix}").write_bytes(picture)
    result = call("--checkpoint", trained / "best.pt", "--image-dir", "damaged", cwd=tmp_path)
    assert result.code == 1
    read, failed = result.out.splitlines(), result.err.splitlines()
    assert len(read) + len(failed) == 300 and min(len(read), len(failed)) > 50
    assert all(line.startswith("error: cannot read damaged") for line in failed)


WRONG_FLAGS = {
    "type": "--epochs two; --epochs 1.5; --lr fast",
    "range": "--epochs 0; --batch-size -1; --lr 0; --momentum 1; --milestones -1; --val-size 1000",
    "not finite": "--lr nan; --weight-decay inf",
    "choice": "--model resnet; --precision fp8; --recipe slow; --dataset mnist",
    "device": "--device gpu; --device cuda:7; --device meta",
    "empty": "--output-dir=; --milestones",
    "excluded": "--seeds 2 --seed 1; --evaluate --image a --checkpoint b; --summary --resume run",
    "without effect": "--augment none --checkpoint b --evaluate",
    "file": "--resume last.pt --output-dir other; --resume last.pt --seeds 2",
    "no partner": "--evaluate; --json",
    "unknown": "--learning-rate 0.1; --ep 2; a.png",
}


@pytest.mark.parametrize("flags", "; ".join(WRONG_FLAGS.values()).split("; "))
def test_a_wrong_flag_is_one_line_and_exit_code_2_and_makes_nothing(flags, small, tmp_path):
    result = call(*quick_flags(small), *flags.split(), cwd=tmp_path)
    assert flags.split()[0].rstrip("=") in one_line_error(result, 2)
    assert result.err.count("\n") == 1 and not [*tmp_path.iterdir()]


BROKEN_RULES = {
    "--momentum 1": "be < 1",
    "--momentum -1": "be >= 0",
    "--lr 0": "be > 0",
    "--lr nan": "be finite",
    "--milestones 2 0": "be > 0",
    "--output-dir=": "not be empty",
}


@pytest.mark.parametrize("flags", BROKEN_RULES)
def test_the_error_says_which_rule_a_value_breaks(flags, tmp_path):
    message = one_line_error(call(*flags.split(), cwd=tmp_path), 2)
    assert message.endswith(f"must {BROKEN_RULES[flags]}")


@pytest.mark.parametrize("library", [torch, np])
def test_out_of_memory_is_one_line(ck, library, small, tmp_path, monkeypatch):
    monkeypatch.setattr(ck.CifarLoader, "_batches", lambda *_: [[library.empty(2**50)] * 2])
    message = one_line_error(call(*quick_flags(small), cwd=tmp_path), 1)
    assert "out of memory" in message and "--batch-size" in message


@pytest.mark.parametrize("fault", [ImportError("missing"), RuntimeError("no such operator")])
def test_without_a_fitting_torchvision_only_cifar_fails(fault, ck, small, tmp_path, monkeypatch):
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torchvision":
                raise fault

    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version(n.replace("vision", "-gone")))
    monkeypatch.setattr(ck, "save_plot", lambda *_: True)
    message = one_line_error(call("--dataset", "cifar10", "--epochs", 1, cwd=tmp_path), 1)
    assert str(fault) in message and "requirements.txt" in message
    assert not [*tmp_path.iterdir()]
    assert len(ck.read_dataset("cifar10-mini").images) == 5000
    result = call(*quick_flags(small), "--epochs", 1, cwd=tmp_path)
    assert result.code == 0, result.err


def test_the_note_about_a_compiler_says_what_is_wrong_with_it(ck, capsys):
    def fail(_: torch.Tensor) -> None:
        output = "In file included from main.cpp:2:\nlib.h:5:10: fatal error: no omp.h\nended\n"
        raise RuntimeError(f"C++ compile error\n\nCommand:\ng++ main.cpp\n\nOutput:\n{output}")

    model = nn.Sequential(nn.Identity(), ck.LocalResponseNormalization())
    model[0].forward = fail
    assert not ck.speed_up_lrn(model, "auto", CPU, "fp32")
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and "fatal error: no omp.h" in note


def test_cuda_replays_batches_of_one_shape_in_training_and_leaves_the_model_as_it_was(
    ck, monkeypatch
):
    def record(model: nn.Module, samples: tuple[torch.Tensor], **_: object) -> None:
        forward = model.forward
        forward(*samples)
        model.forward = lambda x: "replayed" if model.training else forward(x)

    model, images = ck.CompactNet(), torch.randn(2, 3, 32, 32)
    before = ck.cpu_state_dict(model)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    graphs = ck.CudaGraphs(model, images, "fp32")
    torch.testing.assert_close(ck.cpu_state_dict(model), before, rtol=0, atol=0)
    assert graphs.train()(images) == "replayed" and graphs(images[:1]).shape == (1, 10)
    assert model(images).shape == graphs.eval()(images).shape == (2, 10)
    monkeypatch.undo()
    with pytest.raises(ck.UserError, match="cannot record this network"):
        ck.CudaGraphs(model, images, "fp32")  # there is no GPU


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the archive, well or badly, by the first word of the path."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        word, content = self.path.split("/")[1], self.server.archive
        if word == "hangs":
            self.server.ended.wait()
        if word in ("html", "missing"):
            content = b"<html>please log in</html>"
        with contextlib.suppress(OSError):  # the script hangs up
            self.send_response(404 if word == "missing" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            size = len(content) // 10 + 1
            for start in range(0, (5 if word in ("cuts", "stalls") else 10) * size, size):
                self.wfile.write(content[start : start + size])
                self.server.ended.wait(0.15 if word == "slow" else 0)
        if word == "stalls":
            self.server.ended.wait()


@pytest.fixture
def server(ck, tmp_path, monkeypatch, one_minute):
    """Its `load` reads a small "cifar10" from mirrors, named by words, and checks the files."""
    from torchvision.datasets import CIFAR10, utils

    source, data = tmp_path / "source", tmp_path / "data"
    (source / BATCHES).mkdir(parents=True)
    noise = np.random.RandomState(3).randint(0, 256, (50, 3072), np.uint8)
    batch = {"data": noise, "labels": [*range(10)] * 5}
    files = {"batch": batch, "test": batch, "meta": {"label_names": [*"abcdefghij"]}}
    md5 = {}
    for name, content in files.items():
        (source / BATCHES / name).write_bytes(pickle.dumps(content))
        md5[name] = utils.calculate_md5(source / BATCHES / name)
    archive = shutil.make_archive(source / "cifar-10-python", "gztar", source, BATCHES)
    small = {"train_list": [("batch", md5["batch"])], "test_list": [("test", md5["test"])]}
    small["meta"] = {"filename": "meta", "key": "label_names", "md5": md5["meta"]}
    small["tgz_md5"] = utils.calculate_md5(archive)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", type("Small", (CIFAR10,), small))
    monkeypatch.setattr(ck, "DOWNLOAD_TIMEOUT", 1.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.daemon_threads, server.ended, server.requests = True, threading.Event(), []
        server.archive, server.md5 = Path(archive).read_bytes(), small["tgz_md5"]

        def load(*words: str) -> None:
            place = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(ck, "MIRRORS", [f"{place}/{word}/file" for word in words])
            assert len(ck.read_dataset("cifar10", data).images) == 50
            assert {**files_in(data), ".lock": b""} == {**files_in(source), ".lock": b""}

        server.load = load
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.mark.parametrize("word", ["hangs", "stalls", "html", "missing", "cuts", "slow"])
def test_a_mirror_that_fails_is_left_for_the_next_and_a_slow_one_is_waited_for(word, server):
    server.load(word, "good")
    assert (f"/{word}/" in server.requests[-1]) == (word == "slow")


def test_where_all_mirrors_fail_the_message_says_what_to_fetch_by_hand(ck, server, tmp_path):
    with pytest.raises(ck.UserError) as error:
        server.load("missing", "html", "hangs")
    message, place = str(error.value), f"{tmp_path / 'data'} by hand"
    for part in ("cifar-10-python.tar.gz", server.md5, place, "--dataset cifar10-mini"):
        assert part in message
    assert "404" in message and "timed out" in message and "\n" not in message


def test_what_an_interrupted_download_leaves_is_not_trusted(server, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(server.archive[:1000])
    server.load("good")


@pytest.mark.parametrize("name", ["batch", "test", "meta"])
def test_a_damaged_or_missing_file_comes_from_the_archive(name, server, tmp_path):
    server.load("good")
    path = tmp_path / "data" / BATCHES / name
    for content in (path.read_bytes()[:-9], path.read_bytes()[:-1] + b"?"):
        path.write_bytes(content)
        server.load("missing")
    path.unlink()
    server.load("missing")


def test_two_first_runs_at_once_download_once(ck, server, tmp_path):
    server.load("slow")
    alone = len(server.requests)
    shutil.rmtree(tmp_path / "data")
    found = []

    def read_too() -> None:
        found.append(ck.read_dataset("cifar10", tmp_path / "data"))

    second = threading.Thread(target=read_too)
    second.start()
    server.load("slow")
    second.join()
    assert len(found) == 1 and len(found[0].images) > 0
    assert len(server.requests) == 2 * alone
