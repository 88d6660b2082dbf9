"""SequenceDataModule: from the path of an event store or log to planned batches of every split."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from typing_extensions import override

from lightning_gr.data.event_store import EventStore, is_store
from lightning_gr.data.finished_epoch import leave_finished_epoch
from lightning_gr.data.interactions import Interactions
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.longest_sample import LongestSample
from lightning_gr.data.plan import GlobalBatchPlan
from lightning_gr.data.raw_ids import raw_key
from lightning_gr.data.readers import LogFormat, read_events
from lightning_gr.data.source import LongHistories, RetrievalSource, SequenceSource
from lightning_gr.data.splits import Part, Split
from lightning_gr.substrate import require_torchrec

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]
log = logging.getLogger(__name__)


class SequenceDataModule(pl.LightningDataModule):
    """Splits an event store or log and gives every rank its share of planned global batches.

    Args:
        path: a store that `lightning-gr prepare` made, or a small log, which is read into memory; see
            `lightning_gr.data.read_events` for its forms.
        format: form of a log; `auto` looks at its content.
        global_tokens: token budget of a global training batch, on all ranks together, so that training does not depend
            on their number.
        eval_global_tokens: the same for validation, test and predict; None means `global_tokens`.
        max_length: longest sample in tokens.
        long_histories: in training, `truncate` keeps the most recent `max_length` tokens of a longer history; `split`
            makes further samples of the tokens before them.
        split: what is held out: `LeaveOneOut` (where None), `ByTime` or `ByUser`.
        features: further fields of the store's events and users that batches carry.
        shuffle_window: users that are shuffled together after the row groups are; they are in memory at a time.
        num_workers: background processes that collate.
        seed: seed of the shuffle; None means the run's (`seed_everything`), or 0 where it has none.
        predict_from: whose next item `predict` ranks: after the whole history, or after the history of the test item.
        raw_ids: batches carry raw item ids, text as 64-bit hashes, instead of rows; models then need `dynamic_tables`.

    Attributes:
        num_items: items in the log, after `setup`.
        item_ids: raw item id of each row.
        item_keys: with `raw_ids`, the int64 that batches carry for each row; None without.
        users: raw user id of each sample id.
        fingerprint: digest of the log's content.

    Raises:
        FileNotFoundError: the log is not there.
        ValueError: the log or a setting cannot be used; the message names it.
    """

    def __init__(
        self,
        *,
        path: str,
        format: LogFormat = "auto",
        global_tokens: int = 8192,
        eval_global_tokens: int | None = None,
        max_length: int = 200,
        long_histories: LongHistories = "truncate",
        split: Split | None = None,
        features: list[str] | None = None,
        shuffle_window: int = 1 << 16,
        num_workers: int = 0,
        seed: int | None = None,
        predict_from: Literal["all", "test"] = "all",
        raw_ids: bool = False,
    ) -> None:
        super().__init__()
        settings = (
            ("max_length", max_length, 1),
            ("num_workers", num_workers, 0),
            ("shuffle_window", shuffle_window, 1),
        )
        for name, value, least in settings:
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if predict_from not in ("all", "test"):
            raise ValueError(f"predict_from={predict_from!r}: expected all or test")
        self.path, self.format = path, format
        self.global_tokens = global_tokens
        self.eval_global_tokens = global_tokens if eval_global_tokens is None else eval_global_tokens
        self.max_length, self.num_workers, self.seed = max_length, num_workers, seed
        self.long_histories: LongHistories = long_histories
        self.split, self.features, self.shuffle_window = split, tuple(features or ()), shuffle_window
        self.predict_from: Literal["all", "test"] = predict_from
        self.raw_ids = raw_ids
        self._table: EventStore | Interactions | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        require_torchrec()
        if self._table is not None:
            return
        if is_store(self.path) or Path(self.path).is_dir():
            self._table = EventStore(self.path)
        else:
            self._table = Interactions.from_events(read_events(self.path, self.format))
        lengths = self._table.lengths
        log.info(
            "%s: %d users, %d items, %d events; %d users have fewer than 3 events",
            self.path,
            len(lengths),
            self.num_items,
            int(lengths.sum(dtype=np.int64)),
            int((lengths < 3).sum()),
        )

    @property
    def table(self) -> EventStore | Interactions:
        """The store, or the log in memory; opened on first use."""
        if self._table is None:
            self.setup()
        assert self._table is not None
        return self._table

    @property
    def num_items(self) -> int:
        """Items in the log."""
        return self.table.num_items

    @cached_property
    def item_ids(self) -> Sequence[Any]:
        """Raw item id of each row."""
        ids: Sequence[Any] = self.table.item_ids.tolist()
        return ids

    @cached_property
    def item_keys(self) -> Array | None:
        """With `raw_ids`, the int64 that batches carry for each item row; None without."""
        return raw_key(self.table.item_ids) if self.raw_ids else None

    @cached_property
    def users(self) -> Sequence[Any]:
        """Raw user id of each sample id."""
        ids: Sequence[Any] = self.table.users.tolist()
        return ids

    @property
    def fingerprint(self) -> str:
        """Digest of the log's content."""
        return self.table.fingerprint

    def _source(self, part: Part | Literal["all"]) -> SequenceSource:
        return RetrievalSource(
            self.table,
            part=part,
            max_length=self.max_length,
            split=self.split,
            long_histories=self.long_histories,
            features=self.features,
            item_keys=self.item_keys,
        )

    @cached_property
    def _item_counts(self) -> torch.Tensor:
        source = self._source("train")
        if not isinstance(source, RetrievalSource):
            raise ValueError(f"{type(self).__name__}: its samples have no next item as label, so none can be counted")
        return torch.from_numpy(source.item_label_counts())

    def training_item_counts(self) -> torch.Tensor:
        """int64 (I,): how often each item row is a label of the training part; counted once, in one pass over the log.

        Raises:
            ValueError: labels are not items.
        """
        return self._item_counts

    def _loader(self, part: Part | Literal["all"], name: str) -> PlannedLoader:
        source = self._source(part)
        train = name == "train"
        plan = GlobalBatchPlan(
            source,
            global_tokens=self._budget(source, name),
            # Not torch's own seed, which a user may set differently on each rank.
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
            shuffle=train,
            window_rows=self.shuffle_window,
            budget_name="global_tokens" if train else "eval_global_tokens",
        )
        trainer = self.trainer
        return PlannedLoader(
            source,
            plan,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            accumulate=trainer.accumulate_grad_batches if train and trainer is not None else 1,
            num_workers=self.num_workers,
            name=name,
        )

    def _budget(self, source: SequenceSource, name: str) -> int:
        """Most tokens of a global batch of a loader."""
        return self.global_tokens if name == "train" else self.eval_global_tokens

    def longest_sample(self, part: Part | Literal["predict"], *, above: int) -> LongestSample | None:
        """The longest sample of a part if it is longer than `above` positions, else None."""
        if self.max_length <= above:
            return None
        source = self._source(self.predict_from if part == "predict" else part)
        longest = 0
        for first in range(0, source.num_rows, 1 << 20):
            _, tokens = source.samples(first, min(first + (1 << 20), source.num_rows))
            longest = max(longest, int(tokens.max(initial=0)))
        if longest <= above:
            return None
        made_of = f"the longest sample ({part}) of {self.path} has {longest} tokens"
        return LongestSample(longest, made_of, f"lower the data's max_length={self.max_length} to {above}")

    @override
    def train_dataloader(self) -> PlannedLoader:
        if self.trainer is not None:
            leave_finished_epoch(self.trainer)
        return self._loader("train", "train")

    @override
    def val_dataloader(self) -> PlannedLoader:
        return self._loader("val", "val")

    @override
    def test_dataloader(self) -> PlannedLoader:
        return self._loader("test", "test")

    @override
    def predict_dataloader(self) -> PlannedLoader:
        return self._loader(self.predict_from, "predict")
