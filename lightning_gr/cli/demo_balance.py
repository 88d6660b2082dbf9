"""The demo's table of its training's balance: what each rank had to do, as samples come and dealt out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_gr.report.balance import AS_THEY_COME

if TYPE_CHECKING:
    from rich.console import Console


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the balance that `ReportCallback` has kept, in 80 columns; nothing for a single rank."""
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
