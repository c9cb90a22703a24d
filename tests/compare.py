#!/usr/bin/env python3
"""Compare a trained network with the predictions of another one on the CIFAR-10 test images.

    python tests/compare.py results/cifar10-default/best.pt PREDICTIONS.json

PREDICTIONS.json is a list of 10,000 class indices in the order of `test_batch`, as the authors of
CIFAR-10.1 publish them (https://github.com/modestyachts/CIFAR-10.1). Prints both error rates and
McNemar's test (with continuity correction) for a single view and for 10 views, and the accuracy by
class.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cifar_krizhevsky as script  # noqa: E402


def mcnemar(a: int, b: int) -> float:
    """The p-value of McNemar's test, for a and b images that only one of the two gets right."""
    return math.erfc(math.sqrt(max(abs(a - b) - 1, 0) ** 2 / max(a + b, 1) / 2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    device = script.choose_device("auto")
    model, checkpoint = script.load_trained(args.checkpoint, device)
    precision = script.choose_precision(checkpoint["config"].precision, device)
    data = script.read_dataset("cifar10", args.data_dir)
    constants = (data.classes, checkpoint["mean"], checkpoint["std"])
    loader = script.CifarLoader(data.test_images, data.test_labels, *constants, device=device)
    theirs = torch.tensor(json.loads(args.predictions.read_text())) == data.test_labels
    correct = {}
    for name, views in (("single view", None), ("10 views", script.TEN_VIEWS)):
        test = script.evaluate_model(model, loader, precision=precision, views=views)
        ours = correct[name] = test.log_probabilities.argmax(1) == data.test_labels
        a, b = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        errors = [100 - 100 * right.double().mean().item() for right in (ours, theirs)]
        print(
            f"{name:<12} error {errors[0]:.2f} %, theirs {errors[1]:.2f} %; "
            f"only we are right {a}, only they {b}, McNemar p = {mcnemar(a, b):.2g}"
        )
    print(f"\n{'accuracy (%)':<14}{'single view':>12}{'10 views':>12}{'theirs':>12}")
    for label, name in enumerate(data.classes):
        of_class = data.test_labels == label
        accuracies = [100 * r[of_class].double().mean().item() for r in (*correct.values(), theirs)]
        print(f"{name:<14}" + "".join(f"{accuracy:12.1f}" for accuracy in accuracies))


if __name__ == "__main__":
    main()
