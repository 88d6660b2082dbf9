"""Dynamic tables under the strategy: beside static ones, over ranks, with accumulation, clipping, scaling, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from tests.more import more

pytestmark = pytest.mark.dist

STEPS = 8
SAMPLES = 12
CUTS = {1: [0, 12], 2: [0, 3, 12], 3: [0, 8, 8, 12]}


class Tables(pl.LightningModule):
    """A user's module with a static, a dynamic and a pooled dynamic collection."""

    def __init__(self, *, static: bool = False, lr: float = 0.01, **settings: Any) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        from lightning_gr.embeddings.dynamic import (
            Admission,
            DynamicEmbeddingBagCollection,
            DynamicEmbeddingCollection,
            DynamicTableConfig,
            DynamicTables,
            TablePolicy,
        )

        dynamic = DynamicTables(**settings)
        policy = TablePolicy(admission=Admission(min_count=2))
        self.lr = lr
        self.static = None
        if static:
            table = EmbeddingConfig(name="t", num_embeddings=50, embedding_dim=4, feature_names=["s"])
            self.static = EmbeddingCollection(tables=[table], device=torch.device("cpu"))
        self.rows = DynamicEmbeddingCollection(
            tables=[
                DynamicTableConfig("a", 4, ["a"]),
                DynamicTableConfig("b", 8, ["b"], policy=policy),
                DynamicTableConfig("c", 4, ["c"]),
            ],
            settings=dynamic,
        )
        self.pooled = DynamicEmbeddingBagCollection(
            tables=[DynamicTableConfig("p", 4, ["p"], pooling="mean")], settings=dynamic
        )
        self.head = nn.Linear(20 + 4 * static, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        found = self.rows(features)
        parts = [found[name].values() for name in "abc"] + [self.pooled(features)["p"]]
        if self.static is not None:
            parts.append(self.static(features)["s"].values())
        losses = (self.head(torch.cat(parts, 1)).squeeze(-1) - labels) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(labels))}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


class Batches:
    """The rank's part of batches of raw 64-bit ids, with a cursor; `pieces` cuts each into micro-batches."""

    def __init__(self, rank: int, world_size: int, pieces: int = 1, poison: int = -1) -> None:
        from torchrec import KeyedJaggedTensor

        generator = torch.Generator().manual_seed(5)
        names = ["s", "a", "b", "c", "p"]
        self.batches = []
        for step in range(STEPS):
            ids = {name: torch.randint(0, 50, (SAMPLES,), generator=generator) for name in "sabc"}
            lengths_p = torch.randint(0, 4, (SAMPLES,), generator=generator)
            bags = [torch.randint(0, 30, (int(n),), generator=generator) * 2**57 - 2**62 for n in lengths_p]
            y = torch.randn(SAMPLES, generator=generator)
            if step == poison:
                y[-1] = 1e38
            for piece in range(pieces):
                edges = [piece * SAMPLES // pieces + x // pieces for x in CUTS[world_size]]
                own = slice(edges[rank], edges[rank + 1])
                n = own.stop - own.start
                if n == 0:  # TorchRec's collections take no batch without samples
                    kjt = KeyedJaggedTensor(
                        keys=names, values=torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(5, dtype=torch.int64)
                    )
                    self.batches.append((kjt, y[own]))
                    continue
                values = torch.cat([*(ids[k][own] for k in "sabc"), *bags[own]])
                lengths = torch.cat([torch.ones(4 * n, dtype=torch.int64), lengths_p[own]])
                self.batches.append((KeyedJaggedTensor(keys=names, values=values, lengths=lengths), y[own]))

        self.done = 0

    def __iter__(self) -> Any:
        first = self.done if self.done < len(self.batches) else 0
        for place, batch in enumerate(self.batches[first:]):
            self.done = first + place + 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]

    def __len__(self) -> int:
        return len(self.batches)


class NoEmptyPool(Tables):
    """The same, for ranks whose batch is empty: its pooled rows are those of one padding sample."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        found, pooled = self.rows(features), self.pooled(features)["p"]
        parts = [found[name].values() for name in "abc"] + [pooled[: len(labels)]]
        losses = (self.head(torch.cat(parts, 1)).squeeze(-1) - labels) ** 2
        return {"loss": losses.sum(), "loss_sums": {"mse": (losses.sum(), len(labels))}}


class Recorder(pl.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


def engines(model: Any) -> dict[str, Any]:
    return {"rows": model.rows.engine, "pooled": model.pooled.engine}


def contents(model: Any) -> dict[Any, Any]:
    """By (table, id) what is kept of a key on this rank."""
    kept = {}
    for engine in engines(model).values():
        for table in engine.tables:
            for number, name in enumerate(table.key_names):
                rows, _ = table.rows_of(number)
                for i, key in enumerate(rows.ids_N.tolist()):
                    kept[name, key] = (
                        rows.values_ND[i].numpy(),
                        rows.state_NS[i].numpy(),
                        int(rows.metadata.counts[i]),
                        int(rows.metadata.last_steps[i]),
                    )
    return kept


def fit(world_size: int, model: Any, pieces: int = 1, poison: int = -1, **settings: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from lightning_gr.plugins import SequenceBalancedStrategy

    record = Recorder()
    strategy = SequenceBalancedStrategy(
        sparse_optimizer=settings.pop("optimizer", "rowwise_adagrad"), sparse_lr=settings.pop("sparse_lr", 0.1)
    )
    callbacks = [record, *settings.pop("callbacks", [])]
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        **({"max_epochs": 1} | settings),
    )
    trainer.fit(model, Batches(dist.get_rank(), world_size, pieces, poison), ckpt_path=ckpt_path)
    return {
        "losses": record.losses,
        "tables": contents(model),
        "dense": {name: p.detach().numpy().copy() for name, p in model.head.named_parameters()},
        "lr": [engine.lr_factor for engine in engines(model).values()],
    }


def union(ranks: list[dict[str, Any]]) -> dict[Any, Any]:
    whole: dict[Any, Any] = {}
    for rank in ranks:
        assert not whole.keys() & rank["tables"].keys(), "a key is on one rank only"
        whole |= rank["tables"]
    return whole


def assert_equal(ranks: list[dict[str, Any]], one: list[dict[str, Any]], tolerance: float = 1e-4) -> None:
    mine, truth = union(ranks), union(one)
    assert mine.keys() == truth.keys()
    for key, (values, state, count, step) in truth.items():
        np.testing.assert_allclose(mine[key][0], values, rtol=tolerance, atol=tolerance * 0.1, err_msg=str(key))
        np.testing.assert_allclose(mine[key][1], state, rtol=tolerance, atol=tolerance * 0.1, err_msg=str(key))
        assert mine[key][2:] == (count, step), key
    for name, weight in one[0]["dense"].items():
        np.testing.assert_allclose(ranks[0]["dense"][name], weight, rtol=tolerance, atol=tolerance * 0.1)


def run(world_size: int, kind: str = "Tables", settings: dict[str, Any] | None = None, **trainer: Any) -> Any:
    pl.seed_everything(1)
    model = {"Tables": Tables, "NoEmptyPool": NoEmptyPool}[kind](**(settings or {}))
    return fit(world_size, model, **trainer)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", *more("sgd")])
def test_dynamic_beside_static_tables_on_any_number_of_ranks(gloo: Any, optimizer: str) -> None:
    one = gloo(1).run(run, 1, settings={"static": True}, optimizer=optimizer)
    two = gloo(2).run(run, 2, settings={"static": True}, optimizer=optimizer)
    assert len(union(one)) > 100
    assert any(name == "b" for name, _ in union(one))
    assert_equal(two, one)
    np.testing.assert_allclose(np.mean([r["losses"] for r in two], axis=0), one[0]["losses"], rtol=1e-4)
    assert one[0]["lr"] == [0.125, 0.125]  # the schedule's share in the last step


def test_a_rank_without_samples_takes_part(gloo: Any) -> None:
    one, three = (gloo(w).run(run, w, "NoEmptyPool", optimizer="adam") for w in (1, 3))
    assert_equal(three, one)


def test_accumulated_micro_batches_equal_one_batch(gloo: Any) -> None:
    one = gloo(1).run(run, 1, optimizer="adam")
    assert_equal(gloo(2).run(run, 2, pieces=3, accumulate_grad_batches=3, optimizer="adam"), one)


def test_one_norm_is_clipped_over_dense_and_sparse(gloo: Any) -> None:
    settings = {"optimizer": "sgd", "sparse_lr": 1.0}
    free, one = gloo(1).run(run, 1, **settings), gloo(1).run(run, 1, gradient_clip_val=0.05, **settings)
    two = gloo(2).run(run, 2, gradient_clip_val=0.05, **settings)
    micro = gloo(2).run(run, 2, gradient_clip_val=0.05, pieces=3, accumulate_grad_batches=3, **settings)
    assert_equal(two, one)
    assert_equal(micro, one)
    with pytest.raises(AssertionError):
        assert_equal(free, one)
    by_value = {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}
    assert_equal(gloo(2).run(run, 2, **by_value, **settings), gloo(1).run(run, 1, **by_value, **settings))


def run_clipped_by_hand() -> tuple[float, float]:
    """The norm that the strategy clips by, and that of all gradients of a plain copy with dense tables."""
    from lightning_gr.plugins.dynamic_training import DynamicTraining

    pl.seed_everything(1)
    model = Tables()
    (features, labels), *_ = Batches(0, 1).batches
    loss = model.training_step((features, labels), 0)["loss"]
    loss.backward()
    training = DynamicTraining(model)
    training.engines = engines(model)
    training.flush([], None)
    norm = training.clip_by_norm(model.head.parameters(), 1e9)
    total = sum(float(p.grad.double().pow(2).sum()) for p in model.head.parameters() if p.grad is not None)
    for engine in engines(model).values():
        total += float(engine.squared_norm())
    return float(norm), total**0.5


def test_the_norm_is_that_of_all_gradients(gloo: Any) -> None:
    (norms,) = gloo(1).run(run_clipped_by_hand)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 0


def run_scaled(world_size: int, poison: int) -> Any:
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign, return-value]
    pl.seed_everything(1)
    return fit(world_size, Tables(), poison=poison, plugins=[plugin], optimizer="sgd") | {"scale": scaler.get_scale()}


def test_loss_scaling_changes_nothing_and_leaves_out_infinite_steps_on_every_rank(gloo: Any) -> None:
    one = gloo(1).run(run, 1, optimizer="sgd")
    assert_equal(gloo(2).run(run_scaled, 2, -1), one)
    poisoned = gloo(2).run(run_scaled, 2, 3)
    assert poisoned[0]["scale"] == poisoned[1]["scale"] == 2.0**9
    for values, *_ in union(poisoned).values():
        assert np.isfinite(values).all()
    assert_equal(poisoned, gloo(1).run(run_scaled, 1, 3))


def run_scaled_static() -> str:
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException) as error:
        fit(1, Tables(static=True), plugins=[MixedPrecision("16-mixed", "cpu")])
    return str(error.value)


def test_loss_scaling_is_refused_where_there_are_static_tables(gloo: Any) -> None:
    (message,) = gloo(1).run(run_scaled_static)
    assert message.startswith("precision='16-mixed': sharded tables update their rows inside backward")


def test_rows_updated_in_backward_equal_those_updated_in_the_step(gloo: Any) -> None:
    one = gloo(1).run(run, 1, optimizer="adam")
    assert_equal(gloo(2).run(run, 2, settings={"update": "backward"}, optimizer="adam"), one)


def run_refused(settings: dict[str, Any]) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException) as error:
        run(1, settings={"update": "backward"}, **settings)
    return str(error.value)


def test_what_updates_in_backward_cannot_honour_is_refused_by_name(gloo: Any) -> None:
    for settings, said in (
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2: rows of rows are updated in backward"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0: rows of rows are updated in backward"),
    ):
        (message,) = gloo(1).run(run_refused, settings)
        assert said in message
        assert "dynamic_tables.update" in message


class Aliased(Tables):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.rows


def run_aliased() -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException) as error:
        fit(1, Aliased())
    return str(error.value)


def test_a_collection_with_two_names_is_refused(gloo: Any) -> None:
    (message,) = gloo(1).run(run_aliased)
    assert "reached by a second name" in message


def run_again(world_size: int) -> Any:
    import torch.distributed as dist

    pl.seed_everything(1)
    model = Tables()
    first = fit(world_size, model)
    from lightning_gr.plugins import SequenceBalancedStrategy

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.validate(model, Batches(dist.get_rank(), world_size), verbose=False)
    kept = contents(model)
    same = kept.keys() == first["tables"].keys() and all(
        all(np.array_equal(a, b) for a, b in zip(kept[key], first["tables"][key], strict=True)) for key in kept
    )
    return same, fit(world_size, model)


def test_validation_changes_no_table_and_a_second_fit_goes_on(gloo: Any) -> None:
    one, two = gloo(1).run(run_again, 1), gloo(2).run(run_again, 2)
    assert all(same for same, _ in (*one, *two))
    assert_equal([x for _, x in two], [x for _, x in one])


# ---- resume ------------------------------------------------------------------------------------------------------


class Save(pl.Callback):
    def __init__(self, folder: str, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(f"{self.folder}/step-{trainer.global_step}.ckpt")


def run_and_save(world_size: int, folder: str) -> Any:
    return run(world_size, "NoEmptyPool", optimizer="adam", callbacks=[Save(folder, (3, 5))])


def run_rest(world_size: int, path: str) -> Any:
    return run(world_size, "NoEmptyPool", optimizer="adam", ckpt_path=path)


def test_a_checkpoint_goes_on_with_any_number_of_ranks(gloo: Any, tmp_path: Path) -> None:
    full = gloo(2).run(run_and_save, 2, str(tmp_path))
    for step, world_size in ((3, 2), (3, 1), (5, 3), (5, 2)):
        resumed = gloo(world_size).run(run_rest, world_size, str(tmp_path / f"step-{step}.ckpt"))
        assert len(resumed[0]["losses"]) == STEPS - step
        assert_equal(resumed, full, tolerance=0 if world_size == 2 else 1e-4)


def run_from(path: str) -> Any:
    from lightning_gr.callbacks import InitFrom

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.seen = contents(module)
            self.steps = [engine.next_step for engine in engines(module).values()]

    look = Look()
    run(2, callbacks=[InitFrom(path=path), look])
    return look.seen, look.steps


def run_contents(world_size: int, path: str) -> Any:
    return run(world_size, optimizer="adam", callbacks=[Save(path, (STEPS,))])


def test_a_fit_may_begin_with_the_rows_of_another(gloo: Any, tmp_path: Path) -> None:
    saved = union(gloo(1).run(run_contents, 1, str(tmp_path)))
    begun = gloo(2).run(run_from, str(tmp_path / f"step-{STEPS}.ckpt"))
    assert [steps for _, steps in begun] == [[0, 0], [0, 0]]
    seen = begun[0][0] | begun[1][0]
    assert seen.keys() == saved.keys()
    for key, (values, state, count, step) in seen.items():
        np.testing.assert_array_equal(values, saved[key][0])
        assert not state.any()
        assert (count, step) == (0, 0)


class Unused(Tables):
    """On rank 1 the loss does not reach one table, and in some steps the pooled output is not even looked at."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        found = self.rows(features)
        pooled = self.pooled(features)
        b = found["b"].values()
        if self.global_rank == 1:
            b = b.detach()
        unused = self.global_rank == 1 and batch_idx % 2
        extra = labels.new_zeros(len(labels), 4) if unused else pooled["p"]
        parts = [found["a"].values(), b, found["c"].values(), extra]
        losses = (self.head(torch.cat(parts, 1)).squeeze(-1) - labels) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(labels))}}


def run_unused(world_size: int) -> Any:
    pl.seed_everything(1)
    return fit(world_size, Unused(), pieces=3, accumulate_grad_batches=3)


def test_outputs_that_one_rank_leaves_unused_keep_the_order_of_exchanges(gloo: Any) -> None:
    two = gloo(2).run(run_unused, 2)
    assert len(two[0]["losses"]) == 3 * STEPS
    assert union(two).keys() == union(gloo(2).run(run, 2, pieces=3, accumulate_grad_batches=3)).keys()
