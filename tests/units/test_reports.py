"""Reports that are kept, merged, compared, sorted, filtered and shown as a page."""

import os
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relubook.layers.maxout import Maxout
from relubook.units.certificate import certify_dead
from relubook.units.diagnosis import diagnose
from relubook.units.report import Report, SiteReport
from relubook.units.watch import Watch


class Experts(nn.Module):
    """Experts that only some inputs reach, a gate that depends on none, maxout, GELU."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(3))
        self.gate = nn.Sequential(nn.Linear(3, 3), nn.ReLU6())
        self.maxout, self.smooth, self.out = Maxout(3, 2, pieces=3), nn.GELU(), nn.Linear(2, 2)

    def forward(self, x):
        which = x[:, 0].sign().long() + 1
        y = torch.stack([self.experts[k](row) for k, row in zip(which.tolist(), x, strict=True)])
        y = self.maxout(y * self.gate(torch.ones(1, 3)))
        return self.smooth(self.out(y)).relu()


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(1, 5, 2), nn.BatchNorm1d(5), nn.ReLU(), nn.MaxPool1d(2))
        self.extend([nn.Flatten(), nn.Linear(5, 6), nn.Hardswish()])

    def forward(self, x):
        return super().forward(x[:, None])


def same(one, two, rounding=("magnitude",)):
    """Assert that two reports agree in all but their examples, to the bit."""
    assert [site.name for site in one] == [site.name for site in two]
    assert (one.inputs, one.batches, one.notes) == (two.inputs, two.batches, two.notes)
    for a, b in zip(one, two, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            if not isinstance(value, torch.Tensor):
                assert value == other, (a.name, name)
            elif name in rounding:
                torch.testing.assert_close(value, other, rtol=1e-13, atol=0, equal_nan=True)
            else:
                assert value.dtype == other.dtype, (a.name, name)
                assert torch.equal(value.nan_to_num(7.0), other.nan_to_num(7.0)), (a.name, name)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from([Experts, Convolutional]),
    family=st.sampled_from(["rectifiers", "all"]),
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_merging_shards_is_diagnosing_all_data_at_once(kind, family, sizes, data, seed):
    torch.manual_seed(seed)
    model, batches = kind().eval(), [torch.randn(size, 4) for size in sizes]
    if data.draw(st.booleans()):
        batches[data.draw(st.integers(0, len(sizes) - 1))][0, 0] = torch.nan
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1))))
    shards = [batches[a:b] for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]

    def report(part):
        return diagnose(model, part, family=family, forward=lambda model, x: model(x))

    at_once, merged = report(batches), report(shards[0]).merge(*map(report, shards[1:]))
    counted = re.compile(r"\(\d+ calls\)")  # the one number in the notes
    for one in (at_once, merged):
        one.notes[:] = dict.fromkeys(counted.sub("", note) for note in one.notes)
    same(merged, at_once)
    assert [site.name for site in merged if site.fixed] == ["gate.1"] * (kind is Experts)
    assert repr(merged) == repr(at_once)


def test_a_site_whose_inputs_were_mixed_up_in_one_shard_stays_so():
    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(torch.fft.fft(x, dim=0).real if len(x) > 2 else x).relu()

    model, batches = Mixed(3, 2), [torch.randn(n, 3) for n in (2, 4, 2)]
    merged = diagnose(model, batches[:1]).merge(*(diagnose(model, [x]) for x in batches[1:]))
    same(merged, diagnose(model, batches))
    assert merged[0].fired_inputs is None


def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.relu = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU()

        def forward(self, x):
            first, second = bool((x > 0).any()), bool((x < 0).any())
            out = self.relu(self.one(x)) if first else x
            return self.relu(self.two(out)) if second else out

    return Branching()


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ((1.0, -1.0), r"relu: its producer is 'one' in one report, 'two' in another"),
        ((1.0, [1.0, -1.0, 0.0]), r"relu#1 is not in all reports: its number may mean another"),
    ],
)
def test_sites_that_may_be_others_are_not_merged(shards, message):
    model = branching()
    reports = [diagnose(model, torch.ones(4, 3) * torch.tensor(x)) for x in shards]
    with pytest.raises(ValueError, match=message):
        reports[0].merge(reports[1])


def site(name="relu", units=3, fired=(0, 1, 2), **fields):
    counts = torch.tensor(fired)
    fields = {"kind": "relu", "producer": "fc", "unit_dim": 1, "inputs": 4, **fields}
    fields |= {"observations": 4, "fired_inputs": counts, "peak": counts - 0.5}
    return SiteReport(name, fired=counts, nonfinite=counts < 0, **fields)


@pytest.mark.parametrize(
    ("field", "other", "message"),
    [
        ("kind", {"kind": "relu6"}, "relu: its kind is 'relu' in one report, 'relu6' in another"),
        ("units", {"fired": (0, 1)}, "relu: its units is 3 in one report, 2 in another"),
        ("unit_dim", {"unit_dim": 2}, "relu: its unit_dim is 1 in one report, 2"),
        ("producer", {"producer": None}, "relu: its producer is 'fc' in one report, None"),
        ("fixed", {"fixed": True}, "relu: its fixed is False"),
        ("location", {"location": "a.py:3"}, "relu: its location is None in one report, 'a.py:3'"),
    ],
)
def test_what_sites_must_agree_in_to_be_merged(field, other, message):
    with pytest.raises(ValueError, match=message):
        Report([site()]).merge(Report([site(**other)]))


@pytest.mark.parametrize("method", ["merge", "diff"])
def test_what_is_no_report_is_refused(method):
    with pytest.raises(TypeError, match="a list is no Report of diagnose"):
        getattr(Report([site()]), method)([site()])


# Files


@pytest.mark.parametrize("family", ["rectifiers", "all"])
def test_a_report_comes_back_to_the_bit(tmp_path, family):
    model = Experts()
    nn.init.constant_(model.experts[0][0].bias, -100)
    x = torch.randn(9, 4)
    x[3] = torch.nan
    report = diagnose(model, [x], family=family, forward=lambda model, x: model(x))
    report.save(tmp_path / "report")
    back = Report.load(str(tmp_path / "report"))
    same(back, report, rounding=())
    assert repr(back) == repr(report)
    diagnose(model, torch.randn(9, 4)).save(tmp_path / "report")
    assert Report.load(tmp_path / "report").example is None
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ""),
        (b"site  kind  units", ""),
        (lambda good: good[: len(good) // 2], ""),
        (pickle.dumps(Malicious()), ""),
        ({"weight": torch.ones(3)}, "relubook report"),
        (torch.ones(3), ""),
        ({"relubook report": 2, "sites": []}, "version 2, later than 1: update relubook"),
        ({"relubook report": 1}, "sites"),
        ({"relubook report": 1, "sites": [{"name": "relu"}]}, "missing"),
        ({"relubook report": 1, "sites": [vars(site())], "color": "red"}, "color"),
        ({"relubook report": 1, "sites": [vars(site()) | {"fired": 3}]}, "int"),
        ({"relubook report": 1, "sites": [vars(site()) | {"fired": torch.ones(2, 2)}]}, "shape"),
    ],
)
def test_a_file_that_holds_no_report_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.report"
    if callable(content):
        Report([site()]).save(path)
        content = content(path.read_bytes())
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"bad\.report is no report(.|\n)*{message}"):
        Report.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Report.load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        Report([site()]).save(tmp_path / "absent" / "report")


@pytest.mark.parametrize("write", [Report.save, Report.write_html])
@pytest.mark.parametrize("when", ["fdopen", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write, when):
    path = tmp_path / "file"
    path.write_text("old")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, when, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(Report([site()]), path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# Comparing


def test_what_changed_between_two_reports():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())
    x = torch.randn(50, 4)
    nn.init.constant_(model[0].bias[:3], -100)
    before = diagnose(model, x)
    nn.init.constant_(model[0].bias[1:3], 100)
    nn.init.constant_(model[0].bias[5:7], -100)
    after = diagnose(model, x)
    diff = before.diff(after)
    assert diff.newly_dead["1"].nonzero().flatten().tolist() == [5, 6]
    assert diff.revived["1"].nonzero().flatten().tolist() == [1, 2]
    fires = (model[0](x) > 0).double().mean(0)
    torch.testing.assert_close(diff.change["1"], fires - before["1"].rate)
    assert diff.appeared == diff.disappeared == []
    text = repr(diff)
    assert "1, newly dead: [5, 6]" in text
    assert "1, revived: [1, 2]" in text
    assert "+1.000" in text
    assert "appeared" not in text


def test_nothing_changed():
    report = Report([site(), site("empty", fired=())])
    diff = report.diff(report)
    assert not any(change.any() for change in diff.change.values())
    assert not any(units.any() for units in [*diff.newly_dead.values(), *diff.revived.values()])
    assert "dead: [" not in repr(diff)


def test_sites_that_appeared_or_changed_their_size():
    before = Report([site("a"), site("b"), site("c")])
    after = Report([site("new"), site("b", fired=(1, 1)), site("c")])
    diff = before.diff(after)
    assert list(diff.change) == ["c"]
    assert diff.appeared == ["new", "b"]
    assert diff.disappeared == ["a", "b"]
    assert "appeared: new, b\ndisappeared: a, b" in repr(diff)


def test_a_unit_that_is_no_longer_finite_is_not_revived():
    before, after = Report([site()]), Report([site()])
    after[0].nonfinite[0] = True
    assert not before.diff(after).revived["relu"].any()


# Sorting and filtering


def long_report():
    names = {"encoder.0": (0, 0, 4), "encoder.1": (0, 4, 4), "decoder.0": (4, 4, 4, 3)}
    return Report([site(name, fired=fired) for name, fired in names.items()], 4, 1, ["A note."])


def test_sites_in_another_order():
    report = long_report()
    assert [s.name for s in report.sorted("dead")] == ["encoder.0", "encoder.1", "decoder.0"]
    assert [s.name for s in report.sorted("units")] == ["decoder.0", "encoder.0", "encoder.1"]
    by_rate = report.sorted(lambda site: -site.rate.mean())
    assert [s.name for s in by_rate] == ["encoder.0", "encoder.1", "decoder.0"]
    assert [s.name for s in report] == ["encoder.0", "encoder.1", "decoder.0"]
    assert "A note." in repr(by_rate)
    for by in ("deda", "kind", "score", lambda site: site.producer):
        with pytest.raises(ValueError, match="gives no number; 'dead' would"):
            report.sorted(by)


def test_some_sites_only():
    report = long_report()
    assert [s.name for s in report.filter("encoder.*")] == ["encoder.0", "encoder.1"]
    assert [s.name for s in report.filter("encoder.1")] == ["encoder.1"]
    dead = report.filter(lambda site: site.dead.any())
    assert [s.name for s in dead] == ["encoder.0", "encoder.1"]
    assert dead.dead_fraction == 3 / 6
    assert len(report) == 3
    assert len(report.filter(lambda site: False)) == 0
    assert "A note." in repr(report.filter(lambda site: False))
    with pytest.raises(KeyError, match=r"no site 'encodr\.\*'; the sites are encoder\.0"):
        report.filter("encodr.*")


def test_other_listings_are_sorted_and_filtered_too():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())
    nn.init.constant_(model[2].bias, -100)
    with Watch(model, window=1) as watch:
        model(torch.randn(5, 4))
    assert [s.name for s in watch.compute().sorted("dead")] == ["3", "1"]
    assert repr(watch.compute().filter("3")).count("\n") < repr(watch.compute()).count("\n")
    certificate = certify_dead(model, -1.0, 1.0)
    assert [s.name for s in certificate.sorted("certified")] == ["3", "1"]


# The page


def made(tmp_path):
    model = nn.Sequential(
        nn.Linear(4, 80), nn.ReLU(), nn.Linear(80, 9), nn.Hardswish(), Maxout(9, 4)
    )
    nn.init.constant_(model[0].bias[:40], -100)
    nn.init.constant_(model[2].bias[:], -100)
    report = diagnose(model, torch.randn(60, 4))
    report.write_html(tmp_path / "report.html", title="Dead units of <my> net")
    return report, tmp_path / "report.html"


def test_the_page_stands_alone(tmp_path):
    report, path = made(tmp_path)
    text = path.read_text("utf-8")
    assert "<h1>Dead units of &lt;my&gt; net</h1>" in text
    assert not re.search(r"<script|<link|https?:|url\(|src=|@import| on\w+=", text)
    assert f"<li>dead: {', '.join(map(str, range(40)))}" in text
    assert f"linear-gradient(90deg, currentcolor {report['1'].dead_fraction:.2%}" in text
    assert report._repr_html_() in text
