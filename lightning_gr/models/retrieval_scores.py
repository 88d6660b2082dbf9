"""RetrievalScores: logits of labels, of their negatives and of candidates, and the losses that are made of them.

Shape suffixes: N tokens that ask, R negatives of a token, K = 1 + R, U items drawn, J tokens shared with,
C candidates, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.batch import SequenceBatch
from lightning_gr.embeddings import CandidateBlock
from lightning_gr.models.contrast import DRAWN, DRAWN_LOG_Q, LABEL_LOG_Q, SHARED, Contrast
from lightning_gr.negatives.kept_rows import KeptRows, keep_rows
from lightning_gr.negatives.logit_sharing import of_other_tokens
from lightning_gr.ops.backend import Backend, choose_backend
from lightning_gr.ops.sampled_softmax import sampled_logits

_MASKED_LOGIT = -5e4  # finite, as in Meta's HSTU, so that a row of masked negatives has no NaN gradient


@dataclass
class RetrievalScores:
    """What `RetrievalModule.score` returns; a logit is the similarity over the temperature.

    Args:
        tokens_N: the tokens that ask, as positions in the batch: labelled ones, or each last one in predict.
        queries_ND: state of each, whose dot product with a candidate is the logit.
        positives_N: logit of each label; None without labels.
        negatives_NR: logits of negatives drawn for each label, shared ones included, where the loss takes such.
        candidates: the corpus, or the labels of the batch where they are each other's negatives.
        collides_NR: which negatives are the label itself and do not count.
        log_q_NR: logarithm of how often each negative is expected, by which its logit is lowered; None does not.
        log_weights_C: logarithm of the weight of each label as a negative; None counts each distinct item once.
    """

    tokens_N: Tensor
    queries_ND: Tensor
    positives_N: Tensor | None = None
    negatives_NR: Tensor | None = None
    candidates: CandidateBlock | None = None
    collides_NR: Tensor | None = None
    log_q_NR: Tensor | None = None
    log_weights_C: Tensor | None = None

    def logits(self) -> Tensor:
        """Logits (N, C) of this process's candidates."""
        assert self.candidates is not None
        return self.queries_ND @ self.candidates.embeddings_CD.T


def kept_rows(
    contrast: Contrast, features: Mapping[str, Tensor], *, normalise: bool, backend: Backend
) -> KeptRows | None:
    """Keeps the drawn rows where that saves memory, taken out of `features` if they go elsewhere or become narrower.

    None leaves them to be multiplied as they are. To be called before the encoder: rows whose lookup nobody holds any
    more are freed, and their gradient is made last. What else came out of the same exchange, as sharded tables give it,
    is copied, or it would hold the rows that went elsewhere or became narrower. Rows that stay as they are gain where
    they are normalised, part by part; the reference operators leave that to autograd, which differentiates twice.
    """
    goes = contrast.offload is not None or contrast.dtype is not None
    if goes and "sampled" not in features:
        raise ValueError(
            "features: the rows of negatives went to where negatives_offload or negatives_dtype keeps them when these "
            "were first scored; look them up again, by embed(batch)"
        )
    if not goes and not (normalise and choose_backend(backend, features["sampled"].device) != "reference"):
        return None
    if goes and isinstance(features, dict):
        together = _storage(features["sampled"])
        features |= {name: x.clone() for name, x in features.items() if name != "sampled" and _storage(x) == together}
    return keep_rows(
        features.pop("sampled") if goes and isinstance(features, dict) else features["sampled"],
        offload=contrast.offload,
        dtype=contrast.dtype,
        normalise=normalise,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def add_negatives(
    scores: RetrievalScores,
    contrast: Contrast,
    rows: KeptRows | Tensor | None,
    batch: SequenceBatch,
    *,
    backend: Backend,
) -> None:
    """Adds the logits of drawn negatives, of positives that are among the items drawn, and weights of logQ.

    Args:
        scores: with queries, and with candidates where labels of the batch are negatives; every process then calls it.
        contrast: which negatives there are.
        rows: (U, D) of the items drawn, normalised where similarity is the cosine; None where none are drawn.
        batch: with the features that `Contrast.lookups` made.
        backend: of the dot products.
    """
    other_labels, times = 0, 1.0
    dtype = torch.promote_types(scores.queries_ND.dtype, torch.float32)
    if contrast.log_q and scores.candidates is not None:
        # A label that is alone is no negative, and its weight does not matter.
        other_labels = max(scores.candidates.num_candidates() - 1, 1)
    if rows is not None:
        places_NR = _add_drawn(scores, contrast, rows, batch, backend=backend)
        times = places_NR.shape[1] / contrast.sampler.num_drawn
        if contrast.log_q:
            bits = batch.features[DRAWN_LOG_Q].values()
            log_q_U = _expected(bits, times=times, other_labels=other_labels)
            scores.log_q_NR = log_q_U.to(dtype)[places_NR]
    if other_labels:
        log_q_C = _expected(batch.features[LABEL_LOG_Q].values(), times=times, other_labels=other_labels)
        scores.log_weights_C = -log_q_C.to(dtype)


def _add_drawn(
    scores: RetrievalScores, contrast: Contrast, rows: KeptRows | Tensor, batch: SequenceBatch, *, backend: Backend
) -> Tensor:
    """Adds logits, and returns the place of each negative, shared ones included, among the items drawn."""
    places_NK = batch.features[DRAWN].values().view(-1, 1 + contrast.sampler.num_drawn)
    target_N1, own_NR = places_NK[:, :1], places_NK[:, 1:]
    places_NR, shared_NJ = own_NR, None
    if contrast.sharing > 1:
        shared = batch.features[SHARED].values()
        shared_NJ = shared.view(len(own_NR), len(shared) // max(len(own_NR), 1))
        places_NR = torch.cat([own_NR, of_other_tokens(own_NR, shared_NJ)], 1)
    anew_NR = places_NR if contrast.reuse == "negatives" else own_NR
    if contrast.targets_apart:
        scored = anew_NR
    else:
        scored = places_NK if anew_NR is own_NR else torch.cat([target_N1, anew_NR], 1)
    if isinstance(rows, Tensor):
        logits = sampled_logits(scores.queries_ND, rows, scored, backend=backend)
    else:
        logits = rows.logits(scores.queries_ND, scored, backend=backend)
    if not contrast.targets_apart:
        scores.positives_N, logits = logits[:, 0], logits[:, 1:]
    if shared_NJ is not None and contrast.reuse == "logits":
        logits = torch.cat([logits, of_other_tokens(logits, shared_NJ)], 1)
    collides_NR = places_NR == target_N1
    if (kept := contrast.sampler.num_kept) is not None:
        best_NR = logits.detach().masked_fill(collides_NR, -torch.inf).topk(kept, dim=1).indices
        logits, collides_NR = logits.gather(1, best_NR), collides_NR.gather(1, best_NR)
    scores.negatives_NR, scores.collides_NR = logits, collides_NR
    return places_NR


def _expected(bits: Tensor, *, times: float, other_labels: int) -> Tensor:
    """Logarithm of how often each item is expected among a label's negatives.

    Args:
        bits: of its two logarithms, see `lightning_gr.models.contrast`.
        times: drawn negatives with those shared, over those drawn.
        other_labels: labels that are negatives.
    """
    log_drawn, log_share = bits.view(torch.float64).view(-1, 2).unbind(1)
    log_drawn = log_drawn + math.log(times)
    return torch.logaddexp(log_drawn, log_share + math.log(other_labels)) if other_labels else log_drawn


def contrast_losses(scores: RetrievalScores, targets_N: Tensor, *, over_corpus: bool, bce: bool) -> Tensor:
    """The loss of each label.

    Args:
        scores: of a batch with labels.
        targets_N: id of each label.
        over_corpus: whether `scores.candidates` are the corpus: the cross entropy over all of it, whatever the loss.
        bce: binary cross entropy of the label and, on average, of its negatives, in place of the softmax over them.
    """
    positives_N = scores.positives_N
    assert positives_N is not None
    if over_corpus:
        assert scores.candidates is not None
        return scores.candidates.log_sum_exp(scores.queries_ND) - positives_N
    return (_binary if bce else _softmax)(scores, positives_N, targets_N)


def _softmax(scores: RetrievalScores, positives_N: Tensor, targets_N: Tensor) -> Tensor:
    own_N = positives_N
    if scores.negatives_NR is not None:
        negatives_NR = scores.negatives_NR
        if scores.log_q_NR is not None:
            negatives_NR = negatives_NR - scores.log_q_NR
        assert scores.collides_NR is not None
        masked_NR = negatives_NR.masked_fill(scores.collides_NR, _MASKED_LOGIT)
        own_N = torch.cat([positives_N[:, None], masked_NR], 1).logsumexp(1)
    if scores.candidates is None:
        return own_N - positives_N
    weights_C = scores.log_weights_C
    if weights_C is None:
        weights_C = -scores.candidates.multiplicity()[0].to(positives_N.dtype).log()
    others_N = scores.candidates.log_sum_exp(scores.queries_ND, **_among_labels(targets_N, weights_C))
    return torch.logaddexp(others_N, own_N) - positives_N


def _binary(scores: RetrievalScores, positives_N: Tensor, targets_N: Tensor) -> Tensor:
    sums, counts = [], []
    if scores.negatives_NR is not None:
        assert scores.collides_NR is not None
        sums.append(F.softplus(scores.negatives_NR).masked_fill(scores.collides_NR, 0.0).sum(1))
        counts.append((~scores.collides_NR).sum(1))
    if scores.candidates is not None:
        times_C, num_distinct = scores.candidates.multiplicity()
        weights_C = -times_C.to(positives_N.dtype).log()
        sums.append(scores.candidates.softplus_sum(scores.queries_ND, **_among_labels(targets_N, weights_C)))
        counts.append(num_distinct - 1)
    total_N, count = (sums[0], counts[0]) if len(sums) == 1 else (sums[0] + sums[1], counts[0] + counts[1])
    return F.softplus(-positives_N) + total_N / count.clamp(min=1)


def _among_labels(targets_N: Tensor, weights_C: Tensor) -> dict[str, Any]:
    return {"excluded_N": targets_N, "log_weights_C": weights_C}
