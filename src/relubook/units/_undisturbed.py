"""Run a model without a trace."""

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s and the data-parallel wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(
            model, nn.DataParallel | torch.nn.parallel.DistributedDataParallel
        ) and isinstance(model.module, nn.Module):
            model = model.module
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` has been applied to the model or to a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forward passes of a model and leave no trace, whatever happens inside.

    Turns off gradients, autocast's cache, the fused path of ``nn.TransformerEncoderLayer`` and
    ``torch.compile``; restores these, each module's training flag, all buffers, and the random
    state of Python, NumPy (if imported), torch, and the accelerators in use.

    Args:
        model: The model.

    Raises:
        RuntimeError: If a part of the model is compiled and torch is older than 2.6, which cannot
            switch to eager execution.
    """
    training = [  # a frozen scripted module has no such flag
        (module, module.training) for module in model.modules() if hasattr(module, "training")
    ]
    buffers: list[tuple[nn.Module | None, str, Tensor | None, Tensor | None]] = []
    for module in model.modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        held = module.named_buffers(recurse=False) if scripted else module._buffers.items()
        for name, buffer in held:
            copy = None if buffer is None else buffer.clone()
            buffers.append((None if scripted else module, name, buffer, copy))
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if cuda else ()
    mps = torch.backends.mps.is_available()
    mps_state = torch.mps.get_rng_state() if mps else None
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cached = torch.is_autocast_cache_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it is slow
            pass
        elif hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        elif is_compiled(model):
            raise RuntimeError(
                "a part of the model is compiled, and this torch cannot run it eagerly: "
                "use torch 2.6 or newer, or the model as it was before torch.compile"
            )
        if cuda and any(
            isinstance(module, nn.RNN) and module.nonlinearity == "relu"
            for module in model.modules()
        ):  # cuDNN's fused kernel hides the rectifier
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
            for owner, name, buffer, copy in buffers:
                if owner is not None:
                    owner._buffers[name] = buffer
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)
            random.setstate(python_state)
            if numpy is not None and numpy_state is not None:
                numpy.random.set_state(numpy_state)
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
