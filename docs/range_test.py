"""How far can LRMAX be trusted on other models? Four small ones, by SGD and by AdamW, on the CPU.

    python -m docs.range_test        prints the table in about 4 minutes on 2 cores

Each row: the LRMAX that the range test finds, the steepest rate as a share of it, and the held-out
loss (mean of two seeds, which differ in weights and batches) after 300 steps of one cycle whose top
is 3, 1, 1/3 and 1/10 of LRMAX, and the steepest rate. Nothing is downloaded: the MLP learns what
a random network says, the conv net blurred patterns in noise, the two others Python's own library,
letter by letter.
"""
import argparse
import functools
import pathlib

import torch
import torch.nn.functional as F
from torch import nn

from lrfinder import range_test, suggest

TRAIN_STEPS, BATCH, LENGTH, LETTERS = 300, 32, 32, 128    # LENGTH: letters in a piece of text


class Transformer(nn.Module):
    """(B, LENGTH) letters to (B, LETTERS, LENGTH) logits of the next ones: two layers, pre-norm."""

    def __init__(self, width=48):
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width),
                                            enable_nested_tensor=False)
        self.head = nn.Linear(width, LETTERS)
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


def mlp():
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 10))


def conv_net():
    """Without batch normalisation: (B, 1, 12, 12) to (B, 10)."""
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Flatten(), nn.Linear(32 * 9, 10))


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


def batches(x, y):
    while True:
        chosen = torch.randint(len(x), (BATCH,))
        yield x[chosen], y[chosen]


def train(model, optimizer, x, y, lr_max):
    """One cycle: evenly from LRMAX / 10 up to LRMAX in a fifth of the steps, and down again."""
    for step, (inputs, labels) in zip(range(TRAIN_STEPS), batches(x, y)):
        share = min(step / (0.2 * TRAIN_STEPS), (TRAIN_STEPS - step) / (0.8 * TRAIN_STEPS))
        optimizer.param_groups[0]["lr"] = lr_max * (0.1 + 0.9 * share)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def main():
    torch.set_num_threads(1)                              # so small, a second one only costs
    print(f"{'':20}{'LRMAX':>8}{'steepest':>9}" + "".join(f"{name:>7}" for name in (
        "3", "1", "1/3", "1/10", "steep")))
    for make_model, make_data in ((mlp, vectors), (conv_net, images), (Transformer, text),
                                  (Lstm, text)):
        torch.manual_seed(0)
        x, y = make_data()
        x, y, held_x, held_y = x[1000:], y[1000:], x[:1000], y[:1000]
        for kind, low, high in ((functools.partial(torch.optim.SGD, momentum=0.9), 1e-3, 100),
                                (torch.optim.AdamW, 1e-5, 1)):
            torch.manual_seed(0)
            model = make_model()
            found = suggest(range_test(model, kind(model.parameters(), lr=low), F.cross_entropy,
                                       batches(x, y), lr_start=low, lr_end=high))
            losses = []
            for lr in (*(found.lr_max * share for share in (3, 1, 1 / 3, 1 / 10)), found.steepest):
                held = 0
                for seed in (1, 2):
                    torch.manual_seed(seed)
                    model = make_model()
                    train(model, kind(model.parameters(), lr=lr), x, y, lr)
                    with torch.no_grad():
                        held += F.cross_entropy(model(held_x), held_y).item() / 2
                losses.append(held)
            name = f"{make_model.__name__}, {getattr(kind, 'func', kind).__name__}"
            print(f"{name:20}{found.lr_max:8.3g}{found.steepest / found.lr_max:9.2g}"
                  + "".join(f"{loss:7.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
