r"""How far a step goes, by the one-cycle policy, in which direction, by Muon, and in one launch.

One cycle is one rise and one fall of the learning rate, and nothing after it:

    LRMAX         /\                  step 0                LRMIN = LRMAX / 10
                 /    \               step P                LRMAX         (P: end of epoch 5 of 24)
                /        \            step T - 1, the last  LRMIN
    LRMIN      /            \
               0  P          T-1

While it rises, the weights leave the steep start before the steps get large. At the top the steps
are too large for a narrow valley of the loss; that regularises. While it falls, the weights settle
in a wide valley. That can train in a tenth of the usual steps, which Smith calls super-convergence
(Smith and Topin, arXiv 1708.07120; Smith, arXiv 1803.09820).

Most libraries end with *annihilation*: the rate goes on down to zero. Here it does not, by
specification: the last step still uses LRMIN, which leaves the weights jittering around the bottom
of the valley. train.py averages them, which takes the place of the annihilation.

Step k of T (k = 0 .. T - 1) is the k-th optimizer step of the run, counted in batches, not epochs.
At 97 batches an epoch and 24 epochs, T = 2328 and P = 5 * 97 = 485: step 0 uses LRMIN, step 485,
the first of the sixth epoch, LRMAX, and step 2327 LRMIN.

The direction of a convolution's step is Nesterov momentum made orthogonal, see `Muon`. As `Muon`
also keeps the weights' length, the rate is about the length of a step as a share of theirs.
`as_graph` makes forward pass, backward pass and the optimizer's step one launch on a GPU.

    python onecycle.py        draws schedule.png
"""
import math
from itertools import count

import torch

EPOCHS, PEAK_EPOCH = 24, 5
LR_RATIO = 10             # LRMAX / LRMIN, as in lrfinder.py, which stands alone
MOMENTUM_LOW = 0.85


def one_cycle(step, total, peak, low, high, shape="linear", end=None):
    """The value at `step` of a cycle that starts at low, is high at step `peak`, and ends at `end`.

    total: number of steps, so that the last is total - 1. end: low unless given; end=0 is the
    annihilation. shape: "linear", or "cosine" for half a cosine each way. With low and high
    exchanged the same function cycles the momentum, which Smith lowers while the rate is high.
    Raises ValueError for a step or a peak outside 0 .. total - 1 or an unknown shape.
    """
    if not (0 <= step < total and 0 <= peak < total):
        raise ValueError(f"step {step} and peak {peak} must lie in 0 .. {total - 1}")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape must be 'linear' or 'cosine', not '{shape}'")
    if step < peak:
        start, stop, fraction = low, high, step / peak
    elif step == peak:            # by itself, since either slope may have no steps at all
        return high
    else:
        start, stop = high, low if end is None else end
        fraction = (step - peak) / (total - 1 - peak)
    if shape == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return start + (stop - start) * fraction


class OneCycle:
    """Sets an optimizer's learning rate, in every parameter group, to that of a step.

    It holds no counter: `schedule.set(step)` before the optimizer's step, in whatever order, gives
    the same rate for the same step, so a resumed run needs nothing restored.
    """

    def __init__(self, optimizer, total, peak, lr_max):
        self.optimizer, self.total, self.peak = optimizer, total, peak
        self.lr_max, self.lr_min = lr_max, lr_max / LR_RATIO

    def set(self, step):
        lr = one_cycle(step, self.total, self.peak, self.lr_min, self.lr_max)
        for group in self.optimizer.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)      # in place: a CUDA graph reads it where it was recorded
            else:
                group["lr"] = lr
        return lr


def orthogonal(matrix, dtype=torch.float32):
    """About U V^T of a matrix U S V^T: (n, m) float32 to (n, m) of `dtype`, the arithmetic's.

    Three steps of a Newton-Schulz iteration, which needs products only: as X X^T X = U S^3 V^T,
    each takes every singular value s to a s + b s^3 + c s^5. With Jordan's a, b and c, those from
    0.02 to 1 of the matrix's length end within 0.68 .. 1.21; smaller ones grow up to 41-fold.
    """
    x = (matrix / matrix.norm().clamp(min=1e-7)).to(dtype)        # now all s are 1 or less
    x = x.T if len(matrix) > matrix.shape[1] else x               # the smaller of X X^T and X^T X
    for _ in range(3):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)   # b XX' + c (XX')^2
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon(torch.optim.SGD):
    """SGD with Nesterov momentum and weight decay, in which convolutions take this step instead:

        v <- mu v + g,    w <- w sqrt(n) / |w| - lr orthogonal(g + mu v),    n channels out

    Most of a gradient's length lies in the few directions in which the loss is steep; a step made
    orthogonal goes about as far in the others too. Batch normalisation takes the length of w away,
    so it is not decayed but fixed, at that of n orthonormal rows: lr is about the length of a step
    as a share of the weights' (half of that for the first, whose 64 rows have 27 columns).

    Jordan et al., kellerjordan.github.io/posts/muon, 2024; the fixed length and three iterations as
    in Jordan's airbench94_muon. torch.optim.Muon takes matrices only, and decays their length.
    dtype is that of the products. lr may be a tensor, which a CUDA graph needs, if `fused` is True.
    Like `zero_grad`, a step leaves no gradient of a convolution.
    """

    def __init__(self, parameters, lr, momentum, weight_decay, dtype=torch.float32, **options):
        super().__init__(parameters, lr, momentum, nesterov=True, weight_decay=weight_decay,
                         **options)
        self.defaults["dtype"] = dtype          # not an attribute: a copy would lose that

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.dim() == 4 and w.grad is not None:               # (n, channels in, 3, 3)
                    if "momentum_buffer" not in self.state[w]:
                        self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                    v = self.state[w]["momentum_buffer"]
                    v.mul_(group["momentum"]).add_(w.grad)
                    matrix = w.grad.add(v, alpha=group["momentum"]).flatten(1)    # (n, in * 9)
                    direction = orthogonal(matrix, self.defaults["dtype"]).view_as(w)
                    # In float32: bf16 times a tensor on CUDA would round the rate to bf16 first.
                    w.mul_(len(w) ** 0.5 / w.norm()).sub_(direction.float() * group["lr"])
                    w.grad = None                                     # which SGD then passes over
        super().step()


def as_graph(step):
    """`step` with its kernels recorded as a CUDA graph in its fourth call, and replayed from then.

    step: a function of tensors that returns tensors, the shapes always the same. A whole step of
    train.py is about 450 kernels, which Python takes 12 ms to launch and an H200 5.6 to run; a
    graph is one launch. It reads and writes the same memory each time: what is given is copied
    there, and what it returns holds until the next call.
    """
    calls, graph, inputs, outputs = count(), torch.cuda.CUDAGraph(), [], []

    def replay(*batch):
        if next(calls) < 3:                     # cuDNN, cuBLAS and the optimizer prepare themselves
            return step(*batch)
        if not inputs:
            inputs.extend(tensor.clone() for tensor in batch)
            with torch.cuda.graph(graph):       # which records and does not run
                outputs.extend(step(*inputs))
        for mine, tensor in zip(inputs, batch):
            mine.copy_(tensor)
        graph.replay()
        return outputs

    return replay


def plot(ax, total, peak, high):
    """The schedule against its alternatives, on a matplotlib axis."""
    steps = range(total)
    low = high / LR_RATIO
    for label, style, arguments in (
            ("linear, no annihilation (this project)", "-", {}),
            ("cosine", "--", {"shape": "cosine"}),
            ("with annihilation", ":", {"end": 0})):
        ax.plot(steps, [one_cycle(k, total, peak, low, high, **arguments) for k in steps],
                style, label=label, linewidth=2)
    ax.axvline(peak, color="grey", linewidth=0.8)
    ax.annotate(f"LRMAX, step {peak}", (peak, high), (4, 6), textcoords="offset points")
    ax.annotate("LRMIN, step 0", (0, low), (2, -14), textcoords="offset points")
    ax.annotate(f"LRMIN, step {total - 1}", (total - 1, low), (0, 60), textcoords="offset points",
                ha="right", arrowprops={"arrowstyle": "->"})
    ax.set(xlabel="step (one batch)", ylabel="learning rate", ylim=(0, 1.15 * high))
    ax.legend(loc="upper right", fontsize="small", frameon=False)


def main():
    from matplotlib.figure import Figure             # unlike pyplot, it never needs a screen
    steps_per_epoch = 50_000 // 512                                                # 97
    total, peak = EPOCHS * steps_per_epoch, PEAK_EPOCH * steps_per_epoch           # 2328, 485
    for step in (0, peak, total - 1):
        print(f"step {step:4}: {one_cycle(step, total, peak, 1 / LR_RATIO, 1):.2f} x LRMAX")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    plot(left, total, peak, 1)
    momentum = [one_cycle(k, total, peak, 0.95, MOMENTUM_LOW) for k in range(total)]
    right.plot(momentum, linewidth=2)
    left.set(ylabel="learning rate / LRMAX")
    right.set(xlabel="step", ylabel="momentum, the bounds exchanged")
    figure.savefig("schedule.png", dpi=110)
    print("wrote schedule.png")


if __name__ == "__main__":
    from model import run
    run(main)
