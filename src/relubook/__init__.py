"""The package behind The ReLU Book: find dead units, date their death, bring them back.

Public names load their module on first use, so that ``import relubook`` is quick and a chapter
depends on just the modules it uses.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Activation": "layers.activations",
    "Maxout": "layers.maxout",
    "Recipe": "training.stack",
    "Report": "units.diagnosis",
    "Watch": "units.watch",
    "activation": "layers.activations",
    "activation_names": "layers.activations",
    "certify_dead": "units.certificate",
    "claim": "evidence.claims",
    "diagnose": "units.diagnosis",
    "revive_": "units.revival",
    "setup": "book",
    "train_many": "training.train",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"relubook.{_HOME[name]}"), name)
    raise AttributeError(f"module 'relubook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
