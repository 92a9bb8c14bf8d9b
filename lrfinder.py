r"""The LR range test: find the largest learning rate that still trains, before training.

Train for a few dozen batches while the learning rate grows from far too small to far too large,
and look at the loss (after Smith, arXiv 1506.01186, section 3.3; he raises it evenly, and looks at
the accuracy):

    loss ------.                            onset   the loss first falls for good
                \            .'             LRMAX   the end of the descent: the lowest point before
                 \    /\   .'                       the first marked rise
                  `--'  `-'                 stop    half of what was gained is lost, or divergence
             onset  LRMAX    stop

    sweep    lr_k = lr_start * (lr_end / lr_start) ^ (k / (steps - 1)),    k = 0 .. steps - 1
    LRMAX    the lr of the smoothed curve's first minimum, past half of the whole fall, that is
             followed by a rise of more than RISE = 15 % of that fall (and than the noise). What
             other rates are worth stands in README.md
    LRMIN    LRMAX / 10 (Smith, arXiv 1803.09820, section 4.1: a tenth to a twentieth where there is
             a single cycle)

All but `main` stands alone: it needs torch and numpy, and matplotlib to draw. Copy it.

    python lrfinder.py        draws lr_range.png and prints LRMIN and LRMAX (-h lists the options)
"""
import contextlib
import copy
import math
import random
from typing import NamedTuple

import numpy as np
import torch

STEPS, LR_START, LR_END = 100, 0.001, 10.0
AVERAGE = 0.8             # of the running loss that decides when to stop: about the last 5 batches
WIDTH = 5                 # points to either side in the smoothing window, or n / 20 if more
RISE = 0.15               # of the whole fall: less is noise
FALL = 0.10               # of the starting loss: a curve that falls less shows nothing
FEWEST = 10               # points: on fewer nothing can be told from noise


class NotFound(ValueError):
    """The curve does not show the answer; the text is one line that says why and what to try."""


class Curve(NamedTuple):
    """What a range test measured: the raw loss at each learning rate, equally long lists."""
    lrs: list
    losses: list


class Suggestion(NamedTuple):
    """What `suggest` read off a curve."""
    lr_min: float
    lr_max: float
    onset: float


@contextlib.contextmanager
def everything_restored(model, optimizer, scaler):
    """Put back, bit for bit and after an exception too, all that training changes.

    The state_dicts of model, optimizer and scaler, gradients, train/eval flags, and the random
    states of Python, numpy, the CPU and every CUDA GPU (not of Apple's).
    """
    devices = list(range(torch.cuda.device_count()))
    modes = {module: module.training for module in model.modules()}
    gradients = [p.grad for p in model.parameters()]
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scaler.state_dict()))
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):                  # the CPU's and the GPU's generator
        try:
            model.zero_grad(set_to_none=True)             # puts the old gradients aside, untouched
            yield
        finally:
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            scaler.load_state_dict(saved[2])
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.grad = gradient
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def range_test(model, optimizer, loss, batches, *, lr_start=LR_START, lr_end=LR_END, steps=STEPS,
               shape="exponential", autocast=contextlib.nullcontext, scaler=None):
    """Train on `batches` with a growing learning rate and return the Curve; restore everything.

    model: any nn.Module, optimizer: its own, loss(outputs, labels) -> scalar, batches: an iterable
    of (inputs, labels); all exactly as in the training run. shape: "exponential" or "linear".
    autocast and scaler (a GradScaler) are for mixed precision. Point k is the loss of batch k
    *before* the step with lr_k. The sweep ends early when `enough` says so, the batches run out or
    the loss is not finite, which is then not part of the curve.
    """
    if not 0 < lr_start < lr_end or steps < 2:
        raise ValueError("a sweep needs 0 < lr_start < lr_end and at least 2 steps")
    scaler = scaler or torch.amp.GradScaler(enabled=False)             # passes everything through
    curve, average, lowest = Curve([], []), 0.0, math.inf
    with everything_restored(model, optimizer, scaler):
        model.train()
        for k, (inputs, labels) in zip(range(steps), batches):
            lr = (lr_start * (lr_end / lr_start) ** (k / (steps - 1)) if shape == "exponential"
                  else lr_start + (lr_end - lr_start) * k / (steps - 1))
            for group in optimizer.param_groups:
                group["lr"] = lr
            with autocast():
                value = loss(model(inputs), labels)
            if not math.isfinite(raw := value.item()):
                break
            curve.lrs.append(lr)
            curve.losses.append(raw)
            # A running average starts at 0; dividing by 1 - a^(k+1) takes that out (as in Adam).
            average = AVERAGE * average + (1 - AVERAGE) * raw
            lowest = min(lowest, running := average / (1 - AVERAGE ** (k + 1)))
            if enough(running, lowest, curve.losses):
                break
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
    return curve


def enough(running, lowest, losses):
    """Is LRMAX behind us? Half of all that was gained is lost again, or the loss runs away.

    The usual rule, 4 times the lowest loss, fails twice: with batch normalisation the loss stays
    bounded, as the weights' scale does not matter; and next to a loss of almost 0 noise is enough.
    """
    if len(losses) < FEWEST:
        return False
    first = sum(losses[:5]) / 5
    gained = first - lowest
    if gained > FALL * abs(first):               # a loss can be negative: -log of a density
        return running > lowest + gained / 2
    return running > first + 3 * abs(first)


def smooth(losses):
    """Average each loss with its neighbours, near ones more, as many on one side as on the other.

    Being central it moves no minimum along the axis, as a running average would. The weights are
    cos^2, a Hann window's; at the ends the window shrinks, evenly on both sides.
    """
    half = max(WIDTH, len(losses) // 20)
    smoothed = []
    for k in range(len(losses)):
        reach = min(half, k, len(losses) - 1 - k)
        weights = [math.cos(math.pi / 2 * j / (reach + 1)) ** 2 for j in range(-reach, reach + 1)]
        window = losses[k - reach:k + reach + 1]
        smoothed.append(sum(w * v for w, v in zip(weights, window)) / sum(weights))
    return smoothed


def suggest(curve):
    """LRMIN, LRMAX and the onset that a Curve shows, or NotFound with what to try."""
    lrs, losses = curve
    if len(losses) < FEWEST:
        raise NotFound(f"the sweep has {len(losses)} points, {FEWEST} are needed: start it at a "
                       f"lower learning rate or use more steps")
    smoothed = smooth(losses)
    noise = math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, smoothed)) / len(losses))
    start = sum(losses[:5]) / 5
    fall = start - min(smoothed)
    if fall < max(FALL * abs(start), 3 * noise):
        raise NotFound("the loss never falls clearly: start the sweep lower, use larger batches or "
                       "more steps, or check model and data")
    # Walk along the curve and keep the lowest point so far, until the loss stands clearly higher:
    # not before half of the fall (an early spike is no end), nor at the last, raw points.
    best = 0
    for k, value in enumerate(smoothed[:-2]):
        if value < smoothed[best]:
            best = k
        elif start - smoothed[best] > fall / 2 and value - smoothed[best] > max(RISE * fall, noise):
            break
    else:
        raise NotFound("the loss falls to the end of the sweep: raise its highest learning rate")
    before = [k for k in range(best) if smoothed[k] > start - 0.1 * fall]      # not yet 10 % down
    if not before:
        raise NotFound("the loss only rises: start the sweep lower")
    return Suggestion(lrs[best] / 10, lrs[best], lrs[before[-1]])


def plot(curve, ax, suggestion=None):
    """Draw the raw curve faint, the smoothed one bold and the suggestion, on a log axis."""
    ax.plot(curve.lrs, curve.losses, color="tab:blue", alpha=0.35, linewidth=1, label="raw loss")
    ax.plot(curve.lrs, smooth(curve.losses), color="tab:blue", linewidth=2.5, label="smoothed")
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    if suggestion:
        ax.axvspan(suggestion.lr_min, suggestion.lr_max, color="tab:green", alpha=0.12,
                   label="range of the cycle")
        for lr, name, colour in ((suggestion.lr_min, "LRMIN", "tab:green"),
                                 (suggestion.lr_max, "LRMAX", "tab:red"),
                                 (suggestion.onset, "onset", "tab:grey")):
            ax.axvline(lr, color=colour, linewidth=1.5, linestyle="--" if name == "onset" else "-")
            ax.annotate(f"{name} {lr:.3g}", (lr, 1), (3, -4), xycoords=("data", "axes fraction"),
                        textcoords="offset points", rotation=90, va="top", color=colour)
    ax.legend(loc="lower left", framealpha=0.95, edgecolor="none")


def report(curve, path):
    """Draw the curve into the file `path`; return (Suggestion or None, one line of words)."""
    from matplotlib.figure import Figure             # unlike pyplot, it never needs a screen
    try:
        found = suggest(curve)
        words = f"LRMIN {found.lr_min:.3g} LRMAX {found.lr_max:.3g} onset {found.onset:.3g}"
        if found.lr_min < found.onset:
            words += " (LRMIN is below the onset: the first steps will do little)"
    except NotFound as problem:
        found, words = None, f"not found: {problem}"
    figure = Figure(figsize=(7, 4), layout="constrained")
    plot(curve, figure.subplots(), found)
    figure.savefig(path, dpi=110)
    return found, words


def main():
    import argparse
    import itertools

    from data import Loader, load, normalisation
    from model import (UserError, autocast, fail, make_model, make_optimizer, make_scaler,
                       pick_device, precision)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    parser.add_argument("--data", default="auto", help="as for train.py (auto)")
    parser.add_argument("--data-dir", default="data", help="as for train.py (data)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"batches ({STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args()
    if args.steps < FEWEST or not 0 <= args.seed < 2**32:
        fail(f"--steps must be {FEWEST} or more, and --seed in 0 .. {2**32 - 1}")
    device, data = pick_device(), load(args.data, args.data_dir)
    loader = Loader(data.train_images, data.train_labels, *normalisation(data.train_images),
                    data.batch_size, precision(device), device)
    model = make_model(device, args.seed, len(data.classes))
    batches = (batch for e in itertools.count() for batch in loader.epoch(args.seed, e))
    curve = range_test(model, make_optimizer(model, LR_START), torch.nn.functional.nll_loss,
                       batches, steps=args.steps, autocast=lambda: autocast(device),
                       scaler=make_scaler(device))
    found, words = report(curve, "lr_range.png")
    if not found:
        raise UserError(words)
    print(words)


if __name__ == "__main__":
    from model import run
    run(main)
