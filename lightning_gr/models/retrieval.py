"""Next-item retrieval: a sequence encoder over item embeddings, trained by softmax or cross entropy over items.

Shape suffixes: B sequences, T tokens, N labelled tokens, R negatives a label, K = 1 + R, U items drawn,
C candidates, D dimension, P pairs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of
from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch
from lightning_gr.data.raw_ids import refuse_static_tables
from lightning_gr.embeddings import (
    CandidateBlock,
    all_processes_of,
    corpus_share,
    embedding_collection,
    process_group_of,
)
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.metrics import NDCG, HitRate, MeanReciprocalRank, WeightedMean
from lightning_gr.models.contrast import (
    TASK,
    Contrast,
    Loss,
    NamedNegatives,
    NegativesDtype,
    SharingReuse,
    all_in_first,
)
from lightning_gr.models.corpus import Corpus, item_vocabulary
from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.models.longest_sample import refuse_longer_samples
from lightning_gr.models.parameter_groups import ParameterGroup, optimizer_and_schedule
from lightning_gr.models.retrieval_scores import RetrievalScores, add_negatives, contrast_losses, kept_rows
from lightning_gr.models.sequence_cost import causal
from lightning_gr.negatives import NegativeSampler
from lightning_gr.negatives.offload import Offload
from lightning_gr.ops.backend import Backend, use_backend
from lightning_gr.ops.full_softmax import full_softmax_flops
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.sampled_softmax import sampled_softmax_flops

if TYPE_CHECKING:
    from torchrec import EmbeddingCollection

    from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection


class RetrievalModule(pl.LightningModule):
    """Trains an encoder such as HSTU to retrieve the next item, and ranks the whole corpus.

    Item i of the corpus is row i of one embedding table, shared by history, positives and negatives. Evaluation ranks
    the target among all items of the corpus, ties counted against the model. Where the tables are sharded, each process
    scores the rows that it holds.

    With `dynamic_tables` an item's id may be any int64, as of a datamodule with ``raw_ids``. Where nothing says which
    ids there are (a stream without `num_items`), the loss takes in-batch negatives, and `corpus` names what is ranked.

    Args:
        encoder: maps (T, D) token embeddings to (T, D), with the attributes `dim` and `max_length`, and takes
            `layout`, `mask`, `times_T` and `request_times_T`; for example `lightning_gr.layers.HSTUEncoder`.
        num_items: rows of the item table; None takes the datamodule's `num_items`. Raw ids that the datamodule knows go
            before it.
        loss: `full_softmax` over all items; `sampled_softmax` over the label and its negatives; `bce`, the binary cross
            entropy of the label and, on average, of its negatives (SASRec, arXiv 1808.09781). Validation and test log
            the full softmax over the corpus, whichever it is.
        negatives: `uniform` draws them from (seed, epoch, sample id, position); `in_batch` takes the distinct labels of
            the global batch, each once; others are classes of `lightning_gr.negatives`.
        num_negatives: uniform negatives a label; a class has its own.
        negatives_offload: keeps the rows of drawn negatives in host memory and fetches them in segments of labels
            (TurboGR, arXiv 2605.13433, section 4.3.1); None keeps them on the device.
        negatives_dtype: in which rows of drawn negatives are kept and multiplied; their gradients, and positives, stay
            what they are. Halves their memory, not the exchange between ranks.
        logit_sharing: over how many labels' drawn negatives the softmax of a label goes: its own and those of so many
            other labels of its rank, without a further lookup (TurboGR, equation 2). 1 shares none.
        logit_sharing_reuse: `negatives` multiplies shared negatives with the label's own query, as the equation says;
            `logits` takes the other label's scores, as the text says.
        similarity: `cosine` normalises both sides to length 1; `dot` does not.
        temperature: divides the similarity.
        embedding_std: standard deviation of the first values of item embeddings.
        dynamic_tables: settings of dynamic tables in place of static ones; None takes static ones.
        corpus: what is ranked in validation, test and predict: None for all items, or raw ids, as a list or as the path
            of a text file with one a line. A target outside it counts as not found. Where nothing says which ids there
            are, the lines of a file are integers if all of them can be, else text.
        remove_seen: whether validation, test and predict leave out the items of the history that the batch holds; a
            target among them counts as not found.
        top_k: cut-offs of HR@K and NDCG@K; `predict` returns as many items as the largest.
        optimizer: makes the optimiser of the dense parameters.
        lr_scheduler: makes its schedule, stepped every step; None keeps the rate.
        parameter_groups: parameters with a learning rate or weight decay of their own, by name.
        backend: implementation of every operator of the model; `auto` takes the device's.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module,
        num_items: int | None = None,
        loss: Loss = "full_softmax",
        negatives: NamedNegatives | NegativeSampler = "uniform",
        num_negatives: int = 128,
        negatives_offload: Offload | None = None,
        negatives_dtype: NegativesDtype = "float32",
        logit_sharing: int = 1,
        logit_sharing_reuse: SharingReuse = "negatives",
        similarity: Literal["cosine", "dot"] = "cosine",
        temperature: float = 0.05,
        embedding_std: float = 0.02,
        dynamic_tables: DynamicTables | None = None,
        corpus: list[int | str] | str | None = None,
        remove_seen: bool = False,
        top_k: list[int] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        parameter_groups: list[ParameterGroup] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if loss not in get_args(Loss):
            raise MisconfigurationException(f"loss={loss!r}: expected one of {', '.join(get_args(Loss))}")
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
        if backend not in get_args(Backend):
            raise MisconfigurationException(f"backend={backend!r}: expected one of {', '.join(get_args(Backend))}")
        self.encoder = encoder
        self.backend: Backend = backend
        self.num_items = num_items
        self.loss = loss
        self.contrast = Contrast(
            loss=loss,
            negatives=negatives,
            num_negatives=num_negatives,
            offload=negatives_offload,
            dtype=negatives_dtype,
            sharing=logit_sharing,
            reuse=logit_sharing_reuse,
        )
        self.in_batch = self.contrast.scope is not None
        self.dynamic_tables = dynamic_tables
        self.corpus, self.remove_seen = corpus, remove_seen
        self._corpus = Corpus(num_items)
        self.similarity = similarity
        self.temperature = temperature
        self.embedding_std = embedding_std
        self.top_k = sorted(top_k or [10])
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.parameter_groups = tuple(parameter_groups or ())
        self.tables: EmbeddingCollection | DynamicEmbeddingCollection | None = None
        self.train_loss = WeightedMean()
        self.metrics = nn.ModuleDict({split: self._ranking_metrics() for split in ("val", "test")})

    def _ranking_metrics(self) -> nn.ModuleDict:
        metrics: dict[str, nn.Module] = {"loss": WeightedMean(), "MRR": MeanReciprocalRank()}
        for k in self.top_k:
            metrics |= {f"HR@{k}": HitRate(k=k), f"NDCG@{k}": NDCG(k=k)}
        return nn.ModuleDict(metrics)

    # ---- building ----------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        refuse_static_tables(getattr(datamodule, "raw_ids", False), self.dynamic_tables)
        limit = getattr(self.encoder, "max_length", None)
        refuse_longer_samples(self, setting="encoder.max_length", max_length=limit, stage=stage)
        keys = getattr(datamodule, "item_keys", None)
        keys_I = self._corpus.keys_I if keys is None else torch.as_tensor(keys)
        if keys_I is not None:
            self.num_items = len(keys_I)
        elif self.num_items is None:
            self.num_items = getattr(datamodule, "num_items", None)
        if self.num_items is None:
            self._check_without_items(stage)
        self._corpus = Corpus(self.num_items, keys_I)
        if self.corpus is not None:
            ranked_C = self._corpus.ids_named(self.corpus, getattr(datamodule, "item_ids", None))
            self._corpus = replace(self._corpus, ranked_C=ranked_C)
        if stage == "fit" and self.loss != "full_softmax":
            counts = getattr(datamodule, "training_item_counts", None)
            self.contrast.prepare(num_items=self.num_items, item_counts=counts)
        num_ranked = self._corpus.num_ranked
        if num_ranked is not None and max(self.top_k) > num_ranked:
            raise MisconfigurationException(
                f"top_k={self.top_k}: the corpus has only {num_ranked} items; lower it to at most that"
            )

    @override
    def on_fit_start(self) -> None:
        data, of_host = getattr(self.trainer, "datamodule", None), self.trainer.num_devices
        tokens, longest = getattr(data, "global_tokens", None), getattr(data, "max_length", None) or 0
        self.contrast.begin(
            # Not each rank's own, which a user may have set differently.
            seed=int(self.trainer.strategy.broadcast(torch.initial_seed())),
            accumulates=self.trainer.accumulate_grad_batches > 1,
            num_items=self.num_items,
            labels=tokens and min(-(-tokens // self.trainer.world_size) + longest, -(-tokens // of_host)),
            ranks=of_host,
            dim=int(self.encoder.dim),  # type: ignore[arg-type]
        )

    def _check_without_items(self, stage: str) -> None:
        """Refuses what takes all items, where only the batches tell which there are."""
        if self.dynamic_tables is None:
            raise MisconfigurationException(
                "num_items: not given, and the Trainer has no datamodule that knows it; pass "
                "RetrievalModule(num_items=...)"
            )
        if stage == "fit" and (self.contrast.draws or not self.in_batch):
            raise MisconfigurationException(
                f"loss={self.loss}: takes negatives from all items, and nothing says which there are; use loss "
                "sampled_softmax or bce with negatives in_batch, or give num_items"
            )
        if self.corpus is None and (stage != "fit" or self.trainer.enable_validation):
            raise MisconfigurationException(
                "corpus: not given, and nothing else says which items to rank; name them in "
                "RetrievalModule(corpus=...), or train with limit_val_batches: 0"
            )

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        from torchrec import EmbeddingConfig

        drawn = self.contrast.drawn_features
        item_table = EmbeddingConfig(
            name="item",
            num_embeddings=self.num_items or 1,  # dynamic tables do not ask
            embedding_dim=int(self.encoder.dim),  # type: ignore[arg-type]
            feature_names=["item_id", "target", *drawn, "corpus"],
            init_fn=functools.partial(torch.nn.init.normal_, std=self.embedding_std),
        )
        if self.dynamic_tables is None:
            self.tables = embedding_collection([item_table])
        else:
            # A rank draws each negative once, so their counts would depend on the number of ranks.
            uncounted = [*drawn, "corpus"]
            self.tables = self.dynamic_tables.collection([item_table], uncounted_features=uncounted)

    @override
    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, self.make_optimizer, self.make_lr_scheduler, self.parameter_groups)

    # ---- a batch -----------------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Adds, on the host, the ids that the loss or the ranking looks up beside the history."""
        if not isinstance(batch, SequenceBatch):
            raise MisconfigurationException(
                f"{type(self).__name__}: expected SequenceBatch batches, got {type(batch).__name__}; use "
                "SequenceDataModule, or collate to lightning_gr.SequenceBatch"
            )
        return self.with_lookup_ids(batch, training=self.trainer.training)

    def with_lookup_ids(self, batch: SequenceBatch, *, training: bool) -> SequenceBatch:
        """A batch whose features also hold the labels, and the corpus or the labels' negatives.

        Args:
            batch: a batch on the host whose features are ``item_id`` alone.
            training: whether the loss's candidates are looked up, instead of the corpus that is ranked.
        """
        from torchrec import KeyedJaggedTensor

        ids = self.contrast.lookups(batch, training=training, num_items=self.num_items, corpus=self._corpus)
        holds_corpus = not training or self.loss == "full_softmax"
        if holds_corpus:
            share_C = corpus_share(self._corpus.ids(ranked=not training), self.tables)
        else:
            share_C = torch.zeros(0, dtype=torch.int64)
        ids["corpus"] = (share_C, all_in_first(share_C, batch.num_sequences))
        features = KeyedJaggedTensor(
            keys=list(ids),
            values=torch.cat([values for values, _ in ids.values()]),
            lengths=torch.cat([lengths.to(torch.int64) for _, lengths in ids.values()]),
        )
        return batch.with_features(features, holds_corpus=holds_corpus)

    def embed(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Looks up ``item_id`` (T, D), ``target`` (N, D), ``sampled`` (U, D) and ``corpus`` (C, D)."""
        assert self.tables is not None
        return {name: jagged.values() for name, jagged in self.tables(batch.features).items()}

    def attention_inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """What the encoder is told of a batch beside its tokens; `lightning-gr mask` shows it."""
        return {
            "layout": batch.layout,
            "mask": IntervalMask.causal(batch.layout),
            "times_T": batch.timestamps_T,
            "request_times_T": batch.request_timestamps_T,
        }

    def encode(self, features: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """User states (T, D), one after each token of the history."""
        scale = float(self.encoder.dim) ** 0.5  # type: ignore[arg-type]
        with use_backend(self.backend):
            states_TD: Tensor = self.encoder(features["item_id"] * scale, **self.attention_inputs(batch))
        return states_TD

    def score(self, features: Mapping[str, Tensor], batch: SequenceBatch) -> RetrievalScores:
        """Queries, candidates and logits of the labelled tokens; without labels, of each sequence's last token."""
        # With negatives_offload or 16 bit features serve once: the rows of negatives are taken out of them.
        tokens_N = batch.labels[TASK].tokens_N if TASK in batch.labels else self._last_tokens(batch)
        contrasted = TASK in batch.labels and not batch.holds_corpus
        draws = contrasted and self.contrast.draws
        cosine = self.similarity == "cosine"
        kept = kept_rows(self.contrast, features, normalise=cosine, backend=self.backend) if draws else None
        queries_ND = self._normalised(self.encode(features, batch)[tokens_N]) / self.temperature
        scores = RetrievalScores(tokens_N, queries_ND)
        if TASK in batch.labels and (not draws or self.contrast.targets_apart):
            targets_ND = self._normalised(features["target"])
            scores.positives_N = (queries_ND * targets_ND).sum(-1)
        if not contrasted:
            corpus_CD, group = self._normalised(features["corpus"]), process_group_of(self.tables)
            scores.candidates = CandidateBlock(corpus_CD, batch.features["corpus"].values(), group)
            return scores
        if self.in_batch:
            group = all_processes_of(self.tables) if self.contrast.scope == "global" else None
            scores.candidates = CandidateBlock(targets_ND, batch.labels[TASK].values_N, group)
        rows = self._normalised(features["sampled"]) if draws and kept is None else kept
        add_negatives(scores, self.contrast, rows, batch, backend=self.backend)
        return scores

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
        """The sum of losses over this batch's labels, by task."""
        labels = batch.labels[TASK]
        with use_backend(self.backend):
            losses_N = contrast_losses(scores, labels.values_N, over_corpus=batch.holds_corpus, bce=self.loss == "bce")
        if labels.weights_N is not None:
            losses_N = losses_N * labels.weights_N
        return {TASK: losses_N.sum()}

    def sequence_cost(self) -> SequenceCost:
        """Forward floating-point operations of a history by its number of tokens, for balancing.

        The encoder's, by its `flops` or a `sequence_cost` of its own, and the scores of drawn negatives; tokens alone
        for an encoder that has neither. Scores against candidates of all processes are left out: each process scores
        the queries of all against its share, however sequences are dealt out.
        """
        flops = getattr(self.encoder, "flops", None)
        cost = cost_of(self.encoder) if flops is None else causal(flops)
        if cost == TOKENS or not self.contrast.draws:
            return cost
        per_query = sampled_softmax_flops(1, self.contrast.num_scored(), int(self.encoder.dim))  # type: ignore[arg-type]
        return SequenceCost(cost.linear + per_query, cost.quadratic)

    def flops(self, batch: SequenceBatch) -> ForwardFlops | None:
        """Forward operations of a batch, for MFU; None for an encoder that does not count its own.

        Scores are those of this batch's labels against all candidates, on whichever process they are computed.
        """
        count = getattr(self.encoder, "flops", None)
        if count is None:
            return None
        lengths_B = batch.token_counts_B4[batch.sample_ids_B != PADDING_SAMPLE_ID].sum(1)
        num_tokens = int(lengths_B.sum())
        pairs, dim = int((lengths_B * (lengths_B + 1) // 2).sum()), int(self.encoder.dim)  # type: ignore[arg-type]
        head = again = 0
        if TASK in batch.labels:
            num_labels = batch.labels[TASK].num_labels
            if self.contrast.draws:
                head = sampled_softmax_flops(num_labels, self.contrast.num_scored(num_labels), dim)
            if self.in_batch or not self.contrast.draws:
                scores = (num_labels, self._num_candidates(batch), dim)
                head += full_softmax_flops(*scores)
                reduction: Literal["log_sum_exp", "softplus_sum"] = (
                    "softplus_sum" if self.loss == "bce" else "log_sum_exp"
                )
                alone = not self.in_batch and process_group_of(self.tables) is None
                with use_backend(self.backend):
                    again = CandidateBlock.recomputed_flops(reduction, *scores, device=batch.device, alone=alone)
        if (recomputed := getattr(self.encoder, "recomputed_flops", None)) is not None:
            again += recomputed(num_tokens, pairs)
        return ForwardFlops(attention=count(0, pairs), projections=count(num_tokens, 0), head=head, recomputed=again)

    def _num_candidates(self, batch: SequenceBatch) -> int:
        """Items, or labels that are each other's negatives: where batches accumulate, a mean over those of a step."""
        if not self.in_batch:
            return self.num_items or 0
        if self.contrast.scope == "rank":
            return batch.labels[TASK].num_labels
        group = all_processes_of(self.tables)
        accumulated = max(batch.gradient_divisor / (1 if group is None else group.size()), 1.0)
        return round(batch.denominators[TASK] / accumulated)

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
        assert scores.candidates is not None
        seen = self._seen(scores, batch)
        ranks_N = scores.candidates.ranks(scores.queries_ND, labels.values_N, excluded=seen)
        num_labels = labels.num_labels
        for name, metric in self.metrics[split].items():  # type: ignore[operator]
            if name == "loss":
                metric.update(self.loss_sums(scores, batch)[TASK] / max(num_labels, 1), num_labels)
            else:
                metric.update(ranks_N)
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, batch_size=max(batch.num_samples, 1))

    @override
    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Tensor]:
        """The largest `top_k` best items of each user: ``sample_ids`` (B,), ``item_rows`` (B, K), ``scores`` (B, K).

        A row is -1 where there are fewer items. Where only `corpus` says which items there are, it is the item's id.
        """
        found = self.score(self.embed(batch), batch.without_labels())
        assert found.candidates is not None
        scores, ids = found.candidates.top_k(found.queries_ND, max(self.top_k), excluded=self._seen(found, batch))
        # -1 may be a raw id; where no item is left, the score says so.
        rows = self._corpus.rows_of(ids).masked_fill(scores.cpu() == -torch.inf, -1)
        asks_B = batch.layout.lengths_B > 0
        assert bool((batch.sample_ids_B[asks_B] != PADDING_SAMPLE_ID).all())
        return {"sample_ids": batch.sample_ids_B[asks_B], "item_rows": rows, "scores": scores.cpu()}

    def _seen(self, scores: RetrievalScores, batch: SequenceBatch) -> tuple[Tensor, Tensor] | None:
        """Each query with each item of its history."""
        if not self.remove_seen:
            return None
        layout, tokens_N = batch.layout, scores.tokens_N
        counts_N = layout.position_T[tokens_N] + 1
        query_P = torch.repeat_interleave(counts_N)
        place_P = torch.arange(len(query_P), device=query_P.device) - (counts_N.cumsum(0) - counts_N)[query_P]
        first_N = layout.offsets_B1[layout.sequence_T[tokens_N]]
        return query_P, batch.features["item_id"].values()[first_N[query_P] + place_P]

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _vocabulary(self) -> str | None:
        return item_vocabulary(getattr(self.trainer, "datamodule", None))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["item_vocabulary"] = self._vocabulary()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved, present = checkpoint.get("item_vocabulary"), self._vocabulary()
        if saved and present and saved != present:
            raise MisconfigurationException(
                "item vocabulary: the checkpoint was trained on other items than the data at hand, or with other "
                "raw_ids, so rows would stand for the wrong items; use the data and raw_ids it was trained on"
            )
