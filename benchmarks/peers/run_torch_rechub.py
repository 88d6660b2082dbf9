"""HSTU of torch-rechub, by its own trainer and loader; see peer_run."""

from __future__ import annotations

import argparse
import contextlib
import os

import numpy as np
import torch
from peer_log import Array, Part, PeerLog
from peer_run import TOP_K, Meter, in_batches, main, samples_of
from torch_rechub.models.generative.hstu import HSTUModel
from torch_rechub.trainers.seq_trainer import SeqTrainer
from torch_rechub.utils.data import SequenceDataGenerator


class TorchRechub:
    """One row a user, padded on the left; the loss asks at every place of it.

    Args:
        log: what is trained on.
        args: of `peer_run.parser`.
    """

    def __init__(self, log: PeerLog, args: argparse.Namespace) -> None:
        self.log, self.max_length = log, args.max_length
        users = samples_of(args.tokens, log)
        rows = [x for x in log.train if len(x) >= 2]
        tokens_UL = log.padded([x[:-1] for x in rows], args.max_length, side="left")
        places_UL = np.broadcast_to(np.arange(args.max_length), tokens_UL.shape)
        data = SequenceDataGenerator(tokens_UL, places_UL, np.array([x[-1] for x in rows]), np.zeros_like(tokens_UL))
        self.loader = data.generate_dataloader(batch_size=users)[0]
        self.model = HSTUModel(
            vocab_size=log.num_items + 1,
            d_model=args.dim,
            n_heads=args.heads,
            n_layers=args.layers,
            dqk=args.dim // args.heads,
            dv=args.dim // args.heads,
            max_seq_len=args.max_length,
            use_time_embedding=False,
        )
        self.trainer = SeqTrainer(self.model)
        self.steps_per_epoch = len(self.loader)
        self.settings = (
            f"hstu, full softmax, {users} users a batch, padded to {args.max_length}, no time as the log has none"
        )

    @torch.no_grad()
    def lists(self, part: Part) -> Array:
        """The ten best items of each user (U, 10), -1 where there are fewer."""
        self.model.eval()
        rows_UL = self.log.padded(self.log.histories(part), self.max_length, side="left")
        best = []
        for rows_BL in in_batches(rows_UL, 128):
            tokens_BL = torch.from_numpy(rows_BL)
            logits_BI = self.model(tokens_BL, torch.zeros_like(tokens_BL))[:, -1]
            logits_BI[:, 0] = -torch.inf  # padding is no item
            best.append(logits_BI.topk(TOP_K).indices)
        return torch.cat(best).numpy()

    def train(self, epochs: int, meter: Meter) -> None:
        """See `peer_run.System`."""
        meter.watch_optimizers()
        for _ in range(epochs):
            meter.begin()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                self.trainer.train_one_epoch(self.loader)
            meter.end()
            if not meter.evaluate(self.lists):
                break


if __name__ == "__main__":
    main(TorchRechub, packages=["torch-rechub", "torch", "numpy"])
