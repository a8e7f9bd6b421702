"""Import what only figures, tables and data sets need, or say how to install it."""

import importlib
from types import ModuleType


def require(module: str, purpose: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: Dotted name of the module, such as ``"matplotlib.pyplot"``.
        purpose: What it is needed for, as it completes "... needs it for".

    Returns:
        The module.

    Raises:
        ImportError: If the module is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise ImportError(
            f"relubook needs {missing!r} for {purpose}, and it is not installed: "
            'pip install "relubook[figures]"',
            name=missing,
        ) from error
