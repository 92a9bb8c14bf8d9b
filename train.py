"""Train CustomResNet on CIFAR-10 with one cycle of the learning rate: 24 epochs, batch 512.

    python train.py                     finds LRMAX by a range test, then trains; see -h
    python train.py --optimizer sgd     the assignment's own optimizer in place of Muon
    python train.py --resume runs/1     continues an interrupted run as if it had never stopped
                                        (bit for bit on a CPU with the same number of threads)

At the end of the cycle the rate is still LRMAX / 10, and the weights jitter. Their exponential
moving average (EMA) does not: its accuracy after the last epoch is the result.
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

# The recipe: an experiment is one edited line. Constants shared with the range test are in
# model.py; batch size, epochs and width belong to the data set (`Dataset` in data.py).
PEAK = 5 / 24             # the fraction of the run at which the learning rate peaks
LR_MAX = 0.1              # if the range test finds nothing: about its usual answer with Muon
AVERAGE_DECAY = 0.99      # d: the average reflects mostly the last 100 steps, one epoch
SWEEP = 100               # batches of the range test; a slower sweep reads a lower LRMAX
SAMPLE = 5120             # training images that give the average its BatchNorm statistics


# ------------------------------------------------------------------------------------ the loop

def train(loader, settings, out, checkpoint=None):
    """Train from scratch or from a checkpoint; write the results to the folder `out`.

    Returns the test accuracy of the averaged weights after the last epoch, a fraction.
    """
    net, optimizer, scaler = set_up(loader, settings)
    average, seed, epochs = copy.deepcopy(net), settings["seed"], settings["epochs"]
    parts = {"net": net, "average": average, "optimizer": optimizer, "scaler": scaler}
    history = begin_run(out, settings, parts, checkpoint)
    if settings["lr_max"] is None:
        found = find_lr_max(net, optimizer, scaler, loader, seed, out / "lr_range.png")
        settings["lr_max"] = found.lr_max if found else LR_MAX
    total = epochs * len(loader)
    schedule = OneCycle(optimizer, total, min(round(total * PEAK), total - 1), settings["lr_max"])
    step = make_step(net, optimizer, scaler)
    print_header(schedule, total, settings, out, history)

    saved = time.perf_counter()
    for epoch in range(len(history), epochs):
        row = train_epoch(net, average, step, schedule, loader, seed, epoch)
        stop_if_diverged(row, net, settings)
        measure_statistics(average, loader, seed, epoch)
        row["raw"] = accuracy(net, loader.test())
        row["averaged"] = accuracy(average, loader.test())
        history.append(row)
        print(ROW.format(**row), flush=True)
        if epoch + 1 == epochs or time.perf_counter() - saved >= SAVE_EVERY:
            save_run(out, settings, history, parts)
            saved = time.perf_counter()

    finish_run(out, settings, history, schedule, average, loader)
    return history[-1]["averaged"]                       # of the last epoch, never of the best


def train_epoch(net, average, step, schedule, loader, seed, epoch):
    """Train on every batch of an epoch, averaging the weights; return its row of the results."""
    start, loss_sum, correct = time.perf_counter(), 0, 0
    net.train()
    batches = tqdm(loader.epoch(seed, epoch), f"epoch {epoch + 1}", len(loader), leave=False,
                   disable=None)                         # None: no bar unless on a terminal
    for k, (inputs, labels) in enumerate(batches, start=epoch * len(loader)):
        lr = schedule.set(k)
        loss, hits = step(inputs, labels)                # forward, backward, optimizer
        update_average(average, net, k)                  # a <- d a + (1 - d) w
        # Not read here: Python would wait for the GPU, and then the GPU for Python.
        loss_sum += loss
        correct += hits
    images, loss = len(loader) * loader.batch_size, float(loss_sum) / len(loader)
    seconds = time.perf_counter() - start
    return {"epoch": epoch + 1, "lr": lr, "loss": loss, "train": int(correct) / images,
            "seconds": seconds, "speed": images / seconds}


def make_step(net, optimizer, scaler, loss_function=nll_loss):
    """The function that trains on a batch: (inputs, labels) to (loss, number correct), tensors."""
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

    # A CUDA graph cannot stop to read a value back. The scaler must read whether fp16 overflowed,
    # and torch's optimizers read the learning rate, unless they are capturable, or fused SGD.
    stays_on_gpu = optimizer.defaults.get("capturable", optimizer.defaults.get("fused"))
    if device.type != "cuda" or scaler.is_enabled() or not stays_on_gpu:
        return step
    for group in optimizer.param_groups:       # a number would be frozen into the recording
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return as_graph(step)


def as_graph(step, warmup=3):
    """`step`, recorded as a CUDA graph after `warmup` calls, and from then on replayed.

    step: a function of tensors that returns tensors, whose shapes never change. A step is hundreds
    of kernels, and launching them from Python may take longer than running them; a graph is one
    launch. It reads and writes the same memory each time: a batch is copied there, and the results
    are valid until the next call.
    """
    graph, calls, inputs, outputs = torch.cuda.CUDAGraph(), count(), [], []

    def replay(*batch):
        if next(calls) < warmup:               # cuDNN, cuBLAS and the optimizer initialise
            return step(*batch)
        if not inputs:
            inputs.extend(tensor.clone() for tensor in batch)
            # Recording executes nothing. Graphs of one stream would share cuBLAS's workspace, and
            # spoil each other, so this one gets its own.
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(inputs[0].device)):
                outputs.extend(step(*inputs))
        for recorded, tensor in zip(inputs, batch):
            recorded.copy_(tensor)
        graph.replay()
        return outputs

    return replay


@torch.no_grad()
def update_average(average, net, k):
    """a <- d a + (1 - d) w. At first d is 0.1, 0.18, ...: untrained weights are soon forgotten."""
    decay = min(AVERAGE_DECAY, (1 + k) / (10 + k))
    for a, w in zip(average.parameters(), net.parameters()):
        a.lerp_(w, 1 - decay)


def measure_statistics(net, loader, seed, epoch):
    """Measure BatchNorm's means and variances under the weights as they are now.

    No batch has run through averaged weights yet. update_bn forgets the old statistics, and
    averages over the batches that it is given: here a tenth of the images; all of them in
    Izmailov et al., arXiv 1803.05407.
    """
    sample = islice(loader.epoch(seed, epoch), math.ceil(SAMPLE / loader.batch_size))
    with autocast(loader.device):
        update_bn(sample, net)


@torch.no_grad()
def accuracy(net, batches, flip=False):
    """The fraction of images classified correctly; flip: average each with its mirror image."""
    net.eval()
    correct, seen = 0, 0
    for inputs, labels in batches:
        with autocast(inputs.device):
            probabilities = net(inputs).exp()                                     # (B, classes)
            if flip:
                probabilities = probabilities + net(inputs.flip(3)).exp()
        correct += (probabilities.argmax(1) == labels).sum()
        seen += len(labels)
    return int(correct) / seen


def find_lr_max(net, optimizer, scaler, loader, seed, path, loss_function=nll_loss):
    """The Suggestion of a range test on the training batches, or None; net is left as it was."""
    start = time.perf_counter()
    batches = (batch for epoch in count() for batch in loader.epoch(seed, epoch))

    def loss(batch):
        inputs, labels = batch
        with autocast(loader.device):
            return loss_function(net(inputs), labels)

    with tqdm(batches, "range test", SWEEP, leave=False, disable=None) as bar:
        curve = lrfinder.range_test(net, optimizer, loss, bar, steps=SWEEP, scaler=scaler)
    found, message = lrfinder.report(curve, path)
    seconds = time.perf_counter() - start
    print(f"range     {len(curve.lrs)} steps in {seconds:.0f} s, to train up to LRMAX: {message}",
          flush=True)
    return found


def set_up(loader, settings):
    """The network, optimizer and scaler that training and the range test start from."""
    data, device = loader.data, loader.device
    net = make_model(device, settings["seed"], len(data.classes), data.width)
    return net, make_optimizer(net, settings["optimizer"]), make_scaler(device)


# --------------------------- the lesson ends here; below, output, pictures, files, command line

SAVE_EVERY = 10           # seconds, at least, between two checkpoints
HEADER = "epoch       lr    loss    train      raw  averaged       s  images/s"
ROW = ("{epoch:5}{lr:9.4f}{loss:8.4f}{train:9.2%}{raw:9.2%}{averaged:10.2%}{seconds:8.1f}"
       "{speed:10,.0f}")


def print_device(loader):
    data, device = loader.data, loader.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"device    {name}, {torch.get_num_threads()} threads; {loader.dtype}, "
          f"{loader.augment.__name__}\n"
          f"data      {data.name}: {len(data.train_images):,} to train, {len(data.test_images):,} "
          f"to test, {len(data.classes)} classes; width {data.width}")


def print_header(schedule, total, settings, out, history):
    """Print the schedule, and the table's head with the epochs that a resumed run already has."""
    epochs, peak = settings["epochs"], schedule.cycle[1]
    print(f"schedule  {settings['optimizer']}, {epochs} epochs of {total // epochs} steps of "
          f"{settings['batch_size']}: LRMIN {schedule.at(0):.3g}, LRMAX {schedule.at(peak):.3g} at "
          f"step {peak}, LRMIN {schedule.at(total - 1):.3g} at the end; seed {settings['seed']}\n"
          f"results   {out}\n\n{HEADER}")
    for row in history:
        print(ROW.format(**row))


def stop_if_diverged(row, net, settings):
    if not (math.isfinite(row["loss"]) and all(w.isfinite().all() for w in net.parameters())):
        sys.exit(f"epoch {row['epoch']} diverged (loss {row['loss']:.3g}) and is not saved: try "
                 f"--lr-max {settings['lr_max'] / 4:.2g}")


def finish_run(out, settings, history, schedule, average, loader):
    """Print the result, then write the weights and the pictures."""
    data, last, flipped = loader.data, history[-1], accuracy(average, loader.test(), flip=True)
    print(f"\ntest accuracy after the last epoch: {last['averaged']:.2%} with averaged weights, "
          f"{last['raw']:.2%} with raw ones\n(not the result: {flipped:.2%}, averaged over each "
          f"image and its mirror image)", flush=True)
    save(out / "model.pt", {
        "weights": average.state_dict(), "classes": data.classes, "width": data.width,
        "mean": loader.mean.cpu(), "inverse_std": loader.inverse_std.cpu(), "settings": settings,
        "last_epoch": last})
    plot_curves(history, schedule, len(loader), data, out / "curves.png")
    plot_mistakes(average, loader, out / "mistakes.png")
    print(f"{out} holds {', '.join(sorted(path.name for path in out.iterdir()))}")
    if not data.real:
        print(f"THIS IS NOT CIFAR-10 but {data.name}; --data in -h says how to get it")


# ------------------------------------------------------------------------------------ pictures

def new_figure(width, height):
    """A matplotlib Figure on white, which, unlike pyplot, needs no screen."""
    from matplotlib.figure import Figure         # takes half a second: only where it is needed
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plot_curves(history, schedule, steps, data, path):
    """Accuracy and loss against the epoch, with the learning rate underneath."""
    epochs = [row["epoch"] for row in history]
    rates = [schedule.at(k) for k in range(len(history) * steps)]
    figure = new_figure(8, 6)
    top, middle, below = axes = figure.subplots(3, 1, height_ratios=(3, 1, 1), sharex=True)
    marker = "o" if len(history) == 1 else ""            # a line through one point shows nothing
    for key, style in (("averaged", "-"), ("raw", "--"), ("train", ":")):
        top.plot(epochs, [100 * row[key] for row in history], marker + style, label=key)
    if data.name == "CIFAR-10":
        top.axhline(90, color="grey", linewidth=0.8)     # what the assignment asks for
    top.set(ylabel="accuracy in %",
            title="test accuracy: averaged and raw weights; train: augmented images")
    top.legend(loc="lower right")
    middle.plot(epochs, [row["loss"] for row in history], marker + "-", color="tab:red")
    middle.set(ylabel="training loss", ylim=(0, None))
    below.plot([k / steps for k in range(len(rates))], rates, color="black")
    below.set(xlabel="epoch", ylabel="learning rate", ylim=(0, 1.5 * max(rates)))
    peak = rates.index(max(rates)) / steps
    below.annotate(f"LRMAX {max(rates):.3g}", (peak, max(rates)), (6, 2),
                   textcoords="offset points")
    for ax in axes:
        ax.axvline(peak, color="grey", linewidth=0.8)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def plot_mistakes(net, loader, path):
    """The 16 most confident mistakes, and the accuracy of each class (of 20 at most)."""
    data, figure = loader.data, new_figure(9, 5)
    net.eval()
    with autocast(loader.device):
        outputs = torch.cat([net(inputs).cpu() for inputs, _ in loader.test()])   # (N, classes)
    confidence, guess = outputs.exp().max(1)
    wrong = guess != data.test_labels
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    surest = sorted(wrong.nonzero()[:, 0].tolist(), key=lambda k: -confidence[k])
    for place, k in enumerate(surest[:16], start=1):
        ax = left.add_subplot(4, 4, place)
        ax.imshow(data.test_images[k].numpy())
        ax.set_axis_off()
        ax.set_title(f"{data.classes[guess[k]]} {confidence[k]:.0%}\n"
                     f"is {data.classes[data.test_labels[k]]}", fontsize=8, parse_math=False)
    present = data.test_labels.unique().tolist()
    correct = {c: 100 * (~wrong[data.test_labels == c]).float().mean().item() for c in present}
    shown = sorted(sorted(present, key=correct.get)[:20])        # more would not be legible
    ax = right.subplots()
    bars = ax.barh(range(len(shown)), [correct[c] for c in shown])
    ax.bar_label(bars, fmt="%.1f", padding=2)
    ax.set_yticks(range(len(shown)), [data.classes[c] for c in shown], parse_math=False)
    ax.invert_yaxis()
    ax.set(xlabel="accuracy in %", xlim=(0, 125), xticks=(0, 50, 100),
           title="by class" if len(shown) == len(present) else "the 20 worst classes")
    figure.savefig(path, dpi=100)


# --------------------------------------------------------------------------- files of a run

def begin_run(out, settings, parts, checkpoint):
    """Load the checkpoint into the parts, or claim the folder of a new run; return the history."""
    if checkpoint:
        # The schedule sets the rates, and the code the constants: neither is restored.
        checkpoint["optimizer"]["param_groups"] = parts["optimizer"].state_dict()["param_groups"]
        for name, part in parts.items():
            if checkpoint[name]:                         # empty where a scaler does nothing
                part.load_state_dict(checkpoint[name])
        return checkpoint["history"]
    if (out / "checkpoint.pt").exists():
        sys.exit(f"{out} already holds a run: continue it with --resume {out}, or choose another "
                 f"--out")
    out.mkdir(parents=True, exist_ok=True)
    save_run(out, settings, [], parts)                   # --resume works from here on
    return []


def save_run(out, settings, history, parts):
    """Write history.json, which people read, and checkpoint.pt, which --resume reads."""
    (out / "history.json").write_text(json.dumps({**settings, "history": history}, indent=1))
    states = {name: part.state_dict() for name, part in parts.items()}
    save(out / "checkpoint.pt", {"settings": settings, "history": history, **states})


def save(path, content):
    """Write to a temporary file, then rename: path always holds a complete file, old or new."""
    aside = path.with_suffix(".partial")
    try:
        torch.save(content, aside)
        for patience in (0.1, 0.5, 2):                   # Windows: a virus scanner may hold it
            try:
                return os.replace(aside, path)
            except PermissionError:
                time.sleep(patience)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:             # torch.save raises both
        aside.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({error}); what was saved before is intact")


def read_checkpoint(path):
    """What save_run wrote, checksums verified (torch.load does not), no code executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        names = "settings", "history", "net", "average", "optimizer", "scaler"
        return {name: content[name] for name in names}
    except FileNotFoundError:
        sys.exit(f"there is no {path} to resume from")
    except Exception as error:                           # damage raises a dozen kinds of error
        sys.exit(f"{path} is damaged, or not a checkpoint of train.py ({error})")


def free_folder():
    """Make the first free one of runs/1, runs/2, ..."""
    Path("runs").mkdir(exist_ok=True)
    for k in count(1):
        try:
            Path(f"runs/{k}").mkdir()
            return Path(f"runs/{k}")
        except FileExistsError:
            pass


# ------------------------------------------------------------------------------ the command line

LIMITS = {"epochs": (1, 10_000), "batch_size": (1, 10**6), "lr_max": (1e-9, 1e9),
          "seed": (0, 2**62), "runs": (1, 10_000)}


def make_parser(only_search):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, description=(
        lrfinder.__doc__ if only_search else __doc__).split("\n")[0])
    add, path = parser.add_argument, os.path.expanduser
    add("--data", metavar="SET", type=path, help="auto (default): CIFAR-10, downloaded if need "
        "be, else drawn shapes; cifar10; synthetic: drawn shapes; or an .npz with train_images, "
        "train_labels, test_images and test_labels: uint8 N x 32 x 32 x 3 and integers")
    add("--data-dir", metavar="DIR", type=path,
        help="where CIFAR-10 is, or is downloaded to (default: data)")
    add("--optimizer", choices=("muon", "sgd"), help="(default: muon)")
    add("--batch-size", metavar="N", type=int, help="(512, or all images if fewer; shapes: 64)")
    add("--seed", metavar="N", type=int, help="(default: 0)")
    if not only_search:
        add("--epochs", metavar="N", type=int, help="(24; shapes: 8)")
        add("--lr-max", metavar="LR", type=float, help="use this LRMAX, skip the range test")
        add("--runs", metavar="N", type=int,
            help="train with N seeds, starting at --seed; print mean and std")
        add("--out", metavar="DIR", type=path,
            help="folder for the results (the first free one of runs/1, ...)")
        add("--resume", metavar="DIR", type=path, help="continue the run in DIR (one of "
            "--runs: DIR/seedN); only --data and --data-dir may be combined with it")
    return parser


def run(parser, only_search):
    """What the command line asks for: one run, a resumed one, --runs of them, or a range test."""
    given = vars(parser.parse_args())                    # without what was left out
    for name, (least, most) in LIMITS.items():
        if not least <= given.get(name, least) <= most:
            parser.error(f"--{name.replace('_', '-')} must be from {least} to {most}")
    if "resume" in given and given.keys() - {"resume", "data", "data_dir"}:
        parser.error("--resume takes the run's own settings: leave out all but --data, --data-dir")
    out, runs, resume = given.pop("out", None), given.pop("runs", None), given.pop("resume", None)
    settings = {"data": "auto", "data_dir": "data", "optimizer": "muon", "lr_max": None, "seed": 0}
    if resume:
        folder = Path(resume.removesuffix("checkpoint.pt"))
        checkpoint = read_checkpoint(folder / "checkpoint.pt")
        settings |= checkpoint["settings"]
    settings |= given
    try:
        data, device = load(settings["data"], settings["data_dir"]), pick_device()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    settings = {"epochs": data.epochs, "batch_size": data.batch_size, **settings}
    size = [len(data.train_images), len(data.test_images), len(data.classes)]
    if settings.setdefault("size", size) != size:
        sys.exit(f"{data.name} has {size} training images, test images and classes, but the run "
                 f"{settings['size']}: point --data or --data-dir at the run's own")
    loader = Loader(data, settings["batch_size"], precision(device), device)
    settings["batch_size"] = loader.batch_size
    print_device(loader)

    if only_search:                                      # python lrfinder.py
        found = find_lr_max(*set_up(loader, settings), loader, settings["seed"],
                            Path("lr_range.png"))
        sys.exit(not found)
    if resume:
        return train(loader, settings, folder, checkpoint)
    folder, results = Path(out) if out else free_folder(), []
    for seed in range(settings["seed"], settings["seed"] + (runs or 1)):
        results.append(train(loader, {**settings, "seed": seed},
                             folder / f"seed{seed}" if runs else folder))
    if len(results) > 1:
        print(f"\n{runs} runs: {statistics.mean(results):.2%} +- {statistics.stdev(results):.2%} "
              f"(min {min(results):.2%}, max {max(results):.2%}), averaged weights, last epoch")


def reuse_freed_memory():
    """Let glibc keep freed memory instead of mapping new pages, which take time to clear.

    On two CPU cores an epoch takes a fifth longer without it (docs/measurements.md).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)              # M_MMAP_MAX: no mappings ...
        libc.mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD: ... and nothing given back


def main(only_search=False):
    if hasattr(sys.stdout, "reconfigure"):                    # a notebook's lacks it
        sys.stdout.reconfigure(errors="backslashreplace")     # some cannot print every letter
    if not hasattr(sys, "ps1"):                               # leave a notebook's memory alone
        reuse_freed_memory()
    try:
        run(make_parser(only_search), only_search)
    except KeyboardInterrupt:
        hint = "" if only_search else ": --resume continues from the last checkpoint"
        print(f"\ninterrupted{hint}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: try a smaller --batch-size")
    except OSError as error:
        sys.exit(f"error: {error}" + ("" if only_search else "; --out DIR starts a run elsewhere"))


if __name__ == "__main__":
    main()
