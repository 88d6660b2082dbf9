"""RebatchedLoader: a rank's own training loader, its batches made into global ones by local or exchange balancing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.balancing.global_batches import GlobalBatches
from lightning_gr.balancing.partition import Method
from lightning_gr.batch import SequenceBatch
from lightning_gr.data.stream_loader import StreamLoader

if TYPE_CHECKING:
    import torch.distributed as dist


class RebatchedLoader:
    """Every rank iterates over its own data and gets as many batches as the others, weighted by the labels of all.

    It has no length, since ranks only find out together when the last one has run out.

    Args:
        loader: this rank's own data, as `SequenceBatch`es; a `StreamLoader` is told to read this rank's share.
        mode: `local` leaves sequences where they are, `exchange` reallocates them by cost.
        group: a CPU process group that nothing else uses.
        accumulate: asked when an iteration begins: batches that make one optimizer step.
        tokens_per_rank: token budget of a rank's batch; None takes batches as they come.
        cost: what a sequence costs.
        method: the partitioner of mode `exchange`.
    """

    def __init__(
        self,
        loader: Any,
        *,
        mode: Literal["local", "exchange"],
        group: dist.ProcessGroup,
        accumulate: Callable[[], int],
        tokens_per_rank: int | None,
        cost: SequenceCost,
        method: Method,
    ) -> None:
        self.loader, self._mode, self._group = loader, mode, group
        self._accumulate, self._tokens_per_rank = accumulate, tokens_per_rank
        self._cost, self._method = cost, method
        if isinstance(loader, StreamLoader):
            loader.share(mode, tokens_per_rank=tokens_per_rank)
            self.__class__ = _RebatchedStream

    def __getattr__(self, name: str) -> Any:
        # Before __init__, as copy and pickle look for it; and a loader of the user's has drawn more than was trained.
        if name in ("loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[SequenceBatch]:
        stream = self.loader if isinstance(self.loader, StreamLoader) else None
        batches = GlobalBatches(
            self.loader,
            mode=self._mode,
            group=self._group,
            accumulate=self._accumulate(),
            tokens_per_rank=None if stream is not None else self._tokens_per_rank,
            cost=self._cost,
            method=self._method,
            cursor=None if stream is None else stream.cursor,
        )
        for batch in batches:
            if stream is not None:
                stream.handed_out(batches.cursors)
            yield batch
        if stream is not None:
            stream.handed_out(None)


class _RebatchedStream(RebatchedLoader):
    """Of a stream, whose cursors travel with the batches."""

    def state_dict(self) -> dict[str, Any]:
        """Every rank's position after the last batch handed out."""
        state: dict[str, Any] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues there; see `StreamLoader.load_state_dict`."""
        self.loader.load_state_dict(state)
