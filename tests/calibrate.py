"""Give published networks their temperature, and measure on the test set what it is worth.

    python tests/calibrate.py results/cifar10-best/best.pt  # ... or others of calibration.json

Into each best.pt whose run held images out goes the temperature that a run finds today, into that of
results/NAME whose run held none out the one of results/NAME-held-out, which is the same recipe with
`--val-size 5000`. Its weights stay as they are. results/calibration.json gets the measurements, for the
table in results/README.md; those of other files stay.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
import cifar_krizhevsky as script  # noqa: E402

read_dataset = functools.cache(script.read_dataset)


def store_temperature(path: Path, temperature: float, model: torch.nn.Module) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["temperature"] = temperature
    checkpoint["probe"] = script.probe(model).tolist()  # refused by an edited network
    script.save_checkpoint(path, checkpoint)


def measure(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> dict[str, object]:
    """What images say about the probabilities, in percent."""
    before = script.average_views(logits)
    after = script.average_views(logits, temperature)
    center = script.average_views(logits[:1])
    one_view = script.score(center, labels)
    with_mirror = script.score(after, labels)
    return {
        "images": len(labels),
        "error": 100 - one_view.top1,
        "error_with_mirror": 100 - with_mirror.top1,
        "mean_probability_before": 100 * before.exp().amax(1).mean().item(),
        "mean_probability_after": 100 * after.exp().amax(1).mean().item(),
        "calibration_error_one_view": script.calibration_error(center, labels),
        "calibration_error_before": script.calibration_error(before, labels),
        "calibration_error_after": script.calibration_error(after, labels),
    }


def calibrate(path: Path, data_dir: Path) -> dict[str, object]:
    classifier = script.Classifier(path, "cpu", "fp32")
    script.speed_up_lrn(classifier.model, "auto", classifier.device, classifier.precision)
    config = classifier.trained["config"]
    data = read_dataset(config.dataset, data_dir)
    entry = {
        "file": path.resolve().relative_to(RESULTS).as_posix(),
        "precision": classifier.precision,
        "processor": script.describe_hardware(classifier.device, "", False)["processor"],
        "torch_version": str(torch.__version__),
    }

    def logits_of(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loader = classifier.loader(images, labels)
        model, precision, views = classifier.model, classifier.precision, classifier.views
        return script.predict_logits(model, loader, precision=precision, views=views)

    temperature = 1.0
    folder = path.resolve().parent
    with_held_out = folder.with_name(f"{folder.name}-held-out") / "summary.json"
    if config.val_size:
        mask = script.validation_split(data.labels, config.val_size)
        held_out = logits_of(data.images[mask], data.labels[mask])
        temperature = script.find_temperature(*held_out)
        entry["held_out"] = measure(*held_out, temperature)
    elif with_held_out.exists():
        temperature = json.loads(with_held_out.read_text())["temperature"]
        entry["temperature_of"] = with_held_out.parent.name
    if temperature != classifier.temperature:
        store_temperature(path, temperature, script.load_trained(path)[0])
    entry["temperature"] = temperature
    entry["test"] = measure(*logits_of(data.test_images, data.test_labels), temperature)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    args = parser.parse_args()
    script.tune_glibc_malloc()
    published = RESULTS / "calibration.json"
    for path in args.checkpoints:
        entry = calibrate(path, args.data_dir)
        print(json.dumps(entry), flush=True)
        entries = {each["file"]: each for each in json.loads(published.read_text())}
        entries[entry["file"]] = entry
        published.write_text(json.dumps([*entries.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
