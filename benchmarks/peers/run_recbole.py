"""SASRec of RecBole, by its own dataset, loader and trainer; see peer_run."""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from peer_log import Array, Part, PeerLog
from peer_run import TOP_K, Meter, in_batches, main
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer


def write_atomic_file(log: PeerLog, folder: Path) -> None:
    """The log in the form that RecBole reads; the place in a sequence stands for the time."""
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [
        f"{user}\t{item}\t{place}" for user, items in enumerate(log.sequences) for place, item in enumerate(items)
    ]
    (folder / "log").mkdir()
    (folder / "log" / "log.inter").write_text("\n".join(lines), encoding="utf-8")


class RecBole:
    """Each item with the history before it is a sample, so a batch is a number of targets as it stands.

    Args:
        log: what is trained on.
        args: of `peer_run.parser`.
    """

    def __init__(self, log: PeerLog, args: argparse.Namespace) -> None:
        self.log, self.max_length = log, args.max_length
        with tempfile.TemporaryDirectory() as folder:
            write_atomic_file(log, Path(folder))
            settings = {
                "data_path": folder,
                "checkpoint_dir": folder,
                "USER_ID_FIELD": "user_id",
                "ITEM_ID_FIELD": "item_id",
                "TIME_FIELD": "timestamp",
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "MAX_ITEM_LIST_LENGTH": args.max_length,
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
                "train_neg_sample_args": None,
                "loss_type": "CE",
                "n_layers": args.layers,
                "n_heads": args.heads,
                "hidden_size": args.dim,
                "train_batch_size": args.tokens,
                "use_gpu": False,
                "show_progress": False,
                "seed": args.seed,
            }
            config = Config(model="SASRec", dataset="log", config_dict=settings)
            logging.disable(logging.WARNING)
            dataset = create_dataset(config)
            self.loader, _, _ = data_preparation(config, dataset)
            self.model = SASRec(config, self.loader._dataset).to(config["device"])
            self.trainer = Trainer(config, self.model)
        torch.set_num_threads(args.threads)
        self.item_of_row = np.array([0, *(int(x) for x in dataset.field2id_token["item_id"][1:])])
        self.row_of_item = np.zeros(log.num_items + 1, dtype=np.int64)
        self.row_of_item[self.item_of_row] = np.arange(len(self.item_of_row))
        self.steps_per_epoch = len(self.loader)
        self.settings = (
            f"sasrec, full softmax, {args.tokens} samples a batch, each one target with its history, padded to "
            f"{args.max_length}"
        )

    @torch.no_grad()
    def lists(self, part: Part) -> Array:
        """The ten best items of each user (U, 10), -1 where there are fewer."""
        self.model.eval()
        histories = self.log.histories(part)
        rows_UL = self.row_of_item[self.log.padded(histories, self.max_length, side="right")]
        lengths_U = np.array([min(len(x), self.max_length) for x in histories])
        best = []
        for at in in_batches(np.arange(len(histories)), 1024):
            asked = {self.model.ITEM_SEQ: rows_UL[at], self.model.ITEM_SEQ_LEN: lengths_U[at]}
            scores_BI = self.model.full_sort_predict(Interaction({k: torch.from_numpy(x) for k, x in asked.items()}))
            scores_BI[:, 0] = -torch.inf  # padding is no item
            best.append(self.item_of_row[scores_BI.topk(TOP_K).indices.numpy()])
        return np.concatenate(best)

    def train(self, epochs: int, meter: Meter) -> None:
        """See `peer_run.System`."""
        meter.watch_optimizers()
        for epoch in range(epochs):
            meter.begin()
            self.trainer._train_epoch(self.loader, epoch)
            meter.end()
            if not meter.evaluate(self.lists):
                break


if __name__ == "__main__":
    main(RecBole, packages=["recbole", "torch", "numpy"])
