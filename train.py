"""Train CustomResNet on CIFAR-10 with one cycle of the learning rate: 24 epochs, batch 512.

    python train.py                     finds LRMAX by a range test, then trains; see -h
    python train.py --resume runs/1     goes on with a run that was cut off, as if it had not been

At the end of a cycle without annihilation the learning rate is still LRMAX / 10, and the weights
jitter around the bottom of the valley. So beside the raw weights w a running average of them,
a <- d a + (1 - d) w after every step, is kept; it sits near the bottom. Its accuracy after the last
epoch is the result: to pick the best epoch would be to fit the test set.
"""
import argparse
import copy
import ctypes
import json
import math
import os
import statistics
import sys
import time
import zipfile
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from torch.nn.functional import nll_loss
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import lrfinder
from data import Loader, load
from model import autocast, make_model, make_optimizer, make_scaler, pick_device, precision
from onecycle import OneCycle

# The recipe: an experiment is one edited line. What the range test shares stands atop model.py;
# batch size, epochs and width belong to the data, and their defaults to `Dataset` in data.py.
PEAK = 5 / 24             # the share of the run after which the learning rate is LRMAX
LR_MAX = 0.1              # where the range test finds nothing: about what it finds on CIFAR-10
AVERAGE_DECAY = 0.99      # d: an average over about the last 100 steps, one epoch
SAMPLE = 5120             # training images that give the average its BatchNorm statistics

SAVE_EVERY = 10           # seconds, at least, between two checkpoints
CHECKPOINT = "settings", "history", "net", "average", "optimizer", "scaler"
HEADER = "epoch       lr    loss    train      raw  averaged       s  images/s"
ROW = ("{epoch:5}{lr:9.4f}{loss:8.4f}{train:9.2%}{raw:9.2%}{averaged:10.2%}{seconds:8.1f}"
       "{speed:10,.0f}")


# ------------------------------------------------------------------------------------ the loop

def train(data, settings, checkpoint, out):
    """Train from the start or from a checkpoint; write the results to `out`, return the accuracy.

    It is that of the averaged weights after the last epoch, a share of the test set.
    """
    device, seed, epochs = pick_device(), settings["seed"], settings["epochs"]
    net = make_model(device, seed, len(data.classes), data.width)
    average = copy.deepcopy(net)
    optimizer, scaler = make_optimizer(net), make_scaler(device)
    loader = Loader(data, settings["batch_size"], precision(device), device)
    describe(data, loader)

    history = restore(checkpoint, net, average, optimizer, scaler) if checkpoint else []
    save_state = partial(save_run, out, settings, history, net, average, optimizer, scaler)
    if not checkpoint:
        save_state()                                     # --resume can go on from now on
    if settings["lr_max"] is None:
        settings["lr_max"] = find_lr_max(net, optimizer, scaler, loader, seed, out)
        save_state()
    steps = len(loader)                                                     # an epoch
    total, peak = epochs * steps, min(round(epochs * steps * PEAK), epochs * steps - 1)
    schedule = OneCycle(optimizer, total, peak, settings["lr_max"])
    print(f"schedule  {epochs} epochs of {steps} steps of {loader.batch_size}: learning rate "
          f"{schedule.at(0):.3g}, {schedule.at(peak):.3g} at step {peak}, "
          f"{schedule.at(total - 1):.3g} at the end; seed {seed}\nresults   {out}\n\n{HEADER}")
    for row in history:
        print(ROW.format(**row))
    step, saved = make_step(net, optimizer, scaler), time.time()

    for epoch in range(len(history), epochs):
        start, loss_sum, right = time.time(), 0, 0
        net.train()
        batches = tqdm(loader.epoch(seed, epoch), f"epoch {epoch + 1}", steps, leave=False,
                       disable=None)                     # None: no bar where it is no terminal
        for k, (inputs, labels) in enumerate(batches, start=epoch * steps):
            lr = schedule.set(k)
            loss, correct = step(inputs, labels)
            update_average(average, net, k)
            # Summed on the device: to ask for a number would make the GPU wait for Python.
            loss_sum += loss
            right += correct
        measure_statistics(average, loader, seed, epoch)
        loss = float(loss_sum) / steps
        if not (math.isfinite(loss) and all(w.isfinite().all() for w in net.parameters())):
            sys.exit(f"epoch {epoch + 1} diverged (loss {loss:.3g}) and is not saved: try --lr-max "
                     f"{settings['lr_max'] / 4:.2g}")
        seconds, images = time.time() - start, steps * loader.batch_size
        history.append({
            "epoch": epoch + 1, "lr": lr, "loss": loss, "train": int(right) / images,
            "raw": accuracy(net, loader.test()), "averaged": accuracy(average, loader.test()),
            "seconds": seconds, "speed": images / seconds})
        print(ROW.format(**history[-1]), flush=True)
        if epoch + 1 == epochs or time.time() - saved >= SAVE_EVERY:
            save_state()
            saved = time.time()

    finish(data, settings, schedule, history, average, loader, out)
    return history[-1]["averaged"]                       # of the last epoch, never of the best


def make_step(net, optimizer, scaler, loss_function=nll_loss):
    """The function that trains on a batch: (inputs, labels) to (loss, how many right), tensors."""
    device = next(net.parameters()).device

    def step(inputs, labels):
        with autocast(device):
            log_probabilities = net(inputs)                                       # (B, classes)
            loss = loss_function(log_probabilities, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), (log_probabilities.argmax(1) == labels).sum()

    # A graph cannot stop to ask: not whether fp16 overflowed, as the scaler must after each step,
    # nor for the learning rate, as torch's optimizers do unless they are fused or capturable.
    asks = not (optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
    if device.type != "cuda" or scaler.is_enabled() or asks:
        return step
    for group in optimizer.param_groups:       # a number would be frozen into the recording
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return as_graph(step)


def as_graph(step, warmup=3):
    """`step`, recorded as a CUDA graph after `warmup` calls, and from then on replayed.

    step: a function of tensors that returns tensors, the shapes always the same. A whole step is
    hundreds of kernels, which Python may take longer to launch than a GPU to run; a graph is one
    launch. It reads and writes the same memory each time: what is given is copied there, and what
    it returns holds until the next call.
    """
    graph, inputs, outputs = torch.cuda.CUDAGraph(), [], []

    def replay(*batch):
        nonlocal warmup
        if warmup:                             # cuDNN, cuBLAS and the optimizer prepare themselves
            warmup -= 1
            return step(*batch)
        if not inputs:
            inputs.extend(tensor.clone() for tensor in batch)
            # Recording does not run. It takes a stream of its own, as cuBLAS keeps a workspace for
            # each: graphs of one stream would share it, and spoil each other where they overlap.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                outputs.extend(step(*inputs))
        for mine, tensor in zip(inputs, batch):
            mine.copy_(tensor)
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def update_average(average, net, step, decay=AVERAGE_DECAY):
    """a <- d a + (1 - d) w. First d is 0.1, 0.18, ...: untrained weights are soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, w in zip(average.parameters(), net.parameters()):
        a.lerp_(w, 1 - decay)


def measure_statistics(average, loader, seed, epoch):
    """Measure BatchNorm's statistics under the averaged weights: no batch ran through them yet.

    update_bn forgets what a network has, then averages over the batches that it is given.
    Izmailov et al., arXiv 1803.05407, run all training images through them; a tenth is enough.
    """
    sample = islice(loader.epoch(seed, epoch), math.ceil(SAMPLE / loader.batch_size))
    with autocast(loader.device):
        update_bn(sample, average)


@torch.no_grad()
def accuracy(net, batches, flip=False):
    """The share of the images that net gets right; flip: averaged with the mirror images."""
    net.eval()
    right, seen = 0, 0
    for inputs, labels in batches:
        with autocast(inputs.device):
            probabilities = net(inputs).exp()                                     # (B, classes)
            if flip:
                probabilities = probabilities + net(inputs.flip(3)).exp()
        right += (probabilities.argmax(1) == labels).sum()
        seen += len(labels)
    return int(right) / seen


def find_lr_max(net, optimizer, scaler, loader, seed, out):
    """LRMAX by the range test on the training batches, or LR_MAX; net is left as it was."""
    start = time.time()
    batches = (batch for epoch in count() for batch in loader.epoch(seed, epoch))
    bar = tqdm(batches, "range test", lrfinder.STEPS, leave=False, disable=None)
    curve = lrfinder.range_test(net, optimizer, nll_loss, bar, scaler=scaler,
                                autocast=lambda: autocast(loader.device))
    bar.close()
    found, words = lrfinder.report(curve, out / "lr_range.png")
    print(f"search    {len(curve.lrs)} steps in {time.time() - start:.0f} s: {words}"
          f"{'' if found else f'; going on with LRMAX {LR_MAX}'}", flush=True)
    return found.lr_max if found else LR_MAX


# ------------------------- what a run prints and leaves; who came for the loop may stop here

def describe(data, loader):
    """Print on what, and with what, is trained."""
    device = loader.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"device    {name}, {torch.get_num_threads()} threads; {loader.dtype}, channels_last, "
          f"{loader.augment.__name__}\n"
          f"data      {data.name}: {len(data.train_images):,} to train, {len(data.test_images):,} "
          f"to test, {len(data.classes)} classes")
    if not data.real:
        print(f"          THIS IS NOT CIFAR-10, and the network has {data.width} channels, not 64")


def finish(data, settings, schedule, history, average, loader, out):
    """Write the weights and the pictures, and print the result."""
    last, flipped = history[-1], accuracy(average, loader.test(), flip=True)
    save(out / "model.pt", {
        "weights": average.state_dict(), "classes": data.classes, "width": data.width,
        "mean": loader.mean.cpu(), "inverse_std": loader.inverse_std.cpu(), "settings": settings,
        "last_epoch": last})
    plot_curves(history, schedule, len(loader), out / "curves.png")
    plot_mistakes(data, average, loader, out / "mistakes.png")
    print(f"\nlast epoch: {last['averaged']:.2%} of the test set right with averaged weights, "
          f"{last['raw']:.2%} with raw ones\n(not the result: {flipped:.2%} with each image and "
          f"its mirror image averaged)\n{out} holds model.pt, history.json, curves.png and "
          f"mistakes.png")
    if not data.real:
        print(f"THIS IS NOT CIFAR-10 but {data.name}; --data in -h tells how to get the real ones")


def new_figure(width, height):
    """A matplotlib Figure on white, which, unlike pyplot, needs no screen."""
    from matplotlib.figure import Figure         # takes half a second: only where it is needed
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plot_curves(history, schedule, steps, path):
    """Accuracy and loss against the epoch, with the learning rate underneath."""
    epochs = [row["epoch"] for row in history]
    rates = [schedule.at(k) for k in range(len(history) * steps)]
    figure = new_figure(8, 6)
    top, middle, below = figure.subplots(3, 1, height_ratios=(3, 1, 1), sharex=True)
    for key, style in (("averaged", "-"), ("raw", "--"), ("train", ":")):
        top.plot(epochs, [100 * row[key] for row in history], style, label=key)
    top.axhline(90, color="grey", linewidth=0.8)
    top.set(ylabel="accuracy in %", title="test set: averaged and raw weights; train: augmented")
    top.legend(loc="lower right")
    middle.plot(epochs, [row["loss"] for row in history], color="tab:red")
    middle.set(ylabel="training loss", ylim=(0, None))
    below.plot([k / steps for k in range(len(rates))], rates, color="black")
    below.set(xlabel="epoch", ylabel="learning rate", ylim=(0, 1.5 * max(rates)))
    peak = rates.index(max(rates)) / steps
    below.annotate(f"LRMAX {max(rates):.3g}", (peak, max(rates)), (6, 2),
                   textcoords="offset points")
    for ax in (top, middle, below):
        ax.axvline(peak, color="grey", linewidth=0.8)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def plot_mistakes(data, net, loader, path):
    """The 16 mistakes of which net was most sure, and the accuracy of each class."""
    net.eval()
    with autocast(loader.device):
        outputs = torch.cat([net(inputs).cpu() for inputs, _ in loader.test()])   # (N, classes)
    confidence, guess = outputs.exp().max(1)
    wrong = guess != data.test_labels
    worst = torch.where(wrong, confidence, 0).argsort(descending=True)[:min(16, int(wrong.sum()))]
    figure = new_figure(9, 5)
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    axes = left.subplots(4, 4).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, k in zip(axes, worst.tolist()):
        ax.imshow(data.test_images[k].numpy())
        ax.set_title(f"{data.classes[guess[k]]} {confidence[k]:.0%}\n"
                     f"is {data.classes[data.test_labels[k]]}", fontsize=8)
    share = [100 * (~wrong[data.test_labels == c]).float().mean().item()
             for c in range(len(data.classes))]
    ax = right.subplots()
    bars = ax.barh(data.classes, share)
    ax.bar_label(bars, fmt="%.1f", padding=2)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy in %", xlim=(0, 125), xticks=(0, 50, 100), title="by class")
    figure.savefig(path, dpi=100)


def save(path, content):
    """Write a file aside, then rename it: whatever happens, path is whole, the old or the new."""
    aside = path.with_suffix(".partial")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:             # torch.save raises both
        aside.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}): is the disk full or read-only? What was saved "
                 f"before is whole")


def save_run(out, settings, history, *parts):
    """Write checkpoint.pt, which --resume reads, and history.json, which people read."""
    states = [settings, history, *(part.state_dict() for part in parts)]
    save(out / "checkpoint.pt", dict(zip(CHECKPOINT, states)))
    (out / "history.json").write_text(json.dumps({**settings, "history": history}, indent=1))


def read_checkpoint(folder):
    """What save_run wrote: every checksum is tested, which torch.load does not; no code is run."""
    path = folder if folder.name == "checkpoint.pt" else folder / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in CHECKPOINT}
    except FileNotFoundError:
        sys.exit(f"there is no {path} to go on with")
    except Exception as error:                           # damage shows in a dozen ways
        sys.exit(f"{path} is damaged, or no checkpoint of train.py ({error})")


def restore(checkpoint, net, average, optimizer, scaler):
    """Load a checkpoint into the parts of a run; return its history."""
    fresh = [float(group["lr"]) for group in optimizer.param_groups]
    net.load_state_dict(checkpoint["net"])
    average.load_state_dict(checkpoint["average"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint["scaler"]:                             # empty where it does nothing
        scaler.load_state_dict(checkpoint["scaler"])
    # The schedule sets the rates, and reads their ratio; the run may come from another device.
    for group, lr in zip(optimizer.param_groups, fresh):
        group["lr"], group["fused"] = lr, optimizer.defaults["fused"]
    return checkpoint["history"]


# ------------------------------------------------------------------------------ the command line

def between(kind, least, most):
    """A type for argparse: a number of that kind from least to most."""
    def convert(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} does not lie in {least} .. {most}")
        return kind(text)
    convert.__name__ = kind.__name__                     # argparse names it: invalid int value
    return convert


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", metavar="SET", help="auto: CIFAR-10, downloaded if need be, else drawn shapes "
        "(default); cifar10; synthetic: drawn shapes; or an .npz with train_images, train_labels, "
        "test_images and test_labels: uint8 N x 32 x 32 x 3 and integers")
    add("--data-dir", metavar="DIR", help="where CIFAR-10 is, or is downloaded to (data)")
    add("--epochs", metavar="N", type=between(int, 1, 10_000), help="(24; on drawn shapes fewer)")
    add("--batch-size", metavar="N", type=between(int, 1, 10**6), help="(512; on shapes smaller)")
    add("--lr-max", metavar="LR", type=between(float, 1e-9, 1e9), help="LRMAX, without a search")
    add("--seed", metavar="N", type=between(int, 0, 2**31 - 1), help="(0)")
    add("--runs", metavar="N", type=between(int, 1, 10_000),
        help="train with N seeds, from --seed on; mean and std")
    add("--out", metavar="DIR", help="folder for the results (the first free one of runs/1, ...)")
    add("--resume", metavar="DIR", help="go on with the run in DIR; of the other options, only "
        "--data and --data-dir go with it")
    return parser


def make_folder(out):
    """Claim the folder of a new run: `out`, or the first free one of runs/1, runs/2, ..."""
    if out is None:
        for k in count(1):
            out = f"runs/{k}"
            try:
                Path(out).mkdir(parents=True)
                break
            except FileExistsError:
                pass
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        (out / "history.json").touch(exist_ok=False)     # only one of two runs can
    except FileExistsError:
        sys.exit(f"{out} holds a run: go on with --resume {out}, or name another --out")
    return out


def reuse_freed_memory():
    """Let glibc keep freed memory, not map new pages: a step 8.05 -> 7.1 s on two Zen 3 cores."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)              # M_MMAP_MAX: no mappings ...
        libc.mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD: ... and nothing given back


def run(args, parser):
    """What the command line asks for: one run, a resumed one, or --runs of them."""
    fixed = ("epochs", "batch_size", "lr_max", "seed", "runs", "out")
    given = [f"--{name.replace('_', '-')}" for name in fixed if getattr(args, name) is not None]
    if args.resume and given:
        parser.error(f"--resume takes the run's own settings: leave out {', '.join(given)}")
    if (args.seed or 0) + (args.runs or 1) > 2**31:
        parser.error(f"--runs {args.runs}: there are no {args.runs} seeds from --seed on")
    checkpoint = read_checkpoint(Path(args.resume)) if args.resume else None
    settings = checkpoint["settings"] if checkpoint else {
        "data": "auto", "data_dir": "data", "epochs": args.epochs, "batch_size": args.batch_size,
        "lr_max": args.lr_max, "seed": args.seed or 0}
    settings["data"] = args.data or settings["data"]
    settings["data_dir"] = args.data_dir or settings["data_dir"]
    try:
        data = load(settings["data"], settings["data_dir"])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    size = [len(data.train_images), len(data.test_images), len(data.classes)]
    if settings.setdefault("size", size) != size:
        sys.exit(f"{data.name} has {size} images to train and test, and classes; this run has "
                 f"{settings['size']}: name its images with --data or --data-dir")
    settings["epochs"] = settings["epochs"] or data.epochs
    settings["batch_size"] = settings["batch_size"] or min(data.batch_size, size[0])
    if settings["batch_size"] > size[0]:
        parser.error(f"--batch-size {settings['batch_size']}: there are {size[0]} training images")

    if checkpoint:
        folder = Path(args.resume)
        return train(data, settings, checkpoint, folder if folder.is_dir() else folder.parent)
    out = make_folder(args.out)
    if not args.runs:
        return train(data, settings, None, out)
    results = []
    for seed in range(settings["seed"], settings["seed"] + args.runs):
        folder = make_folder(out / f"seed{seed}")
        results.append(train(data, {**settings, "seed": seed}, None, folder))
    if args.runs > 1:
        print(f"\n{args.runs} runs: {statistics.mean(results):.2%} +- "
              f"{statistics.stdev(results):.2%} (min {min(results):.2%}, max {max(results):.2%}), "
              f"averaged weights, last epoch")


def main():
    if hasattr(sys.stdout, "reconfigure"):               # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")     # a terminal may not know a letter
    os.environ["MPLBACKEND"] = "agg"                     # a notebook's may be missing here
    parser = make_parser()
    args = parser.parse_args()
    reuse_freed_memory()
    try:
        run(args, parser)
    except KeyboardInterrupt:
        print("\ninterrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: try a smaller --batch-size")
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
