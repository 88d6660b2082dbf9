"""Our HSTU blocks against those of RecTools, which follow Meta's research code and were not written here.

Runs where rectools is installed (``pip install rectools``); it is no dependency. What differs on purpose, and what the
test does about it:

* dot products: ours are over ``sqrt(qk_dim)``, theirs are not. Each of their W columns of Q and K stands W times in
  ours, so that ``W * (q k) / sqrt(W * W)`` is theirs, and gradients of the copies add up to their column's;
* scale: ours is pinned by configuration, theirs is one over the padded length; they agree where that is `max_length`;
* biases: one number for all heads there, one a head here (copies, whose gradients add up); their time table has one row
  more than its setting says; their UVQK has no additive bias, so ours is 0;
* padding: theirs is on the left and up to `max_length`, ours is jagged; a relative position does not see it;
* times: theirs takes (B, L + 1) with the next event's time last, ours takes `request_times_T`;
* epsilon of the norms: 1e-6 there, 1e-5 here, theirs is set to ours;
* input: positions count from the last token there and from the first here, so none are added to either.

Shape suffixes: B sequences, L padded length, T tokens, D model width, H heads, P positions, N time buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gr.layers import HSTUEncoder, HSTULayer
from lightning_gr.ops.backend import Backend, use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

rectools_hstu = pytest.importorskip("rectools.models.nn.transformers.hstu", exc_type=ImportError)

DIM, HEADS, WIDTH, V, LONGEST = 6, 2, 3, 4, 9
QK = WIDTH * WIDTH
LENGTHS = [4, 0, 9, 1, 7]
EPSILON = 1e-5
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-5}
"""Relative to the norm of what is compared. In float32 theirs is up to 7e-6 from itself in float64, ours up to 2e-5."""


def repeated(x: Tensor) -> Tensor:
    """Their (HEADS * WIDTH, ...) rows of Q or K, each WIDTH times: the rows of ours."""
    return x.repeat_interleave(WIDTH, 0)


def summed(x: Tensor) -> Tensor:
    """The gradient of their rows of Q or K from that of ours."""
    return x.unflatten(0, (HEADS * WIDTH, WIDTH)).sum(1)


def by_part(x: Tensor, width: int) -> list[Tensor]:
    """U, V, Q and K of a UVQK weight with outputs first."""
    return list(x.split([HEADS * V, HEADS * V, HEADS * width, HEADS * width]))


def copy_weights(ours: HSTULayer, theirs: Any) -> None:
    """Gives our layer their weights."""
    u, v, q, k = by_part(theirs.uvqk_proj.T, WIDTH)
    own = dict(ours.named_parameters())
    values = {
        "uvqk.weight": torch.cat([u, v, repeated(q), repeated(k)]),
        "uvqk.bias": torch.zeros_like(own["uvqk.bias"]),
        "input_norm.weight": theirs.norm_input.weight,
        "input_norm.bias": theirs.norm_input.bias,
        "attention_norm.weight": theirs.norm_attn_output.weight,
        "attention_norm.bias": theirs.norm_attn_output.bias,
        "output.weight": theirs.output_mlp.weight,
        "output.bias": theirs.output_mlp.bias,
    }
    if "position_table_PH" in own:
        values["position_table_PH"] = theirs.rel_attn.pos_weights[:, None].expand(-1, HEADS)
    if "time_table_NH" in own:
        values["time_table_NH"] = theirs.rel_attn.time_weights[:, None].expand(-1, HEADS)
    assert values.keys() == own.keys()
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def paired_gradients(ours: HSTULayer, theirs: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Our gradients in their shapes, and theirs, for each of their weights."""
    own: dict[str, Any] = {name: parameter.grad for name, parameter in ours.named_parameters()}
    other: dict[str, Any] = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    u, v, q, k = by_part(own["uvqk.weight"], QK)
    in_their_shape = {
        "uvqk_proj": torch.cat([u, v, summed(q), summed(k)]).T,
        "norm_input.weight": own["input_norm.weight"],
        "norm_input.bias": own["input_norm.bias"],
        "norm_attn_output.weight": own["attention_norm.weight"],
        "norm_attn_output.bias": own["attention_norm.bias"],
        "output_mlp.weight": own["output.weight"],
        "output_mlp.bias": own["output.bias"],
    }
    if "position_table_PH" in own:
        in_their_shape["rel_attn.pos_weights"] = own["position_table_PH"].sum(1)
    if "time_table_NH" in own:
        in_their_shape["rel_attn.time_weights"] = own["time_table_NH"].sum(1)
    assert in_their_shape.keys() == other.keys()
    return {name: (in_their_shape[name], other[name]) for name in other}


def padded(x_T: Tensor, layout: JaggedLayout) -> Tensor:
    """(B, L, ...) with the tokens of each sequence at its right end."""
    sequences = x_T.split(layout.lengths_B.tolist())
    return torch.stack([torch.cat([x_T.new_zeros(LONGEST - len(x), *x_T.shape[1:]), x]) for x in sequences])


def unpadded(x_BL: Tensor, layout: JaggedLayout) -> Tensor:
    """(T, ...): the tokens without their padding."""
    return torch.cat([own[LONGEST - n :] for own, n in zip(x_BL, layout.lengths_B.tolist(), strict=True)])


def their_times(times_T: Tensor, asked_T: Tensor, layout: JaggedLayout) -> Tensor:
    """(B, L + 1): the times of the events, the last request's behind them."""
    ends = [int(asked[-1]) if len(asked) else 0 for asked in asked_T.split(layout.lengths_B.tolist())]
    return torch.cat([padded(times_T, layout), torch.tensor(ends)[:, None]], 1)


def events(layout: JaggedLayout) -> tuple[Tensor, Tensor]:
    """Times of events, and of the request that each answers: the next event's; gaps from none to years."""
    generator = torch.Generator().manual_seed(5)
    times, asked = [], []
    for n in layout.lengths_B.tolist():
        gaps = (10 ** (torch.rand(n + 1, generator=generator, dtype=torch.float64) * 9)).long() - 1
        moments = 1_600_000_000 + gaps.cumsum(0)
        times.append(moments[:n])
        asked.append(moments[1:])
    return torch.cat(times), torch.cat(asked)


def far(one: Tensor, other: Tensor) -> float:
    """Distance of two tensors over the norm of the second."""
    return float((one.detach() - other.detach()).norm() / other.detach().norm())


def disturb(module: nn.Module) -> None:
    """First values hide mistakes: biases are 0 and norms the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
            parameter.add_(float(parameter.dim() == 1 and parameter.numel() in (DIM, HEADS * V)))


def make(*, position: bool, time: bool, num_layers: int) -> tuple[HSTUEncoder, Any]:
    """Both stacks, in the default dtype (in which theirs adds its biases up), with the same weights."""
    torch.manual_seed(1)
    theirs = rectools_hstu.STULayers(
        n_blocks=num_layers,
        n_factors=DIM,
        n_heads=HEADS,
        linear_hidden_dim=V,
        attention_dim=WIDTH,
        session_max_len=LONGEST,
        relative_time_attention=time,
        relative_pos_attention=position,
        dropout_rate=0.0,
        epsilon=EPSILON,
    )
    disturb(theirs)
    ours = HSTUEncoder(
        dim=DIM,
        num_layers=num_layers,
        num_heads=HEADS,
        qk_dim=QK,
        v_dim=V,
        max_length=LONGEST,
        dropout=0.0,
        input_position_embedding=False,
        position_bias=position,
        time_bias=time,
        time_buckets=len(theirs.stu_blocks[0].rel_attn.time_weights) if time else 1,
    )
    for own, other in zip(ours.layers, theirs.stu_blocks, strict=True):
        assert isinstance(own, HSTULayer)
        assert own.input_norm.eps == own.attention_norm.eps == EPSILON
        copy_weights(own, other)
    return ours, theirs


def run_theirs(theirs: Any, x_TD: Tensor, layout: JaggedLayout, times_T: Tensor, asked_T: Tensor) -> Tensor:
    """Their output for jagged tokens."""
    out_BLD = theirs(
        seqs=padded(x_TD, layout) * 1,  # they multiply it in place
        timeline_mask=padded(torch.ones(layout.num_tokens, 1), layout),
        attn_mask=torch.ones(LONGEST, LONGEST, dtype=torch.bool).triu(1),
        key_padding_mask=None,
        batch={"x": torch.zeros(layout.num_sequences, LONGEST), "unix_ts": their_times(times_T, asked_T, layout)},
    )
    return unpadded(out_BLD, layout)


@pytest.fixture
def set_default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("position", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float64), ("cpu", torch.float32)]
)
def test_outputs_and_gradients_are_those_of_rectools(
    backend: Backend,
    dtype: torch.dtype,
    position: bool,
    time: bool,
    num_layers: int,
    set_default_dtype: Callable[[torch.dtype], None],
) -> None:
    set_default_dtype(dtype)
    ours, theirs = make(position=position, time=time, num_layers=num_layers)
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    times_T, asked_T = events(layout)
    x_TD, weights_TD = torch.randn(2, layout.num_tokens, DIM)

    x_ours = x_TD.clone().requires_grad_()
    mask = IntervalMask.causal(layout)
    with use_backend(backend):
        found = ours(x_ours, layout=layout, mask=mask, times_T=times_T, request_times_T=asked_T)
    (found * weights_TD).sum().backward()
    x_theirs = x_TD.clone().requires_grad_()
    wanted = run_theirs(theirs, x_theirs, layout, times_T, asked_T)
    (wanted * weights_TD).sum().backward()

    compared: dict[str, tuple[Any, Any]] = {"output": (found, wanted), "input": (x_ours.grad, x_theirs.grad)}
    for number, (own, other) in enumerate(zip(ours.layers, theirs.stu_blocks, strict=True)):
        assert isinstance(own, HSTULayer)
        compared |= {f"{number}.{name}": pair for name, pair in paired_gradients(own, other).items()}
    assert all(float(other.detach().norm()) > 1e-3 for _, other in compared.values())
    distances = {name: far(one, other) for name, (one, other) in compared.items()}
    assert max(distances.values()) < TOLERANCES[dtype], distances
