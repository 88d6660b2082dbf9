"""Norm, projection and SiLU against their formulas, computed token by token in float64."""

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
from lightning_gr.ops.group_layer_norm import cpu as norm_module
from lightning_gr.ops.uvqk_projection import cpu as cpu_module
from lightning_gr.ops.uvqk_projection import uvqk_projection, uvqk_projection_bytes, uvqk_projection_flops

PATHS = ["reference", "cpu", "cpu in PyTorch", "cpu in small chunks"]
EPS = 1e-3


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend; where nothing is compiled the CPU's has a path of its own, and long inputs come in chunks."""
    if request.param == "cpu in PyTorch":
        monkeypatch.setattr(cpu_module, "load_native", lambda source: None)
        monkeypatch.setattr(norm_module, "load_native", lambda source: None)
    if request.param in ("cpu in PyTorch", "cpu in small chunks"):
        monkeypatch.setattr(cpu_module, "_TOKENS_PER_CHUNK", 4)
    return request.param.split()[0]


all_paths = pytest.mark.parametrize("path", PATHS, indirect=True)


def truth(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, groups: list[int]) -> Tensor:
    rows = []
    for t, group in enumerate(groups):
        centred = x[t] - x[t].sum() / x.shape[1]
        normed = centred / ((centred**2).sum() / x.shape[1] + EPS) ** 0.5 * norm_weight[group] + norm_bias[group]
        z = torch.stack([(normed * row).sum() for row in weight]) + bias
        rows.append(z / (1 + torch.exp(-z)))
    everything = norm_weight.sum() + norm_bias.sum() + weight.sum() + bias.sum()
    return torch.stack(rows) if rows else x[:, :1] * everything * torch.ones(len(weight))


def make(num_tokens: int, dim: int, width: int, num_groups: int) -> dict[str, Tensor]:
    """Tensors of a call in float64; the rows of x are parts of wider ones."""
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return {
        "x_TD": 2 * randn(num_tokens, dim + 3)[:, 1 : dim + 1] + 1,
        "norm_weight_GD": randn(num_groups, dim),
        "norm_bias_GD": randn(num_groups, dim),
        "weight_ED": randn(width, dim) * 2 / dim**0.5,
        "bias_E": randn(width),
    }


def check(
    sizes: tuple[int, int, int, int],
    backend: str,
    dtype: torch.dtype = torch.float32,
    *,
    tolerance: float,
    device: str = "cpu",
    parameter_dtype: torch.dtype | None = None,
) -> None:
    """Values and all gradients, with errors relative to the largest of each."""
    num_tokens, *_, num_groups = sizes
    groups = torch.randint(num_groups, (num_tokens,), generator=torch.Generator().manual_seed(1))
    parameter_dtype = parameter_dtype or dtype
    tensors = {k: x.to(device, dtype if k == "x_TD" else parameter_dtype) for k, x in make(*sizes).items()}
    exact = [x.cpu().double().requires_grad_() for x in tensors.values()]
    inputs = {name: x.requires_grad_() for name, x in tensors.items()}
    groups_T = None if num_groups == 1 else groups.to(device)
    found = uvqk_projection(**inputs, groups_T=groups_T, eps=EPS, backend=backend)  # type: ignore[arg-type]
    wanted = truth(*exact, groups.tolist())
    assert found.dtype == dtype
    slope = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    of = torch.autograd.grad(found, list(inputs.values()), slope.to(device))
    true = torch.autograd.grad(wanted, exact, slope.double())
    for name, x, y in zip(["out", *inputs], [found, *of], [wanted, *true], strict=True):
        assert x.shape == y.shape
        assert x.dtype == (dtype if name in ("out", "x_TD") else parameter_dtype)
        if y.numel():
            difference = (x.detach().cpu().double() - y.detach()).abs().max()
            error = difference / y.detach().abs().max().clamp(min=0.1)
            assert float(error) <= tolerance, f"{name}: {float(error)}"


@all_paths
@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (1, 1, 1, 1), (1, 7, 5, 2), (9, 5, 3, 1), (70, 17, 11, 3)])
def test_values_and_gradients(sizes: tuple[int, int, int, int], path: Any) -> None:
    check(sizes, path, tolerance=4e-6)
    check(sizes, path, torch.float64, tolerance=1e-12)
    check(sizes, path, torch.bfloat16, tolerance=6e-2)


@pytest.mark.parametrize("path", PATHS[1:], indirect=True)
def test_parameters_may_be_wider_than_tokens(path: Any) -> None:
    check((9, 5, 3, 2), path, torch.bfloat16, parameter_dtype=torch.float32, tolerance=3e-2)


@settings(deadline=None, max_examples=20)
@given(
    num_tokens=st.integers(0, 9),
    dim=st.integers(3, 18),
    width=st.integers(1, 20),
    num_groups=st.integers(1, 3),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_sizes(num_tokens: int, dim: int, width: int, num_groups: int, backend: str) -> None:
    check((num_tokens, dim, width, num_groups), backend, tolerance=3e-4)


@all_paths
def test_one_group_is_torchs_own(path: Any) -> None:
    tensors = {name: x.float() for name, x in make(13, 33, 20, 1).items()}
    x, norm_weight, norm_bias, weight, bias = tensors.values()
    wanted = F.silu(F.linear(F.layer_norm(x, (33,), norm_weight[0], norm_bias[0], 1e-5), weight, bias))
    torch.testing.assert_close(uvqk_projection(**tensors, backend=path), wanted)
    zeros = torch.zeros(13, dtype=torch.int32)
    torch.testing.assert_close(uvqk_projection(**tensors, groups_T=zeros, backend=path), wanted)


@pytest.mark.parametrize("path", PATHS[1:3], indirect=True)
def test_silu_everywhere(path: Any) -> None:
    z = torch.cat([torch.linspace(-85, 85, 20001), torch.linspace(-1e-3, 1e-3, 101)])[None]
    zero, ones, out = torch.zeros(z.shape[1]), torch.ones_like(z), torch.empty_like(z)
    cpu_module._silu_forward(z, zero, out=out)
    exact = z.double()
    sigmoid = 1 / (1 + torch.exp(-exact))
    torch.testing.assert_close(out.double(), exact * sigmoid, rtol=2e-6, atol=0)
    middle = z.abs() < 16
    torch.testing.assert_close(out[middle].double(), (exact * sigmoid)[middle], rtol=4e-7, atol=0)
    bias_grad = cpu_module._silu_backward(z, zero, ones, out=out)
    torch.testing.assert_close(out.double(), sigmoid * (1 + exact * (1 - sigmoid)), rtol=1e-5, atol=3e-7)
    torch.testing.assert_close(bias_grad, out[0])
    extremes = torch.tensor([[-1e30, -200.0, 200.0, 1e30, torch.inf, torch.nan]])
    cpu_module._silu_forward(extremes, zero[:6], out=extremes)
    torch.testing.assert_close(extremes[0, 1:4], torch.tensor([0.0, 200.0, 1e30]), rtol=1e-6, atol=1e-30)
    assert not bool(extremes[0, 4:].isfinite().any())


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_module, "_TOKENS_PER_CHUNK", 300)
    tensors = {name: x.float().requires_grad_() for name, x in make(700, 16, 24, 2).items()}
    groups_T, before, results = torch.arange(700) % 2, torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = uvqk_projection(**tensors, groups_T=groups_T)
            results.append((out, *torch.autograd.grad(out.sum(), list(tensors.values()))))
    finally:
        torch.set_num_threads(before)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@all_paths
def test_autocast_sets_the_type_of_the_product(path: Any) -> None:
    tensors = {name: x.float().requires_grad_() for name, x in make(6, 8, 5, 1).items()}
    with torch.autocast("cpu", torch.bfloat16):
        out = uvqk_projection(**tensors, backend=path)
        wide = uvqk_projection(**make(6, 8, 5, 1), backend=path)
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    gradients = torch.autograd.grad(out.float().sum(), list(tensors.values()))
    assert {x.dtype for x in gradients} == {torch.float32}
    torch.testing.assert_close(out.double(), wide, rtol=5e-2, atol=5e-2)


def kept_bytes(call: Any) -> int:
    """Bytes that a forward pass keeps for backward, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def test_less_is_kept_than_by_plain_operations() -> None:
    tensors = {name: x.float().contiguous().requires_grad_() for name, x in make(50, 16, 32, 1).items()}
    x, norm_weight, norm_bias, weight, bias = tensors.values()
    normed = 4 * 50 * 16
    plain = kept_bytes(lambda: F.silu(F.linear(F.layer_norm(x, (16,), norm_weight[0], norm_bias[0]), weight, bias)))
    assert kept_bytes(lambda: uvqk_projection(**tensors)) <= plain - normed // 2
    with torch.no_grad():
        assert kept_bytes(lambda: uvqk_projection(**tensors)) == 0


def test_derivatives_of_both_orders() -> None:
    groups_T = torch.tensor([1, 0, 1])
    inputs = [x.detach().requires_grad_() for x in make(3, 4, 3, 2).values()]
    names = list(make(3, 4, 3, 2))

    def call(*tensors: Tensor) -> Tensor:
        return uvqk_projection(**dict(zip(names, tensors, strict=True)), groups_T=groups_T)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(call, inputs)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)
    with pytest.raises(RuntimeError, match=r"^uvqk_projection: backend='cpu' is differentiable once; .*'reference'"):
        torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True)


def test_flops_and_bytes() -> None:
    product = sum(2 * 5 for _ in range(3) for _ in range(7))
    assert uvqk_projection_flops(3, dim=5, projected_dim=7) == product + 3 * 7 * (1 + 4) + 3 * 5 * 8
    assert uvqk_projection_bytes(3, dim=5, projected_dim=7, element_size=2) == 2 * (3 * 5 + 5 * 7 + 2 * 3 * 7)


# ---- a GPU's kernels -------------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        tolerance = max(8e-6, 8 * torch.finfo(dtype).eps)
        for sizes in ((0, 3, 4, 2), (1, 1, 1, 1), (40, 17, 11, 3), (20, 9, 270, 1)):
            check(sizes, "triton", dtype, tolerance=tolerance, device=device)
    check((9, 5, 3, 2), "triton", torch.float16, parameter_dtype=torch.float32, tolerance=8e-3, device=device)
    tensors = {name: x.to(device).requires_grad_() for name, x in make(3, 4, 5, 1).items()}
    with pytest.raises(ValueError, match=r"backend='triton' takes float32, .* got torch\.float64"):
        uvqk_projection(**tensors, backend="triton")
    singles = {name: x.detach().float().requires_grad_() for name, x in tensors.items()}
    with pytest.raises(RuntimeError, match=r"backend='triton' is differentiable once; .*'reference'"):
        torch.autograd.grad(
            uvqk_projection(**singles, backend="triton").sum(), list(singles.values()), create_graph=True
        )
    with torch.autocast(device, torch.float16):
        assert uvqk_projection(**singles, backend="triton").dtype == torch.float16


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
        ({"norm_weight_GD": torch.zeros(3)}, r"norm_weight_GD: expected \(3 groups, 3\), got \(3,\)"),
        ({"norm_bias_GD": torch.zeros(2, 3)}, r"norm_bias_GD: expected \(1 groups, 3\), got \(2, 3\)"),
        ({"groups_T": torch.ones(5).long()}, r"groups_T: expected 0 \.\.\. 0, got 1"),
        ({"eps": -1.0}, r"eps: expected a number of 0 or more"),
        ({"weight_ED": torch.zeros(4, 2)}, r"weight_ED: expected \(projected width, 3\), got shape \(4, 2\)"),
        ({"weight_ED": torch.zeros(0, 3)}, r"weight_ED: expected \(projected width, 3\), got shape \(0, 3\)"),
        ({"weight_ED": torch.zeros(4, 3).int()}, r"weight_ED: expected floats on cpu like x_TD, got torch.int32 cpu"),
        ({"weight_ED": torch.zeros(4, 3, device="meta")}, r"weight_ED: expected floats on cpu .* meta"),
        ({"bias_E": torch.zeros(3)}, r"bias_E: expected 4 numbers, got shape \(3,\)"),
        ({"bias_E": torch.zeros(4).int()}, r"bias_E: expected floats on cpu like x_TD, got torch.int32 cpu"),
        ({"backend": "triton"}, r"backend='triton': the tensors are on cpu"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x_TD": torch.zeros(5, 3),
        "norm_weight_GD": torch.zeros(1, 3),
        "norm_bias_GD": torch.zeros(1, 3),
        "weight_ED": torch.zeros(4, 3),
        "bias_E": torch.zeros(4),
    }
    assert uvqk_projection(**arguments).shape == (5, 4)
    with pytest.raises(ValueError, match="^" + message):
        uvqk_projection(**(arguments | changes))


if __name__ == "__main__":
    check_triton("cpu", [torch.float32, torch.float16])
