r"""The one-cycle policy: the learning rate rises once and falls once.

    LRMAX         /\              step P: after 5 of 24 epochs
                 /    \
                /        \
    LRMIN      /            \     LRMIN = LRMAX / 10, at the first step and at the last
               0  P          T-1

    k <  P    lr = LRMIN + (LRMAX - LRMIN) k / P
    k >= P    lr = LRMAX - (LRMAX - LRMIN) (k - P) / (T - 1 - P)

A step is one batch, not one epoch; the T steps are numbered k = 0 .. T - 1. CIFAR-10 in batches of
512 has 97 steps an epoch, so for 24 epochs T = 2328 and P = 5 * 97 = 485.

Many schedules end in *annihilation*: the rate falls to zero. This one stops at LRMIN, as the
assignment asks, and leaves the weights noisy; train.py averages the noise out. If you do not
average the weights, pass end=0.

    schedule = OneCycle(optimizer, total=2328, peak=485, lr_max=0.1)
    for k, batch in enumerate(batches):
        schedule.set(k)                   # before the optimizer's step
        ...

Sources: L. Smith, arXiv 1803.09820; with N. Topin, arXiv 1708.07120. Smith's momentum falls
while the rate rises; here it is constant, which was no worse (docs/measurements.md).
"""
import torch


def one_cycle(step, total, peak, lr_max, start=1 / 10, end=1 / 10):
    """The learning rate of `step`, an integer from 0 to total - 1; at step `peak` it is lr_max.

    start, end: the first and the last rate as fractions of lr_max. end=0 is annihilation.
    ValueError if a step lies outside the run.
    """
    if not 0 <= step < total:
        raise ValueError(f"step {step} lies outside 0 .. {total - 1}")
    if step < peak:
        share = start + (1 - start) * step / peak
    else:
        share = 1 - (1 - end) * (step - peak) / max(total - 1 - peak, 1)   # the peak may be last
    return lr_max * share


class OneCycle:
    """Sets an optimizer's learning rates, step by step.

    The parameter group with the largest learning rate gets one_cycle's rate; the others keep their
    ratio to it. There is no counter: the step alone sets the rate, so a resumed run has nothing to
    restore. ValueError if the cycle does not fit the run.
    """

    def __init__(self, optimizer, total, peak, lr_max, start=1 / 10, end=1 / 10):
        if peak not in range(total):
            raise ValueError(f"peak {peak} must be a step, an integer from 0 to {total - 1}: for a "
                             f"fraction of the run pass round(fraction * total)")
        # A warm-up scheduler may have zeroed a rate; it stores the original in initial_lr.
        rates = [float(group["lr"] or group.get("initial_lr", 0))
                 for group in optimizer.param_groups]
        if not max(rates) > 0:
            raise ValueError(f"the optimizer's learning rates are {rates}: give it one above 0")
        self.ratios = [rate / max(rates) for rate in rates]
        self.optimizer, self.cycle = optimizer, (total, peak, lr_max, start, end)

    def at(self, step):
        """The learning rate of a step, for the group whose rate is largest."""
        return one_cycle(step, *self.cycle)

    def set(self, step):
        """Write the rates of `step` into the optimizer; return the largest."""
        lr = self.at(step)
        for group, ratio in zip(self.optimizer.param_groups, self.ratios):
            if torch.is_tensor(group["lr"]):       # a CUDA graph reads this very tensor
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
        return lr
