"""How fast each part is, always beside something to compare with, in one run.

    python -m docs.benchmark kernel loader step command t4    (or some of these; -h)

    kernel    augmentation of an epoch and of a batch beside a copy of as many bytes (CUDA)
    loader    an epoch of batches beside torchvision's transforms in two workers, and, with
              --airbench FILE, beside the CifarLoader of that file (CUDA)
    step      a training step launched by Python, as a graph, and compiled (CUDA)
    command   python train.py as a user starts it: the parts of its start, then a time for each line
    t4        python train.py as a GPU without bf16 and without Triton would run it

Medians, with minimum and maximum where a row has three figures.
"""
import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

from data import (PAD, SIZE, Loader, augment, draw_epoch, fused_augment, load, normalisation)
from model import make_model, make_optimizer, make_scaler, pick_device, precision


def times(work, repeat):
    """Seconds of work(), GPU included: median, minimum, maximum of `repeat` calls after one."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    work()
    seconds = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds), max(seconds)


def kernel(data, device):
    from triton.testing import do_bench
    images = data.train_images.to(device)
    images = images.repeat(50_000 // len(images) + 1, 1, 1, 1)[:50_000].contiguous()
    mean, inverse_std = (v.to(device) for v in normalisation(data.train_images))
    draws, dtype = draw_epoch(50_000, 0, 0).to(device), precision(device)
    moved = SIZE * SIZE * 3 * (1 + dtype.itemsize)                # bytes an image, in and out
    source, target = torch.ones(2, 50_000 * moved // 2, dtype=torch.uint8, device=device)
    batch = draws[:512]
    compiled = torch.compile(augment)

    def row(name, work, images_done):
        median, low, high = (1e3 * t for t in do_bench(work, quantiles=[0.5, 0.1, 0.9]))
        print(f"{name:44}{median:9.1f} us ({low:.1f}, {high:.1f})"
              f"{images_done * moved / median / 1e3:8.0f} GB/s", flush=True)
        return median

    copy = row("copy of an epoch's bytes", lambda: target.copy_(source), 50_000)
    ours = row("kernel, an epoch of 50,000", lambda: fused_augment(
        images, draws, mean, inverse_std, dtype), 50_000)
    print(f"{'':44}{copy / ours:9.1%} of the copy")
    arguments = images, batch, mean, inverse_std, dtype
    row("kernel, a batch of 512, launched by Python", lambda: fused_augment(*arguments), 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for part in draws.split(512)[:20]:
            fused_augment(images, part, mean, inverse_std, dtype)
    median = 1e3 * do_bench(graph.replay, return_mode="median") / 20
    print(f"{'kernel, a batch of 512, in a graph of 20':44}{median:9.2f} us")
    row("plain torch, a batch of 512", lambda: augment(*arguments), 512)
    row("plain torch, torch.compile, a batch of 512", lambda: compiled(*arguments), 512)


def loader(data, device, airbench):
    ours = Loader(data, 512, precision(device), device)
    epoch, count = iter(range(1000)), len(ours) * 512

    def exhaust(batches):
        for _ in batches:
            pass

    ours_median = None

    def row(name, work, repeat):
        nonlocal ours_median
        median, low, high = times(work, repeat)
        ours_median = ours_median or median
        print(f"{name:36}{1e3 * median:10.2f} ms ({1e3 * low:.2f}, {1e3 * high:.2f})"
              f"{count / median:14,.0f} images/s{median / ours_median:10.2f} x", flush=True)

    row("this loader", lambda: exhaust(ours.epoch(0, next(epoch))), 15)
    row("its table of random numbers",
        lambda: draw_epoch(len(ours.train_images), 0, next(epoch)).to(device), 15)
    if device.type == "cuda" and airbench:
        spec = importlib.util.spec_from_file_location("airbench", airbench)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        theirs = module.airbench_epoch(data.train_images.numpy(), data.train_labels.numpy())
        row("airbench's CifarLoader", theirs, 15)
    row("torchvision's transforms, 2 workers", lambda: exhaust(torchvision_loader(data)), 1)


def transform_each(transform, images):
    return torch.stack([transform(image) for image in images])


def torchvision_loader(data):
    """A like augmentation, an image at a time, as torchvision's users do it."""
    from torch.utils.data import DataLoader
    from torchvision.transforms import v2
    mean, inverse_std = normalisation(data.train_images)
    transform = v2.Compose([
        v2.RandomCrop(SIZE, PAD, padding_mode="reflect"), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32), v2.Normalize(mean.tolist(), (1 / inverse_std).tolist()),
        v2.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1))])
    return DataLoader(data.train_images.permute(0, 3, 1, 2), 512, shuffle=True, num_workers=2,
                      drop_last=True, collate_fn=partial(transform_each, transform))


def step(data, device):
    import train
    ours = Loader(data, 512, precision(device), device)
    batch = next(ours.epoch(0, 0))

    def series(name, graph=True, compiled=False):
        net = make_model(device)
        average = make_model(device)
        if compiled:
            net.compile()
        record = train.as_graph
        train.as_graph = record if graph else lambda step: step
        go = train.make_step(net, make_optimizer(net), make_scaler(device))
        train.as_graph = record
        start = time.perf_counter()
        for _ in range(5):
            go(*batch)
        torch.cuda.synchronize()
        ready = time.perf_counter() - start

        def forty():
            for k in range(40):
                go(*batch)
                train.update_average(average, net, k)
        median, low, high = (1e3 * t / 40 for t in times(forty, 5))
        print(f"{name:36}{median:8.2f} ms ({low:.2f}, {high:.2f}), ready after {ready:.1f} s",
              flush=True)

    series("launched by Python", graph=False)
    series("a CUDA graph: train.py's")
    series("a CUDA graph, network compiled", compiled=True)


def command(arguments, code=None):
    """Run the command and print its lines, each with the seconds since its start."""
    start = time.perf_counter()
    program = ["-c", code] if code else ["train.py"]
    process = subprocess.Popen([sys.executable, "-u", *program, *arguments], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        print(f"{time.perf_counter() - start:6.1f} s  {line}", end="", flush=True)
    process.wait()
    print(f"{time.perf_counter() - start:6.1f} s  done, status {process.returncode}", flush=True)


START = """
import sys
print("Python")
import torch
print("import torch")
import data, model, train
print("import train")
import torchvision.datasets
print("import torchvision.datasets")
device = model.pick_device()
torch.zeros(1, device=device)
print("the device's first tensor")
images = data.load(sys.argv[1], sys.argv[2])
print("images read")
data.Loader(images, 512, model.precision(device), device)
print("the loader, with its kernel")
"""

T4 = """
import torch
torch.cuda.is_bf16_supported = lambda including_emulation=True: False
import data, train
data.triton = None
train.main()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", choices=("kernel", "loader", "step", "command", "t4"))
    parser.add_argument("--data", default="auto")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--airbench", help="a file with airbench_epoch(images, labels)")
    args = parser.parse_args()
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {precision(device)}", flush=True)
    where = ["--data", args.data, "--data-dir", args.data_dir]
    data = load(args.data, args.data_dir) if {"kernel", "loader", "step"} & {*args.parts} else None
    for part in args.parts:
        print(f"\n{part}", flush=True)
        if part in ("kernel", "step") and device.type != "cuda":
            print("needs a CUDA GPU")
        elif part == "kernel":
            kernel(data, device)
        elif part == "loader":
            loader(data, device, args.airbench)
        elif part == "step":
            step(data, device)
        elif part == "t4":
            command(where, T4)
        else:
            command([args.data, args.data_dir], START)
            print()
            command(where)


if __name__ == "__main__":
    main()
