"""A command as a process forked from one that has made the imports, which cost every new interpreter seconds.

What the command starts by ``sys.executable`` is forked, too: ranks of Lightning's launcher and of torchrun, runs of
`lightning-gr compare`. A small process stands in for each: it has the arguments, pipes and signals of the interpreter
it is taken for, hands them to the `_Forker`, and ends as the forked process does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    *("lightning.pytorch.cli", "torchrec", "torch.distributed.optim", "torch.utils.tensorboard", "polars", "pyarrow"),
    *(f"lightning_gr.{name}" for name in ("callbacks", "data", "models", "plugins", "plugins.dynamic_sharding")),
    "lightning_gr.cli.training",
]
"""What processes of tests have imported when they start."""
STAND_IN = Path(__file__).with_name("forked_stand_in.py")
_python: dict[int, str] = {}


def python() -> str:
    """A file that takes words as this interpreter does and forks: ``-m module``, ``-c code`` or a script.

    One for each process that asks; it lasts as long as that process.
    """
    if (found := _python.get(os.getpid())) is None:
        folder = tempfile.TemporaryDirectory(prefix="forked-")
        found = _python[os.getpid()] = str(Path(folder.name, "python"))
        address = str(Path(folder.name, "socket"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(16)
        Path(found).write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{STAND_IN}" "{address}" "$@"\n')
        Path(found).chmod(0o700)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        lifeline, ours = context.Pipe(duplex=False)
        process = context.Process(target=_Forker, args=(listener, lifeline, found), name="forker")
        process.start()
        listener.close()
        lifeline.close()

        def end() -> None:
            ours.close()
            process.join(5)
            process.kill()
            folder.cleanup()

        atexit.register(end)
    return found


def run_command(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Does what ``subprocess.run`` does with a command of this interpreter, and captures its text.

    Args:
        command: this interpreter, then ``-m module``, ``-c code`` or a script, then arguments.
        cwd: folder to run in.
        env: its environment; None means this process's.
        timeout: seconds; a command that takes longer is killed.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    interpreter, *words = command
    assert interpreter == sys.executable, command
    return subprocess.run(
        [python(), *words], cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True, check=False
    )


class _Forker:
    """Forks a process for every stand-in that asks, tells it how the process ended, and kills what has lost its own.

    Args:
        listener: where stand-ins connect.
        lifeline: its other end closes with the process that asked for this one.
        interpreter: what forked processes take for the interpreter.
    """

    def __init__(self, listener: socket.socket, lifeline: Connection, interpreter: str) -> None:
        self._interpreter, self._listener = interpreter, listener
        self._living: dict[socket.socket, Any] = {}
        # Signals of the terminal are for those who wait.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(lifeline, selectors.EVENT_READ)
        while True:
            # Without end only where none lives: the stand-in of one that has ended unseen would wait for ever.
            ready = [key.fileobj for key, _ in self._selector.select(0.03 if self._living else None)]
            self._bury()
            if lifeline in ready:
                break
            if listener in ready:
                self._fork(listener.accept()[0])
            for stand_in in self._living.keys() & set(ready):
                self._hear(stand_in)
        for process in self._living.values():
            _kill_group(process.pid)

    def _fork(self, stand_in: socket.socket) -> None:
        size, files, *_ = socket.recv_fds(stand_in, 8, 3)
        try:
            asked = json.loads(_receive(stand_in, int.from_bytes(size, "big")))
        except ConnectionError:
            stand_in.close()
            return
        ours = [self._listener, self._selector, stand_in, *self._living]
        process = multiprocessing.get_context("fork").Process(
            target=_become, args=(asked, files, self._interpreter, ours)
        )
        process.start()
        for file in files:
            os.close(file)
        self._living[stand_in] = process
        self._selector.register(stand_in, selectors.EVENT_READ)

    def _hear(self, stand_in: socket.socket) -> None:
        process = self._living[stand_in]
        number = stand_in.recv(1)
        if not number:
            _kill_group(process.pid)
            self._forget(stand_in)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number[0])

    def _bury(self) -> None:
        for stand_in, process in list(self._living.items()):
            if process.exitcode is not None:
                with contextlib.suppress(OSError):
                    stand_in.sendall(process.exitcode.to_bytes(4, "big", signed=True))
                self._forget(stand_in)

    def _forget(self, stand_in: socket.socket) -> None:
        self._selector.unregister(stand_in)
        stand_in.close()
        del self._living[stand_in]


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        if not (part := connection.recv(min(size, 65536))):
            raise ConnectionError("the stand-in has gone")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _become(asked: dict[str, Any], files: list[int], interpreter: str, ours: list[Any]) -> None:
    """Makes this process what the interpreter would have been."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for one in ours:
        one.close()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(os.dup(number), "w" if number else "r", buffering=1) for number in range(3)
    )
    sys.executable = interpreter
    # A command that wants a server to fork from has the one that it comes from, which has made the imports.
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[attr-defined]
    words = asked["words"]
    kind = words[0] if words[0] in ("-m", "-c") else "script"
    sys.argv = {"-m": words[1:], "-c": ["-c", *words[2:]]}.get(kind, words)
    first = os.path.dirname(os.path.abspath(words[0])) if kind == "script" else os.getcwd()
    sys.path[:0] = [first, *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))]
    try:
        if kind == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
