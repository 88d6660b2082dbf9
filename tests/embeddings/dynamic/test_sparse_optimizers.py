"""Steps on rows against torch.optim and float64 formulas, compiled and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic import chunked_rows
from lightning_gr.embeddings.dynamic.row_storage import RowStorage
from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig, update_rows

ROWS, D, STEPS = 21, 13, 4
NAMES = pytest.mark.parametrize("name", ["rowwise_adagrad", "adagrad", "adam", "sgd", "momentum"])


@pytest.fixture(params=["compiled", "pytorch"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pytorch":
        monkeypatch.setattr(chunked_rows, "load_native", lambda source: None)


def filled(config: SparseOptimizerConfig, **settings: Any) -> tuple[RowStorage, Tensor, Tensor]:
    """A storage of random rows, their numbers and values."""
    storage = RowStorage(dim=D, state_width=config.state_width(D), chunk_rows=8, **settings)
    rows = storage.allocate(ROWS)
    storage.write(rows, torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)))
    return storage, rows, storage.read(rows)


def gradients(step: int) -> Tensor:
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(100 + step))


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (SparseOptimizerConfig("sgd"), lambda p: torch.optim.SGD(p, lr=0.1)),
        (SparseOptimizerConfig("momentum", momentum=0.7), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7)),
        (SparseOptimizerConfig("adagrad", eps=1e-4), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-4)),
        (
            SparseOptimizerConfig("adam", betas=(0.8, 0.95), eps=1e-3),
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
        ),
        (
            SparseOptimizerConfig("adam", weight_decay=0.3),
            lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3),
        ),
    ],
)
def test_it_is_torchs_where_every_row_has_a_gradient(config: SparseOptimizerConfig, make: Any) -> None:
    storage, rows, start = filled(config)
    weight = torch.nn.Parameter(start.double())
    optimizer = make([weight])
    for step in range(STEPS):
        weight.grad = gradients(step).double()
        optimizer.step()
        update_rows(storage, rows, gradients(step), config, lr=0.1, step=step)
    torch.testing.assert_close(storage.read(rows).double(), weight.detach(), rtol=1e-5, atol=1e-6)


@NAMES
def test_it_is_the_formula_where_few_rows_have_one(name: Any) -> None:
    config = SparseOptimizerConfig(name, eps=1e-5, weight_decay=0.05)
    storage, rows, start = filled(config)
    values = start.double()
    first, second, steps = torch.zeros_like(values), torch.zeros_like(values), torch.zeros(ROWS)
    for step in range(STEPS):
        chosen = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[: 5 + step]
        g = gradients(step)[chosen]
        update_rows(storage, rows[chosen], g, config, lr=0.2, step=step)
        for row, gradient in zip(chosen.tolist(), g.double(), strict=True):
            steps[row] += 1
            if name in ("adagrad", "rowwise_adagrad"):
                first[row] += gradient**2 if name == "adagrad" else (gradient**2).sum() / D
                move = gradient / (first[row] ** 0.5 + 1e-5)
            elif name == "adam":
                first[row] = 0.9 * first[row] + 0.1 * gradient
                second[row] = 0.999 * second[row] + 0.001 * gradient**2
                t = int(steps[row])
                move = first[row] / (1 - 0.9**t) / ((second[row] / (1 - 0.999**t)) ** 0.5 + 1e-5)
            else:
                first[row] = (0.9 if name == "momentum" else 0.0) * first[row] + gradient
                move = first[row]
            values[row] = values[row] * (1 - 0.2 * 0.05) - 0.2 * move
    torch.testing.assert_close(storage.read(rows).double(), values, rtol=1e-5, atol=1e-6)
    if name == "adam":
        assert torch.equal(storage.read_state(rows)[:, -1], steps)


@NAMES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "mixed"])
def test_both_paths_agree_and_other_rows_stay(name: Any, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SparseOptimizerConfig(name, weight_decay=0.1)
    seen = []
    for compiled in (True, False):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(chunked_rows, "load_native", lambda source: None)
            storage, rows, start = filled(config, precision=precision, hot_count=1)
            storage.touch(rows[::3], torch.ones(7, dtype=torch.int64), step=0, time=0)
            chosen = torch.tensor([20, -1, 3, 4, -1, 9, 11])
            update_rows(storage, chosen, gradients(0)[:7], config, lr=0.1, step=5, seeds_N=chosen * 77)
            others = torch.tensor([row for row in range(ROWS) if row not in (3, 4, 9, 11, 20)])
            assert torch.equal(storage.read(others), start[others])
            assert not storage.read_state(others).any()
            assert not torch.equal(storage.read(rows)[3], start[3])
            seen.append((storage.read(rows), storage.read_state(rows)))
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-5, atol=1e-6)
    # A last bit of difference may change which 16-bit neighbour is taken.
    spacing = {"fp32": 1e-6, "bf16": 2.0**-7, "fp16": 2.0**-10, "mixed": 2.0**-10}[precision]
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=spacing, atol=1e-6)


def test_steps_below_the_spacing_of_bf16_are_made_on_average() -> None:
    config = SparseOptimizerConfig("sgd")
    storage = RowStorage(dim=D, state_width=0, precision="bf16")
    rows = storage.allocate(2000)
    storage.write(rows, torch.ones(2000, D))
    for step in range(10):
        update_rows(storage, rows, torch.ones(2000, D), config, lr=1e-4, step=step, seeds_N=rows)
    assert abs(float(storage.read(rows).double().mean()) - 0.999) < 3e-5
    update_rows(storage, rows, torch.ones(2000, D), config, lr=1e-4, step=11)
    assert abs(float(storage.read(rows).double().mean()) - 0.999) < 3e-5  # to the nearest: not at all


@NAMES
@pytest.mark.parametrize("placement", [{"placement": "host", "cache_rows": 4}, {"placement": "host", "cache_rows": 64}])
def test_a_cache_changes_nothing(name: Any, placement: dict[str, Any]) -> None:
    config = SparseOptimizerConfig(name)
    (plain, rows, _), (cached, _, _) = filled(config), filled(config, **placement)
    for step in range(STEPS):
        chosen = torch.randperm(ROWS, generator=torch.Generator().manual_seed(step))[: 2 + 2 * step]
        for storage in (plain, cached):
            update_rows(storage, rows[chosen], gradients(step)[chosen], config, lr=0.1, step=step)
    torch.testing.assert_close(cached.read(rows), plain.read(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cached.read_state(rows), plain.read_state(rows), rtol=1e-5, atol=1e-6)


@NAMES
def test_a_gradient_of_zero_moves_nothing_even_without_eps(name: Any) -> None:
    config = SparseOptimizerConfig(name, eps=0.0)
    storage, rows, start = filled(config)
    update_rows(storage, rows, torch.zeros(ROWS, D), config, lr=0.1, step=0)
    assert torch.equal(storage.read(rows), start)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"name": "lamb"}, "name='lamb'"),
        ({"lr": -1.0}, r"lr=-1\.0"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        SparseOptimizerConfig(**settings)
