"""RankingModule, MTGR and DLRM: what a candidate may see, pooling against loops, and N ranks = 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric

from lightning_gr.batch import SequenceBatch
from lightning_gr.data import EventStore, Field, LastShare, RankingSource, StoreWriter, Task
from lightning_gr.layers import MultiTaskHeads
from lightning_gr.models import DLRM, MTGR, ParameterGroup, RankingModule
from lightning_gr.models.ranking_tokens import candidate_places, num_earlier

TASKS = {"click": Task("click"), "buy": Task("value", at_least=2)}
NETWORKS = ["mtgr", "none", "sum", "target_attention"]


def write_store(folder: Path, num_users: int = 14, seed: int = 0) -> Path:
    """Clicks that depend on the item and on whether the last one was clicked; some labels are missing."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("user_id", "item_id", "timestamp", "click", "value", "price", "city")
    }
    for user in range(num_users):
        n = int(rng.integers(4, 30))
        items = rng.integers(0, 12, n)
        clicks = (rng.random(n) < np.where(items < 6, 0.8, 0.2)).astype(float)
        values = np.where(rng.random(n) < 0.2, np.nan, rng.integers(0, 4, n))
        rows["user_id"].append(user)
        rows["item_id"].append(items.tolist())
        rows["timestamp"].append(np.sort(rng.integers(0, 40, n)).tolist())
        rows["click"].append(clicks.tolist())
        rows["value"].append(values.tolist())
        rows["price"].append(rng.random(n).tolist())
        rows["city"].append(user % 3)
    fields = (
        Field("click", "label", "event"),
        Field("value", "label", "event"),
        Field("price", "dense", "event"),
        Field("city", "sparse", "user", 3),
    )
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    writer.write_users(polars.DataFrame(rows))
    writer.write_vocabulary("item_id", polars.Series("value", range(12)))
    writer.finish(summary={})
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("ranking"))


def network(kind: str) -> Any:
    if kind == "mtgr":
        return MTGR(dim=8, num_layers=2, num_heads=2, max_length=64, dropout=0.0)
    return DLRM(dim=8, hidden_dims=(12, 10), pooling=kind, dropout=0.0)  # type: ignore[arg-type]


def make_source(store: Path, part: Any = "train", block: int = 5) -> RankingSource:
    split = LastShare(val=0.2, test=0.2)
    return RankingSource(EventStore(store), part=part, split=split, tasks=TASKS, max_history=9, block=block)


def make_module(kind: str, source: RankingSource, **changes: Any) -> RankingModule:
    torch.manual_seed(3)
    module = RankingModule(
        **(
            {"network": network(kind), "features": source.ranking_features, "embedding_dim": 6, "embedding_std": 1.0}
            | changes
        )
    )
    module.setup("fit")
    module.configure_model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def collate(source: RankingSource, ids: Any) -> SequenceBatch:
    counts = {task: float(max(n.sum(), 1)) for task, n in source.label_counts(np.array(ids, dtype=np.int64)).items()}
    return source.collate(
        np.array(ids, dtype=np.int64), windows=[(0,)], epoch=0, denominators=counts, gradient_divisor=1.0
    )


def all_ids(source: RankingSource) -> Any:
    return source.samples(0, source.num_rows)[0]


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_candidate_sees_the_past_and_itself_alone(store: Path, kind: str) -> None:
    """Gradients of one candidate's logit reach exactly the tokens of an earlier time, and itself."""
    source = make_source(store)
    module = make_module(kind, source).eval()
    ids = all_ids(source)
    sample = int(ids[np.argmax(source.token_counts(ids))])
    batch = collate(source, [sample])
    embedded = {name: x.detach().requires_grad_() for name, x in module.embed(batch).items()}
    logits = module.score(embedded, batch)["click"]
    context, static, realtime, candidates = batch.token_counts_B4[0].tolist()
    assert candidates > 2
    times, earlier = batch.timestamps_T, num_earlier(batch)
    assert times is not None
    for n, place in enumerate(candidate_places(batch).tolist()):
        (gradient,) = torch.autograd.grad(logits[n], embedded["item_id"], retain_graph=True)
        reached = {i for i in range(len(gradient)) if bool(gradient[i].abs().sum() > 0)}
        seen = static + int(earlier[place])
        assert seen == sum(int(t) < int(times[place]) for t in times[context : context + static + realtime])
        past = set(range(seen)) if kind != "none" else set()
        assert reached == past | {place - context}


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_do_not_depend_on_batch_mates_nor_on_other_candidates(store: Path, kind: str) -> None:
    source = make_source(store)
    module = make_module(kind, source).eval()
    ids = all_ids(source).tolist()
    together = module(collate(source, ids))["buy"]
    shuffled = list(reversed(ids))
    parts = {i: module(collate(source, [i]))["buy"] for i in ids}
    torch.testing.assert_close(together, torch.cat([parts[i] for i in ids]), rtol=1e-4, atol=1e-5)
    again = module(collate(source, shuffled))["buy"]
    torch.testing.assert_close(again, torch.cat([parts[i] for i in shuffled]), rtol=1e-4, atol=1e-5)
    batch = collate(source, ids[:3])
    before = module(batch)["click"]
    changed = module.embed(batch)
    changed["item_id"] = changed["item_id"].clone()
    first = int(batch.token_counts_B4[0, 1:3].sum())
    changed["item_id"][first] += 5.0  # the first candidate of the first user
    after = module.score(changed, batch)["click"]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_static_history_does_not_change_with_what_comes_later(store: Path) -> None:
    """MTGR, first layer and last: states of static tokens are the same whatever happens in the block."""
    source = make_source(store)
    module = make_module("mtgr", source).eval()
    ids = all_ids(source)
    batch = collate(source, [int(ids[np.argmax(source.token_counts(ids))])])
    states: list[Tensor] = []
    for layer in module.network.encoder.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda _m, _a, out: states.append(out.detach()))  # type: ignore[union-attr]
    embedded = module.embed(batch)
    module.score(embedded, batch)
    context, static, realtime, _ = batch.token_counts_B4[0].tolist()
    assert realtime > 0
    embedded["item_id"] = embedded["item_id"].clone()
    embedded["item_id"][static:] += 3.0
    module.score(embedded, batch)
    for before, after in zip(states[:2], states[2:], strict=True):
        assert torch.equal(before[: context + static], after[: context + static])
        assert not torch.allclose(before[context + static :], after[context + static :])


@pytest.mark.parametrize("pooling", ["sum", "target_attention"])
def test_pooling_is_that_of_a_loop(store: Path, pooling: str) -> None:
    source = make_source(store)
    module = make_module(pooling, source).eval().double()
    net: Any = module.network
    batch = collate(source, all_ids(source)[:6])
    embedded = {name: x.double() for name, x in module.embed(batch).items()}
    tokens = net.tokens(embedded, batch)
    pooled: list[Tensor] = []
    original = net._pooled
    net._pooled = lambda *a: pooled.append(original(*a)) or pooled[0]
    net(embedded, batch)
    earlier, n = num_earlier(batch), 0
    for b in range(batch.num_sequences):
        context, static, realtime, candidates = batch.token_counts_B4[b].tolist()
        start = int(batch.layout.offsets_B1[b])
        history = tokens[start + context : start + context + static + realtime]
        for place in range(start + context + static + realtime, start + context + static + realtime + candidates):
            seen = history[: static + int(earlier[place])]
            if pooling == "sum":
                wanted = seen.sum(0) / (1 + len(seen)) ** 0.5
            elif len(seen):
                q, k, v = net.query(tokens[place]), net.key(seen), net.value(seen)
                heads = [(k[:, h : h + 4] @ q[h : h + 4] / 2).softmax(0) @ v[:, h : h + 4] for h in (0, 4)]
                wanted = torch.cat(heads)
            else:
                wanted = torch.zeros(8, dtype=torch.float64)
            torch.testing.assert_close(pooled[0][n], wanted)
            n += 1
    assert n == len(pooled[0])


def test_heads_are_gated_experts() -> None:
    heads = MultiTaskHeads(dim=5, tasks=["a", "b"], num_experts=3, hidden_dim=4).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    logits = heads(x)
    assert heads.gates is not None
    for number, task in enumerate(("a", "b")):
        shares = heads.gates[number](x).softmax(1)
        mixed = sum(shares[:, e : e + 1] * expert(x) for e, expert in enumerate(heads.experts))
        torch.testing.assert_close(logits[task], heads.towers[number](mixed)[:, 0])
    alone = MultiTaskHeads(dim=5, tasks=["a"], num_experts=0, hidden_dim=4).double()
    torch.testing.assert_close(alone(x)["a"], alone.towers[0](x)[:, 0])
    for changes, message in (
        ({"tasks": []}, "tasks"),
        ({"tasks": ["a", "a"]}, "none of them twice"),
        ({"num_experts": -1}, "num_experts=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiTaskHeads(**({"dim": 5, "tasks": ["a"]} | changes))  # type: ignore[arg-type]


def test_the_loss_is_the_cross_entropy_of_each_label_by_task(store: Path) -> None:
    source = make_source(store)
    module = make_module("mtgr", source, task_weights={"buy": 0.5})
    ids = all_ids(source)
    batch = collate(source, ids)
    logits = module(batch)
    sums = module.loss_sums(logits, batch)
    places = candidate_places(batch).tolist()
    total = 0.0
    for task, weight in (("click", 1.0), ("buy", 0.5)):
        labels, wanted = batch.labels[task], 0.0
        for token, value in zip(labels.tokens_N.tolist(), labels.values_N.tolist(), strict=True):
            p = torch.sigmoid(logits[task][places.index(token)].double())
            wanted -= float(torch.log(p if value else 1 - p))
        assert float(sums[task].detach()) == pytest.approx(wanted, rel=1e-5)
        total += weight * wanted / labels.num_labels
    assert batch.labels["buy"].num_labels < batch.labels["click"].num_labels == len(places)
    module.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(total, rel=1e-5)


def test_parts_of_a_batch_add_up_to_its_gradient(store: Path) -> None:
    source = make_source(store)
    module = make_module("mtgr", source)
    ids = all_ids(source)
    whole = collate(source, ids)

    def gradients(batches: list[SequenceBatch]) -> list[Tensor]:
        module.zero_grad()
        for batch in batches:
            batch.denominators = whole.denominators
            batch.mean_over_global_batch(module.loss_sums(module(batch), batch)).backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    one = gradients([whole])
    many = gradients([collate(source, part) for part in (ids[:5], [], ids[5:])])
    assert len(one) == len(many) == len(list(module.parameters()))
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(world_size: int, store: str, kind: str, max_epochs: int = 2) -> dict[str, Any]:
    """Trains, validates and tests on this rank; losses, metrics and predictions."""
    from lightning_gr.data import RankingDataModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(11)
    data = RankingDataModule(
        path=store,
        tasks=TASKS,
        global_tokens=120,
        max_history=9,
        block=5,
        split=LastShare(val=0.2, test=0.2),
        cross_task="click",
    )
    module = RankingModule(
        network=network(kind),
        embedding_dim=8,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        parameter_groups=[ParameterGroup("heads.*", lr_factor=0.5)],
    )

    class Losses(pl.Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(float(outputs["loss"]))

    losses = Losses()
    losses.seen = []
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        callbacks=[losses],
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    during = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    (test,) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)
    assert predicted is not None
    return {"losses": losses.seen, "during": during, "after": after, "test": test, "predicted": predicted}


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["mtgr", "target_attention"])
def test_any_number_of_ranks_equals_one(gloo: Any, store: Path, kind: str) -> None:
    (one,) = gloo(1).run(run, 1, str(store), kind)
    # Evaluation in training = validate afterwards, and predictions are what test metrics are made of.
    assert one["during"].keys() == {f"val/{t}/{m}" for t in TASKS for m in ("loss", "AUC", "GAUC", "NE", "calibration")}
    assert one["after"] == pytest.approx(one["during"], rel=1e-6)
    assert np.mean(one["losses"][-5:]) < np.mean(one["losses"][:5])
    for world_size in (2, 3):
        many = gloo(world_size).run(run, world_size, str(store), kind)
        np.testing.assert_allclose(np.mean([r["losses"] for r in many], 0), one["losses"], rtol=1e-4)
        for result in many:
            assert result["test"] == pytest.approx(one["test"], rel=1e-4)
            assert result["during"] == pytest.approx(one["during"], rel=1e-4)
        assert rows_of(many) == pytest.approx(rows_of([one]), abs=1e-4)


def rows_of(results: list[dict[str, Any]]) -> Any:
    """Every predicted candidate, sorted."""
    found = []
    for result in results:
        for part in result["predicted"]:
            columns = [part["user_rows"], part["item_rows"], *part["probabilities"].values()]
            found += [tuple(float(x) for x in row) for row in zip(*columns, strict=True)]
    return np.array(sorted(found))


def test_predictions_make_the_test_metrics(store: Path, gloo: Any) -> None:
    from lightning_gr.metrics import AUC

    (one,) = gloo(1).run(run, 1, str(store), "sum", 1)
    source = make_source(store, "test")
    batch = collate(source, all_ids(source))
    labels = batch.labels["click"].values_N
    rows = [
        (int(u), float(p))
        for part in one["predicted"]
        for u, p in zip(part["user_rows"], part["probabilities"]["click"], strict=True)
    ]
    users = torch.repeat_interleave(batch.features["user_id"].values(), batch.token_counts_B4[:, 3])
    by_user: dict[int, list[float]] = {}
    for user, p in rows:
        by_user.setdefault(user, []).append(p)
    taken = {user: iter(ps) for user, ps in by_user.items()}
    scores = torch.tensor([next(taken[int(u)]) for u in users])
    metric: Metric = AUC()
    metric.update(scores, labels)
    assert float(metric.compute()) == pytest.approx(one["test"]["test/click/AUC"], abs=1e-6)
    losses = F.binary_cross_entropy(scores.double(), labels.double())
    assert float(losses) == pytest.approx(one["test"]["test/click/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim=0: expected at least 1"),
        ({"task_weights": {"click": -1.0}}, r"task_weights\.click=-1\.0"),
        ({"task_weights": {"clik": 1.0}}, r"task_weights\.clik: no such task; choose from click, buy"),
    ],
)
def test_settings_that_cannot_work_are_named(store: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        make_module("mtgr", make_source(store), **changes)
    with pytest.raises(ValueError, match="pooling='mean': expected one of none, sum, target_attention"):
        DLRM(pooling="mean")  # type: ignore[arg-type]


def test_batches_of_another_kind_are_refused(store: Path) -> None:
    module = make_module("mtgr", make_source(store))
    with pytest.raises(MisconfigurationException, match="expected SequenceBatch batches of ranking samples, got dict"):
        module.on_before_batch_transfer({}, 0)
