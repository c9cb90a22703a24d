#!/usr/bin/env python3
"""How far local response normalization is from a constant, in a trained network, layer by layer.

    python tests/denominator.py results/cifar10-default/best.pt

On held-out images (never the test set), in fp32. First, over one batch: mean and percentiles of
d / k where the activation is not 0; d is the denominator before its power beta, and 1 means that
the layer only multiplies by k^-beta. Then the validation accuracy of the same weights, with the
layers as they are, and with one or all of them replaced by a constant factor: the mean of d^-beta
over that batch.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cifar_krizhevsky as script  # noqa: E402

PERCENTILES = (0.01, 0.5, 0.99, 0.9999)


def ratios(layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """d / k of every value, from the layer's input and output: y = x d^-beta."""
    used = x != 0  # where x is 0, so is y, and d cannot be seen
    return (x[used] / y[used]) ** (1 / layer.beta) / layer.k


@contextmanager
def replaced(factors: dict[nn.Module, float]) -> Iterator[None]:
    """Within, these layers multiply by these factors."""
    hooks = [
        layer.register_forward_hook(lambda layer, x, y: x[0] * factors[layer]) for layer in factors
    ]
    yield
    for hook in hooks:
        hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    model, checkpoint = script.load_trained(args.checkpoint, torch.device("cpu"))
    config = checkpoint["config"]
    _, loader, _ = script.get_cifar_data_loaders(
        128, config.dataset, args.data_dir, config.val_size, inputs=config.inputs,
        crop_size=script.input_size(model), statistics=(checkpoint["mean"], checkpoint["std"]),
    )  # fmt: skip
    if loader is None:
        parser.error(f"{args.checkpoint} was trained with --val-size 0: no images are held out")
    kind = script.LocalResponseNormalization
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}

    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(
            lambda layer, x, y, name=name: seen.update({name: ratios(layer, x[0], y)})
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        images, _ = next(iter(loader))
        model(images)
    for hook in hooks:
        hook.remove()
    titles = "".join(f"{100 * p:>9g} %" for p in PERCENTILES)
    print(f"{len(images)} images\n\n{'d / k':<10}{'mean':>9}{titles}{'largest':>11}")
    for name, values in seen.items():
        values = values.double().sort().values
        cells = [values[round(p * (len(values) - 1))].item() for p in PERCENTILES] + [values[-1]]
        print(f"{name:<10}{values.mean():9.4f}" + "".join(f"{cell:11.4f}" for cell in cells))

    print(f"\n{'a constant in the place of':<28}validation accuracy")
    factors = {
        layer: ((seen[name] * layer.k) ** -layer.beta).mean().item()
        for name, layer in layers.items()
    }
    one_by_one = {name: {layer: factors[layer]} for name, layer in layers.items()}
    for title, chosen in ({"none": {}} | one_by_one | {"all": factors}).items():
        with replaced(chosen):
            print(f"{title:<28}{script.evaluate_model(model, loader).top1:.2f} %")


if __name__ == "__main__":
    main()
