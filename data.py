"""CIFAR-10 on the GPU as bytes, an epoch of it augmented by one launch of a kernel.

The training set is 50,000 x 32 x 32 x 3 bytes = 154 MB: it fits on any GPU, so it goes there once,
as uint8, and never comes back. An epoch is then a table of random numbers, one row an image:

    INDEX          which image; all rows together are a permutation
    TOP, LEFT      where the 32 x 32 crop starts in the image padded by 4 (0 .. 8 each)
    FLIP           1 = mirrored left to right: by chance in epoch 0, then every other epoch
    CUT_Y, CUT_X   centre of the 8 x 8 cutout (0 .. 31 each); what passes the border is clipped

and the augmented epoch is a *pure function* of the bytes and that table: `augment` in plain torch;
the same from one Triton kernel, `fused_augment`: 3,072 bytes an image in, 6,144 (bf16) out.

    loader = Loader(load("auto"), 512, torch.bfloat16, torch.device("cuda"))
    for inputs, labels in loader.epoch(seed=0, epoch=0):     # (512, 3, 32, 32), (512,)
        ...

    python data.py         draws augmented.png
"""
import os
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

why_not = "switched off"
try:
    import triton
    import triton.language as tl
except Exception as error:        # Windows and macOS have no Triton, and an install can be broken
    triton, why_not = None, error

SIZE, PAD, CUT = 32, 4, 8
INDEX, TOP, LEFT, FLIP, CUT_Y, CUT_X = range(6)              # the columns of the table


# ------------------------------------------------------------------------------ random numbers

GAMMA = 0x9E3779B97F4A7C15               # 2^64 / golden ratio, odd
EVERY_EPOCH = 2**32 - 1                  # a stream of numbers that no epoch has


def mix(z):
    """SplitMix64's bijection of 64-bit integers: every output bit depends on every input bit.

    Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014. A tensor of int64 to
    another, as torch has few operations without a sign: products have the same 64 bits with it (so
    constants from 2^63 on stand minus 2^64), and the masks make >> shift in zeros. Or one of
    Python's integers to another, whose lowest 64 bits are right.
    """
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))


def random_numbers(count, seed, stream, device="cpu"):
    """count random integers from 0 .. 2^63 - 1, the same on every device: (count,) int64.

    Number k is a pure function of (seed, stream, k), so that no state is kept, the GPU needs no
    host, and an epoch can be made again alone. seed: 0 .. 2^31 - 1, stream: 0 .. 2^32 - 1.
    """
    start = (mix(seed << 32 | stream) + 2**63) % 2**64 - 2**63          # 64 bits, with a sign
    k = torch.arange(1, count + 1, device=device)
    return mix(k * (GAMMA - 2**64) + start) & (2**63 - 1)    # numbers 1 .. count of SplitMix64


def draw_epoch(count, seed, epoch, device="cpu"):
    """One epoch's table of random numbers, (count, 6) int32, in the order of training."""
    rest = random_numbers(count, seed, epoch, device)
    columns = [torch.arange(count, device=device)]
    # One number an image holds all of its choices, as a time holds hours, minutes and seconds.
    for choices in (2 * PAD + 1, 2 * PAD + 1, SIZE, SIZE):
        columns.append(rest % choices)
        rest = rest // choices
    # Alternating flip (Jordan, arXiv 2404.00498): chance says on which side an image starts, then
    # it changes sides every epoch.
    columns.insert(FLIP, (random_numbers(count, seed, EVERY_EPOCH, device) + epoch) % 2)
    order = rest.argsort(stable=True)              # by what is left, 46 bits: a shuffle
    return torch.stack(columns, dim=1)[order].int()


def plain_draws(count, device="cpu"):
    """The draws that change nothing, in order: crop in the middle, no flip, cutout far outside."""
    draws = torch.tensor([0, PAD, PAD, 0, -SIZE, -SIZE], dtype=torch.int32, device=device)
    draws = draws.repeat(count, 1)
    draws[:, INDEX] = torch.arange(count)
    return draws


# -------------------------------------------------------------------------------- augmentation

def reflect(i):
    """Coordinates -31 .. 62 folded back into 0 .. 31 as in a mirror: -1 -> 1, 32 -> 30."""
    return torch.minimum(i.abs(), 2 * (SIZE - 1) - i.abs())


def augment(images, draws, mean, inverse_std, dtype):
    """Crop, flip, cut out, normalise: (N, 32, 32, 3) uint8 and (B, 6) draws to (B, 3, 32, 32).

    mean and inverse_std are (3,) float32 on the scale 0 .. 255; the result is channels_last.
    """
    index, top, left, flip, cut_y, cut_x = draws.long()[:, :, None].unbind(1)      # (B, 1) each
    row = torch.arange(SIZE, device=images.device)                                 # (32,)
    place = torch.arange(SIZE * 3, device=images.device)                           # (96,)
    column, channel = place // 3, place % 3                  # a row is r g b r g b r g b ...
    # Crop and flip are only a question of where a pixel comes from: pixel (row, column) of the
    # flipped crop is pixel (row, 31 - column) of the crop, which starts at (top - 4, left - 4).
    y = reflect(row + top - PAD)                                                   # (B, 32)
    x = reflect(torch.where(flip == 1, SIZE - 1 - column, column) + left - PAD)    # (B, 96)
    rows = images.view(-1, SIZE * 3).index_select(0, (index * SIZE + y).flatten())
    rows = rows.view(-1, SIZE, SIZE * 3)                                           # (B, 32, 96)
    pixels = rows.gather(2, (x * 3 + channel)[:, None].expand_as(rows))            # (B, 32, 96)
    # Subtract, then multiply: that rounds twice everywhere, so every device should give the same
    # bits. On some, pixel * scale + shift may become one multiply-add, which rounds once.
    values = (pixels - mean.repeat(SIZE)) * inverse_std.repeat(SIZE)               # (B, 32, 96)
    # Cut out rows cut_y - 4 .. cut_y + 3 and columns likewise; 0 is the mean colour by now.
    cut_row, cut_column = row - cut_y + CUT // 2, column - cut_x + CUT // 2
    cut = ((cut_row >= 0) & (cut_row < CUT))[:, :, None] \
        & ((cut_column >= 0) & (cut_column < CUT))[:, None, :]                     # (B, 32, 96)
    # NHWC in memory, seen as (B, 3, 32, 32), is exactly what torch calls channels_last.
    return values.masked_fill_(cut, 0).view(-1, SIZE, SIZE, 3).to(dtype).permute(0, 3, 1, 2)


if triton:
    # How to read it: Triton starts a program for each image, and `program_id` tells it which. Names
    # such as `images` hold addresses: `images + 5` is that of the value five further on, and `load`
    # and `store` move what is there. What looks like a number, as `row`, is a vector of them, which
    # the program's threads share out; `mask` says which of its elements are not to be touched.
    # tl.constexpr are numbers that the compiler knows. augment_kernel[(B,)](...) starts B programs,
    # of num_warps x 32 threads each.
    @triton.jit
    def augment_kernel(images, draws,              # *uint8 (N, 32, 32, 3), *int32 (B, 6)
                       mean, inverse_std, out,     # *float32 (3,) twice, *dtype (B, 32, 32, 3)
                       SIZE: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr):
        image = tl.program_id(0).to(tl.int64)      # one program, one image; bytes may pass 2^31
        draws += image * 6
        index = tl.load(draws).to(tl.int64)
        top, left, flip = tl.load(draws + 1), tl.load(draws + 2), tl.load(draws + 3)
        cut_y, cut_x = tl.load(draws + 4), tl.load(draws + 5)
        tl.assume((top >= 0) & (top <= 2 * PAD))   # tells the compiler: rows 4 .. 27 stay inside
        # The image is read once, as it lies, 16 bytes a thread. Crop and flip then pick from what
        # was read: a gather in shared memory, which is fast in any order. All is one vector, its
        # last quarter masked, as lengths must be powers of two.
        i = tl.arange(0, 4 * SIZE * SIZE)                             # (4096,)
        inside = i < 3 * SIZE * SIZE
        picture = tl.load(images + index * (SIZE * SIZE * 3) + i, mask=inside)
        # From here on i only numbers the results, in an order that suits: places 0 .. 31 of rows 0,
        # 1, ..., 31, then places 32 .. 63, then the rest: / and % by powers of two are shifts.
        row, place = i // SIZE % SIZE, i // (SIZE * SIZE) * SIZE + i % SIZE
        column, channel = place // 3, place % 3
        y = tl.abs(row + top - PAD)                                   # reflect, as above
        y = tl.minimum(y, 2 * (SIZE - 1) - y)
        x = tl.abs(tl.where(flip == 1, SIZE - 1 - column, column) + left - PAD)
        x = tl.minimum(x, 2 * (SIZE - 1) - x)
        pixel = tl.gather(picture, x * 3 + channel + y * (SIZE * 3), 0).to(tl.float32)
        # Three colours by three loads and a choice, not by a load for each of the 3,072 values.
        red, green, blue = tl.load(mean), tl.load(mean + 1), tl.load(mean + 2)
        colour = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        red, green, blue = tl.load(inverse_std), tl.load(inverse_std + 1), tl.load(inverse_std + 2)
        scale = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        # The cutout is a scale of 0, once a row and once a column. This `fma` merges nothing: it
        # rounds once, as `*` does. Its + 0.0 turns the -0.0 of a dark pixel times 0 into 0.0.
        cut_row, cut_column = row - cut_y + CUT // 2, column - cut_x + CUT // 2
        cut = tl.where((cut_column >= 0) & (cut_column < CUT), 0.0, scale)
        scale = tl.where((cut_row >= 0) & (cut_row < CUT), cut, scale)
        value = tl.fma(pixel - colour, scale, 0.0)
        target = out + image * (SIZE * SIZE * 3) + (column * 3 + channel)
        tl.store(target + row * (SIZE * 3), value.to(out.dtype.element_ty), mask=inside)


def fused_augment(images, draws, mean, inverse_std, dtype):
    """`augment` in one launch: the same arguments, the same result.

    It trusts the draws: indices are those of images, TOP and LEFT lie in 0 .. 8.
    """
    assert triton, f"no Triton: {why_not}"
    out = torch.empty((len(draws), SIZE, SIZE, 3), dtype=dtype, device=images.device)
    # Nothing here should be fused (see `augment`); the switch makes sure.
    augment_kernel[(len(draws),)](images, draws, mean, inverse_std, out, SIZE, PAD, CUT,
                                  num_warps=4, enable_fp_fusion=False)
    return out.permute(0, 3, 1, 2)


def pick_augment(device, dtype):
    """fused_augment where Triton runs, else augment; on a CUDA device without, it says why."""
    if device.type != "cuda":
        return augment
    try:                          # Triton may be missing, or broken, or the GPU too old for it
        trial = torch.zeros(1, SIZE, SIZE, 3).byte(), plain_draws(1), torch.ones(3), torch.ones(3)
        fused_augment(*(tensor.to(device) for tensor in trial), dtype)
        return fused_augment
    except Exception as error:    # Triton's errors have no common class
        print(f"note: plain torch, not the fused kernel ({error})", file=sys.stderr)
        return augment


# -------------------------------------------------------------------------------------- loader

class Loader:
    """A data set on the device: `epoch` gives augmented training batches, `test` the test set.

    Inputs are (B, 3, 32, 32) of dtype, normalised, channels_last; labels (B,) int64.
    """

    def __init__(self, data, batch_size, dtype, device):
        if not 0 < batch_size <= len(data.train_images):
            raise ValueError(f"batch_size {batch_size} must lie in 1 .. {len(data.train_images)}, "
                             f"the number of training images")
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            tensor.to(device) for tensor in data[2:6])
        self.mean, self.inverse_std = (v.to(device) for v in normalisation(data.train_images))
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self.augment = pick_augment(device, dtype)

    def __len__(self):
        """Training batches an epoch; the images that do not fill one sit this epoch out."""
        return len(self.train_images) // self.batch_size

    def epoch(self, seed, epoch):
        """Yield (inputs, labels), no image twice, in the epoch's own order."""
        where = self.device if self.device.type == "cuda" else "cpu"
        draws = draw_epoch(len(self.train_images), seed, epoch, where)
        draws = draws[:len(self) * self.batch_size].to(self.device)
        return self.batches(self.train_images, self.train_labels, draws, self.batch_size)

    def test(self):
        """Yield every test image once, as it is; the last batch may be short."""
        size = 2500 if self.device.type == "cuda" else self.batch_size     # a GPU likes them large
        draws = plain_draws(len(self.test_images), self.device)
        return self.batches(self.test_images, self.test_labels, draws, size)

    def batches(self, images, labels, draws, batch_size):
        labels = labels[draws[:, INDEX].long()]
        # The kernel fills up to 100 batches at once: 315 MB in bf16. Plain torch needs more room.
        launch = batch_size * (100 if self.augment is fused_augment else 1)
        for part, part_labels in zip(draws.split(launch), labels.split(launch)):
            inputs = self.augment(images, part, self.mean, self.inverse_std, self.dtype)
            yield from zip(inputs.split(batch_size), part_labels.split(batch_size))


def normalisation(images):
    """Mean and 1 / standard deviation of each channel of (N, 32, 32, 3) uint8: (3,) float32.

    By counting how often each value occurs: exact, and without a copy of all images in float.
    """
    value = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([images[..., c].flatten().bincount(minlength=256) for c in range(3)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)             # (3, 256)
    mean = share @ value                                                          # (3,)
    deviation = (share @ value**2 - mean**2).clamp(min=1).sqrt()      # 1 where all are one colour
    return mean.float(), (1 / deviation).float()


# ------------------------------------------------------------------------------------ data sets

class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64, contiguous; and how train.py takes them."""
    name: str
    classes: list             # their names
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    batch_size: int = 512
    width: int = 64           # of the network
    epochs: int = 24
    real: bool = True         # False for the drawn shapes


def make_dataset(name, arrays, classes=None, **options):
    """A Dataset of four arrays, train and test, each images and labels; ValueError says what else.

    Labels may also be (N, 1). Without `classes`, their names, they are 0, 1, ... up to the largest.
    """
    tensors = []
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
            raise ValueError(f"{name}: {split}_images must be uint8 (N, 32, 32, 3), not "
                             f"{images.dtype} {images.shape}")
        if labels.shape == (len(images), 1):
            labels = labels[:, 0]
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            raise ValueError(f"{name}: {split}_labels must be {len(images)} integers, not "
                             f"{labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= 10_000:
            raise ValueError(f"{name}: {split}_labels reach from {labels.min()} to {labels.max()}: "
                             f"number the classes 0, 1, 2, ..., 10,000 at most")
        tensors.append(torch.from_numpy(np.ascontiguousarray(images)))
        tensors.append(torch.from_numpy(labels.astype(np.int64)))
    count = max(tensors[1].max().item(), tensors[3].max().item()) + 1
    classes = classes or [str(k) for k in range(count)]
    if len(classes) < count:
        raise ValueError(f"{name}: there are {len(classes)} classes, but labels up to {count - 1}")
    return Dataset(name, classes, *tensors, **options)


def load(source="auto", data_dir="data"):
    """The Dataset that --data names: auto, cifar10, synthetic or the path of an .npz.

    auto is CIFAR-10, or, where it is missing and cannot be downloaded, drawn shapes. Raises
    OSError or ValueError with one sentence that says what to do.
    """
    if source == "synthetic":
        return synthetic()
    if source not in ("auto", "cifar10"):
        return load_npz(source)
    folder = Path(data_dir)
    if folder.name == "cifar-10-batches-py":                 # the files' own folder is in this one
        folder = folder.parent
    try:
        return load_cifar10(folder)
    except OSError as error:
        if source == "cifar10" or any(folder.glob("cifar-10*")):
            raise                      # drawn shapes would hide that what is there is damaged
        print(f"{error}\nTHIS IS NOT CIFAR-10: going on with drawn shapes", file=sys.stderr)
        return synthetic()


def load_cifar10(folder):
    """CIFAR-10 from a folder, downloaded (170 MB) where missing; torchvision checks MD5 sums."""
    from torchvision.datasets import CIFAR10                 # takes a second: only where needed
    if not any(folder.glob("cifar-10*")):
        print(f"CIFAR-10 is not in '{folder}': downloading it, 170 MB", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)       # seconds without a byte; torchvision would wait for ever
    try:
        train, test = (CIFAR10(folder, train=part, download=part) for part in (True, False))
    except Exception as error:         # OSError, RuntimeError, pickle's, tarfile's ...
        raise OSError(f"CIFAR-10 is not whole in '{folder}' and cannot be downloaded ({error}): "
                      f"put {CIFAR10.filename} there, or see --data in -h") from error
    finally:
        socket.setdefaulttimeout(patience)
    # torchvision's arrays are transposed views; make_dataset copies them into rows of pixels.
    return make_dataset("CIFAR-10", (train.data, train.targets, test.data, test.targets),
                        train.classes)


def load_npz(path):
    """train_images, train_labels, test_images, test_labels and, if there, classes of an .npz."""
    names = Dataset._fields[2:6]
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in names]
            classes = archive["classes"].tolist() if "classes" in archive else None
    except OSError as error:
        raise OSError(f"cannot read '{path}': {error.strerror or error}; see --data in -h")
    except Exception as error:         # a key that is missing, pickled objects, damage of any kind
        raise ValueError(f"'{path}' is no .npz with {', '.join(names)}, or is damaged; see --data "
                         f"in -h") from error
    return make_dataset(Path(path).name, arrays, classes)


def synthetic(train=2560, test=1000):
    """Ten classes of drawn shapes to train on where CIFAR-10 is missing; all survive a flip."""
    # Place, size and both colours are random, the contrast is low and the noise strong, so that a
    # linear classifier learns next to nothing, and the network needs all of its few epochs.
    random, count = np.random.default_rng(0), train + test
    radius = random.uniform(6, 11, (count, 1, 1))
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
    ground = random.uniform(40, 215, (count, 1, 1, 3))
    contrast = random.uniform(25, 90, ground.shape) * random.choice([-1, 1], ground.shape)
    images = np.where(shape, ground + contrast, ground)
    images += random.normal(0, 30, (count, SIZE, SIZE, 3))
    images = images.clip(0, 255).astype(np.uint8)
    return make_dataset("drawn shapes", (images[:train], labels[:train], images[train:],
                                         labels[train:]), [*shapes],
                        batch_size=64, width=16, epochs=8, real=False)


def plot(data, images=5):
    """A figure, a row an image: stored, padded, cropped, flipped, cut out; then three epochs."""
    from matplotlib.figure import Figure
    epochs = torch.stack([draws[draws[:, INDEX].argsort()]
                          for draws in (draw_epoch(images, 0, epoch) for epoch in range(3))])
    stages = plain_draws(images).repeat(4, 1, 1)                               # (4, images, 6)
    stages[1:, :, [TOP, LEFT]] = torch.tensor([1, 8], dtype=torch.int32)       # up and right
    stages[2:, :, FLIP] = 1
    stages[3, :, [CUT_Y, CUT_X]] = epochs[0][:, [CUT_Y, CUT_X]]
    draws = torch.cat([stages, epochs])                                        # (7, images, 6)
    mean, inverse_std = normalisation(data.train_images)
    values = augment(data.train_images, draws.flatten(0, 1), mean, inverse_std, torch.float32)
    values = values.permute(0, 2, 3, 1) / inverse_std + mean                   # 0 .. 255 again
    pictures = list(values.round().byte().view(7, images, SIZE, SIZE, 3).numpy())
    stored = data.train_images[:images].numpy()
    pictures.insert(1, np.pad(stored, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), "reflect"))
    titles = ["stored", "padded by 4", "cropped", "flipped", "cut out",
              "epoch 1", "epoch 2", "epoch 3"]
    figure = Figure(figsize=(len(titles), images * 1.02 + 0.3), layout="constrained")
    for column, (title, shown) in enumerate(zip(titles, pictures)):
        for row in range(images):
            ax = figure.add_subplot(images, len(titles), row * len(titles) + column + 1)
            ax.imshow(shown[row])
            ax.axis("off")
            if row == 0:
                ax.set_title(title, fontsize=9)
    return figure


def main():
    os.environ["MPLBACKEND"] = "agg"             # a notebook's backend may be missing here
    data, device = load(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plot(data).savefig("augmented.png", dpi=100)
    print("wrote augmented.png")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loader = Loader(data, data.batch_size, dtype, device)
    for epoch in range(3):                       # the first compiles and allocates
        start, seen = time.perf_counter(), 0
        for inputs, labels in loader.epoch(0, epoch):
            seen += len(labels)
        inputs[0, 0, 0, 0].item()                # waits for the GPU
    seconds = time.perf_counter() - start
    print(f"an epoch by {loader.augment.__name__} on {device}: {seen:,} images in "
          f"{1e3 * seconds:.2f} ms, {seen / seconds:,.0f} a second")


if __name__ == "__main__":
    main()
