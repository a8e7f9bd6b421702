import math

import pytest
import torch

from relubook.evidence.data import dataset
from relubook.training.recipe import Recipe
from relubook.training.train import train
from relubook.training.tuning import best_rate, tune_rate

DIGITS = dataset("digits")
RECIPE = Recipe(64, 8, 10)
SETTINGS = {"steps": 30, "batch_size": 32, "progress": False}


def test_the_rate_is_the_best_of_runs_rate_by_rate():
    rates = (1e-5, 0.01, 0.03, 3.0)
    best, score = tune_rate(RECIPE, DIGITS, rates, seeds=range(50, 53), **SETTINGS)
    by_hand = [
        train(
            RECIPE.stack(range(50, 53)),
            DIGITS.train.x,
            DIGITS.train.y,
            lr=rate,
            validation=(DIGITS.validation.x, DIGITS.validation.y),
            **SETTINGS,
        )
        .validation_accuracy[-1]
        .mean()
        for rate in rates
    ]
    torch.testing.assert_close(score, torch.stack(by_hand).to(score), atol=1e-3, rtol=0)
    assert best == rates[int(score.argmax())]


def test_an_overflowed_network_scores_nothing():
    rates = (1e-3, 0.1, 1e30)
    _, score = tune_rate(RECIPE, DIGITS, rates, seeds=2, optimizer="sgd", **SETTINGS)
    assert score[2] == 0


def test_best_rate():
    assert best_rate([0.1, 0.2, 0.3], [1.0, 3.0, math.nan]) == 0.2
    assert best_rate([0.1, 0.2, 0.3], torch.tensor([-math.inf, -3.0, -4.0])) == 0.2
    with pytest.raises(ValueError, match=r"one score for each of 3 rates, not \(2,\)"):
        best_rate([0.1, 0.2, 0.3], [1.0, 3.0])
    with pytest.raises(ValueError, match="every score is NaN"):
        best_rate([0.1, 0.2, 0.3], [math.nan] * 3)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((1e-7, 1e-6, 1e-5), "edge of the grid"),
        ((0.01, 0.1), "three or more"),
        ((0.1, 0.01, 0.001), "ascending"),
    ],
)
def test_named_errors(rates, message):
    with pytest.raises(ValueError, match=message):
        tune_rate(RECIPE, DIGITS, rates, seeds=2, **SETTINGS)
