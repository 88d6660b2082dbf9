"""Declared features: what FeatureConfigs or names ask for, checked against the schema of the store."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_gr.data.event_store import EventStore
from lightning_gr.data.event_store.fields import ITEM, TIME, USER, Kind, Per
from lightning_gr.feature_config import FeatureConfig, Group, Pooling, Scaling


@dataclass(frozen=True)
class DeclaredFeature:
    """A column of the store as models get it; the settings are those of `FeatureConfig`, without what is None there.

    Args:
        name: the column.
        kind: `sparse` or `dense`.
        per: whether each event, each user or each item has one.
        cardinality: categories of a sparse column, 0 of a dense one.
        several: whether a sparse column of items has lists of values.
        group: whose tokens have it.
        table: that a sparse one looks up.
        dim: width of the table's rows; None takes the model's.
        pooling: of several values.
        normalisation: of a dense one.
        mean: given for it; None has it counted.
        std: given for it.
    """

    name: str
    kind: Kind
    per: Per
    cardinality: int
    several: bool
    group: Group
    table: str
    dim: int | None = None
    pooling: Pooling = "mean"
    normalisation: Scaling = "none"
    mean: float | None = None
    std: float | None = None


def declared_features(
    store: EventStore,
    features: Sequence[str | FeatureConfig] | None,
    *,
    user_token: bool,
    cross_features: bool = True,
) -> tuple[DeclaredFeature, ...]:
    """All features of the batches, `item_id` and, as a token, `user_id` among them and first.

    Args:
        store: whose columns they are.
        features: names, with settings by default and numbers as they are; configs; or None for all columns but labels.
        user_token: whether the user's id is a contextual token.
        cross_features: whether features of candidates alone are kept.

    Raises:
        ValueError: a feature that the store does not have or not so, with the setting and the remedy.
    """
    columns = _columns(store)
    if features is None:
        features = [name for name in columns if name not in (ITEM, USER) and columns[name].group != "label"]
    kinds = {isinstance(feature, FeatureConfig) for feature in features}
    if len(kinds) > 1:
        name = next(x for x in features if not isinstance(x, FeatureConfig))
        raise ValueError(f"features: {name!r} is a name, and others are configs; write {{name: {name}}}")
    found: dict[str, DeclaredFeature] = {}
    for feature in features:
        name = feature.name if isinstance(feature, FeatureConfig) else feature
        if name in found:
            raise ValueError(f"features.{name}: declared twice; leave one out")
        if isinstance(feature, FeatureConfig):
            found[name] = _checked(store, feature, columns, user_token=user_token)
            continue
        if name not in columns or columns[name].group == "label" or name in (ITEM, USER):
            fields = ", ".join(field.name for field in store.fields)
            raise ValueError(f"features: the store has no field {name}; it has {fields}")
        found[name] = columns[name].declared()
    kept = {name: x for name, x in found.items() if cross_features or x.group != "candidate"}
    ids = [ITEM, USER] if user_token else [ITEM]
    of_ids = [kept.pop(name) if name in kept else columns[name].declared() for name in ids]
    return tuple(_agreed([*of_ids, *kept.values()]))


@dataclass(frozen=True)
class _Column:
    """A column of the store; `group` is what it has by default, or label."""

    name: str
    kind: Kind
    per: Per
    cardinality: int
    several: bool
    group: str

    def declared(self) -> DeclaredFeature:
        group: Group = "user" if self.per == "user" else "event"
        return DeclaredFeature(self.name, self.kind, self.per, self.cardinality, self.several, group, self.name)


def _columns(store: EventStore) -> dict[str, _Column]:
    """By name, all that the store has, in its order; ids first."""
    of_items = [field.name for field in store.fields if field.per == "item"]
    schema = store.items().schema if of_items else {}
    columns = {
        ITEM: _Column(ITEM, "sparse", "item", store.num_items, False, "event"),
        USER: _Column(USER, "sparse", "user", store.num_users, False, "user"),
    }
    for field in store.fields:
        several = field.per == "item" and field.kind == "sparse" and schema[field.name].is_nested()
        group = "label" if field.kind == "label" else "user" if field.per == "user" else "event"
        columns[field.name] = _Column(field.name, field.kind, field.per, int(field.cardinality or 0), several, group)
    return columns


def _checked(
    store: EventStore, config: FeatureConfig, columns: dict[str, _Column], *, user_token: bool
) -> DeclaredFeature:
    """A config as the store can have it."""
    where, name = f"features.{config.name}", config.name
    if name == TIME:
        raise ValueError(f"{where}: times are no feature; the mask and the bias by time have them; leave it out")
    if name not in columns:
        near = difflib.get_close_matches(name, [x for x in columns if columns[x].group != "label"], 1)
        raise ValueError(
            f"{where}: the store {store.path} has no such column; it has {', '.join(columns)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    column = columns[name]
    if column.group == "label":
        raise ValueError(
            f"{where}: a label of {store.path}, which candidates would then see; leave it out: what was labelled in "
            "the history is given to its tokens anyway"
        )
    if name == USER and not user_token:
        raise ValueError(f"{where}: declared, but user_token=False leaves its token out; change one")
    possible: tuple[Group, ...] = ("user",) if column.per == "user" else ("event", "history", "candidate")
    if name == ITEM:
        possible = ("event",)
    group = config.group or possible[0]
    if group not in possible:
        raise ValueError(
            f"{where}: group={group}: {name} of {store.path} is a column of each {column.per}, which can be of group "
            f"{' or '.join(possible)}"
        )
    others = ("normalisation", "mean", "std") if column.kind == "sparse" else ("table", "dim", "pooling")
    for setting in others:
        if (value := getattr(config, setting)) is not None:
            raise ValueError(
                f"{where}: {setting}={value!r}: not for {column.kind} columns, and {name} of {store.path} is one; "
                "leave it out, or prepare the store with it of the other kind"
            )
    table = config.table or name
    # Tables are children of a ModuleDict, and files.
    if column.kind == "sparse" and (set(table) & set("./#") or hasattr(nn.ModuleDict(), table)):
        raise ValueError(
            f"{where}: {table!r} cannot be the name of a table; give it another one, as table: {name}_table"
        )
    return DeclaredFeature(
        name=name,
        kind=column.kind,
        per=column.per,
        cardinality=column.cardinality,
        several=column.several,
        group=group,
        table=table,
        dim=config.dim,
        pooling=config.pooling or "mean",
        normalisation=(config.normalisation or "standard") if column.kind == "dense" else "none",
        mean=config.mean,
        std=config.std,
    )


def _agreed(features: Sequence[DeclaredFeature]) -> list[DeclaredFeature]:
    """The features, those of one table with the width that any of them says."""
    first: dict[str, DeclaredFeature] = {}
    for feature in features:
        if feature.kind == "dense" or feature.dim is None:
            continue
        known = first.setdefault(feature.table, feature)
        if known.dim != feature.dim:
            raise ValueError(
                f"features.{feature.name}: dim={feature.dim}, but table {feature.table} has {known.dim}, by feature "
                f"{known.name}; make them equal, or give it a table of its own"
            )
    dims = {table: feature.dim for table, feature in first.items()}
    return [replace(x, dim=dims.get(x.table)) if x.kind == "sparse" else x for x in features]
