"""A ranking model over wide tables, and its samples, whose system is plain or lightning-gr's; for bench_end_to_end.

Samples come by an ordinary `DataLoader` with a fixed number of samples a batch, as a Lightning user has it, or in
global batches that lightning-gr plans by the lengths and deals out to all processes. An event has six categories, the
sum of whose embeddings is made a token; HSTU encodes the tokens; each token's click is predicted. MTGenRec's models
(arXiv 2505.12663, table 6) are of this kind, and are measured with embeddings up to 64 times as wide as at first.

Shape suffixes: S samples, B sequences of a batch, T tokens, E width of an embedding, D width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset
from torchrec import EmbeddingConfig, KeyedJaggedTensor
from typing_extensions import override

from lightning_gr.balancing import SequenceCost
from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.data.plan import GlobalBatchPlan
from lightning_gr.data.source import SequenceSource
from lightning_gr.embeddings import embedding_collection
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models.sequence_cost import causal
from lightning_gr.ops.backend import Backend, use_backend
from lightning_gr.ops.interval_mask import IntervalMask

Array = np.ndarray[Any, Any]
TASK = "click"
FIELDS = {"item": 40_000, "author": 12_000, "music": 8_000, "category": 500, "city": 300, "hour": 168}
"""Ids of each category of an event."""
LOOKED_UP = 110
"""Forward operations of the encoder that take as long as a looked up number: its row's way here, and its gradient's."""


@dataclass(frozen=True)
class Size:
    """A model and its samples.

    Args:
        embedding_dim: width of each table.
        dim: width of the encoder.
        num_layers: blocks.
        num_heads: heads.
        mean: tokens of a sample before the cut, log-normal.
        sigma: of its logarithm.
        cap: most tokens of a sample.
        samples: of a process in a batch of fixed size.
        zipf: exponent of the items' popularity.
    """

    embedding_dim: int
    dim: int
    num_layers: int
    num_heads: int
    mean: float = 200.0
    sigma: float = 1.0
    cap: int = 1000
    samples: int = 8
    zipf: float = 1.05


@dataclass(frozen=True)
class System:
    """Which parts of a training are lightning-gr's.

    Args:
        tables: TorchRec's static ones, or dynamic ones of which those of one width are merged.
        dedup: whether ids are made distinct before they travel and where they arrive.
        balanced: global batches have as many tokens and are dealt out by cost, in place of as many samples a process.
        pipeline_depth: batches whose ids are sent ahead.
        late: whether rows are sent ahead too, without the update of the step before (TurboGR, arXiv 2605.13433, 4.2.2).
        backend: of the operators: `auto` has the fused ones, `reference` dense attention over padded sequences.
    """

    tables: Literal["static", "dynamic"] = "static"
    dedup: bool = False
    balanced: bool = False
    pipeline_depth: int = 0
    late: bool = False
    backend: Backend = "auto"


class Samples(Dataset[int], SequenceSource):
    """A synthetic log: lengths with a long tail, items by Zipf's law, clicks that follow the item.

    Args:
        size: of the samples.
        count: how many.
        seed: all is a function of it.
        rows: ids of each category.
    """

    def __init__(self, *, size: Size, count: int, seed: int = 0, rows: dict[str, int] | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.rows = rows or FIELDS
        lengths = rng.lognormal(np.log(size.mean) - size.sigma**2 / 2, size.sigma, count).clip(5, size.cap)
        self.offsets = np.concatenate([[0], lengths.astype(np.int64).cumsum()])
        total, items = int(self.offsets[-1]), self.rows["item"]
        shares = np.arange(1, items + 1, dtype=np.float64) ** -size.zipf
        item_T = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(total)).clip(max=items - 1)
        owned = {"author", "music", "category"}  # of the item, the others of the moment
        self.ids = {
            name: torch.from_numpy(
                item_T
                if name == "item"
                else item_T * (2 * place + 7919) % count_of
                if name in owned
                else rng.integers(count_of, size=total)
            )
            for place, (name, count_of) in enumerate(self.rows.items())
        }
        self.clicks_T = torch.from_numpy((rng.random(total) < 0.15 + 0.5 * (item_T % 3 == 0)).astype(np.float32))
        self.times_T = torch.from_numpy(1_650_000_000 + rng.integers(1, 600, total).cumsum())
        self.num_rows, self.tasks, self.fingerprint = count, (TASK,), f"{size} {count} {seed}"
        self.group_bounds = np.array([0, count])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> int:
        return index

    @override
    def samples(self, first_row: int, last_row: int) -> tuple[Array, Array]:
        ids_S = np.arange(first_row, last_row)
        return ids_S, self.token_counts(ids_S)

    @override
    def token_counts(self, sample_ids: Array) -> Array:
        counts_S: Array = np.diff(self.offsets)[sample_ids]
        return counts_S

    @override
    def label_counts(self, sample_ids: Array) -> dict[str, Array]:
        return {TASK: self.token_counts(sample_ids)}

    @override
    def collate(
        self,
        sample_ids: Any,
        *,
        windows: Any = (),
        epoch: int = 0,
        denominators: dict[str, float] | None = None,
        gradient_divisor: float = 1.0,
    ) -> SequenceBatch:
        """A jagged batch of these samples; without denominators its loss is the mean over its own tokens."""
        places_T = np.concatenate([np.arange(self.offsets[x], self.offsets[x + 1]) for x in sample_ids])
        taken_T = torch.from_numpy(places_T)
        lengths_B = torch.from_numpy(self.token_counts(sample_ids))
        counts_B4 = F.pad(lengths_B[:, None], (1, 2))
        return SequenceBatch(
            features=KeyedJaggedTensor(
                keys=list(self.ids),
                values=torch.cat([ids_T[taken_T] for ids_T in self.ids.values()]),
                lengths=lengths_B.repeat(len(self.ids)),
            ),
            token_counts_B4=counts_B4,
            sample_ids_B=torch.as_tensor(sample_ids),
            epoch=epoch,
            labels={TASK: Labels(self.clicks_T[taken_T], torch.arange(len(taken_T)))},
            denominators=denominators or {TASK: float(len(taken_T))},
            gradient_divisor=gradient_divisor,
            timestamps_T=self.times_T[taken_T],
        )

    def loader(self, batch_size: int) -> DataLoader[int]:
        """Batches of so many samples."""
        return DataLoader(self, batch_size=batch_size, shuffle=True, collate_fn=self.collate)

    def planned_loader(self, batches: int, *, rank: int, world_size: int) -> PlannedLoader:
        """At most so many global batches, which have about as many tokens each."""
        lengths_S = np.diff(self.offsets)
        share = -(-int(lengths_S.sum()) // batches)
        plan = GlobalBatchPlan(self, global_tokens=share + int(lengths_S.max()) - 1)
        return PlannedLoader(self, plan, rank=rank, world_size=world_size)


class Ranker(pl.LightningModule):
    """HSTU over events of several categories, which predicts each event's click.

    Args:
        system: which parts are plain.
        size: of the model.
        rows: ids of each category.
    """

    def __init__(self, *, system: System, size: Size, rows: dict[str, int] | None = None) -> None:
        super().__init__()
        self.system, self.size, self.rows = system, size, rows or FIELDS
        self.project = nn.Linear(size.embedding_dim, size.dim)
        self.encoder = HSTUEncoder(
            dim=size.dim, num_layers=size.num_layers, num_heads=size.num_heads, max_length=size.cap, dropout=0.0
        )
        self.head = nn.Linear(size.dim, 1)
        self.tables: Any = None

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        configs = [
            EmbeddingConfig(
                name=name,
                num_embeddings=count,
                embedding_dim=self.size.embedding_dim,
                feature_names=[name],
                init_fn=None,
            )
            for name, count in self.rows.items()
        ]
        if self.system.tables == "static":
            self.tables = embedding_collection(configs)
        else:
            dedup: Any = "two_stage" if self.system.dedup else "none"
            self.tables = DynamicTables(dedup=dedup).collection(configs)

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def sequence_cost(self) -> SequenceCost:
        """Operations of a sequence by its tokens, with what looking up takes."""
        encoder = causal(self.encoder.flops)
        return SequenceCost(encoder.linear + LOOKED_UP * len(self.rows) * self.size.embedding_dim, encoder.quadratic)

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        looked_up = self.tables(batch.features)
        x_TD = self.project(reduce(torch.add, (looked_up[name].values() for name in self.rows)))
        with use_backend(self.system.backend):
            states_TD = self.encoder(
                x_TD, layout=batch.layout, mask=IntervalMask.causal(batch.layout), times_T=batch.timestamps_T
            )
        labels = batch.labels[TASK]
        logits_N = self.head(states_TD)[labels.tokens_N, 0]
        loss_sum = F.binary_cross_entropy_with_logits(logits_N, labels.values_N, reduction="sum")
        return batch.mean_over_global_batch({TASK: loss_sum})
