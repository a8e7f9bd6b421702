"""Training many networks: a loop over plain networks, ours, torch.func.vmap and JAX, side by side.

Adam, batches of 128 in an order of each network's own, the same data, the same threads. One round
times every contestant once, in turn; a ratio is the median of the rounds' ratios. The loop is timed
on some of the networks and counted for all, which favors neither side: its time is proportional to
their number.

    python -m benchmarks.stacked_training [--threads 1] [--growth]

``--growth`` measures how the cost of a step grows with members, depth and width instead, and
writes stacked_training.json and stacked_training.svg beside this file.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relubook.training.stack import Recipe
from relubook.training.train import batch_order, train_many

BATCH, EXAMPLES, RATE = 128, 1024, 1e-3
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Work:
    name: str
    recipe: Recipe
    members: int
    bar: float
    looped: int

    def data(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(EXAMPLES, self.recipe.inputs, generator=g)
        if self.recipe.outputs == 1:
            return x, x.abs()
        return x, torch.randint(self.recipe.outputs, (EXAMPLES,), generator=g)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.recipe.outputs == 1 else F.cross_entropy

    @property
    def products(self) -> float:
        """Floating point operations of a step's matrix products, all members."""
        maps = self.recipe.maps
        forward_and_weights = sum(2 * 2 * ins * outs for ins, outs in maps)
        inputs = sum(2 * ins * outs for ins, outs in maps[1:])
        return float(BATCH * self.members * (forward_and_weights + inputs))

    @property
    def traffic(self) -> float:
        """Least bytes a step moves if only whole layers are fused: activations and gradients.

        Forward, a layer reads its input and writes its output; backward, it reads output, input
        and gradient and writes a gradient. Adam reads four numbers a parameter and writes three.
        """
        maps = self.recipe.maps
        units = sum(3 * ins + 3 * outs for ins, outs in maps)
        parameters = sum((ins + 1) * outs for ins, outs in maps)
        return 4.0 * self.members * (BATCH * units + 8 * parameters)


WORKS = {
    "a": Work("1000 networks 1-2x9-1", Recipe(1, 2, 1, depth=10), 1000, 60.0, 12),
    "b": Work("100 networks 64-32x4-10", Recipe(64, (32,) * 4, 10), 100, 10.0, 12),
    "c": Work("30 networks 64-64x9-10", Recipe(64, (64,) * 9, 10), 30, 5.0, 8),
}


def plain(recipe: Recipe, seed: int) -> nn.Sequential:
    network = recipe.single(seed)
    assert isinstance(network, nn.Sequential)
    return network


def loop(work: Work, steps: int) -> Callable[[], float]:
    """Time a step of all networks, one after the other, as anybody would write it."""
    x, y = work.data()
    trained = []
    for seed in range(work.looped):
        network = plain(work.recipe, seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
        trained.append((network, optimizer, batch_order(seed, EXAMPLES, BATCH, steps)))

    def run() -> float:
        start = time.perf_counter()
        for network, optimizer, order in trained:
            for batch in order:
                optimizer.zero_grad()
                work.loss(network(x[batch]), y[batch]).backward()
                optimizer.step()
        return (time.perf_counter() - start) / steps / work.looped * work.members

    return run


def ours(work: Work, steps: int) -> Callable[[], float]:
    """Time a step in the middle of a run: from the schedule's first call to its last."""
    x, y = work.data()

    def run() -> float:
        clock = []

        def schedule(step: int) -> float:
            clock.append(time.perf_counter())
            return 1.0

        train_many(
            work.recipe, x, y, seeds=work.members, steps=steps + 1, lr=RATE, batch_size=BATCH,
            record=[], schedule=schedule, progress=False,
        )  # fmt: skip
        return (clock[-1] - clock[0]) / steps

    return run


def vmapped(work: Work, steps: int) -> Callable[[], float]:
    """Time a step through torch.func: stack_module_state, vmap over grad, Adam on the stack."""
    x, y = work.data()
    networks = [plain(work.recipe, seed) for seed in range(work.members)]
    parameters, buffers = torch.func.stack_module_state(networks)
    skeleton = plain(work.recipe, 0).to("meta")
    orders = torch.stack([batch_order(s, EXAMPLES, BATCH, steps) for s in range(work.members)], 1)

    def loss(parameters, buffers, x, y):
        return work.loss(torch.func.functional_call(skeleton, (parameters, buffers), (x,)), y)

    gradient = torch.func.vmap(torch.func.grad(loss))
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE)

    def run() -> float:
        start = time.perf_counter()
        for batch in orders:
            grads = gradient(parameters, buffers, x[batch], y[batch])
            for name, parameter in parameters.items():
                parameter.grad = grads[name]
            optimizer.step()
        return (time.perf_counter() - start) / steps

    return run


def jaxed(work: Work, steps: int) -> Callable[[], float]:
    """Time a step through JAX: vmap over value and gradient, Adam by hand, one jit for all."""
    import jax
    import jax.numpy as jnp

    x, y = (jnp.asarray(part.numpy()) for part in work.data())
    networks = [plain(work.recipe, seed) for seed in range(work.members)]
    layers = [name for name, module in networks[0].named_children() if "linear" in name]
    parameters = [
        tuple(
            jnp.asarray(torch.stack([getattr(getattr(n, name), k) for n in networks]).detach())
            for k in ("weight", "bias")
        )
        for name in layers
    ]
    orders = torch.stack([batch_order(s, EXAMPLES, BATCH, steps) for s in range(work.members)], 1)
    batches = [jnp.asarray(batch.numpy()) for batch in orders]
    squared = work.recipe.outputs == 1

    def loss(parameters, x, y):
        for weight, bias in parameters[:-1]:
            x = jnp.maximum(x @ weight.T + bias, 0)
        weight, bias = parameters[-1]
        out = x @ weight.T + bias
        if squared:
            return jnp.mean((out - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1))

    def step(parameters, first, second, count, batch):
        grads = jax.vmap(jax.grad(loss))(parameters, x[batch], y[batch])
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
        a, b = 1 - 0.9**count, 1 - 0.999**count
        parameters = jax.tree.map(
            lambda p, m, v: p - RATE * (m / a) / (jnp.sqrt(v / b) + 1e-8),
            parameters,
            first,
            second,
        )
        return parameters, first, second

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    state = (
        parameters,
        jax.tree.map(jnp.zeros_like, parameters),
        jax.tree.map(jnp.zeros_like, parameters),
    )
    state = jax.block_until_ready(step(*state, 1.0, batches[0]))

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        for count, batch in enumerate(batches, 1):
            state = step(*state, float(count), batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    return run


def median_time(run: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def product_rate() -> float:
    """Floating point operations a second of a large matrix product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    return 2 * 1024**3 / median_time(lambda: torch.mm(a, b, out=out))


def bandwidth() -> float:
    """Bytes a second that a copy of far more than the caches reads and writes."""
    a = torch.ones(2**25)
    b = torch.empty_like(a)
    return 8 * 2**25 / median_time(lambda: b.copy_(a))


@contextlib.contextmanager
def threads_set(threads: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def peak_memory(row: str, threads: int) -> float:
    """Return the peak of a fresh process that imports everything and trains, in bytes."""
    code = (
        "import torch; from benchmarks import stacked_training as b;"
        f"torch.set_num_threads({threads}); b.ours(b.WORKS[{row!r}], 10)(); print(b.high_water())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    return int(run.stdout)


def high_water() -> int:
    """Return the largest memory that this process has held, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        # Not getrusage: it starts from what the parent held.
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def contestants() -> dict[str, Callable[[Work, int], Callable[[], float]]]:
    found = {"loop": loop, "ours": ours, "vmap": vmapped}
    if importlib.util.find_spec("jax") is not None:
        found["jax"] = jaxed
    return found


def measure(work: Work, rounds: int = 7, steps: int = 8) -> dict[str, list[float]]:
    """Time every contestant once a round, in turn; seconds a step of all members."""
    runs = {name: make(work, steps) for name, make in contestants().items()}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return times


def ratio(times: dict[str, list[float]], other: str) -> float:
    return statistics.median(o / u for o, u in zip(times[other], times["ours"], strict=True))


def better_threads() -> int:
    """Return 1 or 2: what suits the machine as it is now, for all contestants alike.

    Two threads are twice as fast on two idle cores, and many times slower on two busy ones.
    """
    found = {}
    for count in (1, min(2, torch.get_num_threads())):
        with threads_set(count):
            run = ours(WORKS["c"], 6)
            run()
            found[count] = statistics.median(run() for _ in range(5))
    return min(found, key=lambda count: found[count])


def benchmarks(threads: int | None = None, rounds: int = 7) -> list[dict[str, Any]]:
    threads = threads or better_threads()
    if threads == 1:
        # Read by JAX when it is first imported.
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    entries = []
    with threads_set(threads) as used:
        for row, work in WORKS.items():
            limits = {"products": product_rate(), "traffic": bandwidth()}
            times = measure(work, rounds)
            # The better of before and after: a limit is what the machine can do undisturbed.
            limits = {
                "products": max(limits["products"], product_rate()),
                "traffic": max(limits["traffic"], bandwidth()),
            }
            typical = {name: statistics.median(values) for name, values in times.items()}
            kind = "traffic" if row == "a" else "products"
            least = (work.traffic if row == "a" else work.products) / limits[kind]
            memory = peak_memory(row, used)
            extra = {
                "threads": used,
                "milliseconds": {name: round(1e3 * value, 3) for name, value in typical.items()},
                "limit": kind,
                "limit_milliseconds": round(1e3 * least, 3),
                "times_the_limit": round(typical["ours"] / least, 2),
                "peak_memory_mib": round(memory / 2**20),
            }
            value = ratio(times, "loop")
            entries.append(
                {
                    "name": f"{work.name}: loop / ours",
                    "ratio": value,
                    "bar": work.bar,
                    "holds": value >= work.bar,
                }
                | extra
            )
            rivals = [name for name in times if name not in ("loop", "ours")]
            value = min(ratio(times, name) for name in rivals)
            entries.append(
                {
                    "name": f"{work.name}: fastest of {', '.join(rivals)} / ours",
                    "ratio": value,
                    "bar": 0.9,
                    "holds": value >= 0.9,
                }
            )
            if row == "a":
                room = 2 * 2**30 / max(memory, 1)
                entries.append(
                    {
                        "name": f"{work.name}: 2 GiB / peak memory",
                        "ratio": room,
                        "bar": 1.0,
                        "holds": room >= 1.0,
                    }
                )
    return entries


def growth(threads: int = 1, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure milliseconds a step along members, depth and width, ours and the loop."""
    cases = [("members", m, 2, 10) for m in (10, 30, 100, 300, 1000, 3000)]
    cases += [("depth", 300, 2, d) for d in (2, 5, 10, 20, 40)]
    cases += [("width", 100, w, 6) for w in (2, 3, 4, 8, 16, 32, 64, 128)]
    rows = []
    with threads_set(threads) as used:
        for along, members, width, depth in cases:
            work = Work("", Recipe(1, width, 1, depth=depth), members, 0.0, min(members, 4))
            times: dict[str, list[float]] = {"loop": [], "ours": []}
            runs = {"loop": loop(work, 4), "ours": ours(work, 6)}
            for _ in range(rounds):
                for name, run in runs.items():
                    times[name].append(run())
            rows.append(
                {
                    "along": along,
                    "members": members,
                    "width": width,
                    "depth": depth,
                    "threads": used,
                    "ours_ms": 1e3 * statistics.median(times["ours"]),
                    "loop_ms": 1e3 * statistics.median(times["loop"]),
                }
            )
    return rows


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how the cost of a step grows, ours solid, the loop dashed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams |= {"svg.hashsalt": "relubook", "svg.fonttype": "none"}
    panels, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
    fixed = {
        "members": "width 2, depth 10",
        "depth": "300 members, width 2",
        "width": "100 members, depth 6",
    }
    for ax, along in zip(axes, fixed, strict=True):
        chosen = [row for row in rows if row["along"] == along]
        for key, style, label in (("loop_ms", "--s", "loop"), ("ours_ms", "-o", "stacked")):
            ax.loglog([r[along] for r in chosen], [r[key] for r in chosen], style, label=label)
        ax.set_xlabel(along)
        ax.set_title(fixed[along], fontsize="medium")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds a step, all members")
    axes[0].legend()
    panels.savefig(path, metadata={"Date": None})
    plt.close(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--growth", action="store_true")
    options = parser.parse_args()
    if options.growth:
        rows = growth(options.threads or 1)
        (HERE / "stacked_training.json").write_text(json.dumps(rows, indent=1) + "\n")
        figure(rows, HERE / "stacked_training.svg")
        return
    for entry in benchmarks(options.threads, options.rounds):
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
