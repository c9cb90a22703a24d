#!/usr/bin/env python3
"""Speed, memory and start-up of cifar_krizhevsky.py, of the script it replaces, and their floor.

    python tests/benchmark.py                                     # three rounds on this machine
    python tests/benchmark.py --rounds 7 --steps 30 --json speed.json
    python tests/benchmark.py --networks --steps 5 --json networks.json
    python tests/benchmark.py --of-2012 --rounds 5 --json speed-of-2012.json
    python tests/benchmark.py --frameworks --rounds 5 --steps 6 --json speed-frameworks.json

Every number comes from a fresh process. The contenders run in turn, round after round, so that a
machine that slows down slows all of them. A step is a whole step: data, augmentation, forward,
backward, optimizer and metrics. The listed script is that of the architecture document, without its
import of matplotlib and its `optim.MultiStepLR`, which does not exist. Without CIFAR-10 the images
are those of data/mini. No file is replaced. Nothing passes or fails. What was tried for speed is in results/speed.md.
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

# torch is imported by the functions that run in a process of their own: on Linux a process begins
# with the peak memory of the one that started it, so that one has to stay small

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 128


class Contender(NamedTuple):
    """One row of a table; `kind` says what runs, precision to recipe are the script's flags."""

    title: str
    kind: str  # listed, script, plain, floor, inference, or the name of a framework
    precision: str = "auto"
    compile: str = "auto"
    norm: str = "lrn"
    model: str = "krizhevsky"
    recipe: str = ""
    malloc: bool = True  # with the settings of memory that `main` makes
    cold: bool = False  # with an empty compile cache


CONTENDERS = {
    "listed": Contender("listed script", "listed", "fp32", "off", malloc=False),
    "listed-allocator": Contender("listed script + our malloc settings", "listed", "fp32", "off"),
    "default": Contender("this script", "script"),
    "cold": Contender("this script, empty compile cache", "script", cold=True),
    "bf16-eager": Contender("this script, `--compile off`", "script", "bf16", "off"),
    "fp32-compiled": Contender("this script, `--precision fp32`", "script", "fp32"),
    "fp32-eager": Contender("this script, fp32, `--compile off`", "script", "fp32", "off"),
    "no-norm": Contender("this script, `--norm none`", "script", norm="none"),
    "floor-fp32": Contender("floor: convolutions, linear layers", "floor", "fp32", "off"),
    "floor-bf16": Contender("floor: convolutions, linear layers", "floor", "bf16", "off"),
}
MODELS = ("krizhevsky", "five-conv", "alexnet", "compact")
NETWORKS = {f"{model}-training": Contender(model, "script", model=model) for model in MODELS}
NETWORKS |= {f"{model}-inference": Contender(model, "inference", model=model) for model in MODELS}
OF_2012 = {
    "80sec": Contender("this script, `--recipe 80sec`", "script", recipe="80sec"),
    "80sec-plain": Contender("80sec, a plain loop", "plain", recipe="80sec", malloc=False),
    "80sec-plain-allocator": Contender(
        "80sec, a plain loop + our malloc settings", "plain", recipe="80sec"
    ),
}
for recipe in ("18pct", "13pct", "11pct"):
    OF_2012[recipe] = Contender(f"this script, `--recipe {recipe}`", "script", recipe=recipe)
FRAMEWORKS = {"default": CONTENDERS["default"]}
for framework, title in {"tensorflow": "TensorFlow", "jax": "JAX", "pytorch": "PyTorch"}.items():
    for precision in ("fp32", "bf16"):
        FRAMEWORKS[f"{framework}-{precision}"] = Contender(
            f"plain {title}", framework, precision, "off", malloc=False
        )
compiled_pytorch = Contender("plain PyTorch, torch.compile", "pytorch", "bf16", malloc=False)
FRAMEWORKS["pytorch-compiled"] = compiled_pytorch
ALL = CONTENDERS | NETWORKS | OF_2012 | FRAMEWORKS

# --------------------------------------------------------------------------------------------------
# The contenders. Each function returns one that takes a number of steps
# --------------------------------------------------------------------------------------------------

Advance = Callable[[int], None]


def data_name(data_dir: str) -> str:
    there = (Path(data_dir) / "cifar-10-batches-py" / "data_batch_5").exists()
    return "cifar10" if there else "cifar10-mini"


def full_batches(loader: Any) -> Iterator[Any]:
    """Batches without end, epoch after epoch, without the short last one."""
    for epoch in itertools.count(1):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from (batch for batch in loader if len(batch[1]) == BATCH_SIZE)


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
    if data_name(args.data_dir) == "cifar10":
        dataset = datasets.CIFAR10(args.data_dir, train=True, transform=transform)
    else:  # torchvision's class without its constructor, which wants the official files
        mini = script.read_dataset("cifar10-mini", args.data_dir)
        dataset = datasets.CIFAR10.__new__(datasets.CIFAR10)
        dataset.data = mini.images.permute(0, 2, 3, 1).repeat(10, 1, 1, 1).numpy()
        dataset.targets = mini.labels.repeat(10).tolist()
        dataset.transform, dataset.target_transform = transform, None
    workers = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    batches = full_batches(DataLoader(dataset, BATCH_SIZE, shuffle=True, **workers))

    def block(inputs: int, outputs: int, normalized: bool) -> list[nn.Module]:
        lrn = [nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2)] if normalized else []
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        return [convolution, nn.ReLU(inplace=True), *lrn, nn.MaxPool2d(3, 2)]

    model = nn.Sequential(
        *block(3, 96, True), *block(96, 96, True), *block(96, 192, False), nn.Flatten(),
        nn.Linear(1728, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True),
        nn.Linear(256, 10),
    ).to(device)  # fmt: skip
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


def this_script(
    script: Any, device: Any, precision: str, contender: Contender, data_dir: str
) -> tuple[Advance, int, bool]:
    """What takes training steps, or passes over the held-out images; its images; if compiled."""
    from torch import nn, optim

    settings = {"model": contender.model, **script.RECIPES.get(contender.recipe, {})}
    config = script.Config(**{"norm": contender.norm, **settings})
    train_loader, val_loader, _ = script.get_cifar_data_loaders(
        BATCH_SIZE, data_name(data_dir), data_dir, config.val_size, device=device,
        inputs=config.inputs, augment=config.augment,
        crop_size=script.input_size(script.build_model(config, 10)),
    )  # fmt: skip
    model = script.build_model(config, len(train_loader.classes))
    model = model.to(device, memory_format=script.memory_format(device))
    compiled = script.speed_up_lrn(model, contender.compile, device, precision)
    groups = script.parameter_groups(model, config.lr, config.weight_decay)
    if device.type == "cuda" and contender.compile != "off":
        model = script.CudaGraphs(model, next(iter(train_loader))[0], precision)
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(groups, momentum=config.momentum, fused=device.type == "cuda")
    batches = full_batches(train_loader)

    def advance(steps: int) -> None:
        some = itertools.islice(batches, steps)
        script.train_one_epoch(model, some, criterion, optimizer, device, precision)

    def infer(passes: int) -> None:
        for _ in range(passes):
            script.evaluate_model(model, val_loader, precision=precision)

    if contender.kind == "inference":
        return infer, len(val_loader.labels), compiled
    return advance, BATCH_SIZE, compiled


def plain_80sec(script: Any, device: Any, precision: str, data_dir: str) -> Advance:
    """80sec as a good engineer would write it in twenty lines, with its data in memory."""
    import torch
    from torch import nn, optim

    data = script.read_dataset(data_name(data_dir), data_dir)
    images = data.images.to(device).float()
    images = (images - images.mean(0)).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    layers = [
        nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(inplace=True), nn.Linear(64, 10),
    ]  # fmt: skip
    model = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    factors = {0: 1, 3: 1, 6: 1, 10: 7.5, 12: 7.5}
    groups = []
    for number, factor in factors.items():
        layer = model[number]
        groups.append({"params": [layer.weight], "lr": 0.001, "weight_decay": 0.004 * factor})
        groups.append({"params": [layer.bias], "lr": 0.002})
    optimizer = optim.SGD(groups, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    def batches() -> Iterator[Any]:
        while True:
            for index in torch.randperm(len(labels), device=device).split(BATCH_SIZE):
                if len(index) == BATCH_SIZE:
                    yield images[index], labels[index]

    endless = batches()

    def advance(steps: int) -> None:
        model.train()
        for x, y in itertools.islice(endless, steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = criterion(model(x).float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return advance


def other_framework(
    contender: Contender, script: Any, precision: str, data_dir: str
) -> tuple[Advance, str]:
    """The default network in another library, or in plain PyTorch; and that library's version."""
    import importlib

    import frameworks

    library = importlib.import_module({"pytorch": "torch"}.get(contender.kind, contender.kind))
    data = script.read_dataset(data_name(data_dir), data_dir)
    images = data.images.permute(0, 2, 3, 1).float().div(255)
    mean, std = images.mean((0, 1, 2)), images.std((0, 1, 2))
    arrays = ((images - mean) / std).contiguous().numpy(), data.labels.numpy()
    settings = {"compiled": contender.compile == "auto"} if contender.kind == "pytorch" else {}
    make = getattr(frameworks, contender.kind)
    return make(*arrays, BATCH_SIZE, precision, **settings), library.__version__


def arithmetic_floor(script: Any, device: Any, precision: str) -> Advance:
    """Nothing but the convolutions and linear layers, forward and backward, each on its own input.

    Inputs, layouts and sizes are those of the network. No gradient with respect to the images.
    """
    import torch
    from torch import Tensor, nn

    torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    model = script.build_model(script.Config(norm="none"), 10).to(**layout)
    calls = []

    def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach().requires_grad_(len(calls) > 0)
        wanted = [tensor for tensor in (*layer.parameters(), x) if tensor.requires_grad]
        calls.append((layer, x, wanted, output.detach()))

    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    model(torch.randn(BATCH_SIZE, 3, 32, 32).to(**layout))
    for hook in hooks:
        hook.remove()

    def advance(steps: int) -> None:
        for _ in range(steps):
            for layer, x, wanted, grad in calls:
                torch.autograd.grad(layer(x), wanted, grad)

    return advance


def peak_resident() -> float:
    """The peak memory of this process, without its children, in bytes; NaN on Windows."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run one contender, in a process of its own; its numbers, or {"skipped": why}."""
    contender, images, compiled = ALL[args.contender], BATCH_SIZE, False
    library_version = None
    if contender.malloc:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in `main`
    import torch
    import torchvision

    imported = peak_resident()
    sys.path.insert(0, str(ROOT))
    import cifar_krizhevsky as script

    if contender.malloc:
        script.tune_glibc_malloc()
    try:
        device = script.choose_device(args.device)
        native = script.choose_precision("auto", device)
        precision = native if contender.precision == "auto" else contender.precision
        if precision == "bf16" != native:
            return {"skipped": f"{device} has no native bf16"}
        if contender.kind == "listed":
            advance = listed_script(script, device, args)
        elif contender.kind in ("pytorch", "tensorflow", "jax"):
            advance, library_version = other_framework(contender, script, precision, args.data_dir)
        elif contender.kind == "plain":
            advance = plain_80sec(script, device, precision, args.data_dir)
        elif contender.kind == "floor":
            advance = arithmetic_floor(script, device, precision)
        else:
            advance, images, compiled = this_script(
                script, device, precision, contender, args.data_dir
            )
    except script.UserError as error:
        return {"skipped": str(error)}

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        advance(steps)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    seconds(1)
    start_up = time.time() - args.started
    on_cpu = 200 if contender.recipe else 20  # a step of those of 2012 is short
    steps = args.steps or (on_cpu if device.type == "cpu" else 1000)
    seconds(3)
    rate = steps * images / seconds(steps)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return {
        "images_per_second": rate,
        "steps": steps,
        "start_up_seconds": start_up,
        "resident_bytes": peak_resident() - imported,
        "reserved_bytes": reserved,
        **script.describe_hardware(device, precision, compiled),
        "torchvision_version": torchvision.__version__,
        "library_version": library_version,
    }


# --------------------------------------------------------------------------------------------------
# All of them, in turn
# --------------------------------------------------------------------------------------------------

Results = dict[str, list[dict[str, Any]]]  # of each contender, by name, one dict a round


def run_child(name: str, args: argparse.Namespace, steps: int | None) -> dict[str, Any]:
    """The numbers of one contender in a fresh process; {"skipped": why} if it failed."""
    command = [sys.executable, __file__, "--contender", name, "--device", args.device]
    command += ["--data-dir", args.data_dir, "--workers", str(args.workers)]
    command += ["--steps", str(steps)] if steps else []
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | ({"TORCHINDUCTOR_CACHE_DIR": empty} if ALL[name].cold else {})
        command += ["--started", repr(time.time())]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    return {"skipped": (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]}


def chosen_contenders(args: argparse.Namespace) -> dict[str, Contender]:
    if args.networks:
        return NETWORKS
    if args.of_2012:
        return OF_2012
    if args.frameworks:
        return FRAMEWORKS
    return CONTENDERS


def run_rounds(args: argparse.Namespace) -> Results:
    """Run every contender once a round; a skipped one is not tried again."""
    contenders = chosen_contenders(args)
    results: Results = {name: [] for name in contenders}
    for name, contender in contenders.items():  # fill the compile cache
        if contender.kind == "script" and contender.compile == "auto" and not contender.cold:
            run_child(name, args, steps=1)
    for number, name in itertools.product(range(1, args.rounds + 1), contenders):
        if not (results[name] and "skipped" in results[name][0]):
            print(f"round {number} of {args.rounds}: {name}", file=sys.stderr)
            results[name].append(run_child(name, args, args.steps))
    return results


def paired_rows(results: Results, base: str, column: str) -> list[dict[str, str]]:
    """A table with the ratio of each contender to one of them, the base, round by round."""
    rates = {name: [run["images_per_second"] for run in runs] for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        version = runs[0]["library_version"]
        by_round = [a / b for a, b in zip(rates[name], rates[base])]
        rows.append(
            {
                "contender": f"{ALL[name].title} {version}" if version else ALL[name].title,
                "precision": runs[0]["precision_used"],
                "images/s": median_and_range(rates[name], ",.0f"),
                column: median_and_range(by_round, ".2f"),
                "n": len(runs),
            }
        )
    return rows


def table_rows(args: argparse.Namespace, results: Results) -> list[dict[str, str]]:
    """The rows of the table of the chosen contenders; none where its base was skipped."""
    if args.networks:
        return network_rows(results)
    if args.of_2012 and "80sec-plain" in results:
        return paired_rows(results, "80sec-plain", "× plain loop")
    if args.frameworks and "default" in results:
        return paired_rows(results, "default", "× this script")
    return speed_rows(results) if "listed" in results else []


def median_and_range(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def speed_rows(results: Results) -> list[dict[str, str]]:
    """The table of all contenders: cells by column, one row for each."""
    median = statistics.median
    rates = {name: [run["images_per_second"] for run in runs] for name, runs in results.items()}
    rows = []
    for name, runs in results.items():
        precision = runs[0]["precision_used"]
        row = {"contender": CONTENDERS[name].title, "precision": precision}
        row["images/s"] = median_and_range(rates[name], ",.0f")
        rows.append(row)
        if CONTENDERS[name].kind == "floor":
            continue
        ratio = median(rates[name]) / median(rates["listed"])
        by_round = [a / b for a, b in zip(rates[name], rates["listed"])]
        row["× listed"] = f"{ratio:.1f} ({min(by_round):.1f} to {max(by_round):.1f})"
        share = median(rates[name]) / median(rates[f"floor-{precision}"])
        row["of floor"] = f"{100 * share:.0f} %"
        memory = "reserved_bytes" if runs[0]["reserved_bytes"] else "resident_bytes"
        row["memory"] = f"{median(run[memory] for run in runs) / 1e9:.2f} GB"
        row["start-up"] = f"{median(run['start_up_seconds'] for run in runs):.1f} s"
    return rows


def network_rows(results: Results) -> list[dict[str, str]]:
    """The table of the networks of --model."""
    rows = {model: {"`--model`": f"`{model}`"} for model in MODELS}
    for name, runs in results.items():
        model, kind = name.rsplit("-", 1)
        rates = [run["images_per_second"] for run in runs]
        rows[model][f"{kind}, images/s"] = median_and_range(rates, ",.0f")
    return [*rows.values()]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, from cells by column; a cell that is missing is empty."""
    columns = [*{column: None for row in rows for column in row}]
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def conditions(args: argparse.Namespace, one: dict[str, Any], load: str) -> str:
    """Everything that the numbers depend on."""
    names = re.compile("(G?OMP|KMP|MKL|(ONE)?DNN.?|MALLOC|GLIBC|LD_PRELOAD|THP|(PY)?TORCH|TRITON)")
    tuning = [f"{key}={value}" for key, value in sorted(os.environ.items()) if names.match(key)]
    return f"""\
{one["processor"]}, {one["device_used"]}, {one["threads"]} threads, load average before {load}
PyTorch {one["torch_version"]}, torchvision {one["torchvision_version"]}, \
Python {platform.python_version()}, {platform.system()}, {datetime.now():%Y-%m-%d}
environment: {", ".join(tuning) or "default"}
{data_name(args.data_dir)}; n = {args.rounds} rounds of {one["steps"]} steps of {BATCH_SIZE} images
listed script: {args.workers} DataLoader workers (its own number is 4)
images/s: median (least to most); × listed: of the medians (of single rounds); memory: peak of
training above the imports, without DataLoader workers; start-up: to the end of the first step;
a step of inference: a pass over all held-out images
"""


def main() -> None:
    started = time.time()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="processes for each contender (default: 3)")
    add("--steps", type=int, help="timed steps in each (on a CPU 20 or 200, elsewhere 1,000)")
    add("--device", default="auto", help="as in the script (default: auto)")
    add("--data-dir", default=str(ROOT / "data"), help="folder of CIFAR-10 (default: data)")
    add("--workers", type=int, default=2, help="DataLoader workers of the listed script")
    add("--json", metavar="FILE", help="write all raw numbers there")
    add("--networks", action="store_true", help="compare the networks of --model instead")
    add("--of-2012", action="store_true", help="compare 80sec with a plain loop of it instead")
    add("--frameworks", action="store_true", help="compare with TensorFlow, JAX and plain PyTorch")
    add("--contender", choices=ALL, metavar="NAME", help="run only this one, once, in this process")
    add("--started", type=float, default=started, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(measure(args)))
        return
    if args.json and Path(args.json).exists():
        parser.error(f"{args.json} exists")
    if args.frameworks:  # the others have no GPU
        args.device = "cpu"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    results = run_rounds(args)
    skipped = {}
    for name, runs in results.items():
        for run in runs:
            if "skipped" in run:
                skipped[name] = run["skipped"]
    results = {name: runs for name, runs in results.items() if name not in skipped}
    if args.json:
        content = {"date": datetime.now().isoformat(), "arguments": vars(args)}
        content |= {"load_average_before": load, "results": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    for name, why in skipped.items():
        print(f"skipped {name}: {why}")
    rows = table_rows(args, results)
    if rows:
        print(conditions(args, next(iter(results.values()))[0], load))
        print(markdown(rows))


if __name__ == "__main__":
    main()
