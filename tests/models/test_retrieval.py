"""RetrievalModule in runs of a real Trainer, with an encoder simple enough for NumPy, and with labels of any weight."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchrec import KeyedJaggedTensor

from lightning_gr.batch import PADDING_SAMPLE_ID, Labels, SequenceBatch, TokenKind
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule

Array = np.ndarray[Any, Any]
ITEMS, DIM, TEMPERATURE = 17, 6, 0.4


class Linear(nn.Module):
    """A state after each token that is a matrix times its embedding; keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.max_length = DIM, 100
        self.matrix = nn.Parameter(torch.randn(DIM, DIM))
        self.given: dict[str, Any] = {}

    def forward(self, x_TD: Tensor, **given: Any) -> Tensor:
        self.given = given | {"x_TD": x_TD}
        return x_TD @ self.matrix.T


def make_module(encoder: nn.Module | None = None, **changes: Any) -> RetrievalModule:
    torch.manual_seed(5)
    settings: dict[str, Any] = {"num_items": ITEMS, "temperature": TEMPERATURE, "embedding_std": 1.0, "top_k": [2, 4]}
    module = RetrievalModule(encoder=encoder or Linear(), **(settings | changes))
    module.configure_model()
    return module


def make_batch(
    sequences: list[list[int]],
    labels: dict[int, int],
    *,
    weights: list[float] | None = None,
    ids: list[int] | None = None,
    **changes: Any,
) -> SequenceBatch:
    """Histories of items, and the labels of some tokens by their place in the batch."""
    counts = torch.zeros(len(sequences), 4, dtype=torch.int64)
    counts[:, TokenKind.REALTIME] = torch.tensor([len(items) for items in sequences])
    flat = torch.tensor([item for items in sequences for item in items], dtype=torch.int64)
    values, tokens = (torch.tensor(list(x), dtype=torch.int64) for x in (labels.values(), labels.keys()))
    weights_N = None if weights is None else torch.tensor(weights)
    default: dict[str, Any] = {
        "features": KeyedJaggedTensor(["item_id"], flat, lengths=counts.sum(1)),
        "token_counts_B4": counts,
        "sample_ids_B": torch.tensor(list(range(len(sequences))) if ids is None else ids, dtype=torch.int64),
        "labels": {"next_item": Labels(values, tokens, weights_N)},
        "denominators": {"next_item": float(sum(weights)) if weights is not None else float(len(labels))},
    }
    return SequenceBatch(**(default | changes))


PADDING = ([[]], {})
SEQUENCES = [[3, 9, 9, 1], [], [16], [0, 4, 12]]
LABELS = {0: 9, 2: 1, 3: 16, 4: 0, 7: 5}  # not every token has one


def parts(module: RetrievalModule) -> tuple[Array, Array]:
    """Item table and the matrix of the encoder."""
    assert module.tables is not None
    (table,) = module.tables.parameters()
    return table.detach().double().numpy(), module.encoder.matrix.detach().double().numpy()  # type: ignore[union-attr, operator]


def similarities(module: RetrievalModule, items: list[int]) -> Array:
    """Logits of every item after each of these items, in float64."""
    table, matrix = parts(module)
    states = math.sqrt(DIM) * table[items] @ matrix.T
    if module.similarity == "cosine":
        states = states / np.linalg.norm(states, axis=1, keepdims=True)
        table = table / np.linalg.norm(table, axis=1, keepdims=True)
    return states @ table.T / TEMPERATURE


def cross_entropies(logits: Array, targets: list[int]) -> Array:
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]


def asked(sequences: list[list[int]], labels: dict[int, int]) -> list[int]:
    """The item of each labelled token."""
    flat = [item for items in sequences for item in items]
    return [flat[token] for token in labels]


def trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


def test_the_encoder_is_given_scaled_rows_a_causal_mask_and_the_times() -> None:
    module = make_module()
    times = torch.arange(8) * 10
    batch = make_batch(SEQUENCES, LABELS, timestamps_T=times, request_timestamps_T=times + 3)
    module(module.with_lookup_ids(batch, training=False))
    given = module.encoder.given
    rows = parts(module)[0][[3, 9, 9, 1, 16, 0, 4, 12]]
    np.testing.assert_allclose(given["x_TD"].detach().numpy(), math.sqrt(DIM) * rows, rtol=1e-5)
    assert torch.equal(given["times_T"], times)
    assert torch.equal(given["request_times_T"], times + 3)
    assert given["layout"].lengths_B.tolist() == [4, 0, 1, 3]
    seen = given["mask"].visible(given["layout"], given["layout"])
    for b, length in enumerate([4, 0, 1, 3]):
        assert seen[b].tolist() == [[j <= i < length for j in range(4)] for i in range(4)]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5, 0.5, 1.0]])
def test_the_loss_is_the_weighted_sum_over_labelled_tokens_alone(similarity: Any, weights: list[float] | None) -> None:
    module = make_module(similarity=similarity)
    batch = module.with_lookup_ids(make_batch(SEQUENCES, LABELS, weights=weights), training=False)
    losses = cross_entropies(similarities(module, asked(SEQUENCES, LABELS)), list(LABELS.values()))
    found = module.loss_sums(module(batch), batch)
    assert list(found) == ["next_item"]
    assert float(found["next_item"]) == pytest.approx(float((losses * (weights or 1.0)).sum()), rel=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_negative_that_is_the_target_does_not_count(similarity: Any) -> None:
    module = make_module(similarity=similarity, loss="sampled_softmax", num_negatives=9)
    batch = module.with_lookup_ids(make_batch(SEQUENCES, LABELS, weights=[1.0, 0.5, 2.0, 1.0, 3.0]), training=True)
    places, items = batch.features["drawn"].values().view(5, 10), batch.features["sampled"].values()
    assert items.tolist() == sorted(set(items.tolist()))  # each is looked up once
    negatives = items[places[:, 1:]].tolist()
    logits = similarities(module, asked(SEQUENCES, LABELS))
    wanted, collisions = 0.0, 0
    for row, target, drawn, weight in zip(logits, LABELS.values(), negatives, [1.0, 0.5, 2.0, 1.0, 3.0], strict=True):
        kept = [item for item in drawn if item != target]
        collisions += len(drawn) - len(kept)
        wanted -= weight * math.log(math.exp(row[target]) / sum(math.exp(row[item]) for item in [target, *kept]))
    assert collisions > 0
    assert float(module.loss_sums(module(batch), batch)["next_item"]) == pytest.approx(wanted, rel=1e-5)


def test_a_label_whose_negatives_are_all_the_target_costs_nothing() -> None:
    module = make_module(num_items=1, loss="sampled_softmax", num_negatives=1, top_k=[1])
    batch = module.with_lookup_ids(make_batch([[0, 0]], {0: 0, 1: 0}), training=True)
    loss = module.loss_sums(module(batch), batch)["next_item"]
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in module.parameters())


def test_a_step_returns_the_sum_over_the_global_denominator_times_the_divisor() -> None:
    module = make_module()
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    batch = make_batch(SEQUENCES, LABELS, denominators={"next_item": 40.0}, gradient_divisor=6.0)
    losses = cross_entropies(similarities(module, asked(SEQUENCES, LABELS)), list(LABELS.values()))
    found = module.training_step(module.with_lookup_ids(batch, training=False), 0)
    assert float(found.detach()) == pytest.approx(losses.sum() * 6 / 40, rel=1e-5)


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_a_rank_with_padding_alone_gives_every_parameter_a_zero_gradient(loss: Any) -> None:
    module = make_module(loss=loss, num_negatives=3)
    module.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    batch = make_batch(*PADDING, ids=[PADDING_SAMPLE_ID], denominators={"next_item": 12.0})
    module.training_step(module.with_lookup_ids(batch, training=loss == "sampled_softmax"), 0).backward()
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in module.parameters())


def hstu() -> HSTUEncoder:
    torch.manual_seed(2)
    return HSTUEncoder(dim=DIM, max_length=100, dropout=0.0)


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_no_gradient_comes_back_to_a_later_item(loss: Any) -> None:
    """What a prediction's gradient does not reach, it cannot have seen; items are distinct, so rows are positions."""
    module = make_module(hstu(), loss=loss, num_negatives=4)
    history, target = [5, 11, 2, 8, 14, 7], 0
    for t in range(len(history)):
        batch = module.with_lookup_ids(make_batch([history], {t: target}), training=loss == "sampled_softmax")
        features = {name: x.detach().requires_grad_(name == "item_id") for name, x in module.embed(batch).items()}
        module.loss_sums(module.score(features, batch), batch)["next_item"].backward()
        gradient = features["item_id"].grad
        assert gradient is not None
        assert (gradient.abs().sum(1) > 0).tolist() == [i <= t for i in range(len(history))]


def test_a_much_longer_mate_changes_no_score() -> None:
    module = make_module(hstu()).eval()
    short, long = [3, 9, 1], [i % ITEMS for i in range(100)]

    def score(sequences: list[list[int]], labels: dict[int, int]) -> Tensor:
        return module(module.with_lookup_ids(make_batch(sequences, labels), training=False)).logits().detach()

    alone = score([short], {2: 0})
    torch.testing.assert_close(score([long, short], {102: 0}), alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(score([short, long], {2: 0}), alone, rtol=0, atol=2e-5)


# ---- runs of a real Trainer --------------------------------------------------------------------------------------

BATCHES = [  # uneven, and one of padding alone
    ([[3, 9, 9, 1], [2], [7, 7]], {3: 4, 4: 2, 6: 7}),
    PADDING,
    ([[16, 0]], {1: 13}),
    ([[5], [6, 1]], {0: 8, 2: 1}),
]


def load(batches: list[SequenceBatch]) -> DataLoader[SequenceBatch]:
    """Lightning would take a list for several loaders."""
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]


def make_batches(**changes: Any) -> DataLoader[SequenceBatch]:
    return load(
        [
            make_batch(sequences, labels, ids=[PADDING_SAMPLE_ID] if not labels else None, **changes)
            for sequences, labels in BATCHES
        ]
    )


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_is_brute_force_over_the_corpus_with_ties_against_the_model(loss: Any, split: str) -> None:
    module = make_module(loss=loss, num_negatives=3, top_k=[1, 4, ITEMS])
    with torch.no_grad():  # two pairs of items that nothing tells apart
        table = next(module.tables.parameters())  # type: ignore[union-attr]
        table[8], table[13] = table[2], table[1]
    run = trainer()
    (found,) = (run.validate if split == "val" else run.test)(module, make_batches(), verbose=False)
    ranks, losses = [], []
    for sequences, labels in BATCHES:
        for item, target in zip(asked(sequences, labels), labels.values(), strict=True):
            (row,) = similarities(module, [item])
            twin = {8: 2, 2: 8, 13: 1, 1: 13}.get(target)
            better = sum(i not in (target, twin) and row[i] > row[target] for i in range(ITEMS))
            ranks.append(1 + better + (twin is not None))
            losses.append(float(cross_entropies(row[None], [target])[0]))
    assert 1 < np.mean(ranks) < ITEMS
    assert found[f"{split}/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for k in (1, 4, ITEMS):
        assert found[f"{split}/HR@{k}"] == pytest.approx(np.mean([rank <= k for rank in ranks]))
        gains = [1 / math.log2(1 + rank) if rank <= k else 0.0 for rank in ranks]
        assert found[f"{split}/NDCG@{k}"] == pytest.approx(np.mean(gains), rel=1e-5)
    assert found[f"{split}/MRR"] == pytest.approx(np.mean([1 / rank for rank in ranks]), rel=1e-5)
    assert len(found) == 8


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_predict_ranks_seen_items_too_and_leaves_out_who_has_no_history(loss: Any) -> None:
    module = make_module(loss=loss, num_negatives=3, top_k=[4, 2])
    with torch.no_grad():  # states point where their item does, so the last item ranks first
        module.encoder.matrix.copy_(torch.eye(DIM))  # type: ignore[union-attr, operator]
    batches = [
        # Labels do not matter: the last token of each history asks.
        make_batch([[3, 9, 9, 1], [2], [7, 16]], {0: 9}, ids=[40, 7, 12]),
        make_batch([[], [5]], {}, ids=[PADDING_SAMPLE_ID, 99]),
    ]
    first, second = trainer().predict(module, load(batches))  # type: ignore[misc]
    assert first["sample_ids"].tolist() == [40, 7, 12]  # type: ignore[call-overload, index]
    assert second["sample_ids"].tolist() == [99]  # type: ignore[call-overload, index]
    for found, last_items in ((first, [1, 2, 16]), (second, [5])):
        wanted = similarities(module, last_items)
        order = np.argsort(-wanted, axis=1)[:, :4]
        assert order[:, 0].tolist() == last_items
        assert found["item_rows"].tolist() == order.tolist()  # type: ignore[call-overload, index]
        np.testing.assert_allclose(found["scores"], np.take_along_axis(wanted, order, 1), rtol=1e-5)  # type: ignore[call-overload, index]


class Losses(pl.Callback):
    """What each training step logged and returned, and the learning rate it ran with."""

    def __init__(self) -> None:
        self.logged: list[float] = []
        self.returned: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append(float(trainer.callback_metrics["train/loss"]))
        self.returned.append(float(outputs["loss"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_training_logs_a_mean_by_label_over_the_epoch() -> None:
    module = make_module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    record = Losses()
    run = trainer(max_epochs=1, callbacks=[record])
    run.fit(module, make_batches(denominators={"next_item": 10.0}))
    sums, counts = [], []
    for sequences, labels in BATCHES:
        losses = cross_entropies(similarities(module, asked(sequences, labels)), list(labels.values()))
        sums.append(losses.sum())
        counts.append(len(labels))
    np.testing.assert_allclose(record.logged, [s / max(n, 1) for s, n in zip(sums, counts, strict=True)], rtol=1e-5)
    np.testing.assert_allclose(record.returned, [s / 10 for s in sums], rtol=1e-5)
    assert float(run.callback_metrics["train/loss_epoch"]) == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_the_schedule_moves_every_step_and_training_learns() -> None:
    module = make_module(
        hstu(),
        optimizer=lambda params: torch.optim.Adam(params, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9),
    )
    record = Losses()
    batches = [make_batch(SEQUENCES, LABELS)] * 5
    trainer(max_epochs=2, callbacks=[record]).fit(module, load(batches))
    # A callback sees the rate after the schedule's step.
    np.testing.assert_allclose(record.rates, [0.1 * 0.9 ** (i + 1) for i in range(10)], rtol=1e-9)
    assert record.logged[-1] < 0.5 * record.logged[0]


# ---- checkpoints and settings ------------------------------------------------------------------------------------


def test_a_checkpoint_of_other_items_is_refused() -> None:
    module, checkpoint = make_module(), {}

    def restore(item_ids: list[str] | None) -> None:
        module.trainer = SimpleNamespace(datamodule=SimpleNamespace(item_ids=item_ids))  # type: ignore[assignment]
        module.on_load_checkpoint(checkpoint)

    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(item_ids=["a", "bc"]))  # type: ignore[assignment]
    module.on_save_checkpoint(checkpoint)
    restore(["a", "bc"])
    restore(None)
    for other in (["bc", "a"], ["ab", "c"], ["a", "bc", "d"]):
        with pytest.raises(MisconfigurationException, match="item vocabulary: the checkpoint was trained on other"):
            restore(other)


def test_configuring_again_keeps_the_tables() -> None:
    module = make_module()
    tables = module.tables
    module.configure_model()
    assert module.tables is tables


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "softmax"}, "loss='softmax': expected one of full_softmax, sampled_softmax, bce"),
        ({"similarity": "euclid"}, "similarity='euclid': expected cosine or dot"),
        ({"temperature": 0}, "temperature=0: expected a number above 0"),
        ({"temperature": -0.1}, r"temperature=-0\.1: expected a number above 0"),
        ({"temperature": math.nan}, "temperature=nan: expected a number above 0"),
        ({"embedding_std": -1.0}, r"embedding_std=-1\.0: expected a number of at least 0"),
        ({"num_items": 0}, "num_items=0: expected at least 1, or leave it out"),
        ({"top_k": [5, 0]}, r"top_k=\[5, 0\]: expected cut-offs of at least 1"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match="^" + message):
        RetrievalModule(encoder=Linear(), **changes)


def test_no_negatives_and_more_negatives_than_items_are_named() -> None:
    with pytest.raises(ValueError, match=r"^num_negatives=0: expected at least 1"):
        RetrievalModule(encoder=Linear(), num_negatives=0)
    module = make_module(loss="sampled_softmax", num_negatives=ITEMS + 1)
    with pytest.raises(ValueError, match=r"^num_negatives=18: the corpus has only num_items=17"):
        module.with_lookup_ids(make_batch(SEQUENCES, LABELS), training=True)
