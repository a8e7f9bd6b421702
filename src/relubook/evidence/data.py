"""Data sets that need no network: real ones shipped with scikit-learn, targets of known formula."""

import difflib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from relubook._optional import require

__all__ = ["DATASETS", "TARGETS", "Dataset", "Split", "Target", "dataset", "target"]


@dataclass(frozen=True)
class Split:
    """Inputs of shape (n, features), and labels, int64 (n,), or targets, float (n, outputs)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Dataset:
    """A data set in parts of 60%, 20% and 20%, shuffled once; ``classes`` is 0 for regression."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def features(self) -> int:
        """Number of input features."""
        return self.train.x.shape[1]


DATASETS = ("digits", "wine", "breast_cancer", "diabetes")
"""Names of the real data sets; the last one is a regression."""


def _known(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, cutoff=0.4) or known
        raise ValueError(f"unknown {kind} {name!r}; the nearest known: {', '.join(close)}")


def dataset(name: str, *, standardize: bool = True, dtype: torch.dtype = torch.float32) -> Dataset:
    """Load one of :data:`DATASETS` (else ValueError); the rows are the same on every call.

    Args:
        standardize: Give the inputs mean 0 and variance 1 over the training part: each feature of
            a table; all pixels of images together. If False, images are scaled to [0, 1] and
            tables are left as they are. Regression targets are standardized in any case.
        dtype: Of the inputs.
    """
    _known("data set", name, DATASETS)
    bunch = getattr(require("sklearn.datasets", "data sets"), f"load_{name}")()
    images, regression = name == "digits", name == "diabetes"
    x = torch.tensor(bunch.data, dtype=torch.float64)
    y = torch.tensor(bunch.target, dtype=torch.float64 if regression else torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    first, second = round(0.6 * len(x)), round(0.8 * len(x))
    if images:
        x = x / 16
    if standardize:
        known = x[:first]
        x = (x - known.mean()) / known.std() if images else (x - known.mean(0)) / known.std(0)
    if regression:
        y = ((y - y[:first].mean()) / y[:first].std()).unsqueeze(1).to(dtype)
    x = x.to(dtype)
    sizes = (first, second - first, len(x) - second)
    train, validation, test = map(Split, x.split(sizes), y.split(sizes))
    return Dataset(name, train, validation, test, 0 if regression else int(y.max()) + 1)


@dataclass(frozen=True)
class Target:
    """A function of known formula to learn, which maps (n, inputs) to (n, outputs)."""

    name: str
    inputs: int
    outputs: int
    function: Callable[[Tensor], Tensor]

    def sample(self, n: int, *, generator: torch.Generator) -> Split:
        """Draw n >= 1 inputs uniformly from [-sqrt(3), sqrt(3)] (variance 1) with their targets."""
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        x = (2 * torch.rand(n, self.inputs, generator=generator) - 1) * math.sqrt(3)
        return Split(x, self.function(x))


def _pair(x: Tensor) -> Tensor:
    return torch.stack([(x[:, 0] + x[:, 1]).abs(), (x[:, 0] - x[:, 1]).abs()], dim=1)


def _step_sine(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) + 0.2 * torch.sin(5 * x)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "absolute": Target("absolute", 1, 1, torch.abs),
        "x_sine": Target("x_sine", 1, 1, lambda x: x * torch.sin(5 * x)),
        "step_sine": Target("step_sine", 1, 1, _step_sine),
        "absolute_pair": Target("absolute_pair", 2, 2, _pair),
        "sine": Target("sine", 1, 1, lambda x: torch.sin(3 * x)),
    }
)
"""``|x|``, ``x sin 5x``, ``1[x > 0] + 0.2 sin 5x``, ``(|x1 + x2|, |x1 - x2|)``, ``sin 3x``."""


def target(name: str) -> Target:
    """Return one of :data:`TARGETS`; ValueError names the nearest if there is none."""
    _known("target", name, TARGETS)
    return TARGETS[name]
