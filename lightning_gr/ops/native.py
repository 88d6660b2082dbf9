"""C++ beside an operator: compiled once for this processor by the machine's own compiler, called by plain pointers.

No header of torch is needed, so a source compiles in seconds and the library fits every version of torch. It runs its
loops by OpenMP on the threads that torch has started. Where there is no compiler, operators run their PyTorch path.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch  # its OpenMP library must be the one loaded  # noqa: F401

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",  # without it a clamp is a branch, and a loop with branches stays scalar
    "-fPIC",
    "-fopenmp",
    "-Wno-psabi",
)
_INCLUDED = re.compile(r'^#include "(.+)"', re.MULTILINE)


@cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The compiled functions of a C++ file, from the cache where this processor's are there.

    The cache is ``$LIGHTNING_GR_CACHE``, else ``$XDG_CACHE_HOME/lightning_gr``, else ``~/.cache/lightning_gr``.
    ``LIGHTNING_GR_NATIVE=0`` turns compiled code off; ``CXX`` names the compiler.

    Args:
        source: the file; its functions are ``extern "C"``. It may include headers of ours by a path relative to it.

    Returns:
        The library, or None, with one warning, where it cannot be compiled.
    """
    if os.environ.get("LIGHTNING_GR_NATIVE") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        _warn(source, "no C++ compiler was found; install g++, or set CXX")
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
        key = "\n".join([_text_with_headers(source), version, _processor(), *_FLAGS])
        library = _cache_directory() / f"{source.parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        if not library.exists():
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        _warn(source, f"{compiler}: {lines[0] if lines else error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        _warn(source, str(error))
    return None


def _text_with_headers(source: Path) -> str:
    """A file and, behind it, what it includes of ours, so that a changed header is a changed operator."""
    text = source.read_text()
    return "\n".join([text, *(_text_with_headers(source.parent / name) for name in _INCLUDED.findall(text))])


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Into a file of its own, renamed when whole: several processes may do this at once, or be killed."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        partial, whole = Path(directory, "part.o"), Path(directory, library.name)
        run = {"capture_output": True, "text": True, "check": True}
        subprocess.run([compiler, *_FLAGS, "-c", str(source), "-o", str(partial)], **run)  # type: ignore[call-overload]
        # OpenMP's library is not named here: torch has loaded its own, and a second one would start more threads.
        subprocess.run([compiler, "-shared", str(partial), "-o", str(whole)], **run)  # type: ignore[call-overload]
        os.replace(whole, library)


def _cache_directory() -> Path:
    if given := os.environ.get("LIGHTNING_GR_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_gr")


def _processor() -> str:
    """What ``-march=native`` depends on, so that a shared home directory serves several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _warn(source: Path, reason: str) -> None:
    warnings.warn(
        f"{source.parent.name}: the compiled operator is not available ({reason}); the slower PyTorch path runs",
        stacklevel=3,
    )
