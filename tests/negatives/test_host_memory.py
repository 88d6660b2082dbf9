"""The memory that is left, by files of a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_gr.negatives.host_memory import available_host_memory, host_empty


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    write(tmp_path, proc__meminfo="MemTotal: 9000 kB\nMemAvailable:   1000 kB\n")
    return tmp_path


def group(folder: Path, limit: str, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_without_control_groups_it_is_the_systems(system: Path) -> None:
    assert available_host_memory(system) == 1000 * 1024


def test_without_a_list_of_memory_it_is_what_the_system_calls_free(tmp_path: Path) -> None:
    assert available_host_memory(tmp_path) > 0


def test_the_tightest_group_around_the_process_counts(system: Path) -> None:
    write(system, proc__self__cgroup="0::/outer/inner\n")
    top = system / "sys/fs/cgroup"
    group(top / "outer/inner", "max", 700, 0)
    assert available_host_memory(system) == 1000 * 1024
    group(top / "outer", "5000", 4000, 300)
    assert available_host_memory(system) == 5000 - 4000 + 300
    group(top / "outer/inner", "900", 700, 0)
    assert available_host_memory(system) == 200
    group(top / "outer/inner", "900", 950, 0)
    assert available_host_memory(system) == 0
    group(system / "sys/fs", "1", 1, 0)  # not a group
    group(top / "outer/inner", "max", 700, 0)
    assert available_host_memory(system) == 1300


def test_groups_of_the_first_version(system: Path) -> None:
    write(system, proc__self__cgroup="9:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n")
    folder = system / "sys/fs/cgroup/memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("4096\n")
    (folder / "memory.usage_in_bytes").write_text("4000\n")
    (folder / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 40\n")
    assert available_host_memory(system) == 136


def test_a_group_that_shows_no_files_is_passed_over(system: Path) -> None:
    write(system, proc__self__cgroup="0::/gone\n")
    assert available_host_memory(system) == 1000 * 1024


def test_a_matrix_for_a_cpu_is_ordinary_memory() -> None:
    matrix = host_empty(3, 2, dtype=torch.float16, device=torch.device("cpu"))
    assert matrix.shape == (3, 2)
    assert matrix.dtype == torch.float16
    assert not matrix.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_matrix_for_a_gpu_is_pinned() -> None:
    assert host_empty(3, 2, dtype=torch.float32, device=torch.device("cuda")).is_pinned()
