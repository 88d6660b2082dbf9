"""Position and time encodings against the formula, one token at a time in float64."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.ops import position_encoding
from lightning_gr.ops.jagged import JaggedLayout
from lightning_gr.ops.position_encoding import add_encodings, encoding_bytes, encoding_flops, gap_buckets, gaps_to_last


def truth(x: Tensor, position: Tensor, time: Tensor, case: dict[str, Any]) -> Tensor:
    """Token by token; ties of a bucket's edge are decided by Python's own float64."""
    out = []
    for i in range(len(x)):
        row = min(max(int(case["positions_T"][i]), 0), len(position) - 1)
        units = max(0, int(case["gaps_T"][i])) / case["time_unit"]
        value = math.sqrt(units) if case["bucket_by"] == "sqrt" else math.log(max(1.0, units))
        bucket = min(math.floor(value / case["bucket_width"]), len(time) - 1)
        out.append(case["scale"] * x[i] + position[row] + time[bucket])
    return torch.stack(out) if out else torch.zeros_like(x)


def make(tokens: int, width: int, rows: int = 5, buckets: int = 7, seed: int = 0, by: str = "sqrt") -> Any:
    """x and both tables in float64, and the rest of the arguments."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, width, dtype=torch.float64, generator=g) for n in (tokens, rows, buckets)]
    case = {
        "positions_T": torch.randint(-2, rows + 2, (tokens,), generator=g),
        "gaps_T": torch.randint(-60, 3000, (tokens,), generator=g),
        "bucket_by": by,
        "time_unit": 60.0 if by == "sqrt" else 7.0,
        "bucket_width": 1.0 if by == "sqrt" else 0.7,
        "scale": math.sqrt(width) if width else 1.0,
    }
    return tensors, case


def check(tensors: list[Tensor], case: Any, dtype: torch.dtype, backend: Any, tolerance: float, device: str) -> None:
    """Values and every gradient equal the truth's on the same rounded inputs."""
    ours = [x.to(device, dtype).requires_grad_() for x in tensors]
    theirs = [x.detach().cpu().double().requires_grad_() for x in ours]
    moved = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in case.items()}
    out = add_encodings(ours[0], position_table_PD=ours[1], time_table_ND=ours[2], **moved, backend=backend)
    wanted = truth(*theirs, case)
    assert out.dtype == dtype
    step = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = [out, *torch.autograd.grad(out, ours, step.to(out))]
    expected = [wanted]
    if len(wanted):
        expected += torch.autograd.grad(wanted, theirs, step.to(dtype).double(), allow_unused=True)
    else:
        expected += [torch.zeros_like(x) for x in theirs]
    for a, b in zip(found, expected, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a.detach().cpu().double(), b.detach().double().cpu(), rtol=tolerance, atol=tolerance)


SIZES = [(0, 3), (1, 1), (7, 5), (40, 33), (150, 20)]


@pytest.mark.parametrize("by", ["sqrt", "log"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-12),
        ("cpu", torch.float64, 1e-12),
        ("cpu", torch.float32, 2e-5),
        ("cpu", torch.bfloat16, 2e-2),
        ("cpu", torch.float16, 2e-3),
    ],
)
def test_equals_the_formula(backend: str, dtype: torch.dtype, tolerance: float, by: str) -> None:
    for size in SIZES:
        check(*make(*size, by=by), dtype, backend, tolerance, "cpu")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position_encoding.cpu, "load_native", lambda _: None)
    check(*make(40, 33), torch.float32, "cpu", 2e-5, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: Any) -> None:
    tensors, case = make(6, 3)

    def run(x: Tensor, position: Tensor, time: Tensor) -> Tensor:
        return add_encodings(x, position_table_PD=position, time_table_ND=time, **case, backend=backend)

    inputs = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(run, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, inputs)
    else:
        with pytest.raises(RuntimeError, match="^add_encodings: backend='cpu' is differentiable once"):
            torch.autograd.grad(run(*inputs).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_either_table_may_be_missing(backend: Any) -> None:
    (x, position, time), case = make(9, 4)
    x, position, time = (y.float() for y in (x, position, time))
    both = add_encodings(x, position_table_PD=position, time_table_ND=time, **case, backend=backend)
    places = {"positions_T": case.pop("positions_T"), "position_table_PD": position}
    gaps = {"gaps_T": case.pop("gaps_T"), "time_table_ND": time}
    one = add_encodings(x, **places, **case, backend=backend)
    other = add_encodings(x, **gaps, **case, backend=backend)
    none = add_encodings(x, **case, backend=backend)
    torch.testing.assert_close(none, x * case["scale"])
    torch.testing.assert_close(one + other - none, both)


def test_sums_repeat_bit_for_bit() -> None:
    tensors, case = make(3000, 40)
    x, position, time = (y.float().requires_grad_() for y in tensors)
    results, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = add_encodings(x, position_table_PD=position, time_table_ND=time, **case)
            results.append(torch.autograd.grad(out.square().sum(), [position, time]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(-10, 1 << 45),
    st.sampled_from(["sqrt", "log"]),
    st.sampled_from([1.0, 7.0, 60.0, 0.25]),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([1, 2, 50, 3000]),
)
def test_buckets_are_those_of_the_formula(gap: int, by: Any, unit: float, width: float, buckets: int) -> None:
    found = gap_buckets(torch.tensor([gap]), num_buckets=buckets, by=by, unit=unit, width=width)
    value = math.sqrt(max(gap, 0) / unit) if by == "sqrt" else math.log(max(1.0, gap / unit))
    wanted = {min(math.floor(x / width), buckets - 1) for x in (value * (1 - 1e-15), value, value * (1 + 1e-15))}
    assert int(found) in wanted


def test_gaps_to_the_last_token() -> None:
    layout = JaggedLayout.from_lengths(torch.tensor([2, 0, 3, 1]))
    assert gaps_to_last(torch.tensor([5, 9, 1, 4, 8, 7]), layout).tolist() == [4, 0, 7, 4, 0, 0]
    empty = JaggedLayout.from_lengths(torch.zeros(2, dtype=torch.int64))
    assert gaps_to_last(torch.zeros(0, dtype=torch.int64), empty).tolist() == []
    with pytest.raises(ValueError, match="times_T: expected 6 int64 seconds, got torch.int64 of shape"):
        gaps_to_last(torch.zeros(5, dtype=torch.int64), layout)


def test_counts() -> None:
    assert encoding_flops(10, width=4, num_tables=2) == 10 * 4 * 3
    assert encoding_bytes(10, width=4, num_tables=1, itemsize=2) == 10 * (3 * 4 * 2 + 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_TD": torch.zeros(3)}, r"x_TD: expected floats \(tokens, width\), got torch.float32 of shape \(3,\)"),
        ({"positions_T": None}, "positions_T=None: position_table_PD is given"),
        ({"time_table_ND": None}, "time_table_ND=None: gaps_T is given"),
        ({"positions_T": torch.zeros(4, dtype=torch.int64)}, r"positions_T: expected 3 int64 numbers, .* \(4,\)"),
        ({"gaps_T": torch.zeros(3)}, "gaps_T: expected 3 int64 numbers, one a token, got torch.float32"),
        ({"time_table_ND": torch.zeros(5, 3)}, r"time_table_ND: expected \(rows, 2\), as wide as x_TD, got"),
        ({"time_table_ND": torch.zeros(5, 2).long()}, "time_table_ND: expected a floating dtype, got torch.int64"),
        ({"position_table_PD": torch.zeros(0, 2)}, "position_table_PD: expected"),
        ({"position_table_PD": torch.zeros(4, 2, device="meta")}, "position_table_PD: expected the device of x_TD"),
        ({"bucket_by": "linear"}, "bucket_by: expected 'sqrt' or 'log', got 'linear'"),
        ({"time_unit": 0.0}, "time_unit: expected a number above 0, got 0.0"),
        ({"bucket_width": -1.0}, "bucket_width: expected a number above 0, got -1.0"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x_TD": torch.zeros(3, 2),
        "positions_T": torch.zeros(3, dtype=torch.int64),
        "position_table_PD": torch.zeros(4, 2),
        "gaps_T": torch.zeros(3, dtype=torch.int64),
        "time_table_ND": torch.zeros(5, 2),
    } | changes
    with pytest.raises(ValueError, match=message):
        add_encodings(arguments.pop("x_TD"), **arguments)


def test_positions_are_checked_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GR_DEBUG", "1")
    with pytest.raises(ValueError, match=r"positions_T\[1\]=4: expected 0 \.\.\. 3, rows of the table"):
        add_encodings(torch.zeros(2, 2), positions_T=torch.tensor([0, 4]), position_table_PD=torch.zeros(4, 2))


# ---- Triton --------------------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        tolerance = {torch.float32: 2e-5, torch.float16: 2e-3}.get(dtype, 2e-2)
        for size in ((0, 3), (1, 1), (21, 33)):
            check(*make(*size, by="log"), dtype, "triton", tolerance, device)
        check(*make(150, 5, rows=2, buckets=1), dtype, "triton", 2 * tolerance, device)
    (x, position, _), _ = make(9, 4)
    x, position = (y.to(device, torch.float32).requires_grad_() for y in (x, position))
    places = {"positions_T": torch.arange(9, device=device) % 5, "position_table_PD": position}
    for tables in ({}, places):
        out = add_encodings(x, **tables, scale=2.0, backend="triton")
        torch.testing.assert_close(out, add_encodings(x, **tables, scale=2.0, backend="reference"))
    with pytest.raises(RuntimeError, match="^add_encodings: backend='triton' is differentiable once"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="backend='triton' takes float32, float16 and bfloat16, got torch.float64"):
        add_encodings(x.double(), backend="triton")


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


if __name__ == "__main__":
    check_triton("cpu", [torch.float32, torch.float16])
