#!/usr/bin/env python3
"""Draw results/error-vs-minutes.png: test error against training time, from the files in results/.

    python tests/make_figure.py

Points for the recipes on CIFAR-10, at the minutes of the table: mean and standard deviation over all
seeds, on whatever machine; a green one over those on the GPU where all five ran there too. The four
results that the page of cuda-convnet gave in 2012, joined to ours of the same networks, on as many
views. The default recipe at the speed of the script that is listed in the architecture document,
whose images per second stand beside ours in speed-xeon.json.
"""

import statistics

from make_tables import NETWORKS_OF_2012, RECIPES, RESULTS, fastest, load, minutes_on_two_cores
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(axes: Axes, runs: list[dict], minutes: float, name: str, color: str) -> None:
    """The mean error on one view with its std, on ten below it, and the name."""
    errors = [run["test_error"] for run in runs]
    views = statistics.mean(run["test_error_multi_view"] for run in runs)
    std = statistics.stdev(errors) if len(errors) > 1 else 0
    axes.plot([minutes, minutes], [views, statistics.mean(errors)], color=color, lw=0.8)
    axes.errorbar(minutes, statistics.mean(errors), yerr=std, fmt="o", color=color, capsize=3)
    axes.plot(minutes, views, "o", color=color, mfc="white")
    right = name == "medium"  # or it would cover best
    place = {"textcoords": "offset points", "va": "top", "ha": "right" if right else "left"}
    label = f"{name} (n = {len(runs)})"
    axes.annotate(label, (minutes, views), (4 if right else -4, -6), color=color, **place)


def main() -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for folder in RECIPES:
        if not folder.startswith("cifar10-"):
            continue
        name, runs = folder.removeprefix("cifar10-"), load(f"{folder}/**/summary.json")
        if minutes := fastest(folder, "cpu"):
            draw(axes, runs, minutes, name, "tab:blue")
        if minutes := fastest(folder, "cuda"):
            on_gpu = load(f"{folder}-h100/seed?/summary.json")
            draw(axes, on_gpu or runs, minutes, name, "tab:green")
        if name == "default":
            speeds = load("speed-xeon.json")[0]["results"]["listed"]
            speed = statistics.median(run["images_per_second"] for run in speeds)
            slow = runs[0]["epochs"] * runs[0]["train_images"] / speed / 60
            axes.plot(slow, runs[0]["test_error"], "s", color="tab:gray")
            text = "default at the speed\nof the listed script"
            place = {"textcoords": "offset points", "ha": "right", "color": "dimgray"}
            axes.annotate(text, (slow, runs[0]["test_error"]), (8, 8), **place)
    for name, (_, error, views, minutes) in NETWORKS_OF_2012.items():
        then = float(minutes)
        filling = "tab:red" if views == 1 else "white"
        axes.plot(then, error, "^", color="tab:red", mfc=filling)
        runs = load(f"cifar10-{name}/**/summary.json")
        if runs:
            key = "test_error" if views == 1 else "test_error_multi_view"
            errors = [run[key] for run in runs]
            ours = statistics.mean(errors)
            std = statistics.stdev(errors) if len(errors) > 1 else 0
            now = minutes_on_two_cores(name)
            axes.plot([then, now], [error, ours], color="tab:red", lw=0.8)
            axes.errorbar(now, ours, yerr=std, fmt="o", color="tab:red", mfc=filling, capsize=3)
        place = {"textcoords": "offset points", "color": "tab:red"}
        ours = f", ours n = {len(runs)}" if runs else ""
        axes.annotate(f"{name} ({error} %{ours})", (then, error), (-4, 6), **place)
    axes.plot([], [], "o", color="tab:blue", label="this script on two CPU cores")
    axes.plot([], [], "o", color="tab:green", label="this script on an NVIDIA H100")
    axes.plot([], [], "o", color="black", mfc="white", label="hollow: on ten views")
    axes.plot([], [], "^", color="tab:red", label="his networks on one GPU, 2012")
    axes.plot([], [], "o", color="tab:red", label="his networks, this script, two CPU cores")
    axes.legend(frameon=False)
    axes.set(xlabel="minutes of training", ylabel="test error on CIFAR-10 (%)", xscale="log")
    axes.set_xticks(ticks := [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "error-vs-minutes.png", dpi=150)


if __name__ == "__main__":
    main()
