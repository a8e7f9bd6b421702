"""What tells of deaths to come, in data and units, and what the book's chapters advise."""

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["off_center"]

OFF_CENTER = 0.2  # from here on a report says so: on digits hardly a unit dies of less
MANY = 0.1  # dead units, as a share: at Adam's best rate as many die, and cost nothing
ADVICE = {  # by the claim of the ledger that it rests on: its chapter, and what was found there
    "spine-centering": "How units die: the first batch lies off center, {:.2f}. Centered, layer 1"
    " lives at rates that kill most of it, but not where inputs are small beside the 1 of the bias",
    "spine-centered-born-alive": "Dead before the first step: silent since watching began: {:,}."
    " Center every layer and set biases to 0: centering the images alone is not enough",
    "tool-rare-are-next": "Diagnose your model: rare units, {:,} here, are at least twice as likely"
    " to die as others, but not at a rate too high, where anybody may die",
    "spine-no-cost-at-best": "The learning rate and the optimizer: at the best rate the dead are"
    " no cost",
    "tool-revive-recovers": "Diagnose your model: after a bad start revive_ once and go on at a "
    "good rate, which alone gains less, but to begin anew is better still",
    "spine-bound-decides": "Normalization: a high rate needs a bound, as by batch normalization or "
    "clipping, but in networks of eight layers clipping is not enough",
}


@torch.no_grad()
def off_center(data: Any) -> float:
    """Return how far data lie off center: ||mean||² / mean ||x||², from 0 to 1 (all inputs alike).

    The mean is a bias that learns 1 + ||mean||² times as fast as the bias itself, so that one step
    can push all inputs of a unit below 0 (chapter *How units die*): subtract it from each feature.
    The ratio does not depend on the scale; for n independent inputs without a mean it is about 1/n.

    ``data`` are floats or uint8 of shape (inputs, ...), each place a feature: a tensor, an array,
    or an iterable of such batches, alone or first in a tuple or list. They are read once, in
    float64; torch's random state stays. TypeError if they are of another kind or type, such as
    token ids; ValueError if there is no input, if shapes differ, or at NaN or infinity.

    >>> off_center(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    0.5
    """
    single, refused = hasattr(data, "__array__"), isinstance(data, Dataset | Mapping | str)
    if refused or not (single or isinstance(data, Iterable)):
        raise TypeError(f"data is a {type(data).__name__}, not a tensor, an array or a loader")
    total, square, inputs, shape = torch.zeros(()), 0.0, 0, None
    with torch.random.fork_rng([]):
        for index, batch in enumerate([data] if single else data):
            x = batch[0] if type(batch) in (tuple, list) and batch else batch
            if not isinstance(x, Tensor) and hasattr(x, "__array__"):
                x = torch.tensor(x.__array__())
            if not isinstance(x, Tensor) or not (x.is_floating_point() or x.dtype == torch.uint8):
                kind = getattr(x, "dtype", type(x).__name__)
                raise TypeError(f"batch {index} holds {kind}, not floating-point numbers or uint8")
            if x.ndim < 2 or x.shape[1:] != (shape or x.shape[1:]):
                rest = ", ".join(map(str, shape or ["features"]))
                raise ValueError(f"batch {index} has shape {tuple(x.shape)}, not (inputs, {rest})")
            shape, x = x.shape[1:], x.to("cpu", torch.double).flatten(1)
            total, square = total + x.sum(0), square + float(x.square().sum())
            inputs += len(x)
            if not math.isfinite(square):
                raise ValueError(f"batch {index} holds NaN, infinity, or numbers too large")
    if not inputs:
        raise ValueError("data holds no input, or is an exhausted iterator: pass a list of batches")
    return float(total.square().sum()) / inputs / max(square, sys.float_info.min)


def near_cliff(peak: Tensor, living: Tensor) -> Tensor:
    """Return which tenth of the living units, rounded up, has the lowest peaks: (units,)."""
    order = peak.masked_fill(~living, torch.inf).argsort(stable=True)
    return torch.zeros_like(living).index_fill(0, order[: -(-int(living.sum()) // 10)], True)


def advice(report: Any) -> list[str]:
    """Return what the book advises on what a report of ``diagnose`` or ``Watch`` found."""

    def total(state: str) -> int:
        sites = (site for site in report if site.silences and hasattr(site, state))
        return sum(int(getattr(site, state).sum()) for site in sites)

    x: Any = getattr(report, "example", None)
    shaped = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
    batched = shaped and 32 <= len(x) <= report.inputs <= len(x) * report.batches
    batched = batched and len(x) * (report.batches - 1) < report.inputs  # its first dimension
    batched = batched and bool(x.isfinite().all())  # what it holds may have changed since
    off, dead, rare = off_center(x) if batched else 0, report.dead_fraction, total("rare")
    many = dead > MANY or bool(report.dead_layers)
    found = {
        "spine-centering": off if off >= OFF_CENTER and (dead or rare) else 0,
        "spine-centered-born-alive": total("born_dead"),
        "tool-rare-are-next": rare,
        "spine-no-cost-at-best": not many and dead,
        "tool-revive-recovers": many,
        "spine-bound-decides": total("nonfinite"),
    }
    shown = [claim for claim in ADVICE if found[claim]]
    return [f"ADVICE from {ADVICE[claim].format(found[claim])} (claim {claim})." for claim in shown]
