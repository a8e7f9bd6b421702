"""Data sets that ship with scikit-learn, targets of known formula."""

import math

import pytest
import sklearn.datasets
import torch
from hypothesis import given
from hypothesis import strategies as st

from relubook.evidence.data import DATASETS, TARGETS, dataset, target


@pytest.mark.parametrize("name", DATASETS)
def test_dataset_is_whole_split_and_repeatable(name):
    data, again = dataset(name), dataset(name)
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    assert sum(map(len, (data.train, data.validation, data.test))) == len(bunch.data)
    assert data.features == bunch.data.shape[1]
    assert torch.equal(data.train.x, again.train.x)
    assert torch.equal(data.test.y, again.test.y)
    assert len(data.train) == pytest.approx(0.6 * len(bunch.data), abs=1)
    for split in (data.train, data.validation, data.test):
        assert split.x.isfinite().all()
        if data.classes:
            assert split.y.dtype == torch.int64
            assert split.y.max() < data.classes
        else:
            assert split.y.shape == (len(split), 1)


def test_rows_keep_their_labels():
    bunch = sklearn.datasets.load_digits()
    data = dataset("digits", standardize=False, dtype=torch.float64)
    rows = {tuple(row): label for row, label in zip(bunch.data / 16, bunch.target, strict=True)}
    for row, label in zip(data.test.x[:50].tolist(), data.test.y[:50].tolist(), strict=True):
        assert rows[tuple(row)] == label


@pytest.mark.parametrize("name", DATASETS)
def test_standardized_by_the_training_part(name):
    x = dataset(name, dtype=torch.float64).train.x
    if name == "digits":
        assert x.mean() == pytest.approx(0, abs=1e-12)
        assert x.std() == pytest.approx(1)
    else:
        assert torch.allclose(x.mean(0), torch.zeros(x.shape[1], dtype=x.dtype), atol=1e-12)
        assert torch.allclose(x.std(0), torch.ones(x.shape[1], dtype=x.dtype))


def test_unknown_names_are_named_with_their_neighbors():
    with pytest.raises(ValueError, match="'digit'.*digits"):
        dataset("digit")
    with pytest.raises(ValueError, match="'absolut'.*absolute"):
        target("absolut")


@pytest.mark.parametrize("name", TARGETS)
def test_target_samples(name):
    entry = target(name)
    split = entry.sample(4000, generator=torch.Generator().manual_seed(0))
    assert split.x.shape == (4000, entry.inputs)
    assert split.y.shape == (4000, entry.outputs)
    assert split.x.abs().max() <= math.sqrt(3)
    assert split.x.var() == pytest.approx(1, abs=0.1)


@given(st.floats(-1.7, 1.7), st.floats(-1.7, 1.7))
def test_target_formulas(a, b):
    x = torch.tensor([[a]], dtype=torch.float64)
    assert target("absolute").function(x).item() == abs(a)
    assert target("x_sine").function(x).item() == pytest.approx(a * math.sin(5 * a))
    assert target("sine").function(x).item() == pytest.approx(math.sin(3 * a))
    step = target("step_sine").function(x).item()
    assert step == pytest.approx((a > 0) + 0.2 * math.sin(5 * a))
    pair = target("absolute_pair").function(torch.tensor([[a, b]], dtype=torch.float64))
    assert pair.tolist()[0] == pytest.approx([abs(a + b), abs(a - b)])


def test_target_needs_rows():
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        target("absolute").sample(0, generator=torch.Generator())
