"""The state dict of Meta's research HSTU as weights and settings of ours, with equal logits.

From facebookresearch/generative-recommenders, ``research/modeling/sequential/hstu.py`` and what it is made of there, as
``research/trainer/train.py`` saves it. Both are equations 1-3 of Zhai et al., arXiv 2402.17152;
`docs/importers.md` has the map.

Shape suffixes: I items, D width, P positions, N longest sequence with room for outputs.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ITEMS = "_embedding_module._item_emb.weight"
POSITIONS = "_input_features_preproc._pos_emb.weight"
MASK = "_attn_mask"
_LAYER = re.compile(r"_hstu\._attention_layers\.(\d{1,4})\.(.+)")
_OF_LAYER = ("_uvqk", "_o.weight", "_o.bias", "_rel_attn_bias._ts_w", "_rel_attn_bias._pos_w")
_WRAPPERS = ("module.", "_orig_mod.")

NEEDED = {
    "train_fn.main_module": "HSTU",
    "train_fn.embedding_module_type": "local",
    "train_fn.interaction_module_type": "DotProduct",
    "train_fn.user_embedding_norm": "l2_norm",
    "train_fn.item_l2_norm": True,
    "hstu_encoder.linear_config": "uvqk",
    "hstu_encoder.linear_activation": "silu",
    "hstu_encoder.concat_ua": False,
    "hstu_encoder.enable_relative_attention_bias": True,
}
"""Settings that decide on logits and leave no trace in the weights, with the values that ours has."""


@dataclass(frozen=True)
class MetaHSTU:
    """A model of Meta's, as ours.

    Args:
        encoder: settings of `HSTUEncoder`.
        encoder_weights: its state dict.
        items_ID: embeddings of items; row i is that of Meta's item i + 1, since its item 0 is padding.
    """

    encoder: dict[str, Any]
    encoder_weights: dict[str, Tensor]
    items_ID: Tensor


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The model's state dict in a file that ``torch.save`` wrote: a checkpoint of Meta's trainer, or the state alone.

    Nothing is unpickled but tensors and plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds anything else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give the checkpoint that Meta's trainer saved")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds other objects than tensors and plain containers, or is damaged, and is not unpickled; save "
            "the state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason}); give the checkpoint that Meta's trainer saved") from error
    if isinstance(content, Mapping):
        content = content.get("model_state_dict", content.get("state_dict", content))
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: holds no state dict; give the checkpoint that Meta's trainer saved")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name!r} is {type(value).__name__}, no tensor; give a checkpoint with model_state_dict"
            )
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        state[name] = value
    return state


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses settings of a gin file under which ours would give other logits.

    Raises:
        ValueError: names the setting and its value.
    """
    for name, needed in NEEDED.items():
        if settings.get(name, needed) != needed:
            raise ValueError(
                f"{name}={settings[name]!r}: ours has only {needed!r}, so that logits would differ; import a model "
                "that was trained so"
            )
    if (norm := settings.get("hstu_encoder.normalization", "rel_bias")) not in ("rel_bias", "hstu_rel_bias"):
        raise ValueError(
            f"hstu_encoder.normalization={norm!r}: ours has only 'rel_bias', so that logits would differ; import a "
            "model that was trained so"
        )


def convert(state: Mapping[str, Tensor], *, num_heads: int, settings: Mapping[str, Any] | None = None) -> MetaHSTU:
    """Weights and settings of our encoder from a state dict of Meta's.

    Args:
        state: see `read_state_dict`.
        num_heads: heads of a layer, which the weights do not tell.
        settings: of the run's gin file, for checks and for dropout; None of a run with Meta's usual ones.

    Raises:
        ValueError: a key that is missing or unknown, a shape that does not fit the others, or a setting that ours does
            not have: by name and value.
    """
    settings = settings or {}
    check_settings(settings)
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: expected at least 1")
    num_layers = _check_keys(state)
    state = {name: value if name == MASK else _plain(name, value) for name, value in state.items()}
    items, positions = state[ITEMS], state[POSITIONS]
    _check_shape(state, ITEMS, (None, None))
    dim, longest = items.shape[1], len(positions)
    if len(items) < 2 or longest < 1:
        raise ValueError(f"{ITEMS}: {len(items)} rows, {POSITIONS}: {longest}: there is no item, or no position")
    _check_shape(state, POSITIONS, (longest, dim))
    if MASK in state:
        _check_shape(state, MASK, (longest, longest))
        later = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        if not torch.equal(state[MASK].bool().cpu(), later):
            raise ValueError(f"{MASK}: is not causal; ours is, so that logits would differ")
    qk_dim, v_dim, num_buckets = _widths(state, dim=dim, num_heads=num_heads)
    _check_given(settings, num_layers=num_layers, num_heads=num_heads, qk_dim=qk_dim, v_dim=v_dim, dim=dim)
    weights = {"position_PD": positions}
    width = 2 * num_heads * (qk_dim + v_dim)
    for i in range(num_layers):
        shapes: tuple[tuple[int, ...], ...]
        shapes = ((dim, width), (dim, num_heads * v_dim), (dim,), (num_buckets,), (2 * longest - 1,))
        theirs = []
        for name, shape in zip(_OF_LAYER, shapes, strict=True):
            theirs.append(_check_shape(state, f"_hstu._attention_layers.{i}.{name}", shape))
        uvqk, out_weight, out_bias, times, distances = theirs
        weights |= {
            f"layers.{i}.uvqk.weight": uvqk.T,
            f"layers.{i}.output.weight": out_weight,
            f"layers.{i}.output.bias": out_bias,
            f"layers.{i}.time_table_NH": times[:, None],
            f"layers.{i}.position_table_PH": distances[:, None],
        }
    encoder = {
        "dim": dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "qk_dim": qk_dim,
        "v_dim": v_dim,
        "max_length": longest,  # 1 / max_length is the scale, theirs is 1 / padded length
        "dropout": float(settings.get("hstu_encoder.linear_dropout_rate", 0.2)),
        "time_buckets": num_buckets,
        "bias_per_head": False,
        "affine": False,
        "alpha": 1.0,
        "norm_eps": 1e-6,
    }
    return MetaHSTU(encoder, {name: value.contiguous() for name, value in weights.items()}, items[1:])


def _check_keys(state: Mapping[str, Tensor]) -> int:
    """The number of layers, of which all have all weights and nothing else is there."""
    layers = sorted({int(match[1]) for name in state if (match := _LAYER.fullmatch(name))})
    wanted = {ITEMS, POSITIONS} | {f"_hstu._attention_layers.{i}.{name}" for i in layers for name in _OF_LAYER}
    remedy = "give a state dict of Meta's research HSTU"
    if missing := sorted(wanted - state.keys()):
        raise ValueError(f"{missing[0]}: missing from the state dict{_more(missing)}; {remedy}")
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"_hstu._attention_layers: found {layers}, expected 0, 1, ...; {remedy}")
    if unknown := sorted(state.keys() - wanted - {MASK}):
        why = "a learned similarity is not supported" if unknown[0].startswith("_ndp_module") else "unknown"
        raise ValueError(
            f"{unknown[0]}: {why}{_more(unknown)}; logits would differ without it, so {remedy} with dot products"
        )
    return len(layers)


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _widths(state: Mapping[str, Tensor], *, dim: int, num_heads: int) -> tuple[int, int, int]:
    """Widths of a head's queries and of its values, and the rows of the time table, from the first layer."""
    first = "_hstu._attention_layers.0."
    uvqk = _check_shape(state, f"{first}_uvqk", (dim, None))
    out = _check_shape(state, f"{first}_o.weight", (dim, None))
    times = _check_shape(state, f"{first}_rel_attn_bias._ts_w", (None,))
    qk_width = uvqk.shape[1] // 2 - out.shape[1]
    if uvqk.shape[1] % 2 or qk_width < 1:
        raise ValueError(
            f"{first}_uvqk: shape {tuple(uvqk.shape)} does not go with {first}_o.weight of {tuple(out.shape)}; a model "
            "with concat_ua is not supported"
        )
    for what, width in (("queries", qk_width), ("values", out.shape[1])):
        if width % num_heads:
            raise ValueError(f"num_heads={num_heads}: {what} are {width} wide, which it does not divide; correct it")
    if not len(times):
        raise ValueError(f"{first}_rel_attn_bias._ts_w: has no rows")
    return qk_width // num_heads, out.shape[1] // num_heads, len(times)


def _check_shape(state: Mapping[str, Tensor], name: str, wanted: tuple[int | None, ...]) -> Tensor:
    shape = tuple(state[name].shape)
    if len(shape) != len(wanted) or any(want not in (None, has) for want, has in zip(wanted, shape, strict=True)):
        said = ", ".join("any" if x is None else str(x) for x in wanted)
        raise ValueError(f"{name}: has shape {shape}, expected ({said}) to go with the other weights")
    return state[name]


def _check_given(
    settings: Mapping[str, Any], *, num_layers: int, num_heads: int, qk_dim: int, v_dim: int, dim: int
) -> None:
    """Refuses a gin file of another model."""
    found = {"num_blocks": num_layers, "num_heads": num_heads, "dqk": qk_dim, "dv": v_dim}
    named = {f"hstu_encoder.{name}": value for name, value in found.items()} | {"train_fn.item_embedding_dim": dim}
    for name, value in named.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{name}={settings[name]!r}: the weights are of a model with {value}; give the gin file of the "
                "checkpoint's own run, and its num_heads"
            )


def _plain(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"{name}: holds {value.dtype}, expected floating numbers")
    value = value.detach().to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: holds numbers that are not finite; use another checkpoint")
    return value
