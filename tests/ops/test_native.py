"""C++ beside an operator: compiled once, by many processes at once, and done without where it cannot be."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_gr.ops.native import load_native

SOURCE = """
#include <omp.h>
extern "C" long twice(long x) {
  long total = 0;
#pragma omp parallel for reduction(+ : total)
  for (long i = 0; i < x; ++i) total += 2;
  return total;
}
"""
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")), reason="needs a C++ compiler"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LIGHTNING_GR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LIGHTNING_GR_NATIVE", raising=False)
    file = tmp_path / "operator" / "cpu.cpp"
    file.parent.mkdir()
    file.write_text(SOURCE)
    load_native.cache_clear()
    yield file
    load_native.cache_clear()


@needs_compiler
def test_a_source_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = load_native(source)
    assert library is not None
    library.twice.restype = ctypes.c_long
    assert library.twice(ctypes.c_long(1000)) == 2000
    (built,) = (source.parents[1] / "cache").iterdir()
    changed = built.stat().st_mtime_ns
    load_native.cache_clear()
    assert load_native(source) is not None
    assert [x.stat().st_mtime_ns for x in built.parent.iterdir()] == [changed]
    # Another source is another library, and the old one stays for whoever has it open.
    source.write_text(SOURCE.replace("+= 2", "+= 3"))
    load_native.cache_clear()
    other = load_native(source)
    assert other is not None
    assert other.twice(ctypes.c_long(10)) == 30
    assert len(list(built.parent.iterdir())) == 2


@needs_compiler
def test_a_changed_header_is_another_library(source: Path) -> None:
    source.write_text('#include "../headers/one.h"\n' + SOURCE.replace("+= 2", "+= FACTOR"))
    headers = source.parents[1] / "headers"
    headers.mkdir()
    (headers / "one.h").write_text('#include "two.h"\n')
    for factor in (5, 7):
        (headers / "two.h").write_text(f"#define FACTOR {factor}\n")
        load_native.cache_clear()
        library = load_native(source)
        assert library is not None
        assert library.twice(ctypes.c_long(10)) == 10 * factor
    (headers / "two.h").unlink()
    load_native.cache_clear()
    with pytest.warns(UserWarning, match="two.h"):
        assert load_native(source) is None


@needs_compiler
def test_processes_may_build_at_once(source: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from lightning_gr.ops.native import load_native; "
        "print(load_native(Path(sys.argv[1])).twice(21))"
    )
    command = [sys.executable, "-c", program, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["42"] * 3
    assert len(list((source.parents[1] / "cache").iterdir())) == 1


@needs_compiler
def test_a_source_that_does_not_compile_is_done_without(source: Path) -> None:
    source.write_text("this is not C++")
    with pytest.warns(UserWarning, match="operator: the compiled operator is not available .*error.*PyTorch path runs"):
        assert load_native(source) is None
    assert not any((source.parents[1] / "cache").iterdir())


def test_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler was found; install g\\+\\+, or set CXX"):
        assert load_native(source) is None
    load_native.cache_clear()
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.warns(UserWarning, match="/no/such/compiler"):
        assert load_native(source) is None


@needs_compiler
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_GR_CACHE", "/proc/cache")
    with pytest.warns(UserWarning, match="/proc/cache"):
        assert load_native(source) is None


def test_it_can_be_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setenv("LIGHTNING_GR_NATIVE", "0")
    assert load_native(source) is None
    assert not recwarn.list
