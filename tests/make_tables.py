#!/usr/bin/env python3
"""Write the tables of README.md and of the pages in results/, from `<!-- table: NAME -->` to `<!-- end -->`; see TABLES.

python tests/make_tables.py            # from the files in results/
python tests/make_tables.py --check    # writes nothing, exits with 1 if a page is not up to date
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmark import markdown, median_and_range, network_rows, paired_rows, speed_rows

RESULTS = Path(__file__).resolve().parent.parent / "results"
PAGES = [RESULTS.parent / "README.md", *sorted(RESULTS.glob("**/*.md"))]
PROGRAM = "python cifar_krizhevsky.py"
RECIPES = {  # the folder of a published run, and the command that makes it with today's script
    "cifar10-quick": "python cifar_krizhevsky.py --recipe quick",
    "cifar10-short": "python cifar_krizhevsky.py --recipe short",
    "cifar10-medium": "python cifar_krizhevsky.py --recipe medium",
    "cifar10-default": "python cifar_krizhevsky.py",
    "cifar10-best": "python cifar_krizhevsky.py --recipe best",
    "cifar100-short": "python cifar_krizhevsky.py --dataset cifar100 --recipe short",
    "cifar100-default": "python cifar_krizhevsky.py --dataset cifar100",
    "cifar100-best": "python cifar_krizhevsky.py --dataset cifar100 --recipe best",
}
NETWORKS_OF_2012 = {  # epochs; error, views and minutes on one GPU, as his page listed them
    "80sec": (10, 26, 1, "1.3"),
    "18pct": (140, 18, 1, "20"),
    "13pct": (140, 13, 10, "25"),
    "11pct": (450, 11, 10, "75"),
}
PAIRS_OF_2012 = [  # his network without and with its LRN
    ("ablation-11pct-10-none", "ablation-11pct-10"),
    ("ablation-11pct-140-none", "ablation-11pct-140"),
]
EARLIER = {"cifar10-quick-64", "cifar10-short-128"}  # recipes as they were
ALONE = {  # the runs that had the machine to themselves
    "cifar10-quick/seed0", "cifar10-short/seed4", "cifar10-medium-cpu", "cifar100-short-cpu",
    "cifar10-short-h100", "cifar10-best/seed1", "cifar10-mini", "cifar10-mini-128", "cifar10-80sec-cpu",
    "cifar10-10-epochs", "cifar100-10-epochs", "cifar10-quick-64/seed0", "cifar10-quick-64/seed1",
    "cifar10-quick-64/seed2", "cifar10-quick-64/seed3", "cifar10-quick-64/seed4",
}  # fmt: skip
MACHINES = {"AMD EPYC": "EPYC", "Intel(R) Xeon(R) Processor": "Xeon"}
MACHINES |= {"NVIDIA H100 80GB HBM3": "H100"}
STUDENT_T = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
}  # two-sided 95 %, of n differences


def load(pattern: str) -> list[dict]:
    return [json.loads(p.read_text()) | {"path": p} for p in sorted(RESULTS.glob(pattern))]


def percent(*values: float | None) -> str:
    std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return "–" if values == (None,) else f"{statistics.mean(values):.2f}{std}"


def name_of(run: dict) -> str:
    """The folder of a run, from results/ on."""
    return str(run["path"].parent.relative_to(RESULTS))


def machine(run: dict) -> str:
    name = MACHINES.get(run["processor"], run["processor"])
    if run["device_used"] == "cuda":
        return name
    return f"{name}, {run['threads']} thread{'s' if run['threads'] > 1 else ''}"


def alone(run: dict) -> str:
    return "yes" if name_of(run) in ALONE else "no"


def error_from(accuracy: float | None) -> float | None:
    return None if accuracy is None else 100 - accuracy


def is_one_view(run: dict) -> bool:
    """Whether it was trained on the images as they are, so that its test has no other view."""
    return run.get("test_views") == 1


def interval(run: dict, key: str) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(run[key], *run[f"{key}_interval"])


def beside(run: dict, name: str, pattern: str) -> list[str]:
    path = run["path"].with_name(name)
    return re.findall(pattern, path.read_text(), re.MULTILINE) if path.exists() else ["–"]


def constants_for_lrn(run: dict) -> str:
    """Validation errors with LRN and with a constant in its place."""
    accuracies = beside(run, "denominators.txt", r"^(?:none|all) +([\d.]+) %$")
    if accuracies == ["–"]:
        return "–"
    return " → ".join(percent(100 - float(accuracy)) for accuracy in accuracies)


LRN = "n = {lrn_size}, α = {lrn_alpha}, k = {lrn_k:g}"
LARGEST = r"^norm.* ([\d.]+)$"  # in denominators.txt
TRAINING = r"^(?:\d.*?,){3}(.*?),"  # the accuracy, in metrics.csv
COLUMNS = {  # of the tables with a row for each run, besides the keys of summary.json
    "folder": lambda run: f"`{name_of(run)}`",
    "run": lambda run: f"[`{name_of(run)}`]({name_of(run)}/summary.json)",
    "file": lambda run: f"[`{run['path'].name}`]({run['path'].name})",
    "LRN": lambda run: LRN.format(**run) if run["norm"] == "lrn" else "none",
    "largest d / k": lambda run: ", ".join(beside(run, "denominators.txt", LARGEST)),
    "LRN → constants": constants_for_lrn,
    "training": lambda run: percent(100 - float(beside(run, "metrics.csv", TRAINING)[-1])),
    "best epoch": lambda run: run["best_epoch"],
    "validation": lambda run: percent(error_from(run["best_val_accuracy"])),
    "last validation": lambda run: percent(error_from(run["last_val_accuracy"])),
    "one view": lambda run: interval(run, "test_error"),
    "ten views": lambda run: "–" if is_one_view(run) else interval(run, "test_error_multi_view"),
    "last epoch": lambda run: percent(run["last_test_error"]),
    "minutes": lambda run: f"{run['training_seconds'] / 60:.3g}",
    "machine": machine,
    "PyTorch": lambda run: run["torch_version"].split("+")[0],
    "alone": alone,
    "command": lambda run: f"`{run['command']}`",
}


def summaries(pattern: str, columns: str) -> Iterator[dict]:
    for run in load(pattern):
        yield {c: COLUMNS[c](run) if c in COLUMNS else run[c] for c in columns.split(", ")}


def fastest(folder: str, device: str) -> float | None:
    """Minutes of training on a device, of the fastest run of a recipe that had the machine to itself."""
    patterns = (f"{folder}/**", f"{folder}-cpu", f"{folder}-h100")
    runs = [run for pattern in patterns for run in load(f"{pattern}/summary.json")]
    minutes = []
    for run in runs:
        if name_of(run) in ALONE and run["device_used"] == device:
            minutes.append(run["training_seconds"] / 60)
    return min(minutes, default=None)


def minutes_on_two_cores(name: str) -> float:
    """Minutes of training a network of 2012: of a run, else by the images/s of a benchmark."""
    (measured,) = load("speed-of-2012.json")
    rates = [run["images_per_second"] for run in measured["results"][name]]
    epochs, *_ = NETWORKS_OF_2012[name]
    at_this_speed = epochs * 50_000 / statistics.median(rates) / 60
    return fastest(f"cifar10-{name}", "cpu") or at_this_speed


def minutes_of(folder: str, device: str) -> str:
    minutes = fastest(folder, device)
    return "–" if minutes is None else f"{minutes:.3g}"


def every_run() -> Iterator[dict]:
    runs = load("*/summary.json") + load("*/seed?/summary.json")
    for run in sorted(runs, key=name_of):
        yield {column: COLUMNS[column](run) for column in EVERY.split(", ")}


def span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def provenance(runs: list[dict]) -> dict[str, str]:
    """The cells for minutes, machine, PyTorch and alone, with `;` between machines."""
    groups: dict[tuple, list[float]] = {}
    for run in runs:
        where = (machine(run), COLUMNS["PyTorch"](run), alone(run))
        groups.setdefault(where, []).append(run["training_seconds"] / 60)
    row = {"minutes": "; ".join(span(minutes) for minutes in groups.values())}
    for column, values in zip(("machine", "PyTorch", "alone"), zip(*groups)):
        row[column] = values[0] if len({*values}) == 1 else "; ".join(values)
    return row


def folder_row(folder: str) -> dict:
    """A row for all runs of a folder. A run without and with a seed's name counts once."""
    runs = load(f"{folder}/summary.json") + load(f"{folder}/seed?/summary.json")
    by_seed = list({run["seed"]: run for run in runs}.values())
    columns = {
        "error": [run["test_error"] for run in by_seed],
        "ten views": [
            None if is_one_view(run) else run["test_error_multi_view"] for run in by_seed
        ],
        "validation": [error_from(run["best_val_accuracy"]) for run in by_seed],
    }
    link = runs[0]["path"].relative_to(RESULTS)
    row = {"folder": f"[`{folder}`]({link})", "epochs": runs[0]["epochs"], "n": len(by_seed)}
    for column, values in columns.items():
        row[column] = "–" if None in values else percent(*values)
    return row | provenance(runs)


def published() -> Iterator[dict]:
    yield from map(folder_row, RECIPES)


def of_2012() -> Iterator[dict]:
    for name, (_, error, views, _) in NETWORKS_OF_2012.items():
        folder = f"cifar10-{name}"
        if (RESULTS / folder).exists():
            his = f"{error}, on {'one view' if views == 1 else f'{views} views'}"
            yield {"his error": his, **folder_row(folder)}


def other_runs() -> Iterator[dict]:
    shown = {*RECIPES, *(f"cifar10-{name}" for name in NETWORKS_OF_2012), *sum(PAIRS_OF_2012, ())}
    folders = {name_of(run).split("/")[0] for run in load("*/**/summary.json")}
    for folder in sorted(folders - shown):
        row = folder_row(folder)
        for column in ("minutes", "machine", "PyTorch", "alone"):
            del row[column]  # they are in seeds.md
        yield row


def flags_of(command: str) -> str:
    return f"`{command.removeprefix(PROGRAM).strip()}`" if command != PROGRAM else "(the default)"


def recipes() -> Iterator[dict]:
    for folder, command in RECIPES.items():
        runs = load(f"{folder}/**/summary.json")
        yield {
            f"`{PROGRAM}`": flags_of(command),
            "epochs": runs[0]["epochs"],
            "error (%)": percent(*(run["test_error"] for run in runs)),
            "ten views (%)": percent(*(run["test_error_multi_view"] for run in runs)),
            "n": len(runs),
            "minutes, CPU": minutes_of(folder, "cpu"),
            "minutes, H100": minutes_of(folder, "cuda"),
        }


def networks_of_2012() -> Iterator[dict]:
    for name, (epochs, error, views, minutes) in NETWORKS_OF_2012.items():
        runs = load(f"cifar10-{name}/**/summary.json")
        key = "test_error" if views == 1 else "test_error_multi_view"
        yield {
            f"`{PROGRAM}`": f"`--recipe {name}`",
            "epochs": epochs,
            "views": views,
            "his error (%)": error,
            "ours (%)": percent(*(run[key] for run in runs)) if runs else "–",
            "n": len(runs),
            "minutes then, one GPU": minutes,
            "minutes now, two CPU cores": f"{minutes_on_two_cores(name):.3g}",
        }


def paired_difference(ours: list[float], others: list[float]) -> str:
    """The mean of the differences, and its 95 % interval by Student's t."""
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    mean, n = statistics.mean(differences), len(differences)
    if n == 1:
        return f"{mean:+.2f}"
    half = STUDENT_T[n] * statistics.stdev(differences) / n**0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def ablation_by_seeds() -> Iterator[dict]:
    folders = ("ablation-short-none", "ablation-short-document", "cifar10-short")
    without, *_ = groups = [load(f"{name}/seed?/summary.json") for name in folders]
    for name, runs in zip(folders, groups):
        row = {"folder": f"`{name}`", "LRN": COLUMNS["LRN"](runs[0]), "n": len(runs)}
        for views, key in (("one view", "test_error"), ("ten views", "test_error_multi_view")):
            errors, others = ([run[key] for run in each] for each in (runs, without))
            row[f"error, {views}"] = percent(*errors)
            row[f"{views}, minus without"] = (
                paired_difference(errors, others) if runs is not without else "–"
            )
        yield row


def ablation_of_2012() -> Iterator[dict]:
    for pair in PAIRS_OF_2012:
        without, _ = groups = [load(f"{name}/seed?/summary.json") for name in pair]
        for name, runs in zip(pair, groups):
            row = folder_row(name)
            row = {column: row[column] for column in ("folder", "epochs", "n")}
            for views, key in (("one view", "test_error"), ("ten views", "test_error_multi_view")):
                errors, others = ([run[key] for run in each] for each in (runs, without))
                row[views] = percent(*errors)
                row[f"{views}, minus without"] = (
                    "–" if runs is without else paired_difference(errors, others)
                )
            yield row


def comparison() -> Iterator[dict]:
    names = ("error", "its error", "only ours right", "only the other right", "McNemar's p")
    for path in sorted(RESULTS.glob("*/against-*.txt")):
        for line in path.read_text().splitlines()[:2]:
            numbers = re.findall(r" (\d[\d.e-]*)", line[12:])
            row = {"folder": f"`{path.parent.name}`", "compared with": path.stem[8:]}
            yield row | {"views": line[:12]} | dict(zip(names, numbers))


def precision() -> Iterator[dict]:
    for name in ("bf16", "fp32"):
        row = {"validation error": f"`--precision {name}`"}
        for flag, kernels in (("auto", "compiled"), ("off", "eager")):
            runs = load(f"precision/{name}-{kernels}/*.json")
            errors = [100 - run["best_val_accuracy"] for run in runs]
            row[f"`--compile {flag}`"] = percent(*errors)
        yield row


def calibration() -> Iterator[dict]:
    for entry in json.loads((RESULTS / "calibration.json").read_text()):
        if Path(entry["file"]).parts[0] in EARLIER:
            continue
        test = entry["test"]
        held_out = entry.get("held_out", {})
        temperature = f"{entry['temperature']:.3f}"
        if not held_out and "temperature_of" not in entry:
            temperature = "1 (none held out)"
        yield {
            "folder": f"`{Path(entry['file']).parent}`",
            "held-out error": percent(held_out.get("error")),
            "with mirror": percent(held_out.get("error_with_mirror")),
            "test error": percent(test["error"]),
            "test, with mirror": percent(test["error_with_mirror"]),
            "T": temperature,
            "ECE, one view": percent(test["calibration_error_one_view"]),
            "ECE, T = 1": percent(test["calibration_error_before"]),
            "ECE": percent(test["calibration_error_after"]),
        }


def few_pictures() -> Iterator[dict]:
    """CIFAR-10 with few pictures of a class, from scratch and from CIFAR-100's best network."""
    runs = json.loads((RESULTS / "few-pictures.json").read_text())["runs"]
    for per_class in sorted({run["per_class"] for run in runs}):
        errors = {}
        for init in (False, True):
            of_kind = [r for r in runs if r["per_class"] == per_class and r["init"] == init]
            errors[init] = [run["test_error"] for run in sorted(of_kind, key=lambda r: r["seed"])]
        n = min(map(len, errors.values()))  # a stopped script has left one without the other
        scratch, trained = errors[False][:n], errors[True][:n]
        yield {
            "pictures of a class": per_class,
            "n": n,
            "error, from scratch": percent(*scratch),
            "error, `--init-from`": percent(*trained),
            "difference": paired_difference(trained, scratch) if n > 1 else "–",
        }


def speed_h100(sessions: tuple[int, ...] = (1, 2, 3)) -> Iterator[dict]:
    for each in load("speed-h100.json")[0]["results"]:
        if each["session"] not in sessions:
            continue
        has_lrn = each["model"] not in ("five-conv", "compact") and each["norm"] == "lrn"
        flags = [each["model"], *(["--norm none"] if each["norm"] == "none" else [])]
        flags += ["--deterministic"] if "deterministic" in each else []
        row = {"`--model`": f"`{' '.join(flags)}`", "batch size": each["batch_size"]}
        row["precision"] = each["precision"]
        row["LRN"] = ("compiled" if each["compiled"] else "eager") if has_lrn else "–"
        row["CUDA graphs"] = "yes" if each["cuda_graphs"] else "no"
        row["besides"] = each.get("note", "")
        rates = [each["batch_size"] / seconds for seconds in each["seconds_per_step"]]
        yield row | {"images/s": median_and_range(rates, ",.0f"), "n": len(rates)}


ABLATION = "folder, inputs, LRN, largest d / k, LRN → constants, training, validation"
SEARCH = "file, epochs, validation, last validation, minutes, machine, PyTorch, command"
SHORT_SEARCH = "file, epochs, batch_size, lr, weight_decay, label_smoothing, gamma, milestones, LRN"
AFTER = "validation, last validation, machine, PyTorch"
EVERY = "run, best epoch, validation, one view, ten views, last epoch"
EVERY += ", minutes, machine, PyTorch, alone"
TABLES = {
    "recipes": recipes,
    "networks-of-2012": networks_of_2012,
    "runs": published,
    "runs-of-2012": of_2012,
    "comparison": comparison,
    "ablation-of-2012": ablation_of_2012,
    "ablation-by-seeds": ablation_by_seeds,
    "ablation": lambda: summaries("ablation-*/summary.json", f"{ABLATION}, one view, ten views"),
    "other-runs": other_runs,
    "every-run": every_run,
    "search": lambda: summaries("search/[!qms]*.json", SEARCH),
    "search-quick": lambda: summaries("search/[qms]*.json", f"{SHORT_SEARCH}, {AFTER}"),
    "precision": precision,
    "calibration": calibration,
    "few-pictures": few_pictures,
    "speed": lambda: speed_rows(load("speed.json")[0]["results"]),
    "speed-xeon": lambda: speed_rows(load("speed-xeon.json")[0]["results"]),
    "speed-h100": speed_h100,
    "speed-h100-interleaved": lambda: speed_h100((3,)),
    "speed-of-2012": lambda: paired_rows(
        load("speed-of-2012.json")[0]["results"], "80sec-plain", "× plain loop"
    ),
    "speed-frameworks": lambda: paired_rows(
        load("speed-frameworks.json")[0]["results"], "default", "× this script"
    ),
    "networks": lambda: network_rows(load("networks.json")[0]["results"]),
    "lrn": lambda: load("lrn.json")[0]["rows"],
}


def fill(page: str) -> str:
    """The text of a page with its tables made anew."""
    marked = r"(<!-- table: (\S+) -->\n)(?s:.*?)(?=<!-- end -->)"
    return re.sub(marked, lambda found: found[1] + markdown([*TABLES[found[2]]()]), page)


def main(argv: list[str]) -> int:
    stale = [page for page in PAGES if fill(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page} is not up to date")
        if "--check" not in argv:
            page.write_text(fill(page.read_text()))
    return int("--check" in argv and stale != [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
