"""SASRec or HSTU of rectools, by its own model classes; see peer_run."""

from __future__ import annotations

import argparse
import logging
import warnings

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from peer_log import Array, Part, PeerLog
from peer_run import TOP_K, Meter, main, samples_of
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def interactions(histories: list[Array]) -> Dataset:
    """A log has no times: events of a user are a day apart."""
    lengths = [len(x) for x in histories]
    days = np.concatenate([np.arange(x) for x in lengths])
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: np.repeat(np.arange(len(histories)), lengths),
                Columns.Item: np.concatenate(histories),
                Columns.Weight: 1.0,
                Columns.Datetime: pd.Timestamp("2020-01-01") + pd.to_timedelta(days, unit="D"),
            }
        )
    )


class Rectools:
    """Training by epochs through ``fit_partial``, which keeps model and optimizer.

    Args:
        log: what is trained on.
        args: of `peer_run.parser`.
    """

    def __init__(self, log: PeerLog, args: argparse.Namespace) -> None:
        self.log = log
        self.users = samples_of(args.tokens, log)
        self.steps_per_epoch = -(-sum(len(x) >= 2 for x in log.train) // self.users)
        self.settings = f"{args.model}, full softmax, {self.users} users a batch, padded to {args.max_length}"
        sizes = {"n_blocks": args.layers, "n_heads": args.heads, "n_factors": args.dim}
        common = {"session_max_len": args.max_length, "batch_size": self.users, "loss": "softmax"} | sizes
        common |= {"get_trainer_func": self.trainer}
        if args.model == "hstu":
            self.model = HSTUModel(relative_time_attention=False, **common)
            self.settings += ", no relative time as the log has none"
        else:
            self.model = SASRecModel(**common)

    def trainer(self) -> pl.Trainer:
        """As rectools makes its own, with the clock."""
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return pl.Trainer(
            max_epochs=1, min_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[clock], **quiet
        )

    def lists(self, part: Part) -> Array:
        """The ten best items of each user (U, 10), -1 where there are fewer."""
        dataset = interactions(self.log.histories(part))
        users = np.arange(len(self.log.sequences))
        found = self.model.recommend(users, dataset, k=TOP_K, filter_viewed=False, on_unsupported_targets="ignore")
        lists_UK = np.full((len(users), TOP_K), -1)
        lists_UK[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
        return lists_UK

    def train(self, epochs: int, meter: Meter) -> None:
        """See `peer_run.System`."""
        meter.watch_optimizers()
        Clock.meter = meter
        dataset = interactions(self.log.train)
        if meter.seconds is not None:
            self.model.fit_partial(dataset, min_epochs=epochs, max_epochs=epochs)
        for _ in range(epochs):
            self.model.fit_partial(dataset, min_epochs=1, max_epochs=1)
            if not meter.evaluate(self.lists):
                break


class Clock(pl.Callback):
    """Of the class and not of an instance, as rectools copies its trainer with the callbacks."""

    meter: Meter

    def on_train_epoch_start(self, *_: object) -> None:
        """The data is ready."""
        self.meter.begin()

    def on_train_epoch_end(self, *_: object) -> None:
        """The last step is done."""
        self.meter.end()


clock = Clock()

if __name__ == "__main__":
    main(Rectools, packages=["rectools", "torch", "pytorch-lightning", "numpy"])
