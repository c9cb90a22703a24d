#!/usr/bin/env python3
"""Speed, memory and start-up of cifar_krizhevsky.py, beside the script that it replaces and its own bare arithmetic.

    python tests/benchmark.py                                     # three rounds, on what the machine has
    python tests/benchmark.py --rounds 5 --json figures.json      # with all raw figures
    python tests/benchmark.py --networks                          # the networks of --model: training and inference
    python tests/benchmark.py --contender default                 # one contender, here: one line of JSON

Every figure comes from a fresh process in the environment as it is. The contenders run in turn, round after round, so
that a machine that slows down slows all of them. A step is a whole step: data, augmentation, forward, backward,
optimizer and metrics. The listed script is that of the architecture document: PIL transforms, DataLoader,
nn.LocalResponseNorm, fp32, `.item()` twice a step. Two things of it are left out: its import of matplotlib, and the
line that stops it, `optim.MultiStepLR`, which does not exist.

This is not a test: nothing passes or fails.

Tried for the step of 128 images in bf16, and dropped (ms on 2 cores of an AMD EPYC with 32 MB of cache, where the step
takes 55 to 62; medians of 30 or more in scratch programs, each beside what it was to replace, PyTorch 2.15):

    torch.compile of the whole network                                 248 a step
    torch.compile of nn.MaxPool2d, first layer, both ways              24, PyTorch's own 7.1, FusedMaxPool 4.4
    the second and third max-pooling fused too                         no gain
    the gradient of the first by parity, 2.25 windows a value, not 4   9.1 to 10.4, by 4 it is 2.2
    its output without NaN, or one comparison for value and place      no gain; the maximum alone 1.6 of 2.1
    the step in 2, 4 or 8 parts of the batch, which fit the cache      62, 68, 79 a step, in one 58
    LRN's passes in blocks of images, which fit the cache              no gain
    LRN without padded copies, what is beyond the ends times 0         1.2 less forward; 0 times infinity is not 0
    the same, with what is beyond the ends masked                      1.1 less forward, 0.4 to 1.1 more backward
    zeros in the margins only of LRN's padded copies                   0 to 0.4 a step less
    LRN's two backward passes as one, for torch.compile to divide      26.6 in the first layer, in two 5.9
    Newton's iteration in place of LRN's square roots                  8.5 a pass, with them 1.9
    the scaled gradient kept for LRN's last pass                       0.45 less, for one rounding more
    LRN's ReLU and zeros, or its cross term and zeros, as one pass     2.7 and 8 more in the first layer
    LRN's output written over its input, its gradient over the other   no gain
    the third pooling's gradient in channels_last, not as flatten has  0.4 to 0.7 a step less, for a layer of its own
    the first pooling's values and places as one whole number          5.9, not 1.8 (its bits are not taken as vectors)
    2 MB pages for all of glibc's blocks (GLIBC_TUNABLES)              no gain that four rounds would show

Kept: 2 MB pages (THP_MEM_ALLOC_ENABLE) make a step 4 to 6 % faster, FusedMaxPool made one of 62 faster by 4.2. LRN's
padded rows that come back with their zeros and batches made in channels_last made one of 61 faster by 1.4 to 1.6, one
division for all of LRN's roots by 0.2 to 0.7 (single steps in turn in one process, medians of 200 differences or more).
"""

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

# torch is imported by the functions that run in a process of their own: Linux lets a process begin with the peak
# memory of the one that started it, so that one has to stay small

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 128


class Contender(NamedTuple):
    """One line of a table. `kind` is listed, script, floor or inference; precision to model are the script's flags."""

    title: str
    kind: str
    precision: str = "auto"
    compile: str = "auto"
    norm: str = "lrn"
    model: str = "krizhevsky"
    allocator: bool = True  # our setting of glibc's, as main makes it
    cold: bool = False  # begin with an empty compile cache


CONTENDERS = {
    "listed": Contender("listed script", "listed", "fp32", "off", allocator=False),
    "listed-allocator": Contender("listed script + our allocator setting", "listed", "fp32", "off"),
    "default": Contender("this script", "script"),
    "cold": Contender("this script, empty compile cache", "script", cold=True),
    "bf16-eager": Contender("this script, --compile off", "script", "bf16", "off"),
    "fp32-compiled": Contender("this script, --precision fp32", "script", "fp32", "on"),
    "fp32-eager": Contender("this script, fp32, --compile off", "script", "fp32", "off"),
    "no-norm": Contender("this script, --norm none", "script", norm="none"),
    "floor-fp32": Contender("floor: convolutions, linear layers", "floor", "fp32", "off"),
    "floor-bf16": Contender("floor: convolutions, linear layers", "floor", "bf16", "off"),
}
MODELS = ("krizhevsky", "five-conv", "compact", "alexnet")
NETWORKS = {f"{model}-training": Contender(model, "script", model=model) for model in MODELS}
NETWORKS |= {f"{model}-inference": Contender(model, "inference", model=model) for model in MODELS}
ALL = CONTENDERS | NETWORKS

# ----------------------------------------------------------------------------------------------------------------------
# The contenders. Each function returns one that trains a given number of steps
# ----------------------------------------------------------------------------------------------------------------------

Advance = Callable[[int], None]


def has_cifar10(data_dir: str) -> bool:
    """Whether the real images are there."""
    return (Path(data_dir) / "cifar-10-batches-py" / "data_batch_5").exists()


def full_batches(loader: Any) -> Iterator[Any]:
    """Batches without end, epoch after epoch, without the short last one."""
    for epoch in itertools.count(1):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from (batch for batch in loader if len(batch[1]) == BATCH_SIZE)


def random_images() -> tuple[Any, Any]:
    """50,000 images (N, 32, 32, 3) uint8 and labels (N,) int64 in place of CIFAR-10's; they take as long."""
    import numpy as np

    draw = np.random.default_rng(0).integers
    return draw(0, 256, (50_000, 32, 32, 3), np.uint8), draw(0, 10, 50_000)


def listed_script(script: Any, device: Any, args: argparse.Namespace) -> Advance:
    """The listed script's pipeline, network and loop, written anew."""
    import torch
    from torch import nn, optim
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which choose_device has changed
    augment = [transforms.Pad(4), transforms.RandomCrop(32), transforms.RandomHorizontalFlip()]
    normalize = transforms.Normalize([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616])
    transform = transforms.Compose([*augment, transforms.ToTensor(), normalize])
    if has_cifar10(args.data_dir):
        dataset = datasets.CIFAR10(args.data_dir, train=True, transform=transform)
    else:  # torchvision's class, without its constructor, which wants the official files
        dataset = datasets.CIFAR10.__new__(datasets.CIFAR10)
        dataset.data, dataset.targets = random_images()
        dataset.transform, dataset.target_transform = transform, None
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=args.workers, pin_memory=device.type == "cuda")
    batches = full_batches(loader)

    def block(channels_in: int, channels: int, normalized: bool) -> list[nn.Module]:
        lrn = [nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2)] if normalized else []
        return [nn.Conv2d(channels_in, channels, 3, padding=1), nn.ReLU(inplace=True), *lrn, nn.MaxPool2d(3, 2)]

    convolutions = [*block(3, 96, True), *block(96, 96, True), *block(96, 192, False)]
    hidden = [nn.Linear(1728, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
    model = nn.Sequential(*convolutions, nn.Flatten(), *hidden, nn.Linear(256, 10)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def advance(steps: int) -> None:
        model.train()
        running_loss, correct = 0.0, 0
        for images, labels in itertools.islice(batches, steps):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            correct += logits.max(1)[1].eq(labels).sum().item()

    return advance


def this_script(script: Any, device: Any, args: argparse.Namespace, config: Any, kind: str) -> tuple[Advance, Any, int]:
    """What takes n training steps (or, for inference, n passes over the held-out images) as the script does, but for
    checkpoints; the hardware as the script sees it; and the images of one step or pass."""
    import torch

    def random_loaders(*_: Any) -> tuple[Any, Any, Any]:
        images, labels = map(torch.from_numpy, random_images())
        images, classes = images.permute(0, 3, 1, 2).contiguous()[:45_000], list(map(str, range(10)))
        mean, std = script.SOURCES["cifar10"][-2:]
        loader = script.CifarLoader(images, labels[:45_000], classes, mean, std, BATCH_SIZE, True, 0, device)
        return loader, loader, loader

    if not has_cifar10(args.data_dir):
        script.get_cifar_data_loaders = random_loaders
    run = script.prepare(config, {})
    batches, criterion = full_batches(run.train_loader), torch.nn.CrossEntropyLoss()
    step = script.CapturedStep() if device.type == "cuda" else script.train_step

    def advance(steps: int) -> None:
        some = itertools.islice(batches, steps)
        script.train_one_epoch(run.model, some, criterion, run.optimizer, device, run.precision, step)

    def infer(passes: int) -> None:
        for _ in range(passes):
            script.predict(run.model, run.val_loader, run.precision)

    if kind == "inference":
        return infer, run.hardware, len(run.val_loader.labels)
    return advance, run.hardware, BATCH_SIZE


def arithmetic_floor(script: Any, device: Any, precision: str) -> Advance:
    """Nothing but the convolutions and linear layers, forward and backward, each on its own input.

    Inputs, layouts and sizes are those of a forward pass of the network; of the first layer no gradient with respect
    to the images is asked. On CUDA it is one graph, and cuDNN chooses its fastest algorithms.
    """
    import torch
    from torch import Tensor, nn

    torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    model, calls = script.build_model(script.Config(norm="none"), 10).to(**layout), []

    def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach().requires_grad_(bool(calls))
        calls.append((layer, x, [*layer.parameters(), x] if calls else list(layer.parameters()), output.detach()))

    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    model(torch.randn(BATCH_SIZE, 3, 32, 32).to(**layout))
    for hook in hooks:
        hook.remove()

    def work() -> None:
        for layer, x, wanted, grad in calls:
            torch.autograd.grad(layer(x), wanted, grad)

    once = work
    if device.type == "cuda":
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        with torch.cuda.graph(graph, stream=stream):
            work()
        once = graph.replay

    def advance(steps: int) -> None:
        for _ in range(steps):
            once()

    return advance


# ----------------------------------------------------------------------------------------------------------------------
# One contender, in a process of its own
# ----------------------------------------------------------------------------------------------------------------------


def peak_resident() -> float:
    """The most memory that this process has held, in bytes; its children's is not in it. NaN on Windows."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender; what it gave, or {"skipped": why}."""
    import torch
    import torchvision

    imported = peak_resident()
    sys.path.insert(0, str(ROOT))
    import cifar_krizhevsky as script

    contender, images = ALL[args.contender], BATCH_SIZE
    if contender.allocator:
        script.keep_freed_memory()
    try:
        device = script.choose_device(args.device)
        best = script.choose_precision("auto", device)
        precision = best if contender.precision == "auto" else contender.precision
        if precision != best and precision == "bf16":
            return {"skipped": f"{device} has no native bf16"}
        hardware = script.describe_hardware(device, precision, False)
        if contender.kind == "listed":
            advance = listed_script(script, device, args)
        elif contender.kind == "floor":
            advance = arithmetic_floor(script, device, precision)
        else:
            flags = {key: getattr(contender, key) for key in ("precision", "compile", "norm", "model")}
            paths = {"data_dir": args.data_dir, "output_dir": "unused"}
            config = script.Config(batch_size=BATCH_SIZE, device=args.device, **flags, **paths)
            advance, hardware, images = this_script(script, device, args, config, contender.kind)
    except script.Problem as problem:
        return {"skipped": str(problem)}

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def seconds(steps: int) -> float:
        wait()
        start = time.perf_counter()
        advance(steps)
        wait()
        return time.perf_counter() - start

    seconds(1)
    start_up = time.time() - args.started
    steps = args.steps or (20 if device.type == "cpu" else 1000)
    seconds(min(steps, 3) if device.type == "cpu" else 20)
    rate = steps * images / seconds(steps)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "images_per_second": rate,
        "steps": steps,
        "start_up_seconds": start_up,
        "resident_bytes": peak_resident() - imported,
        "reserved_bytes": reserved,
        **hardware,
        "torchvision_version": torchvision.__version__,
    }


# ----------------------------------------------------------------------------------------------------------------------
# All of them, in turn
# ----------------------------------------------------------------------------------------------------------------------


def run_child(name: str, args: argparse.Namespace, steps: int | None) -> dict[str, Any]:
    """What one contender gave, in a fresh process; {"skipped": why} if it failed."""
    flags = {"--contender": name, "--device": args.device, "--data-dir": args.data_dir, "--workers": args.workers}
    flags |= {"--steps": steps} if steps else {}
    command = [sys.executable, __file__, *(str(word) for pair in flags.items() for word in pair)]
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": empty} if ALL[name].cold else {})
        command += ["--started", repr(time.time())]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"skipped": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}


def run_rounds(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The results of every contender, one a round; of a skipped one only why."""
    contenders = NETWORKS if args.networks else CONTENDERS
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):  # round 0 is thrown away: it fills the compile and the file cache
        for name, contender in contenders.items():
            unneeded = number == 0 and (contender.kind != "script" or contender.compile == "off" or contender.cold)
            if unneeded or (results[name] and "skipped" in results[name][0]):
                continue
            if sys.stderr.isatty():
                print(f"\r\x1b[Kround {number} of {args.rounds}: {name}", end="", flush=True, file=sys.stderr)
            result = run_child(name, args, args.steps if number else 1)
            if "skipped" in result:
                results[name] = [result]
            elif number:
                results[name].append(result)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return results


def tuning() -> list[str]:
    """The environment variables, of those that bear on the figures, that are set."""
    names = re.compile("(G?OMP|KMP|MKL|(ONE)?DNN.?|MALLOC|GLIBC|LD_PRELOAD|THP|(PY)?TORCH|TRITON|CUDA_VISIBLE)")
    return [f"{key}={value}" for key, value in sorted(os.environ.items()) if names.match(key)]


def caption(args: argparse.Namespace, one: dict[str, Any], load: str) -> str:
    """All that the figures depend on."""
    missing = f"random numbers in the shape of CIFAR-10's, which are not in {args.data_dir}"
    memory = "reserved on the GPU" if one["reserved_bytes"] else "resident, above `import torch, torchvision`"
    columns = f"""\
images/s, start-up: median (least to most). x listed: against the listed script in its default environment; x l.+alloc:
with our allocator setting. Of floor: of the bare arithmetic in the same precision. Start-up: from the start of the
process to the end of the first training step. Peak: memory of training, without DataLoader workers,
{memory}."""
    if args.networks:
        columns = "median (least to most); a step of inference is a pass over all held-out images, as after an epoch"
    return f"""\
{one["processor"]}, {one["device_used"]}, {one["threads"]} threads; PyTorch {one["torch_version"]}, \
torchvision {one["torchvision_version"]}, Python {platform.python_version()}, {platform.system()}
{datetime.now():%Y-%m-%d}; n = {args.rounds} rounds of {one["steps"]} steps of {BATCH_SIZE} images, each in a process \
of its own; load average before: {load}
images: {"CIFAR-10" if has_cifar10(args.data_dir) else missing}
listed script: fp32, {args.workers} DataLoader workers (its own number is 4)
environment: {", ".join(tuning()) or "default"}

{columns}
"""


def median_and_range(values: list[float], form: str) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_table(results: dict[str, list[dict[str, Any]]]) -> None:
    """One line for each contender, and the share of the normalisation."""

    def median(name: str, key: str = "images_per_second") -> float:
        return statistics.median([row.get(key, float("nan")) for row in results[name]] or [float("nan")])

    def spread(name: str, key: str, form: str) -> str:
        return median_and_range([row[key] for row in results[name]], form)

    columns = "{:<38}{:<15}{:>25}{:>10}{:>11}{:>10}{:>9}{:>22}"
    print(columns.format("", "", "images/s", "x listed", "x l.+alloc", "of floor", "peak", "start-up"))
    for name, contender in CONTENDERS.items():
        rows = results[name]
        if "skipped" in rows[0]:
            print(f"{contender.title:<38}skipped: {rows[0]['skipped']}")
            continue
        kind = f"{rows[0]['precision_used']}{', compiled' if rows[0]['compiled'] else ''}"
        ratios = [median(name) / median(other) for other in ("listed", "listed-allocator")]
        of_floor = 100 * median(name) / median(f"floor-{rows[0]['precision_used']}")
        peak = median(name, "reserved_bytes" if rows[0]["reserved_bytes"] else "resident_bytes") / 1e9
        cells = [f"{ratio:.2f}" for ratio in ratios] + [f"{of_floor:.0f} %", f"{peak:.2f} GB"]
        rate, start_up = spread(name, "images_per_second", ",.0f"), spread(name, "start_up_seconds", ".1f")
        print(columns.format(contender.title, kind, rate, *cells, f"{start_up} s"))
    share = 100 * (1 - median("default") / median("no-norm"))
    print(f"\nshare of local response normalisation in the step of this script: {share:.0f} %, 1 - t(none) / t(lrn)")


def print_networks(results: dict[str, list[dict[str, Any]]]) -> None:
    """One line for each network of --model."""
    columns = "{:<14}{:>30}{:>30}"
    print(columns.format("images/s", "training", "inference"))
    for model in MODELS:
        rates = []
        for rows in (results[f"{model}-training"], results[f"{model}-inference"]):
            missing = rows[0].get("skipped")
            rates.append(missing or median_and_range([row["images_per_second"] for row in rows], ",.0f"))
        print(columns.format(model, *rates))


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender (default: 3)")
    parser.add_argument("--steps", type=int, help="timed steps in each (default: 20 on a CPU, 1,000 elsewhere)")
    parser.add_argument("--device", default="auto", help="as in the script (default: auto)")
    parser.add_argument("--data-dir", default="data", help="where CIFAR-10 lies; without it, random images")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers of the listed script (default: 2)")
    parser.add_argument("--json", metavar="FILE", help="write all raw figures there")
    parser.add_argument("--networks", action="store_true", help="compare the networks of --model instead")
    parser.add_argument("--contender", choices=ALL, metavar="NAME", help="run only this one, once, in this process")
    parser.add_argument("--started", type=float, default=started, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rounds, 1 if args.steps is None else args.steps, args.workers + 1) < 1:
        parser.error("--rounds and --steps must be at least 1, --workers at least 0")
    if args.contender:
        print(json.dumps(measure(args)))
        return
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    results = run_rounds(args)
    measured = [rows[0] for rows in results.values() if "skipped" not in rows[0]]
    if not measured:
        sys.exit(f"error: {next(iter(results.values()))[0]['skipped']}")
    print(caption(args, measured[0], load))
    print_networks(results) if args.networks else print_table(results)
    if args.json:
        content = {"date": datetime.now().isoformat(), "arguments": vars(args), "load_average_before": load}
        content |= {"environment": tuning(), "results": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
