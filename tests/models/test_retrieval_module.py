"""RetrievalModule against plain formulas: losses, gradients, ranking metrics, predictions, and what it may see."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gr.batch import SequenceBatch
from lightning_gr.data import Interactions, RetrievalSource
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule

NUM_ITEMS, DIM = 23, 8


def make_log(lengths: list[int], seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = rng.integers(0, NUM_ITEMS, int(offsets[-1]))
    times = np.concatenate([np.sort(rng.integers(0, 10_000, n)) for n in lengths])
    return Interactions(np.arange(len(lengths)), offsets, items, times, np.arange(NUM_ITEMS))


def make_batch(log: Interactions, part: Any, users: list[int], denominator: float | None = None) -> SequenceBatch:
    source = RetrievalSource(log, part=part, max_length=12)
    ids = np.array(users, dtype=np.int64)
    labels = float(sum(counts.sum() for counts in source.label_counts(ids).values()))
    denominators = dict.fromkeys(source.tasks, denominator or labels)
    return source.collate(ids, windows=[(0,)], epoch=2, denominators=denominators, gradient_divisor=1.0)


class StubTrainer(SimpleNamespace):
    """What the module asks of a Trainer when it is called by hand."""


def make_module(**changes: Any) -> RetrievalModule:
    torch.manual_seed(7)
    given_: dict[str, Any] = {
        "num_items": NUM_ITEMS,
        "temperature": 0.3,
        "top_k": [3, 5],
        "embedding_std": 1.0,
    } | changes
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=DIM, num_layers=2, num_heads=2, max_length=12, dropout=0.0, time_buckets=8), **given_
    )
    module.configure_model()
    with torch.no_grad():
        for parameter in module.encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def table_of(module: RetrievalModule) -> Tensor:
    (weight,) = module.tables.parameters()  # type: ignore[union-attr]
    return weight


def states_of(module: RetrievalModule, batch: SequenceBatch) -> Tensor:
    """User states from the encoder alone, for the formulas that follow it."""
    from lightning_gr.ops.interval_mask import IntervalMask

    items = batch.features["item_id"].values()
    return module.encoder(
        table_of(module)[items] * math.sqrt(DIM),
        layout=batch.layout,
        mask=IntervalMask.causal(batch.layout),
        times_T=batch.timestamps_T,
        request_times_T=batch.request_timestamps_T,
    )


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_full_softmax_is_the_cross_entropy_over_all_items(similarity: Any) -> None:
    module, log = make_module(similarity=similarity), make_log([9, 5, 14])
    batch = make_batch(log, "train", [0, 1, 2])
    wanted = 0.0
    norm = unit if similarity == "cosine" else (lambda x: x)
    states, table = norm(states_of(module, batch)), norm(table_of(module))
    token = 0
    for user in range(3):
        events = log.items[log.offsets[user] : log.offsets[user + 1]][:-2]
        for target in events[1:][-12:].tolist():
            logits = [float(states[token] @ table[item]) / 0.3 for item in range(NUM_ITEMS)]
            wanted += math.log(sum(math.exp(x) for x in logits)) - logits[target]
            token += 1
    assert token == batch.num_tokens
    full = module.with_lookup_ids(batch, training=False)
    (total,) = module.loss_sums(module(full), full).values()
    assert float(total) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_sampled_softmax_is_the_cross_entropy_over_the_target_and_its_negatives(similarity: Any) -> None:
    module = make_module(similarity=similarity, loss="sampled_softmax", num_negatives=6)
    batch = make_batch(make_log([9, 5, 14]), "train", [2, 0])
    sampled = module.with_lookup_ids(batch, training=True)
    drawn = sampled.features["sampled"].values()[sampled.features["drawn"].values().view(-1, 7)]
    negatives = drawn[:, 1:]
    assert torch.equal(drawn[:, 0], batch.labels["next_item"].values_N)
    targets = batch.labels["next_item"].values_N
    assert (negatives == targets[:, None]).any(), "no collision: the test would not see how one is treated"
    norm = unit if similarity == "cosine" else (lambda x: x)
    states, table = norm(states_of(module, batch)), norm(table_of(module))
    wanted = 0.0
    for token, target in enumerate(targets.tolist()):
        logits = [float(states[token] @ table[target]) / 0.3]
        logits += [float(states[token] @ table[i]) / 0.3 for i in negatives[token].tolist() if i != target]
        wanted += math.log(sum(math.exp(x) for x in logits)) - logits[0]
    (total,) = module.loss_sums(module(sampled), sampled).values()
    assert float(total) == pytest.approx(wanted, rel=1e-5)


def gradients(module: RetrievalModule, batches: list[SequenceBatch]) -> list[Tensor]:
    module.zero_grad()
    sampled = module.loss == "sampled_softmax"
    for batch in batches:
        ready = module.with_lookup_ids(batch, training=sampled)
        ready.mean_over_global_batch(module.loss_sums(module(ready), ready)).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_parts_of_a_global_batch_add_up_to_its_gradient(loss: Any) -> None:
    module, log = make_module(loss=loss, num_negatives=5), make_log([9, 5, 14, 4, 8])
    whole = make_batch(log, "train", [0, 1, 2, 3, 4])
    denominator = whole.denominators["next_item"]
    parts = [make_batch(log, "train", users, denominator) for users in ([3, 0], [2], [], [1, 4])]
    one, many = gradients(module, [whole]), gradients(module, parts)
    assert len(one) == len(many) == len(list(module.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, many, strict=True))


def test_a_user_is_scored_alike_whoever_shares_the_batch() -> None:
    module, log = make_module().eval(), make_log([9, 5, 14, 4])
    alone = module(module.with_lookup_ids(make_batch(log, "test", [1]), training=False)).logits()
    mates = module(module.with_lookup_ids(make_batch(log, "test", [2, 1, 3, 0]), training=False)).logits()
    assert torch.allclose(alone[0], mates[1], rtol=0, atol=1e-4)


def test_no_token_sees_what_comes_after_it() -> None:
    module, log = make_module().eval(), make_log([12])
    batch = module.with_lookup_ids(make_batch(log, "train", [0]), training=False)
    before = module(batch).logits()
    for changed in range(1, 9):
        items = log.items.copy()
        items[changed] = (items[changed] + 1) % NUM_ITEMS
        other = Interactions(log.users, log.offsets, items, log.timestamps, log.item_ids)
        after = module(module.with_lookup_ids(make_batch(other, "train", [0]), training=False)).logits()
        assert torch.equal(before[:changed], after[:changed])
        assert not torch.allclose(before[changed], after[changed])


def test_predictions_are_the_best_items_after_the_whole_history() -> None:
    module, log = make_module().eval(), make_log([9, 5, 14])
    batch = make_batch(log, "all", [2, 0, 1])
    ends = batch.layout.offsets_B1[1:] - 1
    scores = unit(states_of(module, batch)[ends]) @ unit(table_of(module)).T / 0.3
    found = module.predict_step(module.with_lookup_ids(batch, training=False), 0)
    assert found["sample_ids"].tolist() == [2, 0, 1]
    order = np.argsort(-scores.detach().numpy(), axis=1)[:, :5]
    assert found["item_rows"].tolist() == order.tolist()
    best = torch.gather(scores, 1, found["item_rows"])
    assert torch.allclose(found["scores"].double(), best.double(), atol=1e-4)


def test_a_rank_without_users_predicts_nothing() -> None:
    module = make_module().eval()
    found = module.predict_step(module.with_lookup_ids(make_batch(make_log([5]), "all", []), training=False), 0)
    assert found["sample_ids"].shape == (0,)
    assert found["item_rows"].shape == (0, 5)


def test_validation_ranks_the_target_among_all_items() -> None:
    module, log = make_module().eval(), make_log([9, 5, 14, 6, 7])
    users = [0, 1, 2, 3, 4]
    batch = make_batch(log, "val", users)
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.__setitem__(name, value)  # type: ignore[method-assign, assignment]
    for part in ([0, 1, 2], [3, 4]):
        module.validation_step(module.with_lookup_ids(make_batch(log, "val", part), training=False), 0)
    ends = batch.layout.offsets_B1[1:] - 1
    scores = (unit(states_of(module, batch)[ends]) @ unit(table_of(module)).T / 0.3).detach().numpy()
    targets = [int(log.items[log.offsets[user + 1] - 2]) for user in users]
    ranks = np.array([int((row >= row[target]).sum()) for row, target in zip(scores, targets, strict=True)])
    for k in (3, 5):
        assert float(logged[f"val/HR@{k}"].compute()) == pytest.approx(float((ranks <= k).mean()))
        gains = np.where(ranks <= k, 1 / np.log2(ranks + 1.0), 0.0)
        assert float(logged[f"val/NDCG@{k}"].compute()) == pytest.approx(float(gains.mean()), rel=1e-5)
    losses = np.log(np.exp(scores).sum(1)) - scores[np.arange(5), targets]
    assert float(logged["val/loss"].compute()) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_negatives_belong_to_the_epoch_the_sample_and_the_position() -> None:
    module, log = make_module(loss="sampled_softmax", num_negatives=4), make_log([9, 5, 14])

    def drawn(users: list[int]) -> dict[int, list[int]]:
        batch = module.with_lookup_ids(make_batch(log, "train", users), training=True)
        places, items = batch.features["drawn"], batch.features["sampled"].values()
        parts = torch.split(items[places.values()], places.lengths().tolist())
        return {user: part.tolist() for user, part in zip(users, parts, strict=True)}

    together = drawn([0, 1, 2])
    assert drawn([2, 0]) == {user: together[user] for user in (2, 0)}
    assert len({tuple(part[1:5]) for part in together.values()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: expected a number above 0"),
        ({"num_items": 0}, "num_items=0: expected at least 1"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make_module(**changes)


def test_what_only_a_run_can_know_is_checked_in_it() -> None:
    module = RetrievalModule(encoder=nn.Identity())
    module.trainer = StubTrainer(datamodule=None)  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match="num_items: not given"):
        module.setup("fit")
    module.trainer = StubTrainer(datamodule=StubTrainer(num_items=4))  # type: ignore[assignment]
    with pytest.raises(MisconfigurationException, match=r"top_k=\[10\]: the corpus has only 4 items"):
        module.setup("fit")
    with pytest.raises(MisconfigurationException, match="expected SequenceBatch batches, got dict"):
        module.on_before_batch_transfer({}, 0)


def test_the_backend_of_a_model_is_that_of_all_its_operators() -> None:
    batch = make_batch(make_log([9, 5, 14]), "train", [2, 0])
    for loss in ("sampled_softmax", "full_softmax"):
        found = {}
        for backend in ("reference", "cpu"):
            torch.manual_seed(0)
            module = make_module(loss=loss, num_negatives=6, backend=backend)
            ready = module.with_lookup_ids(batch, training=True)
            (total,) = module.loss_sums(module(ready), ready).values()
            (gradient,) = torch.autograd.grad(total, module.encoder.layers[0].uvqk.weight, create_graph=False)
            found[backend] = (total.detach(), gradient)
        for one, other in zip(*found.values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    ready = module.with_lookup_ids(batch, training=True)
    (total,) = module.loss_sums(module(ready), ready).values()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(total, module.encoder.layers[0].uvqk.weight, create_graph=True)
    with pytest.raises(MisconfigurationException, match="backend='cuda': expected one of auto, reference, cpu, triton"):
        make_module(backend="cuda")
