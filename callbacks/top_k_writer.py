"""TopKWriter: streams each user's best items to Parquet, one file a rank, complete or not there at all.

Shape suffixes: B samples, K items a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_PER_GROUP = 1 << 14  # rows held in memory; many small row groups would read slowly
_DIMENSIONS = {"sample_ids": 1, "item_rows": 2, "scores": 2}


class TopKWriter(BasePredictionWriter):
    """Writes ``<file_prefix>-<rank>.parquet`` with the columns ``user_id``, ``item_ids`` and ``scores``, best first.

    It takes ``predict_step``'s dict of ``sample_ids`` (B,), ``item_rows`` (B, K) and ``scores`` (B, K). Raw ids come
    from the datamodule's ``users`` (by sample id, or by ``user_rows`` (B,) where the dict has them: a user may have
    several samples) and ``item_ids`` (by row); without them the numbers are written. Items with a score of -inf fill
    up what has fewer than K, and are left out.
    A run first removes the parts of the run before it, and its own appear when every rank is done, so parts in the
    folder are always those of one complete run.

    Args:
        output_dir: folder of the files; None means ``predictions`` in the logger's folder, or in the Trainer's
            ``default_root_dir`` without a logger.
        file_prefix: how the files' names begin.
        timestamps: whether there is a column ``timestamp`` too, from the dict's ``timestamps`` (B,): in ranking, when
            the candidates were asked for.

    Raises:
        ValueError: `file_prefix` is not a plain file name, or a prediction does not look as described.
    """

    def __init__(self, *, output_dir: str | None = None, file_prefix: str = "part", timestamps: bool = False) -> None:
        super().__init__(write_interval="batch")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", file_prefix):
            raise ValueError(f"file_prefix={file_prefix!r}: expected letters, digits, '_', '-' and '.'")
        self.output_dir = output_dir
        self.file_prefix = file_prefix
        self.timestamps = timestamps
        self._part: _Part | None = None

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # log_dir is a collective: every rank asks, whether or not it needs the answer.
        log_dir = trainer.log_dir or trainer.default_root_dir
        folder = Path(log_dir) / "predictions" if self.output_dir is None else Path(self.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            ours = re.compile(rf"{re.escape(self.file_prefix)}-\d+\.parquet|\.{re.escape(self.file_prefix)}-\d+\.tmp")
            for stale in folder.iterdir():
                if ours.fullmatch(stale.name):
                    stale.unlink()
        trainer.strategy.barrier("TopKWriter: stale parts removed")
        datamodule = getattr(trainer, "datamodule", None)
        self._part = _Part(
            folder / f"{self.file_prefix}-{trainer.global_rank}.parquet",
            users=_RawIds("users", getattr(datamodule, "users", None)),
            items=_RawIds("item_ids", getattr(datamodule, "item_ids", None)),
            timestamps=self.timestamps,
        )

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self._part is not None
        self._part.write(_checked(prediction, type(pl_module).__name__, timestamps=self.timestamps))

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._part is not None
        self._part.close()
        # No part appears before every rank has all of its own.
        trainer.strategy.barrier("TopKWriter: parts written")
        self._part.publish()
        folder, self._part = self._part.path.parent, None
        rank_zero_info(f"Predictions are in {folder}")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._abandon()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._abandon()

    def _abandon(self) -> None:
        part, self._part = self._part, None
        if part is not None:
            part.abandon()


class _RawIds:
    """Raw ids by number, as an Arrow array; the numbers themselves where there are no raw ids."""

    def __init__(self, name: str, ids: Any) -> None:
        import pyarrow as pa

        self._name = name
        self._ids: pa.Array | None = None
        if ids is not None:
            try:
                array = pa.array(ids)
            except pa.ArrowException as error:
                raise ValueError(f"datamodule.{name}: expected ids of one type; {error}") from error
            self._ids = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
        self.type: pa.DataType = pa.int64() if self._ids is None else self._ids.type

    def take(self, numbers: Tensor) -> pa.Array:
        import pyarrow as pa

        if self._ids is None:
            return pa.array(numbers.numpy())
        if numbers.numel():
            first, last = int(numbers.min()), int(numbers.max())
            if first < 0 or last >= len(self._ids):
                raise ValueError(
                    f"datamodule.{self._name}: has {len(self._ids)} ids, but predict_step returned {first} ... {last}"
                )
        return self._ids.take(pa.array(numbers.numpy()))


class _Part:
    """One rank's file, under a temporary name in the same folder until it is published."""

    def __init__(self, path: Path, *, users: _RawIds, items: _RawIds, timestamps: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        self._users, self._items = users, items
        self._schema = pa.schema(
            {"user_id": users.type}
            | ({"timestamp": pa.int64()} if timestamps else {})
            | {"item_ids": pa.list_(items.type), "scores": pa.list_(pa.float32())}
        )
        self._held: list[pa.RecordBatch] = []
        self._temporary = path.with_name(f".{path.stem}.tmp")
        self._writer = pq.ParquetWriter(self._temporary, self._schema)

    def write(self, found: Mapping[str, Tensor]) -> None:
        import pyarrow as pa

        scores_BK = found["scores"]
        real_BK = scores_BK != -torch.inf
        ends_B = real_BK.sum(1).cumsum(0)
        offsets = pa.array(torch.cat([ends_B.new_zeros(1), ends_B]).to(torch.int32).numpy())
        columns = {
            "user_id": self._users.take(found.get("user_rows", found["sample_ids"])),
            "item_ids": pa.ListArray.from_arrays(offsets, self._items.take(found["item_rows"][real_BK])),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores_BK[real_BK].numpy())),
        }
        if "timestamps" in found:
            columns["timestamp"] = pa.array(found["timestamps"].numpy())
        self._held.append(
            pa.RecordBatch.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)
        )
        if sum(batch.num_rows for batch in self._held) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        held, self._held = self._held, []
        if sum(batch.num_rows for batch in held):
            self._writer.write_table(pa.Table.from_batches(held, self._schema).combine_chunks())

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def publish(self) -> None:
        self._temporary.replace(self.path)

    def abandon(self) -> None:
        try:
            self._writer.close()
        finally:
            self._temporary.unlink(missing_ok=True)


def _checked(prediction: Any, module: str, *, timestamps: bool) -> dict[str, Tensor]:
    """The prediction's tensors on the host, padding left out."""
    expected = (
        f"TopKWriter: {module}.predict_step must return a dict of tensors sample_ids (B,), item_rows (B, K) and "
        "scores (B, K)" + ", and timestamps (B,) for timestamps=True" * timestamps
    )
    if not isinstance(prediction, Mapping):
        raise ValueError(f"{expected}; got {type(prediction).__name__}")
    dimensions = _DIMENSIONS | ({"timestamps": 1} if timestamps else {})
    if missing := [name for name in dimensions if name not in prediction]:
        raise ValueError(f"{expected}; missing: {', '.join(missing)}")
    if "user_rows" in prediction:
        dimensions = dimensions | {"user_rows": 1}
    for name, number in dimensions.items():
        if not isinstance(tensor := prediction[name], Tensor):
            raise ValueError(f"{expected}; {name} is {type(tensor).__name__}")
        if (
            tensor.dim() != number
            or tensor.shape[0] != prediction["sample_ids"].shape[0]
            or (number == 2 and tensor.shape != prediction["item_rows"].shape)
        ):
            raise ValueError(f"{expected}; {name} has shape {tuple(tensor.shape)}")
    real_B = prediction["sample_ids"].detach().cpu() != PADDING_SAMPLE_ID
    dtypes = {name: torch.float32 if name == "scores" else torch.int64 for name in dimensions}
    return {name: prediction[name].detach().cpu().to(dtypes[name])[real_B] for name in dimensions}
