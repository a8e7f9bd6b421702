"""Names as their users spell them, and the options that a function takes."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def canonical(name: str) -> str:
    """Return a name without case and separators: ``"LeakyReLU"`` equals ``"leaky_relu"``."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")


def nearest(wrong: str, known: Iterable[str]) -> str:
    """Return words that name the known spellings closest to a wrong one."""
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wrong.lower(), spelled, cutoff=0.4)
    return "the nearest known: " + ", ".join(spelled[name] for name in close or spelled)


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature; for torch's builtins, which hide theirs, a tolerant one."""
    try:
        return inspect.signature(function)
    except ValueError:
        return inspect.signature(lambda *tensors, **options: None)


def check_options(
    owner: str, function: Callable[..., Any], options: Mapping[str, Any], tensors: int
) -> None:
    """Raise unless ``function(*tensors, **options)`` is a call and the numbers are finite."""
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} of {owner} must be a finite number, not {value!r}")
    signature = signature_of(function)
    try:
        signature.bind(*[None] * tensors, **options)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[tensors:]) or "no options"
        raise TypeError(f"{owner}: {error}; it takes {known}") from None
