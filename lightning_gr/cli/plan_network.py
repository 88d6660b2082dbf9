"""A forward and backward pass of a recipe's network on this machine, beside tables that are not there: what it keeps.

Tables may be larger than this machine, so rows are random; what is measured does not depend on their values.

Shape suffixes: N rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_gr.batch import SequenceBatch
    from lightning_gr.data.plan import GlobalBatchPlan

Array = np.ndarray[Any, Any]
CORPUS = "corpus"
MOST_TOKENS_COLLATED = 1 << 16
"""Of a batch of which ids are counted."""
_TOKENS = 2048
_CORPUS_ROWS = (61, 149)
"""Two sizes of a corpus that no width of a layer is likely to have, by which matrices of scores are known."""


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps from forward to backward on a rank.

    Args:
        per_token: for each token of the rank's batch.
        per_corpus_row: for each row of the corpus that the rank scores against.
        constant: whatever the batch.
        recomputes: whether layers are computed again, so that one layer's activations are there at a time.
        by_episode: whether `constant` is of the first global batch's longest episode, since episodes are adapted one
            after the other.
    """

    per_token: float
    per_corpus_row: float
    constant: float
    recomputes: bool = False
    by_episode: bool = False

    def bytes_of(self, tokens: float, corpus_rows: float = 0.0) -> float:
        """Of a batch."""
        return self.constant + self.per_token * tokens + self.per_corpus_row * corpus_rows


def can_be_measured(model: nn.Module) -> bool:
    """Whether the network can be run apart from its tables."""
    return all(hasattr(model, name) for name in ("score", "loss_sums", "on_before_batch_transfer"))


def first_samples(plan: GlobalBatchPlan, tokens: int) -> Array:
    """Samples of the first global batch, as many as have about so many tokens, at least one."""
    ids_N = plan.epoch(0).samples(0)
    within = int(np.searchsorted(plan.index.token_counts(ids_N).cumsum(), tokens, side="right"))
    first: Array = ids_N[: max(within, 1)]
    return first


def collated(model: nn.Module, plan: GlobalBatchPlan, sample_ids: Array) -> SequenceBatch:
    """Samples of the first global batch as the model gets them, on the host."""
    index: Any = plan.index  # a plan's index is the source of its samples
    counts = {task: float(max(n.sum(), 1)) for task, n in index.label_counts(sample_ids).items()}
    windows = plan.epoch(0).windows(0)
    batch = index.collate(sample_ids, windows=windows, epoch=0, denominators=counts, gradient_divisor=1.0)
    prepare: Any = model.on_before_batch_transfer
    made: SequenceBatch = prepare(batch, 0)
    return made


def measure_activations(model: nn.Module, plan: GlobalBatchPlan, dims: dict[str, int], *, bf16: bool) -> Activations:
    """Bytes kept by two batches of the first samples, and by two sizes of the corpus where there is one.

    Args:
        model: its network is run, its tables are not.
        plan: where samples come from.
        dims: width of the rows that each feature looks up.
        bf16: whether under bf16 autocast.
    """
    model.train()
    if adapts_apart(model):
        ids_N = plan.epoch(0).samples(0)
        longest = collated(model, plan, ids_N[plan.index.token_counts(ids_N).argmax()][None])
        return Activations(0.0, 0.0, kept_bytes(model, longest, dims, bf16=bf16), by_episode=True)
    budget = min(_TOKENS, int(plan.num_tokens / plan.num_batches))
    small, large = (collated(model, plan, first_samples(plan, tokens)) for tokens in (budget // 3, budget))

    few, many = _CORPUS_ROWS
    rows = num_scored(model, large) if large.holds_corpus else 0
    few, many = min(few, rows), min(many, rows)

    def kept() -> tuple[float, float, float]:
        a, b, c = (
            kept_bytes(model, batch, dims, bf16=bf16, corpus_rows=rows)
            for batch, rows in ((small, few), (large, few), (large, many))
        )
        corpus = (c - b) / (many - few) if many > few else 0.0
        more = large.num_tokens - small.num_tokens
        per_token = (b - a) / more if more > 0 else b / large.num_tokens
        return per_token, corpus, max(b - per_token * large.num_tokens - corpus * few, 0.0)

    least = kept()
    modules: list[Any] = list(model.modules())
    encoders = [x for x in modules if getattr(x, "recompute", False) is True and hasattr(x, "layers")]
    if not encoders:
        return Activations(*least)
    for encoder in encoders:
        encoder.recompute = False
    whole = kept()
    for encoder in encoders:
        encoder.recompute = True
    num_layers = sum(len(encoder.layers) for encoder in encoders)
    # In backward one layer's activations are there at a time.
    a, b, c = (less + (all_ - less) / num_layers for less, all_ in zip(least, whole, strict=True))
    return Activations(a, b, c, recomputes=True)


def kept_bytes(
    model: nn.Module, batch: SequenceBatch, dims: dict[str, int], *, bf16: bool = False, corpus_rows: int | None = None
) -> int:
    """The most bytes that autograd keeps at a time of a loss, each tensor once; parameters and scores left out.

    That is of a forward pass, and of an inner loop the most of its passes that are kept together. Rows that wait
    in host memory do not count either.

    Scores are left out since they are not linear in tokens and are made in chunks beyond a size.
    """
    if batch.holds_corpus and corpus_rows is not None:
        batch = _shortened(batch, corpus_rows)
    from lightning_gr.negatives.host_memory import noted_host_memory

    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()] if not p.is_meta}
    kept = _Kept()
    num_candidates, num_queries = num_scored(model, batch), sum(x.num_labels for x in batch.labels.values())

    def keep(tensor: Tensor) -> _Saved:
        storage = tensor.untyped_storage()
        scores = num_candidates > 0 and tensor.shape == (num_queries, num_candidates)
        counts = storage.data_ptr() not in own and storage.data_ptr() not in of_host and not scores
        return _Saved(tensor, kept if counts else None)

    with noted_host_memory() as of_host, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        loss = loss_of(model, batch, random_rows(batch, dims), bf16=bf16)
    loss.backward()
    return kept.most


class _Kept:
    """Bytes of the storages that saved tensors have now, and the most they ever were."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.now = self.most = 0

    def add(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self.holders[place] = self.holders.get(place, 0) + 1
        self.now += storage.nbytes() * (self.holders[place] == 1)
        self.most = max(self.most, self.now)

    def drop(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.now -= storage.nbytes()


class _Saved:
    """A saved tensor, which counts for as long as its graph is there.

    Args:
        tensor: what is saved.
        kept: where it counts; None if nowhere.
    """

    def __init__(self, tensor: Tensor, kept: _Kept | None) -> None:
        self.tensor, self.kept = tensor, kept
        if kept is not None:
            kept.add(tensor.untyped_storage())

    def __del__(self) -> None:
        if self.kept is not None:
            self.kept.drop(self.tensor.untyped_storage())


def adapts_apart(model: Any) -> bool:
    """Whether a model has an inner loop that takes one episode after the other."""
    return hasattr(model, "adapted_loss") and model.adapts_apart


def step_flops(model: Any, batch: SequenceBatch | None) -> tuple[float, float] | None:
    """Forward and backward operations a token of a step with an inner loop, from a batch; None where there is none."""
    count = getattr(model, "step_flops", None)
    if count is None or batch is None:
        return None
    found = count(batch)
    return None if found is None else (found[0] / batch.num_tokens, found[1] / batch.num_tokens)


def num_scored(model: nn.Module, batch: SequenceBatch) -> int:
    """Candidates that all queries of a batch are scored against: the corpus or the labels; 0 where there are none."""
    if batch.holds_corpus:
        return len(batch.features[CORPUS].values())
    return sum(x.num_labels for x in batch.labels.values()) if getattr(model, "in_batch", False) else 0


def random_rows(batch: SequenceBatch, dims: dict[str, int]) -> dict[str, Tensor]:
    """By feature of the tables, a row for each id, as `embed` gives them."""
    features = batch.features
    sizes = dict(zip(features.keys(), features.length_per_key(), strict=True))
    return {name: torch.randn(sizes[name], dim).requires_grad_() for name, dim in dims.items() if name in sizes}


def loss_of(model: Any, batch: SequenceBatch, rows: dict[str, Tensor], *, bf16: bool = False) -> Tensor:
    """The training loss on rows that stand for looked-up ones."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if hasattr(model, "adapted_loss"):
            loss: Tensor = model.adapted_loss(rows, batch)[0]
            return loss
        return batch.mean_over_global_batch(model.loss_sums(model.score(rows, batch), batch))


def _shortened(batch: SequenceBatch, num_rows: int) -> SequenceBatch:
    """A batch whose corpus has only some first rows."""
    from torchrec import KeyedJaggedTensor

    features = batch.features
    values, lengths = [], []
    for name in features.keys():  # noqa: SIM118  KeyedJaggedTensor is no mapping
        jagged = features[name]
        kept = jagged.values()[:num_rows] if name == CORPUS else jagged.values()
        counts_B = jagged.lengths()
        if name == CORPUS:
            counts_B = torch.zeros_like(counts_B)
            counts_B[0] = len(kept)
        values.append(kept)
        lengths.append(counts_B)
    shorter = KeyedJaggedTensor(keys=list(features.keys()), values=torch.cat(values), lengths=torch.cat(lengths))
    return batch.with_features(shorter, holds_corpus=True)


# ---- time --------------------------------------------------------------------------------------------------------


def timed_steps(
    model: nn.Module,
    plan: GlobalBatchPlan,
    dims: dict[str, int],
    *,
    bf16: bool,
    groups: int = 12,
    most_tokens: int = 8192,
    repeats: int = 5,
) -> list[tuple[Array, float]]:
    """Tokens of the sequences of a step and its seconds, for groups of like lengths and of several sizes.

    Args:
        model: its network is run, its tables are not.
        plan: where samples come from: the first window of the first epoch.
        dims: width of the rows that each feature looks up.
        bf16: whether under bf16 autocast.
        groups: steps that are measured.
        most_tokens: of a step.
        repeats: runs of each step, taken in turns, of which the fastest counts.
    """
    model.train()
    ids_N = _window_samples(plan, groups * most_tokens)
    tokens_N = plan.index.token_counts(ids_N)
    order_N = np.argsort(tokens_N, kind="stable")
    # Groups of equal tokens, every other one halved, so that tokens and their squares vary apart.
    sums = tokens_N[order_N].cumsum()
    cuts = [*np.searchsorted(sums, np.arange(groups) * sums[-1] / groups, side="right").tolist(), len(ids_N)]
    chosen = [
        ids_N[order_N[first : last if number % 2 == 0 else (first + last + 1) // 2]]
        for number, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False))
        if last > first
    ]
    batches = [collated(model, plan, ids) for ids in chosen]
    seconds = np.full((repeats + 1, len(batches)), np.inf)
    for repeat in range(repeats + 1):
        for place, batch in enumerate(batches):
            rows = random_rows(batch, dims)
            started = time.perf_counter()
            loss_of(model, batch, rows, bf16=bf16).backward()
            seconds[repeat, place] = time.perf_counter() - started
    fastest = seconds[1:].min(0).tolist()
    return [(plan.index.token_counts(ids), second) for ids, second in zip(chosen, fastest, strict=True)]


def _window_samples(plan: GlobalBatchPlan, tokens: int) -> Array:
    """Samples of the first global batches that lie in the first one's windows, of about so many tokens."""
    epoch = plan.epoch(0)
    parts, found = [], 0
    for batch in range(len(epoch)):
        if found >= tokens or not set(epoch.windows(batch)) <= set(epoch.windows(0)):
            break
        parts.append(epoch.samples(batch))
        found += int(plan.index.token_counts(parts[-1]).sum())
    ids_N = np.concatenate(parts)
    return ids_N[: max(int(np.searchsorted(plan.index.token_counts(ids_N).cumsum(), tokens, side="right")), 1)]


# ---- the dense part ----------------------------------------------------------------------------------------------


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that are on every rank: all but the tables'."""
    from lightning_gr.plugins.sharding import static_collections

    tables = {p for collection in static_collections(model).values() for p in collection.parameters()}
    return [p for p in model.parameters() if p not in tables]


@contextmanager
def zero_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, every parameter has a gradient of zeros."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None


def optimizer_bytes(model: Any, parameters: Sequence[nn.Parameter]) -> int:
    """Bytes of state that the module's own optimisers have for dense parameters, after a step on zero gradients."""
    made = model.configure_optimizers()
    made = made[0] if isinstance(made, tuple) else made
    found = [x["optimizer"] if isinstance(x, dict) else x for x in (made if isinstance(made, list) else [made])]
    total = 0
    with zero_gradients(parameters):
        for optimizer in found:
            optimizer.step()
            tensors = (x for state in optimizer.state.values() for x in state.values())
            total += sum(x.nbytes for x in tensors if isinstance(x, Tensor))
    return total
