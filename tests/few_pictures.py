#!/usr/bin/env python3
"""What `--init-from` is worth with few pictures: CIFAR-10 with some of its pictures, by a network trained on CIFAR-100.

    python tests/few_pictures.py --search      # learning rates, by validation accuracy alone: results/few-search.json
    python tests/few_pictures.py               # 10, 50 and 100 pictures a class: results/few-pictures.json

The pictures are drawn anew for every seed, a tenth of them is held out to choose the epoch. `--recipe few` with and without
`--init-from results/cifar100-best/best.pt`; the test is on the first 2,000 test images. One process, the runs one after
another. Runs that the file has already are not made again: `--json FILE` makes all of them anew.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cifar_krizhevsky as ck  # noqa: E402

SOURCE = ROOT / "results" / "cifar100-best" / "best.pt"


def draw(whole: ck.Dataset, per_class: int, seed: int) -> ck.Dataset:
    """The data set with some training pictures of each class, drawn at random."""
    generator = np.random.RandomState(seed)
    chosen = []
    for label in range(len(whole.classes)):
        of_class = (whole.labels == label).nonzero().flatten().numpy()
        chosen.append(generator.permutation(of_class)[:per_class])
    index = torch.from_numpy(np.concatenate(chosen))
    return whole._replace(images=whole.images[index], labels=whole.labels[index])


def run(data: ck.Dataset, source: Path | None, seed: int, **settings: object) -> dict:
    """What summary.json holds of one run on these pictures."""
    ck.read_dataset = lambda *_, **__: data
    network = {"init_from": str(source)} if source else {}
    with tempfile.TemporaryDirectory() as folder:
        values = {**ck.RECIPES["few"], **network, **settings, "seed": seed, "output_dir": folder}
        return ck.train(ck.Config(**values))


def stored(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def store(path: Path, row: dict, summary: dict) -> None:
    """Add a row to the file, so that a stopped script leaves what it has."""
    for key in ("precision_used", "processor", "threads", "torch_version"):
        row[key] = summary[key]
    print(row, file=sys.stderr)
    content = stored(path)
    content["runs"].append(row)
    path.write_text(json.dumps(content, indent=1) + "\n")


def search(whole: ck.Dataset, seeds: int, path: Path) -> None:
    """Learning rates, on other pictures than the final ones."""
    done = {(row["lr"], row["init"], row["seed"]) for row in stored(path)["runs"]}
    for rate in (0.003, 0.01, 0.03):
        for source in (None, SOURCE):
            for seed in range(100, 100 + seeds):
                if (rate, bool(source), seed) in done:
                    continue
                data = draw(whole, 50, seed)
                summary = run(data, source, seed, lr=rate, no_test=True)
                row = {
                    "per_class": 50,
                    "init": bool(source),
                    "lr": rate,
                    "seed": seed,
                    "val_accuracy": summary["best_val_accuracy"],
                    "last_val_accuracy": summary["last_val_accuracy"],
                }
                store(path, row, summary)


def compare(whole: ck.Dataset, seeds: int, path: Path) -> None:
    """Test errors with and without the trained weights, on the same pictures."""
    done = {(row["seed"], row["per_class"], row["init"]) for row in stored(path)["runs"]}
    for seed in range(seeds):
        for per_class in (10, 50, 100):
            data = draw(whole, per_class, seed)
            for source in (None, SOURCE):
                if (seed, per_class, bool(source)) in done:
                    continue
                summary = run(data, source, seed)
                row = {
                    "per_class": per_class,
                    "init": bool(source),
                    "seed": seed,
                    "test_error": summary["test_error"],
                    "test_error_multi_view": summary["test_error_multi_view"],
                    "best_val_accuracy": summary["best_val_accuracy"],
                    "training_seconds": summary["training_seconds"],
                }
                store(path, row, summary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default=str(ROOT / "data"))
    parser.add_argument("--search", action="store_true", help="learning rates, without a test")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="the file (default: that of results/)")
    args = parser.parse_args()
    whole = ck.read_dataset("cifar10", args.data_dir)
    some = {"test_images": whole.test_images[:2000], "test_labels": whole.test_labels[:2000]}
    whole = whole._replace(**some)
    if args.search:
        search(whole, args.seeds, args.json or ROOT / "results" / "few-search.json")
    else:
        compare(whole, args.seeds, args.json or ROOT / "results" / "few-pictures.json")


if __name__ == "__main__":
    main()
