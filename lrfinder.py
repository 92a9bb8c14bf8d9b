r"""The LR range test: find the largest learning rate that still trains, before training.

Train for a few dozen batches while the learning rate grows from far too small to far too large,
and look at the loss (after Smith, arXiv 1506.01186, section 3.3; he raises it evenly, and looks at
the accuracy):

    loss ------.                           steepest  the loss falls fastest per factor in the rate
                \               /          LRMAX     the end of the descent: the lowest point
                 \             /                     before the first marked rise
                  `-.       _.'            stop      half of what was gained is lost again, or
             steepest `----' LRMAX  stop             the loss runs away, or is not finite

    sweep    lr_k = lr_start * (lr_end / lr_start) ^ (k / (steps - 1)),    k = 0 .. steps - 1
    LRMAX    the lr of the smoothed curve's first minimum past half of the whole fall; first means:
             before a rise of more than RISE = 15 % of that fall and of more than the noise. If
             noise hides which point of a flat valley is the lowest, it is the last that may be
    LRMIN    LRMAX / 10 (Smith, arXiv 1803.09820, section 4.1: a tenth to a twentieth where there is
             a single cycle)

LRMAX is where training just holds: an upper limit. On small models without batch normalisation a
third of it was the best of four rates or within 0.03 of the best loss in seven cases of eight. So
for such a model, and for Adam, train with LRMAX / 3 as well; and for Adam sweep from 1e-5 to 1. The
steepest rate, which other finders suggest, is about as good as a third on an MLP or a conv net. On
text, whose loss first falls while a model only learns which letters are frequent, it is far too
low.

All but `main` stands alone: it needs torch and numpy, and matplotlib to draw. Copy it.

    python lrfinder.py        draws lr_range.png and prints LRMIN and LRMAX (-h lists the options)
"""
import contextlib
import copy
import math
import os
import random
import sys
from typing import NamedTuple

import numpy as np
import torch

STEPS, LR_START, LR_END = 100, 0.001, 10.0
LR_RATIO = 10             # LRMAX / LRMIN, as in onecycle.py
FEWEST = 10               # points: their median is the starting loss; a curve needs as many
WIDTH = 7                 # points to either side in the smoothing window, or n / 20 if more
MEDIAN = 5                # points whose median is taken: two wild ones do not move it
RISE = 0.15               # of the whole fall: a smaller rise does not end the descent
FALL = 0.10               # of the starting loss: a curve that falls less shows nothing
LOST = 0.5                # of what was gained: once as much is lost again, the sweep can end
RUNAWAY = 3.0             # starting losses above the start: the end where nothing was gained
CLEAR = 6.0               # standard deviations: a difference of more is no noise
NEAR = 1.0                # standard deviation: a difference of less is nothing but noise


class NotFound(ValueError):
    """The curve does not show the answer; the text is one line that says why and what to try."""


class Curve(NamedTuple):
    """What a range test measured: the raw loss at each learning rate, equally long lists.

    ended says why there are no more: "steps" (as many as were asked for), "rise" (LRMAX is behind
    us, see `enough`), "not finite" (the next loss was not) or "batches" (no more came).
    """
    lrs: list
    losses: list
    ended: str = "steps"
    steps: int = STEPS                                    # asked for


class Suggestion(NamedTuple):
    """The learning rates that `suggest` read off a curve."""
    lr_min: float
    lr_max: float
    steepest: float


@contextlib.contextmanager
def everything_restored(model, optimizer, loss):
    """Put back, bit for bit and after an exception too, all that training changes.

    Parameters and buffers of the model, of the loss if it is a module, and what else is in the
    optimizer; gradients; train/eval flags; the optimizer's state and settings; the random states of
    Python, numpy, the CPU and every CUDA GPU (not of Apple's, nor of a generator of your own).
    """
    modules = {*model.modules(), *(loss.modules() if isinstance(loss, torch.nn.Module) else ())}
    parameters = {p for m in modules for p in m.parameters()}
    parameters.update(p for group in optimizer.param_groups for p in group["params"])
    dicts = [*optimizer.param_groups, *(m._buffers for m in modules)]
    tensors = [*parameters, *(v for d in dicts for v in d.values() if torch.is_tensor(v))]
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise ValueError("the model has lazy layers: run a batch through it first, then it has "
                         "parameters that can be restored")
    # The stack calls all that it is given, the last first, even if one of the calls fails.
    with torch.random.fork_rng(range(torch.cuda.device_count())), contextlib.ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())
        for module in modules:
            undo.callback(setattr, module, "training", module.training)
        for parameter in parameters:                      # puts the gradients aside, untouched
            undo.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        for tensor in tensors:
            undo.callback(torch.no_grad()(tensor.copy_), tensor.detach().clone())
        for entries in (*dicts, optimizer.state):         # the very same objects come back
            undo.callback(entries.update, dict(entries))
            undo.callback(entries.clear)
        optimizer.state.update({p: copy.deepcopy(s) for p, s in optimizer.state.items()})
        yield


def endless(batches):
    """Begin again at the end, as epochs do, until a pass brings nothing: a generator's second."""
    more = True
    while more:
        more = False
        for batch in batches:
            more = True
            yield batch


def range_test(model, optimizer, loss, batches, *, lr_start=LR_START, lr_end=LR_END, steps=STEPS,
               shape="exponential", autocast=contextlib.nullcontext, scaler=None):
    """Train on `batches` with a growing learning rate and return the Curve; restore everything.

        curve = range_test(model, optimizer, torch.nn.functional.cross_entropy, loader)
        print(report(curve, "lr_range.png")[1])

    model: any nn.Module, optimizer: its own, loss(outputs, labels) -> scalar, batches: an iterable
    of (inputs, labels), begun again if it ends; all exactly as in the training run. shape:
    "exponential" or "linear". autocast and scaler (a GradScaler) are for mixed precision. Tensors
    of a batch are moved to the model's device.

    Point k is the loss of batch k *before* the step with lr_k, which is the rate of the parameter
    group with the largest; the others keep their ratio to it. A model in training mode keeps the
    mode of each layer, frozen ones too. The sweep ends early when `enough` says so, a generator
    runs out or the loss is not finite, which is then not part of the curve. ValueError: a sweep or
    an optimizer that cannot be, lazy layers; TypeError: batches that are not pairs. Wrap those:

        class Loss(torch.nn.Module):                      # for batches of any form: here, dicts
            def __init__(self, net):
                super().__init__()
                self.net = net
            def forward(self, batch):
                return F.cross_entropy(self.net(batch["x"], batch["mask"]), batch["y"])
        pairs = ((batch, None) for epoch in itertools.count() for batch in loader)
        curve = range_test(Loss(net), optimizer, lambda value, _: value, pairs)
    """
    if not 0 < lr_start < lr_end or steps < 2:
        raise ValueError("a sweep needs 0 < lr_start < lr_end and at least 2 steps")
    if shape not in ("exponential", "linear"):
        raise ValueError(f'shape is "exponential" or "linear", not {shape!r}')
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS searches each step's length itself: it has no rate to test")
    scaler = copy.deepcopy(scaler) or torch.amp.GradScaler(enabled=False)   # or: changes nothing
    groups = optimizer.param_groups
    device = groups[0]["params"][0].device
    largest = max(float(group["lr"]) for group in groups)
    shares = [float(group["lr"]) / largest if largest else 1.0 for group in groups]
    lrs, losses, ended = [], [], ""
    with everything_restored(model, optimizer, loss):
        if not model.training:
            model.train()
        for k, batch in zip(range(steps), endless(batches)):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError("a batch must be a pair (inputs, labels); help(range_test) shows "
                                "how to wrap others")
            lr = (lr_start * (lr_end / lr_start) ** (k / (steps - 1)) if shape == "exponential"
                  else lr_start + (lr_end - lr_start) * k / (steps - 1))
            for group, share in zip(groups, shares):
                if torch.is_tensor(group["lr"]):          # it may be part of a compiled step
                    group["lr"].fill_(lr * share)
                else:
                    group["lr"] = lr * share
            inputs, labels = (v.to(device) if torch.is_tensor(v) else v for v in batch)
            with autocast():
                value = loss(model(inputs), labels)
            if not math.isfinite(raw := value.item()):
                ended = "not finite"
                break
            lrs.append(lr)
            losses.append(raw)
            if enough(losses):
                ended = "rise"
                break
            optimizer.zero_grad()
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
    return Curve(lrs, losses, ended or ("steps" if len(lrs) == steps else "batches"), steps)


def noise(losses):
    """The standard deviation of a single loss around the curve, whatever that does.

    Second differences take straight lines out and have 1 + 4 + 1 = 6 times the variance of a loss.
    Their median size, unlike their mean square, does not notice a few wild points or the end of a
    divergence; normal noise has 0.6745 of its standard deviation as the median of its size.
    """
    return float(np.median(np.abs(np.diff(losses, 2)))) / 0.6745 / math.sqrt(6)


def enough(losses):
    """Is LRMAX behind us? Half of all that was gained is lost again, or the loss runs away.

    The usual rule, 4 times the lowest loss, fails twice: with batch normalisation the loss stays
    bounded, as the weights' scale does not matter; and next to a loss of almost 0 noise is enough.
    Medians of the last 5 losses, the 5 before and so on: a single bad batch decides nothing.
    """
    if len(losses) < FEWEST + MEDIAN:
        return False
    medians = np.median(np.reshape(losses[len(losses) % MEDIAN:], (-1, MEDIAN)), axis=1)
    start, lowest = np.median(losses[:FEWEST]), min(medians)
    gained = start - lowest
    # A loss can be negative, -log of a density: a share of it is one of its size.
    bar = LOST * gained if gained > FALL * abs(start) else gained + RUNAWAY * abs(start)
    return bool(medians[-1] - lowest > max(bar, CLEAR * noise(losses)))


def half_window(n):
    return max(WIDTH, n // 20)


def smooth(losses):
    """Medians of 5, then a central average of each with its neighbours, near ones more.

    The medians take single wild losses away, which an average would spread. Being central it moves
    no minimum along the axis, as a running average would. The weights are cos^2, a Hann window's,
    which leaves 3 / (4 m) of the variance, m = half the window + 1; at the ends the window shrinks,
    evenly on both sides.
    """
    beside = MEDIAN // 2
    medians = [np.median(losses[max(0, k - beside):k + beside + 1]) for k in range(len(losses))]
    smoothed = []
    for k in range(len(losses)):
        reach = min(half_window(len(losses)), k, len(losses) - 1 - k)
        weights = np.cos(math.pi / 2 * np.arange(-reach, reach + 1) / (reach + 1)) ** 2
        smoothed.append(float(np.average(medians[k - reach:k + reach + 1], weights=weights)))
    return smoothed


def suggest(curve):
    """LRMIN, LRMAX and the steepest rate that a Curve shows, or NotFound with what to try."""
    lrs, losses = curve.lrs, curve.losses
    short = (f"only {len(losses)} of {curve.steps} batches came: pass an iterable that does not "
             f"end, or fewer steps") if curve.ended == "batches" else ""
    if len(losses) < FEWEST:
        raise NotFound(short or f"the sweep has {len(losses)} points, {FEWEST} are needed: start "
                                f"it at a lower learning rate or use more steps")
    smoothed = smooth(losses)
    half = half_window(len(losses))
    sigma = noise(losses) * math.sqrt(0.75 / (half + 1))               # of the smoothed, see smooth
    start = float(np.median(losses[:FEWEST]))
    fall = start - min(smoothed)
    if fall < max(FALL * abs(start), CLEAR * sigma):
        raise NotFound("the loss never falls clearly: " + (
            short or "start the sweep lower, use larger batches or more steps, or check model and "
                     "data"))
    # Walk along the curve and keep the lowest point so far, until the loss stands clearly higher:
    # not before half of the fall, as an early spike is no end.
    best = 0
    for k, value in enumerate(smoothed):
        if value < smoothed[best]:
            best = k
        elif (start - smoothed[best] > fall / 2
              and value - smoothed[best] > max(RISE * fall, CLEAR * sigma)):
            break
    else:
        raise NotFound("the loss falls to the end of the sweep: " + (
            short or ("use more steps, as the next loss was not finite"
                      if curve.ended == "not finite" else "raise its highest learning rate")))
    if best < FEWEST // 2:                                # then start is not what came before it
        raise NotFound("the loss only rises: start the sweep lower")
    # Noise picks any point of a flat valley as the lowest: LRMAX is the last that is as low.
    best = max(j for j in range(best, k) if smoothed[j] <= smoothed[best] + NEAR * sigma)
    first = min(half, best)                               # before it, the curve is hardly smoothed
    slopes = np.gradient(smoothed, np.log(lrs))[first:best + 1]
    return Suggestion(lrs[best] / LR_RATIO, lrs[best], lrs[first + int(np.argmin(slopes))])


def plot(curve, ax, suggestion=None):
    """Draw the raw curve faint, the smoothed one bold and the suggestion, on a log axis."""
    ax.plot(curve.lrs, curve.losses, color="tab:blue", alpha=0.4, linewidth=1, label="raw loss")
    ax.plot(curve.lrs, smooth(curve.losses), color="tab:blue", linewidth=2.5, label="smoothed")
    ax.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    if suggestion:
        for name, lr, style in (("LRMIN", suggestion.lr_min, ("tab:green", "--")),
                                ("steepest", suggestion.steepest, ("dimgrey", ":")),
                                ("LRMAX", suggestion.lr_max, ("tab:red", "-"))):
            ax.axvline(lr, color=style[0], linestyle=style[1], label=f"{name} {lr:.3g}")
        ax.axvspan(suggestion.lr_min, suggestion.lr_max, color="tab:green", alpha=0.1)
        # A divergence at the end would press the rest flat: show as much above the start as below.
        start = np.median(curve.losses[:FEWEST])
        ax.set_ylim(top=min(ax.get_ylim()[1], 2 * start - min(curve.losses)))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5, fontsize="small", frameon=False,
              columnspacing=1.2, handlelength=1.5)


def import_figure():
    """matplotlib's Figure, which, unlike pyplot, needs no screen, whatever MPLBACKEND says.

    matplotlib reads it when first imported, and fails if it does not know it: a notebook names its
    own backend there, which a script that it starts may not have.
    """
    wanted = "matplotlib" not in sys.modules and os.environ.pop("MPLBACKEND", None)
    import matplotlib
    from matplotlib.figure import Figure
    if wanted:
        os.environ["MPLBACKEND"] = wanted
        with contextlib.suppress(ValueError):             # for the user's own plots
            matplotlib.rcParams["backend"] = wanted
    return Figure


def report(curve, path):
    """Draw the curve into the file `path`; return (Suggestion or None, one line of words).

    A picture that cannot be drawn or written costs no answer: the words then say why.
    """
    try:
        found = suggest(curve)
        words = f"LRMIN {found.lr_min:.3g} LRMAX {found.lr_max:.3g} steepest {found.steepest:.3g}"
    except NotFound as problem:
        found, words = None, f"not found: {problem}"
    try:
        figure = import_figure()(figsize=(7.2, 4), layout="constrained", facecolor="white")
        plot(curve, figure.subplots(), found)
        figure.savefig(path, dpi=110)
    except (ImportError, OSError, ValueError) as problem:
        words += f" (no picture: {problem})"
    return found, words


def main():
    import argparse
    import itertools

    try:
        from data import Loader, load
        from model import (autocast, make_model, make_optimizer, make_scaler, pick_device,
                           precision)
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: this command tests data.py's images and model.py's network; for your "
                 f"own model import range_test and report, which need neither")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="auto", help="as for train.py (auto)")
    parser.add_argument("--data-dir", default="data", help="as for train.py (data)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    args = parser.parse_args()
    if not 0 <= args.seed < 2**31:
        parser.error(f"--seed {args.seed} does not lie in 0 .. {2**31 - 1}")
    try:
        data = load(args.data, args.data_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    device = pick_device()
    loader = Loader(data, min(data.batch_size, len(data.train_images)), precision(device), device)
    model = make_model(device, args.seed, len(data.classes), data.width)
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(args.seed, epoch))
    curve = range_test(model, make_optimizer(model), torch.nn.functional.nll_loss, batches,
                       autocast=lambda: autocast(device), scaler=make_scaler(device))
    found, words = report(curve, "lr_range.png")
    if not found:
        sys.exit(words)
    print(f"{words}; wrote lr_range.png")


if __name__ == "__main__":
    main()
