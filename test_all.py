"""What the project claims, compared with something that it did not write itself: torch's
OneCycleLR, SGD, Muon and count of operations, torchvision's transforms, the singular value
decomposition, and closed forms.

    pytest test_all.py              all of it; with -k kernel, the tests with that word in the name

Where a run has to equal another one (same seed; cut off and resumed), it is compared with itself.
Runs go through the command line, with networks of 8 channels (see `quick`). Tests that need a GPU
skip where there is none; the Triton kernel runs in Triton's interpreter too, and is compiled for
four generations of GPUs.
"""
import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tarfile
import textwrap
import warnings
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T
from matplotlib.figure import Figure
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import CIFAR10

import data
import lrfinder
import model
import onecycle
import train
from docs import experiments, tables
from lrfinder import Curve, NotFound, range_test, smooth, suggest

HERE = Path(__file__).parent
CPU, CUDA, MPS, BF16 = *map(torch.device, ("cpu", "cuda", "mps")), torch.bfloat16
CIFAR10.url = "file:///nowhere/cifar-10-python.tar.gz"             # nothing is downloaded
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(data.triton is None, reason="needs Triton, which is for Linux")
each = pytest.mark.parametrize


def quick(patch=setattr, dtype=torch.float32):
    """Networks of 8 channels; unless dtype is None on the CPU, where bits come out the same."""
    patch(train, "load", lambda *arguments: data.load(*arguments)._replace(width=8))
    if dtype:
        patch(train, "pick_device", lambda: CPU)
        for module in (model, train):
            patch(module, "precision", lambda device: dtype)


def command(*arguments, main=train.main):
    """`python train.py arguments` in this process, quick: exit status, stdout and stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    status = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        quick(patch.setattr)
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:                     # as the interpreter treats it
            status = end.code if isinstance(end.code, int) else 1
            print("" if isinstance(end.code, int) else end.code, file=err)
    return status, *(stream.buffer.getvalue().decode() for stream in (out, err))


def succeed(*arguments, **options):
    """A command that has to; its stdout."""
    status, out, err = command(*arguments, **options)
    assert status == 0, err
    return out


def start(code, *arguments, **environment):
    """Run code in a fresh interpreter that can import the project."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, **environment})


def python(code, *arguments, **environment):
    """Run code in a fresh interpreter to its end; return its stdout."""
    process = start(code, *arguments, **environment)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def with_bytes(tree):
    """Nested dicts and lists with each tensor and array as bytes, so that == compares."""
    def convert(leaf):
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not torch.is_tensor(leaf):
            return leaf
        return leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tree_map(convert, tree)


class MpsOnCpu(TorchFunctionMode):
    """What is sent to Apple's GPU stays on the CPU; the device still says that it is "mps"."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.to:
            arguments = [CPU if argument == MPS else argument for argument in arguments]
        return function(*arguments, **(options or {}))


def test_files_stand_alone(tmp_path):
    """Each, copied out, imports little; lrfinder.py draws whatever MPLBACKEND a notebook set."""
    for name in ("model", "onecycle", "data", "lrfinder"):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
    python("""
import os, sys
for name in ("model", "onecycle", "data", "lrfinder"):
    os.chdir(f"{sys.argv[1]}/{name}")
    module = __import__(name)
    assert os.path.samefile(module.__file__, f"{name}.py")
    del sys.modules[name]
assert not {"torchvision", "matplotlib"} & set(sys.modules)
assert "no picture" not in module.report(module.Curve([1, 2], [1, 2]), "lr.png")[1]
assert os.environ["MPLBACKEND"] == "module://not_there"
""", tmp_path, MPLBACKEND="module://not_there")


# ----------------------------------------------------------------------------- model: the network

def test_model_table():
    """The table in model.py: shapes as they come out, parameters, torch's count of operations."""
    net, shapes = model.make_model(CPU), {}
    for name, part in net.named_children():
        part.register_forward_hook(
            lambda part, inputs, out, name=name: shapes.update({name: [*out.shape[1:]]}))
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, 32, 32))
    rows = re.findall(r"^    (\w+) .*?  ([\dx ]+)  +([\d,]+)$", model.__doc__, re.M)
    assert [name for name, *_ in rows] == "prep layer1 layer2 layer3 pool fc".split()
    for name, shape, parameters in rows:
        assert [int(n) for n in shape.split("x")] == shapes[name]
        assert parameters == f"{sum(w.numel() for w in getattr(net, name).parameters()):,}"
    assert f"{sum(w.numel() for w in net.parameters()):,} parameters" in model.__doc__
    multiply_accumulates = counter.get_total_flops() / 2          # torch counts both
    assert f"{multiply_accumulates / 1e6:.0f} million" in model.__doc__


def test_model_computes():
    """The network against its specification, written with torch's functions; channels_last."""
    net = model.make_model(CPU, seed=1, classes=7, width=8).eval()
    for w in net.state_dict().values():         # BatchNorm's start, 1 and 0, would hide mistakes
        assert w.dim() < 4 or w.is_contiguous(memory_format=torch.channels_last)
        w += 0.3 * torch.rand_like(w) if w.dim() == 1 else 0
    assert not torch.equal(net.fc.weight, model.make_model(CPU, 2, 7, 8).fc.weight)      # a seed's
    net.fc.weight.data *= 20                            # an untrained network says all but nothing
    w, x = net.state_dict(), torch.randn(3, 3, 32, 32)

    def block(x, name, pool=False):
        x = F.conv2d(x, w[f"{name}.0.weight"], padding=1)
        x, bn = (F.max_pool2d(x, 2), f"{name}.2") if pool else (x, f"{name}.1")
        return F.batch_norm(x, w[f"{bn}.running_mean"], w[f"{bn}.running_var"],
                            w[f"{bn}.weight"], w[f"{bn}.bias"]).relu()

    def residual(x, name):
        return x + block(block(x, f"{name}.1.residual.0"), f"{name}.1.residual.1")

    y = residual(block(block(x, "prep"), "layer1.0", pool=True), "layer1")
    y = residual(block(block(y, "layer2", pool=True), "layer3.0", pool=True), "layer3")
    y = F.max_pool2d(y, 4, 2).flatten(1) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(net(x), (0.125 * y).log_softmax(1), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", BF16):
        assert net(x).dtype == torch.float32


@each("device, native, dtype", [("cuda", True, BF16), ("cuda", False, torch.float16),
                                ("cpu", True, BF16), ("cpu", False, torch.float32),
                                ("mps", True, torch.float32)])
def test_precision(monkeypatch, device, native, dtype):
    """A T4 emulates bf16 and gets fp16, scaled and not fused; a CPU without bf16 gets float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    device, seen = torch.device(device), {}
    assert model.precision(device) == dtype
    assert model.make_scaler(device).is_enabled() == (dtype == torch.float16)
    with model.autocast(device):
        assert torch.is_autocast_enabled(device.type) == (dtype != torch.float32)
        assert dtype in (torch.float32, torch.get_autocast_dtype(device.type))
    monkeypatch.setattr(torch.optim, "SGD", lambda *arguments, **options: seen.update(options))
    net = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)]))
    model.make_optimizer(net, "sgd")
    assert seen["fused"] == (device.type == "cuda" and native)
    assert (seen["nesterov"], seen["weight_decay"]) == (True, 1e-3)       # too small to be seen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device.type == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device.type != "cpu")
    assert model.pick_device() == device


# ----------------------------------------------------------------------------------- model: Muon

def orthogonal_by_svd(matrix):
    """What three rounds do to singular values that are shares of the matrix's length."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@each("shape", [(64, 27), (27, 64), (40, 40)])
def test_muon_orthogonal(shape):
    """Products alone against the singular value decomposition; a matrix of zeros stays one."""
    matrix = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.orthogonal(matrix), orthogonal_by_svd(matrix),
                               rtol=1e-4, atol=1e-5)
    assert torch.equal(model.orthogonal(0 * matrix), 0 * matrix)                   # not 0 / 0
    assert model.orthogonal(matrix, BF16).dtype == BF16


def small_net():
    """A convolution, a gain of four dimensions, which is none, and a fully connected layer."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": nn.Conv2d(16, 24, 3, bias=False), "fc": nn.Linear(7, 5)})
    net.register_parameter("gain", nn.Parameter(torch.rand(1, 64, 1, 1)))
    return net.to(memory_format=torch.channels_last)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_is_torchs(monkeypatch):
    """The recipe's optimizer: convolutions as by torch's Muon, all other weights as by its SGD.

    torch's takes matrices only, and leaves their length to weight decay.
    """
    monkeypatch.setattr(model, "precision", lambda device: BF16)                     # as there
    net, other = small_net(), small_net()
    conv, matrix = net["conv"].weight, nn.Parameter(other["conv"].weight.detach().flatten(1))
    ours = model.make_optimizer(net, lr=0.1)
    muon = torch.optim.Muon([matrix], 0.1, weight_decay=0, momentum=0.6, ns_steps=3)
    sgd = torch.optim.SGD([other.gain, *other["fc"].parameters()], 0.1, 0.6, nesterov=True,
                          weight_decay=1e-3)
    for k in range(4):
        for w, same in zip(net.parameters(), other.parameters()):
            w.grad = torch.randn_like(w)
            same.grad = w.grad.clone()
        matrix.grad = conv.grad.flatten(1)
        matrix.data *= 24 ** 0.5 / torch.linalg.matrix_norm(matrix.data)
        before = matrix.detach().clone()
        for optimizer in (ours, muon, sgd):
            optimizer.step()
        step, difference = matrix - before, conv.flatten(1) - matrix
        assert difference.norm() < 0.02 * (k + 1) * step.norm()           # bf16, rounded elsewhere
        torch.testing.assert_close(net.gain, other.gain)
        torch.testing.assert_close([*net["fc"].parameters()], [*other["fc"].parameters()])


def test_muon_by_hand():
    """One step: bf16 in the direction alone, so not in a rate that is a tensor; a group's own rate.

    A weight without a gradient stays; one of zeros gets about a step's length, and no NaN.
    """
    shapes = (24, 16, 3, 3), (4, 3), (1, 4), (5,)
    conv, zeros, still, plain = (nn.Parameter(torch.randn(shape)) for shape in shapes)
    nn.init.zeros_(zeros)
    w, kept, other = (x.detach().clone() for x in (conv, still, plain))
    gradient, rate = torch.randn(shapes[0]), torch.tensor(0.1234567)
    optimizer = copy.deepcopy(model.Muon([
        {"params": [("a", conv), ("b", zeros), ("c", still)], "orthogonal": True},
        {"params": [("d", plain)], "lr": 0.01}], rate, 0.6, 1, BF16))
    conv, zeros, still, plain = (x for group in optimizer.param_groups for x in group["params"])

    def closure():
        loss = (conv * gradient).sum() + zeros.sum() + 2 * plain.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (w * gradient).sum() + 2 * other.sum()
    direction = model.orthogonal((gradient * 1.6).flatten(1), BF16).view_as(w)
    expected = w * (24 ** 0.5 / w.norm()) - direction.float() * rate
    torch.testing.assert_close(conv.detach(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(plain.detach(), other - 0.01 * 1.6 * (2 + other))
    assert torch.equal(still, kept) and 0.05 < zeros.norm() < 0.3


# -------------------------------------------------------------------------------------- onecycle

def make_sgd(*rates):
    """SGD of one weight a group, with these rates."""
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


@each("shares", [(), (1 / 25, 1 / 25e4)])
@each("total, peak", [(2328, 485), (97, 1), (100, 98), (11, 5)])
def test_schedule_is_torchs(total, peak, shares):
    """Every step against torch's OneCycleLR: by default from and to a tenth."""
    first, last = shares or (1 / 10, 1 / 10)
    optimizer = make_sgd(1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=total, pct_start=(peak + 1) / total,
        anneal_strategy="linear", cycle_momentum=False, div_factor=1 / first,
        final_div_factor=first / last)
    for step in range(total):
        ours = onecycle.one_cycle(step, total, peak, 0.4, *shares)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        if step < total - 1:
            oracle.step()


@each("total, peak", [(1, 0), (2, 0), (2, 1), (5, 0), (5, 4)])
def test_schedule_edges(total, peak):
    """A peak at either end, the shortest runs; annihilation ends at 0; no step outside the run."""
    lrs, annihilated = ([onecycle.one_cycle(k, total, peak, 10, **options) for k in range(total)]
                        for options in ({}, {"end": 0}))
    assert lrs[peak] == annihilated[peak] == 10
    assert all(lrs[k] == pytest.approx(1) for k in {0, total - 1} - {peak})
    assert peak == total - 1 or annihilated[-1] == 0
    for step in (total, -1):
        with pytest.raises(ValueError, match=f"step {step} lies outside"):
            onecycle.one_cycle(step, total, peak, 10)


def test_schedule_groups():
    """Groups keep their ratio in any order of steps; a tensor, which a graph reads, is filled.

    Loading a state replaces the optimizer's groups: the new ones get the rates. After a warm-up
    from 0 the ratio is that of the rates before it.
    """
    rates = [torch.tensor(1.0), 2, 0.5]
    optimizer = make_sgd(*rates)
    schedule = onecycle.OneCycle(optimizer, total=50, peak=10, lr_max=0.4, end=0)
    for step in (30, 10, 49, 0, 30):
        expected = onecycle.one_cycle(step, 50, 10, 0.4, end=0)
        assert schedule.set(step) == schedule.at(step) == expected
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs[0] is rates[0] and lrs[0].item() == pytest.approx(expected / 2)
        assert lrs[1:] == [expected, expected / 4]
    optimizer.load_state_dict(make_sgd(7, 8, 9).state_dict())
    schedule.set(10)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.4, 0.1])
    warmed = make_sgd(0.5, 1)
    torch.optim.lr_scheduler.LambdaLR(warmed, lambda step: step / 10)
    onecycle.OneCycle(warmed, 50, 10, 0.4).set(10)
    assert [group["lr"] for group in warmed.param_groups] == pytest.approx([0.2, 0.4])
    warmed.param_groups[0]["lr"] = 0.1                    # a new rate counts, not `initial_lr`
    onecycle.OneCycle(warmed, 50, 10, 0.4).set(10)
    assert [group["lr"] for group in warmed.param_groups] == pytest.approx([0.1, 0.4])


@each("peak, rates, words", [(0.3, [1], "peak 0.3 .* round"), (50, [1], "peak 50"),
                             (-1, [1], "peak -1"), (10, [0, 0], "learning rates")])
def test_schedule_refused(peak, rates, words):
    """A share of the run, a peak outside it, and rates without a ratio: at once, by a sentence."""
    with pytest.raises(ValueError, match=words):
        onecycle.OneCycle(make_sgd(*rates), 50, peak, 0.4)


# --------------------------------------------------------------------------- data: random numbers

@each("count, epochs", [(100_000, 1), (10_000, 10)])
def test_draws_are_uniform(count, epochs):
    """Chi-square of every two columns together, so of each: the image and its place in tenths."""
    columns = []
    for epoch in range(epochs):
        draws = data.draw_epoch(count, 0, epoch).long()
        assert draws[:, data.INDEX].unique().tolist() == list(range(count))        # each once
        tenths = torch.stack([torch.arange(count), draws[:, data.INDEX]]) * 10 // count
        columns.append(torch.cat([tenths, draws[:, 1:].T]))
        rises = draws[1:, data.INDEX] > draws[:-1, data.INDEX]
        assert abs(rises.sum() - count / 2) < 2 * count ** 0.5            # of 0.29: no file order
    columns, sizes = torch.cat(columns, dim=1), (10, 10, 9, 9, 2, 32, 32)          # (7, 100,000)
    for a, b in itertools.combinations(range(7), 2):
        cells = sizes[a] * sizes[b]
        counts = (columns[a] * sizes[b] + columns[b]).bincount(minlength=cells).double()
        chi_square = ((counts - 1e5 / cells).square() / (1e5 / cells)).sum()
        assert chi_square < cells + 5 * (2 * cells) ** 0.5, (a, b)        # 5 standard deviations


def test_draws_of_flips():
    """Every image shows its other side in the next epoch; chance says which is first."""
    flips = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            draws = data.draw_epoch(10_000, seed, epoch)
            flips[seed, epoch] = draws[draws[:, data.INDEX].argsort(), data.FLIP]      # by image
        assert torch.equal(flips[seed, 1], 1 - flips[seed, 0])
        assert torch.equal(flips[seed, 2], flips[seed, 0])
        assert abs(flips[seed, 0].sum() - 5000) < 200                     # 4 standard deviations
    assert abs((flips[0, 0] == flips[1, 0]).sum() - 5000) < 200           # two seeds: by chance


def test_draws_of_streams(monkeypatch):
    """Each epoch of each seed has a generator of its own, and so have the sides of each seed.

    numpy may give two seeds the same numbers: default_rng([5]) and default_rng([5, 0]) are equal.
    """
    states, default_rng = [], np.random.default_rng

    def look(seed):
        states.append(str(default_rng(seed).bit_generator.state))
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", look)
    for seed, epoch in itertools.product(range(4), range(4)):
        data.draw_epoch(3, seed, epoch)
    assert len(states) == 4 * 4 * 2 and len({*states}) == 4 * 4 + 4


# ------------------------------------------------------------------- data: augmentation, the kernel

MEAN, INVERSE_STD = torch.tensor([125.3, 123.0, 113.9]), 1 / torch.tensor([63.0, 62.1, 66.7])
PICTURES = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (11, 32, 32, 3), np.uint8))


def every_draw():
    """All 81 offsets x both flips, the cutout's centre walking over every row and column."""
    rows = [[k % 11, k // 2 // 9, k // 2 % 9, k % 2, k % 32, 31 - (k * 7) % 32] for k in range(162)]
    corners = [[0, 4, 4, 0, y, x] for y in (0, 3, 4, 28, 31) for x in (0, 3, 4, 28, 31)]
    return torch.tensor(rows + corners, dtype=torch.int32)                # 187: an odd batch


def test_augment_is_torchvisions():
    """Every offset, flip and place of the cutout against torchvision's transforms."""
    draws = every_draw()
    ours = data.augment(PICTURES, draws, MEAN, INVERSE_STD, torch.float32)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    for out, (index, top, left, flip, y, x) in zip(ours, draws.tolist()):
        picture = T.pad(PICTURES[index].permute(2, 0, 1), [4] * 4, padding_mode="reflect")
        picture = T.crop(picture, top, left, 32, 32)
        picture = T.horizontal_flip(picture) if flip else picture
        picture = T.normalize(picture.float(), MEAN.tolist(), (1 / INVERSE_STD).tolist())
        y0, y1, x0, x1 = max(y - 4, 0), min(y + 4, 32), max(x - 4, 0), min(x + 4, 32)
        picture = T.erase(picture, y0, x0, y1 - y0, x1 - x0, torch.zeros(3, 1, 1))
        assert torch.equal(out == 0, picture == 0)                        # geometry: exactly
        torch.testing.assert_close(out, picture, rtol=0, atol=1e-6)       # values
    for dtype in (BF16, torch.float16):                                   # rounded once
        rounded = data.augment(PICTURES, draws, MEAN, INVERSE_STD, dtype)
        assert rounded.dtype == dtype and torch.equal(rounded, ours.to(dtype))


def check_kernel(device):
    """The kernel against the reference on the CPU, bit for bit; whatever the tensors' strides."""
    every, scattered = every_draw(), PICTURES.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    for dtype, pictures, draws, mean in (
            (torch.float32, PICTURES, every, MEAN), (torch.float16, PICTURES, every[5:6], MEAN),
            (torch.float16, PICTURES, every[-27:], MEAN), (BF16, PICTURES, every[-27:], MEAN),
            (BF16, scattered, every[:40:2], torch.tensor(120.0).expand(3))):
        # `augment` reads any strides but the pictures'.
        reference = data.augment(pictures.contiguous(), draws, mean, INVERSE_STD, dtype)
        inputs = [tensor.to(device) for tensor in (pictures, draws, mean, INVERSE_STD)]
        ours = data.fused_augment(*inputs, dtype).cpu()
        assert ours.shape == reference.shape and ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        if dtype == BF16 and device == CPU:
            # Triton's interpreter may cut float32 off to bf16 where hardware rounds to nearest.
            bits = [x.contiguous().view(torch.int16).int() for x in (ours, reference)]
            assert (bits[0] - bits[1]).abs().max() <= 1
        else:
            assert with_bytes(ours) == with_bytes(reference)              # -0.0 is not 0.0


@needs_triton
def test_kernel_interpreted():
    """`check_kernel` by Triton's interpreter, on the CPU."""
    python("import test_all; test_all.check_kernel(test_all.CPU)", TRITON_INTERPRET="1")


def test_kernel_refused(capsys):
    """Where it cannot run, plain torch is picked, and says why."""
    assert data.pick_augment(torch.device("cuda:77"), torch.float16) is data.augment
    assert "plain torch" in capsys.readouterr().err


@needs_triton
def test_kernel_compiles(tmp_path):
    """For four generations of GPUs, without one: Turing, Ampere, Hopper, Blackwell.

    A fused multiply-add would round once where plain torch rounds twice.
    """
    python("""
import triton, data
from triton.backends.compiler import GPUTarget
from triton.tools.disasm import get_sass
sizes = {"SIZE": 32, "PAD": 4, "CUT": 8}
for capability in (75, 80, 90, 100):
    for out in ("*fp32", "*fp16", "*bf16"):
        types = {"images": "*u8", "draws": "*i32", "mean": "*fp32", "inverse_std": "*fp32",
                 "out": out, **dict.fromkeys(sizes, "constexpr")}
        source = triton.compiler.ASTSource(data.augment_kernel, types, constexprs=sizes)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
        assert "FMUL" in (sass := get_sass(code["cubin"])) and "FFMA" not in sass
""", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), HOME="/nowhere")


# -------------------------------------------------------------------------------- data: the loader

def make_loader(batch_size=4, device=CPU, dtype=torch.float32, train=11):
    """Of PICTURES, over and over; labels are their numbers; the 7 test images are lighter."""
    images = [PICTURES[torch.arange(n) % 11].numpy() for n in (train, 7)]
    pictures = data.make_dataset("pictures", (images[0], np.arange(train), 128 + images[1] // 2,
                                              np.arange(7)), batch_size=batch_size)
    return data.Loader(pictures, batch_size, dtype, device)


def test_loader():
    """An epoch against the table's; the test set, in order, against numpy's mean and deviation."""
    loader, draws = make_loader(), data.draw_epoch(11, 5, 3)[:8]
    inputs, labels = (torch.cat(parts) for parts in zip(*loader.epoch(seed=5, epoch=3)))
    assert len(loader) == 2 and labels.tolist() == draws[:, data.INDEX].tolist()
    constants = data.normalisation(PICTURES)
    assert {constant.dtype for constant in constants} == {torch.float32}       # as the kernel reads
    assert torch.equal(inputs, data.augment(PICTURES, draws, *constants, torch.float32))
    inputs, labels = zip(*loader.test())
    assert [len(x) for x in inputs] == [4, 3] and torch.cat(labels).tolist() == list(range(7))
    mean, std = (f(PICTURES.numpy(), (0, 1, 2)) for f in (np.mean, np.std))
    expected = torch.from_numpy((128 + PICTURES[:7].numpy() // 2 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(torch.cat(inputs), expected.float())
    assert data.normalisation(0 * PICTURES)[1].isfinite().all()           # one colour: no 1 / 0
    few = make_loader(batch_size=512)                                     # a batch is all of them
    assert (few.batch_size, len(few), len(next(few.epoch(0, 0))[0])) == (11, 1, 11)


def test_apple():
    """On "mps" the CPU's weights and batches, but contiguous: channels_last gradients are wrong."""
    with MpsOnCpu():
        net, ours = model.make_model(MPS, width=8), [*make_loader(device=MPS).epoch(0, 0)]
    cpu, theirs = model.make_model(CPU, width=8), [*make_loader().epoch(0, 0)]
    assert with_bytes([*net.parameters(), ours]) == with_bytes([*cpu.parameters(), theirs])
    assert all(x.is_contiguous() for x in (*net.parameters(), *(x for x, _ in ours)))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in theirs)


# ------------------------------------------------------------------------------ data: the data sets

def cifar10_on_disk(folder, monkeypatch, archive=False):
    """Write CIFAR-10's files of 32 images, or their archive, with sums; return the pixels."""
    batches, rng, pictures, sums = folder / CIFAR10.base_folder, np.random.default_rng(0), {}, {}
    batches.mkdir(parents=True)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        planes = rng.integers(0, 256, (32, 3, 32, 32), np.uint8)         # colour planes
        content = pickle.dumps({"data": planes.reshape(32, 3072), "label_names": names,
                                "labels": [k % 10 for k in range(32)]})
        (batches / name).write_bytes(content)
        pictures[name], sums[name] = planes.transpose(0, 2, 3, 1), md5(content).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[k, sums[k]] for k in pictures if "data" in k])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    if archive:
        with tarfile.open(folder / CIFAR10.filename, "w:gz") as tar:
            tar.add(batches, batches.name)
        shutil.rmtree(batches)
        packed = (folder / CIFAR10.filename).read_bytes()
        monkeypatch.setattr(CIFAR10, "tgz_md5", md5(packed).hexdigest())
    return pictures


@each("source, archive, inner", [("auto", False, ""), ("cifar10", False, CIFAR10.base_folder),
                                 ("auto", True, "")])
def test_cifar10(tmp_path, monkeypatch, source, archive, inner):
    """From the unpacked files, from their own folder, and from the archive alone."""
    pictures = cifar10_on_disk(tmp_path, monkeypatch, archive)
    cifar = data.load(source, tmp_path / inner)
    assert (cifar.name, cifar.real, cifar.classes[9]) == ("CIFAR-10", True, "truck")
    assert (cifar.batch_size, cifar.width, cifar.epochs) == (512, 64, 24)
    assert np.array_equal(cifar.train_images,
                          np.concatenate([pictures[f"data_batch_{k}"] for k in range(1, 6)]))
    assert np.array_equal(cifar.test_images, pictures["test_batch"])
    assert cifar.test_labels.tolist() == [k % 10 for k in range(32)]
    assert cifar.train_images.is_contiguous()            # torchvision's is a transposed view


@each("source", ["auto", "cifar10"])
@each("inner", ["", CIFAR10.base_folder])
def test_cifar10_damaged(tmp_path, monkeypatch, source, inner):
    """A damaged file is an error, and never replaced in silence by other images."""
    cifar10_on_disk(tmp_path, monkeypatch)
    path = tmp_path / CIFAR10.base_folder / "data_batch_3"
    path.write_bytes(path.read_bytes().replace(b"\x07", b"\x08", 1))
    with pytest.raises(OSError):
        data.load(source, tmp_path / inner)


@each("neighbour", ["cifar-100-python", "CIFAR-10-C", "cifar-10.txt"])
def test_cifar10_missing(tmp_path, capsys, neighbour):
    """What lies beside it is no damaged CIFAR-10: `auto` goes on with the shapes, and says so."""
    (tmp_path / neighbour).mkdir()
    assert not data.load("auto", tmp_path).real and "NOT CIFAR-10" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        data.load("cifar10", tmp_path)


RNG, ARRAYS = np.random.default_rng(0), {}        # ten colours under noise; the training set lacks
COLOURS = RNG.integers(0, 200, (10, 1, 1, 3))     # the last, the test set the first
for split, labels in (("train", RNG.integers(0, 9, 64)), ("test", RNG.integers(1, 10, 48))):
    noise = RNG.integers(0, 56, (len(labels), 32, 32, 3))
    ARRAYS[f"{split}_images"] = (COLOURS[labels] + noise).astype(np.uint8)
    ARRAYS[f"{split}_labels"] = labels
LABELS = ARRAYS["train_labels"]


@each("changes", [
    {}, {"train_labels": LABELS[:, None].astype(np.uint8)}, {"train_labels": LABELS.astype(">i4")},
    {"train_labels": LABELS.astype(np.uint64), "test_labels": ARRAYS["test_labels"][:, None]},
    {"train_images": np.asfortranarray(ARRAYS["train_images"])},
    {"classes": np.array([[*"0123456789"]]).T}], ids=" ".join)
def test_npz(tmp_path, changes):
    """Labels of any integer type; labels and names in a column; images of any order in memory."""
    np.savez_compressed(tmp_path / "own.npz", **{**ARRAYS, **changes})
    own = data.load(str(tmp_path / "own.npz"))
    assert own.classes == [*"0123456789"] and own.real and own.name == "own.npz"
    for name, array in ARRAYS.items():
        assert np.array_equal(getattr(own, name), array) and getattr(own, name).is_contiguous()
    assert own.train_labels.dtype == own.test_labels.dtype == torch.int64


class Bomb:
    """Ends the program that unpickles it."""

    def __reduce__(self):
        return sys.exit, (99,)


BAD_FILES = {                               # what the sentence names; the .npz's changes or bytes
    "empty": ("", b""), "text": ("", b"not an npz\n" * 50), "nothing": ("", None),
    "a key missing": ("test_labels", {"test_labels": None}),
    "channels first": ("train_images", {"train_images": np.zeros((64, 3, 32, 32), np.uint8)}),
    "float": ("train_images", {"train_images": np.zeros((64, 32, 32, 3), np.float32)}),
    "grey": ("test_images", {"test_images": np.zeros((48, 32, 32), np.uint8)}),
    "no images": ("test_images", {"test_images": np.zeros((0, 32, 32, 3), np.uint8)}),
    "too few labels": ("train_labels", {"train_labels": LABELS[:-1]}),
    "half labels": ("train_labels", {"train_labels": LABELS / 2}),
    "negative labels": ("train_labels", {"train_labels": LABELS - 1}),
    "too large labels": ("test_labels", {"test_labels": [10_000] * 48}),
    "code": ("train_labels", {"train_labels": np.array([Bomb()] * 64)}),
    "one name": ("classes", {"classes": "a cat"}),
    "pickled names": ("classes", {"classes": np.array([*"0123456789"], object)})}


@each("name", BAD_FILES)
def test_npz_refused(tmp_path, name):
    """One sentence that names the file and the array, and no folder of a run."""
    (array, bad), path = BAD_FILES[name], tmp_path / "bad.npz"
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    elif bad:
        np.savez(path, **{k: v for k, v in {**ARRAYS, **bad}.items() if v is not None})
    status, _, err = command("--data", path, "--out", tmp_path / "out")
    assert status == 1 and "bad.npz" in err and array in err and len(err.strip().split("\n")) == 1
    assert not (tmp_path / "out").exists()


def test_shapes():
    """The same every time, balanced, and hard for a linear classifier: least squares, a ridge."""
    shapes = data.load("synthetic")
    assert with_bytes([*shapes]) == with_bytes([*data.synthetic()]) and not shapes.real
    assert shapes.train_images.shape == (2560, 32, 32, 3) and len(shapes.classes) == 10
    assert shapes.test_labels.bincount().tolist() == [100] * 10
    corner = shapes.train_images[:, 0, :6].float()                       # noise alone
    assert corner.diff(dim=1).std().item() / 2**0.5 == pytest.approx(30, rel=0.1)
    x, test = (images[:, ::2, ::2].flatten(1) / 128 - 1
               for images in (shapes.train_images, shapes.test_images))
    w = torch.linalg.solve(x.T @ x + 10 * torch.eye(768), x.T @ torch.eye(10)[shapes.train_labels])
    assert ((test @ w).argmax(1) == shapes.test_labels).float().mean() < 0.2


# -------------------------------------------------------------------- train: a step, and an epoch

def random_batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6)) for _ in range(count)]


def test_step_scales(tmp_path, monkeypatch):
    """A power of two as scale changes no bit; one too large costs steps, which halve it."""
    quick(monkeypatch.setattr)
    results = []
    for scale in (None, 2.0**10, 2.0**127):
        net = model.make_model(CPU, width=8)
        scaler = torch.amp.GradScaler("cpu", scale) if scale else model.make_scaler(CPU)
        optimizer = model.make_optimizer(net, lr=0.01)
        # Without a factor, gradients would be too small to overflow.
        step = train.make_step(net, optimizer, scaler, lambda *a: 1e6 * F.nll_loss(*a))
        assert all(0 <= step(*batch)[1] <= 6 for batch in random_batches(4))
        results.append(with_bytes([*net.parameters()]))
    assert results[0] == results[1] != results[2]
    assert scaler.get_scale() == 2.0**123                     # halved by each of four overflows
    assert with_bytes([*model.make_model(CPU, width=8).parameters()]) == results[2]
    parts = {"net": net, "average": net, "optimizer": optimizer, "scaler": scaler}
    train.save_run(tmp_path, {}, [], parts)
    again = parts | {"scaler": torch.amp.GradScaler("cpu")}
    train.begin_run(tmp_path, {}, again, train.read_checkpoint(tmp_path / "checkpoint.pt"))
    assert again["scaler"].state_dict() == scaler.state_dict()       # it goes on with its scale


@each("step, d", [(0, 0.1), (2, 0.25), (889, 890 / 899), (5000, 0.99)])
def test_average(step, d):
    """The docstring's d, which is short at the start and 0.99 in the end."""
    average, net = nn.Linear(9, 9), nn.Linear(9, 9)
    expected = d * average.weight + (1 - d) * net.weight
    train.update_average(average, net, step)
    torch.testing.assert_close(average.weight, expected)


@each("batch_size, count", [(512, 10), (511, 11)])
def test_average_statistics(monkeypatch, batch_size, count):
    """BatchNorm's against each batch's mean and variance, averaged over a tenth of 50,000."""
    quick(monkeypatch.setattr)
    net, batches = model.make_model(CPU, width=8), random_batches(12)     # small ones, for speed
    loader = SimpleNamespace(batch_size=batch_size, device=CPU, epoch=lambda *_: iter(batches))
    convolution, bn, _ = net.prep
    bn.running_mean += 5                                      # is forgotten
    train.measure_statistics(net, loader, 3, 2)
    outputs = torch.stack([convolution(x).detach() for x, _ in batches[:count]])
    torch.testing.assert_close(bn.running_mean, outputs.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(bn.running_var, outputs.transpose(1, 2).flatten(2).var(2).mean(0))


class Opinions(nn.Module):
    """Three classes: nearly sure of 0 in pictures lighter on the left, of 1 or 2 in the others."""

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        left = (x[..., :16].mean((1, 2, 3)) > x[..., 16:].mean((1, 2, 3)))[:, None]
        return torch.where(left, *torch.tensor([[0.9, 0.05, 0.05], [0.01, 0.5, 0.49]])).log()


def test_accuracy():
    """flip averages probabilities, so here 0 wins always; the mean of logarithms would say 1."""
    x, labels = torch.zeros(6, 3, 32, 32), torch.tensor([0, 0, 0, 1, 0, 1])
    x[:4, ..., :16], x[4:, ..., 16:] = 1, 1                   # the first four: lighter on the left
    batches = list(zip(x.split(4), labels.split(4)))
    assert train.accuracy(Opinions(), batches) == train.accuracy(Opinions(), batches, True) == 4 / 6
    assert train.accuracy(Opinions(), [(x, 0 * labels)]) == 4 / 6
    assert train.accuracy(Opinions(), [(x, 0 * labels)], flip=True) == 1


@each("labels, classes, wrong, widths", [
    ([1] * 40 + [2] * 5 + [0, 1, 1], ["$^$"] * 10, 6, [0, 100, 0]),
    ([*range(48)], [*map(str, range(100))], 16, [0] * 20)])
def test_mistakes(tmp_path, monkeypatch, labels, classes, wrong, widths):
    """A network that always says 1: the surest mistakes first, 16 at most; bars, shares right.

    Classes of one name stay apart; no name is a formula. Of many classes, 20 bars: of the lowest.
    """
    own = data.make_dataset("own", [*ARRAYS.values()], classes)
    own, net, figure = own._replace(test_labels=torch.tensor(labels)), nn.Module(), Figure()
    one = torch.eye(len(classes))[1]
    net.forward = lambda x: (one * (2 + x.mean((1, 2, 3)))[:, None]).log_softmax(1)
    monkeypatch.setattr(train, "new_figure", lambda *size: figure)
    loader = data.Loader(own, 16, torch.float32, CPU)
    train.plot_mistakes(net, loader, tmp_path / "mistakes.png")
    (*axes,), (bars,) = (part.axes for part in figure.subfigs)
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    title = re.escape(classes[1]) + r" (\d+)%\nis .+"
    sure = [int(re.fullmatch(title, found)[1]) for found in titles]
    assert len(sure) == wrong and sure == sorted(sure, reverse=True)
    assert [bar.get_width() for bar in bars.patches] == widths
    assert len({bar.get_y() for bar in bars.patches}) == len(widths)


# ------------------------------------------------------------------------------ train: its files

def test_checkpoint_damage(tmp_path):
    """With a bit flipped it is an error, or in bytes without meaning the content."""
    names = "settings", "history", "net", "average", "optimizer", "scaler"
    content = {name: {"some": torch.arange(50.0)} for name in names}
    path = tmp_path / "checkpoint.pt"
    train.save(path, {**content, "history": Path()})          # of a class, so of code
    code = path.read_bytes()
    train.save(path, content)
    whole = path.read_bytes()

    def flipped(place):
        return whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:]

    for place in np.random.default_rng(0).integers(len(whole), size=100):
        path.write_bytes(flipped(place))
        with contextlib.suppress(SystemExit):
            assert with_bytes(train.read_checkpoint(path)) == with_bytes(content)
    for bad in (code, whole[:-100], flipped(whole.index(b"\x80\x3f\0\0\0\x40"))):     # in 1., 2.
        path.write_bytes(bad)
        with pytest.raises(SystemExit):
            train.read_checkpoint(path)


@each("module, name, failures, kept", [(os, "replace", 1, 2), (os, "replace", 2, 2),
                                       (os, "replace", 1000, 1), (torch, "save", 1, 1)])
def test_save_fails(tmp_path, monkeypatch, module, name, failures, kept):
    """A virus scanner may hold a file once or twice; else the old one stays, and nothing else."""
    path, whole = tmp_path / "some.pt", getattr(module, name)
    left, waits = iter(range(failures)), []
    train.save(path, {"epoch": 1})

    def fail(content, target):
        for _ in left:
            if name == "save":
                target.write_bytes(b"half of it")
            raise PermissionError("held") if name == "replace" else RuntimeError("disk full")
        whole(content, target)

    monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(train.time, "sleep", waits.append)
    with pytest.raises(SystemExit, match="cannot") if kept == 1 else contextlib.nullcontext():
        train.save(path, {"epoch": 2})
    assert torch.load(path) == {"epoch": kept} and [*tmp_path.iterdir()] == [path]
    assert len(waits) == (min(failures, 3) if name == "replace" else 0)


# --------------------------------------------------------------------------- lrfinder: the sweep

BATCHES = [torch.ones(1, 1)]


def quadratic(curvatures):
    """A network of weights 1 and its loss: half the sum of curvatures * (w - batch)^2."""
    net, curvatures = nn.Linear(1, len(curvatures), False).double(), torch.tensor(curvatures)
    nn.init.ones_(net.weight)
    return net, lambda batch: (curvatures * (net.weight[:, 0] - batch) ** 2).sum() / 2


@pytest.mark.filterwarnings("error")                  # a scaler that nobody asked for gives one
def test_sweep_closed_form():
    """Gradient descent: loss_k / loss_0 is the product of (1 - 3 lr_j)^2 over all j < k."""
    (net, loss), lrs = quadratic([3.0]), np.geomspace(1e-3, 0.5, 60)
    curve = range_test(net, torch.optim.SGD(net.parameters()), loss, [0], lr_start=1e-3, lr_end=0.5,
                       steps=60)
    assert curve.lrs == pytest.approx(lrs, rel=1e-9) and curve.ended == ""
    factors = np.cumprod((1 - 3 * lrs[:-1]) ** 2)
    assert curve.losses[1:] == pytest.approx(curve.losses[0] * factors, rel=1e-9)


def test_sweep_scales():
    """By a scaler of its own: a scale that is too large costs one step; the caller's stays."""
    net, loss = quadratic([3.0])
    net, scaler = net.float(), torch.amp.GradScaler("cpu", 2.0**127)      # 3 times that is infinite
    first, second, third, *_ = range_test(net, torch.optim.SGD(net.parameters()), loss, [0],
                                          scaler=scaler, steps=20).losses
    assert first == second > third and scaler.get_scale() == 2.0**127


@each("momentum, nesterov", [(0, False), (0.9, False), (0.9, True)])
def test_sweep_stability(momentum, nesterov):
    """Stops past 2/L, 2(1+b)/L, and 2(1+b)/(L(1+2b)) for Nesterov; nearer with more steps."""
    stops, limit = [], 2 * (1 + momentum) / (4 * (1 + 2 * momentum if nesterov else 1))
    for steps in (100, 300, 1000):
        net, loss = quadratic(np.linspace(0.4, 4, 10))
        sgd = torch.optim.SGD(net.parameters(), 1, momentum, nesterov=nesterov)
        noise = 0.02 * torch.randn(steps, 10, generator=torch.Generator().manual_seed(0))
        curve = range_test(net, sgd, loss, noise, lr_start=1e-2, steps=steps)
        assert curve.ended == "" and len(curve.lrs) < steps
        stops.append(curve.lrs[-1] / limit)
    assert 2.5 > stops[0] > stops[1] > stops[2] > 1


def replay(losses):
    """The range test of a model whose losses are these, as long as they last."""
    net, remaining = nn.Linear(1, 1), iter(losses)
    return range_test(net, torch.optim.SGD(net.parameters()),
                      lambda batch: net(batch).sum() * 0 + next(remaining),
                      iter(BATCHES * len(losses)), steps=100)


GAINED = [3.0] * 10 + np.linspace(3, 1.6, 20).tolist() + [1.6] * 10
LATE_NOISE = [3.0] * 50 + np.random.default_rng(2).normal(1.6, 0.5, 50).tolist()


@each("losses, ended", [
    (GAINED + [1.6 + 0.45 * 1.4] * 60, "all"), (GAINED + [1.6 + 0.55 * 1.4] * 60, "rise"),
    ([2.0] * 40 + [7.9] * 60, "all"), ([2.0] * 40 + [8.1] * 60, "rise"),
    ([2.0] * 20 + [1.82] * 20 + [7.9] * 60, "all"),
    ([2.0] * 20 + [1.82] * 20 + [8.1] * 60, "rise"), ([0.0] * 100, "all"), (LATE_NOISE, "all"),
    ([-2.0] * 40 + [3.9] * 60, "all"), ([-2.0] * 40 + [4.1] * 60, "rise"),
    ([1.0] * 15 + [math.nan], "not finite"),
    ([1.0] * 15 + [math.inf], "not finite"), ([1.0] * 30, "only 30 of 100 batches"),
    ([], "only 0 of 100 batches")])
def test_sweep_ends(losses, ended):
    """Where half of the gain is lost; without a gain, at the start plus three times its size."""
    curve = replay(losses)
    whole = ended in ("all", "rise")                      # a curve that says all there is to say
    assert curve.ended == "" if whole else ended in curve.ended
    assert (len(curve.losses) == sum(map(math.isfinite, losses))) == (ended != "rise")
    assert curve.lrs == pytest.approx(np.geomspace(1e-3, 10, 100)[:len(curve.losses)])


def test_sweep_of_noise():
    """20 % of noise alone does not end the sweep, nor give an answer."""
    curves = [replay(np.random.default_rng(seed).normal(1, 0.2, 100)) for seed in range(60)]
    assert [len(curve.lrs) for curve in curves].count(100) >= 58
    assert [place_of_lrmax(curve) for curve in curves].count(None) >= 58


@each("rates, initial", [((0.001, 0.1), None), ((0.1, 0.05), None), ((0.0, 0.0), (0.001, 0.1)),
                         ((0.05, 0.1), (0.001, 0.1))])
def test_sweep_groups(rates, initial):
    """Groups keep their ratio, after a warm-up from 0 the one that they had before it.

    A rate set since then counts. A first group without parameters does no harm. A rate that is a
    tensor, the last here, comes back.
    """
    net, rate, seen = nn.Linear(1, 2), torch.tensor((initial or rates)[1]), []
    sgd = torch.optim.SGD([{"params": [], "lr": 0.0},
                           {"params": net.weight, "lr": (initial or rates)[0]},
                           {"params": net.bias, "lr": rate}], momentum=0.9)
    if initial:                       # a warm-up: over, or at its start, where rates are 0
        torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 if any(rates) else step / 10)
    groups = sgd.param_groups[1:]
    if any(rates):
        groups[0]["lr"], initial = rates[0], None
    assert [float(group["lr"]) for group in groups] == pytest.approx(rates)

    def loss(batch):
        seen.append([float(group["lr"]) for group in groups])
        return net(batch).sum()

    curve = range_test(net, sgd, loss, BATCHES, steps=20)
    ratios = np.divide(initial or rates, max(initial or rates))
    assert np.allclose(seen, np.outer(curve.lrs, ratios)) and not sgd.state
    assert groups[0]["lr"] == rates[0] and groups[1]["lr"] is rate == torch.tensor(rates[1])


def test_sweep_modes():
    """A frozen layer stays frozen; a model in evaluation mode is trained."""
    net, seen = nn.Sequential(nn.BatchNorm1d(2)), []
    sgd = torch.optim.SGD(net.parameters())
    for part, modes in ((net[0], (True, False)), (net, (True, True))):
        part.eval()
        range_test(net, sgd, lambda batch: seen.append((net.training, net[0].training))
                   or net(batch).sum(), [torch.randn(4, 2)], steps=2)
        assert seen[-1] == modes and not net[0].training


@each("words, options", [
    ("sweep", {"steps": 1}), ("sweep", {"lr_start": 0}), ("sweep", {"lr_start": 20}),
    ("LBFGS", {"make": torch.optim.LBFGS}), ("lazy", {"last": nn.LazyLinear(2)}),
    ("rates are .0.0.", {"make": lambda w, lr: torch.optim.SGD(w, 0.0)})])
def test_sweep_refused(words, options):
    """An impossible sweep, optimizer or model: a sentence, and nothing changed."""
    options = {"make": torch.optim.SGD, **options}
    net = nn.Sequential(nn.Linear(1, 2), options.pop("last", nn.Identity()))
    optimizer = options.pop("make")(net.parameters(), lr=0.1)
    before, rate = net[0].weight.clone(), optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match=words):
        range_test(net, optimizer, lambda batch: net(batch).sum(), BATCHES, **options)
    assert torch.equal(net[0].weight, before) and optimizer.param_groups[0]["lr"] == rate


RANK = """
import json, os, sys, torch, lrfinder
rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
net, x, y = torch.load(f"{folder}/task.pt", weights_only=False)
net = torch.nn.Sequential(torch.nn.parallel.DistributedDataParallel(net))      # wrapped
optimizer = torch.optim.SGD(net.parameters(), 0.1)
curve = lrfinder.range_test(net, optimizer, lambda batch: (net(batch[0]) - batch[1]).pow(2).mean(),
                            [*zip(x[rank], y[rank])], steps=100)
print(json.dumps(curve), flush=True)
torch.distributed.barrier()
os._exit(0)                                       # gloo's threads may abort an orderly end
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without it")
def test_sweep_of_two_processes(tmp_path):
    """Each with its own half of each batch, one noisier, against one process with whole batches."""
    torch.manual_seed(0)
    net, x, matrix = (t.double() for t in (nn.Linear(5, 1), torch.randn(2, 40, 16, 5),
                                           torch.randn(5, 1)))
    y = x @ matrix + torch.randn(2, 40, 16, 1) * torch.tensor([0.1, 1]).view(2, 1, 1, 1)
    torch.save((net, x, y), tmp_path / "task.pt")
    ranks = [start(RANK, rank, tmp_path) for rank in (0, 1)]
    try:
        ended = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(out for out, _ in ended), ended
    ours, theirs = (Curve(*json.loads(out.splitlines()[-1])) for out, _ in ended)   # gloo talks
    whole = range_test(net, torch.optim.SGD(net.parameters(), 0.1),
                       lambda batch: F.mse_loss(net(batch[0]), batch[1]),
                       [*zip(torch.cat([*x], 1), torch.cat([*y], 1))], steps=100)
    assert ours == theirs and ours.lrs == whole.lrs and len(ours.lrs) < 100
    assert ours.losses == pytest.approx(whole.losses)


def muon_of(weights):
    """Muon with matrices in one group, all else in the other."""
    groups = [{"params": [w for w in weights if (w.dim() == 2) == matrix], "orthogonal": matrix}
              for matrix in (True, False)]
    return model.Muon(groups, 0.1, 0.9, 0.01)


@each("make", [lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
               lambda w: torch.optim.Adam(w, torch.tensor(0.01)), muon_of],
      ids=("SGD", "Adam", "Muon"))
@each("ending", ["normal", "divergence", "Ctrl-C", "flag"])
def test_sweep_restores(monkeypatch, make, ending):
    """Everything, bit for bit, and the same objects; if one thing cannot be, all the others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
                        nn.Dropout(0.3).eval(), nn.Linear(8 * 36, 4))
    net.register_buffer("count", torch.zeros(1), persistent=False)
    net.register_forward_pre_hook(lambda *_: setattr(net, "count", net.count + 1))
    scale = nn.Parameter(torch.ones(1))                   # which the model does not have
    optimizer = make([scale, *list(net.parameters())[1:]])                        # all but one
    batch = torch.randn(16, 3, 8, 8), torch.randn(16, 4)

    def loss(batch):
        return F.mse_loss(net(batch[0]) + scale, batch[1])

    for _ in range(3):                                    # gradients and state, to be kept
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    kept = net[1].weight.grad                             # may be written to, as DDP's buckets are
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    scaler.scale(torch.zeros(1))                          # makes its state

    def state():
        gradients = [w.grad for w in net.parameters()]
        lr, states = optimizer.param_groups[0]["lr"], optimizer.state.values()
        return with_bytes([
            [(m.training, m._parameters, m._buffers) for m in net.modules()], gradients, scale,
            [*map(id, (*net.buffers(), *gradients, lr, *states))], optimizer.state_dict(),
            scaler.state_dict(), torch.get_rng_state(), random.getstate(), np.random.get_state()])

    def fail(*arguments):
        raise KeyboardInterrupt

    def batches():
        for k in range(40):
            if k == 20 and ending == "Ctrl-C":
                fail()
            random.random(), np.random.rand(), torch.rand(1), kept.zero_()
            yield batch

    before = state()
    if ending == "flag":
        monkeypatch.setattr(nn.Dropout, "__setattr__", fail)
    with contextlib.suppress(KeyboardInterrupt):
        curve = range_test(net, optimizer, loss, batches(), steps=40, scaler=scaler,
                           lr_end=1e6 if ending == "divergence" else 0.1)
        assert (len(curve.lrs) < 40) == (ending == "divergence")
    assert state() == before
    optimizer.step()
    assert state() != before                              # the comparison can fail


# -------------------------------------------------------------------------- lrfinder: the reading

def curve_of(*pieces, **changes):
    """Losses along straight pieces (points, from, to), with a rate from 1e-3 to 10."""
    losses = np.concatenate([np.linspace(a, b, n) for n, a, b in pieces])
    return Curve(np.geomspace(1e-3, 10, len(losses)).tolist(), losses.tolist())._replace(**changes)


def place_of_lrmax(curve):
    """LRMAX's index in the curve, or None where it shows no answer."""
    with contextlib.suppress(NotFound):
        return curve.lrs.index(suggest(curve).lr_max)


FALL_AND_RISE = (20, 2.3, 2.3), (40, 2.3, 1.5), (30, 1.5, 2.4)
WIGGLE = (20, 2.3, 2.3), (20, 2.3, 1.9), (3, 1.9, 1.96), (17, 1.9, 1.5), (30, 1.5, 2.4)


@each("pieces, place, noise, wild", [
    (FALL_AND_RISE, 59, 0, {}), (WIGGLE, 59, 0.05, {}),
    (((20, 2.3, 2.3), (15, 2.3, 1.95), (15, 1.95, 2.2), (30, 2.2, 1.5), (30, 1.5, 3)), 79, 0, {}),
    ((*FALL_AND_RISE, (20, 2.4, 1.2), (20, 1.2, 3)), 59, 0, {}),
    (((20, 2.3, 2.3), (25, 2.3, 1.8), (15, 1.8, 1.96), (30, 1.96, 1.5), (30, 1.5, 3)), 89, 0, {}),
    (((20, 2.3, 2.3), (25, 2.3, 1.8), (15, 1.8, 1.99), (30, 1.99, 1.5), (30, 1.5, 3)), 44, 0, {}),
    (((20, 1, 1), (30, 1, 0.88), (30, 0.88, 3)), 49, 0, {}),
    (((3, 2.3, 2.3), (6, 2, 0.5), (3, 1, 3)), 8, 0, {}),
    (((10, 9, 0), (51, 1, 51)), 9, 0, {}),
    *((FALL_AND_RISE, 59, 0, wild) for wild in (
        {3: 4, 4: 4}, {40: 6}, {40: 6, 41: 6}, {45: 0}, {89: 10}, {40: 1000}))])
def test_lrmax(pieces, place, noise, wild):
    """The first minimum before a rise of 15 % of the fall (here 13 and 16 %); with noise, too.

    A dip before half of the fall, an early spike, a bad batch or two in mid-descent or a wild last
    point do not move it.
    """
    for seed in range(10 if noise else 1):
        curve = curve_of(*pieces)
        losses = curve.losses + np.random.default_rng(seed).normal(0, noise, len(curve.losses))
        losses[[*wild]] = [*wild.values()]
        found = suggest(curve._replace(losses=losses.tolist()))
        assert abs(curve.lrs.index(found.lr_max) - place) <= 4
        assert found[:3] == (found.lr_max / 2, found.lr_max, found.lr_max / 10)
        assert found.steepest <= found.lr_max
    assert not wild or len(replay([*losses, *losses]).losses) > 70


@each("fall, clear", [(5.5, False), (6.5, True)])
def test_lrmax_clear(monkeypatch, fall, clear):
    """A fall counts from six standard deviations; a window of 7 to either side leaves 3 / 4 / 8."""
    curve = curve_of((20, 4, 4), (40, 4, 3), (30, 3, 7))
    sigma = (4 - min(smooth(curve.losses))) / fall
    monkeypatch.setattr(lrfinder, "noise", lambda losses: sigma / math.sqrt(3 / 4 / 8))
    assert (place_of_lrmax(curve) is not None) == clear


@each("rise, clear", [(5.5, False), (6.5, True)])
def test_lrmax_clear_rise(monkeypatch, rise, clear):
    """A rise counts from six standard deviations, too; here it is a third of the fall."""
    curve = curve_of((20, 4, 4), (20, 4, 3.2), (20, 3.2, 3.55), (30, 3.55, 3), (30, 3, 7))
    smoothed = smooth(curve.losses)
    sigma = (max(smoothed[50:70]) - min(smoothed[:50])) / rise
    monkeypatch.setattr(lrfinder, "noise", lambda losses: sigma / math.sqrt(3 / 4 / 8))
    assert (place_of_lrmax(curve) < 60) == clear


def test_lrmax_flat_valley(monkeypatch):
    """The last point within a standard deviation of the lowest."""
    curve = curve_of((20, 4, 4), (20, 4, 1), (30, 1, 1.1), (30, 1.1, 4))
    monkeypatch.setattr(lrfinder, "noise", lambda losses: 0.05 / math.sqrt(3 / 4 / 8))
    smoothed, place = np.array(smooth(curve.losses)), place_of_lrmax(curve)
    assert smoothed[place] <= smoothed.min() + 0.05 < smoothed[place + 1] and place > 50


@each("lrs, middle, noise", [(np.geomspace(1e-3, 10, 100), 0.03, 0.03),
                             (np.geomspace(1e-3, 10, 100), 0.3, 0.03),
                             (np.linspace(1e-3, 2, 400), 0.3, 0)])
def test_steepest(lrs, middle, noise):
    """1 / (1 + (lr / middle)^2) is a logistic curve of log lr: steepest where lr = middle."""
    losses = 0.2 + 2 / (1 + (lrs / middle) ** 2) + (lrs / 5 / middle) ** 4
    losses += np.random.default_rng(0).normal(0, noise, len(lrs))
    assert middle / 1.5 < suggest(Curve(lrs, losses)).steepest < middle * 1.5
    spiked = curve_of((5, 2.8, 2.3), *FALL_AND_RISE)      # its first points are hardly smoothed
    assert suggest(spiked).steepest > spiked.lrs[20]


@each("curve, words", [
    (curve_of((100, 2.3, 2.3)), "never falls"), (curve_of((100, 0, 0)), "never falls"),
    (curve_of((50, 2.3, 2.25), (50, 2.25, 9)), "never falls"),
    (curve_of((20, 1, 1), (30, 1, 0.91), (30, 0.91, 3)), "never falls"),
    (curve_of((20, -1, -1), (30, -1, -1.09), (30, -1.09, 3)), "never falls"),
    (curve_of((40, 0.1, 2.1)), "only rises|never falls"),
    (curve_of((5, 3, 1), (60, 1, 9)), "only rises|never falls"),
    (curve_of((6, 3.5, 1), (54, 1.5, 28)), "only rises"),
    (curve_of((99, 2.3, 1.3), (1, 1.6, 1.6)), "falls to the end.*raise"),
    (curve_of((50, 3, 1), ended="it is torn"), "falls to the end.*it is torn"),
    (curve_of((30, 3, 3), ended="it is torn"), "never falls.*it is torn"),
    (curve_of((3, 3, 1), ended="it is torn"), "3 of the 10.*it is torn"),
    (curve_of((3, 2.3, 1), (4, 1, 3)), "7 of the 10.*more steps"), (Curve([], []), "points")])
def test_not_found(curve, words):
    """What the curve shows and what to try; if the sweep ended early, the reason in its place."""
    with pytest.raises(NotFound, match=words):
        suggest(curve)


def test_noise_measured():
    """Around any line, and in spite of wild points."""
    losses = np.linspace(9, 1, 20_000) + np.random.default_rng(0).normal(0, 0.2, 20_000)
    assert lrfinder.noise(losses) == pytest.approx(0.2, rel=0.03)
    losses[::40] += 50
    assert lrfinder.noise(losses) == pytest.approx(0.2, rel=0.15)


def test_smooth():
    """One or two wild points are dropped; a line stays one, at the ends but for the medians."""
    line = np.linspace(3, 1, 83)
    spikes = np.where(np.isin(np.arange(83), (30, 50, 51)), 9, line)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    assert np.allclose(smooth(spikes), line, atol=0.04)
    for half, reach in ((9, 4), (41, 7), (200, 20)):      # a step from 0 to 1; cos^2 is central,
        step = np.array(smooth([0.0] * half + [1.0] * half))      # and steepest by 1 / (reach + 1)
        assert np.allclose(step + step[::-1], 1)
        assert np.diff(step).max() == pytest.approx(1 / (reach + 1))
        assert step[half - reach - 1] == 0 < step[half - reach]


@each("path, missing", [("missing/lr.png", ""), ("lr.xyz", ""), ("lr.png", "matplotlib.figure")])
def test_lr_report(tmp_path, monkeypatch, path, missing):
    """The answer in words, though the picture cannot be written, or matplotlib is missing."""
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    for curve, answer in ((curve_of(*FALL_AND_RISE), "LRMAX 0."), (Curve([], []), "not found")):
        found, message = lrfinder.report(curve, tmp_path / path)
        assert answer in message and "no picture" in message and "\n" not in message
        assert found == (suggest(curve) if curve.lrs else None)


# -------------------------------------------------------------------------------------------- runs

def options(folder):
    """Three epochs of four steps on the images in folder, with a given LRMAX."""
    return ["--data", folder / "own.npz", "--epochs", 3, "--batch-size", 16, "--lr-max", 0.1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """own.npz, 64 images to train on and 48 to test, and `whole`, a run of 3 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    np.savez(folder / "own.npz", **ARRAYS)
    succeed(*options(folder), "--out", folder / "whole")
    return folder


def outcome(run):
    """All that a run ends with, but for its seconds, as plain objects that == compares."""
    content = train.read_checkpoint(run / "checkpoint.pt")
    for row in content["history"]:
        del row["seconds"], row["speed"]
    content["result"] = torch.load(run / "model.pt", weights_only=True)["weights"]
    return with_bytes(content)


@each("optimizer", ["muon", "sgd"])
def test_run_searches(folder, tmp_path, monkeypatch, optimizer):
    """LRMAX by `train.py`, by `lrfinder.py` and by hand; the run is as if it had been given.

    By hand: the seed's network and its batches, epoch after epoch, and 100 steps.
    """
    monkeypatch.chdir(tmp_path)
    quick(monkeypatch.setattr)
    given = [*options(folder)[:2], "--batch-size", 16, "--seed", 3, "--optimizer", optimizer]
    net, own = model.make_model(CPU, 3, width=8), data.load(folder / "own.npz")
    own = data.Loader(own, 16, torch.float32, CPU)
    curve = range_test(net, model.make_optimizer(net, optimizer),
                       lambda batch: F.nll_loss(net(batch[0]), batch[1]),
                       (batch for epoch in itertools.count() for batch in own.epoch(3, epoch)),
                       steps=100)
    flat = train.find_lr_max(net, model.make_optimizer(net), model.make_scaler(CPU), own, 3,
                             "flat.png", lambda *a: 0 * F.nll_loss(*a))
    assert flat is None                                   # of the loss that it is given
    lr_max, main = suggest(curve).lr_max, functools.partial(
        runpy.run_path, str(HERE / "lrfinder.py"), run_name="__main__")
    for text in succeed(*given, "--epochs", 1), succeed(*given, main=main):
        assert f"LRMAX {lr_max:.3g} " in text
    assert Path("lr_range.png").stat().st_size > 5000 < Path("runs/1/lr_range.png").stat().st_size
    succeed(*given, "--epochs", 1, "--lr-max", lr_max)
    assert outcome(Path("runs/1")) == outcome(Path("runs/2"))


def test_run_without_an_answer(folder, monkeypatch):
    """As if the range test had said 0.1."""
    def fail(curve):
        raise NotFound("no answer")

    monkeypatch.setattr(lrfinder, "suggest", fail)
    succeed(*options(folder)[:-2], "--out", folder / "no answer")
    assert outcome(folder / "no answer") == outcome(folder / "whole")


@each("real", [True, False])
def test_run_on(tmp_path, monkeypatch, real):
    """From the command to the results; what is not CIFAR-10 says so; the time-out is put back.

    So is the environment, in which a notebook's next cell runs. Three epochs of shapes teach 80 %
    of new ones; chance is 10 %, see `test_shapes`.
    """
    seen, before = [], dict(os.environ)
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 77)
    monkeypatch.setattr(socket, "setdefaulttimeout", seen.append)
    if real:
        cifar10_on_disk(tmp_path, monkeypatch)
    monkeypatch.setattr(data, "synthetic", functools.partial(data.synthetic, 2560, 200))
    status, out, err = command("--data-dir", tmp_path, "--epochs", 3, "--lr-max", 0.1,
                               "--out", tmp_path)
    assert status == 0 and seen == [20, 77], err
    assert [("NOT CIFAR-10" in text) for text in (out, err)] == [not real] * 2
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["classes"][0] == ("airplane" if real else "disc") and saved["width"] == 8
    assert real or saved["last_epoch"]["averaged"] > 0.8
    for name in ("history.json", "checkpoint.pt", "curves.png", "mistakes.png"):
        assert (tmp_path / name).stat().st_size > 100
    assert os.environ.get("MPLBACKEND") == before.get("MPLBACKEND")


@each("notebook", [True, False])
def test_run_in_a_notebook(monkeypatch, notebook):
    """A notebook's memory is its own affair; a script's is kept."""
    calls = []
    monkeypatch.setattr(train, "reuse_freed_memory", lambda: calls.append(1))
    if notebook:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    else:
        monkeypatch.delattr(sys, "ps1", raising=False)
    assert "--data" in succeed("-h") and calls == [1] * (not notebook)


def test_run_seed(folder):
    """The same seed gives the same run bit for bit, another seed another; so does --runs."""
    out = succeed(*options(folder), "--runs", 2, "--out", folder / "several")
    first, second = (outcome(folder / "several" / f"seed{seed}") for seed in (0, 1))
    assert first == outcome(folder / "whole") and first["result"] != second["result"]
    results = [run["history"][-1]["averaged"] for run in (first, second)]
    assert f"{np.mean(results):.2%} +- {np.std(results, ddof=1):.2%}" in out
    succeed(*options(folder), "--seed", 1, "--out", folder / "seed1")
    assert outcome(folder / "seed1") == second


@each("optimizer, mu", [("muon", 0.6), ("sgd", 0.9)])
def test_run_is_the_recipe(folder, monkeypatch, optimizer, mu):
    """Optimizer and average by hand, 12 steps: rates, losses, accuracies, weights, statistics."""
    quick(monkeypatch.setattr)
    own, net, history = data.load(folder / "own.npz"), model.make_model(CPU, 3, width=8), []
    loader = data.Loader(own, 16, torch.float32, CPU)
    # Small rates, so that rounding grows slowly; the peak is at 5/24 of 12 steps, rounded.
    lrs = [*np.linspace(1e-4, 1e-3, 3), *np.linspace(1e-3, 1e-4, 10)[1:]]
    sgd = torch.optim.SGD(net.parameters(), 1, mu, nesterov=True, weight_decay=1e-3)
    velocity = [torch.zeros_like(w) for w in net.parameters()]
    average = [w.detach().clone() for w in net.parameters()]
    for epoch in range(3):
        losses, correct = [], 0
        net.train()
        for k, (x, y) in enumerate(loader.epoch(3, epoch), 4 * epoch):
            log_p, lr, d = net(x), lrs[k], min(0.99, (1 + k) / (10 + k))
            loss = -log_p[range(16), y].mean()                            # cross-entropy
            sgd.zero_grad()
            loss.backward()
            with torch.no_grad():
                for w, v in zip(net.parameters(), velocity):
                    if w.dim() == 4 and optimizer == "muon":      # a matrix, each row a filter
                        v.mul_(mu).add_(w.grad)
                        w *= len(w) ** 0.5 / w.square().sum().sqrt()
                        w -= lr * orthogonal_by_svd((w.grad + mu * v).flatten(1)).view_as(w)
                        w.grad = None                             # the rest is left to torch
                sgd.param_groups[0]["lr"] = lr
                sgd.step()
                for w, a in zip(net.parameters(), average):
                    a.copy_(d * a + (1 - d) * w)
            losses.append(loss.item())
            correct += (log_p.argmax(1) == y).sum().item()
        net.eval()
        tested = torch.cat([net(x).argmax(1) for x, _ in loader.test()]) == own.test_labels
        history.append((lr, np.mean(losses), correct / 64, tested.float().mean().item()))
    out = folder / f"by hand-{optimizer}"
    succeed(*options(folder), "--lr-max", 1e-3, "--seed", 3, "--optimizer", optimizer, "--out", out)
    run = train.read_checkpoint(out / "checkpoint.pt")
    for k, (row, ours) in enumerate(zip(run["history"], history, strict=True)):
        assert (row["lr"], row["loss"]) == pytest.approx(ours[:2], rel=1e-3)
        # Later, rounding might decide between two classes.
        assert k or (row["train"], row["raw"]) == pytest.approx(ours[2:])
    for w, a in zip(net.parameters(), average):
        w.data.copy_(a)
    train.measure_statistics(net, loader, 3, 2)               # after the last epoch
    for name, ours in net.state_dict().items():
        torch.testing.assert_close(run["average"][name], ours, rtol=1e-2, atol=1e-3)


def test_run_by_default(folder, monkeypatch):
    """24 epochs with the peak after 5 of them; where there are few images, of one batch each."""
    steps = []
    monkeypatch.setattr(train, "update_average", lambda average, net, step: steps.append(step))
    monkeypatch.setattr(train, "finish_run", lambda *arguments: None)
    succeed("--data", folder / "own.npz", "--lr-max", 1, "--out", folder / "all")
    run = train.read_checkpoint(folder / "all" / "checkpoint.pt")
    lrs = [row["lr"] for row in run["history"]]
    assert (run["settings"]["batch_size"], len(lrs), lrs.index(max(lrs))) == (64, 24, 5)
    assert (lrs[0], lrs[5], lrs[23]) == pytest.approx((0.1, 1, 0.1))
    assert round(24 * 97 * train.PEAK) == 485 and steps == [*range(24)]


def test_run_reports_the_last_epoch(folder, monkeypatch):
    """Never the best one; and the flipped figure apart, as not the result. Each epoch is a line."""
    values, results = iter([0.5, 0.875, 0.25, 0.375, 0.625, 0.125]), []  # raw, averaged of 3 epochs
    monkeypatch.setattr(train, "PEAK", 1)                                # may be the last step, too
    monkeypatch.setattr(train, "accuracy", lambda *_, flip=False: 0.95 if flip else next(values))
    whole_train = train.train
    monkeypatch.setattr(train, "train", lambda *a: results.append(whole_train(*a)) or results[0])
    out = succeed(*options(folder), "--out", folder / "falling")
    assert results == [0.125]
    assert ("3 epochs of 4 steps of 16: LRMIN 0.01, LRMAX 0.1 at step 11, LRMIN 0.1 at the end"
            in out)
    head, *rows = (line.split() for line in out[out.index("epoch  "):].splitlines()[:4])
    assert [(row[0], *row[head.index("raw"):][:2]) for row in rows] == [
        ("1", "50.00%", "87.50%"), ("2", "25.00%", "37.50%"), ("3", "62.50%", "12.50%")]
    result, flipped = out[out.index("last epoch"):].split("(not the result")
    assert "12.50%" in result and "62.50%" in result and "95" not in result and "95" in flipped
    saved = torch.load(folder / "falling" / "model.pt", weights_only=True)
    assert saved["last_epoch"]["averaged"] == 0.125 and 0.95 not in saved["last_epoch"].values()


def test_run_saves_what_it_reports(folder):
    """model.pt alone, applied by hand to the test images, against the figure beside it."""
    saved = torch.load(folder / "whole" / "model.pt", weights_only=True)
    net = model.CustomResNet(len(saved["classes"]), saved["width"]).eval()
    net.load_state_dict(saved["weights"])
    x = ((torch.from_numpy(ARRAYS["test_images"]) - saved["mean"]) * saved["inverse_std"])
    correct = net(x.permute(0, 3, 1, 2)).argmax(1).numpy() == ARRAYS["test_labels"]
    assert correct.mean() == pytest.approx(saved["last_epoch"]["averaged"])
    history = json.loads((folder / "whole" / "history.json").read_text())["history"]
    assert history[-1] == saved["last_epoch"] and [row["epoch"] for row in history] == [1, 2, 3]


@each("words", [                                  # {} is the folder of own.npz and the run `whole`
    "--epochs 0", "--epochs many", "--epochs", "--batch-size 0", "--lr-max 0", "--lr-max nan",
    "--lr-max inf", "--seed -1", "--runs 0", "--warmup 3", "--optimizer adam",
    "--out {}/whole", "--out {}/own.npz", "--out {}/own.npz/out",
    "--resume {}/nowhere", "--resume {}/whole --epochs 4", "--resume {}/whole --lr-max 0.2",
    "--resume {}/whole --out {}/other", "--resume {}/whole --data synthetic",
    "--data cifar10 --data-dir {}/empty", "--data cifar10 --data-dir {}/own.npz"])
def test_bad_option(folder, tmp_path, words):
    """A sentence and a status, no traceback, and nothing changed."""
    before, out = outcome(folder / "whole"), tmp_path / "new"
    words = words.replace("{}", str(folder))
    given = [] if "--resume" in words else [*options(folder), "--out", out]
    status, _, err = command(*given, *words.split())
    assert status and err.strip() and not out.exists() and outcome(folder / "whole") == before


def test_out_is_claimed(tmp_path, monkeypatch):
    """Two runs never share a folder; without --out it is the first free one."""
    monkeypatch.chdir(tmp_path)
    assert [train.free_folder().as_posix() for _ in range(2)] == ["runs/1", "runs/2"]
    train.begin_run(Path("named/deep"), {}, {}, None)
    with pytest.raises(SystemExit, match="resume"):
        train.begin_run(Path("named/deep"), {}, {}, None)


@each("what", ["a dangling link", "a file"])
def test_runs_is_no_folder(folder, tmp_path, monkeypatch, what):
    """A sentence, and no search for a free number without an end: here it ends after fifty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "count", lambda start: iter(range(start, 50)))
    Path("runs").symlink_to("nowhere") if what == "a dangling link" else Path("runs").touch()
    status, _, err = command(*options(folder))
    assert status == 1 and "runs" in err and len(err.strip().split("\n")) == 1


@each("error, status, first, said", [
    (OSError("full"), 1, True, "checkpoint.pt (full)"), (KeyboardInterrupt(), 130, True, "interr"),
    (OSError("full"), 1, False, "model.pt (full)")])
def test_run_cannot_save(folder, tmp_path, monkeypatch, error, status, first, said):
    """At first: the folder stays free. At the end: the result is printed. ~ is the home."""
    save = torch.save

    def fail(content, path):
        if first or "weights" in content:
            raise error
        save(content, path)

    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    arguments = *options(folder), "--epochs", 1, "--out", "~/x"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        end, out, err = command(*arguments)
    assert end == status and said in err and ("last epoch" in out) != first
    if first:
        succeed(*arguments)
        assert (tmp_path / "x" / "model.pt").exists()


@each("what, epochs", [("rate", 0), ("weights", 1)])
def test_diverged(folder, monkeypatch, what, epochs):
    """A loss, or weights that no loss has shown yet: a sentence, and nothing saved over."""
    out, update = folder / f"diverged-{what}", train.update_average

    def break_weights(average, net, step):
        update(average, net, step)
        if step == 7 and what == "weights":                   # the last of the second epoch
            net.fc.bias.data[2] = math.nan

    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    monkeypatch.setattr(train, "update_average", break_weights)
    lr_max = 1e9 if what == "rate" else 0.1
    status, _, err = command(*options(folder), "--lr-max", lr_max, "--out", out)
    assert status and "--lr-max" in err and not (out / "model.pt").exists()
    kept = train.read_checkpoint(out / "checkpoint.pt")
    assert len(kept["history"]) == epochs
    assert all(w.isfinite().all() for w in (*kept["net"].values(), *kept["average"].values()))


# ----------------------------------------------------------------------- runs: cut off, and resumed

KILLED = """
import sys, test_all, train
test_all.quick({})
train.SAVE_EVERY = 0
train.finish_run = lambda *arguments: sys.stdin.read()       # it never ends by itself
train.main()
"""


def kill(*arguments, quick="", **environment):
    """Start a run, and SIGKILL it when the line of its second epoch says that one is saved."""
    with start(KILLED.format(quick), *arguments, **environment) as run:
        try:
            assert any(line.split()[:1] == ["2"] for line in run.stdout), run.stderr.read()
        finally:
            run.kill()
    assert run.returncode != 0


def test_resume_after_sigkill(folder):
    """Against the uninterrupted run, bit for bit; once more when it has ended; begun on a GPU."""
    out, moved = folder / "killed", folder / "moved"
    kill(*options(folder), "--out", out, OMP_NUM_THREADS=str(torch.get_num_threads()))
    checkpoint = train.read_checkpoint(out / "checkpoint.pt")
    assert checkpoint["history"] and not (out / "model.pt").exists()
    for group in checkpoint["optimizer"]["param_groups"]:     # a graph's rates are tensors
        group.update(lr=torch.tensor(group["lr"]), momentum=9)            # the code's is 0.6
    moved.mkdir()
    torch.save(checkpoint, moved / "checkpoint.pt")
    for path in (out, out / "checkpoint.pt", moved):
        assert "last epoch" in succeed("--resume", path, "--data", folder / "own.npz")
        assert outcome(path if path.is_dir() else out) == outcome(folder / "whole")


@each("error, status, word", [(KeyboardInterrupt, 130, "--resume"),
                              (torch.OutOfMemoryError, 1, "--batch-size")])
def test_resume_after_exception(folder, monkeypatch, error, status, word):
    """Against the uninterrupted run; only the steps since the last save are done again."""
    out, whole_set, calls = folder / error.__name__, onecycle.OneCycle.set, []

    def fail_once(self, step):
        calls.append(step)
        if len(calls) == 7:
            raise error
        return whole_set(self, step)

    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    monkeypatch.setattr(onecycle.OneCycle, "set", fail_once)
    end, _, err = command(*options(folder), "--out", out)
    assert end == status and word in err
    rows = [line.split()[0] for line in succeed("--resume", out).splitlines() if line[:5].strip()]
    assert rows[rows.index("epoch") + 1:][:3] == ["1", "2", "3"]         # the first one's line, too
    assert calls == [*range(7), *range(4, 12)] and outcome(out) == outcome(folder / "whole")


def test_checkpoint_intervals(folder, monkeypatch):
    """SAVE_EVERY counts from the last save: by a clock of a second a look, after epochs 2 and 4."""
    clock, saved = itertools.count(), []
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(train, "SAVE_EVERY", 5)
    monkeypatch.setattr(train, "save_run", lambda out, settings, history, *_: saved.append(
        len(history)))
    monkeypatch.setattr(train, "finish_run", lambda *arguments: None)
    succeed(*options(folder), "--epochs", 5, "--out", folder / "intervals")
    assert saved == [0, 2, 4, 5]


# --------------------------------------------------------------------------------------- on a GPU

@needs_gpu
@needs_triton
def test_gpu_kernel():
    """`check_kernel` on the GPU."""
    check_kernel(CUDA)


@needs_gpu
@each("dtype", [torch.float32, BF16])
def test_gpu_loader(dtype):
    """Batches are those of the CPU bit for bit; 100 batches a launch of the kernel."""
    loaders = [make_loader(3, device, dtype, train=500) for device in (CPU, CUDA)]
    ours, theirs = ([*loader.epoch(1, 1)] for loader in loaders)
    assert with_bytes(ours) == with_bytes(theirs) and len(theirs) == 166
    ours, theirs = ([torch.cat(parts) for parts in zip(*loader.test())] for loader in loaders)
    assert with_bytes(ours) == with_bytes(theirs)             # of batches of another size


@needs_gpu
@each("optimizer", ["muon", "sgd"])
def test_gpu_graph_is_eager(monkeypatch, optimizer):
    """Eight steps at eight rates on eight batches, three as they are, five by the graph.

    In bf16, as runs are; in float32 not even two series of steps launched by Python are equal.
    """
    monkeypatch.setattr(model, "precision", lambda device: BF16)
    results = []
    for function in (train.as_graph, lambda step: step):
        monkeypatch.setattr(train, "as_graph", function)
        net, losses = model.make_model(CUDA), []
        muon_or_sgd = model.make_optimizer(net, optimizer)
        step = train.make_step(net, muon_or_sgd, model.make_scaler(CUDA))
        schedule = onecycle.OneCycle(muon_or_sgd, 8, 3, 0.1)
        for k, (x, y) in enumerate(random_batches(8)):
            schedule.set(k)
            x = x.to(CUDA, BF16).contiguous(memory_format=torch.channels_last)
            losses.append(step(x, y.to(CUDA))[0].item())
        results.append((losses, with_bytes([*net.parameters()])))
    assert len(set(losses)) == 8 and results[0] == results[1]


@needs_gpu
@each("optimizer", ["muon", "sgd"])
def test_gpu_fp16(monkeypatch, optimizer):
    """Where bf16 is emulated, as on a T4: scaled steps without a graph, and the loss falls."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    net = model.make_model(CUDA)
    optimizer, scaler = model.make_optimizer(net, optimizer, 0.02), model.make_scaler(CUDA)
    step, (inputs, labels) = train.make_step(net, optimizer, scaler), random_batches(1)[0]
    inputs, labels = inputs.to(CUDA, torch.float16), labels.to(CUDA)
    losses = [step(inputs, labels)[0].item() for _ in range(40)]
    assert scaler.is_enabled() and losses[-1] < losses[0] / 2
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in net.parameters())


AS_IT_IS = "import test_all, train; test_all.quick(dtype=None); train.main()"


@needs_gpu
def test_gpu_resume(folder):
    """Killed and gone on with, against the uninterrupted run, bit for bit; graphs and all."""
    whole, killed = folder / "whole on a gpu", folder / "killed on a gpu"
    kill(*options(folder), "--out", killed, quick="dtype=None")
    for arguments in ((*options(folder), "--out", whole), ("--resume", killed)):
        assert "device    cpu" not in python(AS_IT_IS, *arguments)
    assert outcome(killed) == outcome(whole)


@needs_gpu
def test_gpu_run_moves_to_the_cpu(folder):
    """Begun on a GPU, killed, and gone on with where no GPU is to be seen."""
    out = folder / "gpu"
    kill(*options(folder), "--out", out, quick="dtype=None")
    text = python(AS_IT_IS, "--resume", out, CUDA_VISIBLE_DEVICES="")
    gpu, cpu = (train.read_checkpoint(run / "checkpoint.pt") for run in (out, folder / "whole"))
    assert "device    cpu" in text and len(gpu["history"]) == 3
    assert all(w.isfinite().all() for w in gpu["average"].values())
    assert gpu["history"][0]["loss"] == pytest.approx(cpu["history"][0]["loss"], rel=0.05)


# ------------------------------------------------------------------------- what the pages claim

def blocks(page):
    return re.findall(r"```python\n(.*?)```", (HERE / page).read_text(), re.DOTALL)


def test_tables_are_of_the_rows():
    """Each table between markers is what the rows give, so that no figure is copied by hand."""
    for page in tables.PAGES:
        assert page.read_text() == tables.filled(page, experiments.read())


def test_tables_tune_two_constants():
    """A schedule at its best: its best LRMAX and weight decay, of runs that differ in no more."""
    kind = {"optimizer": "sgd", "schedule": "one cycle", "epochs": 12}
    rows = [{"arm": {**kind, **arm}, "seed": seed, "width": 32, "images": 12500,
             "held out": {"averaged": accuracy}}
            for arm, accuracy in (({"lr": 0.4}, 0.8), ({"lr": 0.8, "weight_decay": 1e-3}, 0.9),
                                  ({"lr": 0.8, "end": 0.0}, 0.95), ({"lr": 0.2, "end": 0.0}, 0.99))
            for seed in (0, 1)]
    assert tables.best_rows(rows, "one cycle", 12) == rows[2:4]


def test_readme_loop_is_train():
    """Word for word the file's."""
    loops = [block for block in blocks("README.md") if "loader" in block and "import" not in block]
    assert len(loops) == 1 and all(loop in Path(train.__file__).read_text() for loop in loops)


def test_readme_snippet(tmp_path, monkeypatch):
    """It runs as it stands, and learns: ten classes by chance have a loss of ln 10."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (snippet,) = (block for block in blocks("README.md") if "OneCycle(" in block)
    names = {}
    exec(snippet, names)
    assert names["loss"](names["batch"]) < 0.7 * math.log(10)
    assert Path("lr_range.png").stat().st_size > 5000


def test_readme_links():
    """Every file and heading that a page links to is there."""
    for page in ("README.md", "docs/measurements.md", "docs/your-own.md"):
        folder = (HERE / page).parent
        for target in re.findall(r"\]\(([^)]*)\)", (HERE / page).read_text()):
            if not target.startswith("http"):
                path, _, anchor = target.partition("#")
                path = folder / path if path else HERE / page
                headings = re.findall(r"^#+ (.*)", path.read_text(), re.M) if anchor else []
                anchors = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert path.exists() and (not anchor or anchor in anchors), target


@each("schedule, first, middle, last", [
    ("one cycle", 0.1, 0.668, 0.1), ("annihilated", 0.1, 0.632, 0), ("no rise", 1, 0.55, 0.1),
    ("warm-up", 0.1, 0.57, 0.1),
    ("linear", 1, 0.5, 0), ("cosine", 1, 0.5, 0), ("constant", 1, 1, 1), ("steps", 1, 0.1, 0.01)])
def test_schedules_of_the_experiments(schedule, first, middle, last):
    """Their rates at the start, in the middle and at the end, as shares of LRMAX."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1)
    ours = experiments.Schedule(optimizer, 49, {**experiments.RECIPE, "lr": 2.0,
                                                "schedule": schedule})
    assert [ours.set(k) / 2 for k in (0, 24, 48)] == pytest.approx([first, middle, last], abs=1e-3)


def test_lesson(monkeypatch):
    """The lesson's cells run in order, on a few drawn shapes; both cycles end at a tenth."""
    monkeypatch.chdir(HERE / "docs")                     # where Jupyter runs it
    monkeypatch.setattr(sys, "path", [*sys.path])        # the lesson adds the project's folder
    monkeypatch.setattr(data, "load", lambda source: data.synthetic(256, 64))
    cells = json.loads(Path("lesson.ipynb").read_text(encoding="utf-8"))["cells"]
    names, limit = {}, SimpleNamespace(lr=0.01, lr_max=0.03)     # so few shapes show no limit
    with matplotlib.rc_context({"backend": "Agg"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*non-interactive")               # of plt.show()
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
                names.update(BATCH=16, EPOCHS=2, WIDTH=4, limit=names.get("limit") or limit)
    rates = [names[run][-1]["lr"] / names["lr_max"] for run in ("right", "wrong")]
    assert rates == pytest.approx([0.1, 1]) and len(names["right"]) == 2
