"""The compiled full softmax: blocks, chunks and threads against float64; which products it makes, and its memory.

Shape suffixes: T tokens, C items, D width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.ops.full_softmax import cpu, full_softmax_loss, log_sum_exp

pytestmark = pytest.mark.skipif(cpu._library() is None, reason="needs a C++ compiler")

# Blocks have 96 tokens, chunks 192 items, or 96 of more than 128 columns; panels are whole at 16 or 32.
SIZES = [(1, 1, 1), (97, 401, 33), (95, 193, 64), (200, 97, 130), (33, 640, 16)]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(size: tuple[int, int, int], *, seed: int = 0) -> dict[str, Tensor]:
    num_tokens, num_items, dim = size
    generator = torch.Generator().manual_seed(seed)
    weights_C = torch.randn(num_items, generator=generator)
    return {
        "queries_TD": torch.randn(num_tokens, dim, generator=generator) * 3 / dim**0.5,
        "items_CD": torch.randn(num_items, dim, generator=generator),
        "log_weights_C": weights_C.masked_fill(weights_C > 1, -torch.inf),
        "ids_C": torch.randint(9, (num_items,), generator=generator),
        "excluded_T": torch.randint(12, (num_tokens,), generator=generator),
    }


def true_total(given_: dict[str, Tensor], queries: Tensor, items: Tensor) -> Tensor:
    """The whole matrix of logits; 0 of a token for which no item counts."""
    logits = queries @ items.T / 0.7
    if "log_weights_C" in given_:
        logits = logits + given_["log_weights_C"].double()
        logits = logits.masked_fill(given_["ids_C"] == given_["excluded_T"][:, None], -torch.inf)
    nothing = (logits == -torch.inf).all(1)
    return logits.masked_fill(nothing[:, None], 0.0).logsumexp(1).masked_fill(nothing, 0.0)


def compare(given_: dict[str, Tensor], gradient_T: Tensor, *, early: bool) -> None:
    matrices = [given_[name].clone().requires_grad_() for name in ("queries_TD", "items_CD")]
    others: Any = {name: x for name, x in given_.items() if name not in ("queries_TD", "items_CD")}
    found = log_sum_exp(*matrices, temperature=0.7, uniform_gradient=early, backend="cpu", **others)
    found = torch.where(found == -torch.inf, 0.0, found)
    exact = [x.detach().double().requires_grad_() for x in matrices]
    wanted = true_total(given_, *exact)
    torch.testing.assert_close(found.double(), wanted, rtol=4e-6, atol=4e-6)
    gradients = torch.autograd.grad(found, matrices, gradient_T)
    true = torch.autograd.grad(wanted, exact, gradient_T.double())
    for mine, theirs in zip(gradients, true, strict=True):
        largest = max(float(theirs.abs().max()), 1.0)
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_forward_and_of_backward_are_true(size: tuple[int, int, int], num_threads: int) -> None:
    whole = make(size)
    plain = {name: whole[name] for name in ("queries_TD", "items_CD")}
    with threads(num_threads):
        for given_ in (plain, whole):
            for early in (True, False):
                compare(given_, torch.full((size[0],), 0.3), early=early)
                compare(given_, torch.linspace(-1, 2, size[0]), early=early)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 210), st.integers(1, 420), st.integers(1, 40)),
    seed=st.integers(0, 1000),
    early=st.booleans(),
    num_threads=st.integers(1, 3),
)
def test_any_sizes(size: tuple[int, int, int], seed: int, early: bool, num_threads: int) -> None:
    with threads(num_threads):
        compare(make(size, seed=seed), torch.linspace(0, 1, size[0]), early=early)


def test_a_maximum_that_rises_from_chunk_to_chunk() -> None:
    """Sums and gradients so far shrink to nothing, or by a little, each time; the last items win, or the first."""
    given_ = make((100, 800, 8))
    given_["queries_TD"][:] = torch.linspace(-2, 2, 100)[:, None]
    for top in (10.0, 50.0):
        given_["items_CD"][:] = torch.linspace(0, top / 8, 800)[:, None]
        with threads(2):
            for early in (True, False):
                compare({name: given_[name] for name in ("queries_TD", "items_CD")}, torch.ones(100), early=early)


def test_rows_with_gaps_between_them() -> None:
    *matrices, targets_T = torch.randn(50, 24), torch.randn(24, 300), torch.randint(300, (50,))
    queries_TD, items_CD = matrices[0][:, ::2], matrices[1].T[:, ::2]
    found = full_softmax_loss(queries_TD, items_CD, targets_T=targets_T, backend="cpu")
    wanted = torch.nn.functional.cross_entropy(queries_TD @ items_CD.T, targets_T, reduction="none")
    torch.testing.assert_close(found, wanted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[bool, ...]]]:
    """Names of the compiled functions that run, and whether they write the gradients of queries and items."""
    found: list[tuple[str, tuple[bool, ...]]] = []
    run = cpu._call

    def recorded(function: ctypes._NamedFuncPointer, of: Any, *tensors: Tensor | None) -> None:
        found.append((function.__name__, tuple(x is not None for x in tensors[-2:])))
        run(function, of, *tensors)

    monkeypatch.setattr(cpu, "_call", recorded)
    return found


FORWARD, BACKWARD = "log_sum_exp", "log_sum_exp_backward"


def test_only_gradients_that_are_wanted_are_taken(calls: list[Any]) -> None:
    queries_TD, items_CD, targets_T = torch.randn(5, 4), torch.randn(9, 4), torch.arange(5)

    def call(*, queries: bool, items: bool, gradient_T: Tensor) -> list[Any]:
        calls.clear()
        inputs = [x.clone().requires_grad_(y) for x, y in ((queries_TD, queries), (items_CD, items))]
        losses = full_softmax_loss(*inputs, targets_T=targets_T, backend="cpu")  # type: ignore[misc]
        if losses.requires_grad:
            losses.backward(gradient_T)
            assert [x.grad is not None for x in inputs] == [queries, items]
        return list(calls)

    same_T, different_T = torch.full((5,), 0.2), torch.arange(5.0)
    assert call(queries=False, items=False, gradient_T=same_T) == [(FORWARD, (False, False))]
    assert call(queries=True, items=False, gradient_T=different_T) == [(FORWARD, (True, False))]
    assert call(queries=False, items=True, gradient_T=same_T) == [(FORWARD, (False, True))]
    assert call(queries=True, items=True, gradient_T=same_T) == [(FORWARD, (True, True))]
    assert call(queries=True, items=True, gradient_T=different_T) == [
        (FORWARD, (True, True)),
        (BACKWARD, (False, True)),
    ]
    with torch.no_grad():
        assert call(queries=True, items=True, gradient_T=same_T) == [(FORWARD, (False, False))]


def test_gradients_that_may_differ_wait_for_backward(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.randn(n, 4, requires_grad=True) for n in (5, 9)]
    log_sum_exp(*inputs, backend="cpu").sum().backward()
    assert calls == [(FORWARD, (False, False)), (BACKWARD, (True, True))]
    # So do those of more items than a block's exponentials are kept of.
    calls.clear()
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 8 * cpu._BYTES_OF_ITEM)
    log_sum_exp(*inputs, uniform_gradient=True, backend="cpu").sum().backward()
    assert calls == [(FORWARD, (False, False)), (BACKWARD, (True, True))]


def test_backward_twice_gives_the_same() -> None:
    inputs = [torch.randn(n, 4, requires_grad=True) for n in (5, 9)]
    losses = full_softmax_loss(*inputs, targets_T=torch.tensor([1, 1, 0, 8, 1]), backend="cpu")  # type: ignore[misc]
    first, again = (torch.autograd.grad(losses.mean(), inputs, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("early", [True, False])
def test_memory_is_far_below_that_of_the_logits(early: bool) -> None:
    inputs = [torch.randn(n, 4, requires_grad=True) for n in (5000, 5000)]  # 100 MB of logits

    def step() -> None:
        total_T = log_sum_exp(*inputs, uniform_gradient=early, backend="cpu")
        torch.autograd.grad(total_T.mean(), inputs)

    step()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the peak cannot be set back")
    before = resident("VmRSS")
    step()
    assert resident("VmHWM") - before < 20e6
