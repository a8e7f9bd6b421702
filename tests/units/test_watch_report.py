"""What a watch's report says over time: against the states themselves, window by window."""

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.units.watch import Event, Watch, WatchedSite, WatchReport

mpl.use("Agg")


def reported(states, window):
    """Return the report of a run in which ``states[site][k][unit]`` says who was dead when."""
    history, sites = [], []
    windows = len(next(iter(states.values())))
    before = {name: torch.zeros(rows.shape[1], dtype=torch.bool) for name, rows in states.items()}
    for k in range(windows):
        for name, rows in states.items():
            for unit in (rows[k] != before[name]).nonzero().flatten().tolist():
                kind = "death" if rows[k, unit] else "revival"
                history.append(Event(k * window + 1, (k + 1) * window, name, unit, kind))
            before[name] = rows[k]
    sites = [WatchedSite(n, rows[-1], torch.zeros(rows.shape[1])) for n, rows in states.items()]
    return WatchReport(sites, windows * window, window, 1, [], history)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    windows=st.integers(1, 6),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_a_row_for_each_site_and_window(sizes, windows, window, seed):
    generator = torch.Generator().manual_seed(seed)
    states = {
        f"site{k}": torch.rand(windows, size, generator=generator) < 0.5
        for k, size in enumerate(sizes)
    }
    frame = reported(states, window).to_frame()
    assert len(frame) == len(sizes) * windows
    rows = iter(frame.itertuples(index=False))
    for name, dead in states.items():
        before = torch.zeros(dead.shape[1], dtype=torch.bool)
        for k, now in enumerate(dead):
            row = next(rows)
            assert (row.site, row.step, row.units) == (name, (k + 1) * window, len(now))
            assert row.dead == int(now.sum())
            assert row.dead_fraction == (float(now.double().mean()) if len(now) else 0)
            assert row.deaths == int((now & ~before).sum())
            assert row.revivals == int((before & ~now).sum())
            before = now


def run_of_a_dying_unit(steps=6):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias.fill_(99.0)
    with Watch(model, window=2) as watch:
        for step in range(steps):
            with torch.no_grad():
                model[0].bias[1] = -99.0 if 2 <= step < 4 else 99.0
            model(torch.randn(5, 3))
            if step == 3:
                middle = watch.compute()
    return middle, watch.compute()


def test_a_report_keeps_what_happened_up_to_then():
    middle, last = run_of_a_dying_unit()
    assert middle.to_frame().dead.tolist() == [0, 1]
    frame = last.to_frame()
    assert frame.step.tolist() == [2, 4, 6]
    assert frame.dead.tolist() == [0, 1, 0]
    assert frame.deaths.tolist() == [0, 1, 0]
    assert frame.revivals.tolist() == [0, 0, 1]


def test_a_figure_of_the_dead_share_over_time():
    middle, last = run_of_a_dying_unit()
    above, below = last.plot().axes
    each, whole = above.patches
    for line in (each, whole):
        assert line.get_data().values.tolist() == [0, 0.25, 0]
        assert line.get_data().edges.tolist() == [0, 2, 4, 6]
    deaths, revivals = below.patches
    assert deaths.get_data().values.tolist() == [0, 1, 0]
    assert revivals.get_data().values.tolist() == [0, 0, -1]
    side = mpl.rcParams["axes.titlelocation"]  # the book's style, where a test has set it
    assert above.get_title(side) == "0.0% of the units dead at step 6"
    assert middle.plot().axes[0].get_title(side) == "25.0% of the units dead at step 4"
    words = [text.get_text() for text in last.plot().legends[0].get_texts()]
    assert words == ["each site", "all units", "deaths", "revivals"]
    mpl.pyplot.close("all")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no site is followed"):
        WatchReport([], 4, 2, 8, []).plot()
