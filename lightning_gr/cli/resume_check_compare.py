"""What ``lightning-gr resume-check`` compares: two checkpoints and what their runs said, kind of state by kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_gr.cli.resume_check_process import Said

if TYPE_CHECKING:
    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.embeddings.dynamic.table_parts import TablePart

TOLERANCE = 1e-4
"""Of values on another number of processes, relative to the largest of their tensor."""

KINDS = {
    "dense weights": True,
    "dense optimiser": True,
    "static tables": True,
    "static tables' optimiser": True,
    "dynamic tables: keys": False,
    "dynamic tables: values": True,
    "dynamic tables: optimiser": True,
    "dynamic tables: counters": False,
    "dynamic tables: clocks": False,
    "waiting for admission": False,
    "schedules": False,
    "loop progress, step": False,
    "loader's cursor": False,
    "metrics": True,
    "random generators": False,
    "callbacks, others": True,
    "losses": True,
}
"""Whether a kind of state is a sum whose order depends on the number of processes."""

State = dict[str, dict[str, Any]]
"""By kind and name: tensors, numbers, texts."""

_PIECE = 1 << 22
_ROW_KINDS = {
    "ids": "dynamic tables: keys",
    "values": "dynamic tables: values",
    "state": "dynamic tables: optimiser",
    "last_steps": "dynamic tables: clocks",
    "last_times": "dynamic tables: clocks",
}
_NOT_COMPARED = ("ResumeCheckpoint", "Timer", "pytorch-lightning_version")
"""Beginnings of keys whose contents are another run's by nature: folders and times of day."""


@dataclass
class Difference:
    """How far one kind of state is off.

    Args:
        entries: how many tensors and numbers were compared.
        absolute: the largest difference of two numbers.
        relative: the largest difference over the largest number of its tensor.
        worst: the entry which that is.
        problems: what is missing, too much, or no number and other than it has to be.
    """

    entries: int = 0
    absolute: float = 0.0
    relative: float = 0.0
    worst: str = ""
    problems: list[str] = field(default_factory=list)

    def within(self, tolerance: float) -> bool:
        """Whether all is there and near enough; a tolerance of 0 means to the bit."""
        return not self.problems and (self.relative <= tolerance if tolerance else self.absolute == 0)


# ---- reading -------------------------------------------------------------------------------------------------------


def read_state(reader: CheckpointReader, said: Sequence[Said], *, after: int, ranks: int, merged: bool) -> State:
    """All that a checkpoint holds, sorted by kind.

    Args:
        reader: of a run's last checkpoint.
        said: by the run's processes.
        after: losses of later steps count.
        ranks: of how many processes random generators count.
        merged: whether what each process has of metrics is made one, as on another number of processes it must be.
    """
    state: State = {kind: {} for kind in KINDS}
    _sort_tensors(reader.tensors(), state)
    _read_tables(reader, state)
    _sort_meta(reader.meta(), state)
    own = reader.rank_states()
    for rank, one in enumerate(own[:ranks]):
        state["random generators"] |= dict(_leaves(one["generators"], f"rank {rank}"))
    states = [dict(_leaves({x: y for x, y in one.items() if x != "generators"})) for one in own]
    if merged:
        state["metrics"] = _merged(states, said)
    else:
        state["metrics"] = {f"rank {rank}.{x}": y for rank, one in enumerate(states) for x, y in one.items()}
    steps = {name: 0.0 for one in said for name in one.losses if int(name.partition(".")[0]) > after}
    for name in steps:
        # Each process has its part, made so that the mean is the loss of the union.
        steps[name] = sum(one.losses.get(name, 0.0) for one in said) / len(said)
    state["losses"] = {f"step {name}": value for name, value in steps.items()}
    return state


def _sort_tensors(tensors: Mapping[str, Tensor], state: State) -> None:
    tables = {name.removeprefix("sparse_optimizer.") for name in tensors if name.startswith("sparse_optimizer.")}
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        if part == "state_dict":
            is_table = any(x.startswith(f"{name}.") for x in tables)
            state["static tables" if is_table else "dense weights"][name] = value
        elif part == "dense_optimizer":
            state["dense optimiser"][name] = value
        elif part == "sparse_optimizer":
            state["static tables' optimiser"][name] = value
        else:
            state["callbacks, others"][key] = value


def _read_tables(reader: CheckpointReader, state: State) -> None:
    from lightning_gr.embeddings.dynamic.table_files import read_table, table_names
    from lightning_gr.embeddings.dynamic.table_parts import table_parts

    for path, folders in reader.collections().items():
        for table in table_names(folders[-1]):
            name = f"{path}.{table}"
            rows, header = read_table(folders, table)
            columns = {"ids": rows.ids_N, "values": rows.values_ND, "state": rows.state_NS}
            columns |= {key: x for key, x in rows.metadata._asdict().items() if x is not None}
            if rows.hot_N is not None:
                columns["hot"] = rows.hot_N
            for key, column in columns.items():
                state[_ROW_KINDS.get(key, "dynamic tables: counters")][f"{name}.{key}"] = column
            for key in ("next_step", "time", "seed"):
                state["dynamic tables: clocks"][f"{name}.{key}"] = getattr(header, key)
            parts = table_parts(folders[-1] / table, "waiting", may_lack=True)
            for key, column in _in_order(parts).items():
                state["waiting for admission"][f"{name}.{key}"] = column


def _in_order(parts: Sequence[TablePart]) -> dict[str, Tensor]:
    """Columns of all processes by virtual shard and id, whoever had them."""
    if not parts:
        return {}
    pieces = [part.columns(part.names) for part in parts]
    for part, piece in zip(parts, pieces, strict=True):
        piece["shards"] = torch.bucketize(torch.arange(part.num_rows), part.offsets_V1[1:], right=True)
    joint = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    order = torch.arange(len(joint["shards"]))
    for key in ("ids", "shards"):
        if key in joint:
            order = order[joint[key][order].argsort(stable=True)]
    return {key: column[order] for key, column in joint.items()}


def _sort_meta(meta: Mapping[str, Any], state: State) -> None:
    for key, value in meta.items():
        if key == "loops":
            for name, leaf in _leaves(value):
                is_cursor = "combined_loader" in name
                state["loader's cursor" if is_cursor else "loop progress, step"][name] = leaf
        elif key in ("epoch", "global_step"):
            state["loop progress, step"][key] = value
        elif key in ("lr_schedulers", "dense_param_groups"):
            state["schedules"] |= dict(_leaves(value, key))
        elif key == "callbacks":
            kept = {name: x for name, x in value.items() if not name.startswith(_NOT_COMPARED)}
            state["callbacks, others"] |= dict(_leaves(kept, key))
        elif not key.startswith(_NOT_COMPARED):
            state["callbacks, others"] |= dict(_leaves(value, key))


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested containers, with the way to it; an empty container is a leaf, too."""
    if isinstance(tree, Mapping | list | tuple) and len(tree):
        pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in pairs:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, tree


def _merged(states: Sequence[Mapping[str, Any]], said: Sequence[Said]) -> dict[str, Any]:
    """What metrics and sums of all processes come to."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in states for name in one):
        whole, _, last = name.rpartition(".")
        is_list = whole in said[0].reductions and last.isdecimal()
        reduction = "cat" if is_list else said[0].reductions.get(name)
        values = [torch.as_tensor(one[name]) for one in states if isinstance(one.get(name), Tensor | int | float)]
        if not values:
            continue
        if reduction == "cat":
            merged[whole] = torch.cat([merged.get(whole, values[0].flatten()[:0]), *(x.flatten() for x in values)])
        elif reduction in ("sum", "mean", "max", "min"):
            stacked = torch.stack([x.double() for x in values])
            merged[name] = stacked.amax(0) if reduction == "max" else getattr(stacked, reduction)(0)
    lists = {name for name in merged if said[0].reductions.get(name) == "cat"}
    return {name: value.sort().values if name in lists else value for name, value in merged.items()}


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(found: State, wanted: State) -> dict[str, Difference]:
    """How far one state is off from another, by kind.

    Args:
        found: of the resumed run.
        wanted: of the uninterrupted one.
    """
    return {kind: _compare_kind(found[kind], wanted[kind]) for kind in KINDS}


def _compare_kind(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Difference:
    difference = Difference(entries=len(wanted))
    difference.problems += [f"{name} is missing" for name in wanted.keys() - found.keys()]
    difference.problems += [f"{name} is too much" for name in found.keys() - wanted.keys()]
    difference.problems.sort()
    for name in sorted(wanted.keys() & found.keys()):
        mine, true = found[name], wanted[name]
        if _are_numbers(mine, true):
            mine, true = torch.tensor([mine, true], dtype=None if _are_whole(mine, true) else torch.float64)
        if not isinstance(mine, Tensor) or not isinstance(true, Tensor):
            if type(mine) is not type(true) or mine != true:
                difference.problems.append(f"{name} is {mine!r} instead of {true!r}")
        elif (mine.shape, mine.dtype) != (true.shape, true.dtype):
            have, want = (f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (mine, true))
            difference.problems.append(f"{name} is {have} instead of {want}")
        else:
            absolute, relative = _distance(mine, true)
            difference.absolute = max(difference.absolute, absolute)
            if relative > difference.relative:
                difference.relative, difference.worst = relative, name
    return difference


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)


def _are_whole(*values: Any) -> bool:
    return all(isinstance(x, int) for x in values)


def _distance(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest difference, and the same over the largest number; infinite where one of two is none."""
    if torch.equal(found, wanted):
        return 0.0, 0.0
    absolute, largest = 0.0, 0.0
    for mine, true in zip(found.flatten().split(_PIECE), wanted.flatten().split(_PIECE), strict=True):
        same = (mine == true) | (mine.isnan() & true.isnan())
        off = (mine.double() - true.double()).abs()
        if not mine.is_floating_point():
            off = off.clamp(min=1.0)  # of large ids float64 does not see the last digits
        absolute = max(absolute, float(torch.where(same, 0.0, off).nan_to_num(torch.inf, torch.inf).max()))
        largest = max(largest, float(true.double().nan_to_num(0.0, 0.0, 0.0).abs().max()))
    return absolute, absolute / largest if largest else float("inf") if absolute else 0.0
