#!/usr/bin/env python3
"""Draw results/error-vs-minutes.png: test error against training time, from the files in results/.

    python tests/make_figure.py

A point for each recipe on CIFAR-10, mean and standard deviation over its seeds; the default recipe at
the speed of the script that is listed in the architecture document, whose images per second stand
beside ours in speed.json; and the four results that the page of cuda-convnet gave in 2012.
"""

import statistics

from make_tables import RECIPES, RESULTS, load, mean_minutes
from matplotlib.figure import Figure

# https://code.google.com/archive/p/cuda-convnet: minutes on one GPU, test error in percent
CUDA_CONVNET = [(80 / 60, 26), (20, 18), (25, 13), (75, 11)]


def main() -> None:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for folder in RECIPES:
        runs = load(f"{folder}/**/summary.json")
        if not folder.startswith("cifar10-") or not runs:
            continue
        minutes = mean_minutes(runs)
        errors = [run["test_error"] for run in runs]
        views = statistics.mean(run["test_error_multi_view"] for run in runs)
        std = statistics.stdev(errors) if len(errors) > 1 else 0
        error = statistics.mean(errors)
        axes.plot([minutes, minutes], [views, error], color="tab:blue", lw=0.8)
        axes.errorbar(minutes, error, yerr=std, fmt="o", color="tab:blue", capsize=3)
        axes.plot(minutes, views, "o", color="tab:blue", mfc="white")
        name = f"{folder.removeprefix('cifar10-')} (n = {len(runs)})"
        place = {"textcoords": "offset points", "va": "top", "color": "tab:blue"}
        axes.annotate(name, (minutes, views), (-4, -6), **place)
        if folder == "cifar10-default":
            speeds = load("speed.json")[0]["results"]["listed"]
            speed = statistics.median(run["images_per_second"] for run in speeds)
            slow = runs[0]["epochs"] * runs[0]["train_images"] / speed / 60
            axes.plot(slow, error, "s", color="tab:gray")
            text = "default at the speed\nof the listed script"
            place |= {"ha": "right", "va": "bottom", "color": "dimgray"}
            axes.annotate(text, (slow, error), (8, 8), **place)
    axes.plot(*zip(*CUDA_CONVNET), "^", color="tab:red")
    for minutes, error in CUDA_CONVNET:
        place = {"textcoords": "offset points", "color": "tab:red"}
        axes.annotate(f"{error} %", (minutes, error), (7, -3), **place)
    axes.plot([], [], "o", color="tab:blue", label="this script on two CPU cores, one view")
    axes.plot([], [], "o", color="tab:blue", mfc="white", label="the same networks, ten views")
    axes.plot([], [], "^", color="tab:red", label="cuda-convnet on one GPU, 2012")
    axes.legend(frameon=False)
    axes.set(xlabel="minutes of training", ylabel="test error on CIFAR-10 (%)", xscale="log")
    axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "error-vs-minutes.png", dpi=150)


if __name__ == "__main__":
    main()
