"""The experiments behind the README's claims: every arm is one line, every result one line more.

    python -m docs.experiments PART ... [--seconds S] [--together G] [--compile] [--width W]
    python -m docs.experiments collect RUNS     adds what `train.py --runs N --out RUNS` left
    python -m docs.experiments draw [--width W] [--images N]
                                                tables of all results, and experiment.png of these

Parts, each on CIFAR-10, trained on 40,000 images with 10,000 held out, unless *test set* stands:

    sgd, muon       one cycle, annihilated, constant rate, step decay (test set)
    sgd-N, muon-N   step decay in N epochs, as sgd-48 (test set)
    rates           four rates for constant and step decay, of which those take the best
    range           LRMAX x 1/4 .. 4, and LRMIN = LRMAX / 3 and / 30
    recipe          one constant changed at a time

Each run ends with four accuracies: that of raw weights with the running statistics of batch
normalisation, that of averaged weights with an average of these, and both with measured ones. It
becomes a line of experiments.jsonl. All arms run with one seed, then with the next, until the time
is over.
--together trains so many runs at once on one GPU, whose small kernels leave room for each other,
and --compile compiles the network. With both, three together, an H100 takes 3.9 ms for a step of
each run, in place of 6.0.
"""
import argparse
import copy
import json
import math
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from data import FLIP, INDEX, Loader, draw_epoch, load
from model import MOMENTUM, WEIGHT_DECAY, Muon, make_model, make_scaler, pick_device, precision
from onecycle import one_cycle
from train import (AVERAGE_DECAY, PEAK, accuracy, make_step, measure_statistics,
                   reuse_freed_memory, update_average)

RESULTS = Path(__file__).with_name("experiments.jsonl")
ON_TEST_SET = "headline", "sgd", "muon", "rise", "map", "map no rise"
LR = {"muon": 0.1, "sgd": 0.2}           # about what the range test finds for each
ARM = {"optimizer": "muon", "schedule": "one cycle", "lr": None, "ratio": 10, "epochs": 24,
       "smoothing": 0.0, "sharpness": 1.0, "decay": AVERAGE_DECAY, "momentum": None,
       "weight_decay": WEIGHT_DECAY, "flip": "alternating"}


def arms_of(part):
    """The arms of a part: dictionaries of what differs from ARM."""
    if part in ("sgd", "muon"):
        return [{"optimizer": part, "schedule": schedule}
                for schedule in ("one cycle", "annihilated", "constant", "steps")]
    optimizer, _, epochs = part.partition("-")
    if optimizer in LR and epochs.isdigit():
        return [{"optimizer": optimizer, "schedule": "steps", "epochs": int(epochs)}]
    if part == "rates":
        return [{"optimizer": o, "schedule": s, "lr": LR[o] * f} for o in ("muon", "sgd")
                for s in ("constant", "steps")
                for f in ((1 / 8, 1 / 4, 1 / 2, 1) if s == "constant" else (1 / 4, 1 / 2, 1, 2))]
    if part == "range":
        return ([{"optimizer": o, "lr": LR[o] * f} for f in (1, 2, 1 / 2, 4, 1 / 4)
                 for o in ("muon", "sgd")] + [{"ratio": 3}, {"ratio": 30}])
    if part == "recipe":
        return [{}, {"smoothing": 0.1}, {"smoothing": 0.2}, {"decay": 0.995}, {"sharpness": 2.0},
                {"sharpness": 8.0}, {"flip": "coin"}, {"momentum": 0.9}, {"weight_decay": 0.0}]
    if part == "rise":
        return [{"optimizer": "sgd", "schedule": s, "lr": lr} for lr in (0.2, 0.4, 0.1)
                for s in ("one cycle", "no rise", "annihilated", "linear")]
    if part == "map":
        return [{"optimizer": "sgd", "epochs": 12, "lr": lr, "weight_decay": decay}
                for decay in (1e-3, 2.5e-4, 4e-3) for lr in (0.2, 0.8, 0.05, 0.4, 0.1, 1.6)]
    if part == "map no rise":
        return [{"optimizer": "sgd", "epochs": 12, "lr": lr, "schedule": "no rise"}
                for lr in (0.2, 0.8, 0.05, 0.4, 0.1, 1.6)]
    raise SystemExit(f"there is no part {part}: see -h")


def best_rate(path, optimizer, schedule, width):
    """The best rate that part `rates` tried; if it tried none, LR, halved for a constant rate.

    That is what was best for SGD at full size.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    tried = {}
    for row in rows:
        if (row["part"], row["arm"].get("optimizer"), row["arm"].get("schedule"),
                row["width"]) == ("rates", optimizer, schedule, width):
            tried.setdefault(row["lr"], []).append(max(row["raw"], row["averaged"]))
    if tried:
        return max(tried, key=lambda lr: statistics.mean(tried[lr]))
    return LR[optimizer] / 2 if schedule == "constant" else LR[optimizer]


def rate(arm, step, total):
    """The learning rate of a step."""
    lr, schedule = arm["lr"], arm["schedule"]
    if schedule == "constant":
        return lr
    if schedule == "no rise":
        return lr - (lr - lr / 10) * step / (total - 1)
    if schedule == "linear":
        return lr * (1 - step / total)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * step / total)) / 2
    if schedule == "steps":              # the ordinary one: a tenth after 1/2 and after 3/4
        return lr * (1 if step < total / 2 else 0.1 if step < 3 * total / 4 else 0.01)
    peak = round(total * PEAK)
    if arm["ratio"] != 10:               # the same two straight lines between other bounds
        up, down = step / peak, (total - 1 - step) / (total - 1 - peak)
        return lr / arm["ratio"] + (lr - lr / arm["ratio"]) * min(up, down)
    return one_cycle(step, total, peak, lr, lr_end=0 if schedule == "annihilated" else None)


def make_optimizer(net, arm):
    """Muon as in model.py, or SGD with the constants that suit it here."""
    fused = next(net.parameters()).device.type == "cuda"
    if arm["optimizer"] == "muon":
        return Muon(net.parameters(), arm["lr"], arm["momentum"] or MOMENTUM, arm["weight_decay"],
                    fused=fused)
    return torch.optim.SGD(net.parameters(), arm["lr"], arm["momentum"] or 0.9, nesterov=True,
                           weight_decay=arm["weight_decay"], fused=fused)


def epoch_of(loader, seed, epoch, flip):
    if flip == "alternating":
        return loader.epoch(seed, epoch)
    images = len(loader.train_images)
    draws = draw_epoch(images, seed, epoch).to(loader.device)
    draws[:, FLIP] = draw_epoch(images, seed, 2**31 + epoch)[:, INDEX].to(loader.device) % 2
    return loader.batches(loader.train_images, loader.train_labels,
                          draws[:len(loader) * loader.batch_size], loader.batch_size)


def training(loader, arm, seed, width, compiled, held_out):
    """A run as a generator, which stops after each step and returns what it reached, by name.

    `history` is a list of (epoch, raw, averaged accuracy), every fourth epoch; the other values are
    accuracies at the end.
    """
    device = loader.device
    classes = int(loader.train_labels.max()) + 1
    net = make_model(device, seed, classes, width)
    average, raw = copy.deepcopy(net), copy.deepcopy(net)
    if compiled:
        net.compile()
    optimizer = make_optimizer(net, arm)
    step = make_step(net, optimizer, make_scaler(device), lambda log_p, labels: cross_entropy(
        log_p * arm["sharpness"], labels, label_smoothing=arm["smoothing"]))
    steps, epochs, history = len(loader), arm["epochs"], []
    averages = [b.clone() for b in statistics_of(net)]           # of the running statistics
    for epoch in range(epochs):
        net.train()
        for k, batch in enumerate(epoch_of(loader, seed, epoch, arm["flip"]), start=epoch * steps):
            lr = rate(arm, k, epochs * steps)
            for group in optimizer.param_groups:
                if torch.is_tensor(group["lr"]):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
            step(*batch)
            update_average(average, net, k, arm["decay"])
            for a, b in zip(averages, statistics_of(net)):       # as update_average does it
                a.lerp_(b, 1 - min(arm["decay"], (1 + k) / (10 + k)))
            yield
        if epoch % 4 == 3 and epochs >= 24 or epoch == epochs - 1:                # a CPU measures for 6 s
            measure_statistics(average, loader, seed, epoch)
            raw.load_state_dict(net.state_dict())
            history.append((epoch + 1, accuracy(raw, loader.test()),
                            accuracy(average, loader.test())))
    result = {"history": history, "raw": history[-1][1], "averaged": history[-1][2],
              "flipped": accuracy(average, loader.test(), flip=True)}
    if held_out:
        result["held out"] = {"raw": accuracy(net, held_out.test()),
                              "averaged": accuracy(average, held_out.test())}
    measure_statistics(raw, loader, seed, epoch)
    result["raw, measured"] = accuracy(raw, loader.test())
    for a, b in zip(averages, statistics_of(average)):
        b.copy_(a)
    result["averaged, averaged statistics"] = accuracy(average, loader.test())
    return result


def statistics_of(net):
    """Means and variances of batch normalisation."""
    return [b for b in net.buffers() if b.is_floating_point()]


def side_by_side(runs, together):
    """Exhaust generators, `together` at a time, each on a CUDA stream; yield their results."""
    cuda = torch.cuda.is_available()
    streams = [torch.cuda.Stream() if cuda else None for _ in range(together)]
    active = [next(runs, None) for _ in streams]
    while any(active):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                try:
                    if active[k]:
                        next(active[k])
                except StopIteration as stop:
                    yield stop.value
                    active[k] = next(runs, None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after these")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--together", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, help="train on so many only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.parts == ["draw"]:
        return draw(args.out, args.width, args.images)
    if args.parts[:1] == ["collect"]:
        return collect(args.parts[1], args.out)
    start = time.time()
    reuse_freed_memory()
    device = pick_device()
    everything = load(args.data, args.data_dir)
    held_out = len(everything.train_images) // 5
    part_way = everything._replace(
        train_images=everything.train_images[:-held_out][:args.images],
        train_labels=everything.train_labels[:-held_out][:args.images],
        test_images=everything.train_images[-held_out:],
        test_labels=everything.train_labels[-held_out:])
    on_test = everything._replace(train_images=everything.train_images[:args.images],
                                  train_labels=everything.train_labels[:args.images])
    loaders = {split: Loader(data, 512, precision(device), device)
               for split, data in (("held out", part_way), ("test", on_test))}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    todo = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for part in args.parts:
            for changes in arms_of(part):
                todo.append((part, {**ARM, **changes}, changes, seed))

    def runs():
        for part, arm, changes, seed in todo:
            if time.time() - start > args.seconds:
                return
            key = json.dumps([part, changes, seed, args.width, args.images])
            if args.out.exists() and any(json.dumps([r["part"], r["arm"], r["seed"], r["width"], r["images"]]) == key and "held out" in r for r in map(json.loads, args.out.read_text().splitlines())):
                continue
            arm["lr"] = arm["lr"] or best_rate(args.out, arm["optimizer"], arm["schedule"],
                                               args.width)
            yield complete(part, arm, changes, seed)

    def complete(part, arm, changes, seed):
        """A training whose result is the whole row."""
        began = time.time()
        loader = loaders["test" if part.split("-")[0] in ON_TEST_SET else "held out"]
        other = loaders["held out"] if loader is loaders["test"] and (args.images or 10**6) <= 40000 else None
        result = yield from training(loader, arm, seed, args.width, args.compile, other)
        return {"part": part, "arm": changes, "lr": arm["lr"], "epochs": arm["epochs"],
                "seed": seed, "machine": machine, "width": args.width, "images": args.images,
                **result, "seconds": time.time() - began}

    for row in side_by_side(runs(), args.together):
        print(f"{time.time() - start:6.0f} s  {row['part']:10}{row['averaged']:8.2%}"
              f"{row['raw']:8.2%}  lr {row['lr']:.4g}  seed {row['seed']}  {row['arm']}",
              flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def mean_of(rows, key):
    """mean +- standard deviation in %, as text."""
    values = [100 * row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def collect(folder, path):
    """Append the runs below `folder`, each with its history.json, as part `headline`."""
    with path.open("a") as file:
        for source in sorted(Path(folder).glob("seed*/history.json")):
            run = json.loads(source.read_text())
            history = [(row["epoch"], row["raw"], row["averaged"]) for row in run["history"]]
            file.write(json.dumps({
                "part": "headline", "arm": {"optimizer": "muon", "schedule": "one cycle"},
                "lr": run["lr_max"], "epochs": run["epochs"], "seed": run["seed"], "width": 64,
                "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                "images": None, "history": history, "raw": history[-1][1],
                "averaged": history[-1][2]}) + "\n")


def draw(path, width, images):
    """Print a table of every part, and draw the schedules of a width and a number of images."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups = {}
    for row in rows:
        key = row["part"], row["width"], row["images"], json.dumps(row["arm"])
        groups.setdefault(key, []).append(row)
    for (part, wide, some, arm), same in groups.items():
        machines = " and ".join(sorted({row["machine"] for row in same}))
        print(f"| {part} | {arm} | {same[0]['lr']:.3g} | {mean_of(same, 'averaged')} | "
              f"{mean_of(same, 'raw')} | {len(same)} | {machines}, width {wide}, "
              f"{some or 'all'} images |")
        measured = [row for row in same if "raw, measured" in row]
        for name in ("raw, measured", "averaged, averaged statistics") if measured else ():
            print(f"|  | {name} | | {mean_of(measured, name)} | | {len(measured)} | |")
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2)
    looks = {"one cycle": ("one cycle", "tab:blue"), "constant": ("constant", "tab:red"),
             "annihilated": ("with annihilation", "tab:green"),
             "steps": ("step decay", "tab:orange")}
    longest = max(row["epochs"] for row in rows if [row["width"], row["images"]] == [width, images])
    ticks = [epoch for epoch in (4, 8, 12, 16, 24, 48, 120) if epoch <= longest]
    for ax, key, title, span in zip(panels, (1, 2), ("raw weights", "averaged weights"), (20, 5)):
        for (part, *size, arm), same in groups.items():
            if part.split("-")[0] == "sgd" and size == [width, images]:
                epochs, (name, colour) = same[0]["epochs"], looks[same[0]["arm"]["schedule"]]
                by_epoch = [{entry[0]: 100 * entry[key] for entry in row["history"]}
                            for row in same]
                x = sorted(set.intersection(*map(set, by_epoch)))
                curves = np.array([[reached[epoch] for epoch in x] for reached in by_epoch])
                style = {24: "-", 48: "--"}.get(epochs, ":")
                ax.plot(x, curves.mean(0), style, color=colour, marker="o", markevery=[-1],
                        label=f"{name}, {epochs} epochs (n = {len(same)})")
                ax.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.15,
                                linewidth=0)
        top = ax.get_ylim()[1]
        ax.set(xlabel="epoch", title=title, xscale="log", xlim=(4, 1.1 * longest),
               ylim=(top - span, top))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel="accuracy on the test set in %")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize="small", handlelength=4)
    figure.suptitle(f"SGD, {width} channels, {images or 'all'} images; shaded from the lowest run "
                    f"to the highest", fontsize="medium")
    figure.savefig("experiment.png", dpi=100)
    print("wrote experiment.png")


if __name__ == "__main__":
    main()
