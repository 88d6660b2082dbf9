"""Operations of a batch: against pairs counted one by one, torch's own counter of dense work, and MTGR's paper.

torch counts padded and masked work in the attention of the reference, which are its only batched products; all others
are dense, so that the two are told apart by operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.layers import HSTUEncoder, SASRecEncoder
from lightning_gr.models import DLRM, MTGR, RankingModule, RetrievalModule
from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.full_softmax import cpu, full_softmax_flops, full_softmax_recomputed_flops
from lightning_gr.ranking_features import RankingFeatures

ITEMS, DIM, LAYERS, LONGEST = 23, 8, 2, 12
SHORT = settings(max_examples=15, deadline=None)
histories = st.lists(st.one_of(st.sampled_from([0, 1, 2]), st.integers(0, LONGEST)), min_size=1, max_size=6)


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """What torch counts of dense products and of batched ones."""
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert set(found) <= {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm"}, found
    dense = sum(found.get(name, 0) for name in ("aten.mm", "aten.addmm"))
    return {"dense": dense, "batched": sum(found.values()) - dense}


# ---- retrieval ---------------------------------------------------------------------------------------------------


def encoder(kind: str, **changes: Any) -> Any:
    if kind == "hstu":
        given_ = {"num_heads": 2, "qk_dim": 3, "v_dim": 5, "dropout": 0.0, "time_buckets": 4}
        return HSTUEncoder(dim=DIM, num_layers=LAYERS, max_length=LONGEST, **(given_ | changes))
    given_ = {"num_heads": 2, "hidden_dim": 20, "dropout": 0.0}
    return SASRecEncoder(dim=DIM, num_layers=LAYERS, max_length=LONGEST, **(given_ | changes))


PAIR = {"hstu": 2 * (2 * 3 + 2 * 5), "sasrec": 2 * (2 * 4 + 2 * 4)}
"""Of one layer: two heads, and in each two products that add as many multiplications as they are wide."""


def retrieval(kind: str, *, loss: str = "full_softmax", negatives: str = "uniform", **changes: Any) -> RetrievalModule:
    torch.manual_seed(1)
    module = RetrievalModule(
        encoder=encoder(kind, **changes),
        num_items=ITEMS,
        loss=loss,  # type: ignore[arg-type]
        negatives=negatives,  # type: ignore[arg-type]
        num_negatives=5,
    )
    module.configure_model()
    return module


def histories_of(lengths: list[int], *, denominator: float | None = None, padding: int = 0) -> SequenceBatch:
    """Sequences whose last half of tokens is labelled, and `padding` sequences of three tokens each."""
    torch.manual_seed(0)
    sizes = torch.tensor(lengths + [3] * padding)
    labelled, first = [], 0
    for length in lengths:
        labelled += range(first + length // 2, first + length)
        first += length
    total = int(sizes.sum())
    counts_B4 = torch.zeros(len(sizes), 4, dtype=torch.int64)
    counts_B4[:, 2] = sizes
    return SequenceBatch(
        features=KeyedJaggedTensor(["item_id"], torch.randint(0, ITEMS, (total,)), lengths=sizes),
        token_counts_B4=counts_B4,
        sample_ids_B=torch.tensor([*range(len(lengths)), *[-1] * padding]),
        labels={"next_item": Labels(torch.randint(0, ITEMS, (len(labelled),)), torch.tensor(labelled).long())},
        denominators={"next_item": float(len(labelled)) if denominator is None else denominator},
        timestamps_T=torch.arange(total),
    )


def causal_pairs(lengths: list[int]) -> int:
    return sum(1 for length in lengths for row in range(length) for column in range(length) if column <= row)


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@given(lengths=histories)
@SHORT
def test_encoders_are_counted_pair_by_pair_and_as_torch_counts_dense_work(kind: str, lengths: list[int]) -> None:
    module, batch = retrieval(kind), histories_of(lengths)
    found = module.flops(batch)
    assert found is not None
    assert found.attention == LAYERS * PAIR[kind] * causal_pairs(lengths)
    embedded = {"item_id": torch.randn(sum(lengths), DIM)}
    torchs = counted(lambda: module.encode(embedded, batch))
    assert found.projections == torchs["dense"]
    assert torchs["batched"] == LAYERS * PAIR[kind] * len(lengths) * max(lengths) ** 2
    assert found.embedding == 0
    assert found.forward == found.attention + found.projections + found.head


LOSSES = [
    ("full_softmax", "uniform"),
    ("sampled_softmax", "uniform"),
    ("bce", "uniform"),
    ("sampled_softmax", "in_batch"),
    ("bce", "in_batch"),
]


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
@pytest.mark.parametrize(("loss", "negatives"), LOSSES)
@given(lengths=histories, elsewhere=st.integers(0, 5))
@SHORT
def test_heads_are_counted_score_by_score(
    kind: str, loss: str, negatives: str, lengths: list[int], elsewhere: int
) -> None:
    labels = sum(length - length // 2 for length in lengths)
    module = retrieval(kind, loss=loss, negatives=negatives)
    batch = histories_of(lengths, denominator=float(labels + elsewhere))  # labels of other processes are candidates
    found = module.flops(batch)
    assert found is not None
    scored = {
        "full_softmax": list(range(ITEMS)),
        "uniform": ["label", *range(5)],
        "in_batch": list(range(labels + elsewhere)),
    }["full_softmax" if loss == "full_softmax" else negatives]
    assert found.head == sum(2 * DIM for _ in range(labels) for _ in scored)
    # Compiled code leaves gradients that differ from token to token to backward, and keeps no logits until then.
    waits = (loss, negatives) == ("sampled_softmax", "in_batch") and cpu._library() is not None
    assert found.recomputed == (found.head if waits else 0)
    evaluated = module.flops(batch.without_labels())
    assert evaluated == ForwardFlops(attention=found.attention, projections=found.projections)


@pytest.mark.parametrize(("loss", "negatives"), [LOSSES[0], LOSSES[3], LOSSES[4]])
def test_scores_of_candidates_are_what_torch_counts(loss: str, negatives: str) -> None:
    module, batch = retrieval("hstu", loss=loss, negatives=negatives), histories_of([5, 0, 1, 12])
    found = module.flops(batch)
    assert found is not None
    training = module.with_lookup_ids(batch, training=loss != "full_softmax")
    torchs = counted(lambda: module.loss_sums(module(training), training))
    assert found.projections + found.head == torchs["dense"]


@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_backward_has_twice_the_forwards_dense_work(kind: str) -> None:
    """Each product has a gradient for either factor: looked-up rows need theirs, and so does the first layer."""
    module, batch = retrieval(kind), histories_of([5, 0, 1, 12])
    found = module.flops(batch)
    assert found is not None
    embedded = torch.randn(18, DIM, requires_grad=True)
    torchs = counted(lambda: module.encode({"item_id": embedded}, batch).sum().backward())
    assert torchs["dense"] == 3 * found.projections
    # Positions are learned and added before the first layer, so that its input needs one even of rows that are frozen.
    torchs = counted(lambda: module.encode({"item_id": embedded.detach()}, batch).sum().backward())
    assert torchs["dense"] == 3 * found.projections


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_recomputing_is_hardware_work_only(kind: str, dropout: float) -> None:
    """torch stops where it has what backward needs; that is before a block's last product, but for a dropout's mask."""
    batch = histories_of([5, 0, 1, 12])
    modules = [retrieval(kind, recompute=recompute, dropout=dropout).train() for recompute in (False, True)]
    kept, again = (module.flops(batch) for module in modules)
    assert kept is not None
    assert again is not None
    assert again.model == kept.model == 3 * kept.forward
    assert kept.hardware == kept.model
    embedded = torch.randn(18, DIM, requires_grad=True)
    first, second = (counted(lambda x=x: x.encode({"item_id": embedded}, batch).sum().backward()) for x in modules)
    assert first["dense"] == 3 * kept.projections
    assert again.recomputed == kept.attention + second["dense"] - first["dense"]
    assert second["dense"] > first["dense"]


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax", "bce"])
def test_logits_that_are_not_kept_are_computed_again(loss: str, keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.ops.full_softmax.cpu.load_native", lambda _: None)  # torch counts its own only
    if not keeps:
        monkeypatch.setattr("lightning_gr.ops.full_softmax.cpu._KEPT_BYTES", 0)
        monkeypatch.setattr("lightning_gr.embeddings.candidate_block._CELLS_AT_ONCE", 1)
    module = retrieval("hstu", loss=loss, negatives="uniform" if loss == "full_softmax" else "in_batch")
    batch = histories_of([5, 0, 1, 12])
    found, training = module.flops(batch), module.with_lookup_ids(batch, training=loss != "full_softmax")
    assert found is not None
    scores = module(training)
    with FlopCounterMode(display=False) as forward:
        losses = module.loss_sums(scores, training)["next_item"]
    assert forward.get_total_flops() == found.head
    # Of products torch does not count those that are added in place.
    in_place: Any = {torch.ops.aten.addmm_: lambda _, a, b, **kwargs: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        torch.autograd.grad(losses, scores.queries_ND, retain_graph=True)
    assert backward.get_total_flops() == 2 * found.head + found.recomputed
    assert found.recomputed == (0 if keeps else found.head)


@pytest.mark.skipif(cpu._library() is None, reason="needs a C++ compiler")
def test_compiled_logits_are_computed_again_where_gradients_wait_for_backward() -> None:
    batch = histories_of([5, 0, 1, 12])
    for loss, again in (("full_softmax", False), ("sampled_softmax", True)):
        found = retrieval("hstu", loss=loss, negatives="in_batch" if again else "uniform").flops(batch)
        assert found is not None
        assert found.recomputed == (found.head if again else 0)


def test_triton_makes_the_logits_for_either_gradient() -> None:
    sizes = (7, 11, 3)
    with use_backend("reference"):
        assert full_softmax_recomputed_flops(*sizes, device=torch.device("cpu")) == 0
    cuda = torch.device("cuda")
    assert full_softmax_recomputed_flops(*sizes, device=cuda) == 2 * full_softmax_flops(*sizes) == 4 * 7 * 11 * 3


def test_padding_sequences_are_no_work() -> None:
    module = retrieval("hstu")
    assert module.flops(histories_of([5, 0, 1], padding=2)) == module.flops(histories_of([5, 0, 1]))
    nothing = histories_of([], padding=1)
    assert module.flops(nothing) == ForwardFlops()


def test_an_encoder_that_does_not_count_gives_none() -> None:
    class Toy(nn.Module):
        dim, max_length = DIM, LONGEST

    module = RetrievalModule(encoder=Toy(), num_items=ITEMS)
    assert module.flops(histories_of([3])) is None
    assert RankingModule(network=Toy(), features=FEATURES).flops(samples_of([(1, 1, [])])) is None


# ---- ranking -----------------------------------------------------------------------------------------------------

FEATURES = RankingFeatures(
    contextual={"user_id": 9, "city": 3},
    contextual_width=2,
    tokens={"item_id": 12, "kind": 4},
    width=3,
    history_width=4,
    candidate_width=5,
    tasks=("click", "buy"),
)
CONTEXTUAL, EMBEDDING = 3, 6
NETWORKS = ["mtgr", "none", "sum", "target_attention"]

Sample = tuple[int, int, list[int]]
"""Static tokens, real-time tokens, and the moments at which candidates are shown."""

samples = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=5
)


def realtime_moments(count: int) -> list[int]:
    """In order, and some at the same time."""
    return [3 + 2 * (n // 2) for n in range(count)]


def samples_of(parts: list[Sample], *, padding: int = 0) -> SequenceBatch:
    """Each sample with all contextual tokens; `padding` sequences have two static tokens and a candidate each."""
    torch.manual_seed(0)
    counts_B4 = torch.tensor([[CONTEXTUAL, s, r, len(n)] for s, r, n in parts] + [[0, 2, 0, 1]] * padding)
    times: list[int] = []
    for static, realtime, shown in parts:
        times += [0] * CONTEXTUAL + [1] * static + realtime_moments(realtime) + shown
    times += [1, 1, 2] * padding
    total, events_B = len(times), counts_B4[:, 1:].sum(1)
    cities_B = torch.arange(len(counts_B4)) % 3  # a feature with several values, or none
    lengths = {"user_id": torch.ones_like(events_B), "city": cities_B, "item_id": events_B, "kind": events_B}
    size = sum(int(x.sum()) for x in lengths.values())
    return SequenceBatch(
        features=KeyedJaggedTensor(
            list(lengths), torch.zeros(size, dtype=torch.int64), lengths=torch.cat(list(lengths.values()))
        ),
        token_counts_B4=counts_B4,
        sample_ids_B=torch.tensor([*range(len(parts)), *[-1] * padding]),
        timestamps_T=torch.tensor(times),
        dense={
            "numbers": torch.randn(total, FEATURES.width),
            "actions": torch.randn(total, FEATURES.history_width),
            "cross": torch.randn(total, FEATURES.candidate_width),
            "contextual": torch.randn(len(counts_B4), FEATURES.contextual_width),
        },
    )


def ranking(kind: str, **changes: Any) -> RankingModule:
    torch.manual_seed(1)
    network: Any
    if kind == "mtgr":
        network = MTGR(dim=DIM, num_layers=LAYERS, num_heads=2, max_length=24, dropout=0.0, **changes)
    else:
        network = DLRM(dim=DIM, hidden_dims=(12, 10), pooling=kind, dropout=0.0)  # type: ignore[arg-type]
    module = RankingModule(network=network, features=FEATURES, embedding_dim=EMBEDDING)
    module.configure_model()
    return module


def dynamic_pairs(parts: list[Sample]) -> int:
    """MTGR's mask, by its words: who sees whom, one pair of tokens after another."""
    pairs = 0
    for static, realtime, shown in parts:
        kinds = ["fixed"] * (CONTEXTUAL + static) + ["realtime"] * realtime + ["candidate"] * len(shown)
        times = [0] * (CONTEXTUAL + static) + realtime_moments(realtime) + shown
        for row, row_kind in enumerate(kinds):
            for column, column_kind in enumerate(kinds):
                earlier = row_kind != "fixed" and column_kind == "realtime" and times[column] < times[row]
                pairs += column_kind == "fixed" or earlier or (column == row)
    return pairs


def pooled_pairs(parts: list[Sample]) -> int:
    return sum(
        static + sum(moment < at for moment in realtime_moments(realtime))
        for static, realtime, shown in parts
        for at in shown
    )


def embedded_for(batch: SequenceBatch, *, requires_grad: bool = False) -> dict[str, Tensor]:
    return {
        name: torch.randn(batch.features[name].values().numel(), EMBEDDING, requires_grad=requires_grad)
        for name in (*FEATURES.contextual, *FEATURES.tokens)
    }


@pytest.mark.parametrize("kind", NETWORKS)
@given(parts=samples)
@SHORT
def test_ranking_is_counted_pair_by_pair_and_as_torch_counts_dense_work(kind: str, parts: list[Sample]) -> None:
    module, batch = ranking(kind), samples_of(parts)
    found = module.flops(batch)
    assert found is not None
    candidates = sum(len(shown) for _, _, shown in parts)
    pair = 2 * (DIM + DIM)  # of all heads together
    attention = {"mtgr": LAYERS * pair * dynamic_pairs(parts), "target_attention": pair * pooled_pairs(parts)}
    assert int(found.attention) == attention.get(kind, 0)
    values = sum(1 + place % 3 for place in range(len(parts)))  # of user_id and of city
    assert found.embedding == values * EMBEDDING
    # The products of a candidate's vectors with each other are batched, and not attention.
    vectors = 1 + CONTEXTUAL + (kind != "none")
    crossed = 0 if kind == "mtgr" else sum(2 * vectors**2 * DIM for _ in range(candidates))
    torchs = counted(lambda: module.score(embedded_for(batch), batch))
    assert found.projections + found.head == torchs["dense"] + crossed
    longest = [max(CONTEXTUAL + s + r + len(n) for s, r, n in parts)] * 2
    if kind == "target_attention":
        longest = [max(len(n) for _, _, n in parts), max(s + r for s, r, _ in parts)]
    padded = len(parts) * longest[0] * longest[1] * pair
    assert torchs["batched"] == crossed + {"mtgr": LAYERS * padded, "target_attention": padded}.get(kind, 0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_backward_of_ranking_has_twice_the_forwards_dense_work(kind: str) -> None:
    parts: list[Sample] = [(2, 3, [4, 9]), (0, 1, [9]), (4, 0, [0, 2, 9])]
    module, batch = ranking(kind), samples_of(parts)
    found = module.flops(batch)
    assert found is not None
    embedded = embedded_for(batch, requires_grad=True)
    torchs = counted(lambda: torch.stack(list(module.score(embedded, batch).values())).sum().backward())
    vectors = 1 + CONTEXTUAL + (kind != "none")
    crossed = 0 if kind == "mtgr" else 6 * 2 * vectors**2 * DIM
    # Numbers of users go through a layer of their own, and nobody asks for their gradient.
    spared = 2 * len(parts) * FEATURES.contextual_width * DIM
    assert torchs["dense"] == 3 * (found.projections + found.head - crossed) - spared


def test_recomputing_mtgr_is_hardware_work_only() -> None:
    batch = samples_of([(2, 3, [4, 9]), (0, 1, [9]), (4, 0, [0, 2, 9])])
    module = ranking("mtgr", recompute=True)
    kept, again = ranking("mtgr").flops(batch), module.flops(batch)
    assert kept is not None
    assert again is not None
    assert (int(kept.model), int(kept.hardware)) == (int(again.model), int(kept.model))
    embedded = embedded_for(batch, requires_grad=True)
    extra = [
        counted(lambda x=x: torch.stack(list(x.score(embedded, batch).values())).sum().backward())["dense"]
        for x in (module, ranking("mtgr"))
    ]
    assert int(again.recomputed) - int(again.attention) == extra[0] - extra[1] > 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_padding_samples_are_no_work(kind: str) -> None:
    module = ranking(kind)
    parts: list[Sample] = [(2, 3, [4, 9]), (0, 1, [9])]
    without, padded = (module.flops(samples_of(parts, padding=padding)) for padding in (0, 2))
    assert without is not None
    assert padded is not None
    for part in ("attention", "projections", "head"):
        assert int(getattr(padded, part)) == int(getattr(without, part)), part


# ---- MTGR's paper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_layers", "dim", "num_heads", "gflops", "masked"),
    [(3, 512, 2, 5.468, 4.974), (5, 768, 3, 18.586, 17.351), (15, 768, 3, 55.757, 52.052)],
    ids=["small", "medium", "large"],
)
def test_mtgr_has_the_papers_figures(num_layers: int, dim: int, num_heads: int, gflops: float, masked: float) -> None:
    """Table 2 of arXiv 2505.18654: 500 tokens that all see each other; and what of it the dynamic mask leaves."""
    with torch.device("meta"):
        network = MTGR(dim=dim, num_layers=num_layers, num_heads=num_heads)
    kinds = {"contextual": 2, "static": 300, "realtime": 150, "candidates": 48}
    counts = list(kinds.values())
    assert sum(counts) == 500
    assert network.flops(counts, 500 * 500) / 1e9 == pytest.approx(gflops, rel=1e-3)
    assert network.flops(counts, 500 * 500) == num_layers * (2 * 5 * dim**2 * 500 + 4 * dim * 500**2)
    # Candidates are shown after the whole history, whose events have a moment each.
    fixed = 302
    seen = fixed * fixed + sum(fixed + before + 1 for before in range(150)) + 48 * (fixed + 150 + 1)
    total = sum(counts)
    batch = SequenceBatch(
        features=KeyedJaggedTensor(["item_id"], torch.zeros(500, dtype=torch.int64), lengths=torch.tensor([500])),
        token_counts_B4=torch.tensor([counts]),
        sample_ids_B=torch.zeros(1, dtype=torch.int64),
        timestamps_T=torch.from_numpy(np.minimum(np.arange(total), total - 48)),
    )
    assert int(network.visible_pairs(batch)) == seen
    assert network.flops(counts, seen) / 1e9 == pytest.approx(masked, rel=1e-3)


def test_parts_add_up() -> None:
    found = ForwardFlops(attention=torch.tensor(5), projections=7, embedding=11, head=13, recomputed=17)
    assert (int(found.forward), int(found.model), int(found.hardware)) == (36, 108, 125)
