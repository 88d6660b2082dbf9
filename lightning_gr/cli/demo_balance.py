"""Balance of the demo's training: what each rank had to do, dealt out as samples come and as they were.

Shape suffixes: S steps, R ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from typing_extensions import override

from lightning_gr.data.plan import Deal

if TYPE_CHECKING:
    from rich.console import Console

    from lightning_gr.balancing.cost import SequenceCost
    from lightning_gr.balancing.partition import Method
    from lightning_gr.data.plan import GlobalBatchPlan
    from lightning_gr.plugins.stage_log import StageLog

AS_THEY_COME: Method = "contiguous"
_STAGES = ("fetch", "lookup", "train")
_MOST_STEPS, _MOST_BATCHES = 1_000, 500


class BalanceReport(pl.Callback):
    """Writes, after a fit, how evenly its steps were dealt out over the ranks, from the training loader's own plan.

    Args:
        file: JSON file that rank 0 writes.
    """

    def __init__(self, *, file: str) -> None:
        self.file = Path(file)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        from lightning_gr.balancing.cost import cost_of
        from lightning_gr.plugins import SequenceBalancedStrategy

        strategy = trainer.strategy
        if not trainer.is_global_zero or not isinstance(strategy, SequenceBalancedStrategy):
            return
        assert strategy.stage_log is not None
        loader: Any = trainer.train_dataloader
        plan, method, cost = loader.plan, strategy.balancing.partitioner, cost_of(pl_module)
        steps = min(trainer.global_step, _MOST_STEPS)
        found = {
            "steps": steps,
            "partitioner": method,
            "dealt": {
                way: by_rank(*work(plan, steps=steps, ranks=trainer.world_size, cost=cost, method=way))
                for way in (AS_THEY_COME, method)
            },
            "stages": stages(strategy.stage_log),
        }
        self.file.write_text(json.dumps(found, indent=2) + "\n")


def work(
    plan: GlobalBatchPlan, *, steps: int, ranks: int, cost: SequenceCost, method: Method
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens, int64, and cost, float64, of each rank in each of the first steps, both of shape (S, R)."""
    tokens_SR, costs_SR = np.zeros((steps, ranks), dtype=np.int64), np.zeros((steps, ranks))
    deal = Deal(cost=cost, method=method)
    for step in range(steps):
        batch = step % plan.num_batches
        if batch == 0:
            epoch = plan.epoch(step // plan.num_batches)
        for rank in range(ranks):
            own = plan.index.token_counts(epoch.rank_samples(batch, rank=rank, world_size=ranks, deal=deal))
            tokens_SR[step, rank], costs_SR[step, rank] = own.sum(), cost(own).sum()
    return tokens_SR, costs_SR


def stages(log: StageLog) -> dict[str, dict[str, float]]:
    """Milliseconds that a stage took for a batch, of the last ones, and the share of it beside training."""
    last = max(event.batch for event in log.events("train"))
    latest = type(log)()
    for event in log.events():
        if last - _MOST_BATCHES < event.batch <= last:
            latest.add(event.stage, event.batch, event.start, event.end)
    found = {}
    for stage in _STAGES:
        events = latest.events(stage)
        seconds = sum(event.end - event.start for event in events)
        batches = len({event.batch for event in events})
        found[stage] = {"ms": 1e3 * seconds / max(batches, 1), "hidden": latest.hidden_fraction(stage)}
    return found


def by_rank(tokens_SR: np.ndarray[Any, Any], costs_SR: np.ndarray[Any, Any]) -> list[dict[str, float]]:
    """Means and maxima over the steps, for each rank; it waits for what it has less than the rank with most."""
    waits_SR = 1 - costs_SR / costs_SR.max(1, keepdims=True)
    columns = {"tokens": tokens_SR, "flops": costs_SR, "waits": waits_SR}
    return [
        {f"{name}_{kind}": float(found) for name, x_SR in columns.items() for kind, found in _of(x_SR[:, rank])}
        for rank in range(tokens_SR.shape[1])
    ]


def _of(x_S: np.ndarray[Any, Any]) -> list[tuple[str, float]]:
    return [("mean", x_S.mean()), ("most", x_S.max())]


def show(found: dict[str, Any], console: Console) -> None:
    """Prints what `BalanceReport` has written, in 80 columns; nothing for a single rank."""
    from rich.table import Table

    dealt, times = found["dealt"], found["stages"]
    ranks = len(dealt[AS_THEY_COME])
    if ranks == 1:
        return
    title = f"Work of each of {ranks} ranks in {found['steps']:,} steps, by this run's plan"
    table = Table(title=title, title_justify="left")
    for name in ("", "rank", "tokens\nmean", "\nmost", "MFLOP\nmean", "\nmost", "waits\nmean", "\nworst"):
        table.add_column(name, justify="right" if name else "left")
    for way, label in ((AS_THEY_COME, "as they come"), (found["partitioner"], "balanced")):
        for rank, row in enumerate(dealt[way]):
            table.add_row(
                label if rank == 0 else "",
                f"{rank}",
                *(f"{row[f'tokens_{kind}']:,.0f}" for kind in ("mean", "most")),
                *(f"{row[f'flops_{kind}'] / 1e6:,.1f}" for kind in ("mean", "most")),
                *(f"{row[f'waits_{kind}']:.1%}" for kind in ("mean", "most")),
                style="bold" if way != AS_THEY_COME else None,
                end_section=rank == ranks - 1,
            )
    console.print()
    console.print(table)
    for line in (
        "MFLOP: of the encoder's forward. waits: share of a step's work that a rank has",
        "less than the rank with most.",
        f"On rank 0 a batch trained for {times['train']['ms']:.0f} ms. It was read in {times['fetch']['ms']:.1f} ms, "
        "and its ids were",
        f"exchanged in {times['lookup']['ms']:.1f} ms, {times['lookup']['hidden']:.0%} of that while an earlier batch "
        "trained.",
    ):
        console.print(line, highlight=False, soft_wrap=True)
