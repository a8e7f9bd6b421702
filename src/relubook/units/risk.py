"""What tells of deaths to come, in data and units, and what the book's chapters advise."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["off_center"]

OFF_CENTER = 0.2  # from here on a report says so: on digits hardly a unit dies of less
MANY = 0.1  # dead units, as a share: at Adam's best rate as many die, and cost nothing
ADVICE = {  # by the claim of the ledger that it rests on: its chapter, and what that found
    "spine-centering": "How units die: batch 0 is {:.2f} off center. Centered, layer 1 lives at"
    " rates that else kill most of it, but not where inputs are small beside the 1 of the bias",
    "spine-centered-born-alive": "Dead before the first step: silent from the first look on: {:,}."
    " If that was before training, center every layer and set biases to 0: centering the images"
    " alone is not enough",
    "tool-rare-are-next": "Diagnose your model: rare units, here {:,}, are twice as likely to die"
    " as others, or more, but not at a rate too high, where anybody may die",
    "spine-no-cost-at-best": "The learning rate and the optimizer: at the best rate dead units cost"
    " nothing",
    "tool-revive-recovers": "Diagnose your model: after a bad start, to revive_ once and go on at"
    " a good rate gains more than that rate alone, but to begin anew is better still",
    "spine-bound-decides": "Normalization: a high rate needs a bound, as by batch normalization or"
    " clipping, but in networks of eight layers clipping is not enough",
}


@torch.no_grad()
def off_center(data: Any) -> float:
    """Return how far data lie off center: ||mean||² / mean ||x||², from 0 to 1 (all inputs alike).

    The mean is a bias that learns 1 + ||mean||² times as fast as the bias itself, so that one step
    can push all inputs of a unit below 0 (chapter *How units die*): subtract it from each feature.
    Scale does not matter; n independent inputs without a mean give about 1/n.

    ``data`` are floats or uint8 of shape (inputs, ...), each place a feature: a tensor, an array,
    or an iterable of such batches, alone or first in a tuple or list. They are read once, in
    float64; torch's random state stays. TypeError for data of another kind or type, such as token
    ids; ValueError if there is no input, if shapes differ, or at NaN or infinity.

    >>> off_center(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    0.5
    """
    if isinstance(data, Dataset | Mapping):
        raise TypeError(f"data is a {type(data).__name__}, not a tensor, an array or a loader")
    total, square, inputs, shape = torch.zeros(()), 0.0, 0, None
    with torch.random.fork_rng([]):
        for index, batch in enumerate([data] if hasattr(data, "__array__") else data):
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
    return float(total.square().sum()) / inputs / (square or 1.0)


def near_cliff(peak: Tensor, living: Tensor) -> Tensor:
    """Return which tenth of the living units, rounded up, has the lowest peaks: (units,)."""
    order = peak.masked_fill(~living, torch.inf).argsort(stable=True)
    return torch.zeros_like(living).index_fill(0, order[: -(-int(living.sum()) // 10)], True)


def advice(report: Any) -> list[str]:
    """Return what the book advises on what a report of ``diagnose`` or ``Watch`` found."""
    events = getattr(report, "history", [])
    born = {(e.site, e.unit) for e in events if e.kind == "death" and e.until == report.window}
    born -= {(e.site, e.unit) for e in events if e.kind == "revival"}
    sites = [site for site in report if site.silences]
    rare = sum(int(site.rare.sum()) for site in sites if hasattr(site, "rare"))
    nonfinite = sum(int(site.nonfinite.sum()) for site in sites)
    dead = report.dead_fraction
    many = dead > MANY or bool(report.dead_layers)
    total = sum(int(site.dead.sum()) for site in sites)
    first = len(born) if hasattr(report, "history") else many * total
    off = getattr(report, "_off_center", 0.0) if dead or rare else 0.0
    off = off if off >= OFF_CENTER else 0.0
    found = (off, first, rare, dead and not many, many, nonfinite)
    told = zip(ADVICE.items(), found, strict=True)
    return [f"ADVICE from {words.format(n)} (claim {claim})." for (claim, words), n in told if n]
