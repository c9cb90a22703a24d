#!/usr/bin/env python3
"""Make data/mini, a tenth of CIFAR-10, from the official files.

    python tests/make_mini.py            # reads data/cifar-10-batches-py, writes data/mini

One lossless PNG for each class and part, which a person can look at: `train/CLASS.png` holds the first 500 training
images of the class, in the order of the official batches, as 25 rows of 20; `test/CLASS.png` the first 100 test images,
as 10 rows of 10.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

ROOT = Path(__file__).resolve().parent.parent
GRIDS = {"train": (25, 20), "test": (10, 10)}  # rows, columns


def contact_sheet(images: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Images (rows * columns, 32, 32, 3) uint8, row by row, as one of (32 rows, 32 columns, 3)."""
    grid = images.reshape(rows, columns, 32, 32, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(32 * rows, 32 * columns, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-dir", type=Path, default=ROOT / "data", help="holds cifar-10-batches-py"
    )
    parser.add_argument("--output-dir", type=Path, default=ROOT / "data" / "mini")
    args = parser.parse_args()
    for part, (rows, columns) in GRIDS.items():
        official = CIFAR10(args.data_dir, train=part == "train")
        labels = np.array(official.targets)
        (args.output_dir / part).mkdir(parents=True, exist_ok=True)
        for label, name in enumerate(official.classes):
            images = official.data[labels == label][: rows * columns]
            sheet = Image.fromarray(contact_sheet(images, rows, columns))
            sheet.save(args.output_dir / part / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
