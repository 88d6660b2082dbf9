"""LookupExchange: the travel of one batch's keys to the processes that hold their rows.

Two-stage deduplication (MTGRBoost / MTGenRec, arXiv 2505.12663, section 3.3): keys are made distinct before they travel
and again where they arrive. All features and all tables of all widths share one exchange of keys and one of rows.

Shape suffixes: N looked-up ids, U distinct keys, R keys received from all processes of the group, T tables, P physical
tables, W processes, M groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gr.embeddings.dynamic.peers import Peers, Traffic, Wire
from lightning_gr.embeddings.dynamic.row_travel import RowTravel
from lightning_gr.embeddings.dynamic.unique_keys import UniqueKeys, route, unique_keys

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
    def spans(self) -> list[tuple[int, int]]:
        """First table of each physical table, and the one behind its last."""
        return list(zip(self.bounds[:-1], self.bounds[1:], strict=True))

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


@dataclass
class DedupCounts:
    """What deduplication left of one table's ids, over all training lookups of a process.

    Args:
        ids: looked up by this process.
        sent: keys of these, after the first stage.
        arrived: keys that all processes looked up here, after the second stage.
    """

    ids: int = 0
    sent: int = 0
    arrived: int = 0


class LookupExchange:
    """The keys of one lookup under way; its methods are called in the order in which they stand here.

    Args:
        placement: where keys belong.
        peers: processes that exchange rows and gradients.
        ids_N: ids of the first table, then of the second, ...
        offsets_T1: where each table's begin, on the host.
        training: whether the lookup may change tables, so that all groups must know its keys.
        time: seconds of the data's clock as this process knows it; the latest one counts for all.
        dedup: which of the two stages run.
        precision: of rows and gradients while they travel.
        traffic: counts what goes over each kind of wire.
        counts_N: how often each id occurred; None means once.
        key_peers: the same processes, by which keys travel where that runs ahead of rows in a thread of its own; None
            takes `peers`.

    Attributes:
        places: of each physical table, where each looked-up id's row will stand among those of `travel.rows`.
        travel: of rows and gradients; set once keys have been received.
    """

    travel: RowTravel

    def __init__(
        self,
        placement: Placement,
        peers: Peers,
        ids_N: Tensor,
        offsets_T1: Sequence[int],
        *,
        training: bool,
        time: int,
        dedup: Dedup,
        precision: ExchangePrecision,
        traffic: Mapping[str, Traffic],
        counts_N: Tensor | None = None,
        key_peers: Peers | None = None,
    ) -> None:
        assert dedup in get_args(Dedup)
        self._placement, self._peers, self._dedup, self._traffic = placement, peers, dedup, traffic
        self._key_peers = key_peers or peers
        self._precision, self._training = precision, training
        self._num_tables = len(placement.dims)
        self.time = time
        self._ids_T, self._work = _differences(offsets_T1), None
        self._received: UniqueKeys | None = None
        self._keys_R2: Tensor | None = None
        # Of one process the two stages are the same.
        first = dedup != "none" if peers.own is None else dedup in ("two_stage", "before_exchange")
        unique = _distinct(ids_N, offsets_T1, counts_N, first)
        if peers.own is None:
            self._own = unique
            self.places = self._places(unique, offsets_T1, None)
            self._sent_WT = self._received_WT = [_differences(unique.offsets_T1)]
            return
        p = placement
        to = route(unique.ids_U, unique.offsets_T1, p.salts, p.group_bits, p.rotations, p.world_size)
        self.places = self._places(unique, offsets_T1, to.order_U)
        self._keys_U2 = torch.stack([unique.ids_U, unique.counts_U], 1)[to.order_U]
        times_W1 = torch.full((p.world_size, 1), time, dtype=torch.int64)
        outgoing = torch.cat([to.counts_WT.cpu(), times_W1], 1).to(ids_N.device)
        self._sent_WT = to.counts_WT.tolist()
        one_each = [1] * p.world_size
        self._incoming, self._work = self._key_wire.all_to_all(outgoing, one_each, one_each)

    @property
    def _key_wire(self) -> Wire:
        assert self._key_peers.own is not None
        return Wire(self._key_peers.own, self._traffic["keys"])

    def _places(self, unique: UniqueKeys, offsets_T1: Sequence[int], order_U: Tensor | None) -> list[Tensor]:
        """Of each physical table, where each looked-up id's row will stand among those of `travel.rows`."""
        places = []
        for a, b in self._placement.spans:
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
        if self._peers.own is None or self._keys_R2 is not None:
            return
        assert self._work is not None
        self._work.wait()
        incoming = self._incoming.tolist()
        self._received_WT = [row[:-1] for row in incoming]
        self.time = max(row[-1] for row in incoming)
        sizes = _totals(self._sent_WT), _totals(self._received_WT)
        self._keys_R2, self._work = self._key_wire.all_to_all(self._keys_U2, *sizes)

    def received_keys(self) -> UniqueKeys:
        """Waits for the keys; those to look up, by table, with how often all processes together want each.

        In training these are the keys of all groups, so that every replica does the same to its tables.
        """
        if self._received is not None:
            return self._received
        inverses: list[Tensor] | None = None
        if self._peers.own is not None:
            self._own = self._arrived()
            inverses = self._travel_order(self._own)
        self._received, members = self._own, None
        if self._training and self._key_peers.replicas is not None:
            self._received, members = self._union(self._key_peers.replicas)
        bounds = self._placement.bounds
        self.travel = RowTravel(
            self._peers,
            self._traffic,
            dims=[self._placement.dims[a] for a, _ in self._placement.spans],
            dtype=DTYPES[self._precision],
            sent_WP=self._by_physical(self._sent_WT),
            received_WP=self._by_physical(self._received_WT),
            inverses=inverses,
            num_own=_differences([self._own.offsets_T1[x] for x in bounds]),
            num_keys=_differences([self._received.offsets_T1[x] for x in bounds]),
            members=members,
        )
        return self._received

    @property
    def distinct(self) -> bool:
        """Whether the keys to look up are distinct."""
        if self._training and self._key_peers.replicas is not None:
            return True
        if self._peers.own is None:
            return self._dedup != "none"
        return self._dedup in ("two_stage", "before_lookup")

    def _arrived(self) -> UniqueKeys:
        """The keys that this process's group wants of it."""
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
        return _distinct(ids_R, _cumulated(sizes), counts_R, second)

    def _union(self, replicas: dist.ProcessGroup) -> tuple[UniqueKeys, list[list[Tensor]]]:
        """The distinct keys of all groups; and of each physical table, where each group's stand among them."""
        wire, own = Wire(replicas, self._traffic["replica_keys"]), self._own
        num = replicas.size()
        header = torch.tensor([*_differences(own.offsets_T1), self.time], device=own.ids_U.device)
        headers = torch.stack(wire.all_gather(header[None], [1] * num)).view(num, -1).tolist()
        self.time = max(row[-1] for row in headers)
        sizes_MT = [row[:-1] for row in headers]
        keys_U2 = torch.stack([own.ids_U, own.counts_U], 1)
        parts = [x.split(sizes) for x, sizes in zip(wire.all_gather(keys_U2, _totals(sizes_MT)), sizes_MT, strict=True)]
        keys_N2 = torch.cat([part[t] for t in range(self._num_tables) for part in parts])
        sizes = [sum(row[t] for row in sizes_MT) for t in range(self._num_tables)]
        union = unique_keys(keys_N2[:, 0].contiguous(), _cumulated(sizes), keys_N2[:, 1].contiguous())
        blocks = union.inverse_N.split([sizes_MT[m][t] for t in range(self._num_tables) for m in range(num)])
        members = [
            [torch.cat([blocks[t * num + m] for t in range(a, b)]) - union.offsets_T1[a] for m in range(num)]
            for a, b in self._placement.spans
        ]
        return union, members

    def record_stream(self, stream: Any) -> None:
        """Tells the allocator of a GPU that this stream uses the keys."""
        inverses = self.travel.tensors if self._received is not None else ()
        for value in (*vars(self).values(), *self.places, *(self._received or ()), *inverses):
            if isinstance(value, Tensor) and value.device.type == "cuda":
                value.record_stream(stream)

    # ---- how things lie ----------------------------------------------------------------------------------------

    def statistics(self, into: ExchangeStatistics) -> None:
        """Adds what this lookup moved."""
        sent, received = self._sent_WT, self._received_WT
        into.ids += sum(self._ids_T)
        into.sent_keys += sum(map(sum, sent))
        into.received_keys += sum(map(sum, received))
        into.looked_up_keys += self.received_keys().offsets_T1[-1]
        if self._peers.own is not None:
            own, dims = self._peers.own.rank(), self._placement.dims
            into.id_bytes += 16 * sum(sum(row) for w, row in enumerate(sent) if w != own)
            elements = [sum(n * d for n, d in zip(row, dims, strict=True)) for row in received]
            width = DTYPES[self._precision].itemsize
            into.row_bytes += width * sum(n for w, n in enumerate(elements) if w != own)

    def dedup_counts(self, into: Sequence[DedupCounts]) -> None:
        """Adds what deduplication did to each table's ids."""
        arrived_T = _differences(self.received_keys().offsets_T1)
        for counts, ids, sent, arrived in zip(into, self._ids_T, _sums(self._sent_WT), arrived_T, strict=True):
            counts.ids += ids
            counts.sent += sent
            counts.arrived += arrived

    def _by_physical(self, counts_WT: list[list[int]]) -> list[list[int]]:
        return [[sum(row[a:b]) for a, b in self._placement.spans] for row in counts_WT]

    def _travel_order(self, received: UniqueKeys) -> list[Tensor]:
        """Of each physical table, where the received keys, by source and then table, stand among its distinct ones."""
        num, begins = len(self._received_WT), received.offsets_T1
        sizes = [row[t] for t in range(self._num_tables) for row in self._received_WT]
        blocks = received.inverse_N.split(sizes)
        return [
            torch.cat([blocks[t * num + w] for w in range(num) for t in range(a, b)]) - begins[a]
            for a, b in self._placement.spans
        ]


def _distinct(ids_N: Tensor, offsets_T1: Sequence[int], counts_N: Tensor | None, merge: bool) -> UniqueKeys:
    if merge:
        return unique_keys(ids_N, offsets_T1, counts_N)
    counts_N = torch.ones_like(ids_N) if counts_N is None else counts_N
    return UniqueKeys(ids_N, list(offsets_T1), torch.arange(len(ids_N), device=ids_N.device), counts_N)


def _totals(counts_WT: list[list[int]]) -> list[int]:
    return [sum(row) for row in counts_WT]


def _sums(counts_WT: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts_WT, strict=True)]


def _differences(offsets: Sequence[int]) -> list[int]:
    return [b - a for a, b in zip(offsets, offsets[1:], strict=False)]


def _cumulated(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]
