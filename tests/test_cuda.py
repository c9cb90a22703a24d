"""Training on a CUDA GPU: skipped where there is none. In processes of their own: conftest.py hides the GPUs."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL_RUN, VISIBLE_GPUS, run

no_gpu = torch.version.cuda is None or not shutil.which("nvidia-smi")
pytestmark = pytest.mark.skipif(no_gpu, reason="no CUDA GPU, or no PyTorch for it")

ENVIRONMENT = {name: value for name, value in VISIBLE_GPUS.items() if value is not None}

# three epochs of 400 images in batches of 64 and a last one of 16, with a milestone after each
CAPTURED_AND_PLAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import cifar_krizhevsky as ck

ck.SYNTHETIC_COUNTS = (500, 100)
flags = "--dataset synthetic --val-size 100 --batch-size 64 --epochs 3 --lr 0.05 --gamma 0.2 --milestones 1 2"
config, _ = ck.parse_arguments([*flags.split(), *sys.argv[1:], "--device", "cuda", "--output-dir", "run"])

def trained(step):
    run, losses = ck.prepare(config, {{}}), []
    before = ck.weights_of(run.model)
    for epoch in range(1, config.epochs + 1):
        run.train_loader.set_epoch(epoch)
        torch.manual_seed(epoch)  # of dropout
        losses.append(ck.train_one_epoch(
            run.model, run.train_loader, torch.nn.CrossEntropyLoss(), run.optimizer, run.device, run.precision, step
        )[0])
        run.scheduler.step()
    after = ck.weights_of(run.model)
    return losses, {{name: (after[name] - before[name]).double() for name in after}}

captured, plain = ck.CapturedStep(), ck.train_step
(losses, moved), (expected, truly) = trained(captured), trained(plain)
assert sorted(captured.graphs) == [16, 64], captured.graphs.keys()
torch.testing.assert_close(losses, expected, rtol=1e-3 if config.precision == "fp32" else 1e-2, atol=0)
for name in moved:
    difference, size = (moved[name] - truly[name]).norm(), truly[name].norm()
    assert difference <= (0.02 if config.precision == "fp32" else 0.1) * size, (name, difference, size)
"""


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VISIBLE_GPUS} | ENVIRONMENT


@pytest.mark.parametrize(
    "flags",
    [
        "--precision fp32 --compile off",
        "--precision fp32 --compile auto",
        "--precision bf16 --compile auto",
        "--precision fp32 --compile auto --dropout 0.3",  # the graph draws the masks that the plain step draws
        "--precision fp32 --model compact",  # whose running statistics the warm-up must not change
    ],
)
def test_the_captured_step_trains_as_the_plain_one_across_milestones_and_a_short_batch(flags, tmp_path):
    program = [sys.executable, "-c", CAPTURED_AND_PLAIN, *flags.split()]
    result = subprocess.run(program, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_run_on_a_gpu_is_resumed_and_its_network_used_on_the_cpu(tmp_path):
    gpu = {"env": {"CUDA_VISIBLE_DEVICES": ENVIRONMENT.get("CUDA_VISIBLE_DEVICES", "0")}}
    flags = (*SMALL_RUN, "--device", "cuda", "--milestones", "1", "--output-dir", "run")
    assert run(*flags, "--epochs", "1", cwd=tmp_path, **gpu).returncode == 0
    resumed = run(*flags, "--epochs", "2", "--resume", cwd=tmp_path, **gpu)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming run/last.pt at epoch 2, learning rate 0.001" in resumed.stdout
    used = run("--checkpoint", "run/best.pt", "--evaluate", "--device", "cpu", cwd=tmp_path)
    assert used.returncode == 0, used.stderr
