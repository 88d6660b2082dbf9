"""SequenceDataModule: from the path of an event log to planned batches of every split."""

from __future__ import annotations

import logging
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loops.loop import _Loop
from typing_extensions import override

from lightning_gr.data.interactions import Interactions
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.plan import GlobalBatchPlan
from lightning_gr.data.readers import LogFormat, read_events
from lightning_gr.data.source import RetrievalSource, Split
from lightning_gr.substrate import require_torchrec

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)


def _leave_finished_epoch(trainer: pl.Trainer) -> None:
    """Lets a run resumed from the end of an epoch begin the next one.

    Lightning 2.6 does so by itself only without ``max_steps``: with it, every load counts as a restart within an epoch,
    and the run trains one batch too many in the finished epoch and then skips the epoch that is due.
    """
    progress = getattr(getattr(trainer, "fit_loop", None), "epoch_progress", None)
    if progress is None or not trainer.fit_loop.restarting:
        return
    current = progress.current
    if current.ready == current.started == current.processed:
        # The loop's own setter would keep the restart; this one is that of every other loop, and reaches its children.
        _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]


class SequenceDataModule(pl.LightningDataModule):
    """Reads an event log, splits it leave-one-out, and gives every rank its share of planned global batches.

    Args:
        path: the log; see `lightning_gr.data.read_events` for the forms.
        format: form of the log; `auto` looks at its content.
        global_tokens: token budget of a global training batch, on all ranks together, so that training does not depend
            on their number.
        eval_global_tokens: the same for validation, test and predict; None means `global_tokens`.
        max_length: longest history in tokens; longer ones keep the most recent.
        num_workers: background processes that collate.
        seed: seed of the shuffle; None means the run's (`seed_everything`), or 0 where it has none.
        predict_from: whose next item `predict` ranks: after the whole history, or after the history of the test item.

    Attributes:
        num_items: items in the log, after `setup`.
        item_ids: raw item id of each row.
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
        num_workers: int = 0,
        seed: int | None = None,
        predict_from: Literal["all", "test"] = "all",
    ) -> None:
        super().__init__()
        settings = (("max_length", max_length, 1), ("num_workers", num_workers, 0))
        for name, value, least in settings:
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}")
        if predict_from not in ("all", "test"):
            raise ValueError(f"predict_from={predict_from!r}: expected all or test")
        self.path, self.format = path, format
        self.global_tokens = global_tokens
        self.eval_global_tokens = global_tokens if eval_global_tokens is None else eval_global_tokens
        self.max_length, self.num_workers, self.seed = max_length, num_workers, seed
        self.predict_from: Split = predict_from
        self._interactions: Interactions | None = None

    @override
    def setup(self, stage: str | None = None) -> None:
        require_torchrec()
        if self._interactions is not None:
            return
        self._interactions = Interactions.from_events(read_events(self.path, self.format))
        lengths = np.diff(self._interactions.offsets)
        log.info(
            "%s: %d users, %d items, %d events; %d users have fewer than 3 events and are not evaluated",
            self.path,
            len(lengths),
            self.num_items,
            len(self._interactions.items),
            int((lengths < 3).sum()),
        )

    @property
    def interactions(self) -> Interactions:
        """The log as arrays; read on first use."""
        if self._interactions is None:
            self.setup()
        assert self._interactions is not None
        return self._interactions

    @property
    def num_items(self) -> int:
        """Items in the log."""
        return self.interactions.num_items

    @cached_property
    def item_ids(self) -> Sequence[Any]:
        """Raw item id of each row."""
        ids: Sequence[Any] = self.interactions.item_ids.tolist()
        return ids

    @cached_property
    def users(self) -> Sequence[Any]:
        """Raw user id of each sample id."""
        ids: Sequence[Any] = self.interactions.users.tolist()
        return ids

    @property
    def fingerprint(self) -> str:
        """Digest of the log's content."""
        return self.interactions.fingerprint

    def _loader(self, split: Split, name: str) -> PlannedLoader:
        source = RetrievalSource(self.interactions, split=split, max_length=self.max_length)
        train = name == "train"
        plan = GlobalBatchPlan(
            token_counts=source.token_counts,
            label_counts=source.label_counts,
            global_tokens=self.global_tokens if train else self.eval_global_tokens,
            # Not torch's own seed, which a user may set differently on each rank.
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed,
            shuffle=train,
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

    @override
    def train_dataloader(self) -> PlannedLoader:
        if self.trainer is not None:
            _leave_finished_epoch(self.trainer)
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
