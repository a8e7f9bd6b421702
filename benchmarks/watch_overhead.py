"""Cost of a training step with `Watch`, and of `diagnose`, over the same without.

Every ratio is a median of ratios of processor times: the two variants run alternately, a few
steps each, in one process and with one thread, so that other load on the machine falls on both.
A loaded machine still disturbs caches and clock, so it is named. The first call of `diagnose`, in a
process that has only imported torch, is given in seconds of processor time; and the growth of the
process over a million tokens, from the first tenth on, in MiB.
"""

import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units.diagnosis import diagnose
from relubook.units.watch import Watch


class Block(nn.Module):
    """The basic block of a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.one(x)))
        return self.relu(self.norm2(self.two(out)) + self.short(x))


def resnet18() -> nn.Module:
    """Build the 18-layer residual network of He et al. 2016 for 32 x 32 images, half as wide."""
    widths = (32, 64, 128, 256)
    blocks = [Block(32, 32, 1), Block(32, 32, 1)]
    for inputs, outputs in itertools.pairwise(widths):
        blocks += [Block(inputs, outputs, 2), Block(outputs, outputs, 1)]
    stem = (nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def mlp(width: int) -> nn.Module:
    hidden = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(2):
        hidden += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def convnet() -> nn.Module:
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    layers += (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(32 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float, float | None]] = {
    # name: builder, shape of a batch, steps per turn, bars of Watch and of diagnose
    "MLP of width 64": (lambda: mlp(64), (128, 64), 20, 1.10, None),
    "MLP of width 512": (lambda: mlp(512), (128, 64), 6, 1.02, 2.0),
    "small convolutional network": (convnet, (32, 3, 32, 32), 3, 1.02, 2.0),
    "ResNet-18 shape": (resnet18, (8, 3, 32, 32), 1, 1.02, 2.0),
}

FIRST = """
import time, torch
from torch import nn
model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), torch.randn(32, 3, 32, 32)
model(x)
start = time.process_time()
import relubook
relubook.diagnose(model, x)
print(time.process_time() - start)
"""

STREAM = """
import resource, torch
from relubook import diagnose
from torch import nn
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
size = resource.getpagesize() / 2**20
grown = 0.0
def tokens():  # sequences of different lengths, as texts are
    global grown
    seen = 0
    while seen < 1_000_000:
        length = 64 + seen % 97
        yield torch.randn(32, length, 64)
        before, seen = seen, seen + 32 * length
        held = int(open("/proc/self/statm").read().split()[1]) * size
        grown = held if before < 100_000 else max(grown, held)
        if before < 100_000:
            start = held
    grown -= start
diagnose(model, tokens())
print(grown)
"""


def ratio(plain: Callable[[], None], other: Callable[[], None], seconds: float) -> float:
    """Return the median over turns of other's processor time over plain's, in turns."""
    plain()
    other()
    ratios = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 9:
        times = {}
        for run in (plain, other) if len(ratios) % 2 else (other, plain):
            start = time.process_time()
            run()
            times[run] = time.process_time() - start
        ratios.append(times[other] / times[plain])
    return statistics.median(ratios)


def training(name: str, seconds: float) -> tuple[float, float]:
    """Return the ratio of a training step, and the bytes per unit that `Watch` holds.

    The ratio is the median of five pairs of models: where two of them lie in memory makes one the
    faster, by up to two percent.
    """
    pairs = [pair(name, seconds / 5) for _ in range(5)]
    return statistics.median(value for value, _ in pairs), pairs[0][1]


def pair(name: str, seconds: float) -> tuple[float, float]:
    """Return of one pair of models what `training` returns of five."""
    build, shape, steps, *_ = MODELS[name]
    x, y = torch.randn(shape), torch.randint(10, shape[:1])

    def trainer(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

        def run() -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

        return run

    watched = build()
    with Watch(watched) as watch:
        value = ratio(trainer(build()), trainer(watched), seconds)
        while watch.step < watch.window:
            watched(x)
        report = watch.compute()
        held = sum(s.peak.nbytes + s.dead.nbytes for s in (*watch._sites.values(), *report))
        held += sum(latest.nbytes for _, latest in watch._peaks.rows)
        return value, held / sum(site.units for site in report)


def diagnosis(name: str, seconds: float) -> float:
    build, shape, steps, *_ = MODELS[name]
    model = build().eval()
    batches = [torch.randn(shape) for _ in range(3 * steps)]

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            model(batch)

    return ratio(plain, lambda: void(diagnose(model, batches)), seconds)


def printed(code: str) -> float:
    """Return the number that a program prints in a process of its own, with one thread."""
    alone = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # gives memory back
    command, environment = [sys.executable, "-c", code], {**os.environ, **alone}
    return float(subprocess.check_output(command, env=environment, text=True))


def void(value: object) -> None:
    """Drop a value."""


def benchmarks(seconds: float = 6.0) -> list[dict[str, Any]]:
    """Measure everything.

    Args:
        seconds: Time to spend on each ratio.

    Returns:
        One dictionary per figure: ``name``, ``ratio``, ``bar`` (or ``None``) and ``holds``.
    """
    results: list[dict[str, Any]] = []

    def add(name: str, value: float, bar: float | None = None) -> None:
        holds = None if bar is None else value <= bar
        results.append({"name": name, "ratio": value, "bar": bar, "holds": holds})

    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"The machine is loaded: {load:.1f} processes run on its {cores} cores.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Keep freed memory: page faults, hundreds a step, would fall on either variant by chance.
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
    try:
        for name, (_, _, _, bar, bar_of_diagnose) in MODELS.items():
            value, size = training(name, seconds)
            add(f"training step with Watch, {name}", value, bar)
            add(f"bytes per unit and site of Watch, {name}", size, 16.0)
            value = diagnosis(name, seconds / 3)
            add(f"diagnose over a forward pass, {name}", value, bar_of_diagnose)
        add("first call of diagnose, seconds", statistics.median(map(printed, [FIRST] * 3)), 0.5)
        if sys.platform == "linux":
            add("growth of diagnose over a million tokens, MiB", printed(STREAM), 8.0)
    finally:
        torch.set_num_threads(threads)
    return results
