"""RankingFeatures: what ranking batches hold, between data and models."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_gr.feature_config import Group, Pooling

EVENT_GROUPS: tuple[Group, ...] = ("event", "history", "candidate")
"""Groups of features that tokens of events have."""


@dataclass(frozen=True)
class Normalisation:
    """How one column of numbers is normalised, by the training part's statistics.

    Args:
        mean: subtracted.
        std: divided by.
        log: whether ``sign(x) log(1 + |x|)`` is taken first; `mean` and `std` are then of that.
    """

    mean: float = 0.0
    std: float = 1.0
    log: bool = False


@dataclass(frozen=True)
class TableShape:
    """An embedding table that the features ask for.

    Args:
        name: of the table.
        rows: how many; of raw ids, how many the data has.
        dim: width of a row.
        features: that look it up.
    """

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class RankingFeatures:
    """What the batches of a `RankingSource` hold, for models to build their layers by.

    Args:
        contextual: sparse features of users with the rows of their table, one contextual token each.
        contextual_width: columns of the dense features of users, one more contextual token where there are any.
        tokens: sparse features of history and candidate tokens with the rows of their table; ``item_id`` among them.
        width: columns of numeric features that history and candidate tokens have in common.
        history_width: columns that only history tokens have: what the user did, and dense features of the history.
        candidate_width: columns that only candidates have: cross features.
        tasks: names of the tasks.
        raw_ids: whether ids of users and items are raw; their cardinality is still how many there are.
        history_tokens: sparse features that only history tokens have; batches hold values of those tokens alone.
        candidate_tokens: sparse features that only candidates have.
        tables: by feature, the table it looks up; its own name where absent.
        dims: by table, the width of its rows; the model's where absent.
        pooling: of sparse features with several values: `sum` or `mean`. Those of history and candidate tokens have in
            a batch's ``dense["<name>.count"]`` (T,) how many values each token has; other tokens have one value each of
            every feature of theirs. Features of users are pooled by their sequence, where absent as a mean.
        normalisation: by name in a batch's ``dense``, how each column is normalised; as it is where absent. Missing
            numbers are NaN there.
    """

    contextual: dict[str, int]
    contextual_width: int
    tokens: dict[str, int]
    width: int
    history_width: int
    candidate_width: int
    tasks: tuple[str, ...]
    raw_ids: bool = False
    history_tokens: dict[str, int] = field(default_factory=dict)
    candidate_tokens: dict[str, int] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    pooling: dict[str, Pooling] = field(default_factory=dict)
    normalisation: dict[str, tuple[Normalisation, ...]] = field(default_factory=dict)

    @property
    def num_contextual(self) -> int:
        """Contextual tokens of each sequence."""
        return len(self.contextual) + (self.contextual_width > 0)

    @property
    def sparse(self) -> dict[str, int]:
        """All sparse features with the rows of their table."""
        return self.contextual | self.tokens | self.history_tokens | self.candidate_tokens

    @property
    def pooled(self) -> tuple[str, ...]:
        """Features whose values are pooled."""
        return (*self.contextual, *(name for name in self.pooling if name not in self.contextual))

    def dim_of(self, feature: str, embedding_dim: int) -> int:
        """Width of a sparse feature's embeddings.

        Args:
            feature: its name.
            embedding_dim: the model's width.
        """
        return self.dims.get(self.tables.get(feature, feature), embedding_dim)

    def shapes(self, embedding_dim: int) -> list[TableShape]:
        """The tables, in the order in which features first name them.

        Args:
            embedding_dim: the model's width.
        """
        members: dict[str, list[str]] = {}
        for name in self.sparse:
            members.setdefault(self.tables.get(name, name), []).append(name)
        return [
            TableShape(
                table, max(self.sparse[x] for x in names), self.dims.get(table, embedding_dim), features=tuple(names)
            )
            for table, names in members.items()
        ]
