"""First values drawn in C++ against PyTorch's of static tables, bit by bit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lightning_gr.embeddings.dynamic import first_values as module
from lightning_gr.embeddings.dynamic.first_values import _Config, first_values
from lightning_gr.embeddings.static_tables import table_values

normal, uniform = torch.nn.init.normal_, torch.nn.init.uniform_
EXTREMES = torch.tensor([0, 1, -1, -2, 2**63 - 1, -(2**63)])


def truth(init_fn: functools.partial[Any], seed: int, name: str, ids: torch.Tensor, dim: int) -> torch.Tensor:
    columns = torch.arange(dim)
    return table_values(_Config(name, init_fn), seed=seed, rows=ids, columns=columns).float()


@pytest.mark.parametrize(
    "init_fn",
    [
        functools.partial(normal, std=0.02),
        functools.partial(normal),
        functools.partial(normal, mean=3.0, std=1e-3),
        functools.partial(uniform, a=-0.3, b=0.7),
        functools.partial(uniform),
    ],
)
@pytest.mark.parametrize(("seed", "dim"), [(0, 128), (-5, 1), (2**64 - 1, 37)])
def test_values_are_those_of_static_tables(init_fn: functools.partial[Any], seed: int, dim: int) -> None:
    ids = torch.cat([EXTREMES, torch.randint(-(2**62), 2**62, (300,))])
    assert torch.equal(first_values(init_fn, seed, "items", ids, dim), truth(init_fn, seed, "items", ids, dim))


def test_millions_of_normal_draws() -> None:
    init_fn = functools.partial(normal, std=0.02)
    for part in range(8):
        ids = torch.arange(part * 8192, (part + 1) * 8192) * 0x9E3779B97F4A7C15
        assert torch.equal(first_values(init_fn, 7, "users", ids, 64), truth(init_fn, 7, "users", ids, 64)), part


def test_doubtful_rows_are_drawn_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    if module.load_native(module.Path(module.__file__).with_suffix(".cpp")) is None:
        pytest.skip("no C++ compiler")
    again, drawn = [0], module._drawn_by_torch

    def counted(*args: Any) -> torch.Tensor:
        again[0] += len(args[3])
        return drawn(*args)

    monkeypatch.setattr(module, "_drawn_by_torch", counted)
    first_values(functools.partial(normal), 0, "t", torch.arange(200_000), 32)
    assert 1 <= again[0] <= 200


def test_values_do_not_depend_on_the_number_of_threads_or_on_neighbours() -> None:
    ids, init_fn, threads = torch.arange(500), functools.partial(normal), torch.get_num_threads()
    whole = first_values(init_fn, 0, "t", ids, 64)
    try:
        torch.set_num_threads(2)
        assert torch.equal(first_values(init_fn, 0, "t", ids, 64), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first_values(init_fn, 0, "t", ids[7:8], 16), whole[7:8, :16])


def test_without_a_compiler_values_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    init_fn = functools.partial(normal, std=0.5)
    compiled = first_values(init_fn, 3, "t", EXTREMES, 8)
    monkeypatch.setattr(module, "load_native", lambda _: None)
    assert torch.equal(first_values(init_fn, 3, "t", EXTREMES, 8), compiled)


def test_no_ids() -> None:
    assert first_values(functools.partial(normal), 0, "t", torch.zeros(0, dtype=torch.int64), 8).shape == (0, 8)
