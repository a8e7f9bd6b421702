"""The package behind The ReLU Book: find dead units, date their death, bring them back.

Public names load their module on first use, so that ``import relubook`` is quick and a chapter
depends on just the modules it uses.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Activation": "activations",
    "Maxout": "maxout",
    "Recipe": "stacked",
    "Report": "diagnosis",
    "Watch": "watch",
    "activation": "activations",
    "activation_names": "activations",
    "certify_dead": "certificate",
    "claim": "claims",
    "diagnose": "diagnosis",
    "revive_": "revival",
    "setup": "notebook",
    "train_many": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"relubook.{_HOME[name]}"), name)
    raise AttributeError(f"module 'relubook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
