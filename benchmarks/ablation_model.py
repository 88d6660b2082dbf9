"""A retrieval model with several tables whose parts can be had plainly or as lightning-gr has them, for bench_ablation.

Shape suffixes: B sequences, T tokens, L longest sequence that is allowed, N labelled tokens, R negatives a label,
A negatives of other labels, K = 1 + R + A, U distinct items, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchrec import EmbeddingConfig, KeyedJaggedTensor
from typing_extensions import override

from lightning_gr.balancing import SequenceCost
from lightning_gr.batch import SequenceBatch
from lightning_gr.embeddings import embedding_collection
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models.sequence_cost import causal
from lightning_gr.negatives import UniformNegatives
from lightning_gr.negatives.kept_rows import keep_rows
from lightning_gr.negatives.logit_sharing import auxiliary_places, sharing_words
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

TASK = "next_item"
EVENT_FIELDS = ("author_id", "music_id", "tag", "video_type", "tab")
"""Categories of an event beside its item, as KuaiRand has them."""


@dataclass(frozen=True)
class Form:
    """Which parts of a training are lightning-gr's.

    Args:
        tables: TorchRec's static ones, or dynamic ones.
        merge: whether dynamic tables of one width are one.
        dedup: of dynamic tables.
        jagged: fused operators on jagged sequences; otherwise dense PyTorch on sequences padded to their longest,
            with negatives of padded positions too, each with a row of its own.
        partitioner: `lpt` balances the ranks' work, `contiguous` gives each as many samples.
        pipeline_depth: batches in flight ahead.
        sparse_update: of dynamic tables.
        own_negatives: of a label.
        sharing: times as many negatives, those of other labels (TurboGR, equation 2).
        half: whether rows of negatives are kept in 16 bit.
    """

    tables: Literal["torchrec", "dynamic"] = "torchrec"
    merge: bool = False
    dedup: Literal["none", "two_stage"] = "none"
    jagged: bool = False
    partitioner: Literal["lpt", "contiguous"] = "contiguous"
    pipeline_depth: int = 0
    sparse_update: Literal["sync", "semi_async"] = "sync"
    own_negatives: int = 64
    sharing: int = 1
    half: bool = False


class Recommender(pl.LightningModule):
    """HSTU over the sum of an event's embeddings, trained by a sampled softmax with cosine similarity.

    Args:
        form: which parts are plain.
        rows: of each table, by feature.
        dim: width of every table and of the encoder.
        num_layers: blocks.
        max_length: tokens of the longest sequence.
    """

    def __init__(self, *, form: Form, rows: dict[str, int], dim: int, num_layers: int, max_length: int) -> None:
        super().__init__()
        self.form, self.rows, self.max_length = form, rows, max_length
        self.encoder = HSTUEncoder(dim=dim, num_layers=num_layers, num_heads=2, max_length=max_length, dropout=0.0)
        self.negatives = UniformNegatives(num_negatives=form.own_negatives)
        self.tables: Any = None

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        configs = [
            EmbeddingConfig(
                name=name,
                num_embeddings=count,
                embedding_dim=self.encoder.dim,
                feature_names=["item_id", "target", "sampled"] if name == "item_id" else [name],
                init_fn=None,
            )
            for name, count in self.rows.items()
        ]
        if self.form.tables == "torchrec":
            self.tables = embedding_collection(configs)
        else:
            settings = DynamicTables(merge=self.form.merge, dedup=self.form.dedup)
            self.tables = settings.collection(configs, uncounted_features=["sampled"])

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def sequence_cost(self) -> SequenceCost:
        """Operations of a sequence by its tokens, for balancing."""
        cost = causal(self.encoder.flops)
        return SequenceCost(cost.linear + 2 * (1 + self.form.own_negatives) * self.encoder.dim, cost.quadratic)

    # ---- what is looked up ---------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: SequenceBatch, dataloader_idx: int) -> SequenceBatch:
        lengths_B, labels = batch.layout.lengths_B, batch.labels[TASK]
        num_sequences = batch.num_sequences
        names = ["item_id", *EVENT_FIELDS]
        ids = {name: (batch.features[name].values(), lengths_B) for name in names}
        first_N = torch.zeros(num_sequences, dtype=torch.int64)
        draw: dict[str, Any] = {"num_items": self.rows["item_id"], "seed": 1, "epoch": batch.epoch}
        if self.form.jagged:
            of_labels: dict[str, Any] = {
                "sample_ids_N": batch.sample_ids_B[batch.layout.sequence_T[labels.tokens_N]],
                "positions_N": batch.layout.position_T[labels.tokens_N],
            }
            negatives_NR = self.negatives.sample(**of_labels, **draw)
            items_U, places_NK = torch.cat([labels.values_N[:, None], negatives_NR], 1).unique(return_inverse=True)
            words_N = sharing_words(seed=1, epoch=batch.epoch, **of_labels)
            shared_NA = auxiliary_places(places_NK[:, 1:], k=self.form.sharing, words_N=words_N)
            places_NK = torch.cat([places_NK, shared_NA], 1)
            ids["sampled"] = (items_U, first_N.index_fill(0, torch.tensor(0), len(items_U)))
            ids["places"] = (places_NK.flatten(), first_N.index_fill(0, torch.tensor(0), places_NK.numel()))
        else:
            padded_B = torch.full((num_sequences,), self.max_length)
            position_L = torch.arange(self.max_length)
            within_BL = position_L < lengths_B[:, None]
            for name in names:
                padded_BL = torch.zeros(within_BL.shape, dtype=torch.int64)
                padded_BL[within_BL] = ids[name][0]
                ids[name] = (padded_BL.flatten(), padded_B)
            negatives = self.negatives.sample(
                sample_ids_N=batch.sample_ids_B.repeat_interleave(self.max_length),
                positions_N=position_L.repeat(num_sequences),
                **draw,
            )
            ids["sampled"] = (negatives.flatten(), padded_B * self.form.own_negatives)
            ids["target"] = (labels.values_N, first_N.index_fill(0, torch.tensor(0), labels.num_labels))
        ids.setdefault("target", (torch.zeros(0, dtype=torch.int64), first_N))
        features = KeyedJaggedTensor(
            keys=list(ids),
            values=torch.cat([values for values, _ in ids.values()]),
            lengths=torch.cat([lengths.to(torch.int64) for _, lengths in ids.values()]),
        )
        return batch.with_features(features)

    # ---- the loss ------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        looked_up = {name: jagged.values() for name, jagged in self.tables(batch.features).items()}
        loss_sum = (self._jagged_loss if self.form.jagged else self._padded_loss)(looked_up, batch)
        return batch.mean_over_global_batch({TASK: loss_sum})

    def _states(self, looked_up: dict[str, Tensor], layout: JaggedLayout, times_T: Tensor) -> Tensor:
        x_TD = torch.stack([looked_up[name] for name in ("item_id", *EVENT_FIELDS)]).sum(0)
        states_TD: Tensor = self.encoder(x_TD, layout=layout, mask=IntervalMask.causal(layout), times_T=times_T)
        return F.normalize(states_TD, dim=-1) / 0.05

    def _jagged_loss(self, looked_up: dict[str, Tensor], batch: SequenceBatch) -> Tensor:
        assert batch.timestamps_T is not None
        labels = batch.labels[TASK]
        rows = keep_rows(looked_up["sampled"], dtype=torch.float16 if self.form.half else None, normalise=True)
        queries_ND = self._states(looked_up, batch.layout, batch.timestamps_T)[labels.tokens_N]
        places_NK = batch.features["places"].values().view(labels.num_labels, -1)
        return _softmax_loss(rows.logits(queries_ND, places_NK), places_NK)

    def _padded_loss(self, looked_up: dict[str, Tensor], batch: SequenceBatch) -> Tensor:
        assert batch.timestamps_T is not None
        labels, layout = batch.labels[TASK], batch.layout
        padded = JaggedLayout.from_lengths(torch.full((batch.num_sequences,), self.max_length))
        place_T = layout.sequence_T * self.max_length + layout.position_T
        times_T = torch.zeros(padded.num_tokens, dtype=torch.int64).index_copy(0, place_T, batch.timestamps_T)
        with use_backend("reference"):
            states_TD = self._states(looked_up, padded, times_T)
        place_N, negatives = place_T[labels.tokens_N], self.form.own_negatives
        rows_TRD = F.normalize(looked_up["sampled"].view(padded.num_tokens, negatives, -1), dim=-1)
        logits_TR = (rows_TRD @ states_TD[:, :, None]).squeeze(-1)
        positives_N = (states_TD[place_N] * F.normalize(looked_up["target"], dim=-1)).sum(-1)
        negatives_TR = batch.features["sampled"].values().view(padded.num_tokens, negatives)
        ids_NK = torch.cat([labels.values_N[:, None], negatives_TR[place_N]], 1)
        return _softmax_loss(torch.cat([positives_N[:, None], logits_TR[place_N]], 1), ids_NK)


def _softmax_loss(logits_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """The sum of cross entropies of column 0; another column with the same id does not count."""
    same_NK = ids_NK == ids_NK[:, :1]
    same_NK[:, 0] = False
    return nn.functional.cross_entropy(
        logits_NK.masked_fill(same_NK, -5e4), torch.zeros(len(ids_NK), dtype=torch.int64), reduction="sum"
    )
