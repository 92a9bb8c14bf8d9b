"""What the project claims, compared with torch's OneCycleLR and AveragedModel, with torchvision's
transforms, with closed forms, or with the same computation written a second time.

    pytest test_all.py

Where a run has to equal another one (same seed, cut off and resumed), it is compared with itself,
and another seed must differ. GPU tests skip where there is no GPU; the Triton kernel then runs
in Triton's interpreter, and is compiled for four generations of GPUs, which needs none.
"""
import contextlib
import copy
import io
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.v2.functional as T
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

import data
import lrfinder
import model
import onecycle
import train

HERE = Path(__file__).parent
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(data.triton is None, reason="needs Triton, which is for Linux")


def python(code, *arguments, **environment):
    """Run code in a fresh interpreter that can import the project; return the finished process."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, text=True,
                          capture_output=True, env={**os.environ, **environment})


# ----------------------------------------------------------------------------------------- model

def test_network_has_the_parameters_and_shapes_of_the_specification():
    net, x = model.CustomResNet(), torch.zeros(2, 3, 32, 32)
    assert sum(p.numel() for p in net.parameters()) == 6_573_130
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))
    shapes = {}
    for name in ("prep", "layer1", "layer2", "layer3", "pool"):
        x = getattr(net, name)(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes == {"prep": (64, 32, 32), "layer1": (128, 16, 16), "layer2": (256, 8, 8),
                      "layer3": (512, 4, 4), "pool": (512, 1, 1)}


def test_network_computes_the_specification_written_a_second_time():
    net = model.make_model(CPU, seed=1).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):          # its start, 1 and 0, would hide mistakes
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data += 0.3 * torch.rand_like(tensor)
    net.fc.weight.data *= 20                            # an untrained network says all but nothing
    w = net.state_dict()
    x = torch.randn(3, 3, 32, 32)

    def block(x, name, pool=False):
        bn = f"{name}.{2 if pool else 1}"
        x = F.conv2d(x, w[f"{name}.0.weight"], padding=1)
        x = F.max_pool2d(x, 2) if pool else x
        return F.batch_norm(x, w[f"{bn}.running_mean"], w[f"{bn}.running_var"],
                            w[f"{bn}.weight"], w[f"{bn}.bias"]).relu()

    def residual(x, name):
        return x + block(block(x, f"{name}.1.residual.0"), f"{name}.1.residual.1")

    y = block(x, "prep")
    y = residual(block(y, "layer1.0", pool=True), "layer1")
    y = block(y, "layer2", pool=True)
    y = residual(block(y, "layer3.0", pool=True), "layer3")
    y = F.max_pool2d(y, 4, 2).flatten(1) @ w["fc.weight"].T + w["fc.bias"]
    torch.testing.assert_close(net(x), (0.125 * y).log_softmax(1), rtol=1e-4, atol=1e-5)


def test_table_of_layers_counts_379_million_multiply_accumulates(capsys):
    model.main()
    # 3x3 weights x channels in x channels out x output pixels of each convolution, and the head
    macs = sum(9 * i * o * size**2 for i, o, size in (
        (3, 64, 32), (64, 128, 32), (128, 128, 16), (128, 128, 16), (128, 256, 16), (256, 512, 8),
        (512, 512, 4), (512, 512, 4))) + 512 * 10
    assert f"{macs:,}" == "379,261,952" and "379,261,952" in capsys.readouterr().out


def test_optimizer_of_all_but_convolutions_is_nesterov_sgd_with_weight_decay():
    """v <- .6 v + g,  w <- w - lr (g + .6 v)  with g the gradient + 1e-3 w."""
    layer = nn.Linear(3, 2)
    optimizer = model.make_optimizer(layer, lr=0.1)
    w, v = layer.weight.detach().clone(), 0
    for k in range(3):
        optimizer.zero_grad()
        (layer.weight ** 2 * (k + 1)).sum().backward()
        optimizer.step()
        g = 2 * w * (k + 1) + 1e-3 * w
        v = 0.6 * v + g
        w = w - 0.1 * (g + 0.6 * v)
        torch.testing.assert_close(layer.weight.detach(), w)


def polynomial_three_times(s):
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def orthogonal_by_svd(matrix):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ polynomial_three_times(s / s.norm()).diag() @ v


@pytest.mark.parametrize("shape", [(64, 27), (27, 64), (40, 40)])
def test_orthogonal_is_the_svd_with_each_singular_value_through_a_polynomial(shape):
    matrix = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(onecycle.orthogonal(matrix), orthogonal_by_svd(matrix),
                               rtol=1e-4, atol=1e-5)
    assert torch.equal(onecycle.orthogonal(0 * matrix), 0 * matrix)              # not 0 / 0


def test_orthogonal_brings_singular_values_as_near_to_one_as_it_says():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(200, 200))[0] for _ in range(2))
    shares = torch.linspace(0.001, 0.12, 200)                         # of the matrix's length
    shares /= shares.norm()
    ends = (u.T @ onecycle.orthogonal(u @ shares.diag() @ v) @ v.T).diagonal()
    near = shares >= 0.02
    assert 20 < near.sum() < 180
    assert ends[near].min() > 0.68 and ends[near].max() < 1.21
    assert (ends[~near] / shares[~near]).max() < 41


@pytest.mark.parametrize("channels_last", [False, True])
def test_muon_steps_as_torchs_does_once_the_weights_have_their_length(channels_last):
    """torch.optim.Muon takes matrices only, no kernels, and leaves the length to weight decay."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, 3, bias=False)
    if channels_last:
        conv.to(memory_format=torch.channels_last)
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    ours = onecycle.Muon(conv.parameters(), 0.1, 0.6, weight_decay=0.5, dtype=torch.bfloat16)
    oracle = torch.optim.Muon([matrix], 0.1, weight_decay=0, momentum=0.6, ns_steps=3)
    for k in range(4):
        gradient = torch.randn(24, 16, 3, 3)
        conv.weight.grad, matrix.grad = torch.empty_like(conv.weight), gradient.flatten(1)
        conv.weight.grad.copy_(gradient)
        matrix.data *= 24 ** 0.5 / torch.linalg.matrix_norm(matrix.data)
        before = matrix.detach().clone()
        ours.step()
        oracle.step()
        step, difference = matrix - before, conv.weight.flatten(1) - matrix
        assert difference.norm() < 0.02 * (k + 1) * step.norm()           # bf16, rounded elsewhere


def test_same_seed_same_weights_other_seed_other_weights():
    a, b, c = (model.make_model(CPU, seed).fc.weight for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# -------------------------------------------------------------------------------------- schedule

def test_schedule_starts_and_ends_at_lrmin_and_peaks_at_epoch_5():
    total, peak = 24 * 97, 5 * 97
    lrs = [onecycle.one_cycle(k, total, peak, 0.04, 0.4) for k in range(total)]
    assert (lrs[0], lrs[485], lrs[2327]) == (0.04, 0.4, pytest.approx(0.04, abs=1e-15))
    assert lrs.index(max(lrs)) == 485 and lrs[484] < 0.4 > lrs[486]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("ratio, final", [(10, 1), (25, 1), (10, 1e4), (3, 20)])
@pytest.mark.parametrize("total, peak", [(2328, 485), (97, 1), (100, 98), (11, 5), (20, 7)])
def test_schedule_is_torch_onecyclelr_at_every_step(shape, ratio, final, total, peak):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=total, pct_start=(peak + 1) / total,
        anneal_strategy="linear" if shape == "linear" else "cos", cycle_momentum=False,
        div_factor=ratio, final_div_factor=final)
    low = 0.4 / ratio
    for step in range(total):
        ours = onecycle.one_cycle(step, total, peak, low, 0.4, shape, end=low / final)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        if step < total - 1:
            oracle.step()


def test_bounds_exchanged_cycle_the_momentum_as_torch_does():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.4, total_steps=100, pct_start=0.21, anneal_strategy="linear",
        base_momentum=0.85, max_momentum=0.95)
    for step in range(100):
        ours = onecycle.one_cycle(step, 100, 20, 0.95, 0.85)
        assert ours == pytest.approx(optimizer.param_groups[0]["momentum"], abs=1e-12)
        optimizer.step()
        if step < 99:
            oracle.step()


def test_schedule_sets_every_group_and_needs_no_order():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1, 2)]
    optimizer = torch.optim.SGD(groups)
    schedule = onecycle.OneCycle(optimizer, total=50, peak=10, lr_max=0.4)
    for step in (30, 10, 49, 0, 30):
        expected = onecycle.one_cycle(step, 50, 10, 0.04, 0.4)
        assert schedule.set(step) == expected
        assert [group["lr"] for group in optimizer.param_groups] == [expected, expected]


def test_schedule_fills_a_rate_that_is_a_tensor_in_place_as_a_graph_needs():
    rate = torch.tensor(0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    onecycle.OneCycle(optimizer, total=50, peak=10, lr_max=0.4).set(10)
    assert rate == torch.tensor(0.4) and optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("total, peak", [(1, 0), (2, 0), (2, 1), (5, 0), (5, 4)])
def test_peak_at_either_end_and_shortest_runs(total, peak):
    lrs = [onecycle.one_cycle(k, total, peak, 1, 10) for k in range(total)]
    assert lrs[peak] == 10 and all(lrs[k] == 1 for k in {0, total - 1} - {peak})


@pytest.mark.parametrize("arguments", [(50, 50, 10), (-1, 50, 10), (0, 50, 50), (0, 50, -1),
                                       (3, 50, 10, 1, 2, "square"), (10, 50, 10, 1, 2, "square")])
def test_schedule_refuses_steps_and_peaks_outside_the_run_and_unknown_shapes(arguments):
    with pytest.raises(ValueError):
        onecycle.one_cycle(*(*arguments, 1, 2)[:max(5, len(arguments))])


# -------------------------------------------------------------------------- draws and augmentation

MEAN, INVERSE_STD = torch.tensor([125.3, 123.0, 113.9]), 1 / torch.tensor([63.0, 62.1, 66.7])
PICTURES = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (11, 32, 32, 3), np.uint8))


def every_draw():
    """All 81 offsets x both flips, the cutout's centre walking over every row and column."""
    rows = []
    for k in range(9 * 9 * 2):
        rows.append([k % 11, k // 2 // 9, k // 2 % 9, k % 2, k % 32, 31 - (k * 7) % 32])
    corners = [[0, 4, 4, 0, y, x] for y in (0, 3, 4, 28, 31) for x in (0, 3, 4, 28, 31)]
    return torch.tensor(rows + corners, dtype=torch.int32)                # 187: an odd batch


def test_draws_give_each_image_once_and_every_value_in_range():
    draws = data.draw_epoch(5000, seed=3, epoch=2)
    assert draws.shape == (5000, 6) and draws.dtype == torch.int32
    for column, values in enumerate((5000, 9, 9, 2, 32, 32)):
        assert draws[:, column].unique().tolist() == list(range(values))


def test_draws_of_all_seeds_and_epochs_differ_and_can_be_made_again():
    seen = {data.draw_epoch(64, seed, epoch).numpy().tobytes()
            for seed in (*range(20), 2**32 - 1) for epoch in range(20)}
    assert len(seen) == 21 * 20
    assert data.draw_epoch(64, 5, 7).numpy().tobytes() in seen


def test_draws_are_uniform():
    """Chi-square of all columns but the flip, and of an image's place in the epoch, at 99.99 %."""
    epochs = [data.draw_epoch(10_000, 0, epoch) for epoch in range(10)]
    draws = torch.cat(epochs)
    order = torch.stack([epoch[:, 0] for epoch in epochs])
    counts = torch.bincount(order[:, :1000].flatten() // 1000, minlength=10).double()
    assert ((counts - 1000).square() / 1000).sum() < 34 and not torch.equal(order[0], order[1])
    for column, values, limit in ((1, 9, 32), (2, 9, 32), (4, 32, 72), (5, 32, 72)):
        counts = torch.bincount(draws[:, column], minlength=values).double()
        expected = len(draws) / values
        assert ((counts - expected).square() / expected).sum() < limit


def test_every_image_shows_its_other_side_in_the_next_epoch_and_chance_says_which_is_first():
    flips = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            draws = data.draw_epoch(10_000, seed, epoch)
            flips[seed, epoch] = draws[draws[:, 0].argsort(), 3]         # by image
        assert torch.equal(flips[seed, 1], 1 - flips[seed, 0])
        assert torch.equal(flips[seed, 2], flips[seed, 0])
        assert abs(flips[seed, 0].sum() - 5000) < 200                    # 4 standard deviations
    agree = (flips[0, 0] == flips[1, 0]).sum()                           # of two seeds: by chance
    assert abs(agree - 5000) < 200


def test_augment_is_torchvisions_pad_crop_flip_normalize_erase():
    draws = every_draw()
    ours = data.augment(PICTURES, draws, MEAN, INVERSE_STD, torch.float32)
    for out, (index, top, left, flip, y, x) in zip(ours, draws.tolist()):
        picture = T.pad(PICTURES[index].permute(2, 0, 1), [4] * 4, padding_mode="reflect")
        picture = T.crop(picture, top, left, 32, 32)
        picture = T.horizontal_flip(picture) if flip else picture
        picture = T.normalize(picture.float(), MEAN.tolist(), (1 / INVERSE_STD).tolist())
        y0, y1, x0, x1 = max(y - 4, 0), min(y + 4, 32), max(x - 4, 0), min(x + 4, 32)
        picture = T.erase(picture, y0, x0, y1 - y0, x1 - x0, torch.zeros(3, 1, 1))
        assert torch.equal(out == 0, picture == 0)                       # geometry: exactly
        torch.testing.assert_close(out, picture, rtol=0, atol=1e-6)      # values


def test_plain_draws_only_normalise_and_batches_are_channels_last():
    out = data.augment(PICTURES, data.plain_draws(11), MEAN, INVERSE_STD, torch.float32)
    expected = ((PICTURES - MEAN) * INVERSE_STD).permute(0, 3, 1, 2)
    assert torch.equal(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


KERNEL_TEST = """
import sys, torch, data, test_all
device = torch.device(sys.argv[1])
images, draws = test_all.PICTURES.to(device), test_all.every_draw().to(device)
constants = test_all.MEAN.to(device), test_all.INVERSE_STD.to(device)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for count in (1, 3, 187):
        ours = data.fused_augment(images, draws[:count], *constants, dtype)
        reference = data.augment(test_all.PICTURES, draws[:count].cpu(), test_all.MEAN,
                                 test_all.INVERSE_STD, dtype)
        assert ours.shape == (count, 3, 32, 32) and ours.dtype == dtype
        assert ours.is_contiguous(memory_format=torch.channels_last)
        ours = ours.cpu()
        if dtype == torch.bfloat16 and device.type == "cpu":
            # Triton's interpreter cuts float32 off to bf16 where hardware rounds to nearest even.
            ours = ours.contiguous().view(torch.int16).int()
            reference = reference.contiguous().view(torch.int16).int()
            assert (ours - reference).abs().max() <= 1, (dtype, count)
        else:
            assert torch.equal(ours, reference), (dtype, count)
print("equal")
"""


@needs_triton
def test_kernel_is_the_reference_bit_for_bit_in_tritons_interpreter():
    done = python(KERNEL_TEST, "cpu", TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr


@needs_gpu
@needs_triton
def test_kernel_is_the_reference_bit_for_bit_on_the_gpu():
    done = python(KERNEL_TEST, "cuda")
    assert done.stdout.strip() == "equal", done.stderr


@needs_triton
def test_kernel_compiles_for_four_generations_of_gpus_without_one():
    done = python("""
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
print("compiled")
""", TRITON_INTERPRET="0")
    assert done.stdout.strip() == "compiled", done.stderr


@needs_gpu
def test_loader_on_the_gpu_is_the_loader_on_the_cpu():
    batches = {}
    for device in ("cpu", "cuda"):
        loader = data.Loader(PICTURES, torch.arange(11), MEAN, INVERSE_STD, 4, torch.float32,
                             torch.device(device))
        batches[device] = [(x.cpu(), y.cpu()) for x, y in loader.epoch(0, 0)]
    for (x, y), (u, v) in zip(*batches.values(), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_epoch_shows_each_image_once_but_for_the_dropped_tail():
    loader = data.Loader(PICTURES, torch.arange(11), MEAN, INVERSE_STD, 4, torch.float32, CPU)
    batches = list(loader.epoch(seed=0, epoch=3))
    assert len(loader) == 2 == len(batches)
    labels = torch.cat([y for _, y in batches]).tolist()
    assert len(set(labels)) == 8
    assert labels == data.draw_epoch(11, 0, 3)[:8, 0].tolist()


def test_evaluation_shows_every_image_in_order_the_short_batch_too():
    loader = data.Loader(PICTURES, torch.arange(11), MEAN, INVERSE_STD, 4, torch.float32, CPU)
    assert torch.cat([y for _, y in loader.plain()]).tolist() == list(range(11))
    assert [len(x) for x, _ in loader.plain()] == [4, 4, 3]


def test_normalisation_leaves_mean_0_and_deviation_1():
    mean, inverse_std = data.normalisation(PICTURES)
    values = (PICTURES.double() - mean) * inverse_std
    torch.testing.assert_close(values.mean((0, 1, 2)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 1, 2), correction=0), torch.ones(3).double(),
                               atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- where data come from

def cifar10_on_disk(folder, monkeypatch):
    """Write CIFAR-10's own files, small, and tell torchvision their sums; return the images."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, pictures, sums = np.random.default_rng(0), {}, {}
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        planes = rng.integers(0, 256, (4, 3, 32, 32), np.uint8)           # colour planes, as stored
        content = ({"label_names": names} if name == "batches.meta" else
                   {"data": planes.reshape(4, 3072), "labels": [0, 1, 2, 9]})
        (folder / name).write_bytes(pickle.dumps(content))
        pictures[name] = planes.transpose(0, 2, 3, 1)
        sums[name] = md5((folder / name).read_bytes()).hexdigest()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [[k, sums[k]] for k in pictures if "data" in k])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    monkeypatch.setattr(cifar, "url", "file:///nowhere/cifar-10-python.tar.gz")
    return pictures


def test_cifar10_is_read_from_its_own_files(tmp_path, monkeypatch):
    pictures = cifar10_on_disk(tmp_path, monkeypatch)
    for source in ("auto", "cifar10"):
        cifar = data.load(source, tmp_path)
        assert cifar.name == "CIFAR-10" and cifar.real and cifar.classes[9] == "truck"
        train = np.concatenate([pictures[f"data_batch_{k}"] for k in range(1, 6)])
        assert np.array_equal(cifar.train_images, train) and cifar.train_images.dtype == torch.uint8
        assert np.array_equal(cifar.test_images, pictures["test_batch"])
        assert cifar.test_labels.tolist() == [0, 1, 2, 9]


def test_a_damaged_file_of_cifar10_is_an_error_and_never_replaced_in_silence(tmp_path, monkeypatch):
    cifar10_on_disk(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    for source in ("auto", "cifar10"):
        with pytest.raises(data.UserError, match="cannot be read"):
            data.load(source, tmp_path)


def test_a_download_that_is_cut_off_is_an_error_or_the_generated_set(tmp_path, monkeypatch, capsys):
    archive = tmp_path / "cut.tar.gz"
    archive.write_bytes(b"half an archive")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", archive.as_uri())
    with pytest.raises(data.UserError, match="--data"):
        data.load("cifar10", tmp_path / "data")
    assert not data.load("auto", tmp_path / "data").real
    assert "THIS IS NOT CIFAR-10" in capsys.readouterr().err


def small_arrays(train=32, test=16):
    rng = np.random.default_rng(1)
    return {"train_images": rng.integers(0, 256, (train, 32, 32, 3), np.uint8),
            "train_labels": np.arange(train) % 4,
            "test_images": rng.integers(0, 256, (test, 32, 32, 3), np.uint8),
            "test_labels": np.arange(test) % 4}


def digest(dataset):
    return [md5(tensor.numpy().tobytes()).hexdigest() for tensor in dataset[2:6]]


def test_npz_of_any_number_of_classes_any_integer_type_and_any_order_in_memory(tmp_path):
    arrays = small_arrays()
    arrays["train_labels"] = arrays["train_labels"].astype(np.uint8)
    arrays["train_images"] = np.asfortranarray(arrays["train_images"])
    np.savez_compressed(tmp_path / "own.npz", **arrays)
    own = data.load(str(tmp_path / "own.npz"))
    assert len(own.classes) == 4 and own.real and own.name == "own.npz"
    assert np.array_equal(own.train_images, arrays["train_images"])
    assert data.normalisation(own.train_images)[0].shape == (3,)
    assert own.train_labels.dtype == torch.int64 and own.train_labels.tolist() == [0, 1, 2, 3] * 8


def test_generated_set_is_the_same_every_time_and_balanced():
    first, second = data.load("synthetic"), data.synthetic()
    assert digest(first) == digest(second)
    assert first.train_images.shape == (2560, 32, 32, 3) and len(first.test_images) == 1000
    assert first.test_labels.bincount().tolist() == [100] * 10 and not first.real


def test_generated_set_needs_more_than_a_linear_classifier():
    """Closed-form ridge regression on the pixels, at the best of five penalties: under 50 %."""
    made = data.synthetic()
    x, t = (images.flatten(1).double() / 64 for images in (made.train_images, made.test_images))
    x, t = x - x.mean(0), t - x.mean(0)
    targets = torch.eye(10).double()[made.train_labels] - 0.1
    gram = x @ x.T
    best = 0
    for penalty in (1e1, 1e2, 1e3, 1e4, 1e5):
        weights = x.T @ torch.linalg.solve(gram + penalty * torch.eye(len(x)), targets)
        best = max(best, ((t @ weights).argmax(1) == made.test_labels).double().mean().item())
    assert 0.1 < best < 0.5


# ---------------------------------------------------------------------------------- LR range test

class Quadratic(nn.Module):
    """0.5 * sum of curvatures * (w - x)^2: the loss whose stability limit theory gives."""

    def __init__(self, curvatures):
        super().__init__()
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)
        self.w = nn.Parameter(torch.ones_like(self.curvatures))

    def forward(self, x):
        return 0.5 * (self.curvatures * (self.w - x) ** 2).sum()


def sweep_of_quadratic(curvatures, noise=0.0, momentum=0.0, nesterov=False, seed=0, **options):
    net = Quadratic(curvatures)
    optimizer = torch.optim.SGD(net.parameters(), 1, momentum=momentum, nesterov=nesterov)
    generator = torch.Generator().manual_seed(seed)
    inputs = noise * torch.randn(2000, len(curvatures), generator=generator, dtype=torch.float64)
    batches = zip(inputs, [None] * 2000)
    return lrfinder.range_test(net, optimizer, lambda outputs, _: outputs, batches, **options)


@pytest.mark.parametrize("shape", ["exponential", "linear"])
def test_sweep_follows_the_closed_form_of_gradient_descent_step_by_step(shape):
    """loss_k / loss_0 = product over j < k of (1 - lr_j L)^2: an LR or loss off by one shows."""
    curvature, steps = 3.0, 60
    curve = sweep_of_quadratic([curvature], lr_start=1e-3, lr_end=0.5, steps=steps, shape=shape)
    lrs = (np.geomspace if shape == "exponential" else np.linspace)(1e-3, 0.5, steps)
    assert np.allclose(curve.lrs, lrs, rtol=1e-9) and len(curve.lrs) == steps
    factors = np.cumprod((1 - lrs * curvature) ** 2)
    assert np.allclose(np.array(curve.losses[1:]) / curve.losses[0], factors[:-1], rtol=1e-9)


@pytest.mark.parametrize("momentum, nesterov", [(0, False), (0.9, False), (0.9, True)])
def test_sweep_stops_at_the_stability_limit_that_theory_gives(momentum, nesterov):
    """2/L, 2(1+b)/L, and 2(1+b)/(L(1+2b)) for PyTorch's Nesterov; nearer with more steps."""
    curvatures = np.linspace(0.4, 4, 10).tolist()
    limit = 2 * (1 + momentum) / (4 * (1 + 2 * momentum if nesterov else 1))
    means = []
    for steps in (100, 300, 1000):
        stops = [sweep_of_quadratic(curvatures, 0.02, momentum, nesterov, seed, lr_start=1e-2,
                                    lr_end=10, steps=steps).lrs[-1] / limit for seed in range(5)]
        assert all(1 < stop < 2.2 for stop in stops)
        means.append(np.mean(stops))
    assert means[0] > means[1] > means[2]


class Small(nn.Module):
    """Convolution, BatchNorm and Dropout: buffers and a random state to restore."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                                    nn.Dropout(0.3), nn.Linear(8 * 36, 4))
        self.layers[4].eval()                             # a flag of its own, to be kept

    def forward(self, x):
        return self.layers(x)


def with_bytes(tree):
    """The nested dicts and lists of a state, each tensor or array as bytes, so that == compares."""
    return tree_map(lambda leaf: np.asarray(leaf).tobytes() if hasattr(leaf, "__array__") else leaf,
                    tree)


def state(net, optimizer):
    """Everything that has to be what it was."""
    parts = (net.state_dict(), optimizer.state_dict(), [m.training for m in net.modules()],
             [p.grad for p in net.parameters()], torch.get_rng_state(), random.getstate(),
             np.random.get_state())
    return with_bytes(parts)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Muon"])
@pytest.mark.parametrize("ending", ["normal", "overflow", "divergence", "exception", "Ctrl-C"])
def test_range_test_restores_everything_bit_for_bit(kind, ending):
    torch.manual_seed(0)
    net = Small()
    optimizer = {"SGD": lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
                 "Adam": lambda w: torch.optim.Adam(w, 0.01),
                 "Muon": lambda w: onecycle.Muon(w, 0.1, 0.9, 0.01)}[kind](net.parameters())
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4
    for _ in range(3):                                    # optimizer state and gradients to keep
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels).backward()
        optimizer.step()

    def batches():
        for k in range(1000):
            if k == 20 and ending in ("exception", "Ctrl-C"):
                raise RuntimeError if ending == "exception" else KeyboardInterrupt
            random.random(), np.random.rand(), torch.rand(1)
            yield inputs, labels

    # With a scale of 1e38 the first steps overflow, are skipped, and the scaler backs off.
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38 if ending == "overflow" else 1024.0)
    scaler.scale(torch.zeros(1))                          # makes its state
    before, scale = state(net, optimizer), scaler.state_dict()
    try:
        curve = lrfinder.range_test(net, optimizer, F.cross_entropy, batches(), steps=40,
                                    lr_end=1e6 if ending == "divergence" else 0.1, scaler=scaler)
        assert (len(curve.lrs) < 40) == (ending == "divergence")
    except (RuntimeError, KeyboardInterrupt):
        assert ending in ("exception", "Ctrl-C")
    assert state(net, optimizer) == before and scaler.state_dict() == scale
    optimizer.step()
    assert state(net, optimizer) != before                # the comparison can fail


def curve_of(*pieces):
    """Losses along straight pieces (points, from, to), with an LR from 1e-3 to 10."""
    losses = np.concatenate([np.linspace(a, b, n) for n, a, b in pieces])
    return lrfinder.Curve(np.geomspace(1e-3, 10, len(losses)).tolist(), losses.tolist())


FALL_AND_RISE = ((20, 2.3, 2.3), (40, 2.3, 1.5), (30, 1.5, 2.4))


def test_lrmax_is_the_first_marked_minimum_and_lrmin_a_tenth():
    curve = curve_of(*FALL_AND_RISE)
    found = lrfinder.suggest(curve)
    assert curve.lrs[57] <= found.lr_max <= curve.lrs[62] and found.lr_min == found.lr_max / 10
    assert curve.lrs[18] <= found.onset <= curve.lrs[26]


def test_a_second_valley_less_than_twice_as_deep_does_not_matter():
    curve = curve_of(*FALL_AND_RISE)
    longer = curve_of(*FALL_AND_RISE, (20, 2.4, 1.2), (20, 1.2, 3))
    found, again = lrfinder.suggest(curve).lr_max, lrfinder.suggest(longer).lr_max
    assert abs(curve.lrs.index(found) - longer.lrs.index(again)) <= 2


def test_a_wiggle_and_noise_and_an_early_spike_do_not_fool_it():
    clean = lrfinder.suggest(curve_of(*FALL_AND_RISE)).lr_max
    spiked = curve_of(*FALL_AND_RISE)
    spiked.losses[3] = spiked.losses[4] = 4.0
    noisy = curve_of((20, 2.3, 2.3), (20, 2.3, 1.9), (3, 1.9, 1.96), (17, 1.9, 1.5), (30, 1.5, 2.4))
    noise = np.random.default_rng(0).normal(0, 0.05, len(noisy.losses))
    noisy.losses[:] = (np.array(noisy.losses) + noise).tolist()
    for curve in (spiked, noisy):
        assert clean / 1.6 < lrfinder.suggest(curve).lr_max < clean * 1.6


@pytest.mark.parametrize("rise, marked", [(0.08, False), (0.25, True)])
def test_a_rise_of_a_tenth_of_the_fall_does_not_end_the_descent_one_of_a_third_does(rise, marked):
    curve = curve_of((20, 2.3, 2.3), (25, 2.3, 1.8), (15, 1.8, 1.8 + rise), (30, 1.8 + rise, 1.5),
                     (30, 1.5, 2.4))
    place = curve.lrs.index(lrfinder.suggest(curve).lr_max)
    assert abs(place - (45 if marked else 90)) <= 3


@pytest.mark.parametrize("pieces, words", [
    (((100, 2.3, 2.3),), "never falls"),
    (((50, 2.3, 2.25), (50, 2.25, 9)), "never falls"),
    (((40, 0.1, 2.1),), "only rises"),
    (((100, 2.3, 1.0),), "falls to the end"),
    (((99, 2.3, 1.3), (1, 1.6, 1.6)), "falls to the end"),
    (((3, 2.3, 1.0), (4, 1.0, 3)), "points"),
    ((), "points")])
def test_a_curve_without_an_answer_is_said_and_not_guessed(pieces, words):
    curve = curve_of(*pieces) if pieces else lrfinder.Curve([], [])
    with pytest.raises(lrfinder.NotFound, match=words):
        lrfinder.suggest(curve)


def test_pure_noise_has_no_answer():
    for seed in range(20):
        losses = np.random.default_rng(seed).normal(2.3, 0.2, 100).tolist()
        with pytest.raises(lrfinder.NotFound):
            lrfinder.suggest(lrfinder.Curve(np.geomspace(1e-3, 10, 100).tolist(), losses))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_sweep_and_is_not_in_the_curve(value):
    net = nn.Linear(2, 2)
    losses = iter([1.0] * 15 + [value] + [1.0] * 20)
    curve = lrfinder.range_test(net, torch.optim.SGD(net.parameters(), 1),
                                lambda outputs, _: outputs.sum() * 0 + next(losses),
                                ((torch.ones(1, 2), None) for _ in range(40)), steps=40)
    assert curve.losses == [1.0] * 15 and len(curve.lrs) == 15


def test_losses_around_a_negative_value_do_not_end_the_sweep():
    """As those of densities can be; 40 times noise shows nothing, and nothing runs away."""
    net, losses = nn.Linear(2, 2), np.random.default_rng(0).normal(-1, 0.02, 40).tolist()
    remaining = iter(losses)
    curve = lrfinder.range_test(net, torch.optim.SGD(net.parameters(), 1),
                                lambda outputs, _: outputs.sum() * 0 + next(remaining),
                                ((torch.ones(1, 2), None) for _ in losses), steps=40)
    assert len(curve.losses) == 40


def test_smoothing_is_central_keeps_straight_lines_and_the_length():
    line = np.linspace(3, 1, 83).tolist()
    assert np.allclose(lrfinder.smooth(line), line)
    spread = lrfinder.smooth([0.0] * 41 + [1.0] + [0.0] * 41)
    assert np.allclose(spread, spread[::-1]) and 0.1 < spread[41] < 0.5 and sum(spread) > 0.99


def test_plot_draws_on_the_axis_it_is_given():
    ax = train.Figure().subplots()
    curve = curve_of(*FALL_AND_RISE)
    lrfinder.plot(curve, ax, lrfinder.suggest(curve))
    assert ax.get_xscale() == "log"
    assert {"LRMIN", "LRMAX", "onset"} <= {text.get_text().split()[0] for text in ax.texts}


def test_range_test_can_be_copied_it_needs_nothing_else_of_the_project():
    done = python("import sys, lrfinder; print(sorted({'model', 'data', 'onecycle', 'train', "
                  "'torchvision'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------- whole runs

@pytest.fixture(autouse=True, scope="module")
def runs_are_float32_on_the_cpu():
    """Where they are the same bit for bit every time, on machines with a GPU too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (model, train):
            patch.setattr(module, "pick_device", lambda: CPU)
            patch.setattr(module, "precision", lambda device: torch.float32)
        yield


def command(*arguments):
    """`python train.py arguments` in this process: exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            model.run(train.main)
        except SystemExit as end:
            return end.code, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def options(folder):
    return ["--data", folder / "own.npz", "--epochs", 3, "--batch-size", 8, "--lr-max", 0.1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """own.npz, 32 images to train on and 16 to test, and `whole`, a run of 3 epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("runs")
    np.savez(folder / "own.npz", **small_arrays())
    status, _, err = command(*options(folder), "--out", folder / "whole")
    assert status == 0, err
    return folder


def outcome(run):
    """All that a run ends with, but for its seconds, as plain objects that == compares."""
    content = model.restore(run / "checkpoint.pt", *train.CHECKPOINT)
    for row in content["history"]:
        del row["seconds"], row["speed"]
    content.update(model.restore(run / "model.pt", "weights"))
    return with_bytes(content)


def test_same_seed_same_run_bit_for_bit_and_another_seed_another(folder):
    for seed, same in ((0, True), (1, False)):
        assert command(*options(folder), "--seed", seed, "--out", folder / f"again{seed}")[0] == 0
        again, whole = outcome(folder / f"again{seed}"), outcome(folder / "whole")
        assert (again == whole) == same                  # the settings, too, differ with the seed:
        assert (again["weights"] == whole["weights"]) == same


# Runs the command line in sys.argv and dies as its first two words say: at an optimizer step or
# with half of a checkpoint written; by SIGKILL, or as Ctrl-C does.
CUT_OFF = """
import os, signal, sys, torch, model, onecycle, train
train.pick_device = lambda: torch.device("cpu")
model.precision = train.precision = lambda device: torch.float32
where, count = sys.argv[1], int(sys.argv[2])
seen = 0

def die():
    global seen
    seen += 1
    if seen == count:
        if where == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL)

if where == "save":
    whole_save = torch.save
    def save(content, file):
        if seen == count - 1:
            file.write(b"PK half of a checkpoint" * 1000)
            file.flush()
        die()
        whole_save(content, file)
    torch.save = save
else:
    whole_set = onecycle.OneCycle.set
    def set(self, step):
        die()
        return whole_set(self, step)
    onecycle.OneCycle.set = set
sys.argv[1:] = sys.argv[3:]
model.run(train.main)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("where, count", [("step", 7), ("save", 3)])
def test_a_run_killed_and_resumed_ends_as_the_uninterrupted_run_bit_for_bit(folder, where, count):
    out = folder / f"killed-{where}"
    done = python(CUT_OFF, where, count, *options(folder), "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert command("--resume", out)[0] == 0
    assert outcome(out) == outcome(folder / "whole")


def test_ctrl_c_ends_with_one_line_that_tells_how_to_go_on(folder):
    out = folder / "interrupted"
    done = python(CUT_OFF, "interrupt", 6, *options(folder), "--out", out)
    assert done.returncode == 130
    assert done.stderr.strip().count("\n") == 0 and done.stderr.endswith(f"--resume {out}\n")
    assert command("--resume", out)[0] == 0
    assert outcome(out) == outcome(folder / "whole")
    done = python(CUT_OFF, "interrupt", 6, *options(folder), "--runs", 2, "--out", f"{out}-runs")
    assert done.returncode == 130
    assert done.stderr.endswith(f"--resume {out}-runs/seed0, for this seed alone\n")


def test_small_sets_get_small_batches_by_default(folder):
    settings, *_ = train.settle({"data": str(folder / "own.npz")}, None)
    assert (settings["batch_size"], settings["epochs"], settings["peak_epoch"]) == (32, 24, 5)


def test_a_finished_run_resumed_stays_as_it_is(folder):
    before = outcome(folder / "whole")
    status, out, _ = command("--resume", folder / "whole")
    assert status == 0 and "last epoch" in out and outcome(folder / "whole") == before


def test_results_say_what_the_saved_weights_do(folder):
    saved = model.restore(folder / "whole" / "model.pt", "weights", "classes", "mean",
                          "inverse_std", "last_epoch")
    net = model.CustomResNet(len(saved["classes"])).eval()
    net.load_state_dict(saved["weights"])
    own = data.load(folder / "own.npz")
    x = ((own.test_images - saved["mean"]) * saved["inverse_std"]).permute(0, 3, 1, 2)
    right = (net(x).argmax(1) == own.test_labels).float().mean().item()
    assert right == pytest.approx(saved["last_epoch"]["averaged"])
    history = json.loads((folder / "whole" / "history.json").read_text())["history"]
    assert history[-1] == saved["last_epoch"] and len(history) == 3
    assert history[-1]["lr"] == pytest.approx(0.01)          # no annihilation: LRMAX / 10
    assert (folder / "whole" / "curves.png").stat().st_size > 1000


def test_a_run_is_the_recipe_written_a_second_time(folder):
    """Muon and SGD by hand on 12 steps: learning rates, losses and accuracies."""
    own, net, history = data.load(folder / "own.npz"), model.make_model(CPU, 0, 4), []
    splits = (own.train_images, own.train_labels), (own.test_images, own.test_labels)
    loader, test_loader = (data.Loader(*split, *data.normalisation(own.train_images), 8,
                                       torch.float32, CPU) for split in splits)
    # Small rates, so that rounding grows slowly; the peak is at 5/24 of 12 steps, rounded.
    lrs = [*np.linspace(1e-4, 1e-3, 3), *np.linspace(1e-3, 1e-4, 10)[1:]]
    velocity = [torch.zeros_like(w) for w in net.parameters()]
    for epoch in range(3):
        losses, right = [], 0
        net.train()
        for lr, (x, y) in zip(lrs[4 * epoch:], loader.epoch(0, epoch)):
            log_p = net(x)
            loss = -log_p[range(8), y].mean()                             # cross-entropy
            gradients = torch.autograd.grad(loss, [*net.parameters()])
            with torch.no_grad():
                for w, v, g in zip(net.parameters(), velocity, gradients):
                    if w.dim() == 4:              # a convolution's: a matrix, a row a filter
                        v.mul_(0.6).add_(g)
                        w *= len(w) ** 0.5 / w.square().sum().sqrt()
                        w -= lr * orthogonal_by_svd((g + 0.6 * v).flatten(1)).view_as(w)
                    else:
                        v.mul_(0.6).add_(g + 1e-3 * w)
                        w -= lr * (g + 1e-3 * w + 0.6 * v)
            losses.append(loss.item())
            right += (log_p.argmax(1) == y).sum().item()
        net.eval()
        tested = torch.cat([net(x).argmax(1) for x, _ in test_loader.plain()])
        history.append({"lr": lr, "loss": np.mean(losses), "train": right / 32,
                        "raw": (tested == own.test_labels).float().mean().item()})
    assert command(*options(folder), "--lr-max", 1e-3, "--out", folder / "slow")[0] == 0
    run = model.restore(folder / "slow" / "checkpoint.pt", "history")
    for ours, row in zip(history, run["history"], strict=True):
        assert (row["lr"], row["loss"]) == pytest.approx((ours["lr"], ours["loss"]), rel=1e-3)
    for key in ("train", "raw"):                  # later, rounding might decide between two classes
        assert run["history"][0][key] == history[0][key]


def test_a_run_in_bf16_has_its_convolutions_in_bf16_and_its_weights_in_float32(folder):
    out, seen = folder / "bf16", set()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, output: seen.add((type(module).__name__, output.dtype)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (model, train):
            patch.setattr(module, "precision", lambda device: torch.bfloat16)
        assert command(*options(folder), "--out", out)[0] == 0
    hook.remove()
    assert {("Conv2d", torch.bfloat16), ("CustomResNet", torch.float32)} <= seen
    assert ("Conv2d", torch.float32) not in seen
    runs = [model.restore(run / "checkpoint.pt", "history", "model") for run in
            (out, folder / "whole")]
    assert all(w.dtype in (torch.float32, torch.int64) for w in runs[0]["model"].values())
    first = [run["history"][0]["loss"] for run in runs]
    assert first[0] != first[1] and first[0] == pytest.approx(first[1], rel=0.05)


def test_a_run_begun_on_a_gpu_goes_on_without_one(folder):
    """There the rate is a tensor, in float32, and SGD is fused; here it is a number again."""
    out = folder / "moved"
    assert python(CUT_OFF, "interrupt", 7, *options(folder), "--out", out).returncode == 130
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    for group in checkpoint["optimizer"]["param_groups"]:
        group.update(lr=torch.tensor(group["lr"]), fused=True)
    torch.save(checkpoint, out / "checkpoint.pt")
    assert command("--resume", out)[0] == 0
    assert outcome(out) == outcome(folder / "whole")


@needs_gpu
def test_a_run_on_the_gpu_cut_off_and_resumed_starts_as_on_the_cpu(folder):
    """In the GPU's own precision, with its scaler, fused SGD and the kernel."""
    out, code = folder / "gpu", "import model, train; model.run(train.main)"
    cut_off = CUT_OFF.replace('train.pick_device = lambda: torch.device("cpu")', "").replace(
        "model.precision = train.precision = lambda device: torch.float32", "")
    assert python(cut_off, "step", 7, *options(folder), "--out", out).returncode < 0
    done = python(code, "--resume", out)
    assert done.returncode == 0 and "device    cpu" not in done.stdout, done.stderr
    gpu, cpu = (model.restore(run / "checkpoint.pt", "history", "average")
                for run in (out, folder / "whole"))
    assert len(gpu["history"]) == 3 and all(w.isfinite().all() for w in gpu["average"].values())
    assert gpu["history"][0]["loss"] == pytest.approx(cpu["history"][0]["loss"], rel=0.05)


def test_several_runs_print_mean_and_standard_deviation(folder):
    status, out, err = command(*options(folder), "--epochs", 1, "--runs", 2, "--out",
                               folder / "several")
    assert status == 0, err
    results = [model.restore(folder / "several" / f"seed{s}" / "model.pt", "last_epoch")
               ["last_epoch"]["averaged"] for s in (0, 1)]
    assert f"2 runs: {np.mean(results):.2%} +- {np.std(results, ddof=1):.2%}" in out


def test_the_range_test_before_a_run_changes_nothing_but_the_learning_rate(folder):
    """A run that searches, finds nothing on noise and takes the constant, is the run given it."""
    few = ["--data", folder / "own.npz", "--epochs", 1, "--batch-size", 8, "--out"]
    assert command(*few, folder / "searched")[0] == 0
    assert command(*few, folder / "given", "--lr-max", train.LR_MAX)[0] == 0
    assert outcome(folder / "searched") == outcome(folder / "given")
    assert (folder / "searched" / "lr_range.png").exists()


class Recorder:
    """Stands in for the schedule: keeps the weights as they are before every step."""

    def __init__(self, net):
        self.net, self.weights = net, []

    def set(self, step):
        self.weights.append(copy.deepcopy(self.net))
        return 0.01


@pytest.fixture(scope="module", params=[0, 1000])
def averaged(request):
    """The average after an epoch of 8 steps, the weights before and after each, and the loader.

    After epoch 0, where the average's memory is short, and one where it has its full length.
    """
    net = model.make_model(CPU)
    average, recorder = copy.deepcopy(net), Recorder(net)
    images = torch.from_numpy(small_arrays()["train_images"])
    loader = data.Loader(images, torch.arange(32) % 4, MEAN, INVERSE_STD, 4, torch.float32, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAMPLE", 18)                               # five of eight batches
        step = train.make_step(net, model.make_optimizer(net, 0.01), model.make_scaler(CPU))
        train.train_epoch(recorder, loader, 0, request.param, step, net, average)
    return average, [*recorder.weights, net], loader, request.param


def test_a_graph_is_recorded_once_and_computes_on_each_batch(monkeypatch):
    """With a stand-in for CUDA's graph, which computes once more on the memory of the recording."""
    calls = []

    def double(x):
        calls.append((x, 2 * x))
        return [calls[-1][1]]

    class Graph:
        def replay(self):
            x, result = calls[3]
            result.copy_(2 * x)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    replay = onecycle.as_graph(double)
    for k in range(6):
        batch = torch.full((2,), float(k))
        assert torch.equal(replay(batch)[0], 2 * batch) and torch.equal(batch, batch * 0 + k)
    assert len(calls) == 4


@needs_gpu
def test_a_step_replayed_as_a_graph_is_the_step_launched_by_python(monkeypatch):
    """Eight steps at eight rates, on eight batches: three as they are, five by the graph.

    In bf16, as runs are: there an H200 gives the same bits again. On four images in float32 two
    series of steps launched by Python ended 1.7 % apart.
    """
    monkeypatch.setattr(model, "precision", lambda device: torch.bfloat16)
    cuda, results = torch.device("cuda"), []
    images = torch.from_numpy(small_arrays()["train_images"])
    loader = data.Loader(images, torch.arange(32) % 4, MEAN, INVERSE_STD, 4, torch.bfloat16, cuda)
    for as_graph in (train.as_graph, lambda step: step):
        net = model.make_model(cuda)
        optimizer = model.make_optimizer(net, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "as_graph", as_graph)
            step = train.make_step(net, optimizer, model.make_scaler(cuda))
        schedule, losses = onecycle.OneCycle(optimizer, 8, 3, 0.1), []
        for k, batch in enumerate(loader.epoch(0, 0)):
            schedule.set(k)
            loss, right = step(*batch)
            losses.append(loss.item())
            assert right in range(5)
        results.append((losses, [p.detach().cpu() for p in net.parameters()]))
    (ours, weights), (theirs, oracle) = results
    assert len(ours) == 8 and len(set(ours)) == 8
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(weights, oracle, strict=True))


def test_averaged_weights_are_torchs_averaged_model(averaged):
    average, weights, _, epoch = averaged

    def blend(averaged, current, count):       # count is 1 for the first step of the epoch
        steps = 8 * epoch + count
        d = min(0.99, steps / (steps + 9))
        return d * averaged + (1 - d) * current

    oracle = AveragedModel(weights[0], avg_fn=blend)
    for each in weights:
        oracle.update_parameters(each)
    for ours, theirs in zip(average.parameters(), oracle.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_averaged_weights_have_batch_statistics_of_their_own(averaged):
    """The mean over five batches of each batch's mean and variance after the first convolution."""
    average, weights, loader, epoch = averaged
    convolution, bn, _ = average.prep
    outputs = [convolution(x).detach() for x, _ in loader.epoch(0, epoch)]
    outputs, raw_bn = torch.stack(outputs[:5]), weights[-1].prep[1]       # (5, 4, 64, 32, 32)
    for measured, expected, raw in (
            (bn.running_mean, outputs.mean((1, 3, 4)), raw_bn.running_mean),
            (bn.running_var, outputs.var((1, 3, 4)), raw_bn.running_var)):
        torch.testing.assert_close(measured, expected.mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(measured, raw, rtol=1e-2, atol=1e-3)


class LighterLeft(nn.Module):
    """Sees class 1 in a picture whose left half is lighter or as light, else class 0."""

    def forward(self, x):
        light = x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(light), 3 * light + 0.1], 1).log_softmax(1)


def test_accuracy_counts_right_answers_and_flip_averages_over_mirror_images():
    images = torch.zeros(6, 32, 32, 3, dtype=torch.uint8)
    images[:4, :, :16] = 255                                  # the first four: lighter on the left
    loader = data.Loader(images, torch.tensor([1, 1, 1, 0, 0, 1]), MEAN, INVERSE_STD, 4,
                         torch.float32, CPU)
    assert model.accuracy(LighterLeft(), loader) == pytest.approx(4 / 6)
    assert model.accuracy(LighterLeft(), loader, flip=True) == pytest.approx(4 / 6)
    mirrored = data.Loader(images.flip(2), loader.labels, MEAN, INVERSE_STD, 4, torch.float32, CPU)
    assert model.accuracy(LighterLeft(), mirrored) == pytest.approx(2 / 6)
    assert model.accuracy(LighterLeft(), mirrored, flip=True) == pytest.approx(4 / 6)


# ----------------------------------------------------------------------------- what can go wrong

def with_arrays(**changes):
    """A function that writes an .npz to a path with some arrays changed, or left out where None."""
    arrays = {**small_arrays(), **changes}
    return lambda path: np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def damaged(at):
    """Writes an .npz with one bit changed in the byte at a share `at` of its length."""
    def damage(path):
        with_arrays()(path)
        content = bytearray(path.read_bytes())
        content[int(len(content) * at)] ^= 0x10
        path.write_bytes(content)
    return damage


def cut(path):
    with_arrays()(path)
    path.write_bytes(path.read_bytes()[:5000])


labels = small_arrays()["train_labels"]
BAD_FILES = [                                     # how to make the .npz, and the words of the line
    (lambda path: None, "No such file"),
    (lambda path: path.mkdir(), "Is a directory|cannot read|damaged"),
    (lambda path: path.write_bytes(b""), "damaged or not"),
    (lambda path: path.write_text("not an npz\n" * 50), "damaged or not"),
    (cut, "damaged or not"),
    (damaged(0.5), "wrong checksum|damaged"),
    (with_arrays(test_labels=None), "test_labels"),
    (with_arrays(train_images=np.zeros((32, 3, 32, 32), np.uint8)), "train_images must be uint8"),
    (with_arrays(train_images=np.zeros((32, 32, 32, 3), np.float32)), "train_images must be uint8"),
    (with_arrays(test_images=np.zeros((0, 32, 32, 3), np.uint8)), "test_images must be uint8"),
    (with_arrays(train_labels=labels[:-1]), "32 integers"),
    (with_arrays(train_labels=labels / 2), "32 integers"),
    (with_arrays(train_labels=labels - 1), "must be 0 .. 3"),
    (with_arrays(train_labels=labels * 2), "must be 0 .. 3"),
    (with_arrays(test_labels=np.full(16, 4)), "must be 0 .. 3"),
    (with_arrays(train_labels=labels.astype(object)), "allow_pickle"),
]


@pytest.mark.parametrize("write, words", BAD_FILES)
def test_a_bad_npz_gets_one_line_and_status_2(tmp_path, write, words):
    write(tmp_path / "bad.npz")
    status, _, err = command("--data", tmp_path / "bad.npz", "--out", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1 and re.search(words, err), err
    assert not (tmp_path / "out").exists()


BAD_OPTIONS = [                                   # {} is the folder of own.npz and the run `whole`
    ("--epochs 0", "--epochs 0: it must lie in 1"),
    ("--epochs many", "invalid int value: 'many'"),
    ("--epochs", "expected one argument"),
    ("--batch-size 0", "--batch-size 0: it must lie in 1 .. 32"),
    ("--batch-size 33", "--batch-size 33: it must lie in 1 .. 32"),
    ("--lr-max 0", "--lr-max 0.0: it must lie in"),
    ("--lr-max -0.1", "--lr-max -0.1: it must lie in"),
    ("--lr-max nan", "--lr-max nan: it must lie in"),
    ("--peak-epoch 4", "--peak-epoch 4.0: it must lie in 0 .. 3"),
    ("--peak-epoch -1", "--peak-epoch -1.0: it must lie in 0 .. 3"),
    ("--seed -1", "--seed -1: it must lie in 0"),
    ("--seed 4294967296", "--seed 4294967296: it must lie in 0"),
    ("--seed 4294967295 --runs 2", "--seed 4294967295: it must lie in 0 .. 4294967294"),
    ("--runs 0", "--runs must be 1"),
    ("--warmup 3", "unrecognized arguments: --warmup 3"),
    ("--out {}/whole", "holds a run: go on with --resume"),
    ("--out {}/own.npz", "name another --out"),
    ("--out {}/own.npz/out", "name another --out"),
    ("--resume {}/nowhere", "No such file"),
    ("--resume {}/whole --epochs 4", "--epochs 4 differs from this run's 3"),
    ("--resume {}/whole --seed 1", "--seed 1 differs from this run's 0"),
    ("--resume {}/whole --batch-size 16", "--batch-size 16 differs from this run's 8"),
    ("--resume {}/whole --data synthetic", "other images than this run"),
    ("--resume {}/whole --out {}/other", "--resume goes without"),
    ("--data cifar10 --data-dir {}/empty", "cannot be read from .* nor downloaded"),
    ("--data cifar10 --data-dir {}/own.npz", "cannot be read from .* nor downloaded"),
]


@pytest.mark.parametrize("words, line", BAD_OPTIONS, ids=[words for words, _ in BAD_OPTIONS])
def test_a_bad_option_gets_one_line_and_status_2(folder, monkeypatch, words, line):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "file:///nowhere/cifar.tar.gz")
    before = outcome(folder / "whole")
    arguments = words.replace("{}", str(folder)).split()
    given = [] if "--resume" in arguments else options(folder)
    out = [] if {"--resume", "--out"} & set(arguments) else ["--out", folder / "never"]
    status, _, err = command(*given, *out, *arguments)
    assert status == 2 and err.count("\n") == 1 and re.search(line, err), err
    assert not (folder / "never").exists() and outcome(folder / "whole") == before


def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(folder):
    out = folder / "diverged"
    status, _, err = command(*options(folder), "--lr-max", 1e9, "--out", out)
    assert status == 2 and err.count("\n") == 1 and "try --lr-max" in err, err
    kept = model.restore(out / "checkpoint.pt", *train.CHECKPOINT)
    assert all(math.isfinite(row["loss"]) for row in kept["history"])
    assert all(tensor.isfinite().all() for tensor in kept["average"].values())


def test_weights_that_are_not_finite_after_the_last_step_of_an_epoch_stop_the_run(folder):
    """No loss has shown them yet, and they would be saved over the last good ones."""
    out, train_epoch = folder / "broken", train.train_epoch

    def break_second(schedule, loader, seed, epoch, step, model, average):
        result = train_epoch(schedule, loader, seed, epoch, step, model, average)
        if epoch == 1:
            model.fc.bias.data[2] = math.nan
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", break_second)
        status, _, err = command(*options(folder), "--out", out)
    assert status == 2 and err.count("\n") == 1 and "holds epoch 1" in err, err
    kept = model.restore(out / "checkpoint.pt", *train.CHECKPOINT)
    assert len(kept["history"]) == 1 and all(t.isfinite().all() for t in kept["model"].values())


def test_the_range_test_alone_refuses_bad_options_in_one_line():
    for arguments in (["--steps", "many"], ["--steps", "5"], ["--seed", "-1"], ["--warmup"]):
        done = python("import sys, lrfinder, model; model.run(lrfinder.main)", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert arguments[0] in done.stderr and not done.stdout


@pytest.mark.parametrize("module, name", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_full_disk_leaves_the_last_whole_checkpoint(tmp_path, monkeypatch, module, name):
    model.save(tmp_path / "checkpoint.pt", {"epoch": 1})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(model.UserError, match="No space left"):
        model.save(tmp_path / "checkpoint.pt", {"epoch": 2})
    assert model.restore(tmp_path / "checkpoint.pt", "epoch") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_100_truncations_and_100_flipped_bytes_never_go_unnoticed(tmp_path):
    """Of a checkpoint and an .npz: an error, or, in bytes that mean nothing, the right content."""
    rng, path = np.random.default_rng(0), tmp_path / "file.npz"
    own = {name: array[:4] for name, array in small_arrays().items()}
    weights = {"settings": {"seed": 1}, "weights": torch.arange(500.0)}
    model.save(tmp_path / "file.pt", weights)
    np.savez(path, **own)
    good = digest(data.load(path))
    errors = 0
    for name in ("file.pt", "file.npz"):
        content = (tmp_path / name).read_bytes()
        for k in range(200):
            broken = bytearray(content)
            if k < 100:
                broken = broken[:rng.integers(len(content))]
            else:
                broken[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(broken)
            try:
                if name == "file.npz":
                    assert digest(data.load(path)) == good
                else:
                    read = model.restore(tmp_path / name, *weights)
                    assert read["settings"] == {"seed": 1}
                    assert torch.equal(read["weights"], weights["weights"])
            except model.UserError as error:
                assert "\n" not in str(error)
                errors += 1
    assert errors > 300                           # 200 truncations, and most of the flips


def test_a_gpu_that_triton_cannot_serve_means_plain_torch_said_once(monkeypatch, capsys):
    def old(*arguments):
        raise RuntimeError("compute capability 5.2 is not supported\nand more lines")

    monkeypatch.setattr(data, "fused_augment", old)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)     # there is no GPU here
    for _ in range(2):
        assert data.pick_augment(torch.device("cuda:7"), torch.float16) is data.augment
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "compute capability 5.2" in err


def test_a_gpu_without_memory_is_one_line_that_tells_what_to_try(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more lines")

    with pytest.raises(SystemExit, match="2"):
        model.run(full)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--batch-size" in err


def test_help_names_every_option():
    status, out, _ = command("-h")
    assert status == 0
    for name in ("data", "data-dir", "epochs", "batch-size", "lr-max", "peak-epoch", "seed", "runs",
                 "out", "resume"):
        assert re.search(rf"^  --{name} \S+", out, re.MULTILINE), name
