"""Activation recompute: the same losses and gradients to the bit, from less that is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_gr.layers import FuXiEncoder, HSTUEncoder, SASRecEncoder
from lightning_gr.models import MTGR
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

LENGTHS = [7, 0, 30, 1]
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "hstu": (HSTUEncoder, {"attention_dropout": 0.3}),
    "softmax": (HSTUEncoder, {"activation": "softmax", "qk_dim": 3, "v_dim": 5}),
    "sasrec": (SASRecEncoder, {}),
    "fuxi": (FuXiEncoder, {}),
}


def make(kind: str, *, recompute: bool) -> nn.Module:
    torch.manual_seed(3)
    cls, changes = KINDS[kind]
    return cls(dim=8, num_layers=3, num_heads=2, max_length=30, dropout=0.3, recompute=recompute, **changes)


def inputs(rank: int = 0) -> tuple[Tensor, dict[str, Any]]:
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS) + rank * torch.tensor([2, 5, -3, 0]))
    generator = torch.Generator().manual_seed(11 + rank)
    x_TD = torch.randn(layout.num_tokens, 8, generator=generator)
    times_T = torch.randint(0, 10**6, (layout.num_tokens,), generator=generator)
    return x_TD, {"layout": layout, "mask": IntervalMask.causal(layout), "times_T": times_T}


def gradients(module: nn.Module, x_TD: Tensor, given: dict[str, Any], *, bf16: bool = False) -> list[Tensor]:
    """Of two steps, so that dropout of the second shows where random numbers of the first have been left."""
    found: list[Tensor] = []
    torch.manual_seed(7)
    for _ in range(2):
        module.zero_grad()
        x_TD = x_TD.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = module(x_TD, **given)
            loss = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss.backward()
        found += [loss.detach(), x_TD.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]  # type: ignore[list-item]
    return [*found, torch.rand(3)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    assert len(ours) == len(theirs) > 10
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_gradients_are_the_same_to_the_bit(kind: str, backend: Any, bf16: bool) -> None:
    def run(recompute: bool) -> list[Tensor]:
        module = make(kind, recompute=recompute)
        # Backward runs outside of the block, as it does in Lightning's loop.
        forward = module.forward

        def inside(*args: Any, **kwargs: Any) -> Any:
            with use_backend(backend):
                return forward(*args, **kwargs)

        module.forward = inside  # type: ignore[method-assign]
        return gradients(module, *inputs(), bf16=bf16)

    plain = run(recompute=False)
    assert equal(run(recompute=True), plain)
    assert not torch.equal(plain[0], plain[len(plain) // 2])  # dropout draws anew at the second step


def kept_bytes(module: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass, each tensor once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_TD, given = inputs()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x_TD.requires_grad_(), **given)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_less_is_kept(kind: str) -> None:
    plain, less = (kept_bytes(make(kind, recompute=recompute)) for recompute in (False, True))
    one_input = sum(LENGTHS) * 8 * 4
    # An input a layer, and at most as much again for what stands before and after the layers.
    assert 3 * one_input <= less <= 8 * one_input
    assert less < plain / 2


def test_mtgr_hands_it_to_its_encoder() -> None:
    assert MTGR(recompute=True).encoder.recompute
    assert not MTGR().encoder.recompute


def test_without_gradients_nothing_is_prepared() -> None:
    module = make("hstu", recompute=True).eval()
    x_TD, given = inputs()
    with torch.no_grad():
        assert torch.equal(module(x_TD, **given), make("hstu", recompute=False).eval()(x_TD, **given))


def step_under_ddp(recompute: bool) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    module = DistributedDataParallel(make("hstu", recompute=recompute))
    return gradients(module, *inputs(rank))


@pytest.mark.dist
def test_under_ddp(gloo: Any) -> None:
    plain, again = (gloo(2).run(step_under_ddp, recompute) for recompute in (False, True))
    for ours, theirs in zip(again, plain, strict=True):
        assert equal(ours, theirs)
    assert torch.equal(again[0][2], again[1][2])  # reduced over the ranks
    assert not torch.equal(again[0][0], again[1][0])  # whose batches differ
