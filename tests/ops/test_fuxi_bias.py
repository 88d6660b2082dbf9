"""FuXi's channels against their formulas, pair by pair in float64."""

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

from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.fuxi_bias import TimeFunction, cpu, fuxi_bias, fuxi_bias_bytes, fuxi_bias_flops
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

KINDS = ["buckets", "power_law", "exponential_power"]


def make(lengths: list[int], device: str = "cpu") -> JaggedLayout:
    return JaggedLayout.from_lengths(torch.tensor(lengths, dtype=torch.int64), device)


def time_map(kind: str, parameters: Tensor, gap: int, unit: float) -> Tensor:
    """``f(gap)`` of all heads."""
    if kind == "buckets":
        return parameters[min(math.floor(math.log(max(1, gap)) / 0.301), len(parameters) - 1)]
    if kind == "power_law":
        return parameters[0] / (1 + gap / unit) ** parameters[1]
    return parameters[0] * parameters[2] ** ((gap / unit) ** parameters[1] if gap else 0.0)


class Case:
    """Arguments of one call, with the tensors to differentiate apart, and the truth about it."""

    def __init__(
        self,
        q_lengths: list[int],
        k_lengths: list[int] | None = None,
        kind: str = "exponential_power",
        *,
        heads: int = 2,
        width: int = 3,
        rows: int = 5,
        placed: bool = False,
        causal: bool = False,
        seed: int = 0,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.q_lengths, self.k_lengths = q_lengths, q_lengths if k_lengths is None else k_lengths
        self.kind, self.unit, self.placed = kind, 1.0 if kind == "buckets" else 7.0, placed
        self.q_times, self.k_times = (
            torch.randint(0, 60, (sum(x),), generator=g) for x in (self.q_lengths, self.k_lengths)
        )
        self.q_at, self.k_at = (torch.randint(0, 9, (sum(x),), generator=g) for x in (self.q_lengths, self.k_lengths))
        intervals = []
        for m, n in zip(self.q_lengths, self.k_lengths, strict=True):
            for i in range(m):
                a, b, c = torch.randint(0, n + 1, (3,), generator=g).sort().values.tolist()
                own = i < n and bool(torch.rand((), generator=g) < 0.5)
                intervals.append((min(i + 1, n), 0, 0, False) if causal else (a, b, c, own))
        self.intervals = [(a, max(a, b), max(a, c), own) for a, b, c, own in intervals]
        v = torch.randn(sum(self.k_lengths), heads, width, dtype=torch.float64, generator=g)
        position = torch.randn(rows, heads, dtype=torch.float64, generator=g)
        count = {"buckets": 9, "power_law": 2, "exponential_power": 3}[kind]
        parameters = torch.rand(count, heads, dtype=torch.float64, generator=g) * 0.8 + 0.1
        self.tensors = [v, position, parameters]

    def ours(self, v: Tensor, position: Tensor | None, parameters: Tensor | None, **changes: Any) -> Any:
        device = v.device
        columns = torch.tensor(self.intervals, dtype=torch.int64, device=device).view(-1, 4).unbind(1)
        arguments: dict[str, Any] = {
            "q_layout": make(self.q_lengths, str(device)),
            "k_layout": make(self.k_lengths, str(device)),
            "mask": IntervalMask(*columns[:3], columns[3].bool()),
            "position_table_PH": position,
            "q_times_T": self.q_times.to(device),
            "k_times_T": self.k_times.to(device),
        }
        if parameters is not None:
            arguments["time_function"] = TimeFunction(self.kind, parameters, unit=self.unit)  # type: ignore[arg-type]
        if self.placed:
            arguments |= {"q_positions_T": self.q_at.to(device), "k_positions_T": self.k_at.to(device)}
        return fuxi_bias(v, **(arguments | changes))

    def true(self, v: Tensor, position: Tensor, parameters: Tensor) -> list[Tensor]:
        by_position, by_time, q, k = [], [], 0, 0
        reach = len(position) // 2
        for m, n in zip(self.q_lengths, self.k_lengths, strict=True):
            for i in range(m):
                a, b, c, own = self.intervals[q + i]
                rows = [v.new_zeros(v.shape[1:]), v.new_zeros(v.shape[1:])]
                for j in range(n):
                    if j < a or b <= j < c or (own and i == j):
                        distance = int(self.k_at[k + j] - self.q_at[q + i]) if self.placed else j - i
                        table_row = position[max(-reach, min(reach, distance)) + reach]
                        gap = abs(int(self.q_times[q + i]) - int(self.k_times[k + j]))
                        f = time_map(self.kind, parameters, gap, self.unit)
                        rows[0] = rows[0] + table_row[:, None] * v[k + j]
                        rows[1] = rows[1] + f[:, None] * v[k + j]
                by_position.append(rows[0])
                by_time.append(rows[1])
            q, k = q + m, k + n
        outs = [torch.stack(x) if x else v.new_zeros(0, *v.shape[1:]) for x in (by_position, by_time)]
        nothing = 0.0 * sum(x.sum() for x in (v, position, parameters))
        return [x + nothing for x in outs]


def check(case: Case, dtype: torch.dtype, backend: Any, tolerance: float, device: str = "cpu") -> None:
    """Both channels and every gradient equal the truth's on the same rounded values."""
    tensors = [case.tensors[0].to(dtype), *case.tensors[1:]]
    if dtype != torch.float64:
        tensors[1:] = [x.float() for x in tensors[1:]]
    ours = [x.to(device).requires_grad_() for x in tensors]
    theirs = [x.double().requires_grad_() for x in tensors]
    found, wanted = case.ours(*ours, backend=backend), case.true(*theirs)
    steps = [torch.randn(x.shape, generator=torch.Generator().manual_seed(s), dtype=dtype) for s, x in enumerate(found)]
    d_found = torch.autograd.grad(found, ours, [x.to(device) for x in steps])
    d_wanted = torch.autograd.grad(wanted, theirs, [x.double() for x in steps])
    for a, b in zip([*found, *d_found], [*wanted, *d_wanted], strict=True):
        limit = tolerance * max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0)
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=0, atol=limit)
    assert all(x.dtype == dtype for x in found)


LENGTHS: list[tuple[list[int], list[int] | None]] = [
    ([], None),
    ([0, 0], None),
    ([1], None),
    ([5, 0, 1, 7], None),
    ([3, 0, 2, 0, 1], [5, 2, 0, 0, 9]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equals_the_formula(backend: str, kind: str) -> None:
    for q_lengths, k_lengths in LENGTHS:
        for placed in (False, True):
            case = Case(q_lengths, k_lengths, kind, placed=placed)
            check(case, torch.float64, backend, 1e-12)
            check(case, torch.float32, backend, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_values(dtype: torch.dtype, tolerance: float) -> None:
    check(Case([5, 0, 1, 7]), dtype, "cpu", tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_of_rows(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MAP_ELEMENTS", 1)
    check(Case([37, 18], kind=kind, causal=True, rows=21), torch.float32, "cpu", 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_compiler(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load_native", lambda _: None)
    check(Case([3, 0, 2, 0, 1], [5, 2, 0, 0, 9], kind), torch.float32, "cpu", 1e-5)


def test_sums_repeat_bit_for_bit() -> None:
    case, threads = Case([60, 0, 33], causal=True, rows=21), torch.get_num_threads()
    tensors = [x.float().requires_grad_() for x in case.tensors]
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(torch.autograd.grad(sum(x.square().sum() for x in case.ours(*tensors)), tensors[1:]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for one in results[1:] for a, b in zip(one, results[0], strict=True))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_lengths_and_masks(lengths: list[tuple[int, int]], kind: str, placed: bool, seed: int) -> None:
    q_lengths, k_lengths = [q for q, _ in lengths], [k for _, k in lengths]
    check(Case(q_lengths, k_lengths, kind, placed=placed, seed=seed, rows=3), torch.float32, "cpu", 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: Any, kind: str) -> None:
    case = Case([3, 0, 2], kind=kind, width=2, heads=1)
    inputs = [x.requires_grad_() for x in case.tensors]

    def run(*inputs: Tensor) -> Any:
        return case.ours(*inputs, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, inputs)
    else:
        with pytest.raises(RuntimeError, match="^fuxi_bias: backend='cpu' is differentiable once"):
            torch.autograd.grad(run(*inputs)[0].sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_one_channel_and_one_gradient(backend: Any) -> None:
    case = Case([5, 0, 7])
    v, position, parameters = (x.float() for x in case.tensors)
    with use_backend(backend):
        both = case.ours(v, position, parameters)
        by_position, nothing = case.ours(v, position, None, q_times_T=None, k_times_T=None)
        assert nothing is None
        torch.testing.assert_close(by_position, both[0])
        nothing, by_time = case.ours(v, None, parameters)
        assert nothing is None
        torch.testing.assert_close(by_time, both[1])
        assert case.ours(v, None, None) == (None, None)
        for i in range(3):
            inputs = [v, position, parameters]
            inputs[i] = inputs[i].clone().requires_grad_()
            alone = torch.autograd.grad(sum(x.sum() for x in case.ours(*inputs)), inputs[i])[0]
            inputs = [x.detach().clone().requires_grad_() for x in inputs]
            together = torch.autograd.grad(sum(x.sum() for x in case.ours(*inputs)), inputs)[i]
            torch.testing.assert_close(alone, together)


def check_extremes(device: str, backend: Any) -> None:
    """Gaps of 0 and of a century, powers that overflow: finite values and gradients, and the limits of the formula."""
    layout = make([3], device)
    times = torch.tensor([0, 0, 1 << 32], device=device)
    v = torch.ones(3, 2, 1, device=device)
    for unit, beta in ((1.0, 4.0), (1e-6, 9.0), (86400.0, 0.5)):
        parameters = torch.tensor([[0.5, 2.0], [beta, beta], [0.5, 0.999]], device=device, requires_grad=True)
        function = TimeFunction("exponential_power", parameters, unit=unit)
        out = fuxi_bias(
            v,
            q_layout=layout,
            mask=IntervalMask.causal(layout),
            time_function=function,
            q_times_T=times,
            k_times_T=times,
            backend=backend,
        )[1]
        assert out is not None
        gradient = torch.autograd.grad(out.sum(), parameters)[0]
        assert bool(out.isfinite().all())
        assert bool(gradient.isfinite().all())
        torch.testing.assert_close(out[1, :, 0].detach(), 2 * parameters[0].detach())  # two gaps of 0
    out = function(torch.zeros(4, dtype=torch.int64, device=device))
    torch.testing.assert_close(out.detach(), parameters[0].detach()[:, None].expand(2, 4))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_extremes(backend: Any) -> None:
    check_extremes("cpu", backend)


def check_bucket_edges(device: str, backend: Any) -> None:
    """A pair a sequence, with gaps beside every edge: the bucket is that of float64."""
    gaps = sorted({max(0, int(math.exp(0.301 * n)) + k) for n in range(100) for k in (-1, 0, 1, 2)})
    layout, buckets = make([1] * len(gaps), device), 96
    out = fuxi_bias(
        torch.ones(len(gaps), 1, 1, device=device),
        q_layout=layout,
        mask=IntervalMask.causal(layout),
        time_function=TimeFunction.buckets(torch.arange(float(buckets), device=device)[:, None]),
        q_times_T=torch.zeros(len(gaps), dtype=torch.int64, device=device),
        k_times_T=torch.tensor(gaps, device=device),
        backend=backend,
    )[1]
    assert out is not None
    assert out.flatten().tolist() == [min(math.floor(math.log(max(1, x)) / 0.301), buckets - 1) for x in gaps]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bucket_edges(backend: Any) -> None:
    check_bucket_edges("cpu", backend)


def test_constructors_state_the_formulas() -> None:
    gap = torch.tensor([0, 7, 14])
    one = torch.ones(1, dtype=torch.float64)
    found = TimeFunction.power_law(3 * one, 2 * one, unit=7.0)(gap)
    torch.testing.assert_close(found, torch.tensor([[3, 3 / 4, 3 / 9]], dtype=torch.float64))
    found = TimeFunction.exponential_power(3 * one, 2 * one, 0.5 * one, unit=7.0)(gap)
    torch.testing.assert_close(found, torch.tensor([[3, 3 / 2, 3 / 16]], dtype=torch.float64))
    found = TimeFunction.buckets(torch.arange(4.0)[:, None], width=1.0)(torch.tensor([0, 1, 2, 3, 7, 8, 10**9]))
    assert found.tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def test_counts() -> None:
    layout = make([4, 0, 3])
    pairs = IntervalMask.causal(layout).num_visible_pairs(layout, layout)
    assert fuxi_bias_flops(pairs, num_heads=2, v_dim=5) == 2 * (10 + 6) * 2 * 5 * 2
    assert fuxi_bias_bytes(7, 7, num_heads=2, v_dim=5, itemsize=4, num_maps=1) == 2 * 7 * 2 * 5 * 4 + 7 * 41


TIMES = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"v_THV": torch.zeros(4, 2, 1)},
            r"v_THV: expected floats \(3 tokens, heads, width\), got torch.float32 .*4, 2",
        ),
        ({"k_layout": make([3, 0])}, "k_layout: expected 1 sequences, got 2"),
        ({"mask": IntervalMask.causal(make([2]))}, "mask: expected one row for each of 3 queries, got 2"),
        ({"position_table_PH": torch.zeros(4, 2)}, r"position_table_PH: expected floats \(odd number of rows, 2 heads"),
        ({"position_table_PH": torch.zeros(5)}, "position_table_PH: expected floats"),
        ({"time_function": TimeFunction.buckets(torch.zeros(4, 3))}, "time_function: expected 2 heads, got 3"),
        ({"q_times_T": None}, "q_times_T=None: time_function is given"),
        ({"k_times_T": torch.zeros(3)}, "k_times_T: expected 3 int64 numbers, got torch.float32"),
        ({"k_positions_T": TIMES}, "q_positions_T=None: k_positions_T is given"),
        ({"q_positions_T": TIMES}, "k_positions_T=None: q_positions_T is given"),
        ({"position_table_PH": torch.zeros(5, 2, device="meta")}, "position_table_PH: expected the device of v_THV"),
        ({"backend": "cuda"}, "backend: expected one of"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "v_THV": torch.zeros(3, 2, 1),
        "q_layout": make([3]),
        "mask": IntervalMask.causal(make([3])),
        "position_table_PH": torch.zeros(5, 2),
        "time_function": TimeFunction.buckets(torch.zeros(4, 2)),
        "q_times_T": TIMES,
        "k_times_T": TIMES,
    } | changes
    with pytest.raises(ValueError, match=message):
        fuxi_bias(arguments.pop("v_THV"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", torch.zeros(2, 2)), "kind: expected 'buckets', 'power_law' or 'exponential_power', got 'linear'"),
        (("power_law", torch.zeros(3, 2)), "parameters_KH: expected 2 rows for kind='power_law', got 3"),
        (("buckets", torch.zeros(3)), r"parameters_KH: expected floats \(rows, heads\), got torch.float32 of shape"),
        (("buckets", torch.zeros(3, 2), 0.0), "unit: expected a number above 0, got 0.0"),
    ],
)
def test_errors_of_a_time_function(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeFunction(*arguments)


def test_decay_is_checked_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GR_DEBUG", "1")
    case = Case([2], heads=1)
    with pytest.raises(ValueError, match=r"gamma_H\[0\]=1.5: expected a decay in \(0, 1\]"):
        case.ours(case.tensors[0], None, torch.full((3, 1), 1.5, dtype=torch.float64))


# ---- Triton --------------------------------------------------------------------------------------------------------


def check_triton(device: str, dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        tolerance = {torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 3e-2)
        for n, kind in enumerate(KINDS):
            for q_lengths, k_lengths in LENGTHS[-2:] if dtype == torch.float32 else LENGTHS[-1:]:
                check(Case(q_lengths, k_lengths, kind, placed=bool(n % 2)), dtype, "triton", tolerance, device)
    check(Case([0, 0]), torch.float32, "triton", 1e-5, device)
    check(Case([70, 3], kind="buckets", causal=True, heads=1, width=2), torch.float32, "triton", 1e-5, device)
    case = Case([5, 0, 7])
    v, position, parameters = (x.float().to(device).requires_grad_() for x in case.tensors)
    both = case.ours(v, position, parameters, backend="triton")
    for tables in ((position, None), (None, parameters)):
        one = case.ours(v, *tables, backend="triton")
        for a, b in zip(one, both, strict=True):
            assert a is None or torch.equal(a, b)
        torch.autograd.grad([x.sum() for x in one if x is not None], [v, *(x for x in tables if x is not None)])
    with pytest.raises(RuntimeError, match="^fuxi_bias: backend='triton' is differentiable once"):
        torch.autograd.grad(both[0].sum(), v, create_graph=True)
    with pytest.raises(ValueError, match="backend='triton' takes float32, float16 and bfloat16, got torch.float64"):
        case.ours(v.double(), position, parameters, backend="triton")
    check_extremes(device, "triton")
    if device == "cuda":  # interpreted, hundreds of programs take too long
        check_bucket_edges(device, "triton")


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
