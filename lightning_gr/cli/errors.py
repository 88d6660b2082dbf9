"""A user's mistake becomes one line on stderr: ``lightning-gr: error: <culprit>: <what>; <remedy>``."""

from __future__ import annotations

import argparse
import dis
import errno
import os
import re
import sys
import sysconfig
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from typing_extensions import override

USER_ERROR = 2
"""Exit code of a user's mistake, as argparse has it."""

TRACEBACK_VARIABLE = "LIGHTNING_GR_TRACEBACK"
_SHOW = f"{TRACEBACK_VARIABLE}=1 shows where"
_SECONDS_FOR_RANK_ZERO = 2.0
_OUR_PACKAGES = {"lightning_gr"}
_LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_MISTAKES = (ValueError, ImportError, *_FILES)


class UserError(Exception):
    """A user's mistake, already in one line: the culprit, what is wrong with it, the remedy."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    @override
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.removeprefix('lightning-gr ')}: {message}; see {self.prog} --help")


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks."""
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def report(line: str) -> None:
    """Prints the one line; ranks above 0 give rank 0, which normally says the same, time to end them first."""
    rank = next((value for name in ("RANK", "LOCAL_RANK") if (value := os.environ.get(name)) is not None), "0")
    prefix = ""
    if rank != "0":
        time.sleep(_SECONDS_FOR_RANK_ZERO)
        prefix = f"[rank {rank}] "
    sys.stderr.write(f"{prefix}lightning-gr: error: {line}\n")
    sys.stderr.flush()


def one_line(error: BaseException) -> str | None:
    """The line for an exception that is a user's mistake; None for anything else, which keeps its traceback.

    A mistake is an error that lightning-gr, Lightning or the user's own code *raises*: the innermost frame decides, and
    an exception that the interpreter raises there (a failed unpacking, say) is a bug. One raised inside torch or any
    other library is a bug too. Lightning raises a `TypeError` for some settings; anywhere else that is a bug.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, argparse.ArgumentError):
        from lightning_gr.cli.parse_errors import boil

        return boil(str(error))
    outermost, error = error, _unwrapped(error)
    misconfigured = any(cls.__name__ == "MisconfigurationException" for cls in type(error).__mro__)
    disk_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    frame = _innermost(error)
    if frame is None:
        return None
    package = frame.tb_frame.f_globals.get("__name__", "").partition(".")[0]
    of_lightning = isinstance(error, TypeError) and package in _LIGHTNING
    mistake = misconfigured or disk_full or of_lightning or isinstance(error, _MISTAKES)
    if not mistake or isinstance(error, UnicodeError):
        return None
    if isinstance(error, (ValueError, TypeError)) and not _raised_by_statement(frame):
        return None
    if package == "jsonargparse" and isinstance(error, ValueError):
        from lightning_gr.cli.parse_errors import boil

        # What a constructor of ours said, where a setting may be of several types.
        said = (line.strip().removeprefix("- ") for line in str(outermost).splitlines())
        own = next((line for line in said if re.match(r"[\w.]+=.*: ", line)), None)
        return own or boil(str(outermost))
    file = frame.tb_frame.f_code.co_filename
    if package not in _OUR_PACKAGES | _LIGHTNING and _is_library(file):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        top = error.name.partition(".")[0]
        return None if top in _OUR_PACKAGES else f"{top}: not installed; lightning-gr doctor says how to get it"
    line = " ".join(_message(error).split())
    if package in _OUR_PACKAGES:
        return line
    return f"{line} (raised in {os.path.basename(file)}, line {frame.tb_lineno}; {_SHOW})"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}; give another path"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _unwrapped(error: BaseException) -> BaseException:
    """What a constructor raised, where jsonargparse has wrapped it in its own error while instantiating classes."""
    while isinstance(error, ValueError) and error.__cause__ is not None:
        frame = _innermost(error)
        if frame is None or frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] != "jsonargparse":
            break
        error = error.__cause__
    return error


def _innermost(error: BaseException) -> TracebackType | None:
    """The frame that raised; for errors of the file system, the one that called the standard library or fsspec."""
    frames = []
    frame = error.__traceback__
    while frame is not None:
        frames.append(frame)
        frame = frame.tb_next
    if isinstance(error, OSError):
        while len(frames) > 1 and _opens_files(frames[-1].tb_frame.f_globals.get("__name__", "")):
            frames.pop()
    return frames[-1] if frames else None


def _opens_files(module: str) -> bool:
    top = module.partition(".")[0]
    return top == "fsspec" or top in sys.stdlib_module_names


def _raised_by_statement(frame: TracebackType) -> bool:
    code = frame.tb_frame.f_code.co_code
    return dis.opname[code[frame.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _is_library(file: str) -> bool:
    """Whether a source file was installed (or belongs to Python) rather than written by the user."""
    if file.startswith("<"):
        return file.startswith("<frozen")
    paths = sysconfig.get_paths()
    path = Path(file).resolve()
    return any(
        path.is_relative_to(Path(paths[key]).resolve()) for key in ("stdlib", "platstdlib", "purelib", "platlib")
    )
