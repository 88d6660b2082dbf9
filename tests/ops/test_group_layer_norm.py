"""Group layer norm against its formula, computed token by token in float64."""

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

from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.group_layer_norm import cpu as cpu_module
from lightning_gr.ops.group_layer_norm import group_layer_norm, group_layer_norm_bytes, group_layer_norm_flops
from lightning_gr.ops.huge_pages import empty_in_huge_pages

PATHS = ["reference", "cpu", "cpu in PyTorch"]
EPS = 1e-3


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend; the second name of the CPU's is the path that runs where nothing is compiled."""
    if request.param == "cpu in PyTorch":
        monkeypatch.setattr(cpu_module, "load_native", lambda source: None)
    return request.param.split()[0]


all_paths = pytest.mark.parametrize("path", PATHS, indirect=True)


def truth(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, groups: list[int]) -> Tensor:
    rows = []
    for t, group in enumerate(groups):
        mean = x[t].sum() / x.shape[1]
        variance = ((x[t] - mean) ** 2).sum() / x.shape[1]
        row = (x[t] - mean) / (variance + EPS) ** 0.5 * weight[group] + bias[group]
        rows.append(row if gate is None else row * gate[t])
    parameters = weight.sum() + bias.sum() + (0 if gate is None else gate.sum())
    return torch.stack(rows) if rows else x * parameters


def make(num_tokens: int, dim: int, num_groups: int, *, gate: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a call in float64; the rows of x and gate are parts of wider ones, as after a split."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.randn(2, num_tokens, 2 * dim + 3, generator=draw, dtype=torch.float64)
    tensors = {"x_TD": 2 * wide[0, :, 1 : dim + 1] + 1, "gate_TD": wide[1, :, dim : 2 * dim]}
    tensors["weight_GD"], tensors["bias_GD"] = torch.randn(2, num_groups, dim, generator=draw, dtype=torch.float64)
    if not gate:
        del tensors["gate_TD"]
    return tensors


def check(
    sizes: tuple[int, int, int],
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    tolerance: float,
    groups: list[int] | None = None,
    gate: bool = True,
    device: str = "cpu",
    index_dtype: torch.dtype = torch.int64,
) -> None:
    """Values and all gradients, with errors relative to the largest of each."""
    num_tokens, _, num_groups = sizes
    if groups is None:
        # The last group has no token.
        groups = torch.randint(
            max(1, num_groups - 1), (num_tokens,), generator=torch.Generator().manual_seed(1)
        ).tolist()
    tensors = {name: x.to(device, dtype) for name, x in make(*sizes, gate=gate).items()}
    exact = {name: x.cpu().double().requires_grad_() for name, x in tensors.items()}
    inputs = {name: x.requires_grad_() for name, x in tensors.items()}
    groups_T = None if num_groups == 1 else torch.tensor(groups, dtype=index_dtype, device=device)
    found = group_layer_norm(**inputs, groups_T=groups_T, eps=EPS, backend=backend)  # type: ignore[arg-type]
    wanted = truth(exact["x_TD"], exact["weight_GD"], exact["bias_GD"], exact.get("gate_TD"), groups)
    assert found.dtype == dtype
    slope = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    of = torch.autograd.grad(found, list(inputs.values()), slope.to(device))
    true = torch.autograd.grad(wanted, list(exact.values()), slope.double())
    for name, x, y in zip(["out", *inputs], [found, *of], [wanted, *true], strict=True):
        assert x.shape == y.shape
        assert x.dtype == dtype
        if y.numel():
            difference = (x.detach().cpu().double() - y.detach()).abs().max()
            error = difference / y.detach().abs().max().clamp(min=0.1)
            assert float(error) <= tolerance, f"{name}: {float(error)}"


@all_paths
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("sizes", [(0, 3, 1), (0, 3, 2), (1, 1, 1), (1, 7, 3), (9, 5, 1), (70, 17, 4)])
def test_values_and_gradients(sizes: tuple[int, int, int], gate: bool, path: Any) -> None:
    check(sizes, path, gate=gate, tolerance=2e-6)
    check(sizes, path, torch.float64, gate=gate, index_dtype=torch.int32, tolerance=1e-12)
    check(sizes, path, torch.bfloat16, gate=gate, tolerance=4e-2)


@settings(deadline=None, max_examples=20)
@given(
    groups=st.lists(st.integers(0, 3), max_size=9),
    dim=st.integers(1, 20),
    gate=st.booleans(),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_groups(groups: list[int], dim: int, gate: bool, backend: str) -> None:
    # Of two columns x's gradient is what nearly cancels.
    check((len(groups), dim, 4), backend, groups=groups, gate=gate, tolerance=3e-4)


@all_paths
def test_one_group_is_torchs_layer_norm_times_the_gate(path: Any) -> None:
    tensors = {name: x.float() for name, x in make(40, 33, 1).items()}
    x, gate, weight, bias = (tensors[name] for name in ("x_TD", "gate_TD", "weight_GD", "bias_GD"))
    wanted = F.layer_norm(x, (33,), weight[0], bias[0], 1e-5) * gate
    torch.testing.assert_close(group_layer_norm(**tensors, groups_T=None, backend=path), wanted)
    zeros = torch.zeros(40, dtype=torch.int64)
    torch.testing.assert_close(group_layer_norm(**tensors, groups_T=zeros, backend=path), wanted)


@pytest.mark.parametrize("path", PATHS[1:], indirect=True)
def test_the_number_of_threads_changes_nothing(path: Any) -> None:
    tensors = {name: x.float().requires_grad_() for name, x in make(700, 64, 3).items()}
    groups_T = torch.arange(700) % 3
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = group_layer_norm(**tensors, groups_T=groups_T, backend=path)
            results.append((out, *torch.autograd.grad(out.sum(), list(tensors.values()))))
    finally:
        torch.set_num_threads(before)
    # PyTorch's own sums may depend on the threads.
    assert all(torch.equal(x, y) if path == "cpu" else True for x, y in zip(results[0], results[1], strict=True))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y)


def test_derivatives_of_both_orders() -> None:
    groups_T = torch.tensor([1, 0, 1])
    inputs = [x.detach().requires_grad_() for x in make(3, 4, 2).values()]

    def call(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_layer_norm(x, weight_GD=weight, bias_GD=bias, groups_T=groups_T, gate_TD=gate)

    assert torch.autograd.gradcheck(call, inputs)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    with pytest.raises(RuntimeError, match=r"^group_layer_norm: backend='cpu' is differentiable once; .*'reference'"):
        torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)


def test_only_the_gradients_that_are_wanted() -> None:
    tensors = make(5, 4, 2)
    groups_T = torch.tensor([1, 0, 1, 1, 0])
    tensors["weight_GD"].requires_grad_()
    group_layer_norm(**tensors, groups_T=groups_T).sum().backward()
    assert tensors["weight_GD"].grad is not None
    assert tensors["x_TD"].grad is None


# ---- dropout ---------------------------------------------------------------------------------------------------------


def under_dropout(rate: float, backend: str = "auto", device: str = "cpu", **settings: Any) -> list[Tensor]:
    """Result and gradients of a fixed seed."""
    tensors = {name: x.float().to(device).requires_grad_() for name, x in make(130, 40, 2).items()}
    groups_T = torch.arange(130, device=device) % 2
    torch.manual_seed(3)
    out = group_layer_norm(**tensors, groups_T=groups_T, dropout=rate, backend=backend, **settings)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(tensors.values()))]


@all_paths
def test_dropout_drops_elements_in_training_alone(path: Any) -> None:
    whole = under_dropout(0.0)[0]
    assert torch.equal(under_dropout(0.3)[0], whole)
    assert torch.equal(under_dropout(0.3, training=False)[0], whole)
    assert torch.equal(under_dropout(0.0, training=True)[0], whole)
    thinned, *gradients = under_dropout(0.3, path, training=True)
    kept = thinned != 0
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.025)  # 4 deviations of 5200 draws
    for axis in (0, 1):  # along neither axis the same draw again
        assert float((kept.narrow(axis, 1, 39) == kept.narrow(axis, 0, 39)).float().mean()) == pytest.approx(
            0.58, abs=0.06
        )
    torch.testing.assert_close(thinned[kept], whole[kept] / 0.7)
    # What was kept is a constant factor, through which the gradients of the undropped operator flow.
    tensors = {name: x.float().requires_grad_() for name, x in make(130, 40, 2).items()}
    out = group_layer_norm(**tensors, groups_T=torch.arange(130) % 2, backend="reference")
    wanted = torch.autograd.grad((out * kept / 0.7).square().sum(), list(tensors.values()))
    for x, y in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_dropout_draws_anew_each_time_and_the_same_from_one_seed() -> None:
    first, same = under_dropout(0.5, training=True)[0], under_dropout(0.5, training=True)[0]
    assert torch.equal(first, same)
    ones = torch.ones(64, 64)
    tensors = {"weight_GD": torch.zeros(1, 64), "bias_GD": torch.ones(1, 64), "groups_T": None}
    one, other = (group_layer_norm(ones, **tensors, dropout=0.5, training=True) for _ in range(2))  # type: ignore[arg-type]
    assert float((one == other).float().mean()) == pytest.approx(0.5, abs=0.04)


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_a_large_tensor_in_huge_pages_is_as_any_other() -> None:
    for rows in (0, 1, 1 << 20):
        tensor = empty_in_huge_pages(rows, 2, dtype=torch.float32)
        assert tensor.shape == (rows, 2)
        assert float(tensor.fill_(1).sum()) == 2 * rows


def test_autocast_leaves_it_alone() -> None:
    tensors = {name: x.float() for name, x in make(6, 8, 1).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = group_layer_norm(**tensors, groups_T=None)
    assert torch.equal(out, group_layer_norm(**tensors, groups_T=None))


def test_flops_and_bytes() -> None:
    sums, differences, squares, norm, affine = 1, 1, 2, 2, 2  # of an element
    assert group_layer_norm_flops(3, dim=5, gate=False) == 3 * 5 * (sums + differences + squares + norm + affine)
    assert group_layer_norm_flops(3, dim=5) == group_layer_norm_flops(3, dim=5, gate=False) + 3 * 5
    assert group_layer_norm_bytes(3, dim=5, element_size=2) == 2 * 3 * (3 * 5)
    assert group_layer_norm_bytes(3, dim=5, gate=False) == 4 * 2 * (3 * 5)


# ---- a GPU's kernels -------------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        tolerance = max(4e-6, 6 * torch.finfo(dtype).eps)
        for sizes, gate in (((0, 3, 2), True), ((1, 1, 1), True), ((70, 19, 1), False), ((70, 33, 4), True)):
            check(sizes, "triton", dtype, gate=gate, tolerance=tolerance, device=device)
        check((40, 16, 3), "triton", dtype, index_dtype=torch.int32, tolerance=tolerance, device=device)
    wanted = under_dropout(0.3, "reference", training=True)
    for x, y in zip(under_dropout(0.3, "triton", device, training=True), wanted, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-4)
    tensors = {name: x.to(device).requires_grad_() for name, x in make(3, 4, 1).items()}
    with pytest.raises(ValueError, match=r"backend='triton' takes float32, .* got torch\.float64"):
        group_layer_norm(**tensors, groups_T=None, backend="triton")
    singles = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    out = group_layer_norm(**singles, groups_T=None, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton' is differentiable once; .*'reference'"):
        torch.autograd.grad(out.sum(), list(singles.values()), create_graph=True)


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


# ---- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_TD": torch.zeros(5)}, r"x_TD: expected floats of shape \(tokens, width\), got torch.float32 \(5,\)"),
        ({"x_TD": torch.zeros(5, 0)}, r"x_TD: expected floats .* \(5, 0\)"),
        ({"x_TD": torch.zeros(5, 3).long()}, r"x_TD: expected floats .* torch.int64"),
        ({"weight_GD": torch.zeros(3)}, r"weight_GD: expected \(3 groups, 3\), got \(3,\)"),
        ({"weight_GD": torch.zeros(2, 4)}, r"weight_GD: expected \(2 groups, 3\), got \(2, 4\)"),
        ({"weight_GD": torch.zeros(0, 3)}, r"weight_GD: expected \(1 groups, 3\), got \(0, 3\)"),
        ({"weight_GD": torch.zeros(())}, r"weight_GD: expected \(1 groups, 3\), got \(\)"),
        ({"bias_GD": torch.zeros(1, 3)}, r"bias_GD: expected \(2 groups, 3\), got \(1, 3\)"),
        ({"bias_GD": torch.zeros(2, 3).int()}, r"bias_GD: expected floats on cpu like x_TD, got torch.int32 cpu"),
        ({"weight_GD": torch.zeros(2, 3, device="meta")}, r"weight_GD: expected floats on cpu .* meta"),
        ({"groups_T": None}, r"groups_T=None: there are 2 groups"),
        ({"groups_T": torch.zeros(4).long()}, r"groups_T: expected int64 or int32 for each of 5 .* \(4,\)"),
        ({"groups_T": torch.zeros(5)}, r"groups_T: expected int64 or int32 .* torch.float32"),
        ({"groups_T": torch.zeros(5, device="meta").long()}, r"groups_T: expected the device of x_TD, cpu, got meta"),
        ({"groups_T": torch.tensor([0, 1, 2, 0, 0])}, r"groups_T: expected 0 \.\.\. 1, got 2"),
        ({"groups_T": torch.tensor([0, 1, -1, 0, 0])}, r"groups_T: expected 0 \.\.\. 1, got -1"),
        ({"gate_TD": torch.zeros(5, 4)}, r"gate_TD: expected the shape of x_TD, \(5, 3\), got \(5, 4\)"),
        ({"gate_TD": torch.zeros(5, 3).half()}, r"gate_TD: expected torch.float32 on cpu like x_TD, got torch.float16"),
        ({"gate_TD": torch.zeros(5, 3, device="meta")}, r"gate_TD: expected .* on meta"),
        ({"eps": -1.0}, r"eps: expected a number of 0 or more, got -1\.0"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"backend": "triton"}, r"backend='triton': the tensors are on cpu"),
        ({"backend": "cuda"}, r"backend: expected one of .*, got 'cuda'"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x_TD": torch.zeros(5, 3),
        "weight_GD": torch.zeros(2, 3),
        "bias_GD": torch.zeros(2, 3),
        "groups_T": torch.zeros(5, dtype=torch.int64),
    }
    assert group_layer_norm(**arguments).shape == (5, 3)
    with pytest.raises(ValueError, match="^" + message):
        group_layer_norm(**(arguments | changes))


if __name__ == "__main__":
    check_triton("cpu", [torch.float32, torch.float16])
