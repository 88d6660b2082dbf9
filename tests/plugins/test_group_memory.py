"""Budgets of dynamic tables against the memory of a rank: figures by hand, real engines, control groups on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.embeddings.dynamic import DynamicTableConfig, SparseOptimizerConfig, TablePolicy
from lightning_gr.embeddings.dynamic.engine import DynamicEngine
from lightning_gr.plugins.table_groups_memory import (
    TableBudget,
    check_group_memory,
    device_memory,
    host_memory,
    table_budgets,
)

GIB = 1 << 30
ITEM = TableBudget("item", rows=8 << 20, row_bytes=1024, on_host=False)  # 8 GiB in all


def check(*tables: TableBudget, groups: int, device: float = 0.0, host: float = 0.0) -> None:
    check_group_memory(
        tables, world_size=8, table_groups=groups, device_bytes=int(device * GIB), host_bytes=int(host * GIB)
    )


@pytest.mark.parametrize(("groups", "needs"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_a_rank_needs_m_times_its_share(groups: int, needs: int) -> None:
    check(ITEM, groups=groups, device=needs)
    with pytest.raises(MisconfigurationException, match=rf"table_groups={groups}: .*which is {needs}\.00 GiB a rank"):
        check(ITEM, groups=groups, device=needs - 1e-9)


def test_the_refusal_names_table_figures_and_the_largest_m_that_fits() -> None:
    small = TableBudget("user", rows=1 << 20, row_bytes=512, on_host=False)  # half a GiB in all
    with pytest.raises(MisconfigurationException) as refused:
        check(small, ITEM, groups=8, device=3)
    assert str(refused.value) == (
        "table_groups=8: table item may grow to 8,388,608 rows x 1024 bytes, which is 8.00 GiB a rank (8.50 GiB with "
        "the other tables) where 1 of 8 ranks hold a full set of tables, and a rank has 3.00 GiB of GPU memory; use "
        "table_groups of at most 2, or a smaller max_rows"
    )
    check(small, ITEM, groups=2, device=3)
    with pytest.raises(MisconfigurationException, match="table_groups=4"):
        check(small, ITEM, groups=4, device=3)
    # Neither alone is too large.
    check(ITEM, groups=8, device=8.25)
    with pytest.raises(MisconfigurationException, match=r"of at most 4,"):
        check(small, ITEM, groups=8, device=8.25)


def test_where_no_m_fits_more_ranks_are_the_remedy() -> None:
    for groups in (1, 4):
        with pytest.raises(MisconfigurationException, match="; use more ranks, or a smaller max_rows$"):
            check(ITEM, groups=groups, device=0.99)


def test_memory_of_host_and_device_are_apart() -> None:
    cold = TableBudget("cold", rows=8 << 20, row_bytes=1024, on_host=True)
    check(ITEM, cold, groups=2, device=2, host=2)
    with pytest.raises(MisconfigurationException, match=r"table cold .* a rank has 1\.00 GiB of host memory"):
        check(ITEM, cold, groups=2, device=2, host=1)
    with pytest.raises(MisconfigurationException, match=r"table item .* a rank has 1\.00 GiB of GPU memory"):
        check(ITEM, cold, groups=2, device=1, host=2)
    check(TableBudget("free", rows=None, row_bytes=1024, on_host=True), groups=8)


def test_budgets_are_those_of_the_tables() -> None:
    """Row, AdaGrad's number, count, step and time, and the key's share of the index."""
    configs = [
        DynamicTableConfig("a", 8, ["f"], policy=TablePolicy(max_rows=1000)),
        DynamicTableConfig("b", 8, ["g"]),
        DynamicTableConfig("c", 16, ["h"], policy=TablePolicy(max_bytes=100_000), precision="bf16"),
    ]
    engine = DynamicEngine(configs=configs, optimizer=SparseOptimizerConfig(lr=0.1), seed=0)
    found = {table.name: table for table in table_budgets([engine])}
    eight, sixteen = 4 * 8 + 4 + 3 * 8 + 38, 2 * 16 + 4 + 3 * 8 + 38
    assert found == {
        "a": TableBudget("a", 1000, eight, on_host=True),
        "b": TableBudget("b", None, eight, on_host=True),
        "c": TableBudget("c", 100_000 // sixteen, sixteen, on_host=True),
    }
    held = 3 * found["a"].bytes_on(3)
    assert 1000 * eight <= held < 1003 * eight


def test_a_host_is_as_large_as_its_control_groups_allow(tmp_path: Path) -> None:
    physical = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    cgroups, membership = tmp_path / "cgroup", tmp_path / "self"

    def found() -> int:
        return host_memory(cgroups=cgroups, membership=membership)

    assert found() == pytest.approx(physical, rel=0.01)
    membership.write_text("0::/job/step\n")
    step = cgroups / "job" / "step"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    assert found() == pytest.approx(physical, rel=0.01)
    (step.parent / "memory.max").write_text("5000000\n")
    assert found() == 5_000_000
    (step / "memory.max").write_text("4000000\n")
    assert found() == 4_000_000
    # Version 1, where the container's own group is mounted at the root.
    membership.write_text("7:cpu:/box\n4:memory:/box\n0::/\n")
    own = cgroups / "memory" / "memory.limit_in_bytes"
    own.parent.mkdir()
    own.write_text(f"{(1 << 63) - 4096}\n")
    assert found() == pytest.approx(physical, rel=0.01)
    own.write_text("3000000\n")
    assert found() == 3_000_000


def test_memory_of_a_device() -> None:
    assert device_memory(torch.device("cpu")) == 0
    if torch.cuda.is_available():
        assert device_memory(torch.device("cuda", 0)) == torch.cuda.mem_get_info(0)[1]
