"""RankingFeatures: what ranking batches hold, between data and models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankingFeatures:
    """What the batches of a `RankingSource` hold, for models to build their layers by.

    Args:
        contextual: sparse features of users with their cardinality, one contextual token each.
        contextual_width: columns of the dense features of users, one more contextual token where there are any.
        tokens: sparse features of history and candidate tokens with their cardinality; ``item_id`` among them.
        width: columns of numeric features that history and candidate tokens have in common.
        history_width: columns that only history tokens have: what the user did.
        candidate_width: columns that only candidates have: cross features.
        tasks: names of the tasks.
        raw_ids: whether ids of users and items are raw; their cardinality is still how many there are.
    """

    contextual: dict[str, int]
    contextual_width: int
    tokens: dict[str, int]
    width: int
    history_width: int
    candidate_width: int
    tasks: tuple[str, ...]
    raw_ids: bool = False

    @property
    def num_contextual(self) -> int:
        """Contextual tokens of each sequence."""
        return len(self.contextual) + (self.contextual_width > 0)
