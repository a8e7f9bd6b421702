import pytest
import torch
from recipe_kinds import examples, make, train_many

from relubook.training.run import concatenate, crossed, seed_ranges

X, Y = examples(make(), dtype=torch.float32)


def test_frames():
    recipe = make(widths=(4, 5))
    seeds, rates = crossed(4, [0.1, 0.01])
    run = train_many(recipe, X, Y, seeds=seeds, steps=4, lr=rates, record=2)
    frame = run.to_frame()
    assert len(frame) == 3 * 8
    row = frame[(frame["member"] == 5) & (frame["step"] == 2)].iloc[0]
    assert (row["seed"], row["lr"]) == (1, 0.01)
    assert row["loss"] == run.loss[1, 5]
    assert row["dead"] == pytest.approx((run.dead[1, 5] @ torch.tensor([4.0, 5])).item() / 9)
    layers = run.to_frame(by="layer")
    assert len(layers) == 3 * 8 * 2
    pick = layers[(layers["member"] == 5) & (layers["step"] == 2) & (layers["layer"] == 2)]
    assert pick["dead"].item() == run.dead[1, 5, 1]
    with pytest.raises(ValueError, match="by must be 'member' or 'layer'"):
        run.to_frame(by="unit")
    assert "8 members" in repr(run)
    assert not run.member(3).training
    assert torch.equal(run.dead_share(1), (run.dead[1] @ torch.tensor([4.0, 5])) / 9)


def test_a_network_without_hidden_layers_has_no_units():
    run = train_many(make(widths=()), X, Y, seeds=2, steps=1, lr=0.1)
    assert run.dead.shape == (2, 2, 0)
    assert run.dead_share().tolist() == [0, 0]


def test_ranges_cover_the_members():
    for members in range(1, 12):
        for parts in range(1, 14):
            ranges = seed_ranges(members, parts)
            assert [i for part in ranges for i in part] == list(range(members))
            lengths = {len(part) for part in ranges}
            assert len(ranges) == min(parts, members)
            assert max(lengths) - min(lengths) <= 1
    with pytest.raises(ValueError, match="at least 1"):
        seed_ranges(0, 2)


def test_bad_concatenation():
    one = train_many(make(), X, Y, seeds=1, steps=2, lr=0.1)
    assert torch.equal(concatenate([one]).loss, one.loss)
    for other in (
        train_many(make(), X, Y, seeds=1, steps=3, lr=0.1),
        train_many(make(widths=3), X, Y, seeds=1, steps=2, lr=0.1),
    ):
        with pytest.raises(ValueError, match="networks of the same shapes and the same steps"):
            concatenate([one, other])
    with pytest.raises(ValueError, match="nothing"):
        concatenate([])
