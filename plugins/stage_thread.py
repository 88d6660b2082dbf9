"""StageThread: a thread that does one call after another, for a stage of the pipeline or for the tables."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_SECONDS_AT_EXIT = 5.0


class StageThread:
    """Does one call after another; a daemon, so that a lost collective cannot keep the process alive.

    Once a call has failed, all later ones fail with its error: their collectives would meet other ranks' later ones.

    A daemon that wants the interpreter's lock after its end is ended inside C++, where torch frees a tensor, and that
    aborts the process. So what a call held goes with the call, and threads are ended before the interpreter.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._abandoned = False
        self._last: Future[Any] = done(lambda: None)
        self._thread = threading.Thread(target=self._work, name=f"lightning-gr-{name}", daemon=True)
        self._thread.start()
        _threads.add(self)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Hands in a call."""
        future: Future[Any] = Future()
        self._last = future
        self._calls.put((future, call))
        return future

    def join(self) -> None:
        """Waits for all calls that were handed in; raises the error of one that failed."""
        self._last.result()

    def close(self, *, abandon: bool = False) -> None:
        """Ends the thread after the calls that were handed in; to abandon them, they fail instead of beginning."""
        self._abandoned = abandon
        self._calls.put(None)

    def ended(self, seconds: float) -> bool:
        """Waits so long for the thread's end; whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        failed: BaseException | None = None
        while (entry := self._calls.get()) is not None:
            if self._abandoned:
                failed = failed or RuntimeError("given up after a failure elsewhere")
            failed = _settled(*entry, failed)
            del entry


_threads: weakref.WeakSet[StageThread] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Ends all threads, but for one that a lost collective keeps."""
    threads, deadline = list(_threads), time.monotonic() + _SECONDS_AT_EXIT
    for thread in threads:
        thread.close(abandon=True)
    for thread in threads:
        thread.ended(max(deadline - time.monotonic(), 0.0))


def _settled(future: Future[Any], call: Callable[[], Any], failed: BaseException | None) -> BaseException | None:
    """Does a call, or has it fail as one before it; the error."""
    if failed is not None:
        future.set_exception(failed)
        return failed
    settle(future, call)
    return future.exception()


def done(call: Callable[[], Any]) -> Future[Any]:
    """What a call returns, or raises, as a future that is done."""
    future: Future[Any] = Future()
    settle(future, call)
    return future


def settle(future: Future[Any], call: Callable[[], Any]) -> None:
    """Does a call, whose result or error the future gets."""
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
