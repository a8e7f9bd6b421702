"""The package behind The ReLU Book: find dead units, date their death, bring them back.

>>> import relubook as rb
>>> rb.activations.activation("leaky_relu")
LeakyReLU(negative_slope=0.01)

The names below load their module on first use, so that ``import relubook`` is quick and a chapter
depends on just the modules it uses. Everything else is imported from its room.
"""

import importlib
from typing import Any

__version__ = "0.3.0"

_HOME = {
    "Maxout": "layers.maxout",
    "Recipe": "training.recipe",
    "Reviver": "units.reviver",
    "Watch": "units.watch",
    "activations": "layers.activations",
    "certify_dead": "units.certificate",
    "claim": "evidence.claims",
    "diagnose": "units.diagnosis",
    "initializers": "layers.initializers",
    "off_center": "units.risk",
    "part": "evidence.claims",
    "revive_": "units.revival",
    "setup": "book",
    "show": "book",
    "train": "training.train",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'relubook' has no attribute {name!r}")
    home = importlib.import_module(f"relubook.{_HOME[name]}")
    return getattr(home, name, home)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
