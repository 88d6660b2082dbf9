"""The GPU's kernels of HSTU attention against the reference in float64: values and every gradient.

On a CPU the kernels are interpreted, in a process of its own: how Triton runs is fixed when it is imported.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.ops.hstu_attention import hstu_attention
from lightning_gr.ops.hstu_attention.reference import hstu_attention_reference
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from tests.more import more

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("out", "q", "k", "v", "scale", "position table", "time table")
ACTIVATIONS = ("silu", "softmax")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cuda":
        return on_a_gpu(monkeypatch)
    if not INTERPRETED:
        pytest.skip("runs in test_interpreted")
    return "cpu"


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from lightning_gr.ops.hstu_attention.triton_kernel import _kernels

    for name in ("forward", "queries_gradient", "keys_gradient"):  # to compile all of them takes minutes
        monkeypatch.setattr(_kernels()[name], "configs", _kernels()[name].configs[3:4])
    return "cuda"


@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("which", ["not gpu and not slow and not long", *more("not gpu and long")])
def test_interpreted(which: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def make_mask(kind: str, q_layout: JaggedLayout, k_layout: JaggedLayout) -> IntervalMask:
    lengths_B = q_layout.lengths_B
    if kind == "causal":
        return IntervalMask.causal(q_layout)
    if kind == "contextual":
        return IntervalMask.contextual_prefix(q_layout, lengths_B // 3)
    if kind == "candidates":
        return IntervalMask.candidates(q_layout, lengths_B // 2)
    if kind == "dynamic":
        counts = [lengths_B // 6, lengths_B // 4, lengths_B // 3]
        counts.append(lengths_B - sum(counts))
        earlier = torch.minimum(q_layout.position_T // 3, counts[2].to(q_layout.position_T.device)[q_layout.sequence_T])
        return IntervalMask.dynamic(q_layout, torch.stack(counts, 1), earlier)
    if kind == "semi_local":
        return IntervalMask.semi_local(
            q_layout, 5, num_full=3, num_prefix=2, num_contextual_B=lengths_B // 9, num_candidates_B=lengths_B // 5
        )
    assert kind == "arbitrary"
    generator = torch.Generator().manual_seed(3)
    rows = []
    for queries, keys in zip(lengths_B.tolist(), k_layout.lengths_B.tolist(), strict=True):
        for i in range(queries):
            bounds = torch.randint(0, keys + 1, (3,), generator=generator).sort().values.tolist()
            # Every fourth row sees nothing; others see one interval, or themselves alone.
            a, b, c = ([0] * 3, bounds, [0, *bounds[1:]], bounds[:1] * 3)[i % 4]
            rows.append([a, b, c, i % 4 > 0 and i % 3 == 0 and i < keys])
    columns = torch.tensor(rows, dtype=torch.int64).view(-1, 4).T.to(q_layout.offsets_B1.device)
    return IntervalMask(*columns[:3], columns[3].bool())


@dataclass(frozen=True)
class Case:
    """One call; None for a table leaves it out."""

    kind: str
    activation: str
    lengths: tuple[int, ...]
    k_lengths: tuple[int, ...] | None = None
    heads: int = 2
    widths: tuple[int, int] = (5, 7)
    positions: int | None = 9
    explicit: bool = False
    buckets: int | None = 20
    scale: float | None = None  # None is one a sequence
    dtype: torch.dtype = torch.float32
    seconds: int = 86400

    def make(self, device: str) -> tuple[list[Any], dict[str, Any]]:
        """Differentiable tensors (or None) in the order of NAMES, and the other arguments."""
        generator = torch.Generator().manual_seed(0)
        q_layout, k_layout = (
            JaggedLayout.from_lengths(torch.tensor(x, dtype=torch.int64), device)
            for x in (self.lengths, self.lengths if self.k_lengths is None else self.k_lengths)
        )
        num_q, num_k = q_layout.num_tokens, k_layout.num_tokens

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        # Slices of one projection, and the queries' tokens far apart.
        wide = draw(num_k, self.heads, sum(self.widths) + 3)
        k, v = wide[..., 1 : 1 + self.widths[0]], wide[..., 2 + self.widths[0] : 2 + sum(self.widths)]
        q = draw(self.heads, num_q, self.widths[0] + 1).transpose(0, 1)[..., 1:]
        scale = draw(len(self.lengths), dtype=torch.float32).abs() + 0.1 if self.scale is None else self.scale
        position = None if self.positions is None else draw(self.positions, self.heads, dtype=torch.float32)
        time = None if self.buckets is None else draw(self.buckets, self.heads, dtype=torch.float32)
        times = {
            f"{x}_times_T": torch.randint(0, self.seconds, (n,), generator=generator).sort().values.to(device)
            for x, n in (("q", num_q), ("k", num_k))
        }
        places = {
            f"{x}_positions_T": torch.randint(0, 12, (n,), generator=generator).to(device) if self.explicit else None
            for x, n in (("q", num_q), ("k", num_k))
        }
        arguments = {
            "q_layout": q_layout,
            "k_layout": k_layout,
            "mask": make_mask(self.kind, q_layout, k_layout),
            "alpha": 0.4,
            "time_bucket_width": 0.301,
            "activation": self.activation,
            "dropout": 0.0,
            **(times if self.buckets is not None else dict.fromkeys(times)),
            **places,
        }
        return [q, k, v, scale, position, time], arguments


def run(function: Any, tensors: list[Any], arguments: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The output and the gradients, in the order of NAMES; those of what is no tensor are left out."""
    leaves = [
        (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_() if isinstance(x, Tensor) else x
        for x in tensors
    ]
    q, k, v, scale, position, time = leaves
    out = function(q, k, v, scale=scale, position_table_PH=position, time_table_NH=time, **arguments)
    wanted = [x for x in leaves if isinstance(x, Tensor)]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out, *torch.autograd.grad(out, wanted, cotangent, allow_unused=True, materialize_grads=True)]


def triton(*tensors: Any, **arguments: Any) -> Tensor:
    from lightning_gr.ops.hstu_attention.triton_kernel import hstu_attention_triton

    return hstu_attention_triton(*tensors, **arguments)


def check(case: Case, device: str, tolerance: float) -> None:
    """Each result is as near as the tolerance to the truth on the same rounded inputs, relative to its largest."""
    tensors, arguments = case.make(device)
    ours = run(triton, tensors, arguments)
    truth = run(hstu_attention_reference, tensors, arguments, torch.float64)
    names = [name for name, x in zip(NAMES, [ours[0], *tensors], strict=True) if isinstance(x, Tensor)]
    for name, mine, wanted in zip(names, ours, truth, strict=True):
        table = name.endswith(("table", "scale"))
        assert mine.dtype == (torch.float32 if table else case.dtype), name
        assert mine.shape == wanted.shape, name
        assert bool(mine.isfinite().all()), name
        if mine.numel():
            error = float((mine - wanted).detach().abs().max())
            assert error <= tolerance * max(float(wanted.detach().abs().max()), 1), f"{name}: {error}"


LENGTHS = (5, 0, 1, 18)
CASES = [
    Case("causal", "silu", LENGTHS),
    Case("causal", "softmax", LENGTHS, heads=1, positions=41, scale=1.0),
    Case("contextual", "softmax", (19, 2), explicit=True, heads=1),
    Case("candidates", "silu", (3, 34), heads=1, widths=(16, 3), positions=1, buckets=None),
    Case("dynamic", "silu", (18, 0, 3), heads=1, dtype=torch.float16, seconds=60),
    Case("semi_local", "silu", (70,), heads=1, positions=33, buckets=3),
    Case("arbitrary", "softmax", (3, 0, 21, 4), (20, 3, 18, 0), heads=1, positions=5),
    Case("causal", "silu", ()),
    Case("causal", "softmax", (0, 0)),
    Case("arbitrary", "silu", (0, 0), (3, 0)),
    Case("arbitrary", "softmax", (0, 3), (3, 0)),
]
MORE = [
    Case("contextual", "silu", (19, 2), heads=1, positions=None, buckets=None, scale=0.3),
    Case("candidates", "softmax", (3, 18), heads=1, widths=(1, 17), positions=None),
    Case("dynamic", "softmax", (18, 0, 3), heads=1, dtype=torch.float16),
    Case("arbitrary", "silu", (3, 0, 21, 4), (20, 3, 0, 35), explicit=True),
]


@pytest.mark.parametrize(
    "case", [*CASES, *more(*MORE)], ids=lambda x: f"{x.kind}-{x.activation}-{'-'.join(map(str, x.lengths))}"
)
def test_values_and_gradients_are_the_references(case: Case, device: str) -> None:
    check(case, device, 4e-3 if case.dtype == torch.float16 else 2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tiles_that_no_row_sees_are_not_read(activation: str, device: str) -> None:
    tile = 16 if device == "cpu" else 128
    tensors, arguments = Case("causal", activation, (3 * tile,), heads=1, positions=None, buckets=None).make(device)
    q, k, v, *_ = tensors
    # The first and the last tile of rows see four columns; what lies elsewhere must not be multiplied, not even by 0.
    first_T = torch.full((3 * tile,), 4, device=device)
    first_T[tile : 2 * tile] = 0
    q[tile : 2 * tile] = k[tile:] = v[tile:] = torch.nan
    for name, found in zip(
        NAMES,
        run(triton, tensors, arguments | {"mask": IntervalMask(first_T, first_T, first_T, first_T < 0)}),
        strict=False,
    ):
        assert bool(found.isfinite().all()), name
        assert bool((found != 0).any()) or (activation, name) == ("softmax", "scale"), name


def test_every_gap_of_time_takes_its_bucket(device: str) -> None:
    from lightning_gr.ops.hstu_attention.cpu import time_thresholds

    for num_buckets, width in ((90, 0.301), (18, 1.5)):
        edges = time_thresholds(num_buckets, width)[:: 3 if INTERPRETED else 1].unique()
        gaps = torch.cat([edges - 1, edges, edges + 1, torch.tensor([3, 10**6, 2**40])])
        signs = torch.where(torch.arange(len(gaps)) % 2 == 0, 1, -1)
        q_layout, k_layout = (JaggedLayout.from_lengths(torch.tensor([n]), device) for n in (len(gaps), 1))
        ones, zeros = torch.ones(len(gaps), dtype=torch.int64, device=device), torch.zeros(1, 1, 1, device=device)
        arguments: dict[str, Any] = {
            "q_layout": q_layout,
            "k_layout": k_layout,
            "mask": IntervalMask(ones, ones, ones, ones < 0),
            "scale": 1.0,
            "alpha": 1.0,
            "position_table_PH": None,
            "time_table_NH": torch.arange(num_buckets, device=device)[:, None] / 8.0,
            "q_times_T": (10**9 + signs * gaps).to(device),
            "k_times_T": torch.tensor([10**9], device=device),
            "q_positions_T": None,
            "k_positions_T": None,
            "time_bucket_width": width,
            "activation": "silu",
            "dropout": 0.0,
        }
        tensors = (zeros.expand(len(gaps), 1, 1), zeros, zeros + 1)
        torch.testing.assert_close(triton(*tensors, **arguments), hstu_attention_reference(*tensors, **arguments))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dropout_is_one_mask_forward_and_backward(activation: str, device: str) -> None:
    tensors, arguments = Case("causal", activation, (17, 6), widths=(5, 24)).make(device)
    arguments |= {"dropout": 0.3}
    places = arguments["q_layout"].position_T
    unit_THV = torch.eye(24, device=device)[places][:, None].expand(-1, 2, -1)  # the output is then the weights

    def ours(q: Tensor, k: Tensor, v: Tensor, seed: int = 7, **rest: Any) -> Tensor:
        torch.manual_seed(seed)
        return triton(q, k, v, **rest)

    def weights(seed: int) -> Tensor:
        q, k, _, scale, position, time = tensors
        tables = {"scale": scale, "position_table_PH": position, "time_table_NH": time}
        return ours(q, k, unit_THV, seed, **tables, **arguments)

    kept_THV = weights(7) != 0
    assert torch.equal(weights(7) != 0, kept_THV)
    assert not torch.equal(weights(8) != 0, kept_THV)
    visible_THV = (torch.arange(24, device=device) <= places[:, None])[:, None].expand_as(kept_THV)
    for head in (0, 1):
        share = float(kept_THV[:, head][visible_THV[:, head]].float().mean())
        assert abs(share - 0.7) < 4 * (0.3 * 0.7 / (17 * 18 / 2 + 6 * 7 / 2)) ** 0.5
    assert not torch.equal(kept_THV[:, 0], kept_THV[:, 1])
    assert not torch.equal(kept_THV[:6], kept_THV[17:])

    def true(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        weights_THV = hstu_attention_reference(q, k, unit_THV.to(q.dtype), **(rest | {"dropout": 0.0}))
        parts = zip((weights_THV * kept_THV / 0.7).split([17, 6]), v.split([17, 6]), strict=True)
        return torch.cat([torch.einsum("qhk,khv->qhv", w[..., : len(x)], x) for w, x in parts])

    found, wanted = run(ours, tensors, arguments), run(true, tensors, arguments, torch.float64)
    for name, mine, exact in zip(NAMES, found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: name + text)


def test_what_it_does_not_take_is_named(device: str) -> None:
    q_THD = torch.zeros(2, 1, 257, device=device)
    layout = JaggedLayout.from_lengths(torch.tensor([2]), device)
    arguments: dict[str, Any] = {"q_layout": layout, "mask": IntervalMask.causal(layout), "scale": 1.0}
    arguments["backend"] = "triton"
    narrow = q_THD[..., :1]
    with pytest.raises(ValueError, match=r"^q_THD: backend='triton' takes .* got torch.float64; use 'reference'"):
        hstu_attention(narrow.double(), narrow.double(), narrow.double(), **arguments)
    with pytest.raises(ValueError, match=r"^q_THD: backend='triton' takes heads up to 256 wide, got 257; use 'ref"):
        hstu_attention(q_THD, q_THD, narrow, **arguments)
    times = {"time_table_NH": torch.zeros(3, 1, device=device), "time_bucket_width": 1e-6}
    times |= dict.fromkeys(("q_times_T", "k_times_T"), torch.zeros(2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"^time_bucket_width: backend='triton' takes 0.0001 or more, got 1e-06; use"):
        hstu_attention(narrow, narrow, narrow, **arguments, **times)
    leaf = narrow.detach().requires_grad_()
    out = hstu_attention(leaf, leaf, leaf, **arguments)
    with pytest.raises(RuntimeError, match=r"^hstu_attention: backend='triton' is differentiable once; .*'reference'"):
        torch.autograd.grad(out.sum(), leaf, create_graph=True)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs triton, not interpreted")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernels_compile_for_a_gpu_that_is_not_there(activation: str) -> None:
    """The interpreter takes more than the compiler does."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_gr.ops.hstu_attention.triton_kernel import _kernels

    softmax = activation == "softmax"
    constants = {"D": 50, "WIDTH": 16, "BLOCK_D": 64, "BLOCK_V": 16, "UNIT": 128, "BOUND": 64, "PRECISION": "ieee"}
    constants |= {"BLOCK_M": 32, "BLOCK_N": 32, "SOFTMAX": softmax, "SCALE_NEEDED": not softmax, "PLACES": not softmax}
    constants |= dict.fromkeys(("POSITIONS", "TIMES", "DROPOUT", "POSITION_NEEDED", "TIME_NEEDED"), True)
    types = dict.fromkeys(("alpha", "inverse_width", "dropout"), "fp32")
    types |= dict.fromkeys(("Q", "K", "V", "OUT", "D_OUT", "D_Q", "D_K", "D_V"), "*bf16")
    types |= dict.fromkeys(("WORK", "ROWS", "BOUNDS"), "*i32") | {"MASK_SELF": "*i1"}
    types |= dict.fromkeys(("SCALE", "POSITION", "TIME", "LSE", "DELTA", "D_SCALE", "D_POSITION", "D_TIME"), "*fp32")
    for kernel in _kernels().values():
        function = kernel.fn if hasattr(kernel, "configs") else kernel  # tuned or not
        # What is left: offsets, masks, positions, times and thresholds (in capitals), and sizes.
        signature = {x: types.get(x, "*i64" if x.isupper() and x != "H" else "i32") for x in function.arg_names}
        used = {x: constants[x] for x in function.arg_names if x in constants}
        source = ASTSource(function, signature | dict.fromkeys(used, "constexpr"), used)
        assert function.__name__ in compile_kernel(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_of_a_gpu(dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = on_a_gpu(monkeypatch)
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    common: dict[str, Any] = {"activation": activation, "dtype": dtype, "scale": 0.01}
    check(Case("semi_local", lengths=(700, 0, 1, 129), widths=(64, 64), positions=401, **common), device, tolerance)
    keys = (33, 500, 1, 2)
    check(Case("arbitrary", lengths=(257, 64, 3, 0), k_lengths=keys, widths=(50, 100), **common), device, tolerance)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_long_sequence_tuned_without_waiting_for_the_device() -> None:
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    common: dict[str, Any] = {"heads": 1, "widths": (64, 64), "dtype": torch.bfloat16, "scale": 1 / 8192}
    case = Case("candidates", "silu", (8192,), positions=4097, buckets=64, **common)
    check(case, "cuda", 5e-2)
    tensors, arguments = case.make("cuda")
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in tensors]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        q, k, v, scale, position, time = leaves
        triton(q, k, v, scale=scale, position_table_PH=position, time_table_NH=time, **arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 8192 * 8192  # bytes: a bit of the weights' matrix
