"""Error measures against plain loops, and the affine map against numpy.linalg.lstsq."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lens.granularity.fit import Target, affine_fit


def sample(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 4, generator=drawn)
    return x_TD, torch.sin(x_TD) + x_TD[:, :1] * x_TD + 0.5


def test_the_affine_map_is_that_of_least_squares() -> None:
    x_TD, y_TD = sample(500, 0)
    fitted = affine_fit(x_TD, y_TD)
    wide = np.c_[x_TD.double().numpy(), np.ones(500)]
    theirs, *_ = np.linalg.lstsq(wide, y_TD.double().numpy(), rcond=None)
    new_TD = sample(50, 1)[0]
    expected = np.c_[new_TD.double().numpy(), np.ones(50)] @ theirs
    np.testing.assert_allclose(fitted(new_TD.double()).numpy(), expected, rtol=1e-9, atol=1e-10)
    assert fitted(new_TD).dtype == torch.float32


def test_an_affine_function_is_found_again() -> None:
    x_TD = sample(300, 2)[0].double()
    y_TD = x_TD @ torch.arange(12.0).double().view(4, 3) - 2
    target = Target.of(x_TD, y_TD)
    assert target.error(affine_fit(x_TD, y_TD)) < 1e-20 * target.power


def test_errors_are_means_of_squared_norms() -> None:
    x_TD, y_TD = sample(2_500, 3)  # more than one part
    target = Target.of(x_TD, y_TD)
    y = y_TD.double().numpy()
    assert target.power == pytest.approx(np.mean([row @ row for row in y]))
    about = y - y.mean(0)
    assert target.variance == pytest.approx(np.mean([row @ row for row in about]))
    assert target.variance == pytest.approx(y.var(0).sum())
    assert target.error(torch.zeros_like) == pytest.approx(target.power)
    mean_D = y_TD.mean(0)
    assert target.error(lambda x_TD: mean_D.expand_as(x_TD)) == pytest.approx(target.variance)
    off = [(row - 2 * x) @ (row - 2 * x) for row, x in zip(y, x_TD.double().numpy(), strict=True)]
    assert target.error(lambda x_TD: 2 * x_TD) == pytest.approx(np.mean(off))
