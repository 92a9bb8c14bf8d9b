r"""The one-cycle policy: one rise and one fall of the learning rate, and nothing after it.

    LRMAX         /\                  step 0                LRMIN = LRMAX / 10
                 /    \               step P                LRMAX         (P: after 5 of 24 epochs)
                /        \            step T - 1, the last  LRMIN
    LRMIN      /            \
               0  P          T-1

    k <= P    lr = LRMIN + (LRMAX - LRMIN) k / P
    k >  P    lr = LRMAX - (LRMAX - LRMIN) (k - P) / (T - 1 - P)

Step k of T (k = 0 .. T - 1) is the k-th optimizer step of the run: batches, not epochs. CIFAR-10 in
batches of 512 has 97 steps an epoch, so in 24 epochs T = 2328 and P = 5 * 97 = 485.

Why, after Smith (arXiv 1803.09820; with Topin, arXiv 1708.07120): while the rate rises, the weights
leave the steep start before the steps get large. At the top the steps are too large for a narrow
valley of the loss; that regularises. While it falls, the weights settle in a wide valley.

Most libraries end with *annihilation*: the rate falls to zero (Smith's own reaches LRMIN first, and
then falls further). Here it does not. The last step still uses LRMIN, and the average of the
weights that train.py keeps takes the annihilation's place. Who keeps no average should pass
lr_end=0: without one it gained 0.7 points of accuracy on CIFAR-10. The momentum stays as it is;
Smith's falls while the rate rises.

    schedule = OneCycle(optimizer, total=2328, peak=485, lr_max=0.1)
    for k, batch in enumerate(batches):
        schedule.set(k)                   # before the optimizer's step
        ...

    python onecycle.py        draws schedule.png
"""
import torch

LR_RATIO = 10             # LRMAX / LRMIN. Smith, arXiv 1803.09820, section 4.1, takes 10 to 20


def one_cycle(step, total, peak, lr_max, lr_end=None):
    """The learning rate of `step`, a number from 0 to total - 1; it is lr_max at step `peak`.

    It starts at lr_max / 10 and ends there too, or at lr_end: 0 is the annihilation. Raises
    ValueError where step or peak lies outside 0 .. total - 1.
    """
    if not (0 <= step < total and 0 <= peak < total):
        raise ValueError(f"step {step} and peak {peak} must lie in 0 .. {total - 1}")
    lr_min = lr_max / LR_RATIO
    if step < peak:
        return lr_min + (lr_max - lr_min) * step / peak
    if step == peak:                   # by itself: at either end, one slope would divide by 0
        return lr_max
    lr_end = lr_min if lr_end is None else lr_end
    return lr_max - (lr_max - lr_end) * (step - peak) / (total - 1 - peak)


class OneCycle:
    """Sets the learning rates of an optimizer to those of a step.

    The parameter group with the largest rate gets one_cycle's; the others keep their ratio to it.
    No counter is held: the same step gives the same rate, so a resumed run needs nothing restored.
    """

    def __init__(self, optimizer, total, peak, lr_max, lr_end=None):
        self.groups = optimizer.param_groups
        self.arguments = total, peak, lr_max, lr_end
        rates = [float(group["lr"]) for group in self.groups]
        if not max(rates) > 0:
            raise ValueError(f"the optimizer's learning rates are {rates}: give it others than 0")
        self.ratios = [rate / max(rates) for rate in rates]

    def at(self, step):
        """The learning rate of a step, for the group with the largest."""
        return one_cycle(step, *self.arguments)

    def set(self, step):
        """Write the rates of `step` into the optimizer; return that of the group with the largest.

        A rate that is a tensor is written in place, since a CUDA graph reads it where it was.
        """
        lr = self.at(step)
        for group, ratio in zip(self.groups, self.ratios):
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr * ratio)
            else:
                group["lr"] = lr * ratio
        return lr


def plot(ax, total, peak):
    """The cycle in units of LRMAX, with and without annihilation, on a matplotlib axis."""
    for label, style, lr_end in (("one cycle, as here", "-", None), ("with annihilation", ":", 0)):
        ax.plot([one_cycle(k, total, peak, 1, lr_end) for k in range(total)], style, label=label,
                linewidth=2)
    for step, words, offset in ((0, "LRMIN", (8, -4)), (peak, "LRMAX", (8, 2)),
                                (total - 1, "LRMIN", (-66, 70))):
        lr = one_cycle(step, total, peak, 1)
        ax.plot(step, lr, "o", color="black", markersize=4)
        ax.annotate(f"{words}, step {step}", (step, lr), offset, textcoords="offset points",
                    arrowprops={"arrowstyle": "-", "color": "grey"} if step == total - 1 else None)
    ax.set(xlabel="step (one batch)", ylabel="learning rate / LRMAX", ylim=(0, 1.15))
    ax.legend(loc="upper right", frameon=False)


def main():
    import os
    os.environ["MPLBACKEND"] = "agg"             # a notebook's backend may be missing here
    from matplotlib.figure import Figure
    steps_per_epoch = 50_000 // 512                                                # 97
    total, peak = 24 * steps_per_epoch, 5 * steps_per_epoch                        # 2328, 485
    for step in (0, peak, total - 1):
        print(f"step {step:4}: {one_cycle(step, total, peak, 1):.2f} x LRMAX")
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    plot(figure.subplots(), total, peak)
    figure.savefig("schedule.png", dpi=110)
    print("wrote schedule.png")


if __name__ == "__main__":
    main()
