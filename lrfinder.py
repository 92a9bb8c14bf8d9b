r"""The LR range test: find a good learning rate for one cycle, before training.

Train for a few hundred batches while the learning rate grows from far too small to far too large,
and look at the loss (after Smith, arXiv 1506.01186, section 3.3; Smith raises the rate linearly and
watches the accuracy):

    loss ------.                           steepest  the loss falls fastest against log(lr)
                \               /          LRMAX     the end of the descent: the lowest point
                 \             /                     before the first clear rise
                  `-.       _.'            stop      half of the gain is lost again, or the
             steepest `----' LRMAX  stop             loss explodes, or is not finite

    sweep    lr_k = lr_start * (lr_end / lr_start) ^ (k / (steps - 1)),    k = 0 .. steps - 1
    LRMAX    the rate at the minimum of the smoothed curve before the first rise that exceeds both
             15 % of the whole fall and the noise; of points tied within the noise, the last
    lr       LRMAX / 2, the peak to train with after a sweep of 400 steps
    LRMIN    LRMAX / 10, where a cycle up to LRMAX starts (Smith, arXiv 1803.09820, section 4.1)

At LRMAX the loss stops falling; in a faster sweep it does so at a higher rate. Half the LRMAX of
400 steps was a good peak for seven small models in batches of 32 (docs/measurements.md has the
table). train.py sweeps in 100 steps and goes up to LRMAX: with Muon, at half size, too high a rate
cost less than too low a one (two or three runs of each).

    def loss(batch):                     # as in training; on a GPU it moves the batch there
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    curve = range_test(model, optimizer, loss, loader)
    found, message = report(curve, "lr_range.png")
    print(message)                       # lr ... LRMAX ... LRMIN ... steepest ..., or what to try

This file stands alone: it needs torch and numpy, and matplotlib to draw. For Adam, sweep
from lr_start=1e-5 to lr_end=1.

    python lrfinder.py       only the range test that train.py runs; see -h (needs the other files)
"""
import contextlib
import copy
import math
import random
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch

FEWEST = 10               # points that a curve needs
HALF_WINDOW = 7           # points to either side when smoothing; at least n / 20, at most n / 4
MEDIAN = 5                # points in the running median: two outliers do not move it
RISE = 0.15               # of the whole fall: a smaller rise does not end the descent
FALL = 0.10               # of the starting loss: a curve that falls less shows nothing
REBOUND = 0.5             # of the gain: once this much is lost again, the sweep can end
RUNAWAY = 3.0             # without a gain: stop when the loss has risen by 3 times its start
SIGNIFICANT = 6.0         # standard deviations: a larger difference is not noise
TIED = 1.0                # standard deviation: a smaller difference is a tie


class NotFound(ValueError):
    """The curve is inconclusive; the message says why and what to try, in one line."""


class Curve(NamedTuple):
    """What a range test measured: the raw loss at each learning rate, lists of equal length.

    ended: "", or why the sweep ended early and what to try. (Stopping because LRMAX was passed does
    not count.)
    """
    lrs: list
    losses: list
    ended: str = ""


class Suggestion(NamedTuple):
    """The learning rates that `suggest` read off a curve."""
    lr: float                 # LRMAX / 2: the peak to train with, if the sweep had 400 steps
    lr_max: float             # where the descent ends
    lr_min: float             # LRMAX / 10, where a cycle up to it starts and ends
    steepest: float


# -------------------------------------------------------------------------------------- the sweep

def range_test(model, optimizer, loss, batches, *, lr_start=0.001, lr_end=10.0, steps=400,
               scaler=None):
    """Train on `batches` with a growing learning rate and return the Curve; restore everything.

    Point k is the loss of batch k *before* the step with lr_k. lr_k applies to the parameter group
    with the largest rate; the others keep their ratio to it. A model in training mode keeps the
    mode of each layer, so frozen ones stay frozen. The sweep ends early when LRMAX has been passed
    (see `enough`), when a loss is not finite (it is dropped), or when a generator is exhausted.

    model: an nn.Module that holds everything that is trained, even a loss's parameters (use
    nn.ModuleList). optimizer: its optimizer. loss(batch): the scalar loss of a batch, computed as
    in training; it moves the batch to the GPU and applies autocast, if training does. batches: an
    iterable, restarted when exhausted. steps: the fewer, the higher LRMAX, about as
    1 / sqrt(steps); Suggestion.lr is meant for 400. scaler: a GradScaler for mixed precision.
    Under DistributedDataParallel call it on every rank; it averages the losses.
    ValueError: an impossible sweep or optimizer.
    """
    if not 0 < lr_start < lr_end or steps < 2:
        raise ValueError("a sweep needs 0 < lr_start < lr_end and at least 2 steps")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS computes the loss several times a step: test another optimizer")
    groups = optimizer.param_groups
    # A warm-up scheduler may have zeroed a rate; it stores the original in initial_lr.
    rates = [float(group["lr"] or group.get("initial_lr", 0)) for group in groups]
    if not max(rates) > 0:
        raise ValueError(f"the optimizer's learning rates are {rates}: give it one above 0")
    scaler = copy.deepcopy(scaler) or torch.amp.GradScaler(enabled=False)   # disabled: a no-op
    lrs, losses, ended = np.geomspace(lr_start, lr_end, steps).tolist(), [], ""
    with everything_restored(model, optimizer):
        if not model.training:
            model.train()
        for lr, batch in zip(lrs, chain.from_iterable(repeat(batches, steps))):   # over and over
            for group, rate in zip(groups, rates):
                group["lr"] = lr * rate / max(rates)
            value = loss(batch)
            number = mean_over_ranks(model, value)
            if not math.isfinite(number):
                ended = "the next loss was not finite; start the sweep lower or use more steps"
                break
            losses.append(number)
            if enough(losses):
                break
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            if len(losses) < steps:
                ended = (f"got only {len(losses)} of {steps} batches; pass a DataLoader, an "
                         f"endless iterator, or fewer steps")
    return Curve(lrs[:len(losses)], losses, ended)


def enough(losses):
    """Has LRMAX been passed? Half of the gain is lost again, or the loss explodes.

    The usual rule, 4 times the lowest loss, fails in two ways: with batch normalisation the loss
    may never rise as far, as the weights' scale does not matter; and when it is almost 0, noise
    alone triggers it. This one compares medians of 5 losses, so no single bad batch decides.
    """
    if len(losses) < FEWEST + MEDIAN:
        return False
    medians = np.median(np.reshape(losses[len(losses) % MEDIAN:], (-1, MEDIAN)), axis=1)
    start, lowest = np.median(losses[:FEWEST]), min(medians)
    gained = start - lowest
    # abs: a loss may be negative, such as -log of a density.
    threshold = REBOUND * gained if gained > FALL * abs(start) else gained + RUNAWAY * abs(start)
    # The noise of the last third too: before anything is learned, batches hardly differ.
    sigma = max(noise(losses), noise(losses[len(losses) * 2 // 3:]))
    return medians[-1] - lowest > max(threshold, SIGNIFICANT * sigma)


# ------------------------------------------------------------------------------------ the reading

def suggest(curve):
    """The Suggestion that a Curve shows, or NotFound with what to try."""
    def not_found(what, hint):
        return NotFound(f"{what}: {curve.ended or hint}")

    lrs, losses = curve.lrs, curve.losses
    if len(losses) < FEWEST:
        raise not_found(f"the sweep has only {len(losses)} of the {FEWEST} points needed",
                        "start it at a lower learning rate or use more steps")
    smoothed, half = smooth(losses), half_window(len(losses))
    # After smoothing about 3 / (4 (half + 1)) of a single loss's variance is left.
    sigma = noise(losses) * math.sqrt(0.75 / (half + 1))
    start = smoothed[half]                                # the mean of the first points
    fall = start - min(smoothed)
    if fall <= max(FALL * abs(start), SIGNIFICANT * sigma):
        raise not_found("the loss never falls clearly", "start the sweep lower, use larger batches "
                        "or more steps, or check model and data")
    # Walk along the curve and keep the lowest point so far, until the loss is clearly above it; but
    # only once half of the fall is behind us, so that an early spike does not end the descent.
    best = 0
    for k, value in enumerate(smoothed):
        if value < smoothed[best]:
            best = k
        elif (start - smoothed[best] > fall / 2
              and value - smoothed[best] > max(RISE * fall, SIGNIFICANT * sigma)):
            break
    else:                                 # no break (if there was one, k marks the clear rise)
        raise not_found("the loss falls to the end of the sweep", "raise its highest learning rate")
    if best < half:                                       # even `start` lies after the minimum
        raise not_found("the loss only rises", "start the sweep lower")
    # In a flat valley noise picks the lowest point: take the last of those that tie with it.
    best = max(j for j in range(best, k) if smoothed[j] <= smoothed[best] + TIED * sigma)
    slopes = np.gradient(smoothed, np.log(lrs))[half:best + 1]       # before, hardly smoothed
    return Suggestion(lr=lrs[best] / 2, lr_max=lrs[best], lr_min=lrs[best] / 10,
                      steepest=lrs[half + np.argmin(slopes)])


def smooth(losses):
    """Medians of 5, then a centred average of each with its neighbours, weighting near ones more.

    The medians remove outliers, which an average would smear out. Being centred, the average does
    not lag as a running one does. The weights are cos^2, a Hann window, which shrinks on both sides
    near the ends.
    """
    beside = MEDIAN // 2
    medians = [np.median(losses[max(0, k - beside):k + beside + 1]) for k in range(len(losses))]
    smoothed = []
    for k in range(len(losses)):
        reach = min(half_window(len(losses)), k, len(losses) - 1 - k)
        weights = np.cos(math.pi / 2 * np.arange(-reach, reach + 1) / (reach + 1)) ** 2
        smoothed.append(np.average(medians[k - reach:k + reach + 1], weights=weights))
    return smoothed


def half_window(n):
    return max(n // 20, min(HALF_WINDOW, n // 4))


def noise(losses):
    """The standard deviation of a single loss around the curve, whatever its shape.

    Second differences cancel linear trends and have 1 + 4 + 1 = 6 times the variance of a loss.
    Their median size, unlike their mean square, is insensitive to outliers and to the end of a
    divergence; for normal noise it is 0.6745 standard deviations.
    """
    return np.median(np.abs(np.diff(losses, 2))) / 0.6745 / math.sqrt(6)


# ------------------ the lesson ends here; below, the picture, and how everything is restored

def plot(curve, ax, suggestion=None):
    """Draw the raw curve faint and the smoothed one bold, and mark the suggestion."""
    ax.plot(curve.lrs, curve.losses, color="tab:blue", alpha=0.4, linewidth=1, label="raw loss")
    ax.plot(curve.lrs, smooth(curve.losses), color="tab:blue", linewidth=2.5, label="smoothed")
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    if suggestion:
        for name, lr, color, style in (("LRMIN", suggestion.lr_min, "tab:green", "--"),
                                       ("steepest", suggestion.steepest, "dimgrey", ":"),
                                       ("lr", suggestion.lr, "tab:green", "-"),
                                       ("LRMAX", suggestion.lr_max, "tab:red", "-")):
            ax.axvline(lr, color=color, linestyle=style, label=f"{name} {lr:.3g}")
        ax.axvspan(suggestion.lr_min, suggestion.lr_max, color="tab:green", alpha=0.1)
        # A divergence would flatten everything else: show as much above the start as below.
        start = np.median(curve.losses[:FEWEST])
        ax.set_ylim(top=min(ax.get_ylim()[1], 2 * start - min(curve.losses)))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, fontsize="small", frameon=False,
              columnspacing=1.2, handlelength=1.5)


def report(curve, path):
    """Plot the curve to the file `path`; return (Suggestion or None, one line of text).

    If the picture cannot be drawn or written, the answer is still returned; the text says why.
    """
    try:
        found = suggest(curve)
        message = (f"lr {found.lr:.3g} LRMAX {found.lr_max:.3g} LRMIN {found.lr_min:.3g} "
                   f"steepest {found.steepest:.3g}")
    except NotFound as problem:
        found, message = None, f"not found: {problem}"
    try:
        from matplotlib.figure import Figure              # unlike pyplot, it needs no screen
        figure = Figure(figsize=(7.2, 4), layout="constrained", facecolor="white")
        plot(curve, figure.subplots(), found)
        figure.savefig(path, dpi=110)
    except (ImportError, OSError, ValueError) as problem:
        message += f" (no picture: {problem})"
    return found, message


@contextlib.contextmanager
def everything_restored(model, optimizer):
    """Restore, bit for bit and even after an exception, everything that training changes.

    Parameters and buffers of the model, and any further parameters of the optimizer; gradients;
    train/eval flags; the optimizer's state and settings; the random states of Python, numpy, the
    CPU and every CUDA GPU. Not restored: other attributes, such as a counter in `forward`; the
    random states of Apple GPUs and custom generators.
    """
    parameters = {*model.parameters(), *(p for g in optimizer.param_groups for p in g["params"])}
    dicts = [optimizer.state, *optimizer.param_groups, *(m._buffers for m in model.modules())]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None),   # DDP reuses them
               *(v for d in dicts for v in d.values() if torch.is_tensor(v))]
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise ValueError("the model has lazy layers: run a batch through it first, so that "
                         "its parameters exist")
    # ExitStack runs every callback in reverse order, even if one raises.
    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for parameter in parameters:
            undo.callback(setattr, parameter, "grad", parameter.grad)
        for tensor in tensors:
            undo.callback(torch.no_grad()(tensor.copy_), tensor.detach().clone())
        for entries in dicts:                             # the very same objects come back
            undo.callback(entries.update, dict(entries))
            undo.callback(entries.clear)
        # Training changes these copies; the originals come back.
        optimizer.state.update({p: copy.deepcopy(s) for p, s in optimizer.state.items()})
        yield


def mean_over_ranks(model, value):
    """The loss as a number, averaged over ranks so that all of them stop at the same step."""
    for module in model.modules():                        # it may be wrapped, e.g. by torch.compile
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            total = value.detach().clone()
            torch.distributed.all_reduce(total, group=module.process_group)
            return total.item() / module.process_group.size()
    return value.item()


if __name__ == "__main__":
    import train
    train.main(only_search=True)
