"""TableMonitor: growth, budgets, deduplication and use of dynamic tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_gr.observability.by_rank import by_rank, is_log_step, log_values
from lightning_gr.observability.table_counts import ages, done, held, values

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine

_ALMOST_FULL = 0.95


class TableMonitor(pl.Callback):
    """Logs what each dynamic table of a run under `SequenceBalancedStrategy` holds and does, over all ranks.

    Written to every logger as ``gr/table/<table>/<name>``, with the collection's path before the table's name where
    several collections have one of that name; docs/observability.md has the formulas. Names: ``rows``,
    ``load_factor``, ``budget_share``; since the values before ``inserted``, ``evicted``, ``rejected``, ``expired``,
    ``failed``, ``dedup_ratio_1``, ``dedup_ratio_2`` and ``collision_rate``; ``hot_key_share``, ``age_p50``, ``age_p90``
    and ``age_p99``. The last four need counters of rows, which are read of a sample: of at most 65,536 rows a table and
    rank, of the first 262,144 slots of its key index, so that the cost does not grow with the table. Static tables
    have a fixed number of rows, and are left out.

    A table's budget that is almost full, and keys that found no room, are warned of once.

    Args:
        every_n_log_steps: writes at every k-th of the steps at which Lightning logs.

    Attributes:
        histograms: ``gr/table/<table>/age``: rows by the steps since their last use, 0, 1, 2 to 3, 4 to 7 and so on; of
            the last values, and on every rank the same.

    Raises:
        MisconfigurationException: `every_n_log_steps` is below 1.
    """

    def __init__(self, *, every_n_log_steps: int = 1) -> None:
        if every_n_log_steps < 1:
            raise MisconfigurationException(f"every_n_log_steps={every_n_log_steps}: expected at least 1")
        self.every_n_log_steps = every_n_log_steps
        self.histograms: dict[str, list[float]] = {}
        self._log_steps = 0
        self._tables: dict[str, tuple[DynamicEngine, int]] = {}
        self._before: dict[str, float] = {}  # of this rank
        self._not_logged: dict[str, float] = {}  # of all ranks, no longer between `_before` and now
        self._warned: set[tuple[str, str]] = set()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        dynamic: Any = getattr(trainer.strategy, "dynamic", None)
        engines = {} if dynamic is None else {path: dynamic.engines[path] for path in sorted(dynamic.engines)}
        tables = [(path, config.name) for path, engine in engines.items() for config in engine.configs]
        names = [name for _, name in tables]
        labels = [name if names.count(name) == 1 else f"{path}.{name}" for path, name in tables]
        places = [(engine, t) for engine in engines.values() for t in range(len(engine.configs))]
        self._tables = dict(zip(labels, places, strict=True))
        if not self._tables:
            rank_zero_warn(
                f"TableMonitor: {type(pl_module).__name__} under {type(trainer.strategy).__name__} has no dynamic "
                "tables, so it logs nothing; give the module dynamic_tables and train with SequenceBalancedStrategy, "
                "or leave the callback out"
            )
        self._before = self._done()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._tables or not is_log_step(trainer):
            return
        self._log_steps += 1
        if self._log_steps % self.every_n_log_steps == 0:
            self._log(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_by()
        self._tables = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._tables = {}  # other ranks may not come here, so that what is saved now makes no collective

    # ---- values ------------------------------------------------------------------------------------------------

    def _log(self, trainer: pl.Trainer) -> None:
        new = self._new()  # waits until no rank changes a table
        engines = dict.fromkeys(engine for engine, _ in self._tables.values())
        now = {
            f"{label} {name}": value
            for label, of_table in zip(self._tables, (x for engine in engines for x in held(engine)), strict=True)
            for name, value in of_table.items()
        }
        sums = {name: sum(ranks) for name, ranks in by_rank(new | now).items()}
        for name, value in self._not_logged.items():
            if name in new:
                sums[name] += value
        self._not_logged = {}
        of_tables: dict[str, dict[str, float]] = {label: {} for label in self._tables}
        for name, value in sums.items():
            label, _, what = name.rpartition(" ")
            of_tables[label][what] = value
        logged: dict[str, float] = {}
        for label, (engine, t) in self._tables.items():
            of_table = of_tables[label]
            p, local = engine.logical[t]
            budget = engine.tables[p].row_budgets[local]
            found = values(of_table, budget=None if budget is None else budget.num_rows)
            logged |= {f"gr/table/{label}/{name}": value for name, value in found.items() if not math.isnan(value)}
            self.histograms[f"gr/table/{label}/age"] = ages(of_table)
            self._warn(label, engine, t, found)
        log_values(trainer, logged)

    def _done(self) -> dict[str, float]:
        """What has happened on this rank up to now."""
        for engine, _ in self._tables.values():
            engine.join()
        return {
            f"{label} {name}": value
            for label, (engine, t) in self._tables.items()
            for name, value in done(engine, t).items()
        }

    def _new(self) -> dict[str, float]:
        """What has happened on this rank since the last call."""
        now, before = self._done(), self._before
        self._before = now
        return {name: value - before[name] for name, value in now.items()}

    def _put_by(self) -> None:
        """Keeps what has happened on all ranks for the next values."""
        if self._tables:
            for name, ranks in by_rank(self._new()).items():
                self._not_logged[name] = self._not_logged.get(name, 0.0) + sum(ranks)

    def _warn(self, label: str, engine: DynamicEngine, table: int, found: dict[str, float]) -> None:
        if "budget_share" not in found:
            return
        p, local = engine.logical[table]
        policy, limit = engine.configs[table].policy, engine.tables[p].budgets[local]
        name = "max_rows" if limit == policy.max_rows else "max_bytes"
        setting = f"{name}={getattr(policy, name)}"
        if found["failed"] and (label, "failed") not in self._warned:
            self._warned.add((label, "failed"))
            rank_zero_warn(
                f"table {label}: {found['failed']:.0f} admitted keys found no room, since all rows that could go are "
                f"in use by the same step ({setting}); raise {name}, or train on smaller batches. This is said once"
            )
        elif found["budget_share"] > _ALMOST_FULL and (label, "full") not in self._warned:
            self._warned.add((label, "full"))
            rank_zero_warn(
                f"table {label}: its {found['rows']:.0f} rows are {found['budget_share']:.0%} of its budget "
                f"({setting}), beyond which rows are evicted; raise {name} if they should stay. This is said once"
            )

    # ---- checkpoints -------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Lightning asks all ranks for it at once."""
        self._put_by()
        return {"log_steps": self._log_steps, "not_logged": dict(self._not_logged)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._log_steps = int(state_dict["log_steps"])
        self._not_logged = {name: float(value) for name, value in state_dict["not_logged"].items()}
