"""RetrievalModule with every kind of negatives, against plain formulas in float64: losses, logQ, sharing, 16 bit.

Shape suffixes: N labels, R negatives, U items drawn, D width.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import Labels, SequenceBatch, TokenKind
from lightning_gr.models import RetrievalModule
from lightning_gr.negatives import (
    HardNegatives,
    InBatchNegatives,
    MixedNegatives,
    NegativeSampler,
    Offload,
    PopularityNegatives,
    UniformNegatives,
)
from lightning_gr.negatives.logit_sharing import sharing_sources, sharing_words

ITEMS, DIM, TEMPERATURE, SEED = 13, 6, 0.4, 5
SEQUENCES = [[3, 9, 9, 1], [], [11], [0, 4, 12]]
LABELS = {0: 9, 2: 1, 3: 11, 4: 0, 7: 5}  # not every token has one, and one sequence has none
COUNTS = torch.arange(1, ITEMS + 1)
Array = np.ndarray[Any, Any]


class Linear(nn.Module):
    """A state after each token that is a matrix times its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.max_length = DIM, 100
        self.matrix = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, x_TD: Tensor, **given: Any) -> Tensor:
        return x_TD @ self.matrix.T

    def flops(self, num_tokens: int, num_pairs: int) -> int:
        return 2 * num_tokens * DIM * DIM


def make_module(negatives: Any = "uniform", *, items: int = ITEMS, **changes: Any) -> RetrievalModule:
    torch.manual_seed(SEED)
    given_: dict[str, Any] = {"num_items": items, "temperature": TEMPERATURE, "embedding_std": 1.0, "top_k": [1]}
    given_ |= {"loss": "sampled_softmax", "negatives": negatives} | changes
    if negatives == "uniform":
        given_.setdefault("num_negatives", 6)
    module = RetrievalModule(encoder=Linear(), **given_)
    counts = torch.arange(1, items + 1)
    module.contrast.prepare(num_items=items, item_counts=lambda: counts)
    module.configure_model()
    return module


def make_batch(
    sequences: list[list[int]] = SEQUENCES, labels: dict[int, int] = LABELS, weights: list[float] | None = None
) -> SequenceBatch:
    """Histories of items, and the labels of some tokens by their place in the batch."""
    counts = torch.zeros(len(sequences), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = torch.tensor([len(items) for items in sequences])
    flat = torch.tensor([item for items in sequences for item in items], dtype=torch.int64)
    values, tokens = (torch.tensor(list(x), dtype=torch.int64) for x in (labels.values(), labels.keys()))
    return SequenceBatch(
        features=KeyedJaggedTensor(["item_id"], flat, lengths=counts.sum(1)),
        token_counts_B4=counts,
        sample_ids_B=torch.arange(len(sequences)) + 40,
        labels={"next_item": Labels(values, tokens, None if weights is None else torch.tensor(weights))},
        denominators={"next_item": float(len(labels))},
        epoch=3,
    )


def looked_up(module: RetrievalModule, batch: SequenceBatch | None = None) -> SequenceBatch:
    torch.manual_seed(SEED)
    return module.with_lookup_ids(batch or make_batch(), training=True)


def loss_of(module: RetrievalModule, batch: SequenceBatch | None = None) -> Tensor:
    ready = looked_up(module, batch)
    return module.loss_sums(module(ready), ready)["next_item"]


def asking(sequences: list[list[int]], labels: dict[int, int]) -> list[int]:
    flat = [item for items in sequences for item in items]
    return [flat[token] for token in labels]


def similarities(module: RetrievalModule, items: list[int]) -> Array:
    """Logits of every item after each of these items, in float64."""
    (weight,) = module.tables.parameters()  # type: ignore[union-attr]
    table = weight.detach().double().numpy()
    states = math.sqrt(DIM) * table[items] @ module.encoder.matrix.detach().double().numpy().T  # type: ignore[operator, union-attr]
    if module.similarity == "cosine":
        states = states / np.linalg.norm(states, axis=1, keepdims=True)
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
    return states @ table.T / TEMPERATURE


def drawn(sampler: NegativeSampler, batch: SequenceBatch, items: int = ITEMS) -> list[list[int]]:
    """The negatives of each label, asked for by hand."""
    tokens = batch.labels["next_item"].tokens_N
    found = sampler.sample(
        num_items=items,
        seed=SEED,
        epoch=batch.epoch,
        sample_ids_N=batch.sample_ids_B[batch.layout.sequence_T[tokens]],
        positions_N=batch.layout.position_T[tokens],
    )
    return found.tolist()  # type: ignore[no-any-return]


def gradients(module: RetrievalModule, batch: SequenceBatch | None = None) -> list[Tensor]:
    module.zero_grad()
    loss_of(module, batch).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def shares(items: int = ITEMS) -> Array:
    counts = np.arange(1, items + 1)
    return counts / counts.sum()


# ---- losses of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("loss", ["sampled_softmax", "bce"])
@pytest.mark.parametrize("kind", ["popularity", "mixed", "hard", "rank", "labels"])
def test_losses_are_those_of_plain_loops(kind: str, loss: str, similarity: Any) -> None:
    parts: list[NegativeSampler] = [
        UniformNegatives(num_negatives=4),
        PopularityNegatives(num_negatives=3, log_q=False),
    ]
    made: dict[str, NegativeSampler] = {
        "popularity": parts[1],
        "mixed": MixedNegatives(samplers=[*parts, InBatchNegatives()]),
        "hard": HardNegatives(of=UniformNegatives(num_negatives=12), num_negatives=2),
        "rank": InBatchNegatives(scope="rank"),
        "labels": MixedNegatives(samplers=[InBatchNegatives(scope="rank"), UniformNegatives(num_negatives=12)]),
    }
    sampler = made[kind]
    labels = LABELS | {7: 9}  # one item is the label of two
    module, batch = make_module(sampler, loss=loss, similarity=similarity), make_batch(labels=labels)
    wanted, collisions = 0.0, 0
    logits = similarities(module, asking(SEQUENCES, labels))
    of_batch = sorted(set(labels.values())) if sampler.scope else []
    for row, target, negatives in zip(logits, labels.values(), drawn(sampler, batch), strict=True):
        items = [item for item in negatives if item != target]
        collisions += len(negatives) - len(items)
        if kind == "hard":
            items = sorted(items, key=lambda item: -row[item])[:2]
        items += [item for item in of_batch if item != target]
        if loss == "bce":
            wanted += math.log1p(math.exp(-row[target]))
            wanted += sum(math.log1p(math.exp(row[item])) for item in items) / len(items)
        else:
            wanted += math.log(sum(math.exp(row[item]) for item in [target, *items])) - row[target]
    assert collisions > 0 or not sampler.num_drawn
    assert float(loss_of(module, batch).detach()) == pytest.approx(wanted, rel=1e-5)


def test_a_class_of_uniform_and_of_in_batch_negatives_is_its_name_to_the_bit() -> None:
    for name, sampler in (("uniform", UniformNegatives(num_negatives=6)), ("in_batch", InBatchNegatives())):
        one, other = make_module(name), make_module(sampler)
        assert torch.equal(loss_of(one), loss_of(other))
        assert all(map(torch.equal, gradients(one), gradients(other)))


def test_hard_negatives_alone_have_gradients() -> None:
    module = make_module(HardNegatives(of=UniformNegatives(num_negatives=9), num_negatives=2))
    ready = looked_up(module)
    rows_UD = module.embed(ready)["sampled"].detach().requires_grad_()
    features = {name: x.detach() for name, x in module.embed(ready).items()} | {"sampled": rows_UD}
    module.loss_sums(module.score(features, ready), ready)["next_item"].backward()
    chosen = set(LABELS.values())
    logits = similarities(module, asking(SEQUENCES, LABELS))
    for row, target, negatives in zip(logits, LABELS.values(), drawn(module.contrast.sampler, ready), strict=True):
        chosen |= set(sorted((x for x in negatives if x != target), key=lambda x: -row[x])[:2])
    items = ready.features["sampled"].values().tolist()
    assert rows_UD.grad is not None
    touched = {item for item, grad in zip(items, rows_UD.grad, strict=True) if bool((grad != 0).any())}
    assert touched == chosen
    assert touched < set(items)


def test_the_label_itself_is_not_chosen_as_a_hard_negative() -> None:
    module = make_module(HardNegatives(of=UniformNegatives(num_negatives=12), num_negatives=2))
    logits = similarities(module, asking(SEQUENCES, LABELS))
    labels = {token: int(row.argmax()) for token, row in zip(LABELS, logits, strict=True)}  # what scores highest
    batch, wanted, collisions = make_batch(labels=labels), 0.0, 0
    for row, target, negatives in zip(logits, labels.values(), drawn(module.contrast.sampler, batch), strict=True):
        collisions += target in negatives
        best = sorted((row[item] for item in negatives if item != target), reverse=True)[:2]
        wanted += math.log(sum(math.exp(x) for x in [row[target], *best])) - row[target]
    assert collisions > 0
    assert float(loss_of(module, batch).detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"negatives_offload": Offload(segment=2)}, {"logit_sharing": 3}], ids=", ".join
)
@pytest.mark.parametrize("log_q", [False, True])
def test_with_all_items_as_negatives_it_is_the_full_softmax(log_q: bool, changes: dict[str, Any]) -> None:
    sampler = UniformNegatives(num_negatives=ITEMS, log_q=log_q or "logit_sharing" in changes)
    sampler.sample = lambda *, sample_ids_N, **_: torch.arange(ITEMS).repeat(len(sample_ids_N), 1)  # type: ignore[method-assign]
    sampled, full = make_module(sampler, **changes), make_module(loss="full_softmax")
    # Shared, each item is among the negatives three times, and expected so often.
    torch.testing.assert_close(loss_of(sampled), loss_of(full), rtol=1e-6, atol=0)
    for one, other in zip(gradients(sampled), gradients(full), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["popularity", "in_batch", "mixed"])
def test_by_log_q_the_expected_sum_over_negatives_is_that_over_all_items(kind: str) -> None:
    """Over every outcome of the draws and of the other labels, each with its probability."""
    items, own = 3, 1
    p, uniform = shares(items), np.full(items, 1 / items)
    if kind == "mixed":
        parts = [UniformNegatives(num_negatives=1), PopularityNegatives(num_negatives=1, log_q=False, power=1.0)]
        sampler: NegativeSampler = MixedNegatives(samplers=[*parts, InBatchNegatives()], log_q=True)
        draw_shares, others = [uniform, p], 1
    elif kind == "popularity":
        sampler, draw_shares, others = PopularityNegatives(num_negatives=2, log_q=True, power=1.0), [p, p], 0
    else:
        sampler, draw_shares, others = InBatchNegatives(log_q=True), [], 2
    module = make_module(sampler, items=items)
    sequences = [[item] for item in range(1 + others)]
    (row, *_) = similarities(module, [0])
    expected = total = 0.0
    for outcome in itertools.product(range(items), repeat=len(draw_shares) + others):
        draws, other_labels = outcome[: len(draw_shares)], outcome[len(draw_shares) :]
        probability = math.prod(q[item] for q, item in zip(draw_shares, draws, strict=True))
        probability *= math.prod(p[item] for item in other_labels)
        fixed = torch.tensor(draws, dtype=torch.int64)
        if draws:
            sampler.sample = lambda *, sample_ids_N, _is=fixed, **__: _is.repeat(len(sample_ids_N), 1)  # type: ignore[method-assign]
        labels = dict(enumerate([own, *other_labels]))
        batch = make_batch(sequences, labels, weights=[1.0] + [0.0] * others)
        loss = float(loss_of(module, batch).detach())
        expected += probability * (math.exp(loss + row[own]) - math.exp(row[own]))
        total += probability
    assert total == pytest.approx(1.0)
    assert expected == pytest.approx(sum(math.exp(row[item]) for item in range(items) if item != own), rel=1e-4)


# ---- sharing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", ["negatives", "logits"])
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("factor", [2, 3, 50])
def test_shared_negatives_are_those_of_other_labels(factor: int, log_q: bool, reuse: Any) -> None:
    sampler = PopularityNegatives(num_negatives=4, log_q=log_q, power=1.0)
    module = make_module(sampler, logit_sharing=factor, logit_sharing_reuse=reuse)
    batch = make_batch()
    tokens, own = batch.labels["next_item"].tokens_N, drawn(sampler, batch)
    ids_N = batch.sample_ids_B[batch.layout.sequence_T[tokens]]
    words_N = sharing_words(seed=SEED, epoch=3, sample_ids_N=ids_N, positions_N=batch.layout.position_T[tokens])
    sources = sharing_sources(words_N, factor).tolist()
    logits, targets = similarities(module, asking(SEQUENCES, LABELS)), list(LABELS.values())
    p, wanted = shares(), 0.0
    for n, (target, others) in enumerate(zip(targets, sources, strict=True)):
        assert len(others) == min(factor, len(targets)) - 1
        assert n not in others
        terms = [(logits[n], item) for item in own[n]]
        terms += [(logits[n if reuse == "negatives" else k], item) for k in others for item in own[k]]
        scale = [len(terms) * p[item] if log_q else 1.0 for _, item in terms]
        total = math.exp(logits[n][target])
        total += sum(math.exp(row[x]) / s for (row, x), s in zip(terms, scale, strict=True) if x != target)
        wanted += math.log(total) - logits[n][target]
    assert float(loss_of(module, batch).detach()) == pytest.approx(wanted, rel=1e-5)
    ready, alone = looked_up(module, batch), looked_up(make_module(sampler), batch)
    assert torch.equal(ready.features["sampled"].values(), alone.features["sampled"].values()), (
        "nothing more is looked up"
    )


def test_sharing_by_one_is_the_baseline_to_the_bit() -> None:
    one, other = make_module(), make_module(logit_sharing=1, negatives_dtype="float32")
    assert torch.equal(loss_of(one), loss_of(other))
    assert all(map(torch.equal, gradients(one), gradients(other)))
    assert (
        looked_up(one).features.keys()
        == looked_up(other).features.keys()
        == [
            "drawn",
            "item_id",
            "target",
            "sampled",
            "corpus",
        ]
    )


def test_a_label_that_is_alone_shares_nothing() -> None:
    alone = make_batch([[3, 4]], {1: 5})
    for reuse in ("negatives", "logits"):
        shared = make_module(logit_sharing=2, logit_sharing_reuse=reuse)
        torch.testing.assert_close(loss_of(shared, alone), loss_of(make_module(), alone), rtol=0, atol=0)


# ---- rows in 16 bit and in host memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_16_bit_touches_negatives_alone_and_reaches_rows_in_32(dtype: Any, bound: float, similarity: Any) -> None:
    module = make_module(negatives_dtype=dtype, similarity=similarity)
    plain = make_module(similarity=similarity)
    ready = looked_up(module)
    scores, wanted = module(ready), similarities(module, asking(SEQUENCES, LABELS))
    targets_ND = module._normalised(module.embed(ready)["target"])
    assert torch.equal(scores.positives_N, (scores.queries_ND * targets_ND).sum(-1)), "no bit of a positive changes"
    negatives = drawn(module.contrast.sampler, make_batch())
    exact_NR = torch.tensor(np.array([row[items] for row, items in zip(wanted, negatives, strict=True)]))
    (table,) = module.tables.parameters()  # type: ignore[union-attr]
    longest = 1.0 if similarity == "cosine" else float(table.detach().norm(dim=1).max())
    error_NR = (scores.negatives_NR.detach() - exact_NR).abs()
    assert float(error_NR.max()) > 1e-5, "nothing is rounded, so the test sees nothing"
    assert bool((error_NR <= 1.1 * bound * scores.queries_ND.detach().norm(dim=1)[:, None] * longest).all())
    for one, other in zip(gradients(module), gradients(plain), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.1, atol=20 * bound)
        assert not torch.equal(one, one.to(getattr(torch, dtype)).float()), "the gradient itself is not rounded"


@pytest.mark.parametrize("segment", [1, 2, 7, 100])
@pytest.mark.parametrize("changes", [{}, {"logit_sharing": 2}, {"similarity": "dot"}, {"loss": "bce"}], ids=str)
def test_rows_in_host_memory_give_the_same_losses_and_gradients(segment: int, changes: dict[str, Any]) -> None:
    kept, plain = make_module(negatives_offload=Offload(segment=segment), **changes), make_module(**changes)
    torch.testing.assert_close(loss_of(kept), loss_of(plain), rtol=1e-6, atol=0)
    for one, other in zip(gradients(kept), gradients(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"negatives_offload": Offload(segment=2)}, {"negatives_dtype": "float16"}], ids=", ".join
)
def test_nobody_holds_the_rows_that_are_kept_elsewhere(changes: dict[str, Any]) -> None:
    import weakref

    module = make_module(**changes)
    ready = looked_up(module)
    features = module.embed(ready)
    features["sampled"] = features["sampled"].clone()
    rows = weakref.ref(features["sampled"])
    scores = module.score(features, ready)
    assert scores.negatives_NR is not None
    assert rows() is None
    # What sharded tables give are parts of one tensor, of which every part keeps the whole.
    whole = torch.cat(list(module.embed(ready).values()))
    parts = whole.split([len(x) for x in module.embed(ready).values()])
    features = dict(zip(module.embed(ready), parts, strict=True))
    held = weakref.ref(whole)
    del whole, parts
    again = module.score(features, ready)
    assert held() is None
    assert torch.equal(again.negatives_NR, scores.negatives_NR)


# ---- padding and costs ---------------------------------------------------------------------------------------------


@st.composite
def jagged(draw: Any) -> tuple[list[list[int]], dict[int, int]]:
    """Histories, some empty, and labels of some of their tokens."""
    sequences = draw(st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=5), min_size=1, max_size=6))
    asks = [draw(st.booleans()) for items in sequences for _ in items]
    return sequences, {token: draw(st.integers(0, ITEMS - 1)) for token, one in enumerate(asks) if one}


@settings(max_examples=25, deadline=None)
@given(batch=jagged(), apart=st.booleans(), factor=st.integers(1, 3))
def test_only_labelled_tokens_have_negatives(
    batch: tuple[list[list[int]], dict[int, int]], apart: bool, factor: int
) -> None:
    sequences, labels = batch
    changes: dict[str, Any] = {"negatives_dtype": "float16"} if apart else {}
    module = make_module(num_negatives=5, logit_sharing=factor, **changes)
    ready = looked_up(module, make_batch(sequences, labels))
    ends = np.cumsum([len(items) for items in sequences])
    of_sequence = [sum(end - len(x) <= token < end for token in labels) for end, x in zip(ends, sequences, strict=True)]
    assert ready.features["drawn"].lengths().tolist() == [(1 + 5) * n for n in of_sequence]
    assert ready.features["target"].lengths().tolist() == [apart * n for n in of_sequence]
    scores = module(ready)
    assert scores.negatives_NR.shape == (len(labels), 5 * min(factor, max(len(labels), 1)))
    distinct = {x for row in drawn(module.contrast.sampler, make_batch(sequences, labels)) for x in row}
    wanted = distinct | (set() if apart else set(labels.values()))
    assert ready.features["sampled"].values().tolist() == sorted(wanted)
    module.loss_sums(scores, ready)["next_item"].backward()
    (table,) = module.tables.parameters()  # type: ignore[union-attr]
    assert table.grad is not None
    seen = wanted | set(labels.values()) | {item for items in sequences for item in items}
    assert {i for i in range(ITEMS) if bool(table.grad[i].any())} <= seen


@pytest.mark.parametrize(
    ("negatives", "changes", "scored"),
    [
        ("uniform", {}, 1 + 6),
        ("uniform", {"logit_sharing": 3}, 1 + 18),
        ("uniform", {"logit_sharing": 50}, 1 + 30),  # there are five labels
        ("uniform", {"logit_sharing": 3, "logit_sharing_reuse": "logits"}, 1 + 6),
        (HardNegatives(of=UniformNegatives(num_negatives=4), num_negatives=2), {}, 1 + 4),
        (InBatchNegatives(scope="rank"), {}, 5),
        (MixedNegatives(samplers=[UniformNegatives(num_negatives=4), InBatchNegatives()]), {}, 1 + 4 + 5),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, NegativeSampler) else str(x),
)
def test_what_is_multiplied_is_counted(negatives: Any, changes: dict[str, Any], scored: int) -> None:
    module = make_module(negatives, **changes)
    found = module.flops(looked_up(module))
    assert found is not None
    assert found.head == 2 * DIM * len(LABELS) * scored
    per_token = module.sequence_cost().linear - make_module("in_batch").sequence_cost().linear
    drawn_alone = 0 if isinstance(negatives, InBatchNegatives) else scored - 5 * isinstance(negatives, MixedNegatives)
    if changes.get("logit_sharing") == 50:
        drawn_alone = 1 + 6 * 50  # of a batch of any size
    assert per_token == 2 * DIM * drawn_alone


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_features_may_be_scored_twice(similarity: str) -> None:
    module = make_module(similarity=similarity)
    ready = looked_up(module)
    features = module.embed(ready)
    one, two = (module.loss_sums(module.score(features, ready), ready)["next_item"] for _ in range(2))
    assert one == two
    torch.testing.assert_close(
        torch.autograd.grad(one + two, module.encoder.matrix)[0],  # type: ignore[union-attr]
        2 * torch.autograd.grad(loss_of(module), module.encoder.matrix)[0],  # type: ignore[union-attr]
    )


def test_features_whose_negatives_were_taken_are_named() -> None:
    module = make_module(negatives_dtype="float16")
    ready = looked_up(module)
    features = module.embed(ready)
    module.score(features, ready)
    with pytest.raises(ValueError, match=r"^features: the rows of negatives went .* embed\(batch\)"):
        module.score(features, ready)


def test_a_label_that_logq_knows_nothing_of_is_named() -> None:
    module = make_module(InBatchNegatives(log_q=True))
    counts = torch.arange(ITEMS)  # item 0 never occurs, and is a label
    module.contrast.prepare(num_items=ITEMS, item_counts=lambda: counts)
    with pytest.raises(ValueError, match=r"InBatchNegatives: item row 0 is a label and has a count of 0"):
        looked_up(module)
    with pytest.raises(ValueError, match=r"item rows 0 \.\.\. 13 and counts of 13 items"):
        module.contrast.sampler.log_label_share(torch.tensor([0, 13]))
