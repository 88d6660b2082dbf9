"""MFUMonitor against sums by hand: on any number of ranks, over resumes, and with modules that do not count."""

from __future__ import annotations

import logging
import math
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_gr.callbacks import MFUMonitor
from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.observability.product_counter import ProductCounter

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {
    *("gr/mfu", "gr/hfu", "gr/tflops_per_device", "gr/samples_per_second", "gr/tokens_per_second"),
    *("gr/padding_share", "gr/padding_avoided", "gr/attention_share"),
    *("gr/flops_total", "gr/tokens_total", "gr/peak_memory_gib"),
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Told(DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert all(math.isfinite(x) for x in metrics.values()), metrics
        if any(name.startswith("gr/") for name in metrics):
            self.rows.append({"step": step, **metrics})  # type: ignore[dict-item]


# ---- toy modules, one process ------------------------------------------------------------------------------------

PEAK = 1e-3


class Counted(pl.LightningModule):
    """Its flops are what a batch says."""

    def __init__(self, found: Any = ForwardFlops(attention=30, projections=50, embedding=5, head=15)) -> None:  # noqa: B008
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.Linear(5, 1))
        self.found = found
        self.modes: list[int] = []

    def flops(self, batch: Any) -> Any:
        return self.found(batch) if callable(self.found) else self.found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.append(sum(isinstance(x, ProductCounter) for x in _get_current_dispatch_mode_stack()))
        return self.net(batch["x"] if isinstance(batch, dict) else batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Uncounted(Counted):
    """Without flops(batch)."""

    flops = property()  # type: ignore[assignment]


def rows_of(count: int, *, size: int = 4) -> Any:
    return torch.utils.data.DataLoader(torch.randn(count * size, 3), batch_size=size)


def fit(module: Any, data: Any, *callbacks: Any, **settings: Any) -> Any:
    told = Told()
    trainer = pl.Trainer(
        callbacks=list(callbacks), **({"logger": told, "max_epochs": 1, "log_every_n_steps": 2} | QUIET | settings)
    )
    trainer.fit(module, *(data if isinstance(data, tuple) else (data,)))
    return trainer, told.rows


def monitor() -> MFUMonitor:
    return MFUMonitor(peak_tflops=PEAK)


def test_values_are_sums_over_the_window() -> None:
    found, own = ForwardFlops(attention=30, projections=50, embedding=5, head=15, recomputed=7), monitor()
    start = time.perf_counter()
    trainer, rows = fit(Counted(found), rows_of(7), own)
    took = time.perf_counter() - start
    assert [row.pop("step") for row in rows] == [1, 3, 5]
    names = {"gr/tokens_per_second", "gr/tokens_total", "gr/padding_share", "gr/padding_avoided"}
    for number, row in enumerate(rows, start=1):
        assert set(row) == ALL - names  # tensors tell samples alone
        seconds = 2 * 4 / row["gr/samples_per_second"]
        assert 0 < seconds < took
        assert row["gr/mfu"] == pytest.approx(2 * 300 / (seconds * PEAK * 1e12))
        assert row["gr/hfu"] == pytest.approx(row["gr/mfu"] * 307 / 300)
        assert row["gr/tflops_per_device"] == pytest.approx(2 * 300 / seconds / 1e12)
        assert row["gr/attention_share"] == pytest.approx(0.3)
        assert row["gr/flops_total"] == 2 * 300 * number
        assert 0.05 < row["gr/peak_memory_gib"] < 100
    # The rest of the run, behind the last log step, is in the total.
    assert own.totals["flops"] == 7 * 300
    last = {name: float(x) for name, x in trainer.callback_metrics.items() if name in ALL}
    assert last == pytest.approx(rows[-1])


def test_sums_on_a_device_are_exact() -> None:
    """Numbers that float32 does not have."""
    many = 2**25 + 1
    own = monitor()
    fit(Counted(ForwardFlops(attention=torch.tensor(many), projections=1)), rows_of(5), own)
    assert own.totals["flops"] == 5 * 3 * (many + 1)


@pytest.mark.parametrize("number", [12, 12.5, np.int64(12), np.float32(12.5), torch.tensor(12)], ids=lambda x: type(x))
def test_a_plain_number_is_the_forwards(number: Any) -> None:
    own = monitor()
    module = Counted(number)
    _, rows = fit(module, rows_of(4), own)
    assert own.totals["flops"] == 4 * 3 * float(number)
    assert all(row["gr/hfu"] == row["gr/mfu"] > 0 and row["gr/attention_share"] == 0 for row in rows)
    assert module.modes == [0] * 4  # nothing is measured


class Batch(dict[str, Any]):
    """As many samples and tokens as it says."""

    num_samples, num_tokens = 2, 30


class Longer(Batch):
    num_tokens = 60


class Empty(Batch):
    num_samples = num_tokens = 0


class Batches(torch.utils.data.Dataset[Any]):
    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def batches_of(*batches: Any) -> Any:
    return torch.utils.data.DataLoader(Batches(*batches), batch_size=None)


def said_of(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [x.getMessage() for x in caplog.records if part in x.getMessage()]


@pytest.mark.parametrize("kind", ["absent", "none"])
def test_a_module_that_does_not_count_is_measured(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    module, own = Uncounted() if kind == "absent" else Counted(lambda batch: None), monitor()
    torch.manual_seed(0)
    sizes = [4, 8, 2, 6]
    _, rows = fit(module, batches_of(*(torch.randn(size, 3) for size in sizes)), own)
    # Of a sample: 3 x 5 and 5 x 1, forward and for the weights' gradients; inputs need one in the second layer alone.
    sample = 2 * (2 * 15 + 3 * 5)
    assert own.totals["flops"] == pytest.approx(sample * sum(sizes), rel=1e-12)
    # flops() is asked behind a batch, so that the next one is the first that can be measured.
    assert module.modes == [int(n == (kind == "none")) for n in range(4)]
    (said,) = said_of(caplog, "has no flops(batch)")
    assert f"{type(module).__name__} has no flops(batch)" in said
    assert f"padding included: {sample:.4g} operations for each of its samples" in said
    assert all(row["gr/hfu"] == row["gr/mfu"] > 0 for row in rows)


def test_a_measured_module_scales_by_tokens_where_batches_tell_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    own = monitor()
    fit(Uncounted(), batches_of(Batch(x=torch.randn(2, 3)), Longer(x=torch.randn(2, 3))), own)
    assert own.totals == {"flops": pytest.approx(3 * 2 * 90), "tokens": 90.0}
    assert "for each of its tokens" in said_of(caplog, "has no flops")[0]


def test_a_first_batch_without_samples_is_not_what_others_are_scaled_by() -> None:
    own, module, empty = monitor(), Uncounted(), Empty(x=torch.zeros(1, 3))
    _, rows = fit(module, batches_of(empty, empty, Batch(x=torch.randn(2, 3)), empty), own)
    assert module.modes == [1, 1, 1, 0]
    assert own.totals == {"flops": pytest.approx(2 * 90), "tokens": 30.0}
    assert rows[0]["gr/mfu"] == rows[0]["gr/tokens_per_second"] == 0


class Fails(Uncounted):
    """Its first step, or the hook before it."""

    how = "error"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.how == "skip" else None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        raise KeyboardInterrupt if self.how == "interrupt" else RuntimeError("broken")


@pytest.mark.parametrize("how", ["error", "interrupt", "skip"])
def test_a_first_batch_that_fails_leaves_nothing_behind(how: str) -> None:
    module, own = Fails(), monitor()
    module.how = how
    before = len(_get_current_dispatch_mode_stack())
    if how == "skip":
        fit(module, rows_of(2), own)
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            fit(module, rows_of(2), own)
    assert len(_get_current_dispatch_mode_stack()) == before == 0
    # The same callback serves another fit.
    fit(Counted(), rows_of(2), own)
    assert own.totals["flops"] == 2 * 300


class Third(Counted):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


def test_what_is_saved_after_a_failure_waits_for_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_gr.callbacks import mfu_monitor

    calls: list[dict[str, float]] = []
    gather = mfu_monitor.by_rank
    monkeypatch.setattr(mfu_monitor, "by_rank", lambda values: calls.append(values) or gather(values))
    with pytest.raises(RuntimeError, match="broken"):
        fit(
            Third(),
            rows_of(4),
            monitor(),
            OnExceptionCheckpoint(str(tmp_path)),
            log_every_n_steps=1,
            enable_checkpointing=True,
        )
    assert len(calls) == 2  # at two log steps
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=False)["callbacks"]["MFUMonitor"]
    assert state == {"flops": 2 * 300.0, "tokens": 0.0}


def test_evaluations_are_not_in_the_time() -> None:
    def quickest(*data: Any) -> float:
        _, rows = fit(Counted(), data, monitor(), val_check_interval=1)
        assert len(rows) == 4
        return max(row["gr/samples_per_second"] for row in rows[1:])

    # 50 ms a validation batch; a step takes a few.
    evaluated = quickest(rows_of(8), rows_of(2))
    assert 2 * 4 / evaluated < 0.05


def test_evaluation_without_a_fit_tells_nothing() -> None:
    own, told = monitor(), Told()
    trainer = pl.Trainer(callbacks=[own], logger=told, **QUIET)
    trainer.validate(Counted(), rows_of(1), verbose=False)
    trainer.test(Counted(), rows_of(1), verbose=False)
    assert told.rows == []
    assert own.totals == {"flops": 0.0, "tokens": 0.0}


def test_one_callback_serves_fits_after_each_other() -> None:
    own, module = monitor(), Counted()
    trainer, rows = fit(module, rows_of(4), own)
    first = list(rows)
    trainer.fit_loop.max_epochs = 3  # the same run goes on
    trainer.fit(module, rows_of(4))
    assert own.totals["flops"] == 12 * 300
    _, again = fit(Counted(), rows_of(4), own)
    assert [row["gr/flops_total"] for row in again] == [row["gr/flops_total"] for row in first]


@pytest.mark.parametrize("settings", [{"log_every_n_steps": 50}, {"log_every_n_steps": 0}, {"logger": False}], ids=str)
def test_runs_that_log_nothing_count_all_the_same(settings: dict[str, Any]) -> None:
    own = monitor()
    trainer, rows = fit(Counted(), rows_of(4), own, **settings)
    assert rows == []
    assert own.totals["flops"] == 4 * 300
    assert ("gr/mfu" in trainer.callback_metrics) == ("logger" in settings)


def test_a_loaders_none_is_no_batch() -> None:
    own = monitor()
    fit(Counted(lambda batch: len(batch)), batches_of(torch.randn(4, 3), None, torch.randn(2, 3)), own)
    assert own.totals["flops"] == 3 * 6


class Failing(Told):
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        raise OSError("no space left")


def test_a_logger_that_fails_stops_neither_training_nor_others() -> None:
    before, after = Told(), Told()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Counted(), rows_of(6), monitor(), logger=[before, Failing(), after])
    said = [str(x.message) for x in caught if "no space left" in str(x.message)]
    assert len(said) == 1
    assert "Failing: cannot write gr/mfu and others (OSError: no space left); training goes on" in said[0]
    assert len(before.rows) == len(after.rows) == 3


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_a_rate_is_above_zero(rate: float) -> None:
    with pytest.raises(MisconfigurationException, match=f"peak_tflops={rate}: expected a rate above 0"):
        MFUMonitor(peak_tflops=rate)


def test_the_rates_source_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("lightning_gr.observability.peak_rate.measured_rate", lambda device, dtype: 5e9)
    own = MFUMonitor()
    _, rows = fit(Counted(), rows_of(2), own)
    assert said_of(caplog, "peak rate")[0].endswith("a device's peak rate is taken as 0.005 TFLOP/s (measured)")
    assert rows[0]["gr/tflops_per_device"] == pytest.approx(rows[0]["gr/mfu"] * 5e-3)
    caplog.clear()
    fit(Counted(), rows_of(2), MFUMonitor(peak_tflops=2.5))
    assert said_of(caplog, "peak rate")[0].endswith("is taken as 2.5 TFLOP/s (peak_tflops)")


@pytest.mark.filterwarnings("always::RuntimeWarning")
def test_a_peak_that_training_passes_was_measured_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.observability.peak_rate.measured_rate", lambda device, dtype: 1e-3)
    own = MFUMonitor()
    with pytest.warns(RuntimeWarning, match=r"reached .* TFLOP/s, above the 1e-15 measured for a peak"):
        _, rows = fit(Counted(ForwardFlops(projections=1000, recomputed=500)), rows_of(4), own)
    assert rows[0]["gr/hfu"] == pytest.approx(1)
    assert rows[0]["gr/mfu"] == pytest.approx(3000 / 3500)
    assert all(row["gr/hfu"] <= 1 + 1e-9 for row in rows)
    told = MFUMonitor(peak_tflops=1e-15)  # what a user gives is kept
    _, rows = fit(Counted(), rows_of(4), told)
    assert rows[-1]["gr/mfu"] > 1


def test_a_checkpoints_state_has_the_window_under_way() -> None:
    own = monitor()
    own._window = {"model": 7.0, "tokens": math.nan}
    assert own.state_dict() == own.state_dict() == {"flops": 7.0, "tokens": 0.0}
    other = monitor()
    other.load_state_dict(own.state_dict())
    assert other.totals == {"flops": 7.0, "tokens": 0.0}


def test_a_batch_of_padding_alone_writes_no_nan() -> None:
    """Neither tokens nor samples: `Told` refuses what is not finite."""
    from torchrec import KeyedJaggedTensor

    from lightning_gr.batch import SequenceBatch

    nothing = torch.zeros(1, dtype=torch.int64)
    batch = SequenceBatch(
        features=KeyedJaggedTensor(["f"], nothing[:0], lengths=nothing),
        token_counts_B4=torch.zeros(1, 4, dtype=torch.int64),
        sample_ids_B=torch.tensor([-1]),
    )

    class Padding(Counted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(torch.zeros(1, 3)).sum()

    _, rows = fit(Padding(ForwardFlops()), batches_of(batch, batch), monitor())
    assert set(rows[0]) == ALL - {"gr/padding_share", "gr/padding_avoided", "gr/attention_share"} | {"step"}
    assert rows[0]["gr/mfu"] == rows[0]["gr/tokens_total"] == rows[0]["gr/samples_per_second"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_time_is_the_devices() -> None:
    """Work that the host only queues takes its time all the same; memory is what tensors took."""

    class Heavy(Counted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            factor = torch.randn(4096, 4096, device=self.device)
            for _ in range(20):
                factor = factor @ factor * 1e-3
            return self.net(batch).square().mean()

    torch.cuda.reset_peak_memory_stats()
    work = 20 * 2 * 4096**3 / 3
    _, rows = fit(Heavy(work), rows_of(8), MFUMonitor(), accelerator="gpu", devices=1)
    for row in rows[1:]:
        assert 0.1 < row["gr/mfu"] < 1.1
        assert 4096**2 * 4 * 2 < row["gr/peak_memory_gib"] * 2**30 < 4096**2 * 4 * 40


# ---- models of the package, one process and several --------------------------------------------------------------

ITEMS, DIM, LAYERS, LONGEST, BUDGET = 30, 8, 2, 16, 48
RETRIEVAL = {
    "full": {"loss": "full_softmax"},
    "uniform": {"loss": "sampled_softmax", "num_negatives": 5},
    "in_batch": {"loss": "sampled_softmax", "negatives": "in_batch"},
}


def write_log(path: Path) -> str:
    rng = np.random.default_rng(0)
    lines = ["user_id,item_id,timestamp"]
    for user in range(30):
        length = int(rng.integers(4, 7)) if user % 3 else int(rng.integers(9, 20))
        lines += [f"{user},{item},{1_000_000 + 3600 * n}" for n, item in enumerate(rng.integers(0, ITEMS, length))]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_store(folder: Path) -> str:
    from lightning_gr.data import Field, StoreWriter

    rng = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {name: [] for name in ("user_id", "item_id", "timestamp", "click", "city")}
    for user in range(24):
        n = int(rng.integers(5, 24))
        rows["user_id"].append(user)
        rows["item_id"].append(rng.integers(0, 12, n).tolist())
        rows["timestamp"].append(np.sort(rng.integers(0, 40, n)).tolist())
        rows["click"].append((rng.random(n) < 0.4).astype(float).tolist())
        rows["city"].append(user % 3)
    fields = (Field("click", "label", "event"), Field("city", "sparse", "user", 3))
    writer = StoreWriter(path=folder / "store", fields=fields, has_timestamps=True, work=folder / "work")
    writer.write_users(polars.DataFrame(rows))
    writer.write_vocabulary("item_id", polars.Series("value", range(12)))
    writer.finish(summary={})
    return str(folder / "store")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("logs")
    log = write_log(folder / "log.csv")
    return dict.fromkeys(RETRIEVAL, log) | {"mtgr": write_store(folder)}


def data_of(kind: str, path: str) -> Any:
    from lightning_gr.data import LastShare, RankingDataModule, SequenceDataModule, Task

    if kind != "mtgr":
        return SequenceDataModule(path=path, global_tokens=BUDGET, max_length=LONGEST, seed=3)
    split = LastShare(val=0.2, test=0.2)
    tasks = {"click": Task("click")}
    return RankingDataModule(path=path, tasks=tasks, split=split, seed=3, global_tokens=64, max_history=8, block=4)


def module_of(kind: str, *, dynamic: bool = False, dropout: float = 0.2, recompute: bool = False) -> Any:
    from lightning_gr.embeddings.dynamic import DynamicTables
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import MTGR, RankingModule, RetrievalModule

    torch.manual_seed(5)
    sizes: dict[str, Any] = {"dim": DIM, "num_layers": LAYERS, "num_heads": 2, "dropout": dropout}
    sizes |= {"recompute": recompute}
    tables = DynamicTables() if dynamic else None
    if kind == "mtgr":
        return RankingModule(network=MTGR(max_length=32, **sizes), embedding_dim=4, dynamic_tables=tables)
    encoder = HSTUEncoder(max_length=LONGEST, **sizes)
    return RetrievalModule(encoder=encoder, top_k=[3], dynamic_tables=tables, **RETRIEVAL[kind])  # type: ignore[arg-type]


class Seen(pl.Callback):
    """By batch, what this rank trained: each sequence's tokens, and labels."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((batch.token_counts_B4.sum(1).tolist(), sum(x.num_labels for x in batch.labels.values())))


def weights_of(module: Any) -> dict[str, Any]:
    """Every weight in full on rank 0, and this rank's rows of dynamic tables with their state."""
    import torch.distributed as dist

    whole: dict[str, Any] = {}
    for name, value in module.state_dict().items():
        if hasattr(value, "local_shards"):
            full = torch.zeros(value.size()) if dist.get_rank() == 0 else None
            value.gather(0, out=full)
            value = torch.zeros(0) if full is None else full
        whole[name] = value.detach().numpy().copy()
    for number, table in enumerate(getattr(getattr(module.tables, "engine", None), "tables", [])):
        rows, _ = table.rows_of(0)
        for place, key in enumerate(rows.ids_N.tolist()):
            whole[f"row {number} {key}"] = torch.cat([rows.values_ND[place], rows.state_NS[place]]).numpy().copy()
    return whole


def train(
    world: int,
    kind: str,
    path: str,
    *,
    steps: int = 7,
    every: int = 3,
    save: dict[str, Any] | None = None,
    resume: str | None = None,
    monitored: bool = True,
    counts: bool = True,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(7)
    module, own, seen, told = module_of(kind, **(model or {})), monitor(), Seen(), Told()
    if not counts:
        type(module).flops, kept = property(), type(module).flops
    callbacks = [*([own] if monitored else []), seen]
    if save is not None:
        callbacks.append(ModelCheckpoint(save_top_k=-1, filename="{step}", **save))
    try:
        trainer = pl.Trainer(
            devices=world,
            strategy=SequenceBalancedStrategy(sparse_lr=0.1),
            callbacks=callbacks,
            logger=told,
            max_steps=steps,
            log_every_n_steps=every,
            **({"limit_val_batches": 0} | QUIET | {"enable_checkpointing": save is not None} | settings),
        )
        trainer.fit(module, datamodule=data_of(kind, path), ckpt_path=resume)
    finally:
        if not counts:
            type(module).flops = kept
    return {"totals": own.totals, "rows": told.rows, "seen": seen.batches, "weights": weights_of(module)}


def by_hand(ranks: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Of a retrieval run: pairs, maps and scores of every batch, over its ranks."""
    flops = tokens = 0
    for parts in zip(*(x["seen"] for x in ranks), strict=True):
        lengths = [length for lengths, _ in parts for length in lengths]
        labels = sum(labels for _, labels in parts)
        pairs = sum(row + 1 for length in lengths for row in range(length))
        candidates = {"full": ITEMS, "uniform": 1 + 5, "in_batch": labels}[kind]
        flops += LAYERS * (sum(lengths) * 10 * DIM**2 + pairs * 4 * DIM) + 2 * labels * candidates * DIM
        tokens += sum(lengths)
    return {"flops": 3.0 * flops, "tokens": float(tokens)}


@pytest.fixture(scope="module")
def alone(gloo: Any, paths: dict[str, str]) -> dict[str, Any]:
    return {kind: gloo(1).run(train, 1, kind, path)[0] for kind, path in paths.items()}


@pytest.mark.dist
@pytest.mark.parametrize("kind", RETRIEVAL)
def test_totals_of_retrieval_are_those_by_hand(kind: str, alone: dict[str, Any]) -> None:
    run = alone[kind]
    assert len(run["seen"]) == 7
    assert run["totals"] == by_hand([run], kind)
    assert [row["step"] for row in run["rows"]] == [2, 5]
    for row in run["rows"]:
        window = {**run, "seen": run["seen"][: int(row["step"]) + 1]}
        assert (row["gr/flops_total"], row["gr/tokens_total"]) == tuple(by_hand([window], kind).values())
        assert ALL | {"step"} <= set(row)
        assert row["gr/padding_share"] == 0
        # Scores of the global batch are made again in backward; those of full and sampled softmax are not, on a CPU.
        steps = run["seen"][int(row["step"]) - 2 : int(row["step"]) + 1]
        again = 2 * DIM * sum(labels**2 for _, labels in steps) if kind == "in_batch" else 0
        model = by_hand([{**run, "seen": steps}], kind)["flops"]
        assert row["gr/hfu"] == pytest.approx(row["gr/mfu"] * (model + again) / model)
        assert row["gr/mfu"] > 0
    # Of the last window, how many tokens a rectangle has.
    batches = [lengths for lengths, _ in run["seen"][3:6]]
    saved = 1 - sum(map(sum, batches)) / sum(max(x) * len(x) for x in batches)
    assert run["rows"][-1]["gr/padding_avoided"] == pytest.approx(saved)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", [*RETRIEVAL, "mtgr"])
def test_sums_over_ranks_are_those_of_one(
    gloo: Any, paths: dict[str, str], alone: dict[str, Any], kind: str, world: int
) -> None:
    ranks = gloo(world).run(train, world, kind, paths[kind])
    for run in ranks:
        assert run["totals"] == alone[kind]["totals"]
        assert run["totals"]["flops"] > 0
    assert all(run["rows"] == [] for run in ranks[1:]), "rank 0 alone writes"
    for ours, theirs in zip(ranks[0]["rows"], alone[kind]["rows"], strict=True):
        for name in ("step", "gr/flops_total", "gr/tokens_total", "gr/padding_share"):
            assert ours[name] == theirs[name]
        assert ours["gr/attention_share"] == pytest.approx(theirs["gr/attention_share"], rel=1e-12)
        # Seconds are the slowest rank's, and the peak is that of all devices.
        per_second = ours["gr/tflops_per_device"] * 1e12 * world
        assert ours["gr/mfu"] == pytest.approx(per_second / (world * PEAK * 1e12))


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["in_batch", pytest.param("mtgr", marks=pytest.mark.long)])
def test_accumulated_batches_and_evaluations_change_no_total(
    gloo: Any, paths: dict[str, str], alone: dict[str, Any], kind: str
) -> None:
    ranks = gloo(2).run(train, 2, kind, paths[kind], val_check_interval=2, limit_val_batches=2)
    assert ranks[0]["totals"] == ranks[1]["totals"] == alone[kind]["totals"]
    runs = [gloo(world).run(train, world, kind, paths[kind], accumulate_grad_batches=2, every=2) for world in (1, 2)]
    assert runs[0][0]["totals"] == runs[1][0]["totals"] == runs[1][1]["totals"]
    if kind != "mtgr":
        # Which labels of a step are scored together is known as a mean over its batches.
        assert runs[1][0]["totals"] == pytest.approx(by_hand(runs[1], kind), rel=0.05)
    assert [row["step"] for row in runs[1][0]["rows"]] == [row["step"] for row in runs[0][0]["rows"]]
    assert [row["gr/flops_total"] for row in runs[1][0]["rows"]] == [
        row["gr/flops_total"] for row in runs[0][0]["rows"]
    ]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["full", pytest.param("mtgr", marks=pytest.mark.long)])
def test_totals_go_on_over_resumes_on_other_numbers_of_ranks(
    gloo: Any, paths: dict[str, str], alone: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    """Saved between two log steps, by a run that then goes a step further."""
    save = {"dirpath": str(tmp_path), "every_n_train_steps": 4, "save_on_train_epoch_end": False}
    first = gloo(2).run(train, 2, kind, paths[kind], steps=5, save=save)
    (checkpoint,) = tmp_path.glob("*.ckpt")
    assert "step=4" in checkpoint.name
    assert first[0]["totals"]["flops"] < alone[kind]["totals"]["flops"]
    for world in (1, 3):
        for run in gloo(world).run(train, world, kind, paths[kind], resume=str(checkpoint)):
            assert len(run["seen"]) == 3
            assert run["totals"] == alone[kind]["totals"]


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["full", "mtgr"])
def test_recomputing_shows_in_hfu_alone(gloo: Any, paths: dict[str, str], alone: dict[str, Any], kind: str) -> None:
    (run,) = gloo(1).run(train, 1, kind, paths[kind], model={"recompute": True})
    assert run["totals"] == alone[kind]["totals"]
    for row in run["rows"]:
        assert 1 < row["gr/hfu"] / row["gr/mfu"] < 4 / 3


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", ["full", pytest.param("mtgr", marks=pytest.mark.long)])
def test_no_number_of_training_changes(gloo: Any, paths: dict[str, str], kind: str, dynamic: bool, world: int) -> None:
    """With dropout; counted by the module, measured, and without the monitor."""
    given = {"model": {"dynamic": dynamic, "dropout": 0.3}, "every": 2}
    runs = [
        gloo(world).run(train, world, kind, paths[kind], **given, **how)
        for how in ({}, {"counts": False}, {"monitored": False})
    ]
    for counted, measured, plain in zip(*runs, strict=True):
        assert counted["weights"].keys() == measured["weights"].keys() == plain["weights"].keys()
        for name, weight in plain["weights"].items():
            np.testing.assert_array_equal(counted["weights"][name], weight, err_msg=name)
            np.testing.assert_array_equal(measured["weights"][name], weight, err_msg=name)
        assert counted["totals"]["flops"] > 0 == plain["totals"]["flops"]
        assert measured["totals"]["flops"] > 0
        assert measured["totals"]["tokens"] == counted["totals"]["tokens"]
