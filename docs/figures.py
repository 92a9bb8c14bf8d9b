"""Pictures of the README that no run leaves: python -m docs.figures [--data-dir data]

    img/augmented.png     an epoch's augmentation step by step, then two more (of CIFAR-10)
    img/experiment.png    schedules against epochs, from experiments.jsonl
    img/rates.png         LRMAX, with and without the rise, and against weight decay, from the same
    img/budget.png        accuracy against epochs, short runs and full size, from the same
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data import (FLIP, INDEX, LEFT, PAD, SIZE, TOP, augment, draw_epoch, load, normalisation,
                  plain_draws)
from docs.experiments import MAP_RATES, read
from docs.tables import BUDGETS, DECAYS, NAMES, SETS, best_rows, map_cell, pick

IMG = Path(__file__).parent.parent / "img"


def new_figure(width, height):
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def augmented(data, images=5):
    """A row an image: the first epoch step by step, then two more epochs."""
    titles = ("stored", "padded by 4", "cropped", "flipped\n(or not)", "cut out:\nepoch 1",
              "epoch 2", "epoch 3")
    epochs = [draw_epoch(images, 0, epoch) for epoch in range(3)]              # (images, 6) each
    epochs = [draws[draws[:, INDEX].argsort()] for draws in epochs]
    stages = [plain_draws(images) for _ in range(3)]
    for stage, columns in enumerate(([], [TOP, LEFT], [TOP, LEFT, FLIP])):
        stages[stage][:, columns] = epochs[0][:, columns]
    mean, inverse_std = normalisation(data.train_images)
    values = augment(data.train_images, torch.cat([*stages, *epochs]), mean, inverse_std,
                     torch.float32)
    values = values.permute(0, 2, 3, 1) / inverse_std + mean                   # 0 .. 255 again
    columns = [*values.round().byte().view(6, images, SIZE, SIZE, 3).numpy()]
    columns.insert(1, np.pad(columns[0], ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), "reflect"))
    figure = new_figure(len(titles), images * 1.02 + 0.3)
    axes = figure.subplots(images, len(titles))
    for row, column in np.ndindex(axes.shape):
        axes[row, column].imshow(columns[column][row])
        axes[row, column].set_axis_off()
        axes[0, column].set_title(titles[column], fontsize=9)
    return figure


def experiment(rows):
    """Accuracy against epochs at full size: raw weights on the left, averaged on the right."""
    arms = [("sgd", "one cycle", "tab:blue", "-"), ("sgd", "annihilated", "tab:green", "-"),
            ("sgd", "constant", "tab:red", "-"), ("sgd", "steps", "tab:orange", "-"),
            ("sgd-48", "steps", "tab:orange", "--"), ("sgd-120", "steps", "tab:orange", ":")]
    figure = new_figure(9, 4.6)
    panels = figure.subplots(1, 2)
    for ax, key, title, span in zip(panels, (1, 2), ("raw weights", "averaged weights"), (20, 5)):
        for part, name, colour, style in arms:
            same = pick(rows, part, schedule=name)
            by_epoch = [{entry[0]: 100 * entry[key] for entry in row["history"]} for row in same]
            x = sorted(set.intersection(*map(set, by_epoch)))
            curves = np.array([[reached[epoch] for epoch in x] for reached in by_epoch])
            ax.plot(x, curves.mean(0), style, color=colour, marker="o", markevery=[-1],
                    label=f"{NAMES[name]}, {x[-1]} epochs (n = {len(same)})")
            ax.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.15, linewidth=0)
        top, ticks = ax.get_ylim()[1], (4, 8, 12, 16, 24, 48, 120)
        ax.set(xlabel="epoch", title=title, xscale="log", xlim=(4, 132), ylim=(top - span, top))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="accuracy on the test set in %")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize="small", handlelength=4)
    figure.suptitle("SGD; shaded from the lowest run to the highest", fontsize="medium")
    return figure


def rates(rows):
    """Short runs of many LRMAX: with and without the rise on the left, with decays on the right."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for part, name, colour in (("map", "with the rise", "tab:blue"),
                               ("map no rise", "straight fall to LRMIN", "tab:orange")):
        for key, style in (("averaged", "-"), ("raw", "--")):
            found = {lr: [100 * row[key] for row in pick(rows, part, 32, 12500, lr=lr)]
                     for lr in MAP_RATES}
            x = [lr for lr in found if found[lr]]
            left.plot(x, [np.mean(found[lr]) for lr in x], style, color=colour, marker=".",
                      label=f"{name}, {key} weights")
            left.fill_between(x, [min(found[lr]) for lr in x], [max(found[lr]) for lr in x],
                              color=colour, alpha=0.15, linewidth=0)
    fall = best_rows(rows, "linear", 12)
    arm = fall[0]["arm"]
    left.plot(arm["lr"], 100 * np.mean([row["averaged"] for row in fall]), "*", color="tab:green",
              markersize=11, label=f"straight fall to zero, weight decay {arm['weight_decay']}")
    left.set(xscale="log", xlabel="LRMAX", ylabel="accuracy on the test set in %",
             title="What the rise buys (SGD, short runs; shaded: lowest to highest)")
    left.set_xticks(MAP_RATES, MAP_RATES)
    left.minorticks_off()
    left.legend(fontsize="small", frameon=False)
    grid = np.array([[np.mean([100 * row["averaged"] for row in map_cell(rows, decay, lr)
                               if row["seed"] == 0]) for lr in MAP_RATES]
                     for decay in DECAYS])                                         # (3, 6)
    right.imshow(grid, aspect="auto", origin="lower", cmap="viridis", vmin=np.nanmax(grid) - 8)
    for (y, x), value in np.ndenumerate(grid):
        right.text(x, y, f"{value:.1f}", ha="center", va="center",
                   color="white" if value < np.nanmax(grid) - 4 else "black")
    right.set_xticks(range(len(MAP_RATES)), MAP_RATES)
    right.set_yticks(range(len(DECAYS)), DECAYS)
    right.set(xlabel="LRMAX", ylabel="weight decay", title="with the rise, averaged (seed 0)")
    return figure


# cifar10-fast's notebook bag_of_tricks: the last experiment's logs, means of five runs.
PAGE = {24: 93.92, 40: 94.71, 60: 95.15, 80: 95.20, 100: 95.30}
PAGES_LAST = {24: 94.68, 40: 95.39, 60: 95.53, 80: 95.72, 100: 95.78}


def leads(rows, schedule, images):
    """How far the cycle is ahead of a schedule in 12 epochs, in points, a seed a value."""
    cycle, other = ({row["seed"]: 100 * row["averaged"] for row in best_rows(rows, *arm)}
                    for arm in (("one cycle", 12, images), (schedule, 12, images)))
    return [cycle[seed] - other[seed] for seed in cycle.keys() & other.keys()]


def budget(rows):
    """Accuracy against epochs: short runs on the left, full size and Page's runs on the right.

    Between them the cycle's lead against the number of images.
    """
    figure = new_figure(12, 3.6)
    left, middle, right = figure.subplots(1, 3)
    for schedule, colour in (("one cycle", "tab:blue"), ("linear", "tab:green")):
        for key, style in (("averaged", "-"), ("raw", "--")):
            found = {epochs: [100 * row[key] for row in best_rows(rows, schedule, epochs)]
                     for epochs in BUDGETS}
            x = [epochs for epochs in BUDGETS if found[epochs]]
            left.plot(x, [np.mean(found[n]) for n in x], style, color=colour, marker=".",
                      label=f"{NAMES[schedule]}, {key}")
    for schedule, colour in (("steps", "tab:orange"), ("linear", "tab:green")):
        points = [leads(rows, schedule, images) for images in SETS]
        middle.errorbar(SETS, [np.mean(lead) for lead in points],
                        [np.std(lead, ddof=1) / len(lead) ** 0.5 for lead in points], marker=".",
                        color=colour, capsize=3, label=f"over {NAMES[schedule]}")
    middle.axhline(0, color="grey", linewidth=0.8)
    right.plot(PAGE.keys(), PAGE.values(), "-", marker=".", color="tab:green",
               label="Page's, stronger cutout (n = 5)")
    right.plot(PAGES_LAST.keys(), PAGES_LAST.values(), ":", marker=".", color="tab:green",
               label="Page's last recipe, other first layer")
    steps = {n: 100 * np.mean([row["averaged"] for row in pick(rows, part, schedule="steps")])
             for part, n in (("sgd", 24), ("sgd-48", 48), ("sgd-120", 120))}
    right.plot(steps.keys(), steps.values(), marker=".", color="tab:orange", label="step decay")
    for same, name, marker in (
            (pick(rows, "sgd", schedule="one cycle"), "one cycle, SGD, averaged", "o"),
            (pick(rows, "headline"), "one cycle, Muon, averaged", "*")):
        right.plot(24, 100 * np.mean([row["averaged"] for row in same]), marker, color="tab:blue",
                   markersize=9, label=name)
    for ax, ticks, x, title in (
            (left, BUDGETS, "epochs", "short runs, SGD (n = 3)"),
            (middle, SETS, "images", "the cycle's lead in 12 epochs (n = 3)"),
            (right, (24, 48, 100), "epochs", "full size")):
        ax.set(xscale="log", xlabel=x, title=title)
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(axis="y", alpha=0.3)
        ax.legend(fontsize="small", frameon=False)
    left.set(ylabel="accuracy on the test set in %")
    middle.set(ylabel="lead ± standard error, in points")
    right.set(ylim=(92, None))                           # room for the legend
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    augmented(load("cifar10", args.data_dir)).savefig(IMG / "augmented.png", dpi=100)
    experiment(read()).savefig(IMG / "experiment.png", dpi=100)
    rates(read()).savefig(IMG / "rates.png", dpi=100)
    budget(read()).savefig(IMG / "budget.png", dpi=100)


if __name__ == "__main__":
    main()
