"""Micro-batches of candidates against keys and values of their history: the scores of one pass.

Shape suffixes: T tokens of all sequences together, N candidates, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gr.layers import HSTUEncoder, HSTULayer
from lightning_gr.layers.micro_batches import encode_candidates
from lightning_gr.models import DLRM, RankingModule
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from tests.models.ranking_samples import FEATURES, collate, disturb, draw_sample, embed, make_mtgr

COUNTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=5)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"mask": "static", "group_norm": False, "separate_histories": False},
    {"mask": "causal", "position_bias": "recency", "time_bias": False},
    {"position_bias": False, "scale": None},
]


@pytest.mark.filterwarnings("ignore:mask='causal'")
@pytest.mark.parametrize("changes", SETTINGS)
@given(counts=COUNTS, micro_batch=st.integers(1, 30), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_states_are_those_of_one_pass(changes: Any, counts: Any, micro_batch: int, seed: int) -> None:
    """Jagged samples, some without candidates or without history, and every size of a micro-batch."""
    rng = np.random.default_rng(seed)
    batch = collate([draw_sample(rng, *x) for x in counts])
    network, embedded = make_mtgr(**changes), embed(batch)
    wanted_ND = network(embedded, batch)
    found_ND = network.in_micro_batches(embedded, batch, micro_batch)
    assert found_ND.shape == (sum(x[2] for x in counts), 8)
    assert not found_ND.requires_grad
    torch.testing.assert_close(found_ND, wanted_ND, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("activation", ["silu", "softmax"])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4), rows=st.integers(1, 9)
)
@settings(deadline=None, max_examples=10)
def test_encoders_with_other_settings_too(activation: Any, backend: Any, lengths: Any, rows: int) -> None:
    """Softmax, input positions, request times after the tokens' own, and a history that is causal."""
    history, candidates = (torch.tensor(x) for x in zip(*lengths, strict=True))
    layout = JaggedLayout.from_lengths(history + candidates)
    torch.manual_seed(0)
    encoder = HSTUEncoder(
        dim=6, num_layers=3, num_heads=2, qk_dim=2, v_dim=4, max_length=12, activation=activation, time_buckets=9
    )
    disturb(encoder)
    encoder.double().eval()
    x_TD = torch.randn(layout.num_tokens, 6, dtype=torch.float64)
    times_T = torch.randint(0, 5000, (layout.num_tokens,))
    inputs: dict[str, Any] = {
        "layout": layout,
        "mask": IntervalMask.candidates(layout, candidates),
        "times_T": times_T,
        "request_times_T": times_T + torch.randint(0, 900, times_T.shape),
    }
    is_candidate_T = layout.position_T >= history[layout.sequence_T]
    with torch.no_grad(), use_backend(backend):
        wanted_ND = encoder(x_TD, **inputs)[is_candidate_T]
        found_ND = encode_candidates(encoder, x_TD.clone(), micro_batch=rows, num_candidates_B=candidates, **inputs)
    torch.testing.assert_close(found_ND, wanted_ND, rtol=1e-10, atol=1e-10)


def make_module(network: nn.Module | None = None, **changes: Any) -> RankingModule:
    torch.manual_seed(3)
    module = RankingModule(
        **({"network": network or make_mtgr().float(), "features": FEATURES, "embedding_dim": 3} | changes)
    )
    module.setup("fit")
    module.configure_model()
    disturb(module)
    return module.eval()


def float_batch(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    batch = collate([draw_sample(rng, *x) for x in ((4, 3, 7), (0, 0, 2), (5, 5, 0), (2, 4, 11))])
    batch.dense = {name: x.float() for name, x in batch.dense.items()}
    return batch


@pytest.mark.parametrize("micro_batch", [1, 3, 8, 64])
def test_logits_in_single_precision_are_those_of_one_pass(micro_batch: int) -> None:
    module, batch = make_module(micro_batch=micro_batch), float_batch(1)
    with torch.inference_mode():
        found = module(batch)
        module.micro_batch = None
        wanted = module(batch)
    assert found.keys() == wanted.keys() == {"click", "buy"}
    for task, logits_N in found.items():
        assert logits_N.shape == (20,)
        torch.testing.assert_close(logits_N, wanted[task], rtol=1e-5, atol=1e-5)


def test_under_autocast_too() -> None:
    module, batch = make_module(micro_batch=4), float_batch(1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = module(batch)["buy"]
        module.micro_batch = None
        wanted = module(batch)["buy"]
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def rows_through_layers(module: RankingModule, batch: Any) -> list[int]:
    """How many tokens each projection of a layer is given."""
    seen: list[int] = []
    original = HSTULayer.projected

    def counted(self: HSTULayer, x_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(len(x_TD))
        return original(self, x_TD, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HSTULayer, "projected", counted)
        module(batch)
    return seen


def test_training_is_in_one_pass_and_scoring_at_most_so_many_tokens_at_once() -> None:
    module, batch = make_module(micro_batch=5), float_batch(2)
    with torch.no_grad():
        rows = rows_through_layers(module, batch)
    assert max(rows) == 5
    # Keys, values, queries and gates of 20 candidates and 26 tokens of histories that are asked, of which the last
    # layer needs keys and values alone; the third sample has no candidate.
    assert sum(rows) == 3 * 4 * 20 + (2 * 4 + 2) * (2 + 7 + 2 + 2 + 6)
    module.train()
    assert rows_through_layers(module, batch) == [batch.num_tokens] * 3
    module.eval()
    assert rows_through_layers(module, batch) == [batch.num_tokens] * 3  # a gradient may be wanted


def test_what_is_kept_at_a_time_does_not_grow_with_layers() -> None:
    """Bytes of the largest set of tensors of a layer's width that are alive at once."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.weak import WeakTensorKeyDictionary

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.storages: Any = WeakTensorKeyDictionary()
            self.most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor):
                    self.storages[x] = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
            self.most = max(self.most, sum(dict(self.storages.values()).values()))
            return out

    def most(num_layers: int, micro_batch: int | None) -> int:
        rng = np.random.default_rng(0)
        batch = collate([draw_sample(rng, 10, 4, 30)])
        network, embedded = make_mtgr(num_layers=num_layers, dim=32), embed(batch)
        with torch.no_grad(), Alive() as alive:
            if micro_batch is None:
                network(embedded, batch)
            else:
                network.in_micro_batches(embedded, batch, micro_batch)
        return alive.most

    two, five, whole = most(2, 4), most(5, 4), most(2, None)
    assert five <= 1.05 * two
    assert two < 0.6 * whole


def test_networks_without_micro_batches_say_so() -> None:
    with pytest.warns(UserWarning, match="micro_batch=4: DLRM scores all candidates of a batch at once"):
        module = make_module(DLRM(dim=4, hidden_dims=(4,)), micro_batch=4)
    batch = float_batch(3)
    with torch.no_grad():
        assert module(batch)["click"].shape == (20,)


def test_sizes_that_cannot_work_are_named() -> None:
    with pytest.raises(MisconfigurationException, match="micro_batch=0: expected at least 1, or leave it out"):
        RankingModule(network=make_mtgr(), micro_batch=0)
    layout = JaggedLayout.from_lengths(torch.tensor([3]))
    with pytest.raises(ValueError, match="micro_batch=-1: expected at least 1"):
        encode_candidates(
            HSTUEncoder(dim=4, max_length=3),
            torch.zeros(3, 4),
            micro_batch=-1,
            num_candidates_B=torch.tensor([1]),
            layout=layout,
            mask=IntervalMask.candidates(layout, torch.tensor([1])),
        )
