"""How good are the rates of range tests? Ours and three packages', on fourteen pairs, on a CPU.

    python -m docs.range_test      measures what docs/range_test.jsonl lacks, a line for each result

docs/tables.py makes tables of these lines.

The truth: the held-out loss after 300 steps of one cycle, for ten peaks 2.5 times apart and two
seeds. A rule suggests a peak, from sweeps of five seeds. What that costs is its regret: the loss at
the peak, on a line between two of the ten over log lr, minus the loss at the best of them, in % of
the fall from the untrained loss to the best. All this with batches of 32, and with batches of 8,
where there is more noise. Our sweeps have 400 steps, the packages' 100, their default.

Nothing is downloaded: the MLP learns what a random network says; the conv net, the ResNet and the
ViT patterns in noise; the autoencoder blurred noise; the others Python's library, by the letter.

The packages' own functions are called (pip install torch-lr-finder fastai lightning); what is not
installed is left out.
"""
import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import statistics
import tempfile
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lrfinder import NotFound, range_test, suggest
from model import ResBlock, conv_bn_relu, make_optimizer
from onecycle import one_cycle

ROWS = pathlib.Path(__file__).with_suffix(".jsonl")
STEPS, PEAKS, HELD_OUT = 300, 10, 1000
BATCHES, TRUTH_SEEDS, SWEEP_SEEDS = (32, 8), (101, 102), (0, 1, 2, 3, 4)
LENGTH, LETTERS = 32, 128                                 # LENGTH: letters in a piece of text


# ------------------------------------------------------------------------------------- the models

def mlp():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 10))


def conv_net():
    """Without batch normalisation: (B, 1, 12, 12) to (B, 10)."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * 9, 10))


def resnet():
    """With batch normalisation: (B, 1, 12, 12) to (B, 10)."""
    return nn.Sequential(conv_bn_relu(1, 16), conv_bn_relu(16, 32, pool=True), ResBlock(32),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def autoencoder():
    """(B, 144) to (B, 144) through 16 numbers."""
    return nn.Sequential(nn.Linear(144, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 64),
                         nn.ReLU(), nn.Linear(64, 144))


def encoder(width, layers):
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)


class Vit(nn.Module):
    """(B, 1, 12, 12) to (B, 10): 16 patches of 3 x 3, two layers, and the mean of the patches."""

    def __init__(self, width=32):
        super().__init__()
        self.patches, self.places = nn.Conv2d(1, width, 3, 3), nn.Embedding(16, width)
        self.layers, self.head = encoder(width, 2), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places.weight
        return self.head(self.layers(x).mean(1))


class Transformer(nn.Module):
    """(B, LENGTH) letters to (B, LETTERS, LENGTH) logits of the next ones: two layers, pre-norm."""

    def __init__(self, width=48):
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Embedding(LENGTH, width)
        self.layers, self.head = encoder(width, 2), nn.Linear(width, LETTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x):
        x = self.letters(x) + self.places.weight
        return self.head(self.layers(x, self.mask, is_causal=True)).transpose(1, 2)


class Lstm(nn.Module):
    """(B, LENGTH) letters to (B, LETTERS, LENGTH) logits of the next ones: one layer."""

    def __init__(self, width=64):
        super().__init__()
        self.letters = nn.Embedding(LETTERS, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, LETTERS)

    def forward(self, x):
        return self.head(self.lstm(self.letters(x))[0]).transpose(1, 2)


# --------------------------------------------------------------------------------------- the data

def vectors():
    """6,000 random vectors and which output of a random network is largest."""
    x, teacher = torch.randn(6000, 20), nn.Sequential(nn.Linear(20, 40), nn.Tanh(),
                                                      nn.Linear(40, 10))
    return x, teacher(4 * x).argmax(1)


def images():
    """6,000 images: one of ten patterns, shifted by up to two pixels, in noise."""
    y, shifts = torch.randint(10, (6000,)), torch.randint(-2, 3, (6000, 2)).tolist()
    patterns = 2 * F.avg_pool2d(torch.randn(10, 1, 14, 14), 3, stride=1)
    x = torch.stack([patterns[k].roll(s, (1, 2)) for k, s in zip(y.tolist(), shifts)])
    return x + torch.randn_like(x), y


def blurred():
    """6,000 pieces of 12 x 12 of blurred noise, to be reproduced."""
    x = 5 * F.avg_pool2d(torch.randn(6000, 1, 16, 16), 5, stride=1).flatten(1)
    return x, x


def text():
    """Pieces of Python's library and the same pieces a letter further on."""
    folder = pathlib.Path(argparse.__file__).parent
    raw = b"".join((folder / name).read_bytes() for name in ("argparse.py", "pathlib.py",
                                                             "tarfile.py", "typing.py")
                   if (folder / name).exists())
    letters = torch.tensor([byte for byte in raw if byte < LETTERS])
    pieces = letters[:len(letters) // LENGTH * LENGTH - LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    pieces = pieces[torch.randperm(len(pieces))]
    return pieces[:, :-1], pieces[:, 1:]


# -------------------------------------------------------------------------------------- the pairs

MODELS = {"MLP": (mlp, vectors, F.cross_entropy), "conv net": (conv_net, images, F.cross_entropy),
          "transformer": (Transformer, text, F.cross_entropy),
          "LSTM": (Lstm, text, F.cross_entropy), "ResNet": (resnet, images, F.cross_entropy),
          "ViT": (Vit, images, F.cross_entropy), "autoencoder": (autoencoder, blurred, F.mse_loss)}

# The range of our sweep, the lowest peak of the truth and the rate that one takes without a test.
OPTIMIZERS = {
    "SGD": (lambda net, lr: torch.optim.SGD(net.parameters(), lr, 0.9), 1e-3, 100, 2e-3, 0.1),
    "Adam": (lambda net, lr: torch.optim.Adam(net.parameters(), lr), 1e-5, 1, 5e-5, 1e-3),
    "AdamW": (lambda net, lr: torch.optim.AdamW(net.parameters(), lr), 1e-5, 1, 5e-5, 1e-3),
    "Muon": (lambda net, lr: make_optimizer(net, "muon", lr), 1e-3, 10, 2e-3, 0.02)}

PAIRS = [(model, optimizer) for model, optimizers in (
    ("MLP", "SGD AdamW"), ("conv net", "SGD AdamW"), ("transformer", "SGD AdamW"),
    ("LSTM", "SGD AdamW"), ("ResNet", "SGD AdamW Muon"), ("ViT", "AdamW"),
    ("autoencoder", "SGD Adam")) for optimizer in optimizers.split()]


@functools.cache
def data_of(model):
    torch.manual_seed(0)
    x, y = MODELS[model][1]()
    return TensorDataset(x[HELD_OUT:], y[HELD_OUT:]), x[:HELD_OUT], y[:HELD_OUT]


def start(model, optimizer, batch, seed):
    """The untrained network, its optimizer, its loss and the batches."""
    data = data_of(model)[0]
    torch.manual_seed(seed)
    net, (kind, low, *_) = MODELS[model][0](), OPTIMIZERS[optimizer]
    return (net, kind(net, low), MODELS[model][2],
            DataLoader(data, batch, shuffle=True, drop_last=True))


def truth(model, optimizer, batch, seed, peak):
    """The held-out loss after one cycle; a peak of 0 is the untrained network."""
    net, update, loss, loader = start(model, optimizer, batch, seed)
    epochs = (batch for epoch in itertools.count() for batch in loader)
    for step, (x, y) in zip(range(STEPS if peak else 0), epochs):
        for group in update.param_groups:
            group["lr"] = one_cycle(step, STEPS, STEPS // 5, peak)
        update.zero_grad()
        loss(net(x), y).backward()
        update.step()
    with torch.no_grad():
        return loss(net.eval()(data_of(model)[1]), data_of(model)[2]).item()


# -------------------------------------- the finders: each takes what `start` makes, and a range

def ours(net, optimizer, loss, loader, low, high):
    found = suggest(range_test(net, optimizer, lambda batch: loss(net(batch[0]), batch[1]), loader,
                               lr_start=low, lr_end=high))
    return found.lr, found.lr_max, found.steepest


def ours_in_100(net, optimizer, loss, loader, low, high):
    found = suggest(range_test(net, optimizer, lambda batch: loss(net(batch[0]), batch[1]), loader,
                               lr_start=low, lr_end=high, steps=100))
    return [found.lr_max / 3]


def torch_lr_finder(net, optimizer, loss, loader, low, high):
    from matplotlib.figure import Figure
    from torch_lr_finder import LRFinder
    finder = LRFinder(net, optimizer, loss)
    finder.range_test(loader, start_lr=low, end_lr=high)
    return [finder.plot(ax=Figure().subplots())[1]]


def fastai(net, optimizer, loss, loader, low=1e-7, high=10):
    from fastai.callback.schedule import minimum, slide, steep, valley
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    with tempfile.TemporaryDirectory() as folder:
        learner = Learner(DataLoaders(loader, loader), net, loss, path=folder,
                          opt_func=lambda parameters, **options: OptimWrapper(opt=optimizer))
        return learner.lr_find(low, high, show_plot=False,
                               suggest_funcs=(valley, slide, steep, minimum))


def lightning(net, optimizer, loss, loader, low=1e-8, high=1):
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.tuner import Tuner

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.lr = net, low

        def training_step(self, batch, index):
            return loss(net(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, logger=False,
                          enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, default_root_dir=folder)
        return [Tuner(trainer).lr_find(Module(), loader, min_lr=low, max_lr=high).suggestion()]


FASTAI = "fastai valley", "fastai slide", "fastai steep", "fastai minimum / 10"
FINDERS = [(ours, "torch", True, ("lr", "LRMAX", "steepest")),
           (ours_in_100, "torch", True, ("LRMAX / 3 of 100 steps",)),
           (torch_lr_finder, "torch-lr-finder", True, ("torch-lr-finder, on our range",)),
           (fastai, "fastai", False, FASTAI), (lightning, "lightning", False, ("Lightning",))]


def version(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"


def rows():
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def measure():
    torch.set_num_threads(1)                              # so small, a second one only costs
    there = {(r["model"], r["optimizer"], r["batch"], r["seed"], r.get("rule", r.get("peak")))
             for r in rows()}

    def write(*where, **result):
        line = dict(zip(("model", "optimizer", "batch", "seed"), where), **result)
        with ROWS.open("a") as file:
            print(json.dumps(line), file=file)
        print(*where, *result.values(), flush=True)

    for batch, pair in itertools.product(BATCHES, PAIRS):
        _, low, high, lowest, _ = OPTIMIZERS[pair[1]]
        peaks = [0, *(float(f"{lowest * 2.5 ** k:.3g}") for k in range(PEAKS))]
        for peak, seed in itertools.product(peaks, TRUTH_SEEDS):
            if (*pair, batch, seed, peak) not in there:
                loss = truth(*pair, batch, seed, peak)
                write(*pair, batch, seed, peak=peak, steps=STEPS if peak else 0,
                      loss=round(loss, 5) if math.isfinite(loss) else None,
                      version=version("torch"))
        for seed, (finder, package, here, rules) in itertools.product(SWEEP_SEEDS, FINDERS):
            if version(package) and (*pair, batch, seed, rules[0]) not in there:
                with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), \
                     contextlib.redirect_stderr(null):
                    try:
                        found = finder(*start(*pair, batch, seed), *((low, high) if here else ()))
                    except (NotFound, RuntimeError, IndexError):      # peers: too short a curve
                        found = [None] * len(rules)
                for rule, rate in zip(rules, found):
                    write(*pair, batch, seed, rule=rule, rate=rate and float(f"{rate:.4g}"),
                          version=version(package))


# ------------------------------------------------------------------------------------- the tables

def share_lost(peaks, means, untrained, rate):
    """In %, of the fall from the untrained loss to the best peak's mean: what `rate` misses."""
    loss = np.interp(math.log(rate), np.log(peaks), means)
    return float(100 * (loss - min(means)) / (untrained - min(means)))


def regrets(batch):
    """{(model, optimizer): (best peak, {rule: [(rate, regret) or None]}, the function regret)}"""
    pairs, results = defaultdict(lambda: (defaultdict(list), defaultdict(list))), {}
    for row in rows():
        if row["batch"] == batch:
            losses, rates = pairs[row["model"], row["optimizer"]]
            if "peak" in row:
                losses[row["peak"]].append(math.inf if row["loss"] is None else row["loss"])
            else:
                rates[row["rule"]].append(row["rate"])
    for pair, (losses, rates) in pairs.items():
        if len(losses) <= PEAKS or "Lightning" not in rates:     # not all of it is measured yet
            continue
        untrained = statistics.mean(losses.pop(0))
        peaks = sorted(losses)
        means = [statistics.mean(min(loss, untrained) for loss in losses[peak]) for peak in peaks]
        regret = functools.partial(share_lost, peaks, means, untrained)
        rates["a constant"] = [OPTIMIZERS[pair[1]][4]]
        results[pair] = peaks[means.index(min(means))], {
            rule: [rate and (rate, regret(rate)) for rate in found]
            for rule, found in rates.items() if rule in SHOWN}, regret
    return results


SHOWN = ("lr", "LRMAX", "steepest", "LRMAX / 3 of 100 steps", "torch-lr-finder, on our range",
         *FASTAI, "Lightning", "a constant")


def summary(batch, shown=SHOWN):
    """A table's head and body: a row for each rule, over all pairs and sweeps."""
    pairs, body = regrets(batch), []
    for rule in shown:
        asked = [found[rule] for _, found, _ in pairs.values() if rule in found]
        answered = [[answer for answer in answers if answer] for answers in asked]
        sweeps = [regret for answers in answered for _, regret in answers]
        means = [statistics.mean(regret for _, regret in a) for a in answered if a]
        spreads = [max(a)[0] / min(a)[0] for a in answered if a]
        body.append([rule, f"{statistics.mean(sweeps):.1f}", f"{max(means):.1f}",
                     f"{sum(regret > 20 for regret in sweeps)} of {len(sweeps)}",
                     sum(map(len, asked)) - len(sweeps),
                     f"{statistics.geometric_mean(spreads):.1f} ({max(spreads):,.1f})"])
    return [f"batches of {batch}, {len(pairs)} pairs", "mean regret", "worst pair", "above 20 %",
            "declined", "largest / smallest of five (at most)"], body


def by_pair(batch):
    """A table's head and body: a row for each pair, the mean regret of each rule."""
    return [f"batches of {batch}", "best peak", *SHOWN], [
        [", ".join(pair), f"{best:.2g}", *(
            f"{statistics.mean(a[1] for a in found[rule] if a):.1f}"
            if any(found.get(rule, [])) else "-" for rule in SHOWN)]
        for pair, (best, found, _) in regrets(batch).items()]


LRMAX_OF = {"400": lambda slow, fast: slow, "100": lambda slow, fast: fast,
            "400 and 100, geometric mean": lambda slow, fast: fast and (slow * fast) ** 0.5}


def shares():
    """A table's head and body: the best share of LRMAX, and the best without a pair's own model."""
    body, inverses = [], [k / 10 for k in range(10, 61)]                # LRMAX down to LRMAX / 6

    def best(costs):
        return min(inverses, key=lambda inverse: statistics.mean(cost[inverse] for cost in costs))

    pairs = {batch: regrets(batch) for batch in BATCHES}
    for batch, (steps, reading) in itertools.product(BATCHES, LRMAX_OF.items()):
        costs = {}
        for pair, (_, found, regret) in pairs[batch].items():
            slow = [answer and answer[0] for answer in found["LRMAX"]]
            fast = [answer and 3 * answer[0] for answer in found["LRMAX / 3 of 100 steps"]]
            if answers := [*filter(None, map(reading, slow, fast))]:
                costs[pair] = {inverse: statistics.mean(regret(lr_max / inverse)
                                                        for lr_max in answers)
                               for inverse in inverses}
        on_all = best(costs.values())
        chosen = {pair: best([cost for other, cost in costs.items() if other[0] != pair[0]])
                  for pair in costs}
        lost = [costs[pair][chosen[pair]] for pair in costs]
        body.append([steps, batch, len(costs), f"1 / {on_all}",
                     f"{statistics.mean(cost[on_all] for cost in costs.values()):.1f}",
                     f"1 / {min(chosen.values())} to 1 / {max(chosen.values())}",
                     f"{statistics.mean(lost):.1f}", f"{max(lost):.1f}"])
    return ["steps", "batch", "pairs", "best share of LRMAX", "mean regret",
            "best without the pair's model", "mean regret", "worst pair"], body


if __name__ == "__main__":
    measure()
