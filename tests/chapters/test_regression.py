import pytest
import scipy.optimize
import torch

from relubook.chapters.kinks import NOISES, descend_on_lines, fit_line, line_data


@pytest.mark.parametrize("power", [1, 2, 3, 4])
@pytest.mark.parametrize("noise", NOISES)
def test_fit_is_that_of_a_general_optimizer(noise, power):
    x, y = line_data(noise, seed=3, n=40)
    line = fit_line(x, y, power)

    def cost(w):
        return float(((w[0] * x + w[1] - y).abs() ** power).sum())

    found = scipy.optimize.minimize(cost, [1.5, 0.5], method="Nelder-Mead", tol=1e-10)
    assert cost(line.tolist()) <= found.fun * (1 + 1e-7)


def test_data_repeat_and_outliers_are_normal_with_some_points_far_off():
    assert all(
        torch.equal(a, b)
        for a, b in zip(line_data("normal", 1), line_data("normal", 1), strict=True)
    )
    x, normal = line_data("normal", 0, n=4000)
    _, outliers = line_data("outliers", 0, n=4000)
    e, far = normal - 2 * x - 1, outliers - 2 * x - 1
    ratio = far / e
    assert 0.03 < (ratio > 10).double().mean() < 0.07
    assert torch.allclose(ratio[ratio > 10], torch.tensor(20.0, dtype=x.dtype))
    _, uniform = line_data("uniform", 0, n=4000)
    assert (uniform - 2 * x - 1).abs().max() <= 1


def test_descent_arrives_with_the_square_and_stays_off_with_the_absolute_error():
    distance, met = descend_on_lines(torch.square, sets=5, rate=0.3, steps=400)
    assert distance.shape == (400, 5)
    assert distance[0].tolist() == pytest.approx([5**0.5] * 5)
    assert distance[-1].max() < 1e-9
    assert met.shape == (5,)
    stays, _ = descend_on_lines(torch.abs, sets=5, rate=0.3, steps=400)
    falls, _ = descend_on_lines(torch.abs, sets=5, rate=0.3, steps=400, decay=0.98)
    assert falls[-1].max() < stays[-1].min()
