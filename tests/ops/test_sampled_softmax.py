"""Sampled softmax against its formula, computed token by token and negative by negative in float64."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.native import load_native
from lightning_gr.ops.sampled_softmax import (
    cpu,
    kernels_of,
    sampled_logits,
    sampled_softmax_bytes,
    sampled_softmax_flops,
    sampled_softmax_loss,
)

PATHS = ["reference", "compiled", "pytorch"]


def truth(
    queries: Tensor,
    rows: Tensor,
    targets: list[int],
    negatives: list[list[int]],
    temperature: float = 1.0,
    log_weights: Tensor | None = None,
) -> Tensor:
    """``-log(e^target / (e^target + sum of e^negative))``, the largest logit taken out first."""
    losses = [0.0 * queries.sum()]
    for query, target, drawn in zip(queries, targets, negatives, strict=True):
        logits = [(query * rows[target]).sum() / temperature]
        for negative in drawn:
            if negative != target:
                logit = (query * rows[negative]).sum() / temperature
                logits.append(logit if log_weights is None else logit + log_weights[negative])
        highest = max(float(x.detach()) for x in logits)
        losses.append(torch.stack([torch.exp(x - highest) for x in logits]).sum().log() + highest - logits[0])
    return torch.stack(losses)[1:]


def make(
    num_tokens: int, num_negatives: int, num_rows: int, dim: int, *, seed: int = 0, size: float = 1.0
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    queries = size * torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64)
    rows = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    targets_T = torch.randint(num_rows, (num_tokens,), generator=generator)
    negatives_TR = torch.randint(num_rows, (num_tokens, num_negatives), generator=generator)
    return queries, rows, {"targets_T": targets_T, "negatives_TR": negatives_TR}


def check(
    queries: Tensor,
    rows: Tensor,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    *,
    tolerance: float,
    size: float = 1.0,
    device: str = "cpu",
) -> None:
    """Losses and both gradients equal the truth's on the same rounded numbers."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in (queries, rows)]
    exact = [x.detach().to("cpu", torch.float64).requires_grad_() for x in inputs]
    on_device = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    losses = sampled_softmax_loss(*inputs, **on_device, backend=backend)  # type: ignore[arg-type]
    weights = arguments.get("log_weights_U")
    wanted = truth(
        *exact,
        arguments["targets_T"].tolist(),
        arguments["negatives_TR"].tolist(),
        arguments.get("temperature", 1.0),
        None if weights is None else weights.double(),
    )
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert losses.shape == wanted.shape
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=tolerance, atol=tolerance * size)
    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad(losses, inputs, cotangent.to(losses))
    true = torch.autograd.grad(wanted, exact, cotangent, allow_unused=True, materialize_grads=True)
    rounding = max(tolerance, 0.5 * torch.finfo(dtype).eps)  # a gradient has the type of its input
    for name, mine, theirs in zip(("queries", "rows"), found, true, strict=True):
        assert mine.dtype == dtype
        largest = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(
            mine.cpu().double(),
            theirs,
            rtol=4 * rounding,
            atol=4 * tolerance * max(1.0, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; without compiled code where it is to be the PyTorch path, and with tiny chunks there."""
    if request.param == "pytorch":
        monkeypatch.setattr(cpu, "load_native", lambda source: None)
        monkeypatch.setattr(cpu, "_NUMBERS_AT_ONCE", 100)
    return "reference" if request.param == "reference" else "cpu"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_losses_and_gradients_are_the_formulas(path: str, dtype: torch.dtype, tolerance: float) -> None:
    queries, rows, arguments = make(23, 9, 7, 19)  # 7 rows: most are drawn several times, and targets too
    assert (arguments["negatives_TR"] == arguments["targets_T"][:, None]).any()
    check(queries, rows, arguments, dtype, path, tolerance=tolerance)
    arguments |= {"temperature": 0.4, "log_weights_U": -torch.rand(7, generator=torch.Generator().manual_seed(1)).log()}
    check(queries, rows, arguments, dtype, path, tolerance=4 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(path: str, dtype: torch.dtype) -> None:
    check(*make(23, 9, 7, 19), dtype, path, tolerance=4e-6)


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(0, 5),
    num_negatives=st.integers(0, 6),
    num_rows=st.integers(1, 4),
    dim=st.sampled_from([1, 2, 16, 17, 33]),
    seed=st.integers(0, 1000),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_sizes(num_tokens: int, num_negatives: int, num_rows: int, dim: int, seed: int, backend: str) -> None:
    check(*make(num_tokens, num_negatives, num_rows, dim, seed=seed), torch.float32, backend, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_that_are_the_target_do_not_count(path: str, dtype: torch.dtype) -> None:
    queries, rows, arguments = make(4, 3, 5, 6)
    arguments["negatives_TR"] = arguments["targets_T"][:, None].expand(4, 3)
    inputs = [x.to(dtype).requires_grad_() for x in (queries, rows)]
    losses = sampled_softmax_loss(*inputs, **arguments, backend=path)  # type: ignore[arg-type]
    assert torch.equal(losses, torch.zeros(4))
    losses.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_huge_logits_do_not_overflow(path: str, size: float) -> None:
    check(*make(6, 5, 4, 3, size=size), torch.float32, path, tolerance=2e-6, size=size)


def test_it_is_the_loss_of_masked_logits(path: str) -> None:
    queries, rows, arguments = make(40, 12, 9, 8)
    targets_T, negatives_TR = arguments["targets_T"], arguments["negatives_TR"]
    queries_TD = F.normalize(queries.float(), dim=1) / 0.05
    rows_UD = F.normalize(rows.float(), dim=1)
    positives_T = (queries_TD * rows_UD[targets_T]).sum(1)
    logits_TR = torch.einsum("td,trd->tr", queries_TD, rows_UD[negatives_TR])
    masked_TR = logits_TR.masked_fill(negatives_TR == targets_T[:, None], -5e4)
    wanted = torch.cat([positives_T[:, None], masked_TR], 1).logsumexp(1) - positives_T
    found = sampled_softmax_loss(queries_TD, rows_UD, **arguments, backend=path)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_logits_serve_other_losses(path: str) -> None:
    queries, rows, arguments = make(11, 4, 6, 5)
    indices_TK = arguments["negatives_TR"]
    ours, theirs = ([x.float().requires_grad_() for x in (queries, rows)] for _ in range(2))
    found = sampled_logits(*ours, indices_TK, temperature=0.5, backend=path)  # type: ignore[arg-type]
    wanted = torch.stack([2 * theirs[1][names] @ query for query, names in zip(theirs[0], indices_TK, strict=True)])
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(F.softplus(x).sum(), y) for x, y in ((found, ours), (wanted, theirs))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_each_kernel_is_its_sum(path: str, dtype: torch.dtype, tolerance: float) -> None:
    queries, rows, arguments = make(11, 4, 6, 5)
    queries, rows, places = queries.to(dtype), rows.to(dtype), arguments["negatives_TR"]
    weights = torch.randn(places.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    dots, d_queries, d_rows = (torch.zeros(*size, dtype=torch.float64) for size in ((11, 4), (11, 5), (6, 5)))
    for t, named in enumerate(places.tolist()):
        for k, u in enumerate(named):
            dots[t, k] = (queries[t].double() * rows[u].double()).sum()
            d_queries[t] += weights[t, k].double() * rows[u].double()
            d_rows[u] += weights[t, k].double() * queries[t].double()
    kernels = kernels_of(path)  # type: ignore[arg-type]
    for found, wanted in (
        (kernels.dots(queries, rows, places), dots),
        (kernels.queries_gradient(weights, rows, places), d_queries),
        (kernels.rows_gradient(weights, queries, places, 6), d_rows),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_frozen_inputs_and_strides(path: str) -> None:
    queries, rows, arguments = make(5, 4, 6, 8)
    half_TD, half_UD = queries.float()[:, ::2], rows.float()[:, ::2]
    arguments["negatives_TR"] = arguments["negatives_TR"].T.contiguous().T
    wanted = truth(half_TD.double(), half_UD.double(), *(arguments[x].tolist() for x in ("targets_T", "negatives_TR")))
    whole = None
    for frozen in (None, 0, 1):
        inputs = [x.clone(memory_format=torch.preserve_format) for x in (half_TD, half_UD)]
        for i, x in enumerate(inputs):
            x.requires_grad_(i != frozen)
        losses = sampled_softmax_loss(*inputs, **arguments, backend=path)  # type: ignore[arg-type]
        torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
        losses.sum().backward()
        whole = [x.grad for x in inputs] if frozen is None else whole
        assert whole is not None
        for i, x in enumerate(inputs):
            assert x.grad is None if i == frozen else torch.equal(x.grad, whole[i])  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS[1:], indirect=True)
def test_the_number_of_threads_changes_no_bit(path: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            queries, rows, arguments = make(60, 20, 50, 24)
            inputs = [x.float().requires_grad_() for x in (queries, rows)]
            losses = sampled_softmax_loss(*inputs, **arguments, backend=path)  # type: ignore[arg-type]
            results.append([losses, *torch.autograd.grad(losses.sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiled_path_is_there() -> None:
    assert load_native(Path(cpu.__file__).with_name("cpu.cpp")) is not None


def test_nothing_of_tokens_times_negatives_times_dim() -> None:
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
            return out

    queries, rows, arguments = make(64, 32, 100, 48)
    sizes = {}
    for backend in ("cpu", "reference"):
        inputs = [x.float().requires_grad_() for x in (queries, rows)]
        with Largest() as largest:
            sampled_softmax_loss(*inputs, **arguments, backend=backend).sum().backward()  # type: ignore[arg-type]
        sizes[backend] = largest.numbers
    assert sizes["reference"] >= 64 * 33 * 48
    assert sizes["cpu"] == 100 * 48  # the table's gradient


def test_derivatives_of_both_orders() -> None:
    queries, rows, arguments = make(3, 4, 4, 2)
    inputs = [x.requires_grad_() for x in (queries, rows)]

    def call(queries: Tensor, rows: Tensor) -> Tensor:
        return sampled_softmax_loss(queries, rows, temperature=0.7, **arguments)

    assert torch.autograd.gradcheck(call, inputs)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    with pytest.raises(RuntimeError, match=r"^sampled_softmax: backend='cpu' is differentiable once; .*'reference'"):
        torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)


def test_flops_and_bytes() -> None:
    assert sampled_softmax_flops(3, 4, 5) == 2 * sum(5 for _ in range(3) for _ in range(1 + 4))
    assert sampled_softmax_bytes(3, 4, 5, element_size=2) == 3 * 5 * (5 * 2 + 8 + 4) + 3 * 5 * 2


# ---- a GPU's kernels ---------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        tolerance = 4e-6
        for sizes in ((5, 9, 7, 19), (3, 70, 4, 16), (1, 0, 1, 1), (0, 2, 3, 4), (2, 1, 90, 33)):
            queries, rows, arguments = make(*sizes)
            check(queries, rows, arguments, dtype, "triton", tolerance=tolerance, device=device)
        queries, rows, arguments = make(6, 5, 4, 3)
        arguments |= {"temperature": 0.4, "log_weights_U": torch.arange(4.0)}
        check(queries, rows, arguments, dtype, "triton", tolerance=4 * tolerance, device=device)
    inputs = [x.to(device).requires_grad_() for x in (queries, rows)]
    indices = {k: arguments[k].to(device) for k in ("targets_T", "negatives_TR")}
    with pytest.raises(ValueError, match="backend='triton' takes float32, float16 and bfloat16, got torch.float64"):
        sampled_softmax_loss(*inputs, **indices, backend="triton")
    loss = sampled_softmax_loss(*(x.float() for x in inputs), **indices, backend="triton").sum()  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="^sampled_softmax: backend='triton' is differentiable once"):
        torch.autograd.grad(loss, inputs, create_graph=True)


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
    arguments: dict[str, Any] = {
        "queries_TD": torch.zeros(3, 2),
        "rows_UD": torch.zeros(4, 2),
        "targets_T": torch.zeros(3, dtype=torch.int64),
        "negatives_TR": torch.ones(3, 5, dtype=torch.int64),
    }
    return sampled_softmax_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries_TD": torch.zeros(3)}, r"queries_TD: expected a float matrix, got torch.float32 \(3,\)"),
        ({"rows_UD": torch.zeros(4, 2).long()}, r"rows_UD: expected a float matrix, got torch.int64 \(4, 2\)"),
        ({"rows_UD": torch.zeros(4, 3)}, r"rows_UD: expected width 2 like queries_TD, got 3"),
        ({"rows_UD": torch.zeros(4, 2, device="meta")}, r"rows_UD: expected the device of queries_TD, cpu, got meta"),
        ({"queries_TD": torch.zeros(2, 2)}, r"targets_T: expected 2 tokens like queries_TD, got 3"),
        ({"targets_T": torch.zeros(3, 1).long()}, r"targets_T: expected one row a token, .* got \(3, 1\)"),
        ({"targets_T": torch.zeros(3)}, r"targets_T: expected int64 .* got torch.float32 on cpu"),
        ({"negatives_TR": torch.zeros(2, 5).long()}, r"negatives_TR: expected rows for each of 3 .* got \(2, 5\)"),
        ({"negatives_TR": torch.zeros(3, 5).int()}, r"negatives_TR: expected int64 .* got torch.int32 on cpu"),
        ({"targets_T": torch.full((3,), 4)}, r"targets_T: expected rows of rows_UD, 0 ... 3, got 4 ... 4; index"),
        ({"negatives_TR": torch.full((3, 5), -1)}, r"negatives_TR: expected rows of rows_UD, 0 ... 3, got -1 ... -1"),
        ({"log_weights_U": torch.zeros(3)}, r"log_weights_U: expected one for each row .*\(4,\) on cpu, got \(3,\)"),
        ({"temperature": 0.0}, r"temperature=0.0: expected a number above 0"),
        ({"backend": "cuda"}, r"backend: expected one of auto, .* got 'cuda'"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    assert call().shape == (3,)
    with pytest.raises(ValueError, match="^" + message):
        call(**changes)


if __name__ == "__main__":
    check_triton("cpu", [torch.float32, torch.float16])
