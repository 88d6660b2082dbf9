"""TrainedStateLoader: a user's loader without a length, whose saved state is that of the batch that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class TrainedStateLoader:
    """Iterates like the loader inside, which has a state and no length.

    Lightning takes one batch more from such a loader before it trains the one at hand, so that the loader's own state
    would be one batch ahead.

    Args:
        loader: what to iterate over.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._state: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # before __init__, as copy and pickle look for it
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        # Here and now: a DataLoader takes a number out of torch's generator for each iterator.
        return self._batches(iter(self.loader))

    def _batches(self, inner: Iterator[Any]) -> Iterator[Any]:
        while True:
            before = self.loader.state_dict()
            try:
                batch = next(inner)
            except StopIteration:
                self._state = None  # the last batch is in training, and nothing was taken behind it
                return
            self._state = before
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """That of the loader inside before it gave the batch that waits."""
        state: dict[str, Any] = self.loader.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Passes the state on to the loader inside."""
        self._state = None
        self.loader.load_state_dict(state)
