"""MTGR: the paper's mask, what each token may learn at each layer, and one sample of K candidates as K of one.

Shape suffixes: T tokens of all sequences together, N candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gr.batch import SequenceBatch, TokenKind
from lightning_gr.models import MTGR
from lightning_gr.ops.mask_lint import mask_leaks
from tests.models.ranking_samples import LONGEST, Event, Sample, collate, draw_sample, embed, make_mtgr

pytestmark = pytest.mark.filterwarnings("ignore:mask='causal'")
MASKS = ["dynamic", "static", "causal"]
COUNTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4)


def seen_by(network: MTGR, batch: SequenceBatch) -> Tensor:
    """The mask in full, (B, L, L)."""
    inputs = network.attention_inputs(batch)
    seen: Tensor = inputs["mask"].visible(inputs["layout"], inputs["layout"])
    return seen


def may_see(mask: str, kinds: list[int], times: list[int], row: int, column: int) -> bool:
    """The paper's three rules, pair by pair."""
    if row == column:
        return True
    if kinds[column] <= TokenKind.STATIC:
        return True
    if kinds[column] == TokenKind.CANDIDATE or kinds[row] <= TokenKind.STATIC:
        return False
    return mask == "dynamic" and times[column] < times[row]


def event(item: int, time: int) -> Event:
    return Event(item, item % 5, time, (0.1 * item,) * 6)


def test_the_papers_example_is_met_exactly() -> None:
    """Figure 2c: target3, rt2, target2, rt1, target1 in the order of time; its real-time tokens stand backwards."""
    sample = Sample(
        1, 2, (event(1, -20), event(2, -10)), (event(3, 2), event(4, 4)), (event(5, 5), event(6, 3), event(7, 1))
    )
    names = ["age", "ctr", "seq1", "seq2", "rt2", "rt1", "target1", "target2", "target3"]
    static = {"age", "ctr", "seq1", "seq2"}
    figure = dict.fromkeys(["age", "ctr", "seq1", "seq2"], static) | {
        "rt1": static | {"rt1", "rt2"},
        "rt2": static | {"rt2"},
        "target1": static | {"rt1", "rt2", "target1"},
        "target2": static | {"rt2", "target2"},
        "target3": static | {"target3"},
    }
    (seen,) = seen_by(make_mtgr(), collate([sample])).tolist()
    assert {row: {x for x, is_seen in zip(names, seen[i], strict=True) if is_seen} for i, row in enumerate(names)} == (
        figure
    )


@pytest.mark.parametrize("mask", ["dynamic", "static"])
@given(counts=COUNTS, seed=st.integers(0, 999))
@settings(deadline=None, max_examples=25)
def test_masks_are_the_rules_pair_by_pair_at_random_times(mask: Any, counts: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch = collate([draw_sample(rng, *x, last_time=6) for x in counts])
    network = MTGR(dim=4, max_length=LONGEST, mask=mask)
    seen = seen_by(network, batch)
    kinds, times = batch.kind_T.tolist(), batch.timestamps_T.tolist()  # type: ignore[union-attr]
    start, pairs = 0, 0
    for b, length in enumerate(batch.layout.lengths_B.tolist()):
        own = slice(start, start + length)
        wanted = [[may_see(mask, kinds[own], times[own], i, j) for j in range(length)] for i in range(length)]
        assert seen[b, :length, :length].tolist() == wanted
        assert not seen[b, length:].any()
        pairs += sum(map(sum, wanted))
        start += length
    assert int(network.visible_pairs(batch)) == pairs


def test_the_causal_mask_is_of_training_alone_and_leaks() -> None:
    batch = collate([draw_sample(np.random.default_rng(3), 3, 4, 3, last_time=6)])
    with pytest.warns(UserWarning, match="mask='causal': while training, candidates see other candidates and later"):
        network = make_mtgr(mask="causal")
    plain = make_mtgr()

    def leaks() -> list[Any]:
        mask = network.attention_inputs(batch)["mask"]
        return mask_leaks(mask, batch.layout, batch.token_counts_B4, next_event=False, times_T=batch.timestamps_T)

    assert torch.equal(seen_by(network, batch), seen_by(plain, batch))
    assert not leaks()
    assert torch.equal(network(embed(batch), batch), plain(embed(batch), batch))
    network.train()
    assert torch.equal(seen_by(network, batch)[0], torch.ones(12, 12, dtype=torch.bool).tril())
    assert int(network.visible_pairs(batch)) == 12 * 13 // 2
    assert any("which is a candidate" in leak.what for leak in leaks())


def states_of(network: MTGR, embedded: dict[str, Tensor], batch: SequenceBatch) -> list[Tensor]:
    """What comes out of each layer."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: states.append(out.detach())) for layer in network.encoder.layers
    ]
    network(embedded, batch)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("mask", ["dynamic", "static"])
@pytest.mark.parametrize("group_norm", [True, False])
def test_a_token_of_any_kind_changes_those_that_may_see_it_alone_at_every_layer(mask: Any, group_norm: bool) -> None:
    """Each token in turn is another one: what comes out of each layer stays, to the bit, where the rules hide it."""
    rng = np.random.default_rng(7)
    batch = collate([draw_sample(rng, 2, 4, 3, last_time=5), draw_sample(rng, 0, 2, 2, last_time=3)])
    network, embedded = make_mtgr(mask=mask, group_norm=group_norm), embed(batch)
    before = states_of(network, embedded, batch)
    kinds, times = batch.kind_T.tolist(), batch.timestamps_T.tolist()  # type: ignore[union-attr]
    sequence, places = batch.layout.sequence_T.tolist(), batch.layout.position_T.tolist()
    assert {(kinds[i], kinds[j], times[i] < times[j]) for i in range(len(kinds)) for j in range(len(kinds))} >= {
        (2, 3, True),
        (2, 3, False),
        (3, 2, True),
        (3, 2, False),
    }
    for changed in range(len(kinds)):
        other = {name: x.clone() for name, x in embedded.items()}
        if kinds[changed] == TokenKind.CONTEXTUAL:
            other["city" if places[changed] else "user_id"][sequence[changed]] += 1.5
        else:
            other["item_id"][changed - 2 * (sequence[changed] + 1)] += 1.5
        after = states_of(network, other, batch)
        assert len(before) == len(after) == 3
        for old, new in zip(before, after, strict=True):
            for row in range(len(kinds)):
                same = sequence[row] == sequence[changed]
                seen = same and may_see(mask, kinds, times, row, changed)
                assert torch.equal(old[row], new[row]) == (not seen), (row, changed)


@pytest.mark.parametrize("mask", ["dynamic", "static"])
def test_scores_go_with_their_candidates_in_any_order(mask: Any) -> None:
    rng = np.random.default_rng(5)
    sample, network = draw_sample(rng, 3, 4, 6), make_mtgr(mask=mask)
    order = rng.permutation(6).tolist()
    assert order != sorted(order)
    one, other = collate([sample]), collate([sample.of([sample.candidates[n] for n in order])])
    torch.testing.assert_close(network(embed(other), other), network(embed(one), one)[order], rtol=1e-12, atol=1e-13)


def outcome(network: MTGR, samples: list[Sample], weights_N: Tensor) -> tuple[Tensor, list[Tensor]]:
    """States of all candidates, and the gradients of a weighted sum of them."""
    batch = collate(samples)
    network.zero_grad()
    states_ND = network(embed(batch), batch)
    (states_ND * weights_N[:, None] * torch.linspace(-1, 1, 8)).sum().backward()
    return states_ND.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def both_ways(network: MTGR, seed: int, *, by_length: bool) -> tuple[list[Any], list[Any]]:
    """One sample with K candidates, and K samples with one, each with the real-time events before it."""
    rng = np.random.default_rng(seed)
    sample = draw_sample(rng, 3, 5, 4, last_time=8)
    split = [sample.of([c], realtime=tuple(e for e in sample.realtime if e.time < c.time)) for c in sample.candidates]
    weights_N = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for samples in ([sample], split):
        for layer in network.encoder.layers:
            lengths_B = torch.tensor([2.0 + len(x.events()) for x in samples], dtype=torch.float64)
            layer.scale = 1 / lengths_B if by_length else 0.2  # type: ignore[assignment]
        states_ND, gradients = outcome(network, samples, weights_N)
        found.append([states_ND, *gradients])
    return found[0], found[1]


@pytest.mark.parametrize("mask", ["dynamic", "static"])
@given(st.integers(0, 99))
@settings(deadline=None, max_examples=6)
def test_k_candidates_together_are_k_samples_in_scores_and_gradients(mask: Any, seed: int) -> None:
    """The scale is pinned; that of the paper's equation 5, one over the sample's tokens, would depend on K."""
    together, apart = both_ways(make_mtgr(mask=mask), seed, by_length=False)
    assert len(together) == len(apart) == 1 + len(list(make_mtgr().parameters()))
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_scale_by_the_samples_length_would_break_it() -> None:
    together, apart = both_ways(make_mtgr(), 0, by_length=True)
    assert float((together[0] - apart[0]).abs().max()) > 1e-3


def test_histories_have_mlps_and_norms_of_their_own_unless_told_otherwise() -> None:
    whole, plain = make_mtgr(), make_mtgr(group_norm=False, separate_histories=False)
    assert whole.encoder.layers[0].input_norm.weight.shape == (4, 8)  # type: ignore[union-attr]
    assert plain.encoder.layers[0].input_norm.weight.shape == (8,)  # type: ignore[union-attr]
    extra = {name for name, _ in whole.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert extra
    assert all(name.startswith("tokens.realtime.") for name in extra)
    batch = collate([draw_sample(np.random.default_rng(1), 3, 3, 2)])
    groups_T = whole.attention_inputs(batch)["groups_T"]
    assert groups_T.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert plain.attention_inputs(batch)["groups_T"] is None


@pytest.mark.parametrize("group_norm", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_recompute_gives_the_same_gradients_to_the_bit_under_dropout(mask: Any, group_norm: bool) -> None:
    rng = np.random.default_rng(7)
    batch = collate([draw_sample(rng, 2, 4, 3), draw_sample(rng, 0, 1, 0), draw_sample(rng, 3, 0, 2)])

    def gradients(recompute: bool) -> list[Tensor]:
        network = make_mtgr(mask=mask, group_norm=group_norm, dropout=0.3, recompute=recompute).train()
        torch.manual_seed(1)
        found = []
        for _ in range(2):
            network.zero_grad()
            network(embed(batch), batch).square().sum().backward()
            found += [p.grad.clone() for p in network.parameters() if p.grad is not None]
        return found

    kept, again = gradients(False), gradients(True)
    assert len(kept) == len(again) > 40
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert not torch.equal(kept[0], kept[len(kept) // 2])


def test_a_mask_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="mask='dynamc': expected one of dynamic, static, causal"):
        MTGR(mask="dynamc")  # type: ignore[arg-type]


@pytest.mark.parametrize("micro_batch", [None, 7])
def test_any_number_of_candidates_share_one_position(micro_batch: int | None) -> None:
    rng = np.random.default_rng(3)
    network = make_mtgr(max_length=12).eval()
    wide = draw_sample(rng, 5, 4, 40)
    alone = [Sample(wide.user, wide.city, wide.static, wide.realtime, (x,)) for x in wide.candidates]

    def states(samples: list[Sample]) -> Tensor:
        batch = collate(samples)
        with torch.no_grad():
            if micro_batch is None:
                return network(embed(batch), batch)
            return network.in_micro_batches(embed(batch), batch, micro_batch)

    torch.testing.assert_close(states([wide]), states(alone), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="max_length=12: a sequence has 13 positions, its candidates counted as one"):
        states([draw_sample(rng, 6, 4, 1)])
