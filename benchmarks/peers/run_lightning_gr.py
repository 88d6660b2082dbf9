"""HSTU of this project under Lightning's Trainer; see peer_run."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import numpy as np
import torch
from peer_log import Array, Part, PeerLog
from peer_run import TOP_K, EnoughError, Meter, main
from typing_extensions import override

from lightning_gr.data import SequenceDataModule
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import RetrievalModule, WarmupSchedule
from lightning_gr.plugins import SequenceBalancedStrategy
from lightning_gr.substrate import require_torchrec

require_torchrec()
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
TEMPERATURE, DENSE_LR, TABLE_LR, DROPOUT, WARM_UP = 0.07, 0.004, 0.03, 0.3, 50
PARTS: tuple[Part, Part] = ("val", "test")


class ListedRetrieval(RetrievalModule):
    """Keeps each user's list in validation in place of the metrics; of the second loader those for the test."""

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        found = self.predict_step(batch, batch_idx)
        self.found[dataloader_idx].append((found["sample_ids"].cpu().numpy(), found["item_rows"].cpu().numpy()))

    @override
    def on_validation_epoch_start(self) -> None:
        self.found: tuple[list[tuple[Array, Array]], ...] = ([], [])

    @override
    def on_validation_epoch_end(self) -> None:
        """Metrics have seen nothing."""


class ListedData(SequenceDataModule):
    """Also gives the test's loader in validation."""

    @override
    def val_dataloader(self) -> Any:
        return [super().val_dataloader(), self.test_dataloader()]


class Clock(pl.Callback):
    """Tells a meter what Lightning does.

    Args:
        meter: that is told.
        system: whose lists are judged.
    """

    def __init__(self, *, meter: Meter, system: LightningGR) -> None:
        self.meter, self.system = meter, system

    @override
    def on_train_epoch_start(self, *_: Any) -> None:
        self.meter.begin()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.meter.step()

    @override
    def on_validation_start(self, *_: Any) -> None:
        self.meter.end()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = not self.meter.evaluate(self.system.lists)


class LightningGR:
    """One process, as the recipe hstu/amazon-beauty has it but for the size.

    Args:
        log: what is trained on.
        args: of `peer_run.parser`.
    """

    def __init__(self, log: PeerLog, args: argparse.Namespace) -> None:
        self.log = log
        pl.seed_everything(args.seed)
        sizes = {"dim": args.dim, "num_layers": args.layers, "num_heads": args.heads, "max_length": args.max_length}
        self.module = ListedRetrieval(
            encoder=HSTUEncoder(**sizes, dropout=DROPOUT, time_bias=False, position_bias="recency"),
            loss="full_softmax",
            similarity="cosine",
            temperature=TEMPERATURE,
            top_k=[TOP_K],
            optimizer=lambda params: torch.optim.AdamW(params, lr=DENSE_LR, weight_decay=0.0, fused=True),
            lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=WARM_UP),
        )
        self.data = ListedData(
            path=args.data, global_tokens=args.tokens, eval_global_tokens=16_384, max_length=args.max_length
        )
        self.data.setup()
        self.steps_per_epoch = 0  # known when training begins
        self.settings = f"hstu, full softmax, about {args.tokens} targets a batch, no padding, 1 process"

    def lists(self, part: Part) -> Array:
        """The ten best items of each user (U, 10), -1 where there are fewer."""
        lists_UK = np.full((len(self.log.sequences), TOP_K), -1)
        items = np.array([int(x) for x in self.data.item_ids])
        for users_B, rows_BK in self.module.found[PARTS.index(part)]:
            lists_UK[users_B] = np.where(rows_BK >= 0, items[rows_BK], -1)
        return lists_UK

    def train(self, epochs: int, meter: Meter) -> None:
        """See `peer_run.System`."""
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=SequenceBalancedStrategy(sparse_lr=TABLE_LR),
            max_epochs=epochs,
            limit_val_batches=0 if meter.seconds is not None else 1.0,
            num_sanity_val_steps=0,
            callbacks=[Clock(meter=meter, system=self)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(self.module, datamodule=self.data)
        except EnoughError:
            meter.note_peak()
            raise
        finally:
            self.steps_per_epoch = int(trainer.num_training_batches)


if __name__ == "__main__":
    main(LightningGR, packages=["torch", "lightning", "torchrec", "numpy"])
