"""Meta learning of ranking: parameters from which a few records of a new task are enough (G-Meta, MAML).

G-Meta (Ant Group, arXiv 2401.04338): one exchange brings the rows of support and query, the inner loop is local, and
the outer gradient is computed where the task is. Its paper leaves open what is adapted, in how many steps, and of
which order; here these are settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_gr.batch import Labels, SequenceBatch
from lightning_gr.embeddings.dynamic import DynamicTables
from lightning_gr.episode_batch import EpisodeBatch, EpisodeGroup, EpisodePart, episode_batch
from lightning_gr.models.forward_flops import ForwardFlops
from lightning_gr.models.inner_loop import Scored, inner_sgd, with_gradient
from lightning_gr.models.parameter_groups import ParameterGroup
from lightning_gr.models.ranking import RankingModule
from lightning_gr.ops.backend import Backend
from lightning_gr.ranking_features import RankingFeatures

Order = Literal["first", "second", "reptile"]
Adapt = Literal["dense", "embedding", "both"]
ROWS = "tables."
STEPS = "step_sizes."


class MetaRankingModule(RankingModule):
    """Trains a ranking network so that a few steps on a task's support make it good at the task's query.

    A task is what `TaskDataModule` groups records by: a user, an item, any column. Each step adapts copies of dense
    parameters, of embedding rows, or of both to the support of each episode, and learns from the query's loss; the
    copies are then forgotten. Validation and test log the metrics of `RankingModule` after adaptation to each number of
    `shots`, as ``val/<task>/AUC@<shots>``.

    Args:
        network: as of `RankingModule`; with ``order: second`` its operators must be differentiable twice, so give
            ``backend: reference`` unless it is a DLRM without target attention.
        inner_lr: step size of the inner loop; where it is learned, the first.
        inner_lr_rows: the same of embedding rows; None takes `inner_lr`.
        inner_steps: inner steps; 0 trains on the queries without adaptation.
        adapt: what the inner loop changes: `dense` parameters, `embedding` rows, `both`, or patterns of names such as
            ``heads.*`` (ANIL) and ``tables.user_id``, in which ``*`` matches dots too. Frozen parameters stay.
        order: `first` takes the inner steps as constants (FOMAML), `second` differentiates through them (MAML);
            `reptile` goes towards what the inner loop finds on support and query together, and needs ``adapt: both``.
        learn_step_sizes: whether the step size of each parameter and table is learned (Meta-SGD, by tensor).
        shots: sizes of the supports that evaluation adapts to, 0 for none; None takes the datamodule's.
        adapt_in_predict: whether `predict` adapts to the largest support it is given; otherwise it scores without.
        features: as of `RankingModule`, like all that follow.
        embedding_dim: width of the embeddings, where features say none.
        embedding_std: standard deviation of their first values.
        dynamic_tables: settings of dynamic tables in place of static ones.
        task_weights: by label, its weight in the loss; 1 where absent.
        num_experts: experts of the multi-task heads; 0 gives each task a tower of its own.
        head_dim: width of experts and towers.
        head_dropout: inside the towers.
        top_k_experts: so many experts of a candidate are mixed; None mixes all.
        top_k: `predict` gives the best so many candidates of each query, for `TopKWriter`.
        top_k_task: by whose probability they are ordered; None takes the first task.
        optimizer: makes the optimiser of the outer loop.
        lr_scheduler: makes its schedule, stepped every step; None keeps the rate.
        parameter_groups: parameters with a learning rate or weight decay of their own, by name.
        backend: implementation of every operator of the model; `auto` takes the device's, which cannot be
            differentiated twice.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
    """

    def __init__(
        self,
        *,
        network: nn.Module,
        inner_lr: float = 0.01,
        inner_lr_rows: float | None = None,
        inner_steps: int = 1,
        adapt: Adapt | list[str] = "both",
        order: Order = "first",
        learn_step_sizes: bool = False,
        shots: list[int] | None = None,
        adapt_in_predict: bool = False,
        features: RankingFeatures | None = None,
        embedding_dim: int = 32,
        embedding_std: float = 0.02,
        dynamic_tables: DynamicTables | None = None,
        task_weights: dict[str, float] | None = None,
        num_experts: int = 0,
        head_dim: int = 64,
        head_dropout: float = 0.0,
        top_k_experts: int | None = None,
        top_k: int | None = None,
        top_k_task: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        parameter_groups: list[ParameterGroup] | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            network=network,
            features=features,
            embedding_dim=embedding_dim,
            embedding_std=embedding_std,
            dynamic_tables=dynamic_tables,
            task_weights=task_weights,
            num_experts=num_experts,
            head_dim=head_dim,
            head_dropout=head_dropout,
            top_k_experts=top_k_experts,
            top_k=top_k,
            top_k_task=top_k_task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            parameter_groups=parameter_groups,
            backend=backend,
        )
        for name, rate in (("inner_lr", inner_lr), ("inner_lr_rows", inner_lr_rows)):
            if rate is not None and not 0 < rate < math.inf:
                raise MisconfigurationException(
                    f"{name}={rate}: expected a number above 0; inner_steps=0 trains without adaptation"
                )
        if inner_steps < 0:
            raise MisconfigurationException(f"inner_steps={inner_steps}: expected at least 0")
        for name, asked in (("learn_step_sizes", learn_step_sizes), ("adapt_in_predict", adapt_in_predict)):
            if asked and not inner_steps:
                raise MisconfigurationException(
                    f"{name}={asked}: with inner_steps=0 nothing is adapted; set inner_steps to at least 1, or leave "
                    f"{name} out"
                )
        if inner_lr_rows is not None and adapt == "dense":
            rank_zero_warn(f"inner_lr_rows={inner_lr_rows}: not used, since adapt=dense leaves embedding rows alone")
        if order not in get_args(Order):
            raise MisconfigurationException(f"order={order!r}: expected one of {', '.join(get_args(Order))}")
        if (isinstance(adapt, str) and adapt not in get_args(Adapt)) or not adapt:
            raise MisconfigurationException(
                f"adapt={adapt!r}: expected one of {', '.join(get_args(Adapt))}, or a list of patterns of names"
            )
        if order == "reptile" and (adapt != "both" or learn_step_sizes or not inner_steps):
            raise MisconfigurationException(
                f"order=reptile: what it does not adapt it does not train, and it gives step sizes no gradient; set "
                f"adapt=both (now {adapt}), learn_step_sizes=false (now {learn_step_sizes}) and inner_steps of at "
                f"least 1 (now {inner_steps})"
            )
        if shots is not None and (not shots or min(shots) < 0):
            raise MisconfigurationException(f"shots={shots}: expected at least one number, none below 0")
        self.inner_lr, self.inner_lr_rows = inner_lr, inner_lr if inner_lr_rows is None else inner_lr_rows
        self.inner_steps, self.order, self.adapt = inner_steps, order, adapt
        self.learn_step_sizes, self.adapt_in_predict = learn_step_sizes, adapt_in_predict
        self.shots = None if shots is None else sorted(set(shots))
        self.step_sizes = nn.ParameterDict()
        self._adapted: list[str] | None = None

    # ---- building ----------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        try:
            trainer: Any = self.trainer
        except RuntimeError:
            trainer = None  # the module is used without a Trainer
        given = getattr(getattr(trainer, "datamodule", None), "shots", self.shots)
        if given is None:
            raise MisconfigurationException(
                "shots: not given, and the Trainer has no datamodule that knows them; use TaskDataModule, or pass "
                "MetaRankingModule(shots=...)"
            )
        self.shots = sorted(set(given)) if self.shots is None else self.shots
        if missing := set(self.shots) - {0, *given}:
            raise MisconfigurationException(
                f"shots={self.shots}: the data has supports of {sorted(given)}; give it shots of {min(missing)} too, "
                "or leave out the model's, which then takes the data's"
            )
        twice = bool(getattr(self.network, "differentiable_twice", False))
        if self.order == "second" and self.inner_steps and self.backend != "reference" and not twice:
            raise MisconfigurationException(
                f"order=second: the fused operators of {type(self.network).__name__} are differentiable once; set "
                "backend=reference, or order=first; a network without fused operators says so by an attribute "
                "differentiable_twice = True"
            )
        if getattr(trainer, "precision", None) == "16-mixed":
            rank_zero_warn(
                "precision=16-mixed: gradients inside of a step are taken without the loss's scale, so small ones "
                "become 0; use bf16-mixed"
            )
        super().setup(stage)

    @override
    def _metric_names(self) -> list[str]:
        assert self.shots is not None
        return [f"{task}@{shots}" for task in super()._metric_names() for shots in self.shots]

    @override
    def configure_model(self) -> None:
        if self.tables is not None:
            return
        super().configure_model()
        names = self.adapted_names()
        if self.learn_step_sizes:
            for name in names:
                rate = self.inner_lr_rows if name.startswith(ROWS) else self.inner_lr
                self.step_sizes[name.replace(".", ":")] = nn.Parameter(torch.tensor(rate))

    def adapted_names(self) -> list[str]:
        """What the inner loop changes: dense parameters by name, and tables as ``tables.<table>``.

        Raises:
            MisconfigurationException: a pattern of `adapt` matches nothing.
        """
        if self._adapted is None:
            assert self.heads is not None
            dense = [name for name, _ in self._scored().named_parameters()]
            rows = [ROWS + table for table in self._tables()]
            if isinstance(self.adapt, str):
                self._adapted = dense * (self.adapt != "embedding") + rows * (self.adapt != "dense")
            else:
                for pattern in self.adapt:
                    if not any(fnmatchcase(name, pattern) for name in (*dense, *rows)):
                        raise MisconfigurationException(
                            f"adapt={pattern!r}: matches nothing; there are {', '.join((*dense, *rows))}"
                        )
                self._adapted = [x for x in (*dense, *rows) if any(fnmatchcase(x, one) for one in self.adapt)]
        return self._adapted

    def _tables(self) -> dict[str, tuple[str, ...]]:
        """By table, the features that look it up."""
        assert self.features is not None
        return {shape.name: shape.features for shape in self.features.shapes(self.embedding_dim)}

    def _scored(self) -> Scored:
        assert self.heads is not None
        return Scored(self.network, self.heads, self.score)

    def _step_sizes(self) -> dict[str, float | Tensor]:
        sizes: dict[str, float | Tensor] = {}
        for name in self.adapted_names():
            fixed = self.inner_lr_rows if name.startswith(ROWS) else self.inner_lr
            sizes[name] = self.step_sizes[name.replace(".", ":")] if self.learn_step_sizes else fixed
        return sizes

    # ---- a batch -----------------------------------------------------------------------------------------------

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes episodes apart, while the batch is on the host."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        return episode_batch(batch, self._tables(), apart=self.adapts_apart)

    @property
    def adapts_apart(self) -> bool:
        """Whether each episode is adapted by itself, as dense parameters are; rows of all are adapted at once."""
        return self.inner_steps > 0 and any(not name.startswith(ROWS) for name in self.adapted_names())

    def _rows(self, embedded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By table, the looked-up values of all its features, one feature after the other."""
        return {
            table: torch.cat([embedded[name] for name in features]) if len(features) > 1 else embedded[features[0]]
            for table, features in self._tables().items()
        }

    def _part_logits(self, scored: Scored, values: Mapping[str, Tensor], part: EpisodePart) -> dict[str, Tensor]:
        """Logits of support or query, with parameters and rows by name."""
        embedded = {
            feature: values[ROWS + table].index_select(0, part.rows_V[feature])
            for table, features in self._tables().items()
            for feature in features
        }
        dense = {name: value for name, value in values.items() if not name.startswith(ROWS)}
        return scored.with_parameters(dense, embedded, part.batch)

    def _values(self, dense: dict[str, Tensor], rows: Mapping[str, Tensor], group: EpisodeGroup) -> dict[str, Tensor]:
        """Dense parameters, and a group's rows of each table as copies, ``tables.<table>``."""
        return dense | {ROWS + table: rows[table].detach()[at].requires_grad_() for table, at in group.first_R.items()}

    def _support_loss(self, scored: Scored, values: Mapping[str, Tensor], group: EpisodeGroup) -> Tensor:
        """The sum over episodes of the weighted mean losses of their support's labels."""
        part = group.support
        losses = self.label_losses(self._part_logits(scored, values, part), part.batch)
        return torch.stack(
            [
                (losses_M * part.label_shares_M[task].to(losses_M.dtype)).sum() * self.task_weights.get(task, 1.0)
                for task, losses_M in losses.items()
            ]
        ).sum()

    def _joint_loss(self, scored: Scored, values: Mapping[str, Tensor], group: EpisodeGroup) -> Tensor:
        """The weighted mean losses of an episode's labels, in its support and its query."""
        sums: dict[str, list[Tensor]] = {}
        sizes: dict[str, float | Tensor] = {}
        for part in (group.support, group.query):
            for task, loss in self.loss_sums(self._part_logits(scored, values, part), part.batch).items():
                sums.setdefault(task, []).append(loss * self.task_weights.get(task, 1.0))
                sizes[task] = sizes.get(task, 0.0) + _size(part.batch.labels[task])
        means = [torch.stack(x).sum() / (sizes[task] + (sizes[task] == 0)) for task, x in sums.items()]
        return torch.stack(means).sum()

    def _adapt(
        self,
        scored: Scored,
        values: Mapping[str, Tensor],
        group: EpisodeGroup,
        *,
        loss: Callable[[Scored, Mapping[str, Tensor], EpisodeGroup], Tensor],
        second_order: bool,
    ) -> dict[str, Tensor]:
        return inner_sgd(
            lambda now: loss(scored, now, group),
            values,
            self._step_sizes(),
            steps=self.inner_steps,
            second_order=second_order,
        )

    # ---- Lightning's steps -------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        assert isinstance(batch, EpisodeBatch)
        value, total = self.adapted_loss(self.embed(batch), batch)
        num_labels = sum(x.num_labels for x in batch.queries.labels.values()) if batch.num_samples else 0
        mean, size = total / max(num_labels, 1), max(batch.num_samples, 1)
        self.train_loss.update(mean, num_labels)
        self.log("train/loss", mean, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss_epoch", self.train_loss, on_step=False, on_epoch=True, batch_size=size)
        return value

    def adapted_loss(self, embedded: Mapping[str, Tensor], batch: EpisodeBatch) -> tuple[Tensor, Tensor]:
        """The training loss after the inner loop, differentiable, and the sum of the queries' losses without a graph.

        Args:
            embedded: what `embed` gave for the batch.
            batch: of which each query has one support.
        """
        rows, scored = self._rows(embedded), self._scored()
        parameters = dict(scored.named_parameters()) | {STEPS + name: x for name, x in self.step_sizes.items()}
        outer = {name: x for name, x in parameters.items() if x.requires_grad}
        outer |= {ROWS + table: x for table, x in rows.items()}
        gradients = {name: torch.zeros_like(x) for name, x in outer.items()}
        value, total = (torch.zeros((), device=batch.device) for _ in range(2))
        groups = [group for own in batch.groups.values() for group in own]
        if batch.num_samples and len(batch.groups) != 1:
            raise MisconfigurationException(
                f"SequenceBatch.shots_B: a training batch holds queries with supports of {sorted(batch.groups)} "
                "records, and each must have one; use TaskDataModule"
            )
        dense: dict[str, Tensor] = dict(scored.named_parameters())
        for group in groups:
            loss, sums = self._learn(scored, self._values(dense, rows, group), group, gradients)
            value, total = value + loss, total + torch.stack(list(sums.values())).sum()
        return with_gradient(value, gradients, outer), total

    def _learn(
        self, scored: Scored, values: dict[str, Tensor], group: EpisodeGroup, gradients: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds a group's outer gradient to `gradients`.

        Returns:
            The group's part of the loss, and by task the sum of its query's losses, without a graph.
        """
        second_order = self.order == "second"
        inner = self._joint_loss if self.order == "reptile" else self._support_loss
        adapted = self._adapt(scored, values, group, loss=inner, second_order=second_order)
        query = group.query.batch
        if self.order == "reptile":
            with torch.no_grad():
                sums = self.loss_sums(self._part_logits(scored, adapted, group.query), query)
                loss = query.mean_over_global_batch(sums, self.task_weights)
            # Nichol et al., arXiv 1803.02999: the way the inner loop went, over its step size.
            share, sizes = _share_of_global_batch(query), self._step_sizes()
            found = {name: (values[name] - adapted[name]) / sizes[name] * share for name in sizes}
        else:
            sums = self.loss_sums(self._part_logits(scored, adapted, group.query), query)
            loss = query.mean_over_global_batch(sums, self.task_weights)
            trained = values | {STEPS + name: x for name, x in self.step_sizes.items()}
            trained = {name: x for name, x in trained.items() if x.requires_grad}
            of_loss = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            found = {name: x for name, x in zip(trained, of_loss, strict=True) if x is not None}
        with torch.no_grad():
            for name, gradient in found.items():
                if name not in gradients:
                    continue  # a frozen parameter
                if name.startswith(ROWS):
                    gradients[name].index_add_(0, group.first_R[name.removeprefix(ROWS)], gradient)
                else:
                    gradients[name] += gradient
        return loss.detach(), {task: x.detach() for task, x in sums.items()}

    @override
    def _evaluate(self, split: str, batch: SequenceBatch) -> None:
        assert isinstance(batch, EpisodeBatch)
        assert self.shots is not None
        embedded = self.embed(batch)
        for shots in self.shots:
            logits = self.adapted_logits(batch, shots=shots, embedded=embedded)
            self._update_metrics(split, logits, batch.queries, suffix=f"@{shots}")

    @override
    def predict_step(self, batch: SequenceBatch, batch_idx: int) -> dict[str, Any]:
        """As of `RankingModule`, for the candidates of the queries."""
        assert isinstance(batch, EpisodeBatch)
        shots = max(batch.groups, default=0) if self.adapt_in_predict else 0
        if self.adapt_in_predict and batch.num_samples and not shots:
            raise MisconfigurationException(
                "adapt_in_predict=True: the batches have no supports; give the data shots above 0, or leave it out"
            )
        return self._predictions(self.adapted_logits(batch, shots=shots), batch.queries)

    def adapted_logits(
        self, batch: EpisodeBatch, *, shots: int, embedded: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """By task, the logits (N,) of all candidates of the batch's queries after adaptation; no gradient.

        Args:
            batch: the batch.
            shots: size of the supports that are adapted to; 0 scores without.
            embedded: what `embed` gave for the batch; None looks it up.

        Raises:
            MisconfigurationException: the batch has no supports of that size.
        """
        embedded = self.embed(batch) if embedded is None else embedded
        if not shots or not batch.num_samples:
            own = {name: x.index_select(0, batch.query_values_V[name]) for name, x in embedded.items()}
            return self.score(own, batch.queries)
        if shots not in batch.groups:
            raise MisconfigurationException(
                f"shots={shots}: the batches have supports of {sorted(batch.groups)}; give the data the same shots"
            )
        rows, scored, logits = self._rows(embedded), self._scored(), []
        dense: dict[str, Tensor] = dict(scored.named_parameters())
        for group in batch.groups[shots]:
            # Evaluation runs in inference mode, of which no tensor may enter a graph: indexing makes new ones.
            with torch.inference_mode(False), torch.enable_grad():
                values = self._values(dense, rows, group)
                adapted = self._adapt(scored, values, group, loss=self._support_loss, second_order=False)
                adapted = {name: x.detach() for name, x in adapted.items()}
            with torch.no_grad():
                logits.append(self._part_logits(scored, adapted, group.query))
        return {task: torch.cat([own[task] for own in logits]) for task in logits[0]}

    # ---- costs -------------------------------------------------------------------------------------------------

    @override
    def flops(self, batch: SequenceBatch) -> ForwardFlops | None:
        """Forward operations of a batch, for MFU: the supports once for each inner step, and the queries."""
        assert isinstance(batch, EpisodeBatch)
        parts = [x for own in batch.groups.values() for group in own for x in self._passes(group)]
        counted = [super(MetaRankingModule, self).flops(part) for part in parts or [batch]]
        if counted[0] is None:
            return None
        return ForwardFlops(
            **{x.name: sum(getattr(one, x.name) for one in counted) for x in dataclasses.fields(ForwardFlops)}
        )

    def step_flops(self, batch: SequenceBatch) -> tuple[int, int] | None:
        """Operations of a training step's forward and backward passes; None for a network that does not count its own.

        A backward pass has twice its forward's. With ``order: second`` the outer gradient goes back through both of an
        inner step, which is twice as much as they were together: eight forwards of each in all. It is a bound: what no
        gradient needs (that of the first layer's input, of what is not adapted) is counted too.
        """
        assert isinstance(batch, EpisodeBatch)
        counted = self.flops(batch)
        if counted is None:
            return None
        forward = int(counted.forward)
        queries = [group.query.batch for own in batch.groups.values() for group in own]
        query = sum(int(x.forward) for x in map(super().flops, queries) if x is not None)
        inner = forward - query
        return forward, {"first": 2 * forward, "second": 8 * inner + 2 * query, "reptile": 2 * inner}[self.order]

    def _passes(self, group: EpisodeGroup) -> list[SequenceBatch]:
        """The batches that a group's training step computes forward."""
        inner = [group.support.batch] + [group.query.batch] * (self.order == "reptile")
        return inner * self.inner_steps + [group.query.batch]


def _size(labels: Labels) -> float | Tensor:
    """The sum of the labels' weights."""
    return float(labels.num_labels) if labels.weights_N is None else labels.weights_N.sum()


def _share_of_global_batch(batch: SequenceBatch) -> float | Tensor:
    """What part of the global batch's labels a batch has, a mean over tasks, by which its losses are weighed too."""
    shares = [_size(x) / batch.denominators[task] for task, x in batch.labels.items() if batch.denominators[task] > 0]
    return sum(shares) * (batch.gradient_divisor / max(len(shares), 1))
