"""Sampled softmax whose negatives wait in host memory, in 16 bit, or are shared between tokens.

python benchmarks/bench_negatives.py [--threads 2] [--rounds 5] [--labels 4096] [--dim 128] [--items 1000000] [--json]

Each form looks its candidates up, normalises them, scores every label against its own and its negatives, takes the
loss, and goes backward to the gradient of the looked-up rows, which a stand-in for the lookup takes and drops:

* plain: a row for each of labels x (1 + negatives), gathered
* fused: each distinct item once (`sampled_logits`); what the others are compared with
* kept: `keep_rows` on the device; offload: with `Offload`, so that the difference is that of the host memory alone
* half: negatives in float16, labels looked up by themselves; half_offload: both
* shared: half as many own negatives, and those of one other token (k = 2), which makes as many logits

Memory is the peak of bytes live on the device from before the lookup to after the gradient. Counted: every tensor that
an operator returns in between, by storage, until it is freed: looked-up rows, their copies, gradients, logits, indices
and buffers. Not counted: what is there before, that is table, queries, items and places; scratch memory within one
operator; the table's update. On a CPU a dispatch mode counts, and memory that the offload takes by `host_empty` stands
for the host's; the rest, host-side lists of rows too, counts as the device's. On a GPU it is the allocator's peak.

`..._dot` is the peak where rows are not normalised. `held` is the same count at two moments, while a stand-in for the
encoder goes forward (after the lookup, before the logits) and backward (after the loss's own backward pass, before the
lookup's). Both are where a model's own memory peaks. Times are minima of rounds in which the forms take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from reporting import commit, device, publish
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

ROOT = Path(__file__).resolve().parents[1]
NEGATIVES = 128
FORMS = ("plain", "fused", "kept", "offload", "half", "half_offload", "shared")


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that operators made and nobody freed yet; the peak is looked at after each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        # A weak reference also keeps the address from being given to another storage.
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}
        self._host = False

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages([*args, *(kwargs or {}).values()]):
            self._known.setdefault(storage._cdata, (StorageWeakRef(storage), 0))  # was there before
        out = func(*args, **(kwargs or {}))
        for storage in _storages([out]):
            size = 0 if self._host else storage.nbytes()
            self._known.setdefault(storage._cdata, (StorageWeakRef(storage), size))
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Bytes live."""
        self._known = {key: (ref, size) for key, (ref, size) in self._known.items() if not ref.expired()}
        return sum(size for _, size in self._known.values())

    @contextmanager
    def host_memory_apart(self) -> Iterator[None]:
        """What `host_empty` returns counts as the host's."""
        from lightning_gr.negatives import kept_rows, row_segments

        true = kept_rows.host_empty

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            self._host = True
            try:
                return true(*args, **kwargs)
            finally:
                self._host = False

        kept_rows.host_empty = row_segments.host_empty = marked
        try:
            yield
        finally:
            kept_rows.host_empty = row_segments.host_empty = true


def _storages(values: list[Any]) -> Iterator[torch.UntypedStorage]:
    for value in values:
        for x in value if isinstance(value, tuple | list) else [value]:
            if isinstance(x, Tensor):
                yield x.untyped_storage()


class Lookup(torch.autograd.Function):
    """Rows of a table; their gradient is taken and dropped."""

    @staticmethod
    @override
    def forward(ctx: Any, table_ID: Tensor, items_U: Tensor) -> Tensor:
        return table_ID.index_select(0, items_U)

    @staticmethod
    @override
    def backward(ctx: Any, d_rows_UD: Tensor) -> Any:
        return None, None


class Encoder(torch.autograd.Function):
    """Hands queries and their gradient on, and notes when."""

    @staticmethod
    @override
    def forward(ctx: Any, queries_ND: Tensor, note: Callable[[str], None]) -> Tensor:
        ctx.note = note
        note("forward")
        return queries_ND.view_as(queries_ND)

    @staticmethod
    @override
    def backward(ctx: Any, d_queries_ND: Tensor) -> Any:
        ctx.note("backward")
        return d_queries_ND, None


class Losses:
    """The forms of the loss on the same table, queries, labels and negatives.

    Args:
        labels: labelled tokens, N.
        dim: width of rows, D.
        items: rows of the table.
        segment: labels of a segment.
        on: the device.
    """

    def __init__(self, *, labels: int, dim: int, items: int, segment: int, on: torch.device) -> None:
        from lightning_gr.negatives.logit_sharing import sharing_sources, sharing_words
        from lightning_gr.negatives.offload import Offload

        generator = torch.Generator().manual_seed(0)
        self.table_ID = (0.02 * torch.randn(items, dim, generator=generator)).to(on).requires_grad_()
        self.queries_ND = torch.randn(labels, dim, generator=generator).to(on).requires_grad_()
        items_NK = torch.randint(items, (labels, 1 + NEGATIVES), generator=generator)
        self.offload = Offload(segment=segment)
        self.normalise = True
        ids_N = torch.arange(labels)
        words_N = sharing_words(seed=0, epoch=0, sample_ids_N=ids_N, positions_N=ids_N)
        # Made on the host, as the module does, before the batch is on the device.
        self.items_NK = items_NK.to(on)
        self.all = [x.to(on) for x in items_NK.unique(return_inverse=True)]
        self.negatives = [x.to(on) for x in items_NK[:, 1:].unique(return_inverse=True)]
        self.own = [x.to(on) for x in items_NK[:, : 1 + NEGATIVES // 2].unique(return_inverse=True)]
        self.sources_NJ = sharing_sources(words_N, 2).to(on)

    def __call__(self, form: str, note: Callable[[str], None] = lambda moment: None) -> Tensor:
        """Sum of the losses; its gradients are made, and dropped but for the queries'."""
        from lightning_gr.negatives.kept_rows import keep_rows
        from lightning_gr.negatives.logit_sharing import of_other_tokens
        from lightning_gr.ops.sampled_softmax import sampled_logits

        self.queries_ND.grad = None
        if form == "plain":
            rows_ND = Lookup.apply(self.table_ID, self.items_NK.flatten())
            queries_ND = self._encode(note)
            rows_NKD = self._normalised(rows_ND).view(*self.items_NK.shape, -1)
            logits_NK = torch.einsum("nd,nkd->nk", queries_ND, rows_NKD)
            return self._backward(logits_NK[:, 0], logits_NK[:, 1:], self.items_NK)
        if form in ("fused", "shared"):
            items_U, places_NK = self.all if form == "fused" else self.own
            rows_UD = Lookup.apply(self.table_ID, items_U)
            queries_ND = self._encode(note)
            if form == "shared":
                places_NK = torch.cat([places_NK, of_other_tokens(places_NK[:, 1:], self.sources_NJ)], 1)
            logits_NK = sampled_logits(queries_ND, self._normalised(rows_UD), places_NK)
            return self._backward(logits_NK[:, 0], logits_NK[:, 1:], places_NK)
        if form in ("kept", "offload"):
            items_U, places_NK = self.all
            offload = self.offload if form == "offload" else None
            kept = keep_rows(Lookup.apply(self.table_ID, items_U), offload=offload, normalise=self.normalise)
            logits_NK = kept.logits(self._encode(note), places_NK)
            return self._backward(logits_NK[:, 0], logits_NK[:, 1:], places_NK)
        items_U, places_NR = self.negatives
        offload = self.offload if form == "half_offload" else None
        half = {"dtype": torch.float16, "normalise": self.normalise}
        kept = keep_rows(Lookup.apply(self.table_ID, items_U), offload=offload, **half)  # type: ignore[arg-type]
        targets_ND = Lookup.apply(self.table_ID, self.items_NK[:, 0].contiguous())
        queries_ND = self._encode(note)
        positives_N = (queries_ND * self._normalised(targets_ND)).sum(-1)
        return self._backward(positives_N, kept.logits(queries_ND, places_NR), self.items_NK)

    def _encode(self, note: Callable[[str], None]) -> Tensor:
        queries_ND: Tensor = Encoder.apply(self.queries_ND, note)
        return F.normalize(queries_ND, dim=-1, eps=1e-6) / 0.07

    def _normalised(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1, eps=1e-6) if self.normalise else rows

    @staticmethod
    def _backward(positives_N: Tensor, negatives_NR: Tensor, names_NK: Tensor) -> Tensor:
        """The loss of `RetrievalModule`."""
        masked_NR = negatives_NR.masked_fill(names_NK[:, 1:] == names_NK[:, :1], -5e4)
        loss = (torch.cat([positives_N[:, None], masked_NR], 1).logsumexp(1) - positives_N).sum()
        loss.backward()
        return loss.detach()


def memory(losses: Losses, form: str, on: torch.device) -> dict[str, int]:
    """Bytes live at the peak, and while the encoder goes forward and backward."""
    seen = {}
    if on.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def note(moment: str) -> None:
            torch.cuda.synchronize()
            seen[f"held_{moment}"] = torch.cuda.memory_allocated() - before

        losses(form, note)
        torch.cuda.synchronize()
        return seen | {"peak": torch.cuda.max_memory_allocated() - before}
    with LiveBytes() as live, live.host_memory_apart():
        losses(form, lambda moment: seen.update({f"held_{moment}": live.now()}))
    return seen | {"peak": live.peak}


def seconds(losses: Losses, rounds: int, on: torch.device) -> dict[str, float]:
    """Least seconds of a form."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for form in FORMS:
            started = time.perf_counter()
            losses(form)
            if on.type == "cuda":
                torch.cuda.synchronize()
            best[form] = min(best.get(form, float("inf")), time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--labels", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--segment", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(args.threads)
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"labels": args.labels, "dim": args.dim, "items": args.items, "segment": args.segment}
    losses = Losses(**sizes, on=on)
    values = {form: float(losses(form)) for form in FORMS}  # and what is loaded or compiled once
    if values["offload"] != values["fused"]:
        raise RuntimeError(f"offload: the loss is {values['offload']}, and {values['fused']} without it")
    if abs(values["half"] / values["fused"] - 1) > 1e-3:
        raise RuntimeError(f"half: the loss is {values['half']}, and {values['fused']} in float32")
    peaks, times = {form: memory(losses, form, on) for form in FORMS}, seconds(losses, args.rounds, on)
    losses.normalise = False
    dot = {form: memory(losses, form, on)["peak"] for form in FORMS}
    print(f"{device()}; commit {commit()}; torch {torch.__version__}, {args.threads} threads, float32")
    rows = {"all": len(losses.all[0]), "half as many negatives": len(losses.own[0])}
    print(f"{sizes}, {NEGATIVES} negatives; distinct rows: {rows}")
    columns = ("peak MB", "of fused", "dot", "held fwd", "held bwd", "ms", "of fused")
    print(f"  {'':<14}" + "".join(f"{name:>10}" for name in columns))
    result: dict[str, Any] = {"threads": args.threads, **sizes, "negatives": NEGATIVES}
    for form in FORMS:
        ratio, time_ratio = peaks[form]["peak"] / peaks["fused"]["peak"], times[form] / times["fused"]
        dot_ratio = dot[form] / dot["fused"]
        megabytes = {name: size / 1e6 for name, size in peaks[form].items()}
        print(
            f"  {form:<14}{megabytes['peak']:>10,.0f}{ratio:>10.3f}{dot_ratio:>10.3f}"
            f"{megabytes['held_forward']:>10,.0f}{megabytes['held_backward']:>10,.0f}"
            f"{times[form] * 1e3:>10,.0f}{time_ratio:>10.2f}"
        )
        result |= {f"{form}_{name}_mb": round(size, 1) for name, size in megabytes.items()}
        result[f"{form}_ms"] = round(times[form] * 1e3, 1)
        if form != "fused":
            result |= {f"memory_ratio_{form}": round(ratio, 3), f"time_ratio_{form}": round(time_ratio, 3)}
            result[f"memory_ratio_{form}_dot"] = round(dot_ratio, 3)
    result["memory_ratio_offload_to_kept"] = round(peaks["offload"]["peak"] / peaks["kept"]["peak"], 3)
    result["time_ratio_offload_to_kept"] = round(times["offload"] / times["kept"], 3)
    result["memory_ratio_offload_to_plain"] = round(peaks["offload"]["peak"] / peaks["plain"]["peak"], 3)
    result["rows_ratio_shared"] = round(rows["half as many negatives"] / rows["all"], 3)
    publish("negatives", result, as_json=args.json)


if __name__ == "__main__":
    main()
