"""Training on a CUDA GPU, in processes of their own: conftest.py hides the GPUs from this one."""

import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Result, quick_flags, run

has_gpu = torch.version.cuda and shutil.which("nvidia-smi") and os.environ["GPUS_OF_TESTS"]
pytestmark = pytest.mark.skipif(not has_gpu, reason="no CUDA GPU, or no PyTorch for it")


def run_on_gpu(*flags: object, cwd: Path) -> Result:
    env = {"CUDA_VISIBLE_DEVICES": os.environ["GPUS_OF_TESTS"]}
    result = run(*flags, "--device", "cuda", cwd=cwd, env=env)
    assert result.code == 0, result.err
    return result


def last(folder: Path) -> dict:
    return torch.load(folder / "last.pt", map_location="cpu", weights_only=True)


def test_a_run_on_a_gpu_is_resumed_there_and_its_network_is_used_on_the_cpu(small, tmp_path):
    flags = (*quick_flags(small), "--milestones", "1", "--output-dir", "run")
    run_on_gpu(*flags, "--epochs", "1", cwd=tmp_path)
    resumed = run_on_gpu(*flags, "--resume", cwd=tmp_path)
    assert "resuming after epoch 1" in resumed.out
    assert [row["epoch"] for row in last(tmp_path / "run")["history"]] == [1, 2]
    used = run("--checkpoint", "run/best.pt", "--evaluate", "--device", "cpu", cwd=tmp_path)
    assert used.code == 0, used.err
    there, here = (float(re.findall(r"\n  loss +([\d.]+)", r.out)[0]) for r in (resumed, used))
    assert here == pytest.approx(there, rel=0.01)


def test_precisions_and_compilation_train_to_a_similar_loss(tmp_path):
    losses = {}
    for precision, compiled in itertools.product(("fp32", "bf16"), ("off", "auto")):
        name = f"{precision}-{compiled}"
        flags = ("--dataset", "cifar10-mini", "--recipe", "quick", "--epochs", "3", "--no-test")
        flags += ("--precision", precision, "--compile", compiled, "--output-dir", name)
        run_on_gpu(*flags, cwd=tmp_path)
        losses[name] = last(tmp_path / name)["history"][-1]["train_loss"]
    assert losses["fp32-off"] < 2.1  # it has learned something
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["fp32-off"], rel=0.05), name
