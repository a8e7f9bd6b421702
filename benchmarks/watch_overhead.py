"""Cost of a training step with `Watch`, and of `diagnose`, over the same without.

Every figure is a median of ratios: the two variants run alternately, a few steps each, in one
process and with one thread, so that other load on the machine falls on both. What is compared is
the processor time of the process.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from relubook.units.diagnosis import diagnose
from relubook.units.watch import Watch


class Block(nn.Module):
    """The basic block of a ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet18(width: int = 32) -> nn.Module:
    """Build the 18-layer residual network of He et al. 2016 for 32 x 32 images, half as wide."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def mlp(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, float]] = {
    # name: builder, shape of a batch, steps per turn, bar
    "MLP of width 64": (lambda: mlp(64), (128, 64), 20, 1.20),
    "MLP of width 512": (lambda: mlp(512), (128, 64), 6, 1.05),
    "small convolutional network": (convnet, (32, 3, 32, 32), 3, 1.05),
    "ResNet-18 shape": (resnet18, (8, 3, 32, 32), 1, 1.05),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@contextlib.contextmanager
def storing_hooks(model: nn.Module) -> Iterator[None]:
    """A rival: keep each rectifier's output of the last step."""
    stored: dict[nn.Module, Tensor] = {}

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        stored[module] = out.detach().clone()

    yield from _hooked(model, hook)


@contextlib.contextmanager
def zero_hooks(model: nn.Module) -> Iterator[None]:
    """A rival: average the share of zeros of each rectifier."""
    shares: dict[nn.Module, float] = {}

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        share = (out == 0).float().mean().item()
        shares[module] = 0.99 * shares.get(module, share) + 0.01 * share

    yield from _hooked(model, hook)


def _hooked(model: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ratio(plain: Callable[[], None], other: Callable[[], None], seconds: float) -> float:
    """Return the median over turns of other's processor time over plain's, in turns."""
    plain()
    other()
    ratios = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 9:
        times = {}
        pair = (plain, other) if len(ratios) % 2 else (other, plain)
        for run in pair:
            start = time.process_time()
            run()
            times[run] = time.process_time() - start
        ratios.append(times[other] / times[plain])
    return statistics.median(ratios)


def _training(name: str, around: Callable[[nn.Module], Any], seconds: float) -> float:
    build, shape, steps, _ = MODELS[name]
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    runs = []
    with contextlib.ExitStack() as stack:
        for watched in (False, True):
            torch.manual_seed(0)
            model = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            if watched:
                stack.enter_context(around(model))

            def run(model: nn.Module = model, optimizer: Any = optimizer) -> None:
                for _ in range(steps):
                    step(model, optimizer, x, y)

            runs.append(run)
        return ratio(runs[0], runs[1], seconds)


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

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (_, _, _, bar) in MODELS.items():
            add(f"training step with Watch, {name}", _training(name, Watch, seconds), bar)
        for name in MODELS:
            for label, hooks in (
                ("a hook that stores activations", storing_hooks),
                ("a hook that averages zeros", zero_hooks),
            ):
                add(f"training step with {label}, {name}", _training(name, hooks, seconds / 3))
        for name in MODELS:
            add(f"diagnose over a forward pass, {name}", _diagnosis(name, seconds / 3))
        for name in MODELS:
            add(f"bytes per unit and site of Watch, {name}", _memory(name), 16.0)
    finally:
        torch.set_num_threads(threads)
    return results


def _diagnosis(name: str, seconds: float) -> float:
    build, shape, steps, _ = MODELS[name]
    model = build().eval()
    batches = [torch.randn(shape) for _ in range(3 * steps)]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return ratio(plain, lambda: void(diagnose(model, batches)), seconds)


def void(value: object) -> None:
    """Drop a value."""


def _memory(name: str) -> float:
    build, shape, _, _ = MODELS[name]
    model = build()
    with Watch(model) as watch:
        model(torch.randn(shape))
        watch_units = sum(site.units for site in watch._sites)
    return watch.nbytes() / watch_units


if __name__ == "__main__":
    for entry in benchmarks():
        bar = "" if entry["bar"] is None else f"  (at most {entry['bar']}: {entry['holds']})"
        print(f"{entry['ratio']:7.3f}  {entry['name']}{bar}")
