"""What CIFAR is like, and what another encoding does to it: the facts of results/README.md.

    python tests/data_facts.py    # ten minutes of one thread; prints tables in Markdown

The pairs of images closer than 20 (of 255, root mean square over the 3,072 values) are found among
all 60,000 of a data set, plain and with one of the two mirrored. The search leaves none out: 96
principal components and the length of the rest give a lower bound of every distance.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmark import markdown
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cifar_krizhevsky as script  # noqa: E402

LARGEST_RMS = 20
BINS = ["0", "0-12", "12", "13", "14", "15", "16", "17", "18", "19"]
ENCODINGS = {  # side, format, options of Pillow
    "PNG": (32, "PNG", {}),
    "WebP, lossless": (32, "WEBP", {"lossless": True}),
    "JPEG, quality 90": (32, "JPEG", {"quality": 90}),
    "JPEG, quality 75, Pillow's default": (32, "JPEG", {"quality": 75}),
    "enlarged to 224×224 (bicubic), PNG": (224, "PNG", {}),
    "enlarged to 224×224 (bicubic), JPEG, quality 75": (224, "JPEG", {"quality": 75}),
}


def lower_bounds(vectors: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """Coordinates (N, 97) whose distances are at most those of the vectors (N, 3072)."""
    centered = vectors - mean
    parts = centered @ basis
    rest = centered.square().sum(1) - parts.square().sum(1)
    return torch.cat([parts, rest.clamp(min=0).sqrt()[:, None]], 1)


def close_pairs(images: Tensor, mirrored: bool) -> Iterator[tuple[int, int, float]]:
    """The pairs i < j of images (N, 3, 32, 32) uint8 that are close, and their RMS difference."""
    others = images.flip(3) if mirrored else images
    vectors = images.flatten(1).float()
    mean = vectors.mean(0)
    covariance = torch.cov(vectors.T)
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -96:]
    ours = lower_bounds(vectors, mean, basis)
    theirs = lower_bounds(others.flatten(1).float(), mean, basis)
    limit = LARGEST_RMS * 3072**0.5
    for start in range(0, len(images), 1000):
        near = torch.cdist(ours[start : start + 1000], theirs[start:]) < 1.01 * limit
        for i, j in (near.nonzero() + start).tolist():
            if i < j:
                difference = images[i].double() - others[j].double()
                rms = difference.square().mean().sqrt().item()
                if rms < LARGEST_RMS:
                    yield i, j, rms


def name_of_bin(rms: float) -> str:
    if rms == 0:
        return "0"
    return "0-12" if rms < 12 else str(int(rms))


def pair_facts(name: str, data: script.Dataset) -> Iterator[dict]:
    """Rows of a table with the number of close pairs by their difference; prints the identical."""
    images = torch.cat([data.images, data.test_images])
    labels = torch.cat([data.labels, data.test_labels]).tolist()
    training = len(data.labels)
    for mirrored in (False, True):
        rows = {
            same: {
                "pairs": f"{name}, {same}{', one mirrored' * mirrored}",
                **dict.fromkeys(BINS, 0),
            }
            for same in ("same class", "different classes")
        }
        where = dict.fromkeys(("within training", "training and test", "within test"), 0)
        contradicting = 0
        smallest = LARGEST_RMS
        for i, j, rms in close_pairs(images, mirrored):
            is_same = labels[i] == labels[j]
            rows["same class" if is_same else "different classes"][name_of_bin(rms)] += 1
            if is_same and rms > 0:
                smallest = min(smallest, rms)
            if rms == 0:
                place = (i >= training) + (j >= training)
                where[[*where][place]] += 1
                contradicting += not is_same
        kind = "mirrored" if mirrored else "plain"
        print(f"{name}, {kind}: identical pairs {where}, with different labels {contradicting}; ")
        print(f"the closest others of one class differ by {smallest:.3f}", flush=True)
        yield from rows.values()


def gray_facts(name: str, data: script.Dataset) -> None:
    for part, images, labels in (
        ("training", data.images, data.labels),
        ("test", data.test_images, data.test_labels),
    ):
        gray = (images == images[:, :1]).flatten(1).all(1)
        count = int(gray.sum())
        by_class = labels[gray].bincount(minlength=len(data.classes))
        top = by_class.argsort(descending=True)[:3].tolist()
        shown = ", ".join(f"{data.classes[label]} {by_class[label]}" for label in top)
        print(f"{name}, {part}: {count} of {len(images)} images are gray ({shown})")


def batch_facts(data: script.Dataset) -> None:
    """The official files have 10,000 training images each, in the order that they are read."""
    counts = [batch.bincount(minlength=10) for batch in data.labels.split(10000)]
    counts = torch.stack(counts)
    for what, value in (("smallest", counts.min()), ("largest", counts.max())):
        batch, label = (counts == value).nonzero()[0].tolist()
        print(f"{what} class of a training batch: {value} {data.classes[label]}, batch {batch + 1}")
    print(f"test batch: {sorted(set(data.test_labels.bincount().tolist()))} of each class")


def best_of(folder: str, precision: str) -> script.Classifier:
    """A published network, made fast; with precision "" as it was trained, where that is possible."""
    classifier = script.Classifier(ROOT / "results" / folder / "best.pt", precision=precision)
    script.speed_up_lrn(classifier.model, "auto", classifier.device, classifier.precision)
    return classifier


def encoding_facts(data: script.Dataset, count: int, precision: str) -> Iterator[dict]:
    """The best network on test images that were written as files and read again."""
    classifier = best_of("cifar10-best", precision)
    labels = [data.classes[label] for label in data.test_labels[:count]]
    for name, (side, kind, options) in ENCODINGS.items():
        files = []
        for image in data.test_images[:count]:
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            file = io.BytesIO()
            picture.resize((side, side), Image.Resampling.BICUBIC).save(file, kind, **options)
            files.append(file.getvalue())
        predicted = [next(iter(result)) for result in classifier(files)]
        wrong = sum(one != other for one, other in zip(predicted, labels))
        low, high = script.wilson_interval(100 * wrong / count, count)
        error = f"{100 * wrong / count:.2f} ({low:.2f} to {high:.2f})"
        yield {"stored as": name, "error (%)": error}


def mistakes(folder: str, data: script.Dataset, precision: str) -> tuple[Tensor, Tensor]:
    """Which test images a published network has wrong, and the log probability of its class."""
    classifier = best_of(folder, precision)
    loader = classifier.loader(data.test_images, data.test_labels)
    result = script.evaluate_model(classifier.model, loader, precision=classifier.precision)
    confidence, predicted = result.log_probabilities.max(1)
    return predicted != result.labels, confidence


def label_errors(data: script.Dataset, path: Path, precision: str) -> None:
    """How many mistakes of CIFAR-10's best network are on cleanlab's list of label errors."""
    entries = json.loads(path.read_text())
    candidates = torch.zeros(len(data.test_labels), dtype=torch.bool)
    disputed = candidates.clone()
    for entry in entries:
        candidates[entry["id"]] = True
        disputed[entry["id"]] = entry["mturk"]["given"] < 3  # of five people
    wrong, confidence = mistakes("cifar10-best", data, precision)
    surest = confidence.masked_fill(~wrong, -torch.inf).topk(100).indices
    print(f"label errors: {int(candidates.sum())} candidates, {int(disputed.sum())} disputed")
    print(f"cifar10-best has {int(wrong.sum())} wrong, {int((wrong & candidates).sum())} of them")
    print(f"candidates, {int((wrong & disputed).sum())} disputed; of its 100 surest mistakes")
    print(f"{int(disputed[surest].sum())} are disputed; error without the disputed images:")
    print(f"{100 * wrong[~disputed].double().mean().item():.2f} %")


def known_duplicates(data: script.Dataset, path: Path, precision: str) -> None:
    """The error of CIFAR-100's best network with and without the test images of ciFAIR's list."""
    listed = torch.zeros(len(data.test_labels), dtype=torch.bool)
    for line in path.read_text().splitlines():
        first = line.split(",")[0]
        if first.strip().isdigit():
            listed[int(first)] = True
    wrong, _ = mistakes("cifar100-best", data, precision)
    for name, mask in (("listed", listed), ("the others", ~listed), ("all", listed | ~listed)):
        count = int(mask.sum())
        error = 100 * wrong[mask].double().mean().item()
        low, high = script.wilson_interval(error, count)
        print(
            f"cifar100-best on {name}: {count} images, error {error:.2f} ({low:.2f} to {high:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--images", type=int, default=2000, help="test images to encode")
    parser.add_argument("--precision", default="", help="fp32 or bf16 (default: as trained)")
    parser.add_argument("--cifair", type=Path, help="meta/duplicates_cifar100.csv of cvjena/cifair")
    parser.add_argument("--label-errors", type=Path, help="cifar10_mturk.json of label-errors")
    args = parser.parse_args()
    script.tune_glibc_malloc()
    data_sets = {
        "CIFAR-10": script.read_dataset("cifar10", args.data_dir),
        "CIFAR-100": script.read_dataset("cifar100", args.data_dir),
    }
    batch_facts(data_sets["CIFAR-10"])
    for name, data in data_sets.items():
        gray_facts(name, data)
    if args.label_errors:
        label_errors(data_sets["CIFAR-10"], args.label_errors, args.precision)
    if args.cifair:
        known_duplicates(data_sets["CIFAR-100"], args.cifair, args.precision)
    encoded = encoding_facts(data_sets["CIFAR-10"], args.images, args.precision)
    print(markdown([*encoded]), flush=True)
    rows = []
    for name, data in data_sets.items():
        rows += pair_facts(name, data)
    print(markdown(rows))


if __name__ == "__main__":
    main()
