"""Run a model without a trace."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s and data-parallel wrappers; else TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forward passes of a model and leave no trace, whatever happens inside.

    Turns off gradients, autocast's cache, ``nn.TransformerEncoderLayer``'s fused path and compiled
    code; restores these, training flags, buffers, and random states, also of accelerators in use.
    """
    # A frozen scripted module has no flag; a scripted one's buffers can only be written to.
    training = [(part, part.training) for part in model.modules() if hasattr(part, "training")]
    buffers: list[tuple[dict[str, Any], str, Tensor | None, Tensor | None]] = []
    for module in model.modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        held: Any = dict(module.named_buffers(recurse=False)) if scripted else module._buffers
        for name, buffer in held.items():
            buffers.append((held, name, buffer, None if buffer is None else buffer.clone()))
    python_state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if cuda else ()
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        rnns = [module for module in model.modules() if isinstance(module, nn.RNN)]
        if cuda and any(module.nonlinearity == "relu" for module in rnns):
            # cuDNN's fused kernel hides the rectifier
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.no_grad())
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_autocast_cache_enabled(cached)
            for module, flag in training:
                module.training = flag
            for held, name, buffer, copy in buffers:
                held[name] = buffer
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
