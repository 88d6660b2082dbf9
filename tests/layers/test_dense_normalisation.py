"""DenseNormalisation against numpy, and what becomes of missing numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gr.layers.dense_normalisation import DenseNormalisation

NUMBERS = st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(NUMBERS, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_columns_are_normalised_and_missing_numbers_are_the_mean(
    numbers: list[float], mean: float, std: float, log: bool
) -> None:
    layer = DenseNormalisation(means=[0.0, mean], stds=[1.0, std], logs=[False, log]).double()
    with torch.no_grad():  # a float32 buffer has rounded them
        layer.mean_W[1], layer.std_W[1] = mean, std
    x = np.array(numbers)
    found = layer(torch.tensor(np.stack([x, x], 1))).numpy()
    wanted = ((np.sign(x) * np.log(1 + np.abs(x)) if log else x) - mean) / std
    np.testing.assert_allclose(found[:, 0], np.nan_to_num(x))
    np.testing.assert_allclose(found[:, 1], np.where(np.isnan(x), 0.0, wanted), rtol=1e-9, atol=1e-9)


def test_statistics_are_buffers_and_no_parameters() -> None:
    layer = DenseNormalisation(means=[3.0], stds=[2.0], logs=[True])
    assert set(layer.state_dict()) == {"mean_W", "std_W", "log_W"}
    assert list(layer.parameters()) == []
    other = DenseNormalisation(means=[0.0], stds=[1.0], logs=[False])
    other.load_state_dict(layer.state_dict())
    x = torch.tensor([[5.0]])
    assert torch.equal(other(x), layer(x))


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ValueError, match="stds: expected numbers above 0, got 0"):
        DenseNormalisation(means=[0.0], stds=[0.0], logs=[False])
    with pytest.raises(ValueError, match="means, stds, logs: expected as many of each, got 1, 2, 1"):
        DenseNormalisation(means=[0.0], stds=[1.0, 1.0], logs=[False])
