"""What a fuzzed call may end with: a result, or a refusal in words; all else is a finding."""

from __future__ import annotations

import contextlib
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

SECONDS = 20.0
"""Time limit of an input."""


class Finding(AssertionError):
    """A call that neither worked nor refused its input in words, or that took in what it should have refused."""


class _TooLong(BaseException):
    """Raised in the call that is over its time."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Args:
        name: of the row in the table.
        what: in words.
        inputs: makes inputs; they can be pickled.
        check: tries one; returns `accepted` or `refused`, and raises `Finding` for anything else.
    """

    name: str
    what: str
    inputs: SearchStrategy[Any]
    check: Callable[[Any], str]


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Ends what takes longer; only in the main thread, and only between two bytecodes.

    Raises:
        Finding: it took longer.
    """

    def over(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TooLong as error:
        raise Finding(f"hangs: more than {seconds:g} s") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def refusal(call: Callable[[], Any], *, refusals: tuple[type[BaseException], ...] = (ValueError,)) -> str | None:
    """Calls, within the time limit.

    Args:
        call: what is fuzzed.
        refusals: exceptions that count as a refusal; a decoding error, though a ValueError, does not.

    Returns:
        The text of a refusal; None where the call has worked.

    Raises:
        Finding: the call ended with anything else, or its refusal has no text.
    """
    with time_limit():
        try:
            call()
        except (Finding, KeyboardInterrupt, SystemExit, _TooLong):
            raise
        except BaseException as error:  # polars' panics are no Exception
            if not isinstance(error, refusals) or isinstance(error, UnicodeError):
                raise Finding(f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}") from error
            if not str(error).strip():
                raise Finding(f"{type(error).__name__} without a word") from error
            return str(error)
    return None
