"""Full softmax and log-sum-exp against their formulas, computed token by token and item by item in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.full_softmax import (
    cpu,
    full_softmax_bytes,
    full_softmax_flops,
    full_softmax_loss,
    log_sum_exp,
)

PATHS = ["reference", "cpu", "cpu in small tiles", "cpu without a compiler"]


def truth(
    queries: Tensor,
    items: Tensor,
    temperature: float = 1.0,
    log_weights: Tensor | None = None,
    ids: list[int] | None = None,
    excluded: list[int] | None = None,
) -> Tensor:
    """``log(sum_c w_c exp(q . c / temperature))``, the largest logit taken out first."""
    totals = [0.0 * queries.sum()]
    for t, query in enumerate(queries):
        logits = []
        for c, item in enumerate(items):
            if ids is None or excluded is None or ids[c] != excluded[t]:
                logit = (query * item).sum() / temperature
                logits.append(logit if log_weights is None else logit + log_weights[c])
        if logits:
            highest = max(float(x.detach()) for x in logits)
            totals.append(torch.stack([torch.exp(x - highest) for x in logits]).sum().log() + highest)
        else:
            totals.append(queries.new_tensor(-torch.inf))
    return torch.stack(totals)[1:]


def true_loss(queries: Tensor, items: Tensor, targets: list[int], temperature: float) -> Tensor:
    positives = [
        0.0 * queries.sum(),
        *((q * items[t]).sum() / temperature for q, t in zip(queries, targets, strict=True)),
    ]
    return truth(queries, items, temperature) - torch.stack(positives)[1:]


def make(
    num_tokens: int, num_items: int, dim: int, *, seed: int = 0, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    queries = size * torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64)
    items = torch.randn(num_items, dim, generator=generator, dtype=torch.float64)
    return queries, items, torch.randint(max(num_items, 1), (num_tokens,), generator=generator)


def compare(
    found: Tensor, wanted: Tensor, inputs: list[Tensor], exact: list[Tensor], *, tolerance: float, size: float = 1.0
) -> None:
    """Values and both gradients; `inputs` are those of `found`, `exact` the same numbers in float64."""
    dtype = inputs[0].dtype
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=tolerance, atol=tolerance * size)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = torch.autograd.grad(found, inputs, cotangent.to(found))
    true = torch.autograd.grad(wanted, exact, cotangent, allow_unused=True, materialize_grads=True)
    rounding = max(tolerance, torch.finfo(dtype).eps)  # a gradient has the type of its input
    for name, mine, theirs in zip(("queries", "items"), gradients, true, strict=True):
        assert mine.dtype == dtype
        largest = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            mine.cpu().double(),
            theirs,
            rtol=2 * rounding,
            atol=4 * tolerance * max(1.0, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    backend: str,
    *,
    tolerance: float,
    temperature: float = 1.0,
    size: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    *matrices, targets_T = make(*sizes, size=size, seed=seed)
    inputs = [x.to(device, dtype).requires_grad_() for x in matrices]
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    losses = full_softmax_loss(
        *inputs,
        targets_T=targets_T.to(device),
        temperature=temperature,
        backend=backend,  # type: ignore[arg-type]
    )
    wanted = true_loss(*exact, targets_T.tolist(), temperature)  # type: ignore[misc]
    compare(losses, wanted, inputs, exact, tolerance=tolerance, size=size)


def check_log_sum_exp(
    sizes: tuple[int, int, int], dtype: torch.dtype, backend: str, *, tolerance: float, device: str = "cpu"
) -> None:
    """With weights, repeated ids, and a token for which no item counts."""
    queries, items, _ = make(*sizes)
    generator = torch.Generator().manual_seed(3)
    weights_C = torch.randn(sizes[1], generator=generator)
    for num_ids in (1, 3):
        ids_C = torch.randint(num_ids, (sizes[1],), generator=generator)
        excluded_T = torch.randint(num_ids + 1, (sizes[0],), generator=generator)
        inputs = [x.to(device, dtype).requires_grad_() for x in (queries, items)]
        exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
        found = log_sum_exp(
            *inputs,
            temperature=0.5,
            log_weights_C=weights_C.to(device),
            ids_C=ids_C.to(device),
            excluded_T=excluded_T.to(device),
            backend=backend,  # type: ignore[arg-type]
        )
        wanted = truth(*exact, 0.5, weights_C.double(), ids_C.tolist(), excluded_T.tolist())
        counts = wanted > -torch.inf
        assert torch.equal(found.detach().cpu() > -torch.inf, counts)
        zeros = torch.zeros(())
        found, wanted = (torch.where(counts.to(x.device), x, zeros.to(x)) for x in (found, wanted))
        compare(found, wanted, inputs, exact, tolerance=tolerance)


def in_tiles(monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_items: int) -> None:
    """However small the matrix of logits is; as without a compiler."""
    monkeypatch.setattr(cpu, "load_native", lambda _: None)
    monkeypatch.setattr(cpu, "_KEPT_BYTES", -1)
    monkeypatch.setattr(cpu, "_TOKENS", num_tokens)
    monkeypatch.setattr(cpu, "_ITEMS", num_items)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu in small tiles":
        in_tiles(monkeypatch, 4, 3)
    if request.param == "cpu without a compiler":
        monkeypatch.setattr(cpu, "load_native", lambda _: None)
    return request.param.split()[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_losses_and_gradients_are_the_formulas(path: str, dtype: torch.dtype, tolerance: float) -> None:
    check((11, 17, 9), dtype, path, tolerance=tolerance)
    check((9, 8, 5), dtype, path, tolerance=4 * tolerance, temperature=0.3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_log_sum_exp_with_weights_and_exclusions(path: str, dtype: torch.dtype, tolerance: float) -> None:
    check_log_sum_exp((11, 17, 9), dtype, path, tolerance=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(path: str, dtype: torch.dtype) -> None:
    check((11, 17, 9), dtype, path, tolerance=4e-6)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 9), st.sampled_from([1, 2, 17])),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_sizes(sizes: tuple[int, int, int], seed: int, backend: str) -> None:
    check(sizes, torch.float32, backend, tolerance=1e-5, seed=seed)


def test_no_item_at_all(path: str) -> None:
    queries_TD = torch.ones(2, 3, requires_grad=True)
    total_T = log_sum_exp(queries_TD, torch.ones(0, 3), backend=path)  # type: ignore[arg-type]
    assert torch.equal(total_T, torch.full((2,), -torch.inf))
    (gradient,) = torch.autograd.grad(total_T.sum(), queries_TD)
    assert torch.equal(gradient, torch.zeros(2, 3))


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_logits_do_not_overflow(path: str, size: float) -> None:
    check((6, 7, 3), torch.float32, path, tolerance=2e-6, size=size)


def test_it_is_torchs_cross_entropy(path: str) -> None:
    queries, items, targets_T = make(40, 600, 8)
    found = full_softmax_loss(queries, items, targets_T=targets_T, temperature=0.2, backend=path)  # type: ignore[arg-type]
    torch.testing.assert_close(found, F.cross_entropy(queries @ items.T / 0.2, targets_T, reduction="none"))


def test_nan_and_vanishing_exponentials(path: str) -> None:
    queries, items, _ = make(3, 40, 4)
    queries[1, 2] = torch.nan
    items[7] *= 1e4  # the others are far below what float32 can hold
    inputs = [x.float().requires_grad_() for x in (queries, items)]
    found = log_sum_exp(*inputs, backend=path)  # type: ignore[arg-type]
    assert found.isnan().tolist() == [False, True, False]
    wanted = (queries[::2] @ items.T).logsumexp(1)
    torch.testing.assert_close(found[::2].double(), wanted, rtol=1e-6, atol=1e-6)
    # Slopes through the whole row are NaN where a logit is.
    gradient = torch.autograd.grad(found, inputs, torch.ones(3))[0]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_parts_of_the_items_join_to_the_whole(path: str) -> None:
    """What processes that share the items do: one of them has none that counts."""
    queries, items, _ = make(5, 9, 4)
    whole, parts = ([x.clone().requires_grad_() for x in (queries, items)] for _ in range(2))
    pieces = [log_sum_exp(parts[0], x, backend=path) for x in parts[1].split([4, 0, 5])]  # type: ignore[arg-type]
    found, wanted = torch.stack(pieces).logsumexp(0), log_sum_exp(*whole, backend="reference")
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(x.square().sum(), y) for x, y in ((found, parts), (wanted, whole))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("compiled", [True, False])
def test_calls_repeat_bit_for_bit_and_threads_change_rounding_alone(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number of threads may split sums otherwise."""
    if not compiled:
        in_tiles(monkeypatch, 256, 512)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            *matrices, targets_T = make(513, 1025, 33)  # the tiles below are thin at the ends
            inputs = [x.float().requires_grad_() for x in matrices]
            losses = full_softmax_loss(*inputs, targets_T=targets_T)  # type: ignore[misc]
            results.append([losses, *torch.autograd.grad(losses.sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results[:2], strict=True))
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_nothing_of_tokens_times_items(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        in_tiles(monkeypatch, 64, 96)

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
            return out

    *matrices, targets_T = make(256, 384, 8)
    sizes = {}
    for backend in ("cpu", "reference"):
        inputs = [x.float().requires_grad_() for x in matrices]
        with Largest() as largest:
            full_softmax_loss(*inputs, targets_T=targets_T, backend=backend).sum().backward()  # type: ignore[arg-type,misc]
        sizes[backend] = largest.numbers
    assert sizes["reference"] == 256 * 384
    assert sizes["cpu"] == (384 * 8 if compiled else 64 * 96)


def test_derivatives_of_both_orders() -> None:
    *matrices, targets_T = make(3, 4, 2)
    inputs = [x.requires_grad_() for x in matrices]

    def call(queries: Tensor, items: Tensor) -> Tensor:
        return full_softmax_loss(queries, items, targets_T=targets_T, temperature=0.7)

    assert torch.autograd.gradcheck(call, inputs)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    with pytest.raises(RuntimeError, match=r"^full_softmax: backend='cpu' is differentiable once; .*'reference'"):
        torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^full_softmax: backend='cpu' is differentiable once; .*'reference'"):
        torch.autograd.grad(log_sum_exp(*inputs).sum(), inputs, create_graph=True)


def test_flops_and_bytes() -> None:
    assert full_softmax_flops(3, 4, 5) == 2 * sum(5 for _ in range(3) for _ in range(4))
    assert full_softmax_bytes(3, 4, 5, element_size=2) == 2 * (3 * 5 + 4 * 5) + 4 * 3


# ---- a GPU's kernels ---------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        # float16 and bfloat16 round the slopes before they are multiplied.
        tolerance = max(4e-6, 0.25 * torch.finfo(dtype).eps)
        for sizes in ((70, 130, 19), (3, 65, 16), (1, 1, 1), (0, 3, 4)):
            check(sizes, dtype, "triton", tolerance=tolerance, device=device)
        check((5, 9, 4), dtype, "triton", tolerance=4 * tolerance, temperature=0.3, device=device)
        check_log_sum_exp((11, 70, 9), dtype, "triton", tolerance=4 * tolerance, device=device)
    # Slopes of 1e-9, far below what float16 can hold, and of 1e6, far above.
    *matrices, _ = make(4, 100, 8)
    for factor in (1e-9, 1e6):
        inputs = [x.to(device, torch.float16).requires_grad_() for x in matrices]
        exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
        weights_C = torch.zeros(100, device=device)
        found = log_sum_exp(inputs[0].float().half(), inputs[1], log_weights_C=weights_C, backend="triton")
        wanted = truth(*exact)  # type: ignore[arg-type]
        of = torch.autograd.grad(found.sum() * factor, [inputs[1]])[0].double().cpu()
        true = torch.autograd.grad(wanted.sum() * factor, [exact[1]])[0]
        assert bool(of.isfinite().all()) or factor > 1
        torch.testing.assert_close(of.clamp(-6e4, 6e4), true.clamp(-6e4, 6e4), rtol=1e-2, atol=1e-7 + 1e-2 * factor)
    with pytest.raises(ValueError, match="backend='triton' takes float32, float16 and bfloat16, got torch.float64"):
        log_sum_exp(*(x.to(device) for x in matrices), backend="triton")  # type: ignore[misc]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_interpreted() -> None:
    """In a process of its own: how Triton runs is fixed when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_triton_on_a_gpu() -> None:
    check_triton("cuda", [torch.float32, torch.float16, torch.bfloat16])


# ---- what cannot be meant ----------------------------------------------------------------------------------------


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"queries_TD": torch.zeros(3, 2), "items_CD": torch.zeros(4, 2)}
    return log_sum_exp(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries_TD": torch.zeros(3)}, r"queries_TD: expected a float matrix, got torch.float32 \(3,\)"),
        ({"items_CD": torch.zeros(4, 2).long()}, r"items_CD: expected a float matrix, got torch.int64 \(4, 2\)"),
        ({"items_CD": torch.zeros(4, 3)}, r"items_CD: expected width 2 like queries_TD, got 3"),
        ({"items_CD": torch.zeros(4, 2, device="meta")}, r"items_CD: expected the device of queries_TD, cpu, got meta"),
        ({"log_weights_C": torch.zeros(3)}, r"log_weights_C: expected floats of shape \(4,\), got .* \(3,\)"),
        ({"log_weights_C": torch.zeros(4).long()}, r"log_weights_C: expected floats .*got torch.int64"),
        ({"ids_C": torch.zeros(4).long()}, r"excluded_T=None: expected both ids_C and excluded_T, or neither"),
        ({"excluded_T": torch.zeros(3).long()}, r"ids_C=None: expected both ids_C and excluded_T, or neither"),
        (
            {"ids_C": torch.zeros(4).long(), "excluded_T": torch.zeros(4).long()},
            r"excluded_T: expected int64 of shape \(3,\), got torch.int64 of shape \(4,\)",
        ),
        ({"temperature": -1.0}, r"temperature=-1.0: expected a number above 0"),
        ({"backend": "cuda"}, r"backend: expected one of auto, .* got 'cuda'"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    assert call().shape == (3,)
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)


@pytest.mark.parametrize(
    ("targets_T", "message"),
    [
        (torch.zeros(3, 1).long(), r"targets_T: expected int64 of shape \(3,\), got .* of shape \(3, 1\)"),
        (torch.zeros(3), r"targets_T: expected int64 of shape \(3,\), got torch.float32"),
        (torch.zeros(3, device="meta").long(), "targets_T: expected the device of queries_TD, cpu, got meta"),
        (torch.full((3,), 4), r"targets_T: expected items 0 ... 3, got 4 ... 4"),
    ],
)
def test_targets_that_are_none_are_named(targets_T: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        full_softmax_loss(torch.zeros(3, 2), torch.zeros(4, 2), targets_T=targets_T)


if __name__ == "__main__":
    check_triton("cpu", [torch.float32, torch.float16])
