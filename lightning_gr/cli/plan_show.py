"""What `lightning-gr plan` found, as tables and bars in a terminal, as a plot, or as one dictionary."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_gr.cli.plan_memory import gib

if TYPE_CHECKING:
    from lightning_gr.balancing.cost import SequenceCost
    from lightning_gr.cli.plan import Figures
    from lightning_gr.cli.plan_balance import Lengths

_WIDTH_OF_FILES = 120
_BAR, _BINS, _SKEW = 40, 16, 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def show(figures: Figures) -> None:
    """Prints all of it."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_WIDTH_OF_FILES)
    for line in _head(figures):
        console.print(line)
    console.print()
    console.print(_histogram(figures.lengths))
    console.print()
    console.print(_balance(figures))
    for line in _of_balance(figures):
        console.print(line)
    console.print()
    console.print(_ranks(figures))
    for line in _of_ranks(figures):
        console.print(line)
    console.print()
    if figures.groups.choices:
        console.print(_groups(figures))
    for line in _of_groups(figures):
        console.print(line)


def _head(figures: Figures) -> list[str]:
    recipe, plan, lengths = figures.recipe, figures.recipe.plan, figures.lengths
    devices = f"{recipe.ranks} rank{'s' * (recipe.ranks > 1)}"
    if not recipe.ranks_known:
        devices += ", since trainer.devices names no number"
    tokens = plan.num_tokens / plan.num_batches
    steps = -(-plan.num_batches // recipe.accumulate)
    lines = [
        f"{recipe.title}: {plan.num_samples:,} samples, {plan.num_tokens:,} tokens an epoch; {devices}",
        f"{plan.num_batches:,} global batches of {tokens:,.0f} tokens (global_tokens {plan.global_tokens:,}), "
        f"{steps:,} optimiser steps",
        f"lengths: median {lengths.quantile(0.5):,}, mean {lengths.mean:,.1f}, 99 % up to {lengths.quantile(0.99):,}, "
        f"longest {lengths.longest:,} tokens",
    ]
    if recipe.other_strategy is not None:
        lines.append(
            f"strategy {recipe.other_strategy}: balance and memory are those of SequenceBalancedStrategy's defaults"
        )
    return lines


# ---- lengths -----------------------------------------------------------------------------------------------------


def bins(lengths: Lengths) -> list[tuple[int, int, int]]:
    """First and last length of each bin, and its samples; of equal width, or doubling where lengths are skewed."""
    shortest = int(np.flatnonzero(lengths.samples_L).min(initial=lengths.longest))
    if lengths.longest > _SKEW * max(lengths.quantile(0.5), 1):
        edges = [shortest]
        while edges[-1] <= lengths.longest:
            edges.append(max(edges[-1] + 1, 2 ** int(np.log2(edges[-1]) + 1)))
        edges[-1] = lengths.longest + 1
    else:
        width = -(-(lengths.longest + 1 - shortest) // _BINS)
        edges = [*range(shortest, lengths.longest + 1, width), lengths.longest + 1]
    return [(a, b - 1, int(lengths.samples_L[a:b].sum())) for a, b in zip(edges, edges[1:], strict=False)]


def bar(share: float, width: int = _BAR) -> str:
    """A bar in eighths of a character; anything above 0 can be seen."""
    eighths = max(round(share * width * 8), int(share > 0))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _histogram(lengths: Lengths) -> Table:
    table = Table(box=None, show_header=True, padding=(0, 1), title="lengths", title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("samples", justify="right")
    table.add_column("")
    found = bins(lengths)
    most = max(samples for *_, samples in found)
    for first, last, samples in found:
        label = f"{first:,}" if first == last else f"{first:,}-{last:,}"
        table.add_row(label, f"{samples:,}", Text(bar(samples / most), style="cyan"))
    return table


# ---- balance -----------------------------------------------------------------------------------------------------


def _balance(figures: Figures) -> Table:
    kept = "global_tokens stays" if figures.strong else "tokens a rank stay, global_tokens grows with the ranks"
    table = Table(title=f"balance; {kept}", title_justify="left")
    for name in ("ranks", "tokens\na rank", "batches\nan epoch", "micro-\nsteps"):
        table.add_column(name, justify="right")
    for name in ("wait, as\nthey come", f"wait, by\n{_short(figures)}", "least: the\nlongest"):
        table.add_column(name, justify="right")
    for row in figures.rows:
        deal = row.deal
        table.add_row(
            f"{deal.ranks:,}{'*' * (deal.ranks == figures.recipe.ranks)}",
            f"{deal.batch_tokens / deal.ranks:,.0f}",
            f"{deal.batches:,}{'+' * deal.repeats}",
            f"{deal.micro_steps}",
            *(f"{share:.1%}" for share in (deal.unbalanced, deal.balanced, deal.bound)),
        )
    return table


def _short(figures: Figures) -> str:
    return {"karmarkar_karp": "kk"}.get(figures.recipe.balancing.partitioner, figures.recipe.balancing.partitioner)


def _of_balance(figures: Figures) -> list[str]:
    lengths, cost, recipe = figures.lengths, figures.recipe.cost, figures.recipe
    lines = [
        "wait: (max - mean) / max of the ranks' costs, the share of a step for which the mean rank waits",
        f"cost of a sequence: {cost.linear:.4g} L + {cost.quadratic:.4g} L^2 (balancing.cost: {_cost_name(figures)})",
        f"the longest sequence ({lengths.longest:,} tokens) costs what {figures.even_tokens:,} tokens cost on the "
        f"mean: from so many tokens a rank on (global_tokens {figures.even_tokens * recipe.ranks:,} on "
        f"{recipe.ranks}), it makes nobody wait",
    ]
    if any(row.deal.repeats for row in figures.rows):
        lines.append("+ the log is smaller than such a batch: its samples are used again")
    if any(row.deal.ranks == recipe.ranks for row in figures.rows):
        lines.append("* the recipe's")
    return lines


def _cost_name(figures: Figures) -> str:
    chosen = figures.recipe.balancing.cost
    return chosen if isinstance(chosen, str) else "measured"


# ---- ranks -------------------------------------------------------------------------------------------------------


def _ranks(figures: Figures) -> Table:
    most = max((row.forward_flops or 0 for row in figures.rows), default=0)
    power = min(int(np.log10(max(most, 1))) // 3 * 3, 15)
    unit = {0: "", 3: "K", 6: "M", 9: "G", 12: "T", 15: "P"}[power] + "FLOP"
    table = Table(title="one rank: a step's work and exchange, and what lies in memory", title_justify="left")
    for name in ("ranks", f"{unit}\nforward", f"{unit}\nbackward", "sent\nsparse", "sent\ndense", "tables", "dense"):
        table.add_column(name, justify="right")
    table.add_column("activa-\ntions", justify="right")
    for row in figures.rows:
        sent, held = row.exchange, row.memory
        work = ["-" if x is None else f"{x / 10**power:,.1f}" for x in (row.forward_flops, row.backward_flops)]
        sizes = [None, None] if sent is None else [sent.total - sent.dense, sent.dense]
        table.add_row(
            f"{row.deal.ranks:,}{'*' * (row.deal.ranks == figures.recipe.ranks)}",
            *work,
            *("-" if size is None else short(size) for size in (*sizes, held.tables, held.dense, held.activations)),
        )
    return table


def short(size: float) -> str:
    """A size of at most six characters: bytes, or K, M, G, T for powers of 1,024."""
    for unit in ("", "K", "M", "G"):
        if size < 999.5:
            return f"{size:.3g}{unit}"
        size /= 1024
    return f"{size:,.0f}T" if size >= 9.95 else f"{size:.2g}T"


def _of_ranks(figures: Figures) -> list[str]:
    memory = figures.memory
    lines = []
    for table in memory.tables:
        rows = "grows with the ids" if table.rows is None else f"{table.rows:,} rows x {table.row_bytes} bytes"
        cut = "" if table.cut == "row_wise" else f", {table.cut}"
        lines.append(f"table {table.name}: {rows} (width {table.dim}, optimiser state included){cut}")
    lines.append(f"dense: {figures.dense_parameters:,} parameters, with gradients and optimiser state")
    if memory.activations is None:
        lines.append(
            f"activations: not measured; {type(figures.recipe.model).__name__} has no score() and loss_sums() to run "
            "apart from its tables"
        )
    else:
        again = ", layers computed again in backward" if memory.activations.recomputes else ""
        # Operators of the CPU keep fp32 where those of a GPU keep bf16.
        of = "bf16-mixed on a CPU, so at most" if figures.recipe.bf16 else "fp32"
        size = f"{gib(memory.activations.per_token)} a token"
        if memory.activations.by_episode:
            size = f"{gib(memory.activations.constant)} for the longest episode, one at a time"
        lines.append(
            f"activations: {size}, measured in {of}{again}, on the fullest rank; "
            "work space of kernels and libraries comes on top"
        )
    if figures.rows[0].forward_flops is None:
        lines.append(f"FLOPs: not known; {type(figures.recipe.model).__name__} has no sequence_cost()")
    lines.append("sent sparse: ids, rows, their gradients, and queries for other ranks' candidates; dense: all-reduce")
    lines.append("sizes in bytes; K, M, G, T are KiB, MiB, GiB, TiB")
    return lines


# ---- table groups ------------------------------------------------------------------------------------------------


def _groups(figures: Figures) -> Table:
    advice = figures.groups
    table = Table(title=f"table groups: a step's exchange of one of {advice.ranks:,} ranks", title_justify="left")
    for name in ("groups", "ranks\neach", "sent in\na group", "sent\nbetween", "ms in\na group", "ms\nbetween", "ms"):
        table.add_column(name, justify="right")
    table.add_column("tables", justify="right")
    for choice in advice.choices:
        table.add_row(
            f"{choice.table_groups:,}{'*' * (choice.table_groups == figures.recipe.table_groups)}",
            f"{advice.ranks // choice.table_groups:,}",
            short(choice.group_bytes),
            short(choice.replica_bytes),
            *(f"{1e3 * x:.3g}" for x in (choice.group_seconds, choice.replica_seconds, choice.seconds)),
            short(choice.table_bytes) + "!" * (not choice.fits),
        )
    return table


def _of_groups(figures: Figures) -> list[str]:
    advice, network, own = figures.groups, figures.network, figures.recipe.table_groups
    if not advice.choices:
        return [f"table_groups: {advice.table_groups}, since {advice.reason}"]
    lines = []
    if own > 1:
        lines.append(f"* the recipe's: what is said above of exchange and tables is of 1 group, and not of {own}")
    if not all(choice.fits for choice in advice.choices):
        lines.append("! with all else that a rank holds, more than its memory")
    inside, between = (
        f"{link.bandwidth / 1e9:g} GB/s and {link.latency * 1e6:g} us" for link in (network.inside, network.between)
    )
    return [
        *lines,
        f"a rank's messages: {inside} each inside a machine of {network.ranks_per_node} ranks, {between} between",
        "machines (--inside, --ranks_per_node, --between); nothing is taken to be hidden behind other work",
        f"recommended: {advice.table_groups}, {advice.reason}",
        "put this under trainer.strategy.init_args:",
        f"table_groups: {advice.table_groups}",
    ]


# ---- calibration -------------------------------------------------------------------------------------------------


def show_calibration(title: str, steps: list[dict[str, Any]], cost: SequenceCost, counted: SequenceCost | None) -> None:
    """The measured steps, and the cost as YAML has it."""
    console = Console(highlight=False, markup=False)
    console.print(f"{title}: forward and backward on this machine")
    table = Table()
    for name in ("sequences", "tokens", "longest", "ms"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(*(f"{step[x]:,}" for x in ("sequences", "tokens", "longest")), f"{1e3 * step['seconds']:,.2f}")
    console.print(table)
    ours = _ratio(cost)
    theirs = "" if counted is None else f"; by FLOPs at {_ratio(counted)}"
    console.print(f"a token's linear part costs what its pairs cost at {ours} tokens{theirs}", soft_wrap=True)
    print("put this under trainer.strategy.init_args.balancing:")
    print(f"cost: {{linear: {cost.linear:.6e}, quadratic: {cost.quadratic:.6e}}}")


def _ratio(cost: SequenceCost) -> str:
    return f"{cost.linear / cost.quadratic:,.0f}" if cost.quadratic else "no number of"


# ---- other forms -------------------------------------------------------------------------------------------------


def as_dict(figures: Figures) -> dict[str, Any]:
    """All figures for JSON; sizes in bytes, shares from 0 to 1."""
    recipe, plan, lengths, cost = figures.recipe, figures.recipe.plan, figures.lengths, figures.recipe.cost
    activations = figures.memory.activations
    return {
        "config": recipe.title,
        "samples": plan.num_samples,
        "tokens": plan.num_tokens,
        "global_tokens": plan.global_tokens,
        "batches": plan.num_batches,
        "accumulate": recipe.accumulate,
        "recipe_ranks": recipe.ranks,
        "scaling": "strong" if figures.strong else "weak",
        "partitioner": recipe.balancing.partitioner,
        "cost": {"linear": cost.linear, "quadratic": cost.quadratic},
        "lengths": {
            "mean": lengths.mean,
            "median": lengths.quantile(0.5),
            "p99": lengths.quantile(0.99),
            "longest": lengths.longest,
            "histogram": [{"from": a, "to": b, "samples": n} for a, b, n in bins(lengths)],
        },
        "even_tokens_per_rank": figures.even_tokens,
        "dense_parameters": figures.dense_parameters,
        "tables": [asdict(table) for table in figures.memory.tables],
        "activations": None if activations is None else asdict(activations),
        "ranks": [
            asdict(row.deal)
            | {
                "forward_flops": row.forward_flops,
                "backward_flops": row.backward_flops,
                "exchange": None if row.exchange is None else asdict(row.exchange) | {"total": row.exchange.total},
                "memory": asdict(row.memory) | {"total": row.memory.total},
            }
            for row in figures.rows
        ],
        "table_groups": {
            "ranks": figures.groups.ranks,
            "recommended": figures.groups.table_groups,
            "reason": figures.groups.reason,
            "choices": [asdict(choice) | {"seconds": choice.seconds} for choice in figures.groups.choices],
        },
    }


def plot(figures: Figures, file: Path) -> None:
    """Lengths, and balance by the number of ranks."""
    from matplotlib.figure import Figure

    lengths, rows = figures.lengths, figures.rows
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = bins(lengths)
    left.bar(
        [first for first, *_ in found],
        [samples for *_, samples in found],
        width=[last + 1 - first for first, last, _ in found],
        align="edge",
        color="#2c7fb8",
        edgecolor="white",
    )
    left.axvline(lengths.mean, color="#d95f02", linestyle="--", label=f"mean {lengths.mean:,.1f}")
    if lengths.longest > _SKEW * max(lengths.quantile(0.5), 1):
        left.set_xscale("log", base=2)
    left.set(xlabel="tokens of a sample", ylabel="samples")
    left.legend(frameon=False)
    ranks = [row.deal.ranks for row in rows]
    for name, label, color in (
        ("unbalanced", "as they come", "#d95f02"),
        ("balanced", figures.recipe.balancing.partitioner, "#1b9e77"),
        ("bound", "bound by the longest", "#666666"),
    ):
        style = ":" if name == "bound" else "-"
        shares = [100 * getattr(row.deal, name) for row in rows]
        right.plot(ranks, shares, style, marker="o", markersize=4, label=label, color=color)
    right.set_xscale("log", base=2)
    right.set_xticks(ranks, [str(n) for n in ranks])
    right.set(xlabel="ranks", ylabel="share of a step that the mean rank waits, %", ylim=(0, None))
    right.legend(frameon=False)
    figure.suptitle(figures.recipe.title)
    figure.savefig(file, dpi=150)
