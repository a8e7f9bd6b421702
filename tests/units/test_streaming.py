"""Sparse autoencoders: latents over streams of tokens, that no memory could hold."""

import gc
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.units.diagnosis import diagnose


def autoencoder(latents=64):
    """A sparse autoencoder whose latents fire at all rates, the last two never."""
    sae = nn.Sequential(nn.Linear(8, latents), nn.ReLU(), nn.Linear(latents, 8))
    with torch.no_grad():
        sae[0].bias.copy_(-torch.linspace(0, 3, latents))
        sae[0].bias[-2:] = -1e3
    return sae


def stream(batches, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        yield torch.randn(size, 8, generator=generator)


def accumulated(sae, batches):
    """The report on a stream, a batch at a time."""
    report = None
    for batch in batches:
        now = diagnose(sae, batch)
        report = now if report is None else report.merge(now)
    return report


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 99))
def test_quiet_counts_the_tokens_since_the_last_batch_with_a_firing(sizes, seed):
    sae, parts = autoencoder(), [torch.randn(size, 8) + seed / 99 for size in sizes]
    fires = [(sae[0](part) > 0).any(0) for part in parts]
    expected = []
    for unit in range(64):
        last = max((k for k, fired in enumerate(fires) if fired[unit]), default=-1)
        expected.append(sum(sizes[last + 1 :]))
    whole, merged = diagnose(sae, parts)["1"], accumulated(sae, parts)["1"]
    assert whole.quiet.tolist() == merged.quiet.tolist() == expected
    assert whole.quiet[-2:].tolist() == [sum(sizes)] * 2
    assert torch.equal(whole.fired, merged.fired)
    parts = [diagnose(sae, part) for part in parts]
    assert parts[0].merge(*parts[1:])["1"].quiet.tolist() == expected


def test_positions_of_sequences_are_tokens():
    sae = autoencoder()
    sequences = torch.randn(3, 5, 8)
    sequences[1:] = -1e2 * torch.sign(sae[0].weight[0].detach())  # nothing fires unit 0
    site = diagnose(sae, [sequences[:1], sequences[1:]])["1"]
    assert (int(site.quiet[0]), int(site.quiet[-1]), site.observations) == (10, 15, 15)


def test_a_saved_report_goes_on_counting(tmp_path):
    sae, (first, second) = autoencoder(), stream(2, 30)
    diagnose(sae, first).save(tmp_path / "report.pt")
    report = type(diagnose(sae, first)).load(tmp_path / "report.pt").merge(diagnose(sae, second))
    assert torch.equal(report["1"].quiet, diagnose(sae, [first, second])["1"].quiet)


def test_the_density_is_a_histogram_of_log_rates():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    sae, tokens = autoencoder(), torch.randn(5000, 8)
    figure = diagnose(sae, tokens).plot_density()
    (axes,) = figure.axes
    rates = (sae[0](tokens) > 0).double().mean(0).detach().numpy()
    counts, edges = np.histogram(np.log10(rates[rates > 0]), 50, (-math.log10(5000), 0))
    (outline,) = axes.patches
    x, y = outline.get_xy().T
    for k, count in enumerate(counts):
        middle = (edges[k] + edges[k + 1]) / 2
        assert (
            y[np.nonzero(x <= middle)[0].max()] == count or count == y[np.searchsorted(x, middle)]
        )
    (label,) = (text.get_text() for text in axes.get_legend().get_texts())
    assert label == f"1: {int((rates == 0).sum())} of 64 never"
    assert diagnose(sae, tokens).plot_density(axes) is figure
    pyplot.close(figure)


def held():
    """Bytes of Python's objects and of all tensors."""
    gc.collect()
    tensors = {
        x.untyped_storage().data_ptr(): x for x in gc.get_objects() if type(x) is torch.Tensor
    }
    own = sum(x.untyped_storage().nbytes() for x in tensors.values())
    return tracemalloc.get_traced_memory()[0], own


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one pass", "a batch at a time"])
def test_a_million_tokens_take_no_more_memory_than_fifty_thousand(way):
    sae, seen = autoencoder(), []

    def tokens():
        for k, batch in enumerate(stream(245, 4096)):
            if k % 48 == 12:  # at 49,152 tokens, and 245,760, ...
                seen.append(held())
            yield batch

    tracemalloc.start()
    try:
        report = diagnose(sae, tokens()) if way == "one pass" else accumulated(sae, tokens())
    finally:
        tracemalloc.stop()
    assert report["1"].observations == 245 * 4096 > 1_000_000
    assert report["1"].quiet[-2:].tolist() == [245 * 4096] * 2
    (python, tensors), *later = seen
    assert len(later) == 4
    for python_then, tensors_then in later:
        assert tensors_then == tensors
        assert python_then < python + 100_000  # free lists fill up
