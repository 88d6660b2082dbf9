"""The strategy: N ranks = 1 rank, resume, fit-validate-fit, and users' own modules dropped in."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_gr.checkpoint.writer import recommit
from tests.more import more

pytestmark = pytest.mark.dist

STEPS = 20


class Recorder(pl.Callback):
    """Losses as returned to Lightning, and how many samples this rank had, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.samples: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.samples.append(int(getattr(batch, "num_samples", -1)))


def write_log(path: Path, num_users: int = 40, num_items: int = 30, seed: int = 0) -> Path:
    """A small CSV log with very uneven histories."""
    rng = np.random.default_rng(seed)
    lines = ["user_id,item_id,timestamp"]
    for user in range(num_users):
        length = int(rng.integers(3, 6)) if user % 3 else int(rng.integers(12, 25))
        items = rng.integers(0, num_items, length)
        lines += [f"u{user},{item},{1_000_000 + 3600 * step}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return path


def build(
    log: str,
    *,
    loss: str = "full_softmax",
    negatives: str = "uniform",
    global_tokens: int = 48,
    local_mean: bool = False,
) -> Any:
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    class LocalMean(RetrievalModule):
        """The control: every rank's own mean, which DDP then averages."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            total = self.loss_sums(self(batch), batch)["next_item"]
            return total / max(batch.labels["next_item"].num_labels, 1)

    pl.seed_everything(7)
    data = SequenceDataModule(path=log, global_tokens=global_tokens, max_length=24)
    encoder = HSTUEncoder(dim=8, num_layers=2, num_heads=2, max_length=24, dropout=0.0)
    kind = LocalMean if local_mean else RetrievalModule
    model = kind(
        encoder=encoder,
        loss=loss,
        negatives=negatives,
        num_negatives=5,
        top_k=[3],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7),
    )
    return data, model


def trainer(world_size: int, *callbacks: Any, **kwargs: Any) -> pl.Trainer:
    from lightning_gr.plugins import SequenceBalancedStrategy

    strategy = kwargs.pop("strategy", None) or SequenceBalancedStrategy(
        sharding=kwargs.pop("sharding", "row_wise"), sparse_lr=0.1
    )
    settings: dict[str, Any] = {"max_steps": STEPS, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **(settings | kwargs),
    )


def weights_of(model: Any) -> dict[str, np.ndarray]:
    """Every weight in full on every rank."""
    import torch.distributed as dist

    whole = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size()) if dist.get_rank() == 0 else None
            value.gather(0, out=full)
            value = full if full is not None else torch.zeros(0)
        whole[name] = value.detach().numpy().copy()
    return whole


def run_training(world_size: int, log: str, **settings: Any) -> dict[str, Any]:
    sharding = settings.pop("sharding", "row_wise")
    data, model = build(log, **settings)
    record = Recorder()
    trainer(world_size, record, sharding=sharding, limit_val_batches=0).fit(model, datamodule=data)
    return {"losses": record.losses, "samples": record.samples, "weights": weights_of(model)}


def global_losses(results: list[dict[str, Any]]) -> np.ndarray:
    return np.mean([result["losses"] for result in results], axis=0)


def largest_difference(results: list[dict[str, Any]], reference: list[dict[str, Any]]) -> float:
    """Largest relative difference of the losses and of any weight."""
    ours, truth = global_losses(results), global_losses(reference)
    differences = [float(np.max(np.abs(ours - truth) / np.abs(truth)))]
    for name, weight in reference[0]["weights"].items():
        if weight.size:
            error = np.abs(results[0]["weights"][name] - weight).max()
            differences.append(float(error / max(np.abs(weight).max(), 1e-3)))
    return max(differences)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_log(tmp_path_factory.mktemp("log") / "log.csv"))


def run_with_width(log: str) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    data, model = build(log)
    model.encoder.dim = 6
    with pytest.raises(MisconfigurationException) as error:
        trainer(1).fit(model, datamodule=data)
    return str(error.value)


def run_with_adam(log: str) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_gr.plugins import SequenceBalancedStrategy

    data, model = build(log)
    strategy = SequenceBalancedStrategy(sparse_optimizer="adam")
    with pytest.raises(MisconfigurationException) as error:
        trainer(1, strategy=strategy).fit(model, datamodule=data)
    return str(error.value)


def test_adam_on_the_cpu_is_refused_by_name(gloo: Any, log: str) -> None:
    (said,) = gloo(1).run(run_with_adam, log)
    assert said.startswith("sparse_optimizer='adam': FBGEMM has no Adam for tables on the CPU; use rowwise_adagrad")


def test_a_width_that_the_kernels_do_not_take_is_named(gloo: Any, log: str) -> None:
    (said,) = gloo(1).run(run_with_width, log)
    assert said.startswith("table item: embedding_dim=6; FBGEMM's kernels for sharded tables take multiples of 4")


@pytest.mark.parametrize(
    ("loss", "negatives", "sharding"),
    [
        ("full_softmax", "uniform", "row_wise"),
        ("full_softmax", "uniform", "column_wise"),
        ("sampled_softmax", "in_batch", "row_wise"),
        *more(
            ("sampled_softmax", "uniform", "row_wise"), ("bce", "uniform", "row_wise"), ("bce", "in_batch", "row_wise")
        ),
    ],
)
@pytest.mark.parametrize("world_size", [*more(2), 3])
def test_any_number_of_ranks_equals_one(
    gloo: Any, log: str, loss: str, negatives: str, sharding: str, world_size: int
) -> None:
    one = gloo(1).run(run_training, 1, log, loss=loss, negatives=negatives)
    assert len(one[0]["losses"]) == STEPS
    assert global_losses(one)[-1] < global_losses(one)[0]
    if sharding == "column_wise":
        world_size = 2  # eight columns do not split in three
    many = gloo(world_size).run(run_training, world_size, log, loss=loss, negatives=negatives, sharding=sharding)
    samples = np.array([result["samples"] for result in many])
    assert (samples.max(0) != samples.min(0)).any(), "the ranks' batches should be uneven"
    if world_size == 3:
        assert (samples == 0).any(), "some rank should have had no sample"
    assert largest_difference(many, one) <= 1e-4


def test_a_mean_of_means_fails_the_law(gloo: Any, log: str) -> None:
    one = gloo(1).run(run_training, 1, log)
    control = gloo(3).run(run_training, 3, log, local_mean=True)
    assert largest_difference(control, one) > 1e-2


def run_with_validation(world_size: int, log: str) -> dict[str, Any]:
    data, model = build(log)
    fit = trainer(world_size, max_steps=-1, max_epochs=1)
    fit.fit(model, datamodule=data)
    during = {key: float(value) for key, value in fit.callback_metrics.items() if key.startswith("val/")}
    before = weights_of(model)
    (alone,) = trainer(world_size).validate(model, datamodule=data, verbose=False)
    after = weights_of(model)
    record = Recorder()
    trainer(world_size, record, max_steps=3).fit(model, datamodule=data)
    return {
        "during": during,
        "alone": alone,
        "same": [np.array_equal(before[k], after[k]) for k in before],
        "more": record.losses,
    }


def test_fit_then_validate_then_fit(gloo: Any, log: str) -> None:
    results = {world: gloo(world).run(run_with_validation, world, log) for world in (1, 2)}
    for ranks in results.values():
        for rank in ranks:
            assert rank["during"].keys() == {"val/loss", "val/MRR", "val/HR@3", "val/NDCG@3"}
            for key, value in rank["during"].items():
                assert rank["alone"][key] == pytest.approx(value, rel=1e-5)
            assert all(rank["same"])
            assert len(rank["more"]) == 3
    for key, value in results[1][0]["during"].items():
        assert results[2][0]["during"][key] == pytest.approx(value, rel=1e-4)
        assert results[2][1]["during"][key] == pytest.approx(value, rel=1e-4)
    one, two = (np.mean([rank["more"] for rank in results[world]], axis=0) for world in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def run_and_save(world_size: int, log: str, folder: str, steps: list[int]) -> dict[str, Any]:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step in steps:
                trainer.save_checkpoint(f"{folder}/step-{trainer.global_step}.ckpt")

    data, model = build(log, loss="sampled_softmax", global_tokens=120)
    record = Recorder()
    trainer(world_size, record, Save(), limit_val_batches=0).fit(model, datamodule=data)
    return {"losses": record.losses, "samples": record.samples, "weights": weights_of(model)}


def run_resumed(world_size: int, log: str, path: str) -> dict[str, Any]:
    data, model = build(log, loss="sampled_softmax", global_tokens=120)
    record = Recorder()
    trainer(world_size, record, limit_val_batches=0).fit(model, datamodule=data, ckpt_path=path)
    return {"losses": record.losses, "samples": record.samples, "weights": weights_of(model)}


@pytest.mark.long  # test_resume_laws resumes from more steps
def test_a_resumed_run_equals_the_uninterrupted_one(gloo: Any, log: str, tmp_path: Path) -> None:
    steps = [1, 3, 4, 8, 13]
    full = gloo(2).run(run_and_save, 2, log, str(tmp_path), steps)
    for step in steps:
        resumed = gloo(2).run(run_resumed, 2, log, str(tmp_path / f"step-{step}.ckpt"))
        for mine, whole in zip(resumed, full, strict=True):
            assert mine["samples"] == whole["samples"][step:]
            assert mine["losses"] == whole["losses"][step:], f"resumed at step {step}"
            for name, weight in whole["weights"].items():
                np.testing.assert_array_equal(mine["weights"][name], weight)
    # Another number of ranks reads the same directory.
    elastic = gloo(3).run(run_resumed, 3, log, str(tmp_path / "step-8.ckpt"))
    np.testing.assert_allclose(global_losses(elastic), global_losses(full)[8:], rtol=1e-4)


def run_refused(world_size: int, log: str, path: str) -> str:
    try:
        run_resumed(world_size, log, path)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def test_what_is_not_a_checkpoint_is_refused_by_name(gloo: Any, log: str, tmp_path: Path) -> None:
    gloo(1).run(run_and_save, 1, log, str(tmp_path), [2])
    good = tmp_path / "step-2.ckpt"
    assert (good / "meta.pt").is_file()
    absent = tmp_path / "none.ckpt"
    (tmp_path / "foreign.ckpt").mkdir()
    single = tmp_path / "single.ckpt"
    single.write_bytes(b"x")
    for path in (absent, tmp_path / "foreign.ckpt", single):
        (message,) = gloo(1).run(run_refused, 1, log, str(path))
        assert str(path) in message
        assert "\n" not in message
    # Who puts in a hostile file puts in its checksum too.
    pickled = (good / ".metadata").read_bytes()
    (good / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    recommit(good)
    (message,) = gloo(1).run(run_refused, 1, log, str(good))
    assert ".metadata" in message
    assert "os.system" in message
    (good / ".metadata").write_bytes(pickled)
    (good / "meta.pt").write_bytes(b"torn")
    recommit(good)
    (message,) = gloo(1).run(run_refused, 1, log, str(good))
    assert "meta.pt" in message


# ---- users' own modules ------------------------------------------------------------------------------------------


class PlainModule(pl.LightningModule):
    """What a user has: no KJT, no class of ours; optionally exact through ``loss_sums``."""

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.exact = exact

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        losses = (self.net(x).squeeze(-1) - y) ** 2
        self.log("loss", losses.mean(), sync_dist=True)
        if self.exact:
            return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(y))}}
        return losses.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class UnevenBatches:
    """Batches of a rank; with several ranks, of sizes 1 and 5 instead of 3 and 3."""

    def __init__(self, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        x, y = torch.randn(60, 4, generator=generator), torch.randn(60, generator=generator)
        cuts = {1: [6], 2: [1, 5]}[world_size]
        starts = [0, *itertools.accumulate(cuts)]
        self.batches = [
            (x[i + starts[rank] : i + starts[rank + 1]], y[i + starts[rank] : i + starts[rank + 1]])
            for i in range(0, 60, 6)
        ]

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def run_plain(world_size: int, exact: bool) -> dict[str, Any]:
    import warnings

    import torch.distributed as dist

    pl.seed_everything(1)
    model, record = PlainModule(exact), Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = trainer(world_size, record, strategy="sequence_balanced" if _registered() else None, max_steps=10)
        fit.fit(model, UnevenBatches(dist.get_rank(), world_size))
    said = [str(w.message) for w in caught if "averaged rank by rank" in str(w.message)]
    return {"losses": record.losses, "weights": weights_of(model), "said": said}


def _registered() -> bool:
    import lightning_gr.plugins  # noqa: F401

    return True


def test_a_plain_module_trains_with_only_the_strategy_added(gloo: Any) -> None:
    one = gloo(1).run(run_plain, 1, True)
    exact = gloo(2).run(run_plain, 2, True)
    assert largest_difference(exact, one) <= 1e-4
    assert not exact[0]["said"]
    averaged = gloo(2).run(run_plain, 2, False)
    assert len(averaged[0]["said"]) == 1
    assert largest_difference(averaged, one) > 1e-3


def run_plain_loader(world_size: int) -> dict[str, Any]:
    pl.seed_everything(1)
    dataset = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32))
    model, record = PlainModule(), Recorder()
    fit = trainer(world_size, record, max_steps=-1, max_epochs=1)
    fit.fit(model, torch.utils.data.DataLoader(dataset, batch_size=4))
    return {"losses": record.losses, "weights": weights_of(model)}


def test_an_ordinary_dataloader_keeps_lightnings_sampler(gloo: Any) -> None:
    ranks = gloo(2).run(run_plain_loader, 2)
    assert [len(rank["losses"]) for rank in ranks] == [4, 4]
    assert ranks[0]["losses"] != ranks[1]["losses"]


class OwnTables(pl.LightningModule):
    """A user's module with a static TorchRec collection, their own KJT batches and one Adam for everything."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        from torchrec import EmbeddingCollection, EmbeddingConfig

        self.tables = EmbeddingCollection(
            tables=[EmbeddingConfig(name="t", num_embeddings=rows, embedding_dim=4, feature_names=["f"])],
            device=torch.device("cpu"),
        )
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        features, labels = batch
        losses = (self.head(self.tables(features)["f"].values()).squeeze(-1) - labels) ** 2
        return {"loss": losses.mean(), "loss_sums": {"mse": (losses.sum(), len(labels))}}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class OwnBatches(UnevenBatches):
    def __init__(self, rank: int, world_size: int, rows: int) -> None:
        from torchrec import KeyedJaggedTensor

        super().__init__(rank, world_size)
        generator = torch.Generator().manual_seed(5)
        cuts = {1: [(0, 6)], 2: [(0, 1), (1, 6)]}[world_size]
        first, last = cuts[rank]
        kept = []
        for _, _ in self.batches:
            ids = torch.randint(0, rows, (6,), generator=generator)
            y = torch.randn(6, generator=generator)
            lengths = torch.ones(last - first, dtype=torch.int64)
            kept.append((KeyedJaggedTensor(["f"], ids[first:last], lengths=lengths), y[first:last]))
        self.batches = kept


def run_own_tables(world_size: int, rows: int) -> dict[str, Any]:
    import warnings

    import torch.distributed as dist

    pl.seed_everything(1)
    model, record = OwnTables(rows), Recorder()
    first = model.tables.state_dict()["embeddings.t.weight"].clone().numpy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(world_size, record, max_steps=10).fit(model, OwnBatches(dist.get_rank(), world_size, rows))
    said = [str(w.message) for w in caught if "sharded table" in str(w.message)]
    return {"losses": record.losses, "weights": weights_of(model), "first": first, "said": said}


@pytest.mark.parametrize("rows", [20, 1])
def test_a_users_own_collection_and_batches_are_sharded(gloo: Any, rows: int) -> None:
    """Of one row, by rows the second rank would have none."""
    one, two = gloo(1).run(run_own_tables, 1, rows), gloo(2).run(run_own_tables, 2, rows)
    assert largest_difference(two, one) <= 1e-4
    key = "tables.embeddings.t.weight"
    assert two[0]["weights"].keys() == {key, "head.weight", "head.bias"}
    assert not np.array_equal(two[0]["weights"][key], two[0]["first"])
    # Training started from the values the user's module was built with.
    assert np.abs(two[0]["weights"][key] - two[0]["first"]).max() < 2.0
    assert two[0]["said"]


def run_refused_precision(world_size: int) -> str:
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        trainer(world_size, precision="bf16-true").fit(OwnTables(20), OwnBatches(0, 1, 20))
    except (MisconfigurationException, ValueError) as error:
        return str(error)
    return ""


def test_a_precision_that_tables_cannot_honour_is_refused_by_name(gloo: Any) -> None:
    (message,) = gloo(1).run(run_refused_precision, 1)
    assert "bf16-true" in message
    assert "bf16-mixed" in message
