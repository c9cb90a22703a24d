#!/usr/bin/env python3
"""Compare a trained network with the predictions of another one on the same test images.

    python tests/compare.py results/cifar10-default/best.pt PREDICTIONS.json > against-OTHER.txt

PREDICTIONS.json is a list of class indices in the order of the test images, of CIFAR-10 those of
`test_batch`, as the authors of CIFAR-10.1 publish them (https://github.com/modestyachts/CIFAR-10.1,
model_predictions/original_predictions). Prints both error rates and McNemar's test (with continuity
correction) for a single view and for all views of a test, and the accuracy by class.
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
    classifier = script.Classifier(args.checkpoint)
    config = classifier.trained["config"]
    data = script.read_dataset(config.dataset, args.data_dir)
    loader = classifier.loader(data.test_images, data.test_labels)
    predicted = torch.tensor(json.loads(args.predictions.read_text()))
    if len(predicted) != len(data.test_labels):
        parser.error(f"{len(predicted)} predictions for {len(data.test_labels)} test images")
    theirs = predicted == data.test_labels
    all_views = script.VIEWS[config.augment]
    ways = {"single view": [script.CENTER]}
    if len(all_views) > 1:
        ways[f"{len(all_views)} views"] = all_views
    correct = {}
    for name, views in ways.items():
        test = script.evaluate_model(
            classifier.model, loader, precision=classifier.precision, views=views
        )
        ours = correct[name] = test.log_probabilities.argmax(1) == data.test_labels
        a, b = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        errors = [100 - 100 * right.double().mean().item() for right in (ours, theirs)]
        print(
            f"{name:<12} error {errors[0]:.2f} %, theirs {errors[1]:.2f} %; "
            f"only we are right {a}, only they {b}, McNemar p = {mcnemar(a, b):.2g}"
        )
    titles = "".join(f"{title:>12}" for title in (*ways, "theirs"))
    print(f"\n{'accuracy (%)':<14}{titles}")
    for label, name in enumerate(data.classes):
        of_class = data.test_labels == label
        accuracies = [100 * r[of_class].double().mean().item() for r in (*correct.values(), theirs)]
        print(f"{name:<14}" + "".join(f"{accuracy:12.1f}" for accuracy in accuracies))


if __name__ == "__main__":
    main()
