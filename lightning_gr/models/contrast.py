"""Contrast: what a label is contrasted with in training, and which ids that asks of the tables.

Shape suffixes: B sequences, N labelled tokens, R negatives drawn for a label, U distinct items drawn, J other tokens
whose negatives a token shares, D dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_gr.batch import SequenceBatch
from lightning_gr.models.corpus import Corpus
from lightning_gr.negatives import InBatchNegatives, NegativeSampler, UniformNegatives
from lightning_gr.negatives.logit_sharing import sharing_sources, sharing_words
from lightning_gr.negatives.offload import Offload

if TYPE_CHECKING:
    from lightning_gr.negatives.sampler import ItemCounts

TASK = "next_item"
Loss = Literal["full_softmax", "sampled_softmax", "bce"]
NamedNegatives = Literal["uniform", "in_batch"]
NegativesDtype = Literal["float32", "float16", "bfloat16"]
SharingReuse = Literal["negatives", "logits"]
Jagged = tuple[Tensor, Tensor]

_USUAL_NEGATIVES = 128
_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}

DRAWN, SHARED, DRAWN_LOG_Q, LABEL_LOG_Q = "drawn", "shared", "drawn_log_q", "label_log_q"
"""Numbers that travel among a batch's features and that no table looks up.

For each label the place of its target and of each negative among the items drawn, -1 for a target that is none of
them; the labels whose negatives it shares; and for each item drawn, and for each label, the bits of two float64:
logarithms of how often it is expected among one label's drawn negatives, and of its share of all labels.
"""


class Contrast:
    """Checks what `RetrievalModule` is told of its negatives, and finds the ids to look up for them, on the host.

    Args:
        loss: of the module.
        negatives: a sampler, or the name of one; the full softmax has none.
        num_negatives: of `uniform`.
        offload: keeps drawn rows in host memory; None keeps them on the device.
        dtype: in which drawn rows are kept and multiplied.
        sharing: how many labels' drawn negatives a label is scored against, its own included.
        reuse: whether shared negatives are scored anew, or the other label's scores are taken.

    Raises:
        MisconfigurationException: a setting that cannot work, by name.
        ValueError: `num_negatives` is below 1.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        negatives: NamedNegatives | NegativeSampler,
        num_negatives: int,
        offload: Offload | None,
        dtype: NegativesDtype,
        sharing: int,
        reuse: SharingReuse,
    ) -> None:
        if isinstance(negatives, NegativeSampler):
            if num_negatives != _USUAL_NEGATIVES:
                rank_zero_warn(
                    f"num_negatives={num_negatives}: not honoured, since negatives={type(negatives).__name__} says how "
                    "many itself; leave it out"
                )
            self.sampler, name = negatives, type(negatives).__name__
        elif negatives in get_args(NamedNegatives):
            name = negatives
            is_uniform = negatives == "uniform"
            self.sampler = UniformNegatives(num_negatives=num_negatives) if is_uniform else InBatchNegatives()
            if not is_uniform and num_negatives != _USUAL_NEGATIVES:
                rank_zero_warn(
                    f"num_negatives={num_negatives}: not honoured, since negatives=in_batch takes the labels of the "
                    "batch; leave it out"
                )
        else:
            raise MisconfigurationException(
                f"negatives={negatives!r}: expected uniform or in_batch, or a class of lightning_gr.negatives"
            )
        if loss == "full_softmax" and negatives != "uniform":
            raise MisconfigurationException(
                f"negatives={name}: the full softmax has every item as a negative; use loss sampled_softmax or bce"
            )
        if loss == "bce" and self.sampler.log_q:
            raise MisconfigurationException(
                f"negatives={name}: log_q corrects a softmax, and loss=bce is none; use loss sampled_softmax, or set "
                "log_q to false"
            )
        self.draws = loss != "full_softmax" and self.sampler.num_drawn > 0
        self.scope = None if loss == "full_softmax" else self.sampler.scope
        self.log_q = loss != "full_softmax" and self.sampler.log_q
        self._check_drawn_rows(offload, dtype, sharing, reuse)
        self.offload, self.dtype = offload, _DTYPES[dtype]
        self.sharing, self.reuse = sharing, reuse
        self.seed: int | None = None
        """The run's, once it begins; None takes torch's."""
        self.targets_apart = self.draws and (self.scope is not None or self.dtype is not None)
        """Whether positives are looked up by themselves and not among the items drawn."""

    def _check_drawn_rows(
        self, offload: Offload | None, dtype: NegativesDtype, sharing: int, reuse: SharingReuse
    ) -> None:
        for name, value, choices in (
            ("negatives_dtype", dtype, get_args(NegativesDtype)),
            ("logit_sharing_reuse", reuse, get_args(SharingReuse)),
        ):
            if value not in choices:
                raise MisconfigurationException(f"{name}={value!r}: expected one of {', '.join(choices)}")
        if not isinstance(sharing, int) or sharing < 1:
            raise MisconfigurationException(
                f"logit_sharing={sharing}: expected at least 1, which is each label's own negatives alone"
            )
        of_drawn = {
            "negatives_offload": offload is not None,
            f"negatives_dtype={dtype}": dtype != "float32",
            f"logit_sharing={sharing}": sharing > 1,
        }
        for name, is_set in of_drawn.items():
            if is_set and not self.draws:
                raise MisconfigurationException(
                    f"{name}: is about negatives that are drawn, and there are none; use loss sampled_softmax or bce "
                    "with negatives that are drawn, such as uniform, or leave it out"
                )
        if reuse == "logits" and sharing == 1:
            rank_zero_warn("logit_sharing_reuse=logits: not honoured, since logit_sharing=1 shares none")

    # ---- at start ----------------------------------------------------------------------------------------------

    def prepare(self, *, num_items: int | None, item_counts: ItemCounts | None) -> None:
        """Refuses what does not fit the items, before training.

        Args:
            num_items: items of the corpus; None where nothing says which there are.
            item_counts: labels of the training part by item row; None where nothing knows them.

        Raises:
            MisconfigurationException: a setting by name, and what it does not fit.
        """
        try:
            self.sampler.prepare(num_items=num_items, item_counts=item_counts)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    def begin(
        self, *, seed: int, accumulates: bool, num_items: int | None, labels: int | None, ranks: int, dim: int
    ) -> None:
        """Takes the run's seed, says which settings depend on how a batch is cut, and looks at the host's memory.

        Args:
            seed: from which negatives are drawn, the same on every rank.
            accumulates: whether an optimiser step is made of several batches.
            num_items: items of the corpus; None where nothing says which there are.
            labels: labels that a rank may have in a batch: an even share and a sequence more, but no more than the
                share of one of the host's ranks; None where nothing says how many.
            ranks: processes of this host.
            dim: width of the rows.

        Raises:
            MisconfigurationException: the rows of a batch do not fit into the host's memory.
        """
        if num_items is not None and labels is not None:
            self.refuse_without_memory(num_items=num_items, labels=labels, ranks=ranks, dim=dim)
        self.seed = seed
        of_batch = {f"negatives of scope {self.scope}": self.scope is not None, "logit_sharing": self.sharing > 1}
        for name, is_set in of_batch.items():
            if is_set and accumulates:
                rank_zero_warn(
                    f"{name}: labels are contrasted within each of the batches that make a step, and not over the "
                    "step, so that losses depend on how many there are (accumulate_grad_batches, tokens_per_rank)"
                )

    def refuse_without_memory(self, *, num_items: int, labels: int, ranks: int, dim: int) -> None:
        """Refuses to keep rows in host memory that has no room for those of a batch.

        Args:
            num_items: items of the corpus.
            labels: labels that a rank may have in a batch.
            ranks: processes of this host, which share its memory.
            dim: width of the rows.

        Raises:
            MisconfigurationException: they do not fit.
        """
        if self.offload is None:
            return
        num_drawn = self.sampler.num_drawn
        rows = min(num_items, labels * (num_drawn + (not self.targets_apart)))
        of_segment = min(rows, self.offload.segment * (1 + num_drawn * self.sharing))
        try:
            self.offload.refuse_without_memory(
                rows, dim, dtype=self.dtype or torch.float32, segment_rows=of_segment, ranks=ranks
            )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error

    # ---- a batch -----------------------------------------------------------------------------------------------

    @property
    def drawn_features(self) -> list[str]:
        """Features of the table beside those of every model."""
        return ["sampled"] if self.draws else []

    def lookups(self, batch: SequenceBatch, *, training: bool, num_items: int | None, corpus: Corpus) -> dict[str, Any]:
        """Values and lengths by feature: the history, the targets, the drawn items, and what is said of them.

        Args:
            batch: a batch on the host whose features are ``item_id`` alone.
            training: whether labels get their negatives.
            num_items: items of the corpus.
            corpus: which id each item row has.
        """
        num_sequences = batch.num_sequences
        nothing = (torch.zeros(0, dtype=torch.int64), torch.zeros(num_sequences, dtype=torch.int64))
        names = {
            DRAWN: self.draws,
            SHARED: self.sharing > 1,
            DRAWN_LOG_Q: self.draws and self.log_q,
            LABEL_LOG_Q: self.scope is not None and self.log_q,
        }
        ids: dict[str, Jagged] = {name: nothing for name, is_set in names.items() if is_set}
        ids["item_id"] = (batch.features["item_id"].values(), batch.features["item_id"].lengths())
        ids["target"] = nothing
        if self.draws:
            ids["sampled"] = nothing
        if TASK not in batch.labels:
            return ids
        labels = batch.labels[TASK]
        sequence_N = batch.layout.sequence_T[labels.tokens_N]
        labels_B = torch.bincount(sequence_N, minlength=num_sequences)
        if not (training and self.draws) or self.targets_apart:
            ids["target"] = (labels.values_N, labels_B)
        if not training:
            return ids
        if LABEL_LOG_Q in ids:
            rows_N = corpus.rows_of(labels.values_N)
            log_q_N2 = self._log_q(rows_N, num_items)
            if bool((unknown_N := log_q_N2[:, 1].isneginf()).any()):
                raise ValueError(
                    f"{type(self.sampler).__name__}: item row {int(rows_N[unknown_N][0])} is a label and has a count "
                    "of 0, so that nothing says how often it is expected; set smoothing, such as 1, or give counts of "
                    "what is trained on"
                )
            ids[LABEL_LOG_Q] = (bits(log_q_N2), 2 * labels_B)
        if self.draws:
            assert num_items is not None
            drawn_for = {
                "seed": torch.initial_seed() if self.seed is None else self.seed,
                "epoch": batch.epoch,
                "sample_ids_N": batch.sample_ids_B[sequence_N],
                "positions_N": batch.layout.position_T[labels.tokens_N],
            }
            negatives_NR = self.sampler.sample(num_items=num_items, **drawn_for)  # type: ignore[arg-type]
            items_U, places_NK = self._places(labels.values_N, corpus.ids_of(negatives_NR))
            ids["sampled"] = (items_U, all_in_first(items_U, num_sequences))
            ids[DRAWN] = (places_NK.flatten(), labels_B * places_NK.shape[1])
            if DRAWN_LOG_Q in ids:
                rows_U = torch.zeros_like(items_U)  # a target that is drawn for nobody needs none
                rows_U[places_NK[:, 1:]] = negatives_NR
                log_q = bits(self._log_q(rows_U, num_items))
                ids[DRAWN_LOG_Q] = (log_q, all_in_first(log_q, num_sequences))
            if SHARED in ids:
                sources_NJ = sharing_sources(sharing_words(**drawn_for), self.sharing)  # type: ignore[arg-type]
                ids[SHARED] = (sources_NJ.flatten(), labels_B * sources_NJ.shape[1])
        return ids

    def _places(self, targets_N: Tensor, negatives_NR: Tensor) -> Jagged:
        """The distinct items to look up, each once, and the place of each label's target and negatives among them."""
        if not self.targets_apart:
            items_U, places_NK = torch.cat([targets_N[:, None], negatives_NR], 1).unique(return_inverse=True)
            return items_U, places_NK
        items_U, places_NR = negatives_NR.unique(return_inverse=True)
        place_N = torch.searchsorted(items_U, targets_N)
        is_drawn_N = (items_U[place_N.clamp(max=len(items_U) - 1)] == targets_N) if len(items_U) else place_N > 0
        return items_U, torch.cat([place_N.where(is_drawn_N, -1)[:, None], places_NR], 1)

    def _log_q(self, rows: Tensor, num_items: int | None) -> Tensor:
        """Two logarithms for each row, see `DRAWN_LOG_Q`."""
        log_drawn = self.sampler.log_drawn(rows, num_items=num_items or 0)
        return torch.stack([log_drawn, self.sampler.log_label_share(rows)], 1)

    # ---- what it costs -----------------------------------------------------------------------------------------

    def num_scored(self, num_labels: int | None = None) -> int:
        """Negatives of a label that are multiplied with its query, but for labels of the batch.

        Args:
            num_labels: labels that can share with each other; None for more than enough.
        """
        if not self.draws:
            return 0
        others = self.sharing - 1 if num_labels is None else min(self.sharing - 1, max(num_labels - 1, 0))
        return self.sampler.num_drawn * (1 + (others if self.reuse == "negatives" else 0))


def bits(numbers: Tensor) -> Tensor:
    """float64 as int64, flat, which travels among ids."""
    return numbers.flatten().view(torch.int64)


def all_in_first(ids: Tensor, num_sequences: int) -> Tensor:
    """Lengths of a feature whose ids belong to no sequence: all stand with the first."""
    lengths_B = torch.zeros(num_sequences, dtype=torch.int64)
    lengths_B[0] = len(ids)
    return lengths_B
