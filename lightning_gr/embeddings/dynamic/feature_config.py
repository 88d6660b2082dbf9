"""FeatureConfig: tables said feature by feature, as MTGenRec does (arXiv 2505.12663, section 3.2), and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gr.embeddings.dynamic.table_config import DynamicTableConfig, Pooling


@dataclass(frozen=True)
class FeatureConfig:
    """A sparse feature and the tables that it looks up.

    Args:
        name: of the feature.
        embedding_dim: width of its embeddings.
        tables: one or several; a table that several features name is shared by them. Where it looks up several, its
            outputs are called ``feature@table``.
        pooling: in a `DynamicEmbeddingBagCollection`, how a sample's ids become one vector.
    """

    name: str
    embedding_dim: int
    tables: tuple[str, ...]
    pooling: Pooling = "sum"


def tables_of_features(features: Sequence[FeatureConfig]) -> list[DynamicTableConfig]:
    """A config for each table that the features name, in the order in which they do.

    Args:
        features: in any order; those of one table agree on its form.

    Raises:
        ValueError: features of one name, without a table, or that want one table in different forms.
    """
    names = [feature.name for feature in features]
    for feature in features:
        if names.count(feature.name) > 1:
            raise ValueError(f"feature {feature.name}: two configs of this name; give it all its tables in one")
        if not feature.tables:
            raise ValueError(f"feature {feature.name}: looks up no table; name at least one")
    first: dict[str, FeatureConfig] = {}
    for feature in features:
        for table in feature.tables:
            known = first.setdefault(table, feature)
            for name in ("embedding_dim", "pooling"):
                ours, theirs = getattr(feature, name), getattr(known, name)
                if ours != theirs:
                    raise ValueError(
                        f"feature {feature.name}: {name}={ours}, but table {table} has {theirs}, by feature "
                        f"{known.name}; make them equal, or use another table"
                    )
    return [
        DynamicTableConfig(
            name=table,
            embedding_dim=feature.embedding_dim,
            feature_names=tuple(x.name for x in features if table in x.tables),
            pooling=feature.pooling,
        )
        for table, feature in first.items()
    ]
