"""Rows of a static table that a run has as a dynamic one: row i becomes the row of id i."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.embeddings.dynamic.sparse_optimizers import SparseOptimizerConfig
    from lightning_gr.plugins.dynamic_training import DynamicTraining

_ADAGRADS = ("rowwise_adagrad", "adagrad")


def dynamic_from_static(path: str, reader: CheckpointReader, dynamic: DynamicTraining) -> None:
    """Takes the rows of a collection's tables from the static tables of a checkpoint.

    Every process reads whole tables, one after the other, and keeps its own rows. The sums of Adagrad are taken along
    where both sides have the same kind; any other optimiser begins anew, which is said.

    Raises:
        ValueError: the checkpoint has no such tables.
    """
    from lightning_gr.embeddings.dynamic.table_files import load_static_rows

    engine = dynamic.engines[path]
    shapes = reader.shapes()
    for config in engine.configs:
        weight = f"{path}.embeddings.{config.name}.weight"
        shape = shapes.get(f"state_dict.{weight}")
        if shape is None:
            raise ValueError(
                f"checkpoint {reader.storage}: has no table {config.name} of {path}, dynamic or static; use the "
                "configuration it was trained with"
            )
        if shape[0][1] != config.embedding_dim:
            raise ValueError(
                f"checkpoint {reader.storage}: the static table {weight} is {shape[0][1]} wide, the dynamic one "
                f"{config.embedding_dim}; set embedding_dim to that"
            )
        values_ND = reader.tensors(f"state_dict.{weight}")[f"state_dict.{weight}"]
        optimizer = engine.tables[engine.logical[engine.table_number(config.name)][0]].optimizer
        state_NS = _sums(reader, f"sparse_optimizer.{weight}.{config.name}.momentum1", optimizer)
        load_static_rows(engine, config.name, values_ND, state_NS)
        rest = "with its optimiser's sums" if state_NS is not None else "its optimiser begins anew"
        say = rank_zero_info if state_NS is not None else rank_zero_warn
        say(f"{path}: the static table {config.name} became a dynamic one, row i under id i, {rest}")


def _sums(reader: CheckpointReader, key: str, optimizer: SparseOptimizerConfig) -> Tensor | None:
    """Adagrad's sums in the form that a dynamic table has them, (N, S); None where they are of another kind."""
    if optimizer.name not in _ADAGRADS or key not in reader.shapes():
        return None
    sums = reader.tensors(key)[key]
    sums_NS = sums[:, None] if sums.dim() == 1 else sums
    kinds_agree = (sums_NS.shape[1] == 1) is (optimizer.name == "rowwise_adagrad")
    return sums_NS if kinds_agree else None
