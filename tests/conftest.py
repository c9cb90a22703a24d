"""What the tests share: the script as a module, and the script run as a user runs it."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The tests compare bits and count steps as a CPU makes them; test_cuda.py gives its processes the GPUs back.
VISIBLE_GPUS = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES")}
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Tests that run side by side (pytest -n) share the processors; PyTorch would use all of them in each.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "cifar_krizhevsky.py"
REAL_DATA = ROOT / "data"
sys.path.insert(0, str(ROOT))

# the command line, with a synthetic data set of a few hundred images, so that a run takes seconds
SMALL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cifar_krizhevsky
cifar_krizhevsky.SYNTHETIC_COUNTS = (600, 200)
sys.exit(cifar_krizhevsky.main(sys.argv[1:]))
"""
SMALL_RUN = ("--dataset", "synthetic", "--val-size", "100", "--epochs", "2", "--compile", "off")


# makes processes that have imported the script and PyTorch, and have not computed anything
server = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else None)
if hasattr(os, "fork"):
    server.set_forkserver_preload(["cifar_krizhevsky", "torch._dynamo", "torch.distributed.run"])


def start(*arguments: object, cwd: Path, small: bool = True, **options: object) -> subprocess.Popen:
    """Start the script in a folder, as a process of its own."""
    command = [sys.executable, "-c", SMALL] if small else [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})}
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(*arguments: object, cwd: Path, timeout: float = 300, **options: object) -> subprocess.CompletedProcess:
    """Run the script in a folder to its end; stdout, stderr and returncode are in the result."""
    process = start(*arguments, cwd=cwd, **options)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def one_line_error(result: subprocess.CompletedProcess) -> str:
    """The error message of a run that failed as it should: one line, no traceback."""
    assert result.returncode != 0, result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def ck():
    """The script, imported as a module."""
    import cifar_krizhevsky

    return cifar_krizhevsky


@pytest.fixture(scope="session")
def cifar10_dir():
    """The folder with the real CIFAR-10, if it is there."""
    if not (REAL_DATA / "cifar-10-batches-py" / "test_batch").exists():
        pytest.skip("no CIFAR-10 in data/")
    return REAL_DATA


@pytest.fixture(scope="session")
def cifar100_dir():
    """The folder with the real CIFAR-100, if it is there."""
    if not (REAL_DATA / "cifar-100-python" / "train").exists():
        pytest.skip("no CIFAR-100 in data/")
    return REAL_DATA
