"""Feature configs of TorchEasyRec as our FeatureConfigs, where they map.

Theirs say how a feature is made from inputs; ours name columns of a store. So what reads one column maps, and what is
computed from several must become a column first. `docs/importers.md` has the map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_gr.feature_config import FeatureConfig, Group
from lightning_gr.importers.text_format import LONGEST, Message, parse

_COMPUTED = {
    "combo": "crosses several columns",
    "lookup": "looks a key up in a map",
    "match": "looks keys up in a nested map",
    "expr": "is an expression of several columns",
    "overlap": "compares two columns",
    "tokenize": "cuts text into tokens",
    "custom": "calls an operator of its own",
    "kv_dot_product": "multiplies two maps",
    "bool_mask": "masks a column by another",
    "combine": "combines the values of a column",
}
_ROWS = ("hash_bucket_size", "num_buckets", "vocab_list", "vocab_dict", "vocab_file")
_NOT_CARRIED = ("init_fn", "use_mask", "embedding_constraints", "default_bucketize_value", "vocab_dict")
_DYNAMIC = {"zch": "zch_size", "dynamicemb": "max_capacity"}


class _Unmapped(Exception):  # a decision, not an error
    """Why a feature does not map."""


@dataclass(frozen=True)
class UnmappedFeature:
    """A feature that has no counterpart.

    Args:
        name: as they call it.
        kind: of their messages.
        reason: why, and what to do.
    """

    name: str
    kind: str
    reason: str


@dataclass
class ImportedFeatures:
    """What became of a pipeline's features.

    Args:
        features: ours, in their order.
        unmapped: theirs that have no counterpart.
        notes: what else to know, a sentence each.
    """

    features: list[FeatureConfig] = field(default_factory=list)
    unmapped: list[UnmappedFeature] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_yaml(self, *, source: str) -> str:
        """An overlay for ``--config`` with the features that map.

        Args:
            source: their file's name, for the first line.
        """
        import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

        features = [{k: v for k, v in asdict(x).items() if v is not None} for x in self.features]
        name = re.sub(r"[^\w.-]", "_", source)
        text = yaml.safe_dump({"data": {"init_args": {"features": features}}}, sort_keys=False)
        return f"# Features of TorchEasyRec's {name}: {len(features)} map, {len(self.unmapped)} do not\n{text}"


def read_features(path: str | Path) -> ImportedFeatures:
    """What becomes of the features of a pipeline configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text format of protobuf, or has no ``feature_configs``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give a pipeline configuration of TorchEasyRec")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        pipeline = parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return import_features(pipeline, where=str(path))


def import_features(pipeline: Message, *, where: str = "feature_configs") -> ImportedFeatures:
    """The same of a message that was read already.

    Raises:
        ValueError: it has no ``feature_configs``.
    """
    found, taken = ImportedFeatures(), dict[str, FeatureConfig]()
    configs = pipeline.get("feature_configs", [])
    if not configs:
        raise ValueError(f"{where}: has no feature_configs; give a pipeline configuration of TorchEasyRec")
    sequences: list[tuple[str, str, Message]] = []
    for kind, body in _kinds(configs, found):
        if kind == "sequence_feature":
            name = _text(body, "sequence_name", "")
            length = body.get("sequence_length", ["?"])[0]
            found.notes.append(
                f"{name} ({kind} of {length}): histories are the store's events; set max_length and list what events "
                "have"
            )
            sequences += [(f"{name}__", *x) for x in _kinds(body.get("features", []), found)]
        elif kind.startswith("sequence_"):
            sequences.append(("", kind.removeprefix("sequence_"), body))
        else:
            _add(found, taken, kind, body)
    for prefix, kind, body in sequences:
        _add(found, taken, kind, body, prefix=prefix, of_history=True)
    found.features = list(taken.values())
    labels = [str(x) for data in _messages(pipeline, "data_config") for x in data.get("label_fields", [])]
    if labels:
        found.notes.append(f"labels {', '.join(labels)}: name them in `tasks` of the data, and not as features")
        for name in set(labels) & {x.name for x in found.features}:
            found.features = [x for x in found.features if x.name != name]
            found.unmapped.append(UnmappedFeature(name, "label", "a label cannot be a feature; name it in `tasks`"))
    if found.features and "item_id" not in taken:
        found.notes.append(
            "no feature reads item_id: give `prepare` the column of items as item_id, and rename it here"
        )
    if "user_id" in taken:
        found.notes.append("user_id: is a token only where the data has user_token: true; else leave it out")
    return found


def _messages(message: Message, name: str) -> Iterator[Message]:
    yield from (x for x in message.get(name, []) if isinstance(x, Message))


def _kinds(configs: list[Any], found: ImportedFeatures) -> Iterator[tuple[str, Message]]:
    """Kind and body of each feature."""
    for config in configs:
        if not isinstance(config, Message) or not config:
            found.unmapped.append(UnmappedFeature(str(config)[:40], "feature_configs", "is no message with a feature"))
            continue
        for kind, bodies in config.items():
            for body in bodies:
                if isinstance(body, Message):
                    yield kind, body
                else:
                    found.unmapped.append(UnmappedFeature(str(body)[:40], kind, "is no message"))


def _add(
    found: ImportedFeatures,
    taken: dict[str, FeatureConfig],
    kind: str,
    body: Message,
    *,
    prefix: str = "",
    of_history: bool = False,
) -> None:
    name = prefix + _text(body, "feature_name", "?")
    notes: list[str] = []
    try:
        config = _mapped(kind, body, notes, of_history=of_history)
    except (_Unmapped, ValueError) as why:
        found.unmapped.append(UnmappedFeature(name, kind, str(why)))
        return
    before = taken.get(config.name)
    if before is None:
        taken[config.name] = config
    elif of_history:
        if before.group == "candidate":  # of context: now its past values are read too
            taken[config.name] = FeatureConfig(**{**asdict(before), "group": None})
        if (config.dim, config.table) not in ((before.dim, before.table), (None, None)):
            notes.append(f"shares the column {config.name} with what was listed first, so dim and table are that one's")
    else:
        reason = f"the column {config.name} is listed already, and a column is one feature; copy it under another name"
        found.unmapped.append(UnmappedFeature(name, kind, reason))
        return
    if name not in (config.name, prefix + config.name):
        notes.insert(0, f"is the column {config.name}")
    found.notes += [f"{name}: {note}" for note in notes]


def _mapped(kind: str, body: Message, notes: list[str], *, of_history: bool) -> FeatureConfig:
    """Ours for one of theirs.

    Raises:
        _Unmapped: there is none.
        ValueError: a value that ours cannot have.
    """
    short = kind.removesuffix("_feature")
    if short in _COMPUTED:
        raise _Unmapped(f"{_COMPUTED[short]}; write what it gives as a column of the store")
    if short not in ("id", "raw"):
        raise _Unmapped("an unknown kind of feature; write what it gives as a column of the store")
    if _text(body, "stub_type", "false") == "true":
        raise _Unmapped("is only an intermediate result (stub_type)")
    column, group = _column(body, of_history=of_history)
    if _text(body, "trainable", "true") == "false":
        notes.append("trainable: false is not carried over; its rows are trained")
    for name in (x for x in _NOT_CARRIED if x in body):
        notes.append(f"{name} is not carried over")
    if _text(body, "data_type", "FP32") != "FP32":
        notes.append(
            f"data_type {_text(body, 'data_type', '')} is not carried over; tables have a precision of their own"
        )
    return _sparse(body, column, group, notes) if short == "id" else _dense(body, column, group, notes)


def _column(body: Message, *, of_history: bool) -> tuple[str, Group | None]:
    expression = body.get("expression", [_text(body, "feature_name", "")])
    if len(expression) != 1 or not isinstance(expression[0], str):
        raise _Unmapped("reads several inputs; write what it gives as a column of the store")
    side, colon, column = str(expression[0]).rpartition(":")
    if side in ("feature", "const") or not column:
        raise _Unmapped(f"expression {expression[0]!r} reads no column; write what it gives as one")
    if of_history:
        return column, "history"
    if not colon:
        return column, None
    groups: dict[str, Group | None] = {"user": "user", "item": None, "context": "candidate"}
    if side not in groups:
        raise _Unmapped(f"expression {expression[0]!r}: side {side!r} is none of user, item and context")
    return column, groups[side]


def _sparse(body: Message, column: str, group: Group | None, notes: list[str]) -> FeatureConfig:
    if _text(body, "weighted", "false") == "true":
        raise _Unmapped("its values have weights, which ours have not; leave the weights out")
    for name in (x for x in _ROWS if x in body):
        if name == "hash_bucket_size":
            notes.append("hash_bucket_size: ours has a row a value, so nothing collides")
    for name, size in _DYNAMIC.items():
        for settings in _messages(body, name):
            rows = settings.get(size, ["?"])[0]
            notes.append(f"{name} of {rows} rows: use dynamic_tables of the model, with a budget of its own")
    if default := _text(body, "default_value", ""):
        notes.append(f"default_value {default!r} is not carried over: a missing value has a row of its own")
    pooling: Any = _text(body, "pooling", "sum")
    dim = _number(body, "embedding_dim")
    return FeatureConfig(column, group=group, table=_text(body, "embedding_name", "") or None, dim=dim, pooling=pooling)


def _dense(body: Message, column: str, group: Group | None, notes: list[str]) -> FeatureConfig:
    if "boundaries" in body:
        raise _Unmapped("is cut into buckets by boundaries; write the bucket as a sparse column and list that")
    if (_number(body, "value_dim") or 1) != 1:
        raise _Unmapped("has several numbers; write each as a column")
    for name in (x for x in ("autodis", "mlp", "embedding_dim") if x in body):
        notes.append(f"{name} is not carried over: ours gives the number itself to the token's layer")
    if _text(body, "default_value", "0") not in ("0", "0.0", ""):
        notes.append(
            f"default_value {_text(body, 'default_value', '')} is not carried over: a missing number becomes 0"
        )
    return FeatureConfig(column, group=group, **_normalisation(body))


def _normalisation(body: Message) -> dict[str, Any]:
    text = _text(body, "normalizer", "")
    if not text:
        return {"normalisation": "none"}
    settings = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    method = settings.get("method", "").strip()
    names = {"zscore": ("mean", "standard_deviation"), "minmax": ("min", "max")}
    if method not in names:
        raise _Unmapped(
            f"normalizer {text!r} is none of ours; write the column so, or list it with normalisation: log (the "
            "standardised log of 1 + |x|)"
        )
    try:
        low, high = (float(settings[name]) for name in names[method])
    except (KeyError, ValueError) as error:
        raise _Unmapped(f"normalizer {text!r}: lacks a number; correct it") from error
    return {"normalisation": "standard", "mean": low, "std": high - low if method == "minmax" else high}


def _text(body: Message, name: str, default: str) -> str:
    value = body.get(name, [default])[-1:] or [default]
    return "" if isinstance(value[0], Message) else str(value[0])


def _number(body: Message, name: str) -> int | None:
    if name not in body:
        return None
    value = body[name][-1] if body[name] else None
    if not isinstance(value, int):
        raise _Unmapped(f"{name}={value!r}: expected a whole number")
    return value
