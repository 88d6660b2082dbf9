"""What a rank holds and what it exchanges in a step: tables, dense layers, activations, ids, rows and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_gr.cli.errors import UserError
from lightning_gr.cli.plan_network import CORPUS, Activations
from lightning_gr.embeddings.dynamic.keyed_rows import INDEX_BYTES_PER_KEY

if TYPE_CHECKING:
    from torch import nn

    from lightning_gr.batch import SequenceBatch

ID_BYTES = 16
"""A distinct id on its way: the id, and its table, place or count."""
_MOST_SCORE_BYTES = 4 << 26
"""Scores of candidates are kept up to about this size, and made in chunks beyond it."""
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{end}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for end, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


@dataclass(frozen=True)
class Table:
    """An embedding table.

    Args:
        name: of the table.
        features: that look it up.
        rows: rows; None where nothing says how many there will be.
        dim: width.
        row_bytes: of a row with its optimiser state, and of dynamic ones counters and the key.
        cut: `row_wise`, `column_wise`, or `table_wise`: whole on one rank.
        exchange_bytes: of a number while rows and gradients travel.
        cache_rows: rows that a device holds of a table in host memory; None where it holds them all.
    """

    name: str
    features: tuple[str, ...]
    rows: int | None
    dim: int
    row_bytes: int
    cut: str
    exchange_bytes: int = 4
    cache_rows: int | None = None

    def bytes_on(self, ranks: int) -> int:
        """Of the largest share."""
        rows = self.rows or 0
        if self.cut == "row_wise":
            own = -(-rows // ranks)
            return (own if self.cache_rows is None else min(own, self.cache_rows)) * self.row_bytes
        pieces = 1 if self.cut == "table_wise" else min(ranks, max(self.dim // 4, 1))
        return -(-rows * self.row_bytes // pieces)


def tables_of(model: nn.Module, cardinalities: dict[str, int], *, optimizer: Any, cut: str) -> list[Table]:
    """All tables of a model, static and dynamic.

    Args:
        model: after `configure_model`.
        cardinalities: by dynamic table, how many ids the data has.
        optimizer: name of the sparse optimiser of tables without their own.
        cut: how static tables are cut.
    """
    from lightning_gr.embeddings.dynamic import SparseOptimizerConfig
    from lightning_gr.embeddings.dynamic.collection import DynamicEmbeddingModule
    from lightning_gr.embeddings.dynamic.exchange import DTYPES
    from lightning_gr.plugins.sharding import static_collections, table_configs

    sparse = SparseOptimizerConfig(name=optimizer, lr=0.0)
    found = []
    for collection in static_collections(model).values():
        for config in table_configs(collection):
            width = config.embedding_dim + sparse.state_width(config.embedding_dim)
            rows, features = config.num_embeddings, tuple(config.feature_names)
            found.append(Table(config.name, features, rows, config.embedding_dim, 4 * width, cut))
    for module in model.modules():
        if not isinstance(module, DynamicEmbeddingModule):
            continue
        settings = module.settings
        engine = settings.engine(module.configs, seed=0, device="cpu", group=None, optimizer=sparse)
        for physical in engine.tables:
            for config, budget in zip(physical.configs, physical.budgets, strict=True):
                known = [x for x in (cardinalities.get(config.name), budget) if x is not None]
                found.append(
                    Table(
                        name=config.name,
                        features=tuple(config.feature_names),
                        rows=min(known) if known else None,
                        dim=config.embedding_dim,
                        row_bytes=physical.storage.row_bytes + INDEX_BYTES_PER_KEY,
                        cut="row_wise",
                        cache_rows=config.cache_rows if config.placement == "host" else None,
                        exchange_bytes=DTYPES[settings.exchange_precision].itemsize,
                    )
                )
    return found


def table_bytes(tables: Sequence[Table], ranks: int) -> int:
    """Of the fullest rank; whole tables lie as evenly as they can."""
    from lightning_gr.balancing.partition import partition

    spread = sum(x.bytes_on(ranks) for x in tables if x.cut != "table_wise")
    whole = np.array([x.bytes_on(ranks) for x in tables if x.cut == "table_wise"], dtype=np.int64)
    if not len(whole):
        return spread
    return spread + max(int(whole[part].sum()) for part in partition(whole, ranks))


@dataclass(frozen=True)
class Scores:
    """Queries scored against candidates that are spread over the ranks.

    Args:
        candidates: how many rows of a corpus there are; None where the labels of the global batch are the candidates.
        queries_per_token: labels of a token.
        dim: width.
    """

    candidates: int | None
    queries_per_token: float
    dim: int

    def cells_on(self, tokens: float, ranks: int) -> float:
        """Pairs a rank scores in a step, where every rank has so many tokens."""
        queries = self.queries_per_token * tokens
        return queries * self.candidates if self.candidates is not None else queries * ranks * queries

    def forward_flops(self, tokens: float, ranks: int) -> float:
        """Of a rank."""
        return 2 * self.cells_on(tokens, ranks) * self.dim

    def kept_bytes(self, tokens: float, ranks: int) -> float:
        """Kept for backward, at most."""
        return min(4 * self.cells_on(tokens, ranks), _MOST_SCORE_BYTES)

    def exchanged_bytes(self, tokens: float, ranks: int) -> float:
        """Queries of the other ranks that arrive, and their gradients that leave."""
        return 2 * (ranks - 1) * self.queries_per_token * tokens * self.dim * 4

    def rows_on(self, ranks: int) -> float:
        """Rows of the corpus that a rank scores against."""
        return (self.candidates or 0) / ranks


@dataclass(frozen=True)
class Footprint:
    """Bytes on a rank; `activations` is None where they could not be measured."""

    tables: int
    dense: int
    activations: float | None

    @property
    def total(self) -> float:
        """All of it."""
        return self.tables + self.dense + (self.activations or 0)


@dataclass(frozen=True)
class Memory:
    """What there is to hold.

    Args:
        tables: embedding tables.
        dense: bytes of dense parameters, their gradients and their optimiser's state.
        activations: what a network keeps; None where it could not be measured.
        scores: against a corpus, where there are such.
    """

    tables: tuple[Table, ...]
    dense: int
    activations: Activations | None
    scores: Scores | None

    def on(self, ranks: int, tokens: float) -> Footprint:
        """Of the fullest of some ranks, which computes so many tokens at once."""
        return Footprint(table_bytes(self.tables, ranks), self.dense, self._activations(ranks, tokens))

    def _activations(self, ranks: int, tokens: float) -> float | None:
        if self.activations is None:
            return None
        if self.scores is None:
            return self.activations.bytes_of(tokens)
        kept = self.scores.kept_bytes(tokens, ranks)
        return self.activations.bytes_of(tokens, self.scores.rows_on(ranks)) + kept

    def refuse(self, limit: int, *, ranks: int, tokens: int, longest: int) -> None:
        """Refuses what does not fit.

        Args:
            limit: bytes of a rank.
            ranks: processes.
            tokens: that the fullest rank computes at once.
            longest: tokens of the longest sequence.

        Raises:
            UserError: one line with what takes most of it and the figure to change.
        """
        needs = self.on(ranks, tokens)
        if needs.total <= limit:
            return
        room = limit - needs.dense
        has = f"where a rank has {gib(limit)}"
        if room <= 0:
            raise UserError(f"model: dense layers and their optimiser take {gib(needs.dense)}, {has}; make it smaller")
        fits = self._most_tokens(limit, ranks, tokens)
        if fits >= longest:
            raise UserError(
                f"activations: {tokens:,} tokens at once on a rank take {gib(needs.activations or 0)}, beside tables "
                f"of {gib(needs.tables)} and dense layers of {gib(needs.dense)}, {has}; set tokens_per_rank to at most "
                f"{fits}"
            )
        table = max(self.tables, key=lambda x: x.bytes_on(ranks))
        if needs.tables <= (needs.activations or 0):
            raise UserError(
                f"activations: the longest sequence alone has {longest:,} tokens, and {fits:,} fit beside tables of "
                f"{gib(needs.tables)} and dense layers of {gib(needs.dense)}, {has}; lower max_length, or set the "
                "encoder's recompute: true"
            )
        enough = self._enough_ranks(limit, min(tokens, max(longest, 1)))
        shares = "" if table.cut == "row_wise" else f" ({table.cut}: use sharding: row_wise)"
        ways = f"use at least {enough} ranks or a smaller embedding_dim" if enough else "use a smaller embedding_dim"
        raise UserError(
            f"{table.name}: {table.rows:,} rows x {table.row_bytes} bytes = {gib(table.bytes_on(ranks))} a rank on "
            f"{_ranks(ranks)}{shares}, and {gib(needs.total - table.bytes_on(ranks))} of other things, {has}; {ways}"
        )

    def _most_tokens(self, limit: int, ranks: int, tokens: int) -> int:
        """Tokens at once that fit."""
        low, high = 0, tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.on(ranks, middle).total <= limit else (low, middle - 1)
        return low

    def _enough_ranks(self, limit: int, tokens: int) -> int | None:
        """The fewest ranks on which so many tokens a rank fit; None if no number is enough."""
        return next((n for n in range(2, 4097) if self.on(n, tokens).total <= limit), None)


@dataclass(frozen=True)
class Exchange:
    """Bytes that a rank sends in a step, by what they are."""

    ids: float
    rows: float
    queries: float
    dense: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.ids + self.rows + self.queries + self.dense


def distinct_ids(batch: SequenceBatch, table: Table) -> int:
    """Ids of a batch that a table is asked for, each once; without a corpus, of which each rank scores its own rows."""
    import torch

    features = batch.features
    asked = [features[x].values() for x in table.features if x in features.keys() and x != CORPUS]  # noqa: SIM118
    return len(torch.cat(asked).unique()) if asked else 0


def exchange(
    tables: Sequence[Table],
    distinct: Sequence[float],
    *,
    ranks: int,
    dense_parameters: int,
    scores: Scores | None,
    tokens: float,
    micro_steps: int,
) -> Exchange:
    """What a rank sends in a step: of ids and rows all but the share that it owns itself.

    Args:
        tables: of the model.
        distinct: for each, its distinct ids in a rank's micro-batch.
        ranks: processes.
        dense_parameters: whose gradients are summed by a ring, once a step.
        scores: against a corpus.
        tokens: of a rank's micro-batch.
        micro_steps: micro-batches of a step.
    """
    others = (ranks - 1) / ranks
    rows = sum(2 * n * x.dim * x.exchange_bytes for n, x in zip(distinct, tables, strict=True))
    return Exchange(
        ids=micro_steps * others * ID_BYTES * sum(distinct),
        rows=micro_steps * others * rows,
        queries=0.0 if scores is None else micro_steps * scores.exchanged_bytes(tokens, ranks),
        dense=2 * others * 4 * dense_parameters,
    )


def parse_bytes(text: str) -> int:
    """Bytes of ``80GiB``, ``80GB``, ``512M`` or a plain number.

    Raises:
        UserError: it is no size.
    """
    number = text.strip().lower().rstrip("bikmgt")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 1 <= size < math.inf:
        raise UserError(f"--memory {text}: expected a size such as 80GiB")
    return int(size)


def gib(size: float) -> str:
    """A size for people, in powers of 1,024."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1024
    raise AssertionError


def _ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks:,} ranks"
