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
import hashlib
import json
import math
import statistics
import sys
import time
from itertools import count, islice
from pathlib import Path

import torch
from matplotlib.figure import Figure      # unlike pyplot, it never needs a screen
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn
from tqdm import tqdm

import lrfinder
from data import Loader, load, normalisation
from model import (UserError, accuracy, autocast, fail, make_model, make_optimizer, make_scaler,
                   pick_device, precision, restore, run, save)
from onecycle import EPOCHS, PEAK_EPOCH, OneCycle, as_graph

LR_MAX = 0.1              # where the range test finds nothing: about what it found on a JPEG copy
AVERAGE_DECAY = 0.99      # d: an average over about the last 100 steps, one epoch
SAMPLE = 5120             # training images that give the average its BatchNorm statistics
DEMO_EPOCHS = 4           # on the 2,560 generated images, in batches of 128: 80 steps
CHECKPOINT = "settings", "history", "model", "average", "optimizer", "scaler"
ROW = ("{epoch:5}{lr:9.4f}{loss:8.4f}{train:9.2%}{raw:9.2%}{averaged:10.2%}{seconds:8.1f}"
       "{speed:10,.0f}")


def make_step(model, optimizer, scaler):
    """The function that trains on a batch: (inputs, labels) to (loss, how many right), tensors."""
    device = next(model.parameters()).device

    def step(inputs, labels):
        with autocast(device):
            log_probabilities = model(inputs)                                     # (B, classes)
            loss = torch.nn.functional.nll_loss(log_probabilities, labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), (log_probabilities.argmax(1) == labels).sum()

    # Where fp16 needs the scaler, every step asks the GPU whether it overflowed; no graph can.
    if device.type != "cuda" or scaler.is_enabled():
        return step
    for group in optimizer.param_groups:       # a graph would keep a number, but reads a tensor
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return as_graph(step)


def train_epoch(schedule, loader, seed, epoch, step, model, average):
    """Train for an epoch, refresh the average; return last learning rate, mean loss, accuracy."""
    device = loader.images.device
    weights, averages = list(model.parameters()), list(average.parameters())
    loss_sum, correct = torch.zeros(2, device=device)
    model.train()
    batches = tqdm(loader.epoch(seed, epoch), f"epoch {epoch + 1}", len(loader), leave=False,
                   disable=None)                         # None: no bar where it is no terminal
    for k, batch in enumerate(batches, start=epoch * len(loader)):
        lr = schedule.set(k)
        loss, right = step(*batch)
        # A shorter memory at the start (d = 0.1, 0.18, ...) forgets the untrained weights sooner.
        decay = min(AVERAGE_DECAY, (1 + k) / (10 + k))
        get_ema_multi_avg_fn(decay)(averages, weights, None)
        # Summed on the device: asking for a number here would make the GPU wait for Python.
        loss_sum += loss
        correct += right
    # No batch has run through these averaged weights yet: measure BatchNorm's statistics under them
    # (Izmailov et al., arXiv 1803.05407; they take all of the training images).
    with autocast(device):
        update_bn(islice(loader.epoch(seed, epoch), math.ceil(SAMPLE / loader.batch_size)), average)
    return lr, loss_sum.item() / len(loader), correct.item() / (len(loader) * loader.batch_size)


def find_lr_max(model, optimizer, scaler, loader, seed, out):
    """LRMAX by the range test on the training batches, or the documented constant."""
    start, device = time.time(), loader.images.device
    # Four epochs' worth, lest the search outweigh the training, but enough points to be read.
    steps = max(2 * lrfinder.FEWEST, min(lrfinder.STEPS, 4 * len(loader)))
    batches = (batch for e in count() for batch in loader.epoch(seed, e))
    with tqdm(batches, "range test", steps, leave=False, disable=None) as bar:
        curve = lrfinder.range_test(model, optimizer, torch.nn.functional.nll_loss, bar,
                                    steps=steps, scaler=scaler, autocast=lambda: autocast(device))
    found, words = lrfinder.report(curve, out / "lr_range.png")
    print(f"search    {len(curve.lrs)} steps in {time.time() - start:.0f} s: {words}"
          f"{'' if found else f'; going on with LRMAX {LR_MAX}'}", flush=True)
    return found.lr_max if found else LR_MAX


def parse():
    """The options that were given, by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     argument_default=argparse.SUPPRESS)
    parser.error, add = fail, parser.add_argument
    add("--data", metavar="SET", help="auto: CIFAR-10, downloaded if need be, else generated "
        "images (default); cifar10; synthetic; or an .npz with train_images, train_labels, "
        "test_images and test_labels: uint8 N x 32 x 32 x 3 and integers")
    add("--data-dir", metavar="DIR", help="where CIFAR-10 is, or is downloaded to (data)")
    add("--epochs", metavar="N", type=int, help=f"({EPOCHS}; on generated images {DEMO_EPOCHS})")
    add("--batch-size", metavar="N", type=int, help="(512; on generated images 128)")
    add("--lr-max", metavar="LR", type=float, help="LRMAX, instead of searching for it")
    add("--peak-epoch", metavar="E", type=float, help="epochs until LRMAX (5/24 of all)")
    add("--seed", metavar="N", type=int, help="(0)")
    add("--runs", metavar="N", type=int, help="train with N seeds, from --seed on; mean and std")
    add("--out", metavar="DIR", help="folder for the results (the first free one of runs/1, ...)")
    add("--resume", metavar="DIR", help="go on with the run in DIR, with its options")
    return vars(parser.parse_args())


def settle(given, resume, runs=1):
    """Settings, data set and checkpoint (None for a new run) from the options that were given."""
    checkpoint = restore(Path(resume, "checkpoint.pt"), *CHECKPOINT) if resume else None
    settings = {"data": "auto", "data_dir": "data", "seed": 0, "lr_max": None}
    if checkpoint:
        settings = checkpoint["settings"]
        for name in given.keys() - {"data", "data_dir"}:       # files may move: compared below
            if given[name] != settings[name]:
                raise UserError(f"--{name} {given[name]} differs from this run's {settings[name]}: "
                                f"leave it out, or start a new run".replace("_", "-"))
    settings = {**settings, **given}
    data = load(settings["data"], settings["data_dir"])
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in data[2:6])).hexdigest()
    if settings.setdefault("sha256", digest) != digest:
        raise UserError(f"{data.name} has other images than this run: name the same with --data")
    settings.setdefault("epochs", EPOCHS if data.real else DEMO_EPOCHS)
    settings.setdefault("batch_size", min(data.batch_size, len(data.train_images)))
    settings.setdefault("peak_epoch", settings["epochs"] * PEAK_EPOCH / EPOCHS)
    for name, least, most in (("epochs", 1, 10_000), ("batch_size", 1, len(data.train_images)),
                              ("peak_epoch", 0, settings["epochs"]), ("seed", 0, 2**32 - runs),
                              ("lr_max", 1e-9, 1e9)):
        if settings[name] is not None and not least <= settings[name] <= most:
            raise UserError(f"--{name.replace('_', '-')} {settings[name]}: it must lie in "
                            f"{least} .. {most}")
    return settings, data, checkpoint


def make_folder(out):
    """The folder of a new run: `out`, or where that is None the first free one of runs/1, ..."""
    free = (k for k in count(1) if not Path("runs", str(k)).exists())
    out = Path(out or f"runs/{next(free)}")
    if (out / "checkpoint.pt").exists():
        raise UserError(f"{out} holds a run: go on with --resume {out}, or name another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out} ({error.strerror}): name another --out") from error
    return out


def build(settings, data):
    """The parts that a checkpoint holds, by name, and the loaders of the two splits."""
    device = pick_device()
    model = make_model(device, settings["seed"], len(data.classes))
    parts = {"model": model, "average": copy.deepcopy(model),
             "optimizer": make_optimizer(model, lr=0),         # the schedule sets it
             "scaler": make_scaler(device)}
    same = (*normalisation(data.train_images), settings["batch_size"], precision(device), device)
    loaders = [Loader(data.train_images, data.train_labels, *same),
               Loader(data.test_images, data.test_labels, *same)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"device    {name}, {torch.get_num_threads()} threads; {precision(device)}, "
          f"channels_last, {loaders[0].augment.__name__}\n"
          f"data      {data.name}: {len(data.train_images):,} to train, {len(data.test_images):,} "
          f"to test, {len(data.classes)} classes{'' if data.real else '. THIS IS NOT CIFAR-10'}")
    return parts, *loaders


def train_run(settings, data, checkpoint, out):
    """A run, from its start or its checkpoint, to the results in `out`; returns the accuracy."""
    parts, train_loader, test_loader = build(settings, data)
    model, average, optimizer, scaler = parts.values()
    seed, epochs, steps = settings["seed"], settings["epochs"], len(train_loader)
    history = checkpoint["history"] if checkpoint else []
    for name, part in parts.items():
        if checkpoint and checkpoint[name]:
            part.load_state_dict(checkpoint[name])
    for group in optimizer.param_groups:               # the checkpoint's may be another device's
        group["fused"], group["lr"] = optimizer.defaults["fused"], float(group["lr"])
    if settings["lr_max"] is None:
        settings["lr_max"] = find_lr_max(model, optimizer, scaler, train_loader, seed, out)
    peak = min(round(settings["peak_epoch"] * steps), epochs * steps - 1)
    schedule = OneCycle(optimizer, epochs * steps, peak, settings["lr_max"])
    step = make_step(model, optimizer, scaler)
    print(f"schedule  {epochs} epochs of {steps} steps of {settings['batch_size']}: learning rate "
          f"{schedule.lr_min:.3g}, {schedule.lr_max:.3g} at step {peak}, {schedule.lr_min:.3g} at "
          f"the end; seed {seed}\nresults   {out}\n\n"
          f"epoch       lr    loss    train      raw  averaged       s  images/s")
    for row in history:
        print(ROW.format(**row))
    while True:
        save(out / "checkpoint.pt", {"settings": settings, "history": history,
                                     **{name: part.state_dict() for name, part in parts.items()}})
        if len(history) == epochs:
            return finish(settings, data, average, history, test_loader, out)
        start, epoch = time.time(), len(history)
        lr, loss, train_accuracy = train_epoch(schedule, train_loader, seed, epoch, step, model,
                                               average)
        seconds = time.time() - start
        # One look an epoch, at the weights too, since a loss only shows those before its step.
        if not math.isfinite(loss + get_total_norm(model.parameters())):
            raise UserError(f"epoch {epoch + 1} diverged (loss {loss:.3g}) and is not saved: try "
                            f"--lr-max {schedule.lr_max / 4:.2g}; {out} holds epoch {epoch}")
        history.append({"epoch": epoch + 1, "lr": lr, "loss": loss, "train": train_accuracy,
                        "raw": accuracy(model, test_loader),
                        "averaged": accuracy(average, test_loader), "seconds": seconds,
                        "speed": steps * settings["batch_size"] / seconds})
        print(ROW.format(**history[-1]), flush=True)


def finish(settings, data, average, history, test_loader, out):
    """Write the weights, the history and the curves; print and return the last epoch's accuracy."""
    last, flipped = history[-1], accuracy(average, test_loader, flip=True)
    save(out / "model.pt", {
        "weights": average.state_dict(), "classes": data.classes, "mean": test_loader.mean,
        "inverse_std": test_loader.inverse_std, "settings": settings, "last_epoch": last})
    (out / "history.json").write_text(json.dumps({**settings, "history": history}, indent=1))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, keys in zip(figure.subplots(1, 2), (["loss"], ["averaged", "raw", "train"])):
        for key in keys:
            ax.plot([row["epoch"] for row in history], [row[key] for row in history], label=key)
        ax.set(xlabel="epoch", ylabel="training loss" if keys == ["loss"] else "accuracy")
    ax.legend()                                  # of the accuracies, drawn last
    figure.savefig(out / "curves.png", dpi=100)
    print(f"\nlast epoch: {last['averaged']:.2%} of the test set right with averaged weights, "
          f"{last['raw']:.2%} with raw ones\n(not the result: {flipped:.2%} with each image and "
          f"its mirror image averaged)\n{out} holds model.pt, history.json and curves.png")
    if not data.real:
        print(f"THIS IS NOT CIFAR-10 but {data.name}; --data in -h tells how to get the real ones")
    return last["averaged"]


def main():
    given = parse()
    out, runs, resume = (given.pop(name, None) for name in ("out", "runs", "resume"))
    if resume and (out or runs) or runs is not None and runs < 1:
        raise UserError("--runs must be 1 or more, and --resume goes without --runs and --out")
    settings, data, checkpoint = settle(given, resume, runs or 1)
    folder, results = Path(resume) if resume else make_folder(out), []
    try:
        for seed in range(settings["seed"], settings["seed"] + (runs or 1)):
            out = make_folder(folder / f"seed{seed}") if runs else folder
            results.append(train_run({**settings, "seed": seed}, data, checkpoint, out))
    except KeyboardInterrupt:
        print(f"\ninterrupted: every finished epoch is saved; go on with --resume {out}"
              f"{', for this seed alone' * bool(runs)}" if (out / "checkpoint.pt").exists() else
              "\ninterrupted with nothing to save yet", file=sys.stderr)
        sys.exit(130)
    if len(results) > 1:
        print(f"\n{runs} runs: {statistics.mean(results):.2%} +- {statistics.stdev(results):.2%} "
              f"(min {min(results):.2%}, max {max(results):.2%}), averaged weights, last epoch")


if __name__ == "__main__":
    run(main)
