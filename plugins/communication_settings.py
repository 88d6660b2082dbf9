"""What the settings of communication mean together: table_groups, sparse_update, sync_steps, schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_gr.plugins.dynamic_training import DynamicTraining

SparseUpdate = Literal["sync", "semi_async", "exact_async"]
Schedule = Literal["lookup_ahead", "six_stage"]
_SIX_STAGE_DEPTH = 4
"""Batches ahead of the one that trains: one each in fetch, exchange, wait and embed."""


def check_communication(
    *,
    pipeline_depth: int,
    schedule: Schedule,
    sparse_update: SparseUpdate,
    sync_steps: int,
    table_groups: int,
) -> None:
    """Refuses settings that cannot work, whatever the module."""
    for name, value, choices in (
        ("schedule", schedule, get_args(Schedule)),
        ("sparse_update", sparse_update, get_args(SparseUpdate)),
    ):
        if value not in choices:
            raise MisconfigurationException(f"{name}={value!r}: expected one of {', '.join(choices)}")
    for name, number, least in (("sync_steps", sync_steps, 0), ("table_groups", table_groups, 1)):
        if number < least:
            raise MisconfigurationException(f"{name}={number}: expected at least {least}")
    if schedule == "six_stage" and pipeline_depth < _SIX_STAGE_DEPTH:
        raise MisconfigurationException(
            f"schedule=six_stage: pipeline_depth={pipeline_depth} leaves no room for its stages; set at least "
            f"{_SIX_STAGE_DEPTH}: one batch each in fetch, exchange, wait and embed ahead of the one that trains"
        )
    if sparse_update != "sync" and pipeline_depth == 0:
        raise MisconfigurationException(
            f"sparse_update={sparse_update}: pipeline_depth=0 keeps no batch in flight whose rows could be read ahead; "
            "set at least 1"
        )


def check_table_groups(table_groups: int, world_size: int) -> None:
    """Refuses groups that would differ in size.

    Raises:
        MisconfigurationException: names the numbers that divide the processes.
    """
    if world_size % table_groups:
        raise MisconfigurationException(
            f"table_groups={table_groups}: does not divide the {world_size} processes into groups of one size; choose "
            f"from {', '.join(str(m) for m in range(1, world_size + 1) if world_size % m == 0)}"
        )


def run_in_background(
    dynamic: DynamicTraining, sparse_update: SparseUpdate, trainer: pl.Trainer, *, has_static: bool
) -> None:
    """Has rows updated beside the dense step.

    Args:
        dynamic: the dynamic tables.
        sparse_update: `semi_async` or `exact_async`.
        trainer: of the fit.
        has_static: whether there are static tables too.

    Raises:
        MisconfigurationException: a setting that needs an update within the step, with the reason.
    """
    mode = f"sparse_update={sparse_update}"
    if not dynamic.engines:
        raise MisconfigurationException(
            f"{mode}: {type(trainer.lightning_module).__name__} has no dynamic tables, and static ones are updated "
            "inside backward; give the model dynamic_tables, or leave sparse_update out"
        )
    if has_static:
        rank_zero_warn(f"{mode}: static tables stay synchronous, since they are updated inside backward")
    for path, engine in dynamic.engines.items():
        if engine.fused_update:
            raise MisconfigurationException(
                f"{mode}: rows of {path} are updated inside backward; set dynamic_tables.update to step"
            )
    if trainer.precision == "16-mixed":
        raise MisconfigurationException(
            f"{mode}: precision=16-mixed leaves out a step where a gradient is not finite, which needs all of them "
            "before the dense step; use bf16-mixed or 32-true"
        )
    if sparse_update == "semi_async":
        why = (
            "their norm needs every gradient before the dense step, which semi_async does not wait for; use "
            "sparse_update=exact_async, or gradient_clip_algorithm=value"
        )
        if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
            raise MisconfigurationException(
                f"{mode}: gradient_clip_val={trainer.gradient_clip_val} clips gradients by their norm; {why}"
            )
        dynamic.refuses_norm = f"{mode}: {why}"
    elif not trainer.gradient_clip_val:
        dynamic.refuses_norm = (
            f"{mode}: some gradients are still on their way where a module clips by itself; set "
            "Trainer(gradient_clip_val=...)"
        )
    dynamic.in_background = True
