"""What the project claims, compared with something that it did not write itself: torch's
OneCycleLR, Muon and SGD, torchvision's transforms, the singular value decomposition,
the published numbers of SplitMix64, and closed forms.

    pytest test_all.py              all of it; with -k kernel, the tests with that word in the name

Where a run has to equal another one (same seed; cut off and resumed), it is compared with itself.
Runs go through the command line, in `quick` circumstances. GPU tests skip where there is none; the
Triton kernel runs in Triton's interpreter too, and is compiled for four generations of GPUs.
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
import shutil
import socket
import subprocess
import sys
import tarfile
from hashlib import md5
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as T
from matplotlib.figure import Figure
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.datasets import CIFAR10

import data
import lrfinder
import model
import onecycle
import train
from lrfinder import Curve, NotFound, range_test, smooth, suggest

HERE = Path(__file__).parent
CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
CIFAR10.url = "file:///nowhere/cifar-10-python.tar.gz"             # nothing is downloaded
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(data.triton is None, reason="needs Triton, which is for Linux")
each = pytest.mark.parametrize


def quick(patch=setattr, dtype=torch.float32):
    """Networks of 8 channels; unless dtype is None on the CPU, where bits come out the same."""
    load = data.load
    for module in (data, train):
        patch(module, "load", lambda *arguments: load(*arguments)._replace(width=8))
    for module in (model, train) if dtype else ():
        patch(module, "pick_device", lambda: CPU)
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


def succeed(*arguments, **options):
    """A command that has to; its stdout."""
    status, out, err = command(*arguments, **options)
    assert status == 0, err
    return out


def with_bytes(tree):
    """Nested dicts and lists with each tensor and array as bytes, so that == compares."""
    def convert(leaf):
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not torch.is_tensor(leaf):
            return leaf
        return leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tree_map(convert, tree)


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


# ------------------------------------------------------------------------------- model, precision

def test_model_table(capsys):
    """Shapes, parameters and multiply-accumulates, as the specification has them."""
    model.main()
    assert capsys.readouterr().out.replace(" x ", "x").split()[4:] == """
        prep    64x32x32       1,856    1,769,472
        layer1 128x16x16     369,408  150,994,944
        layer2  256x8x8      295,424   75,497,472
        layer3  512x4x4    5,901,312  150,994,944
        pool    512x1x1            0            0
        fc           10        5,130        5,120
        all                6,573,130  379,261,952""".split()


def test_model_computes():
    """The specification, written a second time with torch's functions; channels last in memory."""
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


@each("device, native, dtype", [("cuda", True, BF16), ("cuda", False, torch.float16),
                                ("cpu", True, BF16), ("cpu", False, torch.float32),
                                ("mps", True, torch.float32)])
def test_precision(monkeypatch, device, native, dtype):
    """A T4 emulates bf16 and gets fp16, scaled and not fused; a CPU without gets float32."""
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
    monkeypatch.setattr(model, "Muon", lambda *arguments, **options: seen.update(options))
    model.make_optimizer(SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=device)])))
    assert seen["fused"] == (device.type == "cuda" and native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device.type == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device.type != "cpu")
    assert model.pick_device() == device


# ------------------------------------------------------------------------------------------- Muon

def test_model_recipe():
    """Nesterov momentum 0.6 and a decay of 1e-3, in every group."""
    for group in model.make_optimizer(model.make_model(CPU, width=8)).param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.6, 1e-3, True)


def orthogonal_by_svd(matrix):
    """What three iterations do to singular values that are shares of the matrix's length."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@each("shape", [(64, 27), (27, 64), (40, 40)])
def test_muon_orthogonal(shape):
    matrix = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.orthogonal(matrix), orthogonal_by_svd(matrix),
                               rtol=1e-4, atol=1e-5)
    assert torch.equal(model.orthogonal(0 * matrix), 0 * matrix)                   # not 0 / 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@each("sign", [1, -1])
def test_muon_is_torchs(monkeypatch, sign):
    """What is no convolution, as torch's SGD; torch's Muon leaves the length to weight decay."""
    monkeypatch.setattr(model, "precision", lambda device: BF16)                     # as there
    net = nn.ModuleDict({"conv": nn.Conv2d(16, 24, 3, bias=False), "fc": nn.Linear(7, 5)})
    other = copy.deepcopy(net.to(memory_format=torch.channels_last))
    conv, matrix = net["conv"].weight, nn.Parameter(other["conv"].weight.detach().flatten(1))
    ours = model.Muon(net.parameters(), 0.1, 0.6, 1e-3, maximize=sign < 0)
    muon = torch.optim.Muon([matrix], 0.1, weight_decay=0, momentum=0.6, ns_steps=3)
    sgd = torch.optim.SGD(other["fc"].parameters(), 0.1, 0.6, nesterov=True, weight_decay=1e-3,
                          maximize=sign < 0)
    for k in range(4):
        for w, same in zip(net.parameters(), other.parameters()):
            w.grad = torch.randn_like(w)
            same.grad = w.grad.clone()
        matrix.grad = sign * conv.grad.flatten(1)
        matrix.data *= 24 ** 0.5 / torch.linalg.matrix_norm(matrix.data)
        before = matrix.detach().clone()
        for optimizer in (ours, muon, sgd):
            optimizer.step()
        step, difference = matrix - before, conv.flatten(1) - matrix
        assert difference.norm() < 0.02 * (k + 1) * step.norm()           # bf16, rounded elsewhere
        assert all(map(torch.equal, net["fc"].parameters(), other["fc"].parameters()))


def test_muon_rounding(monkeypatch):
    """The direction is bf16, all else float32: a rate that is a tensor is not rounded to bf16."""
    monkeypatch.setattr(model, "precision", lambda device: BF16)
    conv, rate = nn.Parameter(torch.randn(24, 16, 3, 3)), torch.tensor(0.1234567)
    w, gradient = conv.detach().clone(), torch.randn_like(conv)

    def closure():
        loss = (conv * gradient).sum()
        loss.backward()
        return loss

    assert model.Muon([conv], rate, 0.6, 0).step(closure) == (w * gradient).sum()
    direction = model.orthogonal((gradient * 1.6).flatten(1), BF16).view_as(w)
    expected = w * (24 ** 0.5 / w.norm()) - direction.float() * rate
    torch.testing.assert_close(conv.detach(), expected, rtol=0, atol=1e-6)


def small_net():
    """A convolution, channels_last, and a fully connected layer; the same every time."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": nn.Conv2d(16, 24, 3, bias=False), "fc": nn.Linear(7, 5)})
    return net.to(memory_format=torch.channels_last)


def test_muon_zero_closure_groups():
    """A convolution that starts at zero stays finite; step(closure); groups added later."""
    net, late = small_net(), small_net()
    net["conv"].weight.data.zero_()
    optimizer = model.Muon([net["conv"].weight], 0.1, 0.6, 0)
    optimizer.add_param_group({"params": net["fc"].parameters(), "lr": 0.01})
    optimizer.add_param_group({"params": late["conv"].weight, "orthogonal": True})
    unused = nn.Parameter(torch.ones(2, 2, 3, 3))                     # without a gradient
    optimizer.add_param_group({"params": unused, "orthogonal": True})
    x, bias = torch.ones(1, 16, 5, 5), net["fc"].bias.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = (net["conv"](x) + late["conv"](x)).mean() + net["fc"](torch.ones(7)).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] > losses[1] > losses[2] and torch.equal(unused, torch.ones_like(unused))
    assert 0.1 < net["conv"].weight.norm() < 9 and len(optimizer.param_groups) == 4
    assert late["conv"].weight.norm().item() == pytest.approx(24 ** 0.5, rel=0.1)
    # SGD's, at its own rate: the gradient is 1, so v = 1, 1.6, 1.96
    moved = 0.01 * sum(1 + 0.6 * v for v in (1, 1.6, 1.96))
    torch.testing.assert_close(bias - net["fc"].bias, torch.full((5,), moved))


# ----------------------------------------------------------------------------------- the schedule

@each("final", [1, 1e4])
@each("total, peak", [(2328, 485), (97, 1), (100, 98), (11, 5)])
def test_schedule_is_torchs(total, peak, final):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=total, pct_start=(peak + 1) / total,
        anneal_strategy="linear", cycle_momentum=False, div_factor=10, final_div_factor=final)
    for step in range(total):
        ours = onecycle.one_cycle(step, total, peak, 0.4, None if final == 1 else 0.04 / final)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        if step < total - 1:
            oracle.step()


@each("total, peak", [(1, 0), (2, 0), (2, 1), (5, 0), (5, 4)])
def test_schedule_edges(total, peak):
    """A peak at either end, the shortest runs; annihilation ends at 0; no step outside the run."""
    lrs, ends = ([onecycle.one_cycle(k, total, peak, 10, end) for k in range(total)]
                 for end in (None, 0))
    assert lrs[peak] == ends[peak] == 10 and all(lrs[k] == 1 for k in {0, total - 1} - {peak})
    assert peak == total - 1 or ends[-1] == 0
    for step, top in ((total, peak), (-1, peak), (0, total), (0, -1)):
        with pytest.raises(ValueError):
            onecycle.one_cycle(step, total, top, 10)


def test_schedule_groups():
    """Groups keep their ratio in any order of steps; a tensor, which a graph reads, is filled."""
    weights, rates = [nn.Parameter(torch.zeros(1)) for _ in range(3)], [1, torch.tensor(2.0), 0.5]
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, rates)])
    schedule = onecycle.OneCycle(optimizer, total=50, peak=10, lr_max=0.4, lr_end=0)
    for step in (30, 10, 49, 0, 30):
        expected = onecycle.one_cycle(step, 50, 10, 0.4, 0)
        assert schedule.set(step) == schedule.at(step) == expected
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs[1] is rates[1] and lrs[1].item() == pytest.approx(expected)
        assert (lrs[0], lrs[2]) == (expected / 2, expected / 4)


def test_schedule_picture():
    """The points that it names lie on the curve."""
    ax = Figure().subplots()
    onecycle.plot(ax, 2328, 485)
    curve = ax.lines[0].get_ydata()
    points = [tuple(line.get_xydata()[0]) for line in ax.lines[2:]]
    assert points == [(k, curve[k]) for k in (0, 485, 2327)]


# --------------------------------------------------------------------------------- random numbers

@each("seed, stream", [(0, 0), (1, 0), (5, 7), (2**31 - 1, 2**32 - 1)])     # (1, 0): sign bit set
def test_random_numbers(seed, stream):
    """Those of SplitMix64, of which five are published for the seed 1234567; less the sign."""
    steps = torch.arange(1, 6) * (data.GAMMA - 2**64)
    assert [z % 2**64 for z in data.mix(1234567 + steps).tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821]
    numbers = data.mix(data.mix(torch.tensor(seed * 2**32 + stream)) + steps)
    assert data.random_numbers(5, seed, stream).tolist() == [z % 2**63 for z in numbers.tolist()]


def test_draws_are_uniform():
    """Chi-square of every two columns together, so of each: the image and its place in tenths."""
    columns = []
    for epoch in range(10):
        draws = data.draw_epoch(10_000, 0, epoch).long()
        assert draws[:, data.INDEX].unique().tolist() == list(range(10_000))       # each once
        tenths = torch.stack([torch.arange(10_000), draws[:, data.INDEX]]) // 1000
        columns.append(torch.cat([tenths, draws[:, 1:].T]))
        rises = draws[1:, data.INDEX] > draws[:-1, data.INDEX]            # no ties in file order
        assert abs(rises.sum() - 5000) < 200
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


# ----------------------------------------------------------------------- augmentation, the kernel

MEAN, INVERSE_STD = torch.tensor([125.3, 123.0, 113.9]), 1 / torch.tensor([63.0, 62.1, 66.7])
PICTURES = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (11, 32, 32, 3), np.uint8))


def every_draw():
    """All 81 offsets x both flips, the cutout's centre walking over every row and column."""
    rows = [[k % 11, k // 2 // 9, k // 2 % 9, k % 2, k % 32, 31 - (k * 7) % 32] for k in range(162)]
    corners = [[0, 4, 4, 0, y, x] for y in (0, 3, 4, 28, 31) for x in (0, 3, 4, 28, 31)]
    return torch.tensor(rows + corners, dtype=torch.int32)                # 187: an odd batch


def test_augment_is_torchvisions():
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
    """The kernel's results are the reference's on the CPU, bit for bit."""
    for dtype in (torch.float32, torch.float16, BF16):
        for draws in (every_draw(), every_draw()[5:6]):
            inputs = PICTURES, draws, MEAN, INVERSE_STD
            reference = data.augment(*inputs, dtype)
            ours = data.fused_augment(*(tensor.to(device) for tensor in inputs), dtype).cpu()
            assert ours.shape == reference.shape and ours.dtype == dtype
            assert ours.is_contiguous(memory_format=torch.channels_last)
            if dtype == BF16 and device == CPU:
                # Triton's interpreter may cut float32 off to bf16 where hardware rounds to nearest.
                bits = [x.contiguous().view(torch.int16).int() for x in (ours, reference)]
                assert (bits[0] - bits[1]).abs().max() <= 1
            else:
                assert with_bytes(ours) == with_bytes(reference)          # -0.0 is not 0.0


@needs_triton
def test_kernel_interpreted():
    python("import test_all; test_all.check_kernel(test_all.CPU)", TRITON_INTERPRET="1")


@needs_gpu
@needs_triton
def test_gpu_kernel():
    check_kernel(CUDA)


def test_kernel_refused(capsys):
    """Where it cannot run, plain torch is picked, and says why."""
    assert data.pick_augment(torch.device("cuda:77"), torch.float16) is data.augment
    assert "plain torch" in capsys.readouterr().err


@needs_triton
def test_kernel_compiles(tmp_path):
    """For four generations of GPUs, without one: Turing, Ampere, Hopper, Blackwell."""
    python("""
import triton, data
from triton.backends.compiler import GPUTarget
sizes = {"SIZE": 32, "PAD": 4, "CUT": 8}
for capability in (75, 80, 90, 100):
    for out in ("*fp32", "*fp16", "*bf16"):
        types = {"images": "*u8", "draws": "*i32", "mean": "*fp32", "inverse_std": "*fp32",
                 "out": out, **dict.fromkeys(sizes, "constexpr")}
        source = triton.compiler.ASTSource(data.augment_kernel, types, constexprs=sizes)
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
        assert binary[:4] == bytes([127]) + b"ELF"
""", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), HOME="/nowhere")


def make_loader(batch_size=4, device=CPU, dtype=torch.float32, train=11):
    """Of PICTURES, over and over; labels are their numbers; the 7 test images are lighter."""
    images = [PICTURES[torch.arange(n) % 11].numpy() for n in (train, 7)]
    pictures = data.make_dataset("pictures", (images[0], np.arange(train), 128 + images[1] // 2,
                                              np.arange(7)), batch_size=batch_size)
    return data.Loader(pictures, batch_size, dtype, device)


def test_loader():
    """An epoch is the table's; the test set is in order, with the training set's deviation."""
    loader, draws = make_loader(), data.draw_epoch(11, 5, 3)[:8]
    inputs, labels = (torch.cat(parts) for parts in zip(*loader.epoch(seed=5, epoch=3)))
    assert len(loader) == 2 and labels.tolist() == draws[:, data.INDEX].tolist()
    constants = data.normalisation(PICTURES)
    assert torch.equal(inputs, data.augment(PICTURES, draws, *constants, torch.float32))
    inputs, labels = zip(*loader.test())
    assert [len(x) for x in inputs] == [4, 3] and torch.cat(labels).tolist() == list(range(7))
    mean, std = (f(PICTURES.numpy(), (0, 1, 2)) for f in (np.mean, np.std))
    expected = torch.from_numpy((128 + PICTURES[:7].numpy() // 2 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(torch.cat(inputs), expected.float())
    assert data.normalisation(0 * PICTURES)[1].isfinite().all()           # one colour: no 1 / 0


# ---------------------------------------------------------------------------------- the data sets

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
    {"train_images": np.asfortranarray(ARRAYS["train_images"])}], ids=" ".join)
def test_npz(tmp_path, changes):
    """Labels of any integer type, in a column too; images of any order in memory."""
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


BAD_FILES = {                                      # the .npz's changes, or its bytes
    "empty": b"", "text": b"not an npz\n" * 50, "a key missing": {"test_labels": None},
    "channels first": {"train_images": np.zeros((64, 3, 32, 32), np.uint8)},
    "float": {"train_images": np.zeros((64, 32, 32, 3), np.float32)},
    "grey": {"test_images": np.zeros((48, 32, 32), np.uint8)},
    "no images": {"test_images": np.zeros((0, 32, 32, 3), np.uint8)},
    "too few labels": {"train_labels": LABELS[:-1]}, "half labels": {"train_labels": LABELS / 2},
    "negative labels": {"train_labels": LABELS - 1},
    "too large labels": {"test_labels": [10_000] * 48},
    "pickled": {"train_labels": np.array([Bomb()] * 64)}, "nothing": None}


@each("name", BAD_FILES)
def test_npz_refused(tmp_path, name):
    bad, path = BAD_FILES[name], tmp_path / "bad.npz"
    if isinstance(bad, bytes):
        path.write_bytes(bad)
    elif bad:
        np.savez(path, **{k: v for k, v in {**ARRAYS, **bad}.items() if v is not None})
    with pytest.raises((OSError, ValueError), match="bad.npz"):
        data.load(path)
    status, _, err = command("--data", path, "--out", tmp_path / "out")
    assert status == 1 and "bad.npz" in err and not (tmp_path / "out").exists()


def test_shapes():
    """The same every time, and balanced."""
    shapes = data.load("synthetic")
    assert with_bytes([*shapes]) == with_bytes([*data.synthetic()]) and not shapes.real
    assert shapes.train_images.shape == (2560, 32, 32, 3) and len(shapes.classes) == 10
    assert shapes.test_labels.bincount().tolist() == [100] * 10
    corner = shapes.train_images[:, 0, :6].float()                       # noise alone
    assert corner.diff(dim=1).std().item() / 2**0.5 == pytest.approx(30, rel=0.1)


@each("main, words, picture", [(onecycle.main, "485: 1.00", "schedule.png"),
                               (data.main, "128 images", "augmented.png")])
def test_mains(tmp_path, monkeypatch, main, words, picture):
    """Each draws its picture; data.py measures an epoch of whole batches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cifar10_on_disk(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(data.Dataset.__new__, "__defaults__", (64, 8, 1, True))
    assert words in " ".join(succeed(main=main).split())
    assert Path(picture).stat().st_size > 5000


def test_augmented_picture():
    """Padded around the stored image, cropped one row down and eight to the right, flipped."""
    own = data.make_dataset("own", [*ARRAYS.values()])
    axes = data.plot(own, 2).axes[::2]                                   # of the first image
    stored, padded, cropped, flipped = (np.asarray(ax.images[0].get_array()) for ax in axes[:4])
    assert np.array_equal(stored, own.train_images[0])
    assert np.array_equal(padded[4:36, 4:36], stored)
    assert np.array_equal(cropped, padded[1:33, 8:40]) and np.array_equal(flipped, cropped[:, ::-1])


# ------------------------------------------------------------------------- a step, and an epoch

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
        optimizer = model.make_optimizer(net, 0.01)
        # Without a factor, gradients would be too small to overflow.
        step = train.make_step(net, optimizer, scaler, lambda *a: 1e6 * F.nll_loss(*a))
        assert all(0 <= step(*batch)[1] <= 6 for batch in random_batches(4))
        results.append(with_bytes([*net.parameters()]))
    assert results[0] == results[1] != results[2]
    assert scaler.get_scale() == 2.0**123                     # halved by each of four overflows
    assert with_bytes([*model.make_model(CPU, width=8).parameters()]) == results[2]
    train.save_run(tmp_path, {}, [], net, net, optimizer, scaler)
    again = torch.amp.GradScaler("cpu")
    train.restore(train.read_checkpoint(tmp_path), net, net, optimizer, again)
    assert again.state_dict() == scaler.state_dict()          # a resumed run goes on with its scale


def test_step_of_a_graph(monkeypatch):
    """It is recorded once, with a stream of its own; then its memory is filled: a stand-in's."""
    calls, streams = [], []

    def double(x):
        calls.append((x, 2 * x))
        return [calls[-1][1]]

    graph = SimpleNamespace(replay=lambda: calls[3][1].copy_(2 * calls[3][0]))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "own")
    monkeypatch.setattr(torch.cuda, "graph",
                        lambda graph, stream: contextlib.nullcontext(streams.append(stream)))
    replay, batches = train.as_graph(double), [torch.full((2,), float(k)) for k in range(6)]
    assert [replay(batch)[0].tolist() for batch in batches] == [[2 * k] * 2 for k in range(6)]
    assert [batch.tolist() for batch in batches] == [[k, k] for k in range(6)]
    assert len(calls) == 4 and streams == ["own"]


@each("scaled, fused", [(False, True), (True, True), (False, False)])
def test_step_rates(monkeypatch, scaled, fused):
    """A graph reads rates from tensors; none with a scaler, nor for an optimizer that asks."""
    monkeypatch.setattr(train, "as_graph", lambda step: "graph")
    monkeypatch.setattr(torch, "tensor", lambda value, device: (value, device))
    net = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=CUDA)]))
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.2}], defaults={"fused": fused})
    step = train.make_step(net, optimizer, SimpleNamespace(is_enabled=lambda: scaled))
    rates = [group["lr"] for group in optimizer.param_groups]
    graph = fused and not scaled
    assert (step == "graph") == graph and rates == ([(0.1, CUDA), (0.2, CUDA)] if graph
                                                    else [0.1, 0.2])


@each("step, d", [(0, 0.1), (2, 0.25), (889, 890 / 899), (5000, 0.99)])
def test_average(step, d):
    """The docstring's d, which is short at the start and 0.99 in the end."""
    average, net = nn.Linear(9, 9), nn.Linear(9, 9)
    expected = d * average.weight + (1 - d) * net.weight
    train.update_average(average, net, step)
    torch.testing.assert_close(average.weight, expected)


def test_average_statistics(monkeypatch):
    """The mean over five of eight batches of each one's mean and variance, of their own weights."""
    quick(monkeypatch.setattr)
    monkeypatch.setattr(train, "SAMPLE", 18)
    net, loader = model.make_model(CPU, width=8), make_loader(4, train=33)
    convolution, bn, _ = net.prep
    bn.running_mean += 5                                      # is forgotten
    train.measure_statistics(net, loader, 3, 2)
    outputs = torch.stack([convolution(x).detach() for x, _ in loader.epoch(3, 2)][:5])
    torch.testing.assert_close(bn.running_mean, outputs.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(bn.running_var, outputs.var((1, 3, 4)).mean(0))


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


# -------------------------------------------------------------------------------------- whole runs

def options(folder):
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
    content = train.read_checkpoint(run)
    for row in content["history"]:
        del row["seconds"], row["speed"]
    content["result"] = torch.load(run / "model.pt", weights_only=True)["weights"]
    return with_bytes(content)


@each("real", [True, False])
def test_run_on(tmp_path, monkeypatch, real):
    """From the command to the results; what is not CIFAR-10 says so; the time-out is put back."""
    seen = []
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 77)
    monkeypatch.setattr(socket, "setdefaulttimeout", seen.append)
    if real:
        cifar10_on_disk(tmp_path, monkeypatch)
    monkeypatch.setattr(data, "synthetic", functools.partial(data.synthetic, 320, 100))
    status, out, err = command("--data-dir", tmp_path, "--epochs", 1, "--batch-size", 32,
                               "--lr-max", 0.1, "--out", tmp_path)
    assert status == 0 and (real or seen[-1] == 77), err
    assert [("NOT CIFAR-10" in text) for text in (out, err)] == [not real] * 2
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved["classes"][0] == ("airplane" if real else "disc") and saved["width"] == 8
    for name in ("history.json", "checkpoint.pt", "curves.png", "mistakes.png"):
        assert (tmp_path / name).stat().st_size > 100


def test_run_seed(folder):
    """The same seed gives the same run bit for bit, another seed another; so does --runs."""
    out = succeed(*options(folder), "--runs", 2, "--out", folder / "several")
    first, second = (outcome(folder / "several" / f"seed{seed}") for seed in (0, 1))
    assert first == outcome(folder / "whole") and first["result"] != second["result"]
    results = [run["history"][-1]["averaged"] for run in (first, second)]
    assert f"{np.mean(results):.2%} +- {np.std(results, ddof=1):.2%}" in out
    succeed(*options(folder), "--seed", 1, "--out", folder / "seed1")
    assert outcome(folder / "seed1") == second


def test_run_is_the_recipe(folder, monkeypatch):
    """Muon, SGD and average by hand, 12 steps: rates, losses, accuracies, weights, statistics."""
    quick(monkeypatch.setattr)
    own, net, history = data.load(folder / "own.npz"), model.make_model(CPU, 3, width=8), []
    loader = data.Loader(own, 16, torch.float32, CPU)
    # Small rates, so that rounding grows slowly; the peak is at 5/24 of 12 steps, rounded.
    lrs = [*np.linspace(1e-4, 1e-3, 3), *np.linspace(1e-3, 1e-4, 10)[1:]]
    velocity = [torch.zeros_like(w) for w in net.parameters()]
    average = [w.detach().clone() for w in net.parameters()]
    for epoch in range(3):
        losses, right = [], 0
        net.train()
        for k, (x, y) in enumerate(loader.epoch(3, epoch), 4 * epoch):
            log_p, lr, d = net(x), lrs[k], min(0.99, (1 + k) / (10 + k))
            loss = -log_p[range(16), y].mean()                            # cross-entropy
            gradients = torch.autograd.grad(loss, [*net.parameters()])
            with torch.no_grad():
                for w, v, g, a in zip(net.parameters(), velocity, gradients, average):
                    if w.dim() == 4:              # a convolution's: a matrix, a row a filter
                        v.mul_(0.6).add_(g)
                        w *= len(w) ** 0.5 / w.square().sum().sqrt()
                        w -= lr * orthogonal_by_svd((g + 0.6 * v).flatten(1)).view_as(w)
                    else:
                        v.mul_(0.6).add_(g + 1e-3 * w)
                        w -= lr * (g + 1e-3 * w + 0.6 * v)
                    a.copy_(d * a + (1 - d) * w)
            losses.append(loss.item())
            right += (log_p.argmax(1) == y).sum().item()
        net.eval()
        tested = torch.cat([net(x).argmax(1) for x, _ in loader.test()]) == own.test_labels
        history.append((lr, np.mean(losses), right / 64, tested.float().mean().item()))
    out = folder / "by hand"
    succeed(*options(folder), "--lr-max", 1e-3, "--seed", 3, "--out", out)
    run = train.read_checkpoint(out)
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
    succeed("-h")
    monkeypatch.setattr(train, "update_average", lambda average, net, step: steps.append(step))
    monkeypatch.setattr(train, "finish", lambda *arguments: None)
    succeed("--data", folder / "own.npz", "--lr-max", 1, "--out", folder / "all")
    run = train.read_checkpoint(folder / "all")
    lrs = [row["lr"] for row in run["history"]]
    assert (run["settings"]["batch_size"], len(lrs), lrs.index(max(lrs))) == (64, 24, 5)
    assert (lrs[0], lrs[5], lrs[23]) == pytest.approx((0.1, 1, 0.1))
    assert round(24 * 97 * train.PEAK) == 485 and steps == [*range(24)]


def test_run_reports_the_last_epoch(folder, monkeypatch):
    """Never the best one; and the flipped figure apart, as not the result."""
    values, results = iter([0.5, 0.875, 0.25, 0.375, 0.625, 0.125]), []  # raw, averaged of 3 epochs
    monkeypatch.setattr(train, "PEAK", 1)                                # may be the last step, too
    monkeypatch.setattr(train, "accuracy", lambda *_, flip=False: 0.95 if flip else next(values))
    whole_train = train.train
    monkeypatch.setattr(train, "train", lambda *a: results.append(whole_train(*a)) or results[0])
    out = succeed(*options(folder), "--out", folder / "falling")
    assert results == [0.125]
    result, flipped = out[out.index("last epoch"):].split("(not the result")
    assert "12.50%" in result and "62.50%" in result and "95" not in result and "95" in flipped
    saved = torch.load(folder / "falling" / "model.pt", weights_only=True)
    assert saved["last_epoch"]["averaged"] == 0.125 and 0.95 not in saved["last_epoch"].values()


def test_run_saves_what_it_reports(folder):
    """model.pt alone, applied by hand to the test images, gives the figure beside it."""
    saved = torch.load(folder / "whole" / "model.pt", weights_only=True)
    net = model.CustomResNet(len(saved["classes"]), saved["width"]).eval()
    net.load_state_dict(saved["weights"])
    x = ((torch.from_numpy(ARRAYS["test_images"]) - saved["mean"]) * saved["inverse_std"])
    right = net(x.permute(0, 3, 1, 2)).argmax(1).numpy() == ARRAYS["test_labels"]
    assert right.mean() == pytest.approx(saved["last_epoch"]["averaged"])
    history = json.loads((folder / "whole" / "history.json").read_text())["history"]
    assert history[-1] == saved["last_epoch"] and [row["epoch"] for row in history] == [1, 2, 3]


# ------------------------------------------------------------------------------- cut off, resumed

KILLED = """
import sys, test_all, train
test_all.quick({})
train.SAVE_EVERY = 0
train.finish = lambda *arguments: sys.stdin.read()           # it never ends by itself
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


@each("moved", [False, True])
def test_resume_after_sigkill(folder, moved):
    """It ends as the uninterrupted run, bit for bit, even begun on a GPU; then stays as it is."""
    out = folder / f"killed-{moved}"
    kill(*options(folder), "--out", out, OMP_NUM_THREADS=str(torch.get_num_threads()))
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["history"] and not (out / "model.pt").exists()
    if moved:
        for group in checkpoint["optimizer"]["param_groups"]:
            group.update(lr=torch.tensor(group["lr"]), fused=True)
        torch.save(checkpoint, out / "checkpoint.pt")
    for path in (out, out / "checkpoint.pt"):
        assert "last epoch" in succeed("--resume", path, "--data", folder / "own.npz")
        assert outcome(out) == outcome(folder / "whole")


@each("error, status, word", [(KeyboardInterrupt, 130, "--resume"),
                              (torch.OutOfMemoryError, 1, "--batch-size")])
def test_resume_after_exception(folder, monkeypatch, error, status, word):
    out, whole_set, calls = folder / error.__name__, onecycle.OneCycle.set, []

    def fail_once(self, step):
        calls.append(step)
        if len(calls) == 7:
            raise error
        return whole_set(self, step)

    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    monkeypatch.setattr(onecycle.OneCycle, "set", fail_once)
    end, _, err = command(*options(folder), "--out", out)
    assert end == status and word in err and command("--resume", out)[0] == 0
    assert calls == [*range(7), *range(4, 12)] and outcome(out) == outcome(folder / "whole")


def test_checkpoint_intervals(folder, monkeypatch):
    """SAVE_EVERY counts from the last save: by a clock of a second a look, after epochs 2 and 3."""
    clock, saved = itertools.count(), []
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(train, "SAVE_EVERY", 5)
    monkeypatch.setattr(train, "save_run", lambda out, settings, history, *_: saved.append(
        len(history)))
    succeed(*options(folder), "--out", folder / "intervals")
    assert saved == [0, 2, 3]


def test_mistakes(folder, tmp_path, monkeypatch):
    """Five images that are 2 where the network says 1: the surest first; bars are shares right."""
    own, net, figure = data.load_npz(folder / "own.npz"), nn.Module(), Figure()
    own = own._replace(test_labels=torch.tensor([1] * 43 + [2] * 5))
    one = torch.eye(10)[1]
    net.forward = lambda x: (one * (2 + x.mean((1, 2, 3)))[:, None]).log_softmax(1)
    monkeypatch.setattr(train, "new_figure", lambda *size: figure)
    loader = data.Loader(own, 16, torch.float32, CPU)
    train.plot_mistakes(own, net, loader, tmp_path / "mistakes.png")
    (*axes,), (bars,) = (part.axes for part in figure.subfigs)
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    sure = [int(re.fullmatch(r"1 (\d+)%\nis 2", title)[1]) for title in titles]
    assert len(sure) == 5 and sure == sorted(sure, reverse=True)
    assert [bar.get_width() for bar in bars.patches[1:3]] == [100, 0]


def test_checkpoint_damage(tmp_path):
    """With a bit flipped it is an error, or in bytes without meaning the content."""
    content = {name: {"some": torch.arange(50.0)} for name in train.CHECKPOINT}
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
            assert with_bytes(train.read_checkpoint(tmp_path)) == with_bytes(content)
    for bad in (code, whole[:-100], flipped(whole.index(b"\x80\x3f\0\0\0\x40"))):     # in 1., 2.
        path.write_bytes(bad)
        with pytest.raises(SystemExit):
            train.read_checkpoint(tmp_path)


@each("module, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_full_disk(tmp_path, monkeypatch, module, name):
    """It leaves the last whole checkpoint, and nothing else."""
    train.save(tmp_path / "checkpoint.pt", {"epoch": 1})

    def full(content, *arguments):
        if name == "save":
            arguments[0].write(b"half of it")
        raise RuntimeError("write failed") if name == "save" else OSError("no space left")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(SystemExit, match="disk"):
        train.save(tmp_path / "checkpoint.pt", {"epoch": 2})
    assert torch.load(tmp_path / "checkpoint.pt") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@each("words", [                                  # {} is the folder of own.npz and the run `whole`
    "--epochs 0", "--epochs many", "--epochs", "--batch-size 0", "--batch-size 65", "--lr-max 0",
    "--lr-max nan", "--lr-max inf", "--seed -1", "--seed 2147483648", "--runs 0", "--warmup 3",
    "--seed 2147483647 --runs 2", "--out {}/whole", "--out {}/own.npz", "--out {}/own.npz/out",
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
    assert [str(train.make_folder(None)) for _ in range(2)] == ["runs/1", "runs/2"]
    train.make_folder("named/deep")
    for taken in ("named/deep", "runs/1"):
        with pytest.raises(SystemExit, match="resume"):
            train.make_folder(taken)


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
    kept = train.read_checkpoint(out)
    assert len(kept["history"]) == epochs
    assert all(w.isfinite().all() for w in (*kept["net"].values(), *kept["average"].values()))


# --------------------------------------------------------------------------------------- on a GPU

@needs_gpu
@each("dtype", [torch.float32, BF16])
def test_gpu_loader(dtype):
    """Table and batches are those of the CPU bit for bit; 100 batches a launch of the kernel."""
    assert torch.equal(data.draw_epoch(50_000, 3, 2), data.draw_epoch(50_000, 3, 2, CUDA).cpu())
    loaders = [make_loader(3, device, dtype, train=500) for device in (CPU, CUDA)]
    ours, theirs = ([*loader.epoch(1, 1)] for loader in loaders)
    assert with_bytes(ours) == with_bytes(theirs) and len(theirs) == 166
    ours, theirs = ([torch.cat(parts) for parts in zip(*loader.test())] for loader in loaders)
    assert with_bytes(ours) == with_bytes(theirs)             # of batches of another size


@needs_gpu
def test_gpu_graph_is_eager(monkeypatch):
    """Eight steps at eight rates on eight batches, three as they are, five by the graph.

    In bf16, as runs are; in float32 not even two series of steps launched by Python are equal.
    """
    monkeypatch.setattr(model, "precision", lambda device: BF16)
    batches, results = random_batches(8), []
    for function in (train.as_graph, lambda step: step):
        monkeypatch.setattr(train, "as_graph", function)
        net = model.make_model(CUDA)
        optimizer, losses = model.make_optimizer(net), []
        step = train.make_step(net, optimizer, model.make_scaler(CUDA))
        schedule = onecycle.OneCycle(optimizer, 8, 3, 0.1)
        for k, (x, y) in enumerate(batches):
            schedule.set(k)
            x = x.to(CUDA, BF16).contiguous(memory_format=torch.channels_last)
            losses.append(step(x, y.to(CUDA))[0].item())
        results.append((losses, with_bytes([*net.parameters()])))
    assert len(set(losses)) == 8 and results[0] == results[1]


def gpu_run(seed):
    """A network, the function that trains it, its schedule and eight batches."""
    net = model.make_model(CUDA, seed)
    optimizer = model.make_optimizer(net)
    step = train.make_step(net, optimizer, model.make_scaler(CUDA))
    batches = [(x.to(CUDA, BF16).contiguous(memory_format=torch.channels_last), y.to(CUDA))
               for x, y in random_batches(8, seed)]
    return net, step, onecycle.OneCycle(optimizer, 8, 3, 0.1), batches


@needs_gpu
def test_gpu_graphs_overlap(monkeypatch):
    """Two graphs replayed at once on two streams compute what they do one after the other."""
    monkeypatch.setattr(model, "precision", lambda device: BF16)
    results = []
    for overlap in (False, True):
        runs, streams = [gpu_run(0), gpu_run(1)], [torch.cuda.Stream() for _ in range(2)]
        for k in range(80):                                   # three as they are, then recorded
            for (_, step, schedule, batches), stream in zip(runs, streams):
                if k < 8:
                    schedule.set(k)
                if k <= 8 or not overlap:
                    torch.cuda.synchronize()
                with torch.cuda.stream(stream if k >= 8 else torch.cuda.current_stream()):
                    step(*batches[k % 8])
        torch.cuda.synchronize()
        results.append([with_bytes([*net.parameters()]) for net, *_ in runs])
    assert results[0] == results[1] and results[0][0] != results[0][1]


@needs_gpu
def test_gpu_fp16(monkeypatch):
    """Where bf16 is emulated, as on a T4: scaled steps without a graph, and the loss falls."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    net = model.make_model(CUDA)
    optimizer, scaler = model.make_optimizer(net, 0.02), model.make_scaler(CUDA)
    step, (inputs, labels) = train.make_step(net, optimizer, scaler), random_batches(1)[0]
    inputs, labels = inputs.to(CUDA, torch.float16), labels.to(CUDA)
    losses = [step(inputs, labels)[0].item() for _ in range(40)]
    assert scaler.is_enabled() and losses[-1] < losses[0] / 2
    assert all(w.isfinite().all() and w.dtype == torch.float32 for w in net.parameters())


@needs_gpu
def test_gpu_run_moves_to_the_cpu(folder):
    """Begun on a GPU, killed, and gone on with where no GPU is to be seen."""
    out = folder / "gpu"
    kill(*options(folder), "--out", out, quick="dtype=None")
    text = python("import test_all, train; test_all.quick(dtype=None); train.main()", "--resume",
                  out, CUDA_VISIBLE_DEVICES="")
    gpu, cpu = (train.read_checkpoint(run) for run in (out, folder / "whole"))
    assert "device    cpu" in text and len(gpu["history"]) == 3
    assert all(w.isfinite().all() for w in gpu["average"].values())
    assert gpu["history"][0]["loss"] == pytest.approx(cpu["history"][0]["loss"], rel=0.05)


# ----------------------------------------------------------------- the LR range test: the sweep

BATCHES = [(torch.ones(1, 1), None)]


def quadratic(curvatures):
    """A network of weights 1 and its loss: half the sum of curvatures * (w - labels)^2."""
    net, curvatures = nn.Linear(1, len(curvatures), False).double(), torch.tensor(curvatures)
    nn.init.ones_(net.weight)
    return net, lambda w, labels: (curvatures * (w - labels) ** 2).sum() / 2


@each("shape, spaced", [("exponential", np.geomspace), ("linear", np.linspace)])
def test_sweep_closed_form(shape, spaced):
    """Gradient descent: loss_k / loss_0 is the product of (1 - 3 lr_j)^2 over all j < k."""
    (net, loss), lrs = quadratic([3.0]), spaced(1e-3, 0.5, 60)
    curve = range_test(net, torch.optim.SGD(net.parameters()), loss, [(BATCHES[0][0].double(), 0)],
                       lr_start=1e-3, lr_end=0.5, steps=60, shape=shape)
    assert curve.lrs == pytest.approx(lrs, rel=1e-9) and curve[2:] == ("steps", 60)
    factors = np.cumprod((1 - 3 * lrs[:-1]) ** 2)
    assert curve.losses[1:] == pytest.approx(curve.losses[0] * factors, rel=1e-9)


@each("momentum, nesterov", [(0, False), (0.9, False), (0.9, True)])
def test_sweep_stability(momentum, nesterov):
    """Stops past 2/L, 2(1+b)/L, and 2(1+b)/(L(1+2b)) for Nesterov; nearer with more steps."""
    stops, limit = [], 2 * (1 + momentum) / (4 * (1 + 2 * momentum if nesterov else 1))
    for steps in (100, 300, 1000):
        net, loss = quadratic(np.linspace(0.4, 4, 10))
        sgd = torch.optim.SGD(net.parameters(), 1, momentum, nesterov=nesterov)
        noise = 0.02 * torch.randn(steps, 10, generator=torch.Generator().manual_seed(0))
        batches = [(BATCHES[0][0].double(), labels) for labels in noise]
        curve = range_test(net, sgd, loss, batches, lr_start=1e-2, steps=steps)
        assert curve.ended == "rise"
        stops.append(curve.lrs[-1] / limit)
    assert 2.5 > stops[0] > stops[1] > stops[2] > 1


def replay(losses):
    """The range test of a model whose losses are these, as long as they last."""
    net, remaining = nn.Linear(1, 1), iter(losses)
    return range_test(net, torch.optim.SGD(net.parameters()),
                      lambda outputs, _: outputs.sum() * 0 + next(remaining),
                      iter(BATCHES * len(losses)))


GAINED = [3.0] * 10 + np.linspace(3, 1.6, 20).tolist() + [1.6] * 10


@each("losses, ended", [
    (GAINED + [1.6 + 0.45 * 1.4] * 60, "steps"), (GAINED + [1.6 + 0.55 * 1.4] * 60, "rise"),
    ([1.0] * 40 + [3.9] * 60, "steps"), ([1.0] * 40 + [4.1] * 60, "rise"),
    ([1.0] * 20 + [0.91] * 20 + [3.95] * 60, "steps"),
    ([1.0] * 20 + [0.91] * 20 + [4.05] * 60, "rise"),
    ([-1.0, -1.1] * 50, "steps"), ([1.0] * 15 + [math.nan], "not finite"),
    ([1.0] * 15 + [math.inf], "not finite"), ([1.0] * 30, "batches"), ([], "batches")])
def test_sweep_ends(losses, ended):
    """Where half of the gain is lost; without one, at 4 times the start; negative may be normal."""
    curve = replay(losses)
    assert curve.ended == ended and len(curve.lrs) == len(curve.losses)
    assert len(curve.losses) == sum(map(math.isfinite, losses)) or ended == "rise"


def test_sweep_of_noise():
    """20 % of noise alone does not end the sweep, nor give an answer."""
    curves = [replay(np.random.default_rng(seed).normal(1, 0.2, 100)) for seed in range(200)]
    assert [curve.ended for curve in curves].count("steps") >= 195
    assert [place_of_lrmax(curve) for curve in curves].count(None) >= 197


@each("rates, shares", [((0.001, 0.1), (0.01, 1)), ((0.1, 0.05), (1, 0.5)), ((0.0, 0.0), (1, 1))])
def test_sweep_groups(rates, shares):
    """Groups keep their ratio; a rate that is a tensor, the second here, stays that tensor."""
    net, rate, seen = nn.Linear(1, 2), torch.tensor(rates[1]), []
    sgd = torch.optim.SGD([{"params": net.weight, "lr": rates[0]},
                           {"params": net.bias, "lr": rate}], momentum=0.9)

    def loss(outputs, _):
        assert sgd.param_groups[1]["lr"] is rate
        seen.append([float(group["lr"]) for group in sgd.param_groups])
        return outputs.sum()

    curve = range_test(net, sgd, loss, BATCHES, steps=20)
    assert np.allclose(seen, np.outer(curve.lrs, shares)) and not sgd.state
    assert sgd.param_groups[0]["lr"] == rates[0] and rate == torch.tensor(rates[1])


def test_sweep_modes():
    """A frozen layer stays frozen; a model in evaluation mode is trained."""
    net, seen = nn.Sequential(nn.BatchNorm1d(2)), []
    sgd = torch.optim.SGD(net.parameters())
    for part, modes in ((net[0], (True, False)), (net, (True, True))):
        part.eval()
        range_test(net, sgd, lambda outputs, _: seen.append((net.training, net[0].training))
                   or outputs.sum(), [(torch.randn(4, 2), None)], steps=2)
        assert seen[-1] == modes and not net[0].training


@each("error, words, options", [
    (ValueError, "shape", {"shape": "exp"}), (ValueError, "sweep", {"steps": 1}),
    (ValueError, "sweep", {"lr_start": 0}), (ValueError, "sweep", {"lr_start": 20}),
    (ValueError, "LBFGS", {"optimizer": torch.optim.LBFGS}),
    (ValueError, "lazy", {"last": nn.LazyLinear(2)}),
    (TypeError, "pair", {"batches": [{"x": 1, "y": 2}]}), (TypeError, "pair", {"batches": "abc"})])
def test_sweep_refused(error, words, options):
    options = {"batches": BATCHES, "optimizer": torch.optim.SGD, **options}
    net = nn.Sequential(nn.Linear(1, 2), options.pop("last", nn.Identity()))
    optimizer = options.pop("optimizer")(net.parameters(), 0.1)
    before = net[0].weight.clone()
    with pytest.raises(error, match=words):
        range_test(net, optimizer, F.mse_loss, **options)
    assert torch.equal(net[0].weight, before) and optimizer.param_groups[0]["lr"] == 0.1


def test_sweep_of_wrapped_batches():
    """Run as it is printed, on dicts, and compared with the same batches as pairs."""
    net = nn.Linear(2, 3)
    loader = [{"x": torch.randn(4, 2), "mask": None, "y": torch.arange(4) % 3}]
    example = range_test.__doc__.split("Wrap those:\n")[1]
    indent = len(example) - len(example.lstrip())
    names = {"torch": torch, "F": F, "itertools": itertools, "range_test": range_test,
             "loader": loader, "optimizer": torch.optim.SGD(net.parameters(), 0.1)}

    class Net(nn.Module):
        def forward(self, x, mask):
            return net(x)

    names["net"] = Net()
    exec("\n".join(line[indent - 1:] for line in example.splitlines()), names)
    pairs = range_test(net, names["optimizer"], F.cross_entropy,
                       [(batch["x"], batch["y"]) for batch in loader])
    assert names["curve"] == pairs and len(pairs.losses) > 10


class TrainedLoss(nn.BatchNorm1d):
    """A squared error with parameters and buffers, which the optimizer trains too."""

    def forward(self, outputs, targets):
        return F.mse_loss(super().forward(outputs), targets)


@each("make", [lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
               lambda w: torch.optim.Adam(w, torch.tensor(0.01)),
               lambda w: model.Muon(w, 0.1, 0.9, 0.01)], ids=("SGD", "Adam", "Muon"))
@each("ending", ["normal", "divergence", "Ctrl-C", "flag"])
def test_sweep_restores(monkeypatch, make, ending):
    """Everything, bit for bit, and the same objects; if one thing cannot be, all the others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
                        nn.Dropout(0.3).eval(), nn.Linear(8 * 36, 4))
    net.register_buffer("count", torch.zeros(1), persistent=False)
    net.register_forward_pre_hook(lambda *_: setattr(net, "count", net.count + 1))
    loss, scale = TrainedLoss(4), nn.Parameter(torch.ones(1))
    net.register_forward_hook(lambda net, inputs, outputs: outputs + scale)
    optimizer = make([scale, *loss.parameters(), *list(net.parameters())[1:]])    # all but one
    batch = torch.randn(16, 3, 8, 8), torch.randn(16, 4)
    for _ in range(3):                                    # gradients and state, to be kept
        optimizer.zero_grad()
        loss(net(batch[0]), batch[1]).backward()
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    scaler.scale(torch.zeros(1))                          # makes its state

    def state():
        modules = [*net.modules(), *loss.modules()]
        gradients = [w.grad for w in (*net.parameters(), *loss.parameters())]
        lr, states = optimizer.param_groups[0]["lr"], optimizer.state.values()
        return with_bytes([
            [(m.training, m._parameters, m._buffers) for m in modules], gradients, scale,
            [*map(id, (*net.buffers(), *gradients, lr, *states))], optimizer.state_dict(),
            scaler.state_dict(), torch.get_rng_state(), random.getstate(), np.random.get_state()])

    def fail(*arguments):
        raise KeyboardInterrupt

    def batches():
        for k in range(40):
            if k == 20 and ending == "Ctrl-C":
                fail()
            random.random(), np.random.rand(), torch.rand(1)
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


# --------------------------------------------------------------- the LR range test: the reading

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


@each("pieces, place, noise", [
    (FALL_AND_RISE, 59, 0), (WIGGLE, 59, 0.05),
    (((8, 2.3, 2.3), (8, 2.3, 2), (8, 2, 2.4), (36, 2.4, 1.5), (30, 1.5, 2.4)), 59, 0),
    ((*FALL_AND_RISE, (20, 2.4, 1.2), (20, 1.2, 3)), 59, 0),
    (((20, 2.3, 2.3), (25, 2.3, 1.8), (15, 1.8, 1.96), (30, 1.96, 1.5), (30, 1.5, 3)), 89, 0),
    (((20, 2.3, 2.3), (25, 2.3, 1.8), (15, 1.8, 1.99), (30, 1.99, 1.5), (30, 1.5, 3)), 44, 0),
    (((20, 1, 1), (30, 1, 0.88), (30, 0.88, 3)), 49, 0)])
def test_lrmax(pieces, place, noise):
    """The first minimum before a rise of 15 % of the fall (here 13 and 16 %); with noise, too."""
    for seed in range(10 if noise else 1):
        curve = curve_of(*pieces)
        losses = curve.losses + np.random.default_rng(seed).normal(0, noise, len(curve.losses))
        found = suggest(curve._replace(losses=losses.tolist()))
        assert abs(curve.lrs.index(found.lr_max) - place) <= 4
        assert found.lr_min == found.lr_max / 10


def sweep_of_regression(batch, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    matrix = torch.randn(10, 1, generator=generator)
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))

    def batches():
        while True:
            product = (x := torch.randn(batch, 10, generator=generator)) @ matrix
            yield x, scale * (product.sin() + product)

    return range_test(net, torch.optim.Adam(net.parameters()), F.mse_loss, batches())


def test_lrmax_of_small_batches():
    """Batches of 32 find it within a factor of 3 of large ones' in nine cases of ten."""
    large = np.median([suggest(sweep_of_regression(2048, seed)).lr_max for seed in range(5)])
    found = [suggest(sweep_of_regression(32, seed)).lr_max for seed in range(20)]
    assert sum(large / 3 < lr < large * 3 for lr in found) >= 18


@each("place, wild", [(3, [4, 4]), (40, [6]), (40, [6, 6]), (45, [0]), (89, [10]), (40, [1000])])
def test_lrmax_wild_points(place, wild):
    """An early spike, a bad batch in mid-descent, the last point: it does not move."""
    curve = curve_of(*FALL_AND_RISE)
    curve.losses[place:place + len(wild)] = wild
    assert abs(place_of_lrmax(curve) - 59) <= 4 and len(replay(curve.losses * 2).losses) > 70


@each("fall, clear", [(5.5, False), (6.5, True)])
def test_lrmax_clear(monkeypatch, fall, clear):
    """A fall counts from six standard deviations; a window of 7 to either side leaves 3 / 4 / 8."""
    curve = curve_of((20, 4, 4), (40, 4, 3), (30, 3, 7))
    sigma = (4 - min(smooth(curve.losses))) / fall
    monkeypatch.setattr(lrfinder, "noise", lambda losses: sigma / math.sqrt(3 / 4 / 8))
    assert (place_of_lrmax(curve) is not None) == clear


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
    (curve_of((100, 2.3, 2.3)), "never falls"),
    (curve_of((50, 2.3, 2.25), (50, 2.25, 9)), "never falls"),
    (curve_of((20, 1, 1), (30, 1, 0.91), (30, 0.91, 3)), "never falls"),
    (curve_of((40, 0.1, 2.1)), "only rises|never falls"),
    (curve_of((5, 3, 1), (60, 1, 9)), "only rises|never falls"),
    (curve_of((99, 2.3, 1.3), (1, 1.6, 1.6)), "falls to the end.*raise"),
    (curve_of((50, 3, 1), ended="not finite"), "falls to the end.*not finite"),
    (curve_of((30, 3, 1), ended="batches"), "falls to the end.*only 30 of 100 batches"),
    (curve_of((30, 3, 3), ended="batches"), "never falls.*only 30 of 100 batches"),
    (curve_of((3, 3, 1), ended="batches"), "only 3 of 100 batches.*steps"),
    (curve_of((3, 2.3, 1), (4, 1, 3)), "points"), (Curve([], []), "points")])
def test_not_found(curve, words):
    with pytest.raises(NotFound, match=words):
        suggest(curve)


def test_noise_measured():
    """Around any line, and in spite of wild points."""
    losses = np.linspace(9, 1, 2000) + np.random.default_rng(0).normal(0, 0.2, 2000)
    losses[::40] += 50
    assert lrfinder.noise(losses) == pytest.approx(0.2, rel=0.15)


def test_smooth():
    """Single points are dropped; a line stays one, at the ends but for medians of 3."""
    line = np.linspace(3, 1, 83)
    spike = np.where(np.arange(83) == 40, 9, line)
    assert np.allclose(smooth(line)[10:-10], line[10:-10])
    assert np.allclose(smooth(spike), line, atol=0.03)
    # A step: central; 7 points to either side, cos^2: the sharpest slope is 1 / 8, none is beyond.
    step = np.array(smooth([0.0] * 41 + [1.0] * 41))
    assert np.allclose(step + step[::-1], 1) and np.diff(step).max() == pytest.approx(1 / 8)
    assert step[33] == 0 < step[34]


def test_lr_report(tmp_path):
    """The answer in words, though the picture cannot be written."""
    for curve, answer in ((curve_of(*FALL_AND_RISE), "LRMAX 0."), (Curve([], []), "not found")):
        words = lrfinder.report(curve, tmp_path / "missing" / "lr.png")[1]
        assert answer in words and "no picture" in words


@each("found, lr_max", [(SimpleNamespace(lr_max=0.05, lr_min=0.01), 0.05), (None, train.LR_MAX)])
def test_search_is_used(folder, monkeypatch, found, lr_max):
    """A run that searches is the run that is given what the search found, or else LR_MAX."""
    monkeypatch.setattr(lrfinder, "range_test", functools.partial(range_test, steps=15))
    monkeypatch.setattr(lrfinder, "report", lambda *arguments: (found, "words"))
    runs = folder / f"searched{lr_max}", folder / f"given{lr_max}"
    succeed(*options(folder)[:-2], "--out", runs[0])
    succeed(*options(folder)[:-2], "--out", runs[1], "--lr-max", lr_max)
    assert outcome(runs[0]) == outcome(runs[1])
    assert outcome(runs[0])["history"][-1]["lr"] == pytest.approx(lr_max / 10)


def test_search_seed(folder, tmp_path, monkeypatch):
    """Both commands search with the network and the batches of their seed."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def look(net, optimizer, loss, batches, **options):
        seen.append(with_bytes([*next(iter(batches)), net.fc.weight]))
        return Curve([], [])

    monkeypatch.setattr(lrfinder, "range_test", look)
    for seed, main, more in ((3, lrfinder.main, []), (3, train.main, ["--epochs", 1]),
                             (0, train.main, ["--epochs", 1])):
        command("--data", folder / "own.npz", "--seed", seed, *more, main=main)
    assert seen[0] == seen[1] and all(a != b for a, b in zip(seen[1], seen[2]))


def test_search_of_both_commands(folder, tmp_path, monkeypatch):
    """train.py and lrfinder.py find the same on the same images, and draw it."""
    monkeypatch.chdir(tmp_path)
    own = "--data", folder / "own.npz"
    outs = succeed(*own, main=lrfinder.main), succeed(*own, "--epochs", 1, "--out", "run")
    found = [re.search(r"LRMAX ([\d.e-]+)", out)[1] for out in outs]
    lr_max = train.read_checkpoint(tmp_path / "run")["settings"]["lr_max"]
    assert found == [f"{lr_max:.3g}"] * 2
    assert Path("lr_range.png").stat().st_size > 5000 < Path("run/lr_range.png").stat().st_size
