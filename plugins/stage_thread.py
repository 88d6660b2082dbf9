"""StageThread: a thread that does one call after another, for a stage of the pipeline or for the tables."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class StageThread:
    """Does one call after another; a daemon, so that a lost collective cannot keep the process alive.

    Once a call has failed, all later ones fail with its error: their collectives would meet other ranks' later ones.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._abandoned = False
        self._last: Future[Any] = done(lambda: None)
        threading.Thread(target=self._work, name=f"lightning-gr-{name}", daemon=True).start()

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

    def _work(self) -> None:
        failed: BaseException | None = None
        while (entry := self._calls.get()) is not None:
            future, call = entry
            if self._abandoned:
                failed = failed or RuntimeError("given up after a failure elsewhere")
            if failed is not None:
                future.set_exception(failed)
                continue
            settle(future, call)
            failed = future.exception()


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
