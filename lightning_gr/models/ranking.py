"""Ranking: a network over context, history and candidates, trained on what users did with the candidates.

Shape suffixes: B sequences, T tokens, N candidates, M labelled candidates of one task, D dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from typing_extensions import override

from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of
from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch, TokenKind
from lightning_gr.data.raw_ids import RowsOfKeys, refuse_static_tables
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.embeddings.tables_by_width import TablesByWidth, static_tables
from lightning_gr.layers.multi_task import MultiTaskHeads
from lightning_gr.metrics import AUC, Calibration, GroupedAUC, NormalizedEntropy, WeightedMean
from lightning_gr.models.best_candidates import best_candidates
from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.models.longest_sample import refuse_longer_samples
from lightning_gr.models.parameter_groups import ParameterGroup, optimizer_and_schedule
from lightning_gr.models.ranking_tokens import candidate_places
from lightning_gr.ops.backend import Backend, use_backend
from lightning_gr.ranking_features import RankingFeatures

if TYPE_CHECKING:
    from torchrec import EmbeddingCollection

    from lightning_gr.embeddings.dynamic import DynamicEmbeddingCollection

USER = "user_id"


class RankingNetwork(Protocol):
    """What `RankingModule` asks of a network, such as `MTGR` or `DLRM`.

    A network with an attribute ``max_length`` takes samples of at most so many positions, all candidates of a sample
    counted as one; data with longer ones are refused before the first batch.
    """

    dim: int
    """Width of the states."""

    def build(self, features: RankingFeatures, embedding_dim: int) -> None:
        """Makes the layers whose sizes the data decides."""

    def __call__(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> Tensor:
        """States (N, D) of all candidates in the batch's order."""


class RankingModule(pl.LightningModule):
    """Trains a network such as MTGR or a DLRM baseline to predict the labels of candidates, one or several tasks.

    The loss of a task is the binary cross entropy of its logits, a mean over the labels of the global batch. Validation
    and test log AUC, GAUC (by user), NE and calibration of each task as ``val/<task>/AUC`` and so on.

    Args:
        network: `lightning_gr.models.MTGR`, `lightning_gr.models.DLRM`, or another with their methods.
        features: what batches hold; None takes the datamodule's.
        embedding_dim: width of the embeddings, where features say none.
        embedding_std: standard deviation of their first values.
        dynamic_tables: settings of dynamic tables in place of static ones, for a datamodule with ``raw_ids`` too; None
            takes static ones.
        task_weights: by task, its weight in the loss; 1 where absent.
        num_experts: experts of the multi-task heads; 0 gives each task a tower of its own.
        head_dim: width of experts and towers.
        head_dropout: inside the towers.
        top_k_experts: each task's gate mixes only that many experts of a candidate, those it weighs most; None mixes
            all.
        micro_batch: outside of training, candidates are scored this many at a time against keys and values of their
            history (M-FALCON): the same logits, in less memory. None takes one pass.
        top_k: `predict` gives the best so many candidates of each sample, for `TopKWriter`, instead of all of them.
        top_k_task: by whose probability they are ordered; None takes the first task.
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
        network: nn.Module,
        features: RankingFeatures | None = None,
        embedding_dim: int = 32,
        embedding_std: float = 0.02,
        dynamic_tables: DynamicTables | None = None,
        task_weights: dict[str, float] | None = None,
        num_experts: int = 4,
        head_dim: int = 64,
        head_dropout: float = 0.0,
        top_k_experts: int | None = None,
        micro_batch: int | None = None,
        top_k: int | None = None,
        top_k_task: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        parameter_groups: list[ParameterGroup] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if embedding_dim < 1:
            raise MisconfigurationException(f"embedding_dim={embedding_dim}: expected at least 1")
        if not 0 <= embedding_std < math.inf:
            raise MisconfigurationException(f"embedding_std={embedding_std}: expected a number of at least 0")
        for task, weight in (task_weights or {}).items():
            if not 0 <= weight < math.inf:
                raise MisconfigurationException(f"task_weights.{task}={weight}: expected a number of at least 0")
        if backend not in get_args(Backend):
            raise MisconfigurationException(f"backend={backend!r}: expected one of {', '.join(get_args(Backend))}")
        for name, number in (("micro_batch", micro_batch), ("top_k", top_k)):
            if number is not None and number < 1:
                raise MisconfigurationException(f"{name}={number}: expected at least 1, or leave it out")
        if top_k_task is not None and top_k is None:
            raise MisconfigurationException(f"top_k_task={top_k_task}: orders the best top_k; give top_k too")
        if micro_batch is not None and not hasattr(network, "in_micro_batches"):
            rank_zero_warn(
                f"micro_batch={micro_batch}: {type(network).__name__} scores all candidates of a batch at once; lower "
                "eval_global_tokens where memory is short"
            )
        self.network = network
        self.micro_batch, self.top_k, self.top_k_task = micro_batch, top_k, top_k_task
        self.backend: Backend = backend
        self.features = features
        self.embedding_dim, self.embedding_std = embedding_dim, embedding_std
        self.dynamic_tables = dynamic_tables
        self.task_weights = dict(task_weights or {})
        self.num_experts, self.head_dim, self.head_dropout = num_experts, head_dim, head_dropout
        self.top_k_experts = top_k_experts
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.parameter_groups = tuple(parameter_groups or ())
        self.tables: EmbeddingCollection | TablesByWidth | DynamicEmbeddingCollection | None = None
        self._rows_of_keys: dict[str, RowsOfKeys] = {}
        self.heads: MultiTaskHeads | None = None
        self.train_loss = WeightedMean()
        self.metrics: nn.ModuleDict | None = None

    # ---- building ----------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        if self.features is None:
            self.features = getattr(getattr(self.trainer, "datamodule", None), "ranking_features", None)
        if self.features is None:
            raise MisconfigurationException(
                "features: not given, and the Trainer has no datamodule that knows them; use RankingDataModule, or "
                "pass RankingModule(features=...)"
            )
        refuse_static_tables(self.features.raw_ids, self.dynamic_tables)
        if self.features.raw_ids and stage == "predict":
            datamodule = getattr(self.trainer, "datamodule", None)
            for what in ("user", "item"):
                if (keys := getattr(datamodule, f"{what}_keys", None)) is not None:
                    self._rows_of_keys[f"{what}_rows"] = RowsOfKeys(torch.as_tensor(keys))
        if unknown := [task for task in self.task_weights if task not in self.features.tasks]:
            raise MisconfigurationException(
                f"task_weights.{unknown[0]}: no such task; choose from {', '.join(self.features.tasks)}"
            )
        if self.top_k_task is not None and self.top_k_task not in self.features.tasks:
            raise MisconfigurationException(
                f"top_k_task={self.top_k_task}: no such task; choose from {', '.join(self.features.tasks)}"
            )
        limit = getattr(self.network, "max_length", None)
        refuse_longer_samples(self, setting="network.max_length", max_length=limit, stage=stage)
        if self.metrics is None:
            self.metrics = nn.ModuleDict(
                {
                    split: nn.ModuleDict({_key(name): self._metrics() for name in self._metric_names()})
                    for split in ("val", "test")
                }
            )

    def _metric_names(self) -> list[str]:
        """A name for each set of metrics: the tasks'."""
        assert self.features is not None
        return list(self.features.tasks)

    @staticmethod
    def _metrics() -> nn.ModuleDict:
        metrics: dict[str, nn.Module] = {"loss": WeightedMean(), "AUC": AUC(), "GAUC": GroupedAUC()}
        return nn.ModuleDict(metrics | {"NE": NormalizedEntropy(), "calibration": Calibration()})

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        from torchrec import EmbeddingConfig

        assert self.features is not None
        self.network.build(self.features, self.embedding_dim)  # type: ignore[operator]
        self.heads = MultiTaskHeads(
            dim=int(self.network.dim),  # type: ignore[arg-type]
            tasks=self.features.tasks,
            num_experts=self.num_experts,
            hidden_dim=self.head_dim,
            dropout=self.head_dropout,
            top_k_experts=self.top_k_experts,
        )
        make_tables = static_tables if self.dynamic_tables is None else self.dynamic_tables.collection
        self.tables = make_tables(
            [
                EmbeddingConfig(
                    name=shape.name,
                    num_embeddings=shape.rows,
                    embedding_dim=shape.dim,
                    feature_names=list(shape.features),
                    init_fn=functools.partial(torch.nn.init.normal_, std=self.embedding_std),
                )
                for shape in self.features.shapes(self.embedding_dim)
            ]
        )

    @override
    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, self.make_optimizer, self.make_lr_scheduler, self.parameter_groups)

    # ---- a batch -----------------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuses batches that are not of `RankingDataModule`'s kind."""
        if not isinstance(batch, SequenceBatch) or "numbers" not in batch.dense:
            raise MisconfigurationException(
                f"{type(self).__name__}: expected SequenceBatch batches of ranking samples, got "
                f"{type(batch).__name__}; use RankingDataModule"
            )
        return batch

    def attention_inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """What the network's encoder is told of a batch beside its tokens; `lightning-gr mask` shows it.

        Raises:
            MisconfigurationException: the network has no attention between tokens.
        """
        if not hasattr(self.network, "attention_inputs"):
            raise MisconfigurationException(
                f"network: {type(self.network).__name__} has no attention between the tokens of a sequence; only "
                "networks such as MTGR have a mask"
            )
        inputs: dict[str, Any] = self.network.attention_inputs(batch)  # type: ignore[operator]
        return inputs

    def embed(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """By sparse feature, an embedding for each value of it in the batch."""
        assert self.tables is not None
        return {name: jagged.values() for name, jagged in self.tables(batch.features).items()}

    def score(self, embedded: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, Tensor]:
        """By task, the logit of each candidate, (N,) in the batch's order."""
        heads = self.heads
        assert heads is not None
        in_micro_batches = getattr(self.network, "in_micro_batches", None)
        logits: dict[str, Tensor]
        with use_backend(self.backend):
            if self.micro_batch is None or in_micro_batches is None or self.training or torch.is_grad_enabled():
                logits = heads(self.network(embedded, batch))
            else:
                states_ND = in_micro_batches(embedded, batch, self.micro_batch)
                parts = [heads(states) for states in states_ND.split(self.micro_batch)]
                logits = {task: torch.cat([part[task] for part in parts]) for task in heads.tasks}
        return logits

    @override
    def forward(self, batch: SequenceBatch) -> dict[str, Tensor]:
        return self.score(self.embed(batch), batch)

    def _labelled(self, logits: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, Tensor]:
        """By task, the logits (M,) of its labelled candidates."""
        places_N = candidate_places(batch)
        return {task: logits[task][torch.searchsorted(places_N, x.tokens_N)] for task, x in batch.labels.items()}

    def loss_sums(self, logits: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, Tensor]:
        """By task, the sum of binary cross entropies over this batch's labels."""
        return {task: losses_M.sum() for task, losses_M in self.label_losses(logits, batch).items()}

    def label_losses(self, logits: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, Tensor]:
        """By task, the weighted binary cross entropy (M,) of each label, in float32 at least."""
        losses = {}
        for task, logits_M in self._labelled(logits, batch).items():
            labels = batch.labels[task]
            logits_M = logits_M if logits_M.dtype == torch.float64 else logits_M.float()
            losses[task] = F.binary_cross_entropy_with_logits(
                logits_M, labels.values_N.to(logits_M.dtype), labels.weights_N, reduction="none"
            )
        return losses

    def sequence_cost(self) -> SequenceCost:
        """Forward floating-point operations of a sample by its number of tokens, for balancing.

        The network's, and the heads' for half of the tokens; tokens alone for a network without a `sequence_cost`.
        """
        cost = cost_of(self.network)
        if cost == TOKENS or self.heads is None:
            return cost
        return SequenceCost(cost.linear + self.heads.flops(1) / 2, cost.quadratic)

    def flops(self, batch: SequenceBatch) -> ForwardFlops | None:
        """Forward operations of a batch, for MFU; None for a network that does not count its own.

        The network's ``flops(counts, pairs)`` is linear in both, and ``visible_pairs(batch)`` says how many pairs.
        """
        count, pairs_of = (getattr(self.network, name, None) for name in ("flops", "visible_pairs"))
        if count is None or pairs_of is None or self.heads is None or self.features is None:
            return None
        real_B = batch.sample_ids_B != PADDING_SAMPLE_ID
        counts_4, pairs = batch.token_counts_B4[real_B].sum(0).tolist(), pairs_of(batch)
        again = getattr(self.network, "recomputed_flops", None)
        pooled = sum(
            batch.features[name].values().numel() * self.features.dim_of(name, self.embedding_dim)
            for name in self.features.pooled
        )
        return ForwardFlops(
            attention=count([0, 0, 0, 0], 1) * pairs,
            projections=count(counts_4, 0),
            embedding=pooled,
            head=self.heads.flops(counts_4[TokenKind.CANDIDATE]),
            recomputed=0 if again is None else again([0, 0, 0, 0], 1) * pairs + again(counts_4, 0),
        )

    # ---- Lightning's steps -------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        sums = self.loss_sums(self(batch), batch)
        num_labels = sum(labels.num_labels for labels in batch.labels.values())
        total = torch.stack([x.detach() for x in sums.values()]).sum()
        local_mean = total / max(num_labels, 1)
        self.train_loss.update(local_mean, num_labels)
        size = max(batch.num_samples, 1)
        self.log("train/loss", local_mean, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss_epoch", self.train_loss, on_step=False, on_epoch=True, batch_size=size)
        return batch.mean_over_global_batch(sums, self.task_weights)

    @override
    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: SequenceBatch) -> None:
        self._update_metrics(split, self(batch), batch)

    def _update_metrics(
        self, split: str, logits: Mapping[str, Tensor], batch: SequenceBatch, *, suffix: str = ""
    ) -> None:
        """Counts logits of a batch into the metrics of a split, those of a name with `suffix`, and logs them."""
        assert self.metrics is not None
        sums = self.loss_sums(logits, batch)
        users_B = _users(batch)
        for task, logits_M in self._labelled(logits, batch).items():
            labels = batch.labels[task]
            users_M = users_B[batch.layout.sequence_T[labels.tokens_N]]
            metrics: Any = self.metrics[split][_key(task + suffix)]  # type: ignore[index]
            metrics["loss"].update(sums[task] / max(labels.num_labels, 1), labels.num_labels)
            scored = (logits_M.float(), labels.values_N)
            for name in ("AUC", "NE", "calibration"):
                metrics[name].update(*scored, labels.weights_N)
            metrics["GAUC"].update(*scored, users_M, labels.weights_N)
            for name, metric in metrics.items():
                self.log(
                    f"{split}/{task}/{name}{suffix}",
                    metric,
                    on_step=False,
                    on_epoch=True,
                    batch_size=max(batch.num_samples, 1),
                )

    @override
    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """Each candidate's user row, item row and, by task, probability (float64); all (N,) on the CPU.

        With `top_k` instead what `TopKWriter` takes, the best of each sample first: ``sample_ids`` (B,), ``user_rows``
        (B,), ``timestamps`` (B,), the first candidate's, where the data has times, ``item_rows`` (B, K) and ``scores``
        (B, K), the probabilities of `top_k_task`. Equal ones are in the order of item rows; where there are fewer
        candidates, rows are -1 and scores -inf.
        """
        return self._predictions(self(batch), batch)

    def _predictions(self, logits: Mapping[str, Tensor], batch: SequenceBatch) -> dict[str, Any]:
        """What `predict_step` gives, from a batch's logits."""
        places_N = candidate_places(batch)
        contextual_T = (batch.kind_T == 0).cumsum(0)
        items_N = batch.features["item_id"].values()[places_N - contextual_T[places_N]].cpu()
        items_N = self._rows_of_keys["item_rows"](items_N) if "item_rows" in self._rows_of_keys else items_N
        users_B = _users(batch).cpu()
        users_B = self._rows_of_keys["user_rows"](users_B) if "user_rows" in self._rows_of_keys else users_B
        counts_B = batch.token_counts_B4[:, TokenKind.CANDIDATE]
        probabilities = {task: x.double().sigmoid().cpu() for task, x in logits.items()}
        if self.top_k is None:
            rows_N = torch.repeat_interleave(users_B, counts_B)
            return {"user_rows": rows_N, "item_rows": items_N, "probabilities": probabilities}
        assert self.features is not None
        scores_N = probabilities[self.top_k_task or self.features.tasks[0]]
        items_BK, scores_BK = best_candidates(scores_N, items_N, counts_B, self.top_k)
        found = {"sample_ids": batch.sample_ids_B, "user_rows": users_B, "item_rows": items_BK, "scores": scores_BK}
        if batch.timestamps_T is not None:
            first_B = counts_B.cumsum(0) - counts_B
            found["timestamps"] = torch.zeros(batch.num_sequences, dtype=torch.int64)
            found["timestamps"][counts_B > 0] = batch.timestamps_T[places_N].cpu()[first_B[counts_B > 0]]
        return found


def _users(batch: SequenceBatch) -> Tensor:
    """The user of each sequence, int64 (B,); 0 for padding."""
    users = batch.features[USER]
    users_B = users.values().new_zeros(batch.num_sequences)
    return users_B.masked_scatter(users.lengths() > 0, users.values())


def _key(task: str) -> str:
    """A task's name as a module's."""
    return task.replace(".", "_")
