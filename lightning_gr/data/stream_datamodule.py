"""StreamDataModule: continuous training, a day an epoch, evaluated on the day after."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_gr.data.finished_epoch import leave_finished_epoch
from lightning_gr.data.longest_sample import LongestSample
from lightning_gr.data.stream import EventStream, ParquetDays, wait_for_day
from lightning_gr.data.stream_loader import StreamLoader
from lightning_gr.substrate import require_torchrec

log = logging.getLogger(__name__)


class StreamDataModule(pl.LightningDataModule):
    """Trains on day d in epoch d, evaluates on day d + 1, and goes on where the log goes on.

    A run that is resumed from its checkpoint continues with the first day, block and user not yet trained on. Where the
    next day is not complete in time, training stops as if it had reached `max_epochs`.

    Args:
        folder: a growing folder, see `lightning_gr.data.ParquetDays`; or None with `stream`.
        stream: days from elsewhere: anything with the two methods of `lightning_gr.data.EventStream`.
        num_items: item rows; ids are 0 ... num_items - 1. None takes raw ids as they come, any int64 or text, which
            becomes a 64-bit hash; the model then needs `dynamic_tables`.
        global_tokens: token budget of a global batch, on all ranks together.
        max_length: longest sample in tokens; longer histories keep the most recent.
        wait_s: seconds to wait for a day that is not complete.
        poll_s: seconds between looks.
        num_workers: 1 reads and collates in a background process.

    Raises:
        MisconfigurationException: not exactly one of `folder` and `stream` is given.
    """

    def __init__(
        self,
        *,
        folder: str | None = None,
        stream: EventStream | None = None,
        num_items: int | None = None,
        global_tokens: int = 8192,
        max_length: int = 200,
        wait_s: float = 0.0,
        poll_s: float = 10.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if (folder is None) == (stream is None):
            raise MisconfigurationException(
                f"folder={folder!r}, stream={stream!r}: give the one or the other of StreamDataModule"
            )
        self.folder, self._stream = folder, stream
        self.num_items, self.raw_ids = num_items, num_items is None
        self.global_tokens, self.max_length = global_tokens, max_length
        self.wait_s, self.poll_s, self.num_workers = wait_s, poll_s, num_workers

    @override
    def setup(self, stage: str | None = None) -> None:
        require_torchrec()
        if self._stream is None:
            assert self.folder is not None
            self._stream = ParquetDays(self.folder)

    def longest_sample(self, part: str, *, above: int) -> LongestSample | None:
        """What the settings allow, if it is more than `above` tokens: how long a stream's samples are nobody knows."""
        if self.max_length <= above:
            return None
        made_of = f"samples of the stream may have up to {self.max_length} tokens"
        remedy = f"lower the data's max_length={self.max_length} to {above}"
        return LongestSample(self.max_length, made_of, remedy, known=False)

    def _day(self, ahead: int) -> tuple[int, str] | None:
        """The day of the current epoch or one after it; every rank takes rank 0's word for it."""
        assert self._stream is not None
        trainer = self.trainer
        number = ahead + (0 if trainer is None else trainer.current_epoch)
        name = None
        if trainer is None or trainer.is_global_zero:
            name = wait_for_day(self._stream, number, wait_s=0 if ahead else self.wait_s, poll_s=self.poll_s)
        if trainer is not None:
            name = trainer.strategy.broadcast(name)
        if name is None:
            log.info("day %d is not complete yet; %s", number + 1, "not evaluated" if ahead else "training stops")
            if trainer is not None and not ahead:
                trainer.should_stop = True
            return None
        return number, name

    def _loader(self, ahead: int) -> StreamLoader:
        trainer = self.trainer

        def day() -> tuple[int, str] | None:
            # Asked for when training begins, since the strategy chooses the mode after the loader is made.
            if trainer is not None and not ahead and loader.mode == "planned" and trainer.accumulate_grad_batches != 1:
                raise MisconfigurationException(
                    f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a stream that is shared batch by "
                    "batch does not know the labels of the batches to come; set balancing.mode of the strategy "
                    "sequence_balanced to local or exchange, or raise global_tokens instead"
                )
            return self._day(ahead)

        assert self._stream is not None
        loader = StreamLoader(
            self._stream,
            day,
            global_tokens=self.global_tokens,
            max_length=self.max_length,
            raw_ids=self.raw_ids,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            num_workers=self.num_workers,
            lookahead=0 if ahead else 1,
        )
        return loader

    @override
    def train_dataloader(self) -> StreamLoader:
        if self.trainer is not None:
            leave_finished_epoch(self.trainer, unsized=True)
        return self._loader(0)

    @override
    def val_dataloader(self) -> StreamLoader:
        return self._loader(1)
