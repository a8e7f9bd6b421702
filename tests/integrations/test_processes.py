"""Reports of several processes, gathered and merged, against one process that sees all."""

import pytest
import torch
from torch import distributed, nn

from relubook.units.diagnosis import diagnose
from relubook.units.watch import Watch


def example():
    """Return a model whose unit 0 is dead and whose unit 1 fires on a few inputs, and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([-99.0, -0.8])
    return model, torch.randn(40, 3)


def _worker(rank, path):
    model, x = example()
    parallel = nn.parallel.DistributedDataParallel(model)
    shard = list(x[rank::2].split(5))
    reports = [None, None]
    distributed.all_gather_object(reports, diagnose(parallel, shard))
    with Watch(parallel, window=4) as watch:
        for batch in shard:
            parallel(batch).sum().backward()
    torch.save((reports[0].merge(reports[1]), watch.compute()), f"{path}/{rank}")


@pytest.mark.slow
def test_two_shards_make_one_report(tmp_path, two_processes):
    two_processes(_worker, str(tmp_path))
    model, x = example()
    expected = diagnose(model, x)
    for rank in range(2):
        merged, watched = torch.load(tmp_path / str(rank), weights_only=False)
        assert merged.inputs == watched.inputs == 40
        for site in expected:
            for name in ("fired", "fired_inputs", "dead", "peak"):
                torch.testing.assert_close(getattr(merged[site.name], name), getattr(site, name))
            assert torch.equal(watched[site.name].dead, site.dead)
            torch.testing.assert_close(watched[site.name].peak, site.peak)
        assert merged["1"].dead[0]
        assert not merged["1"].dead[1]
    assert (merged.to_frame().inputs == 40).all()
