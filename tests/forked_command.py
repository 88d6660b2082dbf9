"""A command as a process forked from one that has made the imports, which cost every new interpreter seconds."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = [
    *("lightning.pytorch.cli", "torchrec"),
    *(f"lightning_gr.{name}" for name in ("callbacks", "data", "models", "plugins", "plugins.dynamic_sharding")),
]
"""What processes of tests have imported when they start."""


def run_command(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Does what ``subprocess.run`` does with a command of this interpreter, and captures its text.

    Args:
        command: this interpreter, then ``-m module``, ``-c code`` or a script, then arguments. What it starts are
            new interpreters.
        cwd: folder to run in.
        env: its environment; None means this process's.
        timeout: seconds; a command that takes longer is killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    interpreter, *words = command
    assert interpreter == sys.executable, command
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = context.Process(
            target=_become, args=(words, str(cwd), dict(os.environ if env is None else env), [*map(str, files)])
        )
        process.start()
        process.join(timeout)
        said = [file.read_text() if file.exists() else "" for file in files]
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(command), timeout, *said)
        return subprocess.CompletedProcess(list(command), process.exitcode, *said)


def _become(words: list[str], cwd: str, env: dict[str, str], files: list[str]) -> None:
    """Makes this process what the interpreter would have been."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    kind = words[0] if words[0] in ("-m", "-c") else "script"
    sys.argv = {"-m": words[1:], "-c": ["-c", *words[2:]]}.get(kind, words)
    first = os.path.dirname(os.path.abspath(words[0])) if kind == "script" else os.getcwd()
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if kind == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
