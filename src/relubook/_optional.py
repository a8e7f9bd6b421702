"""Import what only some uses need, or say how to install it."""

import importlib
from types import ModuleType


def require(module: str, purpose: str, extra: str = "figures") -> ModuleType:
    """Return a module by its dotted name; if it is missing, ImportError names the extra.

    The purpose completes the words "needs it for".
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(
            f"relubook needs {missing!r} for {purpose}, and it is not installed: "
            f'pip install "relubook[{extra}]"',
            name=missing,
        ) from error
