"""check_group_memory: whether the budgets of dynamic tables fit a rank when each group of ranks holds a full set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.embeddings.dynamic.keyed_rows import INDEX_BYTES_PER_KEY

if TYPE_CHECKING:
    from lightning_gr.embeddings.dynamic.engine import DynamicEngine

_NO_LIMIT = 1 << 60
"""Version 1 of cgroups says a number of about this size where there is no limit."""


@dataclass(frozen=True)
class TableBudget:
    """What a table may grow to.

    Args:
        name: of the table.
        rows: most rows on all ranks of a group together; None where nothing limits them, and nothing is checked.
        row_bytes: of a row with optimiser state, metadata and its share of the key index.
        on_host: whether rows are in host memory rather than in a GPU's.
    """

    name: str
    rows: int | None
    row_bytes: int
    on_host: bool

    def bytes_on(self, ranks: int) -> int:
        """Of the fullest rank, where so many hold the rows."""
        return -(-(self.rows or 0) // ranks) * self.row_bytes


def table_budgets(engines: Iterable[DynamicEngine]) -> list[TableBudget]:
    """The budgets of all logical tables."""
    return [
        TableBudget(
            name=config.name,
            rows=rows,
            row_bytes=table.storage.row_bytes + INDEX_BYTES_PER_KEY,
            on_host=config.placement == "host" or engine.device.type == "cpu",
        )
        for engine in engines
        for table in engine.tables
        for config, rows in zip(table.configs, table.budgets, strict=True)
    ]


def check_group_memory(
    tables: Sequence[TableBudget], *, world_size: int, table_groups: int, device_bytes: int, host_bytes: int
) -> None:
    """Refuses tables that would outgrow a rank once their budgets are used up; whatever else a rank holds comes on top.

    With M groups (hierarchical sparse parallelism, TurboGR, arXiv 2605.13433, section 4.2.1) a rank holds M times the
    rows that it would hold of tables spread over all ranks.

    Args:
        tables: what they may grow to.
        world_size: ranks.
        table_groups: M, a divisor of `world_size`.
        device_bytes: memory of this rank's GPU; not asked for where no table is on one.
        host_bytes: this rank's share of the host's memory.

    Raises:
        MisconfigurationException: names the largest table, what a rank would need and has, and the largest M that fits.
    """
    assert world_size % table_groups == 0

    def lacking(groups: int) -> tuple[list[TableBudget], int] | None:
        """The tables that share a memory too small for them, and its size."""
        for on_host, has in ((False, device_bytes), (True, host_bytes)):
            sharing = [table for table in tables if table.on_host is on_host]
            if sum(table.bytes_on(world_size // groups) for table in sharing) > has:
                return sharing, has
        return None

    if (found := lacking(table_groups)) is None:
        return
    sharing, has = found
    ranks = world_size // table_groups
    largest = max(sharing, key=lambda table: table.bytes_on(ranks))
    needs = f"{_gib(largest.bytes_on(ranks))} a rank"
    if len(sharing) > 1:
        needs += f" ({_gib(sum(table.bytes_on(ranks) for table in sharing))} with the other tables)"
    fitting = [m for m in range(1, table_groups) if world_size % m == 0 and lacking(m) is None]
    remedy = f"table_groups of at most {max(fitting)}" if fitting else "more ranks"
    raise MisconfigurationException(
        f"table_groups={table_groups}: table {largest.name} may grow to {largest.rows:,} rows x {largest.row_bytes} "
        f"bytes, which is {needs} where {ranks} of {world_size} ranks hold a full set of tables, and a rank has "
        f"{_gib(has)} of {'host' if largest.on_host else 'GPU'} memory; use {remedy}, or a smaller max_rows"
    )


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU; 0 where the device is none."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0


def host_memory(*, cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the processes of this machine, or of this container, may have together.

    Args:
        cgroups: where the system shows control groups.
        membership: the file that says which ones this process is in.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _limit_files(cgroups, membership):
        text = file.read_text().strip() if file.is_file() else "max"
        if text.isdecimal() and int(text) < _NO_LIMIT:
            limits.append(int(text))
    return min(limits)


def _limit_files(cgroups: Path, membership: Path) -> Iterator[Path]:
    """Where limits of this process's control groups and of those around them may be, in both versions."""
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, own = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        folder = Path(own.strip("/"))
        # In a container the own group may be mounted at the root.
        yield from (root / around / name for around in (folder, *folder.parents))


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"
