"""LookupExchange: the travel of one batch's keys to the processes that hold their rows, and of rows and gradients back.

Two-stage deduplication (MTGRBoost / MTGenRec, arXiv 2505.12663, section 3.3): keys are made distinct before they travel
and again where they arrive. All features and all tables of all widths share one exchange of keys and one of rows.

Shape suffixes: N looked-up ids, U distinct keys of this process, R keys received from all processes, K distinct keys
among those, T tables, W processes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic.gather_rows import sum_rows
from lightning_gr.embeddings.dynamic.unique_keys import UniqueKeys, route, unique_keys
from lightning_gr.ops.huge_pages import empty_in_huge_pages

Dedup = Literal["two_stage", "before_exchange", "before_lookup", "none"]
ExchangePrecision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """How keys find the process that holds them; the same on every process.

    Args:
        salts: of each table's hash.
        group_bits: hash bits that number the groups of each table; a group's keys are on one process.
        rotations: by how many processes each table's groups are shifted, so that small tables do not all meet on one.
        dims: width of each table.
        physical: which physical table each belongs to, ascending.
        world_size: processes.
    """

    salts: tuple[int, ...]
    group_bits: tuple[int, ...]
    rotations: tuple[int, ...]
    dims: tuple[int, ...]
    physical: tuple[int, ...]
    world_size: int

    def __post_init__(self) -> None:
        assert list(self.physical) == sorted(self.physical)

    @property
    def bounds(self) -> list[int]:
        """Where each physical table's tables begin."""
        count = self.physical[-1] + 1
        return [self.physical.index(p) for p in range(count)] + [len(self.physical)]

    def owners(self, table: int, groups: Tensor) -> Tensor:
        """The process that holds each group of a table."""
        owner = (groups * self.world_size) >> self.group_bits[table]
        return (owner + self.rotations[table]) % self.world_size


@dataclass
class ExchangeStatistics:
    """What lookups moved, over all training lookups of a process; rows and bytes are those sent.

    Args:
        ids: looked up.
        sent_keys: after the first deduplication.
        received_keys: from all processes.
        looked_up_keys: after the second deduplication.
        id_bytes: of keys to other processes.
        row_bytes: of rows to other processes.
    """

    ids: int = 0
    sent_keys: int = 0
    received_keys: int = 0
    looked_up_keys: int = 0
    id_bytes: int = 0
    row_bytes: int = 0


class LookupExchange:
    """One lookup under way; its methods are called in the order in which they stand here.

    Args:
        placement: where keys belong.
        group: processes that exchange; None where there is one.
        ids_N: ids of the first table, then of the second, ...
        offsets_T1: where each table's begin, on the host.
        time: seconds of the data's clock as this process knows it; the latest one counts for all.
        dedup: which of the two stages run.
        precision: of rows and gradients while they travel.
        counts_N: how often each id occurred; None means once.
        key_group: the same processes, by which keys travel where that runs ahead of rows in a thread of its own; None
            takes `group`.

    Attributes:
        distinct: whether the keys to look up are distinct.
    """

    def __init__(
        self,
        placement: Placement,
        group: dist.ProcessGroup | None,
        ids_N: Tensor,
        offsets_T1: Sequence[int],
        *,
        time: int,
        dedup: Dedup,
        precision: ExchangePrecision,
        counts_N: Tensor | None = None,
        key_group: dist.ProcessGroup | None = None,
    ) -> None:
        assert dedup in get_args(Dedup)
        self._placement, self._group, self._dedup = placement, group, dedup
        self._key_group = key_group or group
        self._dtype = DTYPES[precision]
        self.distinct = dedup != "none" if group is None else dedup in ("two_stage", "before_lookup")
        self._num_tables = len(placement.dims)
        self.time = time
        self._num_ids, self._work = len(ids_N), None
        self._received: UniqueKeys | None = None
        self._keys_R2: Tensor | None = None
        # Of one process the two stages are the same.
        first = dedup != "none" if group is None else dedup in ("two_stage", "before_exchange")
        unique = _distinct(ids_N, offsets_T1, counts_N, first)
        if group is None:
            self._received = unique
            self.places = self._places(unique, offsets_T1, None)
            self._sent_WT = self._received_WT = [_differences(unique.offsets_T1)]
            return
        p = placement
        to = route(unique.ids_U, unique.offsets_T1, p.salts, p.group_bits, p.rotations, p.world_size)
        self.places = self._places(unique, offsets_T1, to.order_U)
        self._keys_U2 = torch.stack([unique.ids_U, unique.counts_U], 1)[to.order_U]
        times_W1 = torch.full((p.world_size, 1), time, dtype=torch.int64)
        outgoing = torch.cat([to.counts_WT.cpu(), times_W1], 1).to(ids_N.device)
        self._incoming = torch.empty_like(outgoing)
        self._sent_WT = to.counts_WT.tolist()
        self._work = dist.all_to_all_single(self._incoming, outgoing, group=self._key_group, async_op=True)

    def _places(self, unique: UniqueKeys, offsets_T1: Sequence[int], order_U: Tensor | None) -> list[Tensor]:
        """Of each physical table, where each looked-up id's row will stand among those of `rows`."""
        places = []
        for a, b in self._spans():
            first, last = unique.offsets_T1[a], unique.offsets_T1[b]
            place_N = unique.inverse_N[offsets_T1[a] : offsets_T1[b]] - first
            if order_U is not None:
                own = order_U if last - first == len(order_U) else order_U[(order_U >= first) & (order_U < last)]
                position = torch.empty_like(own)
                position[own - first] = torch.arange(len(own), device=own.device)
                place_N = position[place_N]
            places.append(place_N)
        return places

    # ---- keys --------------------------------------------------------------------------------------------------

    def send_keys(self) -> None:
        """Waits for the sizes and starts the exchange of keys; once, however often it is called."""
        if self._group is None or self._keys_R2 is not None:
            return
        assert self._work is not None
        self._work.wait()
        incoming = self._incoming.tolist()
        self._received_WT = [row[:-1] for row in incoming]
        self.time = max(row[-1] for row in incoming)
        self._keys_R2, self._work = self._all_to_all(
            self._keys_U2, _totals(self._sent_WT), _totals(self._received_WT), self._key_group
        )

    def received_keys(self) -> UniqueKeys:
        """Waits for the keys; those to look up, by table, with how often all processes together want each."""
        if self._received is not None:
            return self._received
        assert self._work is not None
        assert self._keys_R2 is not None
        self._work.wait()
        blocks = self._keys_R2.split([n for row in self._received_WT for n in row])
        by_table = [
            blocks[w * self._num_tables + t] for t in range(self._num_tables) for w in range(len(self._sent_WT))
        ]
        keys_R2 = torch.cat(by_table)
        sizes = [sum(row[t] for row in self._received_WT) for t in range(self._num_tables)]
        ids_R, counts_R = keys_R2[:, 0].contiguous(), keys_R2[:, 1].contiguous()
        second = self._dedup in ("two_stage", "before_lookup")
        self._received = _distinct(ids_R, _cumulated(sizes), counts_R, second)
        self._inverses = self._travel_order(self._received)
        return self._received

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator of a GPU that this stream uses the keys."""
        for value in (*vars(self).values(), *self.places, *(self._received or ()), *getattr(self, "_inverses", ())):
            if isinstance(value, Tensor) and value.device.type == "cuda":
                value.record_stream(stream)

    # ---- rows --------------------------------------------------------------------------------------------------

    def send_rows(self, rows_KD: Sequence[Tensor]) -> None:
        """Starts sending rows back, of each physical table those of its distinct keys."""
        if self._group is None:
            self._rows = [
                rows.to(self._dtype).to(rows.dtype) if self._dtype != torch.float32 else rows for rows in rows_KD
            ]
            return
        sent = self._elements(self._received_WT)
        outgoing = _empty((sum(sent),), self._dtype, rows_KD[0].device)
        sizes, at, taken = self._by_physical(self._received_WT), 0, [0] * len(rows_KD)
        narrow = [rows.to(self._dtype) for rows in rows_KD]
        for of_source in sizes:
            for p, n in enumerate(of_source):
                places, dim = self._inverses[p][taken[p] : taken[p] + n], narrow[p].shape[1]
                end = at + n * dim
                # Written where it leaves from: a copy more would cost about as much as sending it.
                torch.index_select(narrow[p], 0, places, out=outgoing[at:end].view(n, dim))
                at, taken[p] = end, taken[p] + n
        self._flat, self._work = self._all_to_all(outgoing, sent, self._elements(self._sent_WT), self._group)

    def rows(self) -> list[Tensor]:
        """Waits for the rows; float32, of each physical table, in the order that `places` count in."""
        if self._group is None:
            return self._rows
        assert self._work is not None
        self._work.wait()
        return self._from_flat(self._flat, self._sent_WT)

    # ---- gradients ---------------------------------------------------------------------------------------------

    def send_gradients(self, grads: Sequence[Tensor]) -> None:
        """Starts sending the gradients of `rows` to where the rows are."""
        if self._group is None:
            self._gradients = list(grads)
            return
        sizes = self._by_physical(self._sent_WT)
        parts = [list(g.split([sizes[w][p] for w in range(len(sizes))])) for p, g in enumerate(grads)]
        flat = [parts[p][w].reshape(-1) for w in range(len(sizes)) for p in range(len(parts))]
        outgoing = (torch.cat(flat) if len(grads) > 1 else grads[0].reshape(-1)).to(self._dtype)
        self._flat, self._work = self._all_to_all(
            outgoing, self._elements(self._sent_WT), self._elements(self._received_WT), self._group
        )

    def gradients(self) -> list[Tensor]:
        """Waits for the gradients; summed over all that wanted a key, of each physical table (K, D)."""
        sizes = _differences(self.received_keys().offsets_T1)
        counts = [sum(sizes[a:b]) for a, b in self._spans()]
        if self._group is None:
            return self._gradients
        assert self._work is not None
        self._work.wait()
        grads = self._from_flat(self._flat, self._received_WT)
        return [sum_rows(g, inverse, n) for g, inverse, n in zip(grads, self._inverses, counts, strict=True)]

    # ---- how things lie ----------------------------------------------------------------------------------------

    def statistics(self, into: ExchangeStatistics) -> None:
        """Adds what this lookup moved."""
        own = 0 if self._group is None else self._group.rank()
        sent, received = self._sent_WT, self._received_WT
        into.ids += self._num_ids
        into.sent_keys += sum(map(sum, sent))
        into.received_keys += sum(map(sum, received))
        into.looked_up_keys += self.received_keys().offsets_T1[-1]
        if self._group is not None:
            into.id_bytes += 16 * sum(sum(row) for w, row in enumerate(sent) if w != own)
            elements = self._elements(received)
            into.row_bytes += self._dtype.itemsize * sum(n for w, n in enumerate(elements) if w != own)

    def _spans(self) -> list[tuple[int, int]]:
        bounds = self._placement.bounds
        return list(zip(bounds[:-1], bounds[1:], strict=True))

    def _by_physical(self, counts_WT: list[list[int]]) -> list[list[int]]:
        return [[sum(row[a:b]) for a, b in self._spans()] for row in counts_WT]

    def _elements(self, counts_WT: list[list[int]]) -> list[int]:
        return [sum(n * d for n, d in zip(row, self._placement.dims, strict=True)) for row in counts_WT]

    def _travel_order(self, received: UniqueKeys) -> list[Tensor]:
        """Of each physical table, where the received keys, by source and then table, stand among its distinct ones."""
        num, begins = len(self._received_WT), received.offsets_T1
        sizes = [row[t] for t in range(self._num_tables) for row in self._received_WT]
        blocks = received.inverse_N.split(sizes)
        return [
            torch.cat([blocks[t * num + w] for w in range(num) for t in range(a, b)]) - begins[a]
            for a, b in self._spans()
        ]

    def _from_flat(self, flat: Tensor, counts_WT: list[list[int]]) -> list[Tensor]:
        """Float32 rows of each physical table, by process and then table, as they travelled."""
        dims = [self._placement.dims[a] for a, _ in self._spans()]
        if len(dims) == 1:
            return [flat.view(-1, dims[0]).to(torch.float32)]
        sizes = self._by_physical(counts_WT)
        blocks = flat.split([n * d for row in sizes for n, d in zip(row, dims, strict=True)])
        parts = [[blocks[w * len(dims) + p].view(-1, d) for w in range(len(sizes))] for p, d in enumerate(dims)]
        return [torch.cat(rows).to(torch.float32) for rows in parts]

    @staticmethod
    def _all_to_all(
        outgoing: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Any]:
        incoming = _empty((sum(received), *outgoing.shape[1:]), outgoing.dtype, outgoing.device)
        work = dist.all_to_all_single(incoming, outgoing, received, sent, group=group, async_op=True)
        return incoming, work


def _distinct(ids_N: Tensor, offsets_T1: Sequence[int], counts_N: Tensor | None, merge: bool) -> UniqueKeys:
    if merge:
        return unique_keys(ids_N, offsets_T1, counts_N)
    counts_N = torch.ones_like(ids_N) if counts_N is None else counts_N
    return UniqueKeys(ids_N, list(offsets_T1), torch.arange(len(ids_N), device=ids_N.device), counts_N)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return empty_in_huge_pages(*shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _totals(counts_WT: list[list[int]]) -> list[int]:
    return [sum(row) for row in counts_WT]


def _differences(offsets: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip(offsets, offsets[1:], strict=False)]


def _cumulated(sizes: Sequence[int]) -> list[int]:
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    return offsets
