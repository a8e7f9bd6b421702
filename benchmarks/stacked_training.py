"""Training many networks: a loop over plain networks, ours, torch.func.vmap and JAX, side by side.

Adam, batches of 128 in an order of each network's own, the same data, one thread. One round times
every contestant once, in turn, by processor time; a ratio is the median of the rounds' ratios. The
loop is timed on some of the networks and counted for all, since its time is proportional to their
number. Wide networks spend it on matrix products, which a loop computes nearly as fast: the bars
sink with the width. JAX takes part where it is installed.

    python -m benchmarks stacked_training
"""

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from relubook.evidence.statistics import median_interval
from relubook.evidence.timing import interleaved_seconds
from relubook.training.recipe import Recipe
from relubook.training.stack import batch_order
from relubook.training.train import train

BATCH, EXAMPLES, RATE, STEPS, ROUNDS = 128, 1024, 1e-3, 8, 9


@dataclass(frozen=True)
class Work:
    name: str
    recipe: Recipe
    members: int
    looped: int
    over_loop: float
    over_rivals: float

    def data(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(EXAMPLES, self.recipe.inputs, generator=g)
        if self.recipe.outputs == 1:
            return x, x.abs()
        return x, torch.randint(self.recipe.outputs, (EXAMPLES,), generator=g)

    def orders(self) -> Tensor:
        orders = [batch_order(s, EXAMPLES, BATCH, STEPS) for s in range(self.members)]
        return torch.stack(orders, 1)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.mse_loss if self.recipe.outputs == 1 else F.cross_entropy


WORKS = (
    Work("1000 networks 1-2x9-1", Recipe(1, 2, 1, hidden=9), 1000, 8, 60.0, 1.5),
    Work("100 networks 64-32x4-10", Recipe(64, 32, 10, hidden=4), 100, 8, 6.0, 1.1),
    Work("30 networks 64-64x9-10", Recipe(64, 64, 10, hidden=9), 30, 4, 4.0, 1.1),
)


def loop(work: Work) -> Callable[[], None]:
    """Train network after network, as anybody would write it."""
    x, y = work.data()
    networks = [work.recipe.single(seed) for seed in range(work.looped)]
    optimizers = [torch.optim.Adam(network.parameters(), lr=RATE) for network in networks]
    orders = work.orders()[:, : work.looped].transpose(0, 1)

    def run() -> None:
        for network, optimizer, order in zip(networks, optimizers, orders, strict=True):
            for batch in order:
                optimizer.zero_grad()
                work.loss(network(x[batch]), y[batch]).backward()
                optimizer.step()

    return run


def ours(work: Work) -> Callable[[], float]:
    """Return the time of the steps alone, from the end of the first on."""
    x, y = work.data()
    stack = work.recipe.stack(work.members)

    def run() -> float:
        clock: list[float] = []
        train(
            stack, x, y, steps=STEPS + 1, lr=RATE, batch_size=BATCH, record=[], progress=False,
            each_step=lambda *_: clock.append(time.process_time()),
        )  # fmt: skip
        return clock[-1] - clock[0]

    return run


def vmapped(work: Work) -> Callable[[], None]:
    """Train through torch.func: stack_module_state, vmap over grad, Adam on the stack."""
    x, y = work.data()
    networks = [work.recipe.single(seed) for seed in range(work.members)]
    parameters, buffers = torch.func.stack_module_state(networks)
    skeleton, orders = work.recipe.single(0).to("meta"), work.orders()

    def loss(parameters, buffers, x, y):
        return work.loss(torch.func.functional_call(skeleton, (parameters, buffers), (x,)), y)

    gradient = torch.func.vmap(torch.func.grad(loss))
    optimizer = torch.optim.Adam(parameters.values(), lr=RATE, fused=True)

    def run() -> None:
        for batch in orders:
            gradients = gradient(parameters, buffers, x[batch], y[batch])
            for name, parameter in parameters.items():
                parameter.grad = gradients[name]
            optimizer.step()

    return run


def jaxed(work: Work) -> Callable[[], None]:
    """Train through JAX: vmap over the gradient, Adam by hand, one jit for all."""
    # Read by JAX when it is first imported.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    import jax
    import jax.numpy as jnp

    x, y = (jnp.asarray(part.numpy()) for part in work.data())
    stack = work.recipe.stack(work.members)
    parameters = [
        tuple(jnp.asarray(value.detach().numpy()) for value in layer.parameters())
        for name, layer in stack.named_children()
        if name.startswith("linear")
    ]
    batches = [jnp.asarray(batch.numpy()) for batch in work.orders()]

    def loss(parameters, x, y):
        for weight, bias in parameters[:-1]:
            x = jnp.maximum(x @ weight + bias, 0)
        weight, bias = parameters[-1]
        out = x @ weight + bias
        if work.recipe.outputs == 1:
            return jnp.mean((out - y) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1))

    def step(parameters, first, second, count, batch):
        gradients = jax.vmap(jax.grad(loss))(parameters, x[batch], y[batch])
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradients)
        a, b = 1 - 0.9**count, 1 - 0.999**count
        parameters = jax.tree.map(
            lambda p, m, v: p - RATE * (m / a) / (jnp.sqrt(v / b) + 1e-8),
            parameters, first, second,
        )  # fmt: skip
        return parameters, first, second

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    zeros = [jax.tree.map(jnp.zeros_like, parameters) for _ in range(2)]
    state = (parameters, *zeros)

    def run() -> None:
        nonlocal state
        for count, batch in enumerate(batches, 1):
            state = step(*state, float(count), batch)
        jax.block_until_ready(state)

    return run


def measure(work: Work) -> dict[str, list[float]]:
    """Return seconds of all networks' steps by contestant, one number a round."""
    makers: dict[str, Callable[[Work], Callable[[], Any]]] = {"loop": loop, "vmap": vmapped}
    if importlib.util.find_spec("jax") is not None:
        makers["jax"] = jaxed
    runs = {name: make(work) for name, make in makers.items()}
    run, own = ours(work), []
    seconds = interleaved_seconds(runs | {"ours": lambda: own.append(run())}, repeats=ROUNDS)
    seconds["ours"] = own[1:]
    seconds["loop"] = [value * work.members / work.looped for value in seconds["loop"]]
    return seconds


def benchmarks() -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entries = []
    try:
        if (load := os.getloadavg()[0]) > 1:
            print(f"The machine is busy (load {load:.1f}): ratios hold, but less sharply.")
        for work in WORKS:
            seconds = measure(work)
            for rival in seconds.keys() - {"ours"}:
                pairs = zip(seconds[rival], seconds["ours"], strict=True)
                value = median_interval([theirs / mine for theirs, mine in pairs])[0]
                bar = work.over_loop if rival == "loop" else work.over_rivals
                name = f"{work.name}: {rival} / ours"
                entries.append({"name": name, "ratio": value, "bar": bar, "holds": value >= bar})
    finally:
        torch.set_num_threads(threads)
    return sorted(entries, key=lambda entry: entry["name"])
