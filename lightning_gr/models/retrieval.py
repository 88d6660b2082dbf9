"""Next-item retrieval: a sequence encoder over item embeddings, trained by sampled or full softmax.

Shape suffixes: B sequences, T tokens, N labelled tokens, R negatives a label, I items of the corpus, D dimension.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch
from lightning_gr.embeddings import embedding_collection
from lightning_gr.metrics import NDCG, HitRate, WeightedMean, ranks_of_targets
from lightning_gr.negatives import UniformNegatives
from lightning_gr.ops.interval_mask import IntervalMask

if TYPE_CHECKING:
    from torchrec import EmbeddingCollection

TASK = "next_item"
_MASKED_LOGIT = -5e4  # finite, as in Meta's HSTU, so that a row of masked negatives has no NaN gradient


@dataclass
class RetrievalScores:
    """What `RetrievalModule.score` returns.

    Args:
        tokens_N: the tokens that ask, as positions in the batch: labelled ones, or each last one in predict.
        logits: similarity over temperature: (N, I) over the corpus, or (N, 1 + R), the positive first.
    """

    tokens_N: Tensor
    logits: Tensor


class RetrievalModule(pl.LightningModule):
    """Trains an encoder such as HSTU to retrieve the next item, and ranks the whole corpus.

    Item i of the corpus is row i of one embedding table, shared by history, positives and negatives. Evaluation ranks
    the target among all items, seen ones included, ties counted against the model.

    Args:
        encoder: maps (T, D) token embeddings to (T, D), with the attributes `dim` and `max_length`, and takes
            `layout`, `mask`, `times_T` and `request_times_T`; for example `lightning_gr.layers.HSTUEncoder`.
        num_items: rows of the item table; None takes the datamodule's `num_items`.
        loss: softmax over all items, or over the positive and uniformly drawn negatives.
        num_negatives: negatives a label under `sampled_softmax`, drawn from (seed, epoch, sample id, position).
        similarity: `cosine` normalises both sides to length 1; `dot` does not.
        temperature: divides the similarity.
        embedding_std: standard deviation of the first values of item embeddings.
        top_k: cut-offs of HR@K and NDCG@K; `predict` returns as many items as the largest.
        optimizer: makes the optimiser of the dense parameters.
        lr_scheduler: makes its schedule, stepped every step; None keeps the rate.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        num_items: int | None = None,
        loss: Literal["full_softmax", "sampled_softmax"] = "full_softmax",
        num_negatives: int = 128,
        similarity: Literal["cosine", "dot"] = "cosine",
        temperature: float = 0.05,
        embedding_std: float = 0.02,
        top_k: list[int] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if loss not in ("full_softmax", "sampled_softmax"):
            raise MisconfigurationException(f"loss={loss!r}: expected full_softmax or sampled_softmax")
        if similarity not in ("cosine", "dot"):
            raise MisconfigurationException(f"similarity={similarity!r}: expected cosine or dot")
        if not 0 < temperature < math.inf:
            raise MisconfigurationException(f"temperature={temperature}: expected a number above 0")
        if not 0 <= embedding_std < math.inf:
            raise MisconfigurationException(f"embedding_std={embedding_std}: expected a number of at least 0")
        if top_k and min(top_k) < 1:
            raise MisconfigurationException(f"top_k={top_k}: expected cut-offs of at least 1")
        if num_items is not None and num_items < 1:
            raise MisconfigurationException(f"num_items={num_items}: expected at least 1, or leave it out")
        self.encoder = encoder
        self.num_items = num_items
        self.loss = loss
        self.negatives = UniformNegatives(num_negatives=num_negatives)
        self.similarity = similarity
        self.temperature = temperature
        self.embedding_std = embedding_std
        self.top_k = sorted(top_k or [10])
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.tables: EmbeddingCollection | None = None
        self.train_loss = WeightedMean()
        self.metrics = nn.ModuleDict({split: self._ranking_metrics() for split in ("val", "test")})

    def _ranking_metrics(self) -> nn.ModuleDict:
        metrics: dict[str, nn.Module] = {"loss": WeightedMean()}
        for k in self.top_k:
            metrics |= {f"HR@{k}": HitRate(k=k), f"NDCG@{k}": NDCG(k=k)}
        return nn.ModuleDict(metrics)

    # ---- building ----------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if self.num_items is None:
            self.num_items = getattr(getattr(self.trainer, "datamodule", None), "num_items", None)
        if self.num_items is None:
            raise MisconfigurationException(
                "num_items: not given, and the Trainer has no datamodule that knows it; pass "
                "RetrievalModule(num_items=...)"
            )
        if max(self.top_k) > self.num_items:
            raise MisconfigurationException(
                f"top_k={self.top_k}: the corpus has only {self.num_items} items; lower it to at most that"
            )

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        from torchrec import EmbeddingConfig

        assert self.num_items is not None
        sampled = ["target", "negative"] if self.loss == "sampled_softmax" else []
        item_table = EmbeddingConfig(
            name="item",
            num_embeddings=self.num_items,
            embedding_dim=int(self.encoder.dim),  # type: ignore[arg-type]
            feature_names=["item_id", *sampled, "corpus"],
            init_fn=functools.partial(torch.nn.init.normal_, std=self.embedding_std),
        )
        self.tables = embedding_collection([item_table])

    @override
    def configure_optimizers(self) -> Any:
        # Tables whose rows a strategy updates inside backward are its own business.
        dense = [p for p in self.parameters() if not hasattr(p, "_in_backward_optimizers")]
        optimizer = self.make_optimizer(dense)
        if self.make_lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"},
        }

    # ---- a batch -----------------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds, on the host, the ids that the loss or the ranking looks up beside the history."""
        if not isinstance(batch, SequenceBatch):
            raise MisconfigurationException(
                f"{type(self).__name__}: expected SequenceBatch batches, got {type(batch).__name__}; use "
                "SequenceDataModule, or collate to lightning_gr.SequenceBatch"
            )
        return self.with_lookup_ids(batch, sampled=self.loss == "sampled_softmax" and self.trainer.training)

    def with_lookup_ids(self, batch: SequenceBatch, *, sampled: bool) -> SequenceBatch:
        """A batch whose features also hold the corpus, or the targets and their negatives.

        Args:
            batch: a batch on the host whose features are ``item_id`` alone.
            sampled: whether the negatives are looked up instead of the corpus.
        """
        from torchrec import KeyedJaggedTensor

        assert self.num_items is not None
        num_sequences = batch.num_sequences
        nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(num_sequences, dtype=torch.int64))
        ids = {"item_id": (batch.features["item_id"].values(), batch.features["item_id"].lengths())}
        if self.loss == "sampled_softmax":
            ids |= {"target": nothing, "negative": nothing}
        ids["corpus"] = nothing
        if sampled:
            labels = batch.labels[TASK]
            sequence_N = batch.layout.sequence_T[labels.tokens_N]
            labels_B = torch.bincount(sequence_N, minlength=num_sequences)
            negatives_NR = self.negatives.sample(
                num_items=self.num_items,
                seed=torch.initial_seed(),
                epoch=batch.epoch,
                sample_ids_N=batch.sample_ids_B[sequence_N],
                positions_N=batch.layout.position_T[labels.tokens_N],
            )
            ids["target"] = (labels.values_N, labels_B)
            ids["negative"] = (negatives_NR.flatten(), labels_B * negatives_NR.shape[1])
        else:
            lengths_B = torch.zeros(num_sequences, dtype=torch.int64)
            lengths_B[0] = self.num_items
            ids["corpus"] = (torch.arange(self.num_items), lengths_B)
        features = KeyedJaggedTensor(
            keys=list(ids),
            values=torch.cat([values for values, _ in ids.values()]),
            lengths=torch.cat([lengths.to(torch.int64) for _, lengths in ids.values()]),
        )
        return batch.with_features(features)

    def embed(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Looks up every feature: ``item_id`` (T, D) and ``corpus`` (I, D), or ``target`` (N, D) and ``negative``."""
        assert self.tables is not None
        return {name: jagged.values() for name, jagged in self.tables(batch.features).items()}

    def encode(self, features: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """User states (T, D), one after each token of the history."""
        scale = float(self.encoder.dim) ** 0.5  # type: ignore[arg-type]
        states_TD: Tensor = self.encoder(
            features["item_id"] * scale,
            layout=batch.layout,
            mask=IntervalMask.causal(batch.layout),
            times_T=batch.timestamps_T,
            request_times_T=batch.request_timestamps_T,
        )
        return states_TD

    def score(self, features: Mapping[str, Tensor], batch: SequenceBatch) -> RetrievalScores:
        """Logits of the labelled tokens; without labels, of the last token of each sequence."""
        tokens_N = batch.labels[TASK].tokens_N if TASK in batch.labels else self._last_tokens(batch)
        queries_ND = self._normalised(self.encode(features, batch)[tokens_N])
        if features["corpus"].shape[0]:
            logits = queries_ND @ self._normalised(features["corpus"]).T
        else:
            targets_ND = self._normalised(features["target"])
            negatives_NRD = self._normalised(features["negative"]).unflatten(
                0, (tokens_N.shape[0], self.negatives.num_negatives)
            )
            positive_N1 = (queries_ND * targets_ND).sum(-1, keepdim=True)
            negative_NR = torch.einsum("nd,nrd->nr", queries_ND, negatives_NRD)
            logits = torch.cat([positive_N1, negative_NR], 1)
        return RetrievalScores(tokens_N, logits / self.temperature)

    def _normalised(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.similarity == "cosine" else vectors

    @staticmethod
    def _last_tokens(batch: SequenceBatch) -> Tensor:
        ends_B = batch.layout.offsets_B1[1:]
        return ends_B[(batch.layout.lengths_B > 0).to(ends_B.device)] - 1

    @override
    def forward(self, batch: SequenceBatch) -> RetrievalScores:
        return self.score(self.embed(batch), batch)

    def loss_sums(self, scores: RetrievalScores, batch: SequenceBatch) -> dict[str, Tensor]:
        """The sum of cross entropies over this batch's labels, by task."""
        labels = batch.labels[TASK]
        logits, targets_N = scores.logits, labels.values_N
        if self._is_sampled(batch):
            negatives_NR = batch.features["negative"].values().view(-1, self.negatives.num_negatives)
            collides_NR = negatives_NR == targets_N[:, None]
            logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(collides_NR, _MASKED_LOGIT)], 1)
            targets_N = torch.zeros_like(targets_N)
        losses_N = F.cross_entropy(logits, targets_N, reduction="none")
        if labels.weights_N is not None:
            losses_N = losses_N * labels.weights_N
        return {TASK: losses_N.sum()}

    def _is_sampled(self, batch: SequenceBatch) -> bool:
        return self.loss == "sampled_softmax" and batch.features["corpus"].values().shape[0] == 0

    # ---- Lightning's steps -------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        sums = self.loss_sums(self(batch), batch)
        num_labels = batch.labels[TASK].num_labels
        local_mean = sums[TASK].detach() / max(num_labels, 1)
        self.train_loss.update(local_mean, num_labels)
        size = max(batch.num_samples, 1)
        self.log("train/loss", local_mean, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss_epoch", self.train_loss, on_step=False, on_epoch=True, batch_size=size)
        return batch.mean_over_global_batch(sums)

    @override
    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: SequenceBatch) -> None:
        scores = self(batch)
        labels = batch.labels[TASK]
        ranks_N = ranks_of_targets(scores.logits.float(), labels.values_N)
        num_labels = labels.num_labels
        for name, metric in self.metrics[split].items():  # type: ignore[operator]
            if name == "loss":
                metric.update(self.loss_sums(scores, batch)[TASK] / max(num_labels, 1), num_labels)
            else:
                metric.update(ranks_N)
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, batch_size=max(batch.num_samples, 1))

    @override
    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """The largest `top_k` best items of each user: ``sample_ids`` (B,), ``item_rows`` (B, K), ``scores`` (B, K)."""
        logits = self.score(self.embed(batch), batch.without_labels()).logits.float()
        scores, rows = logits.topk(max(self.top_k), dim=1)
        asks_B = batch.layout.lengths_B > 0
        assert bool((batch.sample_ids_B[asks_B] != PADDING_SAMPLE_ID).all())
        return {"sample_ids": batch.sample_ids_B[asks_B], "item_rows": rows.cpu(), "scores": scores.cpu()}

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _vocabulary(self) -> str | None:
        """A fingerprint of which raw item each row stands for; None without a datamodule that knows."""
        item_ids = getattr(getattr(self.trainer, "datamodule", None), "item_ids", None)
        if item_ids is None:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for item_id in item_ids:
            digest.update(f"{item_id}\n".encode())
        return digest.hexdigest()

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["item_vocabulary"] = self._vocabulary()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, present = checkpoint.get("item_vocabulary"), self._vocabulary()
        if saved and present and saved != present:
            raise MisconfigurationException(
                "item vocabulary: the checkpoint was trained on other items than the data at hand, so rows would stand "
                "for the wrong items; use the data it was trained on"
            )
