"""CIFAR-10 stays on the GPU as bytes; one launch of a kernel augments a hundred batches.

The training set is 50,000 x 32 x 32 x 3 bytes = 154 MB. It fits on any GPU, so it goes there once,
as uint8, and stays. A table of random numbers, one row per image, then determines each epoch:

    INDEX          which image; all rows together are a permutation
    TOP, LEFT      where the 32 x 32 crop starts in the image padded by 4 (0 .. 8 each)
    FLIP           1 = mirrored left to right
    CUT_Y, CUT_X   centre of the 8 x 8 cutout (0 .. 31 each); clipped at the border

The augmented epoch is a *pure function* of the bytes and that table. So its two implementations can
be compared bit by bit: `augment` in plain torch, and `augment_kernel` in Triton, which reads an
image's 3,072 bytes once and writes its result once, 6,144 bytes in bf16.

    loader = Loader(load("auto"), 512, torch.bfloat16, torch.device("cuda"))
    for inputs, labels in loader.epoch(seed=0, epoch=0):     # (512, 3, 32, 32), (512,)
        ...
"""
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

try:
    import triton
    import triton.language as tl
except Exception:                 # Windows and macOS have no Triton, and an install can be broken
    triton = None

SIZE, PAD, CUT = 32, 4, 8
INDEX, TOP, LEFT, FLIP, CUT_Y, CUT_X = range(6)              # the columns of the table


# ------------------------------------------------------------------------------ random numbers

def draw_epoch(count, seed, epoch):
    """One epoch's table of random numbers, (count, 6) int32, in the order of training.

    A pure function of (count, seed, epoch): every device gets the same numbers, and a resumed run
    needs no random state.
    """
    random = np.random.default_rng([seed, epoch + 1])
    index = random.permutation(count)
    top, left = random.integers(2 * PAD + 1, size=(2, count))
    cut_y, cut_x = random.integers(SIZE, size=(2, count))
    # Alternating flip (Jordan, arXiv 2404.00498): a coin decides which way an image faces first;
    # each epoch then mirrors it, so any two in a row show both. (Epochs use [seed, 1] and up.)
    first = np.random.default_rng([seed, 0]).integers(2, size=count)
    flip = (first[index] + epoch) % 2
    return torch.from_numpy(np.stack([index, top, left, flip, cut_y, cut_x], 1).astype(np.int32))


def plain_draws(count):
    """The table that changes nothing: in order, centre crop, no flip, cutout far outside."""
    draws = torch.tensor([0, PAD, PAD, 0, -SIZE, -SIZE], dtype=torch.int32).repeat(count, 1)
    draws[:, INDEX] = torch.arange(count)
    return draws


# -------------------------------------------------------------------------------- augmentation

def reflect(i):
    """Coordinates -31 .. 62 reflected into 0 .. 31: -1 -> 1, 32 -> 30."""
    return torch.minimum(i.abs(), 2 * (SIZE - 1) - i.abs())


def augment(images, draws, mean, inverse_std, dtype):
    """Crop, flip, cut out, normalise: (N, 32, 32, 3) uint8 and (B, 6) draws to (B, 3, 32, 32).

    mean and inverse_std are (3,) float32 on the scale 0 .. 255; the result is channels_last.
    """
    index, top, left, flip, cut_y, cut_x = draws.long()[:, :, None].unbind(1)      # (B, 1) each
    row = torch.arange(SIZE, device=images.device)                                 # (32,)
    place = torch.arange(SIZE * 3, device=images.device)                           # (96,)
    column, channel = place // 3, place % 3                  # a row is r g b r g b r g b ...
    # Crop and flip only decide where a pixel comes from: pixel (row, column) of the
    # flipped crop is pixel (row, 31 - column) of the crop, which starts at (top - 4, left - 4).
    y = reflect(row + top - PAD)                                                   # (B, 32)
    x = reflect(torch.where(flip == 1, SIZE - 1 - column, column) + left - PAD)    # (B, 96)
    rows = images.view(-1, SIZE * 3).index_select(0, (index * SIZE + y).flatten())
    rows = rows.view(-1, SIZE, SIZE * 3)                                           # (B, 32, 96)
    pixels = rows.gather(2, (x * 3 + channel)[:, None].expand_as(rows))            # (B, 32, 96)
    # Subtract, then multiply: two roundings on every device, hence the same bits. Some devices
    # would round pixel * scale + shift only once, as one multiply-add.
    values = (pixels - mean.repeat(SIZE)) * inverse_std.repeat(SIZE)               # (B, 32, 96)
    # Cut out rows cut_y - 4 .. cut_y + 3 and columns likewise; 0 is now the mean colour.
    cut_row, cut_column = row - cut_y + CUT // 2, column - cut_x + CUT // 2
    cut = ((cut_row >= 0) & (cut_row < CUT))[:, :, None] \
        & ((cut_column >= 0) & (cut_column < CUT))[:, None, :]                     # (B, 32, 96)
    # NHWC in memory, seen as (B, 3, 32, 32), is exactly what torch calls channels_last.
    return values.masked_fill_(cut, 0).view(-1, SIZE, SIZE, 3).to(dtype).permute(0, 3, 1, 2)


if triton:
    # How to read it: Triton starts one program per image, and `program_id` tells it which. Names
    # such as `images` hold addresses: `images + 5` points five values further on; `load` and
    # `store` read and write there. What looks like a number, such as `row`, is a vector, divided
    # among the program's threads; `mask` says which of its elements to touch. tl.constexpr
    # arguments are constants for the compiler. augment_kernel[(B,)](...) starts B programs of
    # num_warps x 32 threads each.
    @triton.jit
    def augment_kernel(images, draws,              # *uint8 (N, 32, 32, 3), *int32 (B, 6)
                       mean, inverse_std, out,     # *float32 (3,) twice, *dtype (B, 32, 32, 3)
                       SIZE: tl.constexpr, PAD: tl.constexpr, CUT: tl.constexpr):
        image = tl.program_id(0).to(tl.int64)      # one program, one image; 64 bits for offsets
        draws += image * 6
        index = tl.load(draws).to(tl.int64)
        top, left, flip = tl.load(draws + 1), tl.load(draws + 2), tl.load(draws + 3)
        cut_y, cut_x = tl.load(draws + 4), tl.load(draws + 5)
        tl.assume((top >= 0) & (top <= 2 * PAD))   # the compiler may then skip some reflections
        # The image is read once, in memory order, 16 bytes per load. Crop and flip then pick from
        # what was read: a gather in shared memory, which is fast in any order. Everything is one
        # vector; lengths must be powers of two, so its last quarter is masked.
        i = tl.arange(0, 4 * SIZE * SIZE)                             # (4096,)
        inside = i < 3 * SIZE * SIZE
        picture = tl.load(images + index * (SIZE * SIZE * 3) + i, mask=inside)
        # From here on, i just numbers the results. Their order is convenient: places 0 .. 31
        # of rows 0, 1, ..., 31, then places 32 .. 63, then the rest, so / and % become shifts.
        row, place = i // SIZE % SIZE, i // (SIZE * SIZE) * SIZE + i % SIZE
        column, channel = place // 3, place % 3
        y = tl.abs(row + top - PAD)                                   # reflect, as above
        y = tl.minimum(y, 2 * (SIZE - 1) - y)
        x = tl.abs(tl.where(flip == 1, SIZE - 1 - column, column) + left - PAD)
        x = tl.minimum(x, 2 * (SIZE - 1) - x)
        pixel = tl.gather(picture, x * 3 + channel + y * (SIZE * 3), 0).to(tl.float32)
        # Three loads and two selects, instead of one load for each of the 3,072 values.
        red, green, blue = tl.load(mean), tl.load(mean + 1), tl.load(mean + 2)
        colour = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        red, green, blue = tl.load(inverse_std), tl.load(inverse_std + 1), tl.load(inverse_std + 2)
        scale = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        value = (pixel - colour) * scale                              # stored as out's dtype
        # The cutout: one `where` for columns, one for rows; both at once need more code.
        cut_row, cut_column = row - cut_y + CUT // 2, column - cut_x + CUT // 2
        cut = tl.where((cut_column >= 0) & (cut_column < CUT), 0.0, value)
        value = tl.where((cut_row >= 0) & (cut_row < CUT), cut, value)
        # column * 3 + channel is just `place`. But if the compiler knew, it would give each thread
        # eight neighbours, to store at once, and twice as many instructions to compute them.
        out += image * (SIZE * SIZE * 3) + (column * 3 + channel)
        tl.store(out + row * (SIZE * 3), value, mask=inside)


def fused_augment(images, draws, mean, inverse_std, dtype):
    """`augment` in one launch: the same arguments, the same result.

    It trusts the draws: indices are those of images, TOP and LEFT lie in 0 .. 8.
    """
    assert triton, "Triton is missing, or broken"
    # The kernel computes addresses, so its tensors must be contiguous.
    inputs = [tensor.contiguous() for tensor in (images, draws, mean, inverse_std)]
    out = torch.empty((len(draws), SIZE, SIZE, 3), dtype=dtype, device=images.device)
    with torch.cuda.device_of(images):                       # Triton launches on the current GPU
        augment_kernel[(len(draws),)](*inputs, out, SIZE, PAD, CUT, num_warps=4)
    return out.permute(0, 3, 1, 2)


# -------------------------------------------------------------------------------------- loader

class Loader:
    """A data set on the device: `epoch` gives augmented training batches, `test` the test set.

    Inputs are (B, 3, 32, 32) of dtype, normalised, channels_last (not on Apple's GPUs, see
    model.py); labels are (B,) int64. With fewer images than batch_size one batch holds them all.
    """

    def __init__(self, data, batch_size, dtype, device):
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            tensor.to(device) for tensor in data if torch.is_tensor(tensor))
        self.mean, self.inverse_std = (v.to(device) for v in normalisation(data.train_images))
        self.batch_size = min(batch_size, len(data.train_images))
        self.data, self.dtype, self.device = data, dtype, device
        self.augment = pick_augment(device, dtype)

    def __len__(self):
        """Training batches per epoch; images left over after the last full one are skipped."""
        return len(self.train_images) // self.batch_size

    def epoch(self, seed, epoch):
        """Yield (inputs, labels), no image twice, in the epoch's own order."""
        draws = draw_epoch(len(self.train_images), seed, epoch)[:len(self) * self.batch_size]
        return self.batches(self.train_images, self.train_labels, draws, self.batch_size)

    def test(self):
        """Yield every test image once, as it is; the last batch may be short."""
        size = 2500 if self.device.type == "cuda" else self.batch_size     # large ones suit a GPU
        return self.batches(self.test_images, self.test_labels,
                            plain_draws(len(self.test_images)), size)

    def batches(self, images, labels, draws, batch_size):
        draws = draws.to(self.device)
        labels = labels[draws[:, INDEX].long()]
        # The kernel fills up to 100 batches at once: 315 MB in bf16. Plain torch needs more memory.
        launch = batch_size * (100 if self.augment is fused_augment else 1)
        for part, part_labels in zip(draws.split(launch), labels.split(launch)):
            inputs = self.augment(images, part, self.mean, self.inverse_std, self.dtype)
            inputs = inputs.contiguous() if self.device.type == "mps" else inputs
            yield from zip(inputs.split(batch_size), part_labels.split(batch_size))


def pick_augment(device, dtype):
    """fused_augment where Triton runs, else augment; on a CUDA device without it, say why."""
    if device.type != "cuda":
        return augment
    try:                          # Triton may be missing, or broken, or the GPU too old for it
        trial = torch.zeros(1, SIZE, SIZE, 3).byte(), plain_draws(1), torch.ones(3), torch.ones(3)
        fused_augment(*(tensor.to(device) for tensor in trial), dtype)
        return fused_augment
    except Exception as error:    # Triton's errors have no common base
        print(f"note: plain torch augments, not the fused kernel ({error})", file=sys.stderr)
        return augment


def normalisation(images):
    """Mean and 1 / standard deviation of each channel of (N, 32, 32, 3) uint8: (3,) float32.

    By counting how often each value occurs: exact, and without a copy of all images in float.
    """
    value = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([images[..., c].flatten().bincount(minlength=256) for c in range(3)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)             # (3, 256)
    mean = share @ value                                                          # (3,)
    deviation = (share @ value**2 - mean**2).clamp(min=1).sqrt()      # at least 1: all may be equal
    return mean.float(), (1 / deviation).float()


# -------------------------------------- the lesson ends here; below, where the images come from

class Dataset(NamedTuple):
    """Images (N, 32, 32, 3) uint8, labels (N,) int64, contiguous; and train.py's defaults."""
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
    if folder.name == "cifar-10-batches-py":                 # torchvision wants the folder above
        folder = folder.parent
    try:
        return load_cifar10(folder)
    except FileNotFoundError as error:     # any other error: drawn shapes would hide the damage
        if source == "cifar10":
            raise
        print(f"{error}\nTHIS IS NOT CIFAR-10: continuing with drawn shapes", file=sys.stderr)
        return synthetic()


def load_cifar10(folder):
    """CIFAR-10 from a folder, downloaded (170 MB) where missing; torchvision checks MD5 sums.

    FileNotFoundError: nothing is there, and the download failed. OSError: the files are damaged.
    """
    from torchvision.datasets import CIFAR10                 # takes a second: only where needed
    names = CIFAR10.base_folder, CIFAR10.filename
    there = folder.is_file() or any((folder / name).exists() for name in names)
    if not there:
        print(f"CIFAR-10 is not in '{folder}': downloading it, 170 MB", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)       # seconds without a byte; torchvision would wait for ever
    try:
        train, test = (CIFAR10(folder, train=part, download=part) for part in (True, False))
    except Exception as error:         # OSError, RuntimeError, pickle's, tarfile's ...
        kind = OSError if there else FileNotFoundError
        raise kind(f"CIFAR-10 is missing or incomplete in '{folder}' and cannot be downloaded "
                   f"({error}): put {CIFAR10.filename} there, or see --data in -h") from error
    finally:
        socket.setdefaulttimeout(patience)
    # torchvision's arrays are transposed views; make_dataset copies them into rows of pixels.
    return make_dataset("CIFAR-10", (train.data, train.targets, test.data, test.targets),
                        train.classes)


def load_npz(path):
    """train_images, train_labels, test_images, test_labels and optionally classes of an .npz."""
    name, arrays = "arrays", []
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in Dataset._fields[2:6]:
                arrays.append(archive[name])
            name = "classes"
            classes = np.ravel(archive.get(name, [])).astype(str).tolist()
    except OSError as error:
        raise OSError(f"cannot read '{path}': {error.strerror or error}; see --data in -h")
    except Exception as error:         # a key that is missing, pickled objects, damage of any kind
        raise ValueError(f"cannot read {name} from '{path}' ({error}); see --data in -h") from error
    return make_dataset(Path(path).name, arrays, classes)


def make_dataset(name, arrays, classes=(), **options):
    """A Dataset of four arrays, train and test, each images and labels.

    Labels may also be (N, 1). Without `classes` the names are 0, 1, ... up to the largest label.
    ValueError says what is wrong with the arrays.
    """
    tensors = []
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3) or not len(images):
            raise ValueError(f"{name}: {split}_images must be uint8 (N, 32, 32, 3), not "
                             f"{images.dtype} {images.shape}")
        if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
            raise ValueError(f"{name}: {split}_labels must be {len(images)} integers, not "
                             f"{labels.dtype} {labels.shape}")
        if labels.min() < 0 or labels.max() >= 10_000:
            raise ValueError(f"{name}: {split}_labels range from {labels.min()} to {labels.max()}: "
                             f"number the classes 0, 1, 2, ..., 9,999 at most")
        tensors.append(torch.from_numpy(np.ascontiguousarray(images)))
        tensors.append(torch.from_numpy(labels.astype(np.int64).ravel()))
    count = max(tensors[1].max().item(), tensors[3].max().item()) + 1
    classes = list(classes) or [str(k) for k in range(count)]
    if len(classes) < count:
        raise ValueError(f"{name}: classes must hold {count} names, one for each label from 0 to "
                         f"{count - 1}, not {len(classes)}")
    return Dataset(name, classes, *tensors, **options)


def synthetic(train=2560, test=1000):
    """Ten classes of drawn shapes, a stand-in for CIFAR-10; a flip leaves each in its class."""
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
