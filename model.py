"""The network, the recipe that trains it, and, at the end, files and errors that users meet.

A residual network of eight convolutions:

    stage   layers                                             output (C x H x W)
    prep    conv 3x3, BN, ReLU                                  64 x 32 x 32
    layer1  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      128 x 16 x 16
    layer2  conv 3x3, max pool 2, BN, ReLU                     256 x  8 x  8
    layer3  conv 3x3, max pool 2, BN, ReLU = X;  X + R(X)      512 x  4 x  4
    pool    max pool, kernel 4, stride 2                       512 x  1 x  1
    fc      fully connected, softmax                            10

with R = conv 3x3, BN, ReLU, conv 3x3, BN, ReLU. Each layer halves the picture and doubles the
channels, so that the first convolutions of all three cost the same. Pooling stands *before* batch
normalisation, which has a quarter of the pixels to read. The shape is David Page's ResNet-9.

    python model.py        prints the table with parameters and multiply-accumulates
"""
import ctypes
import os
import sys
import zipfile
from collections import Counter

import torch
from torch import nn

from onecycle import Muon

# The recipe of train.py and of lrfinder.py: a range test must run what the training will run.
MOMENTUM = 0.6            # Nesterov; airbench94_muon's
WEIGHT_DECAY = 1e-3       # of all but the convolutions, whose length Muon keeps
LOGIT_SCALE = 0.125       # see CustomResNet.forward


def conv_bn_relu(channels_in, channels_out, pool=False):
    """conv 3x3 -> (max pool 2) -> BN -> ReLU: (B, channels_in, H, W) to (B, channels_out, H', W').

    The convolution has no bias: batch normalisation subtracts the mean, and any bias with it.
    """
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=1, padding=1, bias=False),
        *([nn.MaxPool2d(2)] if pool else []),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class ResBlock(nn.Module):
    """x + R(x) with R two conv-BN-ReLU; the shape (B, channels, H, W) stays."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(conv_bn_relu(channels, channels),
                                      conv_bn_relu(channels, channels))

    def forward(self, x):
        return x + self.residual(x)


class CustomResNet(nn.Module):
    """Normalised images (B, 3, 32, 32) to log-probabilities (B, classes), float32."""

    def __init__(self, classes=10):
        super().__init__()
        self.prep = conv_bn_relu(3, 64)
        self.layer1 = nn.Sequential(conv_bn_relu(64, 128, pool=True), ResBlock(128))
        self.layer2 = conv_bn_relu(128, 256, pool=True)
        self.layer3 = nn.Sequential(conv_bn_relu(256, 512, pool=True), ResBlock(512))
        self.pool = nn.MaxPool2d(kernel_size=4, stride=2)
        self.fc = nn.Linear(512, classes)

    def forward(self, x):
        x = self.prep(x)                     # (B,  64, 32, 32), B images
        x = self.layer1(x)                   # (B, 128, 16, 16)
        x = self.layer2(x)                   # (B, 256,  8,  8)
        x = self.layer3(x)                   # (B, 512,  4,  4)
        x = self.pool(x).flatten(1)          # (B, 512)
        # fc adds up 512 features, each a maximum over 16 places, so that its logits grow large; a
        # softmax of large logits is sure before it knows anything. Page's constant factor helps.
        logits = self.fc(x).float() * LOGIT_SCALE                                  # (B, C)
        # The softmax as its logarithm: .exp() gives probabilities, and the cross-entropy loss is
        # simply minus the right class's entry, nll_loss. A log of a softmax could be log(0).
        return logits.log_softmax(dim=1)                                           # (B, C)


def pick_device():
    """A CUDA GPU, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def precision(device):
    """The dtype of the arithmetic. Native ones only: emulated bf16 took 16 times float32's time."""
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16)
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def autocast(device):
    """The context of a forward pass: convolutions in precision(device), weights in float32."""
    dtype = precision(device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def reuse_freed_memory():
    """Let glibc keep freed memory, not map new pages: a step 8.05 -> 7.1 s on two Zen 3 cores."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)              # M_MMAP_MAX: no mappings ...
        libc.mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD: ... and nothing given back


def make_model(device, seed=0, classes=10):
    """A fresh CustomResNet, the same for the same seed on every device, channels_last."""
    if device.type == "cpu":
        reuse_freed_memory()
    torch.manual_seed(seed)
    # channels_last (NHWC in memory) is what tensor cores and oneDNN's convolutions read fastest.
    return CustomResNet(classes).to(device, memory_format=torch.channels_last)


def make_optimizer(model, lr):
    """Muon with the recipe's constants; what it leaves to SGD, on CUDA in one fused kernel.

    Not in fp16: where a first step overflows, fused SGD leaves its momentum uninitialised.
    """
    device = next(model.parameters()).device
    fused = device.type == "cuda" and precision(device) != torch.float16
    return Muon(model.parameters(), lr, MOMENTUM, WEIGHT_DECAY, precision(device), fused=fused)


def make_scaler(device):
    """Scales the loss so that fp16 gradients do not underflow; otherwise does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision(device) == torch.float16)


@torch.no_grad()
def accuracy(model, loader, flip=False):
    """Share of the split that model gets right; flip: averaged over pictures and mirror images."""
    model.eval()
    correct = torch.zeros((), device=loader.images.device, dtype=torch.long)
    for inputs, labels in loader.plain():
        with autocast(inputs.device):
            probabilities = model(inputs).exp()                                   # (B, classes)
            if flip:
                probabilities += model(inputs.flip(3)).exp()
        correct += (probabilities.argmax(1) == labels).sum()
    return correct.item() / len(loader.images)


class UserError(Exception):
    """Something that the user can put right; its text is one line that says how."""


def fail(message):
    """Refuse a command line; in place of argparse's own `error`, which takes several lines."""
    raise UserError(f"{message} (-h explains)")


def first_line(error):
    """What an exception says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main):
    """Call main; where the user can help it show one line, without traceback, and exit with 2."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        hint = "; try a smaller --batch-size" * isinstance(error, torch.OutOfMemoryError)
        print(f"error: {first_line(error)}{hint}", file=sys.stderr)
        sys.exit(2)


def check_zip(path):
    """Raise UserError unless path is a zip (.npz, torch.save) with every checksum right.

    torch.load by itself looks at none of them: it takes a flipped bit in silence.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:         # zipfile meets a damaged header with a dozen exceptions
        raise UserError(f"{path} is damaged or not the right kind of file ({first_line(error)}): "
                        f"make or copy it again") from error


def save(path, content):
    """Write a file aside, then rename it: whatever happens, path is whole, the old or the new."""
    aside = path.with_suffix(".partial")
    try:
        with open(aside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: is the disk full or read-only? What was saved "
                        f"before is whole ({first_line(error)})") from error


def restore(path, *names):
    """The entries `names` of what `save` wrote; checksums are checked, no pickled code is run."""
    check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {name: content[name] for name in names}
    except Exception as error:         # whatever a zip that holds something else can raise
        raise UserError(f"{path} is no checkpoint of this program") from error


def main():
    model, macs = CustomResNet(), Counter()

    def count(module, inputs, output):
        # Each weight is used once at each output position: H x W of them in a convolution.
        macs[module] += module.weight.numel() * output[0, 0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    x = torch.zeros(2, 3, 32, 32)
    print(f"{'stage':8}{'output':>14}{'parameters':>14}{'MACs':>14}")
    for name, stage in model.named_children():
        x = stage(x.flatten(1) if name == "fc" else x)
        print(f"{name:8}{' x '.join(map(str, x.shape[1:])):>14}"
              f"{sum(p.numel() for p in stage.parameters()):14,}"
              f"{sum(macs[module] for module in stage.modules()):14,}")
    print(f"{'all':22}{sum(p.numel() for p in model.parameters()):14,}{macs.total():14,}")


if __name__ == "__main__":
    main()
