"""What the tests share: the script as a module and as a process, and a few hundred real images to train on."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

# The tests compare bits as a CPU makes them; test_cuda.py gives its processes the GPUs back.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# One thread: the tests' small batches take twice as long with two, and tests may run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cifar_krizhevsky.py"
REAL_DATA = ROOT / "data"
sys.path.insert(0, str(ROOT))


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def start(*flags: object, cwd: Path, **options: object) -> subprocess.Popen:
    """Start the script in a folder, as a process of its own."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes)


def run(*flags: object, cwd: Path, timeout: float = 300, **options: object) -> Result:
    """Run the script in a folder to its end, as a process of its own."""
    process = start(*flags, cwd=cwd, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


def call(*flags: object, cwd: Path) -> Result:
    """Run the script's `main` in a folder, in this process: without the seconds of its imports."""
    import cifar_krizhevsky

    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cifar_krizhevsky.main([str(flag) for flag in flags])
    finally:
        os.chdir(before)
    return Result(code, out.getvalue(), err.getvalue())


def one_line_error(result: Result, code: int | None = None) -> str:
    """The error message of a command that failed as it should: one line, no traceback."""
    assert result.code != 0, result.out
    assert "Traceback" not in result.err, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    assert code is None or result.code == code, result
    return lines[0]


@pytest.fixture(scope="session")
def ck():
    """The script, imported as a module."""
    import cifar_krizhevsky

    return cifar_krizhevsky


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder of pictures cut from data/mini: of each of its classes 20 for training and 5 for the test."""
    folder = tmp_path_factory.mktemp("pictures") / "small"
    for part, count in (("train", 20), ("test", 5)):
        for sheet in sorted((ROOT / "data" / "mini" / part).glob("*.png")):
            (folder / part / sheet.stem).mkdir(parents=True)
            pixels = np.asarray(Image.open(sheet))
            for i in range(count):
                tile = Image.fromarray(pixels[:32, 32 * i : 32 * i + 32])  # from the first row
                if tile.size == (32, 32):
                    tile.save(folder / part / sheet.stem / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def trained_once(small, tmp_path_factory) -> tuple[Path, Result]:
    """The folder and the output of a finished run of two epochs on `small`; not to be written to."""
    cwd = tmp_path_factory.mktemp("trained")
    result = call(*quick_flags(small), "--output-dir", "run", cwd=cwd)
    assert result.code == 0, result.err
    return cwd / "run", result


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A copy of that run's folder, as `run` in `tmp_path`, to do with as one likes."""
    return Path(shutil.copytree(trained_once[0], tmp_path / "run"))


def quick_flags(dataset: Path) -> tuple[str, ...]:
    """The flags of a run that takes seconds."""
    flags = f"--dataset {dataset} --epochs 2 --batch-size 32 --compile off --device cpu"
    return tuple(flags.split())


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder with the real CIFAR-10, if it is there."""
    if not (REAL_DATA / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip("no CIFAR-10 in data/")
    return REAL_DATA


@pytest.fixture(scope="session")
def cifar100_dir() -> Path:
    """The folder with the real CIFAR-100, if it is there."""
    if not (REAL_DATA / "cifar-100-python" / "train").exists():
        pytest.skip("no CIFAR-100 in data/")
    return REAL_DATA
