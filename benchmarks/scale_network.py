"""Machines of a cluster and what collectives put on their links.

A rank has a port to the ranks of its node and, with others or alone, a network card to other nodes. What is counted is
what it sends; receiving is the mirror of it. A message to a peer costs a start-up each, one after the other.

Legend: N ranks of the cluster, n bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scale_engine import Link, Simulation, Stream, Work


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of node, with its data sheet.

    Args:
        ranks: of a node.
        near: bytes a second that a rank sends to its node.
        far: bytes a second of a network card.
        cards: network cards of a node.
        near_start: seconds that a message inside a node costs beside its bytes.
        far_start: the same between nodes.
        efficiency: share of the sheets' bandwidths that a collective reaches.
    """

    ranks: int = 8
    near: float
    far: float
    cards: int = 8
    near_start: float = 5e-6
    far_start: float = 10e-6
    efficiency: float = 0.8


A100 = Machine(near=300e9, far=25e9)
"""SXM4 with NVLink 3 (600 GB/s both ways) and eight HDR cards of 200 Gbit/s, 200 GB/s a node (arXiv 2505.12663)."""
H100 = Machine(near=450e9, far=50e9)
"""SXM5 with NVLink 4 (900 GB/s both ways) and eight NDR cards of 400 Gbit/s."""
ASCEND = Machine(near=196e9, far=25e9)
"""910B: seven HCCS links (392 GB/s both ways) and a RoCE port of 200 Gbit/s a processor."""


@dataclass
class Cluster:
    """Links of all ranks.

    Args:
        machine: kind of each node.
        world_size: N.
        simulation: that the links belong to.
    """

    machine: Machine
    world_size: int
    simulation: Simulation
    near: list[Link] = field(init=False)
    far: list[Link] = field(init=False)

    def __post_init__(self) -> None:
        kind, nodes = self.machine, -(-self.world_size // self.machine.ranks)
        self.near = [Link(kind.near * kind.efficiency) for _ in range(self.world_size)]
        self.far = [Link(kind.far * kind.efficiency) for _ in range(nodes * kind.cards)]

    def card(self, rank: int) -> Link:
        """The network card of a rank."""
        node, place = divmod(rank, self.machine.ranks)
        return self.far[node * self.machine.cards + place * self.machine.cards // self.machine.ranks]

    def all_to_all(
        self, name: str, ranks: Sequence[int], after: Sequence[Work], sizes: Sequence[float], streams: Sequence[Stream]
    ) -> Work:
        """Each rank sends an equal share of its bytes to every rank of a set, itself included; ends when all have.

        Args:
            name: what it is.
            ranks: the set.
            after: what each of them needs first.
            sizes: bytes of each, in all.
            streams: of each.
        """
        kind, count, parts = self.machine, len(ranks), list[Work]()
        of_node: dict[int, int] = {}
        for rank in ranks:
            of_node[rank // kind.ranks] = of_node.get(rank // kind.ranks, 0) + 1
        for rank, before, size, stream in zip(ranks, after, sizes, streams, strict=True):
            near = of_node[rank // kind.ranks] - 1
            far = count - 1 - near
            sends = [(self.near[rank], size * near / count), (self.card(rank), size * far / count)]
            start = max(near * kind.near_start, far * kind.far_start)
            parts.append(self.simulation.issue(name, [before], seconds=start, sends=sends, stream=stream))
        return parts[0] if count == 1 else self._together(name, parts, streams)

    def all_reduce(self, name: str, after: Sequence[Work], size: float, streams: Sequence[Stream]) -> Work:
        """All ranks add up as many bytes: rings in nodes, and between ranks of the same place in their nodes.

        A ring of n sends ``2 (n - 1) / n`` of its bytes. The rings of a step are pipelined, so the slower one counts.

        Args:
            name: what it is.
            after: what each rank needs first.
            size: bytes.
            streams: of each rank.
        """
        kind, parts = self.machine, list[Work]()
        inside = min(kind.ranks, self.world_size)
        nodes = -(-self.world_size // kind.ranks)
        near, far = ring_bytes(inside, size), ring_bytes(nodes, size / inside)
        start = 2 * (inside - 1) * kind.near_start + 2 * (nodes - 1) * kind.far_start
        for rank in range(self.world_size):
            sends = [(self.near[rank], near), (self.card(rank), far)]
            parts.append(self.simulation.issue(name, [after[rank]], seconds=start, sends=sends, stream=streams[rank]))
        return parts[0] if self.world_size == 1 else self._together(name, parts, streams)

    def _together(self, name: str, parts: list[Work], streams: Sequence[Stream]) -> Work:
        done = self.simulation.issue(name, parts)
        for stream in streams:
            stream.last = done
        return done


def ring_bytes(count: int, size: float) -> float:
    """What each of a ring sends in an all-reduce."""
    return 2 * (count - 1) / count * size
