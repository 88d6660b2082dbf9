"""What a call of a StageThread held goes with it, and its thread ends before the interpreter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import weakref

import pytest

from lightning_gr.plugins import stage_thread
from lightning_gr.plugins.stage_thread import StageThread

# By its path, since all that the package imports takes long.
_LOAD = f"""
import importlib.util, threading, time
spec = importlib.util.spec_from_file_location("stage_thread", {stage_thread.__file__!r})
stage_thread = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage_thread)
"""


class _Held:
    """Stands for a tensor."""


def _ends_within(seconds: float, condition) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def _run(script: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _LOAD + textwrap.dedent(script)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_was_done_holds_nothing_while_the_thread_waits_for_the_next(fails):
    thread = StageThread("test")
    held = _Held()
    gone = weakref.ref(held)

    def call(own=held) -> None:
        del own
        if fails:
            raise ValueError("as asked")

    future = thread.submit(call)
    failure = future.exception()
    assert (failure is not None) is fails
    if failure is not None:
        failure.__traceback__ = None  # which holds the frame
    del call, held
    assert _ends_within(5.0, lambda: gone() is None)
    thread.close()
    assert thread.ended(5.0)


def test_a_closed_thread_does_what_was_handed_in_and_an_abandoned_one_fails_it():
    closed, abandoned = StageThread("closed"), StageThread("abandoned")
    closed.submit(lambda: time.sleep(0.05))
    last = closed.submit(lambda: 7)
    closed.close()
    assert last.result(5.0) == 7
    abandoned.submit(lambda: time.sleep(0.05))
    given_up = abandoned.submit(lambda: 7)
    abandoned.close(abandon=True)
    assert "given up" in str(given_up.exception(5.0))


def test_the_interpreter_ends_after_the_call_that_is_under_way():
    found = _run(
        """
        began = threading.Event()
        def call():
            began.set()
            time.sleep(0.3)
            print("call done", flush=True)
        stage_thread.StageThread("test").submit(call)
        began.wait()
        """
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "call done\n", "")


def test_a_call_that_never_ends_does_not_keep_the_process_alive():
    found = _run(
        """
        stage_thread._SECONDS_AT_EXIT = 0.2
        stage_thread.StageThread("test").submit(threading.Event().wait)
        """
    )
    assert (found.returncode, found.stderr) == (0, "")
