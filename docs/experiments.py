"""The experiments behind the README's claims: every arm is one line, every result one line more.

    python -m docs.experiments PART ... [--seeds N] [--width W] [--images N] [--compile]
    python -m docs.experiments collect RUNS      adds what `train.py --runs N --out RUNS` left

Each run trains by train.py's own `train_epoch`, and ends as one line of experiments.jsonl: accuracy
on the test set, and, where the last 10,000 training images are not trained on, on those too ("held
out": what rates are chosen by), and on all that are not trained on ("all held out"). Arms that
stand there already are skipped, so the same command goes on after a break; all arms run with one
seed, then with the next. docs/tables.py and docs/figures.py make tables and pictures of the lines.

Half the network on half of the images, --width 32 --images 25000, takes 9 minutes for 24 epochs on
two cores of Zen 5, or some 18 for each of two side by side, with OMP_NUM_THREADS=1.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, unfold

import train
from data import FLIP, INDEX, Loader, draw_epoch, load
from model import autocast, make_model, make_optimizer, make_scaler, pick_device, precision
from onecycle import OneCycle, one_cycle

HERE = Path(__file__).parent
RESULTS = HERE / "experiments.jsonl"
COMMIT = "cdace6e"        # the first at which a seed draws the random numbers that it draws now
RECIPE = {"optimizer": "muon", "schedule": "one cycle", "lr": 0.1, "epochs": 24, "start": 0.1,
          "end": 0.1, "smoothing": 0.0, "sharpness": 1.0, "decay": train.AVERAGE_DECAY,
          "momentum": None, "weight_decay": 1e-3, "flip": "alternating", "share": None,
          "fc": 1, "norms": 1, "fc momentum": None, "start_from": None, "zero fc": False,
          "ghost": False, "uphill": 0.0, "teacher": 0.0, "unit filters": False}


def sgd(schedule, lr, **more):
    return {"optimizer": "sgd", "schedule": schedule, "lr": lr, **more}


def muon(schedule, lr, **more):
    return {"optimizer": "muon", "schedule": schedule, "lr": lr, **more}


MAP_RATES = 0.05, 0.1, 0.2, 0.4, 0.8, 1.6

# What differs from RECIPE, an arm a line. SGD's rate 0.2 and Muon's 0.1 are about what the range
# test finds; the other schedules take the best of the rates that `rates` tried.
PARTS = {
    # One cycle beside annihilation, a constant rate and step decay.
    "sgd": [sgd("one cycle", 0.2), sgd("annihilated", 0.2), sgd("constant", 0.1),
            sgd("steps", 0.2)],
    "sgd-48": [sgd("steps", 0.2, epochs=48)],
    "sgd-120": [sgd("steps", 0.2, epochs=120)],
    "muon": [muon("one cycle", 0.1), muon("annihilated", 0.1), muon("constant", 0.05),
             muon("steps", 0.05)],
    "rates": [make(schedule, lr * factor) for make, lr in ((muon, 0.1), (sgd, 0.2))
              for schedule, factors in (("constant", (1 / 8, 1 / 4, 1 / 2, 1)),
                                        ("steps", (1 / 4, 1 / 2, 1, 2))) for factor in factors],
    # What the rise buys: with it, and straight down from LRMAX.
    "rise": [sgd(schedule, lr) for lr in (0.2, 0.4, 0.1)
             for schedule in ("one cycle", "no rise", "annihilated", "linear")],
    "momentum": [sgd("one cycle", 0.8, epochs=12, momentum="0.95 .. 0.85")],     # as the map's
    # How many epochs one is worth in those of the other.
    "budget": [sgd(schedule, lr, epochs=epochs, **more) for epochs in (24, 6, 48)
               for schedule, lr, more in (("one cycle", 0.8, {}), ("one cycle", 0.4, {}),
                                          ("linear", 0.4, {}),
                                          ("linear", 0.2, {"weight_decay": 4e-3}))],
    "budget-100": [sgd("one cycle", 0.4, epochs=100), sgd("linear", 0.2, epochs=100),
                   sgd("linear", 0.2, epochs=100, weight_decay=4e-3)],
    # Short runs, with --width 32 --images 12500 as the budgets above: what rates train with a rise
    # and without one, and LRMAX against weight decay.
    "map": [sgd("one cycle", lr, epochs=12, weight_decay=1e-3) for lr in MAP_RATES],
    "map, other decays": [sgd("one cycle", lr, epochs=12, weight_decay=decay)
                          for decay in (2.5e-4, 4e-3) for lr in MAP_RATES],
    "map no rise": [sgd("no rise", lr, epochs=12) for lr in MAP_RATES],
    "map muon": [muon(schedule, lr, epochs=12) for lr in (0.1, 0.2, 0.4)
                 for schedule in ("one cycle", "no rise")],
    "map linear": [sgd("linear", lr, epochs=12) for lr in (0.2, 0.8, 0.4)],
    "map no rise, other decays": [sgd(schedule, 0.2, epochs=12, weight_decay=4e-3)
                                  for schedule in ("linear", "no rise")],
    "map cosine": [sgd("cosine", lr, epochs=12) for lr in (0.4, 0.2, 0.8)],
    "map annihilated": [sgd("annihilated", lr, epochs=12) for lr in (0.8, 0.4, 0.2)],
    "map warm-up": [sgd("warm-up", lr, epochs=12) for lr in (0.8, 0.2)],
    "map ends": [sgd("one cycle", 0.8, epochs=12, **{which: share})        # the first and last rate
                 for which in ("end", "start") for share in (1 / 3, 1 / 30)],
    # Where images are few: with --width 32, and --images 5000, 12500, 25000.
    "few images": [sgd(schedule, lr, epochs=12) for lr in (0.4, 0.8, 0.2)
                   for schedule in ("one cycle", "steps")]
    + [sgd("steps", 0.1, epochs=12), sgd("linear", 0.4, epochs=12),
       sgd("linear", 0.2, epochs=12, weight_decay=4e-3)],
    # What the range test's answer is worth: shares of LRMAX, and other LRMIN.
    "range": [make("one cycle", lr * factor) for factor in (1, 2, 1 / 2, 4, 1 / 4)
              for make, lr in ((muon, 0.1), (sgd, 0.2))]
    + [muon("one cycle", 0.1, start=share, end=share) for share in (1 / 3, 1 / 30)],
    "share": [{"optimizer": optimizer, "share": share} for share in (1, 2 / 3, 1 / 2, 1 / 3)
              for optimizer in ("muon", "sgd")],             # of the LRMAX that its seed finds
    # What passed among `choices`, beside the recipe, each up to the LRMAX that it finds; and the
    # recipe with convolutions that go up as far as they do there: is it their rate that gains?
    "full size": [{"share": 1}, {"share": 1, "start_from": "patches", "fc": 2, "norms": 2,
                                 "smoothing": 0.2}, {"share": 2 / 3}],
    # One constant of the recipe at a time.
    "recipe": [{}, {"smoothing": 0.1}, {"smoothing": 0.2}, {"decay": 0.995}, {"sharpness": 2.0},
               {"sharpness": 8.0}, {"flip": "coin"}, {"momentum": 0.9}, {"weight_decay": 0.0}],
    # What has never been tuned: the rates of what Muon leaves to SGD, the last layer and the norms'
    # scales and biases, as multiples of the convolutions', and the last layer's momentum; where the
    # weights start; how many images batch statistics are of; larger last steps; gradients taken a
    # little uphill in the last five epochs; the network's own answer of an epoch ago in the label;
    # each filter's norm fixed, which batch normalisation cancels, in place of each layer's.
    "choices": [{}, {"fc": 8, "norms": 8}, {"fc": 8}, {"norms": 8},
                {"fc": 8, "norms": 8, "weight_decay": 1.25e-4}, {"start_from": "identity"},
                {"start_from": "patches"}, {"start_from": "patches, frozen"}, {"ghost": True},
                {"momentum": "0.6 .. 0.85"}, {"decay": 0.995, "lr": 0.125},
                {"decay": 0.998, "lr": 0.125}, {"fc": 8, "norms": 8, "smoothing": 0.2},
                {"uphill": 0.2}, {"teacher": 0.5}, {"fc": 2, "norms": 2, "smoothing": 0.2},
                {"fc": 32}, {"fc": 8, "start_from": "identity"}, {"fc momentum": 0.9},
                {"start_from": "patches", "zero fc": True, "sharpness": 2.83},
                {"start_from": "patches", "fc": 2, "norms": 2, "smoothing": 0.2},
                {"unit filters": True}],
}


class Schedule(OneCycle):
    """train_epoch's schedule, for every arm's rates."""

    def __init__(self, optimizer, total, arm):
        super().__init__(optimizer, total, round(total * train.PEAK), arm["lr"])
        self.total, self.arm = total, arm

    def at(self, step):
        lr, schedule, left = self.arm["lr"], self.arm["schedule"], 1 - step / (self.total - 1)
        if schedule == "constant":
            return lr
        if schedule == "steps":              # the ordinary one: a tenth after 1/2 and after 3/4
            return lr * (1 if left > 1 / 2 else 0.1 if left > 1 / 4 else 0.01)
        if schedule == "no rise":            # from LRMAX straight down to LRMIN
            return lr * (0.1 + 0.9 * left)
        if schedule == "linear":
            return lr * left
        if schedule == "cosine":
            return lr * (1 - math.cos(math.pi * left)) / 2
        peak = self.total // 24 if schedule == "warm-up" else self.cycle[1]
        end = 0 if schedule == "annihilated" else self.arm["end"]
        return one_cycle(step, self.total, peak, lr, self.arm["start"], end)

    def set(self, step):
        lr, momentum = super().set(step), self.arm["momentum"]
        for group in self.optimizer.param_groups:
            if momentum == "0.95 .. 0.85":               # Smith's: it falls as the rate rises
                group["momentum"] = 0.95 - 0.1 * (lr / self.arm["lr"] - 0.1) / 0.9
            if momentum == "0.6 .. 0.85":                # it rises in the last quarter
                group["momentum"] = 0.6 + max(step / self.total - 3 / 4, 0)
        return lr


class CoinFlips(Loader):
    """Chance mirrors an image in every epoch, instead of every other epoch."""

    def epoch(self, seed, epoch):
        images = len(self.train_images)
        draws = draw_epoch(images, seed, epoch)[:len(self) * self.batch_size]
        draws[:, FLIP] = draw_epoch(images, seed, 2**31 + epoch)[:len(draws), INDEX] % 2
        return self.batches(self.train_images, self.train_labels, draws, self.batch_size)


class GhostNorm(nn.BatchNorm2d):
    """Batch normalisation of 128 images at a time (Hoffer et al., arXiv 1705.08741)."""

    def forward(self, x):
        return torch.cat([super(GhostNorm, self).forward(part) for part in x.split(128)])


class Teacher:
    """Cross-entropy against labels mixed with what the network said of each image an epoch ago.

    Its share grows from 0 to `share` over the run (Kim et al., arXiv 2006.12000). The loader then
    gives each image's index in place of its label, so its training accuracy means nothing.
    """

    def __init__(self, loader, share):
        self.right = nn.functional.one_hot(loader.train_labels, len(loader.data.classes)).float()
        self.said = self.right.clone()                                             # (N, classes)
        loader.train_labels = torch.arange(len(self.right), device=loader.device)
        self.share, self.now = share, torch.zeros((), device=loader.device)

    def begin(self, fraction):
        self.now.fill_(self.share * fraction)

    def loss(self, log_probabilities, index):
        target = torch.lerp(self.right[index], self.said[index], self.now)
        self.said[index] = log_probabilities.detach().exp()
        return cross_entropy(log_probabilities, target)


def make_uphill_step(net, optimizer, loss_function, distance):
    """A step by the gradient a little way uphill (SAM: Foret et al., arXiv 2010.01412)."""
    weights = [*net.parameters()]

    def gradient(inputs, labels):
        with autocast(inputs.device):
            log_probabilities = net(inputs)
            loss = loss_function(log_probabilities, labels)
        optimizer.zero_grad()
        loss.backward()
        return loss.detach(), (log_probabilities.argmax(1) == labels).sum()

    def step(inputs, labels):
        result = gradient(inputs, labels)
        with torch.no_grad():
            length = torch.stack([w.grad.norm() for w in weights]).norm()
            uphill = [w.grad * (distance / length) for w in weights]
            for w, u in zip(weights, uphill):
                w.add_(u)
        gradient(inputs, labels)
        with torch.no_grad():
            for w, u in zip(weights, uphill):
                w.sub_(u)
        optimizer.step()
        return result

    return step


@torch.no_grad()
def change(net, arm, images):
    """Set the arm's initial weights and batch statistics."""
    if arm["start_from"] == "identity":      # the first filters of the widening convolutions
        for convolution in (net.layer1[0][0], net.layer2[0], net.layer3[0][0]):
            nn.init.dirac_(convolution.weight[:convolution.in_channels])
    elif arm["start_from"]:                  # 3 x 3 patches' eigenvectors, with both signs
        weight = net.prep[0].weight
        patches = unfold(images[:1000].permute(0, 3, 1, 2) / 255, 3)               # (1000, 27, 900)
        vectors = torch.linalg.eigh(torch.cov(patches.transpose(0, 1).flatten(1))).eigenvectors.T
        largest = vectors.flip(0)[:min(20, len(weight) // 2)].view(-1, 3, 3, 3)
        weight[:2 * len(largest)] = torch.cat([largest, -largest])
        weight.requires_grad = arm["start_from"] != "patches, frozen"
    if arm["zero fc"]:
        nn.init.zeros_(net.fc.weight)
        nn.init.zeros_(net.fc.bias)
    for module in net.modules():
        if arm["ghost"] and isinstance(module, nn.BatchNorm2d):
            module.__class__ = GhostNorm


def make_arms_optimizer(net, arm):
    optimizer = make_optimizer(net, arm["optimizer"], arm["lr"])
    if arm["optimizer"] == "muon":           # the last layer gets a group of its own
        norms, last = optimizer.param_groups[1], [*net.fc.parameters()]
        norms["params"] = [w for w in norms["params"] if not any(w is v for v in last)]
        norms["lr"] *= arm["norms"]
        optimizer.add_param_group({"params": last, "lr": arm["lr"] * arm["fc"], "momentum":
                                   arm["fc momentum"] or optimizer.defaults["momentum"]})
    for group in optimizer.param_groups:
        group["weight_decay"] = arm["weight_decay"]
        if isinstance(arm["momentum"], float):
            group["momentum"] = arm["momentum"]
    if arm["unit filters"]:
        optimizer.register_step_post_hook(unit_filters)
    if isinstance(arm["momentum"], str):     # a graph would freeze it: no graph
        optimizer.defaults.update(fused=False, capturable=False)
    return optimizer


@torch.no_grad()
def unit_filters(optimizer, args, kwargs):
    for w in optimizer.param_groups[0]["params"]:                          # the convolutions
        w.div_(torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True))


def run(arm, seed, loader, held_out, compiled):
    """Train an arm; return what it reached."""
    net = make_model(loader.device, seed, len(loader.data.classes), loader.data.width)
    change(net, arm, loader.data.train_images)
    average, raw = copy.deepcopy(net), copy.deepcopy(net)
    optimizer, scaler = make_arms_optimizer(net, arm), make_scaler(loader.device)
    arm = {**arm, "lr": arm["lr"] * max(1, arm["fc"], arm["norms"])}       # the largest group's
    teacher = Teacher(loader, arm["teacher"]) if arm["teacher"] else None
    loss_function = teacher.loss if teacher else lambda log_p, labels: (
        cross_entropy(log_p * arm["sharpness"], labels, label_smoothing=arm["smoothing"]))
    if arm["share"]:
        found = train.find_lr_max(net, optimizer, scaler, loader, seed, Path("lr_range.png"),
                                  loss_function)
        arm["lr"] = arm["share"] * (found.lr_max if found else train.LR_MAX)
    if compiled:
        net.compile()
    step = train.make_step(net, optimizer, scaler, loss_function)
    train.AVERAGE_DECAY, epochs = arm["decay"], arm["epochs"]
    schedule, history = Schedule(optimizer, epochs * len(loader), arm), []
    for epoch in range(epochs):
        if teacher:
            teacher.begin(epoch / epochs)
        if arm["uphill"] and epoch == epochs - 5:
            step = make_uphill_step(net, optimizer, loss_function, arm["uphill"])
        row = train.train_epoch(net, average, step, schedule, loader, seed, epoch)
        on_the_way = epoch % 4 == 3 and epochs >= 24 and loader.device.type == "cuda"
        if on_the_way or epoch == epochs - 1:            # a CPU would test for 6 seconds each time
            train.measure_statistics(average, loader, seed, epoch)
            raw.load_state_dict(net.state_dict())
            history.append((epoch + 1, train.accuracy(raw, loader.test()),
                            train.accuracy(average, loader.test())))
    result = {"lr": arm["lr"], "history": history, "loss": row["loss"], "raw": history[-1][1],
              "averaged": history[-1][2],
              "flipped": train.accuracy(average, loader.test(), flip=True)}
    for name, other in held_out.items():
        result[name] = {"raw": train.accuracy(raw, other.test()),
                        "averaged": train.accuracy(average, other.test())}
    train.measure_statistics(raw, loader, seed, epoch)
    return {**result, "raw, measured": train.accuracy(raw, loader.test())}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", help=f"of {', '.join(PARTS)}; or collect RUNS")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no run after these")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--images", type=int, help="train on so many only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.parts[0] == "collect":
        return collect(args.parts[1], args.out)
    if unknown := set(args.parts) - {*PARTS}:
        parser.error(f"there is no part {', '.join(unknown)}: see -h")
    start, device = time.time(), pick_device()
    train.reuse_freed_memory()
    everything = load(args.data, args.data_dir)
    images, labels = everything.train_images, everything.train_labels
    used = args.images or len(images)
    data = everything._replace(train_images=images[:used], train_labels=labels[:used],
                               width=args.width)
    held_out = {name: Loader(data._replace(test_images=images[-n:], test_labels=labels[-n:]),
                             512, precision(device), device)
                for name, n in (("held out", 10_000), ("all held out", len(images) - used))
                if 10_000 <= n <= len(images) - used}
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for part in args.parts:
            for arm in PARTS[part]:
                row = {"part": part, "arm": arm, "seed": seed, "machine": machine,
                       "width": args.width, "images": args.images}
                if any(row.items() <= old.items() for old in read(args.out)):
                    continue
                if time.time() - start > args.seconds:
                    return
                began, arm = time.time(), {**RECIPE, **arm}
                loader = (CoinFlips if arm["flip"] == "coin" else Loader)(
                    data, 512, precision(device), device)
                row["commit"] = COMMIT
                row |= run(arm, seed, loader, held_out, args.compile)
                row["seconds"] = time.time() - began
                print(f"{time.time() - start:6.0f} s  {part:10}{row['averaged']:8.2%}"
                      f"{row['raw']:8.2%}  seed {seed}  {row['arm']}", flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def read(path=RESULTS):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(folder, path):
    """Append the runs below `folder`, each with its history.json, as part `headline`."""
    with path.open("a") as file:
        for source in sorted(Path(folder).glob("seed*/history.json")):
            run = json.loads(source.read_text())
            history = [(row["epoch"], row["raw"], row["averaged"]) for row in run["history"]]
            file.write(json.dumps({
                "part": "headline", "arm": {"optimizer": run["optimizer"]}, "lr": run["lr_max"],
                "seed": run["seed"], "width": 64, "images": None, "commit": COMMIT,
                "history": history,
                "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
                "raw": history[-1][1], "averaged": history[-1][2]}) + "\n")


if __name__ == "__main__":
    main()
