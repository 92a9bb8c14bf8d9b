"""CIFAR-10 on the GPU as bytes, augmented by one kernel launch a batch.

The training set is 50,000 x 32 x 32 x 3 bytes = 154 MB: it fits on any GPU, so it goes there once,
as uint8, and never comes back. An epoch is then a table of random numbers, one row an image:

    index          which image
    top, left      where the 32 x 32 crop starts in the image padded by 4 (0 .. 8 each)
    flip           1 = mirrored left to right: by chance in epoch 0, then every other epoch
    cut_y, cut_x   centre of the 8 x 8 cutout (0 .. 31 each); what passes the border is clipped

and a batch is a *pure function* of the bytes and 512 rows of that table: `augment` in plain torch;
the same from one Triton kernel, `fused_augment`: 3,072 bytes an image in, 6,144 (bf16) out.

    python data.py         draws augmented.png and times the loader against the alternatives
"""
import itertools
import socket
import sys
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from model import UserError, check_zip, first_line, pick_device, precision, run

try:
    import triton
    import triton.language as tl
except Exception as error:        # Windows and macOS have no Triton, and an install can be broken
    triton, why_not = None, first_line(error)

SIZE, PAD, CUT = 32, 4, 8


def draw_epoch(count, seed, epoch):
    """One epoch's table of random numbers, (count, 6) int32; the order is a permutation.

    Seeded by a hash of (seed, epoch), each 0 .. 2^32 - 1: by the sum, seeds would share epochs.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(count)
    ranges = 2 * PAD + 1, 2 * PAD + 1, SIZE, SIZE
    top, left, cut_y, cut_x = (random.integers(0, n, count) for n in ranges)
    # Alternating flip (Jordan, arXiv 2404.00498): chance says on which side an image starts, then
    # it changes sides every epoch. (seed, 0, 1) is no (seed, epoch): numpy pads those with zeros.
    flip = (np.random.default_rng((seed, 0, 1)).integers(0, 2, count)[order] + epoch) % 2
    return torch.from_numpy(np.stack([order, top, left, flip, cut_y, cut_x], 1).astype(np.int32))


def plain_draws(count):
    """The draws that change nothing, in order: crop in the middle, no flip, cutout far outside."""
    draws = torch.tensor([0, PAD, PAD, 0, -SIZE, -SIZE], dtype=torch.int32).repeat(count, 1)
    draws[:, 0] = torch.arange(count)
    return draws


def reflect(i):
    """Coordinates -31 .. 62 folded back into 0 .. 31 as in a mirror: -1 -> 1, 32 -> 30."""
    return torch.minimum(i.abs(), 2 * (SIZE - 1) - i.abs())


def augment(images, draws, mean, inverse_std, dtype):
    """Crop, flip, cut out, normalise: (N, 32, 32, 3) uint8 and (B, 6) draws to (B, 3, 32, 32).

    mean and inverse_std are (3,) float32 on the scale 0 .. 255; the result is channels_last.
    """
    index, top, left, flip, cut_y, cut_x = draws.long()[:, :, None].unbind(1)      # (B, 1) each
    row = torch.arange(SIZE, device=images.device)                                 # (32,)
    lane = torch.arange(SIZE * 3, device=images.device)                            # (96,)
    column, channel = lane // 3, lane % 3                    # a row is r g b r g b r g b ...
    # Crop and flip are only a question of where a pixel comes from: pixel (row, column) of the
    # flipped crop is pixel (row, 31 - column) of the crop, which starts at (top - 4, left - 4).
    y = reflect(row + top - PAD)                                                   # (B, 32)
    x = reflect(torch.where(flip == 1, SIZE - 1 - column, column) + left - PAD)    # (B, 96)
    rows = images.view(-1, SIZE * 3).index_select(0, (index * SIZE + y).flatten())
    rows = rows.view(-1, SIZE, SIZE * 3)                                           # (B, 32, 96)
    pixels = rows.gather(2, (x * 3 + channel)[:, None].expand_as(rows))            # (B, 32, 96)
    # Subtract, then multiply: no compiler can fuse these two into one rounding (it could with
    # pixel * scale + shift), so every device should give the same bits.
    values = (pixels - mean.repeat(SIZE)) * inverse_std.repeat(SIZE)               # (B, 32, 96)
    # Cut out rows cut_y - 4 .. cut_y + 3 and columns likewise; 0 is the mean colour by now.
    cut_row, cut_column = row - cut_y + CUT // 2, column - cut_x + CUT // 2
    cut = ((cut_row >= 0) & (cut_row < CUT))[:, :, None] \
        & ((cut_column >= 0) & (cut_column < CUT))[:, None, :]                     # (B, 32, 96)
    # NHWC in memory, seen as (B, 3, 32, 32), is exactly what torch calls channels_last.
    return values.masked_fill_(cut, 0).view(-1, SIZE, SIZE, 3).to(dtype).permute(0, 3, 1, 2)


if triton:
    @triton.jit
    def augment_kernel(images, draws,              # *uint8 (N, 32, 32, 3), *int32 (B, 6)
                       mean, inverse_std, out,     # *float32 (3,) twice, *dtype (B, 32, 32, 3)
                       SIZE: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr):
        image = tl.program_id(0).to(tl.int64)    # one program, one image; bytes may pass 2^31
        draws += image * 6
        index = tl.load(draws).to(tl.int64)
        top, left, flip = tl.load(draws + 1), tl.load(draws + 2), tl.load(draws + 3)
        cut_y, cut_x = tl.load(draws + 4), tl.load(draws + 5)
        row = tl.arange(0, SIZE)                                      # (32,)
        y = tl.abs(row + top - PAD)                                   # reflect, as above
        y = tl.minimum(y, 2 * (SIZE - 1) - y)
        cut_row = row - cut_y + CUT // 2
        cut_row = (cut_row >= 0) & (cut_row < CUT)
        source = images + index * (SIZE * SIZE * 3) + (y * SIZE * 3)[:, None]       # (32, 1)
        target = out + image * (SIZE * SIZE * 3) + (row * SIZE * 3)[:, None]        # (32, 1)
        # The 96 values of a row in three tiles of 32, as tiles must be powers of two. What depends
        # on the row or the lane alone is a vector, computed once; only the rest takes a whole tile.
        for third in tl.static_range(3):
            lane = third * SIZE + tl.arange(0, SIZE)
            column, channel = lane // 3, lane % 3                     # (32,)
            x = tl.abs(tl.where(flip == 1, SIZE - 1 - column, column) + left - PAD)
            x = tl.minimum(x, 2 * (SIZE - 1) - x)
            cut_column = column - cut_x + CUT // 2
            cut_column = (cut_column >= 0) & (cut_column < CUT)
            pixel = tl.load(source + (x * 3 + channel)[None, :]).to(tl.float32)     # (32, 32)
            value = (pixel - tl.load(mean + channel)) * tl.load(inverse_std + channel)
            value = tl.where(cut_row[:, None] & cut_column[None, :], 0.0, value)
            tl.store(target + lane[None, :], value.to(out.dtype.element_ty))


def fused_augment(images, draws, mean, inverse_std, dtype):
    """`augment` in one launch: the same arguments, the same result."""
    assert triton, f"no Triton: {why_not}"
    out = torch.empty((len(draws), SIZE, SIZE, 3), dtype=dtype, device=images.device)
    # One warp an image: more would repeat its vectors. Fusion is off as 3.8 warns otherwise.
    augment_kernel[(len(draws),)](images, draws, mean, inverse_std, out, SIZE, PAD, CUT,
                                  num_warps=1, enable_fp_fusion=False)
    return out.permute(0, 3, 1, 2)


@cache                            # so that a note comes once
def pick_augment(device, dtype):
    """fused_augment where Triton runs, else augment; on a CUDA device without, it says why."""
    if device.type != "cuda":
        return augment
    try:                          # Triton may be missing, or broken, or the GPU too old for it
        trial = torch.zeros(1, SIZE, SIZE, 3).byte(), plain_draws(1), torch.ones(3), torch.ones(3)
        fused_augment(*(tensor.to(device) for tensor in trial), dtype)
        return fused_augment
    except Exception as error:    # Triton's errors have no common class
        print(f"note: plain torch, not the fused kernel ({first_line(error)})", file=sys.stderr)
        return augment


class Loader:
    """One split of a set on the device: `epoch` for training batches, `plain` for evaluation."""

    def __init__(self, images, labels, mean, inverse_std, batch_size, dtype, device):
        self.images, self.labels = images.to(device).contiguous(), labels.to(device)
        self.mean, self.inverse_std = mean.to(device), inverse_std.to(device)
        self.batch_size = min(batch_size, len(images))
        self.dtype, self.augment = dtype, pick_augment(device, dtype)

    def __len__(self):
        """Training batches an epoch; the images that do not fill one sit this epoch out."""
        return len(self.images) // self.batch_size

    def epoch(self, seed, epoch):
        """Yield (inputs (B, 3, 32, 32), labels (B,)), no image twice, in the epoch's own order."""
        return self.batches(draw_epoch(len(self.images), seed, epoch)[:len(self) * self.batch_size])

    def plain(self):
        """Yield every image once, as it is; the last batch may be short."""
        return self.batches(plain_draws(len(self.images)))

    def batches(self, draws):
        draws = draws.to(self.images.device)
        all_labels = self.labels[draws[:, 0].long()]
        for part, labels in zip(draws.split(self.batch_size), all_labels.split(self.batch_size)):
            yield self.augment(self.images, part, self.mean, self.inverse_std, self.dtype), labels


class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64; `real` is False for the generated set."""
    name: str
    classes: list             # their names
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    real: bool = True
    batch_size: int = 512     # unless train.py's --batch-size says otherwise


def load(source, data_dir="data"):
    """The data set that --data names: auto, cifar10, synthetic or the path of an .npz."""
    if source not in ("auto", "cifar10"):
        return synthetic() if source == "synthetic" else load_npz(source)
    try:
        return load_cifar10(data_dir)
    except UserError as error:
        if source == "cifar10" or Path(data_dir, "cifar-10-batches-py").exists():
            raise                      # generated images would hide that these are damaged
        print(f"{error}\nTHIS IS NOT CIFAR-10: going on with generated images", file=sys.stderr)
        return synthetic()


def load_cifar10(data_dir):
    """CIFAR-10 from data_dir, downloaded (170 MB) where missing; torchvision checks MD5 sums."""
    socket.setdefaulttimeout(20)       # seconds without a byte; torchvision would wait for ever
    try:
        train, test = (torchvision.datasets.CIFAR10(data_dir, train=part, download=True)
                       for part in (True, False))
    except Exception as error:         # OSError, RuntimeError, pickle's, tarfile's ...
        raise UserError(f"CIFAR-10 cannot be read from '{data_dir}' nor downloaded: put an intact "
                        f"cifar-10-python.tar.gz there, or see --data ({first_line(error)})")
    finally:
        socket.setdefaulttimeout(None)
    return Dataset("CIFAR-10", train.classes, torch.tensor(train.data), torch.tensor(train.targets),
                   torch.tensor(test.data), torch.tensor(test.targets))


def load_npz(path):
    """train_images, train_labels, test_images, test_labels from an .npz, checked one by one."""
    check_zip(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [np.ascontiguousarray(archive[name]) for name in Dataset._fields[2:6]]
    except Exception as error:         # a key is missing, or an array holds pickled objects
        raise UserError(f"{path}: {first_line(error)}; see --data in train.py -h")
    classes = len(np.unique(arrays[1]))
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        problem = None
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
            problem = f"images must be uint8 (N, 32, 32, 3), not {images.dtype} {images.shape}"
        elif labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            problem = f"labels must be {len(images)} integers, not {labels.dtype} {labels.shape}"
        elif labels.min() < 0 or labels.max() >= classes:
            problem = f"labels must be 0 .. {classes - 1}, not {labels.min()} .. {labels.max()}"
        if problem:
            raise UserError(f"{path}: {split}_{problem}")
    tensors = [torch.from_numpy(a if a.ndim == 4 else a.astype(np.int64)) for a in arrays]
    return Dataset(Path(path).name, [str(k) for k in range(classes)], *tensors)


def synthetic(train=2560, test=1000):
    """Ten classes of drawn shapes to train on where CIFAR-10 is missing; all survive a flip."""
    # Place, size and both colours are random, so a linear classifier stays far below 50 %.
    random, count = np.random.default_rng(0), train + test
    radius = random.uniform(7, 12, (count, 1, 1))
    y = np.arange(SIZE)[:, None] - random.uniform(11, 21, (count, 1, 1))       # (count, 32, 1)
    x = np.arange(SIZE)[None, :] - random.uniform(11, 21, (count, 1, 1))       # (count, 1, 32)
    round_, square = np.hypot(x, y) / radius, np.maximum(abs(x), abs(y)) / radius
    row, column, box = y // 3 % 2 == 0, x // 3 % 2 == 0, square < 1
    shapes = {
        "disc": round_ < 1, "ring": (round_ < 1) & (round_ > 0.65),
        "square": square < 0.9, "frame": (square < 0.9) & (square > 0.6),
        "triangle": box & (2 * abs(x) < y + radius), "cross": box & (abs(abs(x) - abs(y)) < 3),
        "plus": box & (np.minimum(abs(x), abs(y)) < 2.5), "horizontal stripes": box & row,
        "vertical stripes": box & column, "chessboard": box & (row ^ column)}
    labels = np.arange(count) % len(shapes)
    shape = np.stack(list(shapes.values()))[labels, np.arange(count), ..., None]
    ground = random.uniform(0, 255, (count, 1, 1, 3))
    colour = (ground + random.uniform(80, 175, ground.shape)) % 255      # never close to the ground
    images = np.where(shape, colour, ground) + random.normal(0, 12, (count, SIZE, SIZE, 3))
    images, labels = torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.tensor(labels)
    return Dataset("generated images", [*shapes], images[:train], labels[:train],
                   images[train:], labels[train:], real=False, batch_size=128)


def normalisation(images):
    """Mean and 1 / standard deviation of each channel of (N, 32, 32, 3) uint8: (3,) float32."""
    deviation, mean = torch.std_mean(images.view(-1, 3).float(), dim=0, correction=0)
    return mean, 1 / deviation.clamp(min=1)


def draw(data, path):
    """Five images, a row each: stored, padded, cropped, flipped, cut out; in epochs 1, 2 and 3."""
    draws = plain_draws(5).repeat(8, 1, 1)                                     # (8, 5, 6)
    draws[2:, :, 1:3], draws[3:, :, 3] = torch.tensor([1, 8]), 1               # up and right; flip
    epochs = torch.stack([e[e[:, 0].argsort()] for e in (draw_epoch(5, 0, k) for k in range(4))])
    draws[4, :, 4:], draws[5:] = epochs[0, :, 4:], epochs[1:]
    draws, (mean, inverse_std) = draws.transpose(0, 1), normalisation(data.train_images)
    values = augment(data.train_images, draws.reshape(40, 6), mean, inverse_std, torch.float32)
    images = (values / inverse_std[:, None, None] + mean[:, None, None]) / 255  # (40, 3, 32, 32)
    framed = F.pad(images, (PAD, PAD, PAD, PAD), value=1)
    framed[1::8] = F.pad(images[::8], (PAD, PAD, PAD, PAD), mode="reflect")
    torchvision.utils.save_image(F.interpolate(framed, scale_factor=3), path, nrow=8, pad_value=1)


def transform_each(transform, images):
    return torch.stack([transform(image) for image in images])


def race(data, device):
    """Print images a second for every way there is on this machine: medians, side by side."""
    from torch.utils.benchmark import Timer
    dtype, (mean, inverse_std) = precision(device), normalisation(data.train_images)
    images = data.train_images.repeat(50_000 // len(data.train_images) + 1, 1, 1, 1)[:50_000]
    transform = v2.Compose([
        v2.RandomCrop(SIZE, PAD, padding_mode="reflect"), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32), v2.Normalize(mean.tolist(), (1 / inverse_std).tolist()),
        v2.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1))])
    workers = DataLoader(images.permute(0, 3, 1, 2), 512, shuffle=True, num_workers=2,
                         collate_fn=partial(transform_each, transform))
    loader = Loader(images, torch.zeros(50_000), mean, inverse_std, 512, dtype, device)
    theirs = (batch for _ in itertools.count() for batch in workers)
    ours = (batch for e in itertools.count() for batch in loader.epoch(0, e))
    draws, same = draw_epoch(50_000, 0, 0).to(device), (loader.mean, loader.inverse_std, dtype)
    batch, epoch = ((loader.images, draws[:n], *same) for n in (512, 50_000))
    moved = SIZE * SIZE * 3 * (1 + dtype.itemsize)                # bytes an image, in and out
    source, target = torch.ones(2, 50_000 * moved // 2, dtype=torch.uint8, device=device)
    ways = {"torchvision, 2 workers": (512, lambda: next(theirs)),
            "this loader": (512, lambda: next(ours)),
            "copy of as many bytes": (50_000, lambda: target.copy_(source))}
    if loader.augment is fused_augment:
        ways |= {"plain torch, one batch": (512, lambda: augment(*batch)),
                 "torch.compile of it": (512, partial(torch.compile(augment), *batch)),
                 "Triton kernel, one batch": (512, lambda: fused_augment(*batch)),
                 "Triton kernel, an epoch": (50_000, lambda: fused_augment(*epoch))}
    each = {}                                                     # seconds an image
    for name, (count, work) in ways.items():
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        each[name] = timer.blocked_autorange(min_run_time=2).median / count
    print(f"{f'{device.type}, {dtype}':28}images/s  x torchvision    GB/s  of copy")
    slow, copy = each["torchvision, 2 workers"], each["copy of as many bytes"]
    for name, t in each.items():
        print(f"{name:24}{1 / t:12,.0f}{slow / t:15.1f}{moved / t / 1e9:8.2f}{copy / t:9.1%}")


def main():
    draw(data := load("auto"), "augmented.png")
    race(data, pick_device())


if __name__ == "__main__":
    run(main)
