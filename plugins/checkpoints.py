"""Checkpoints: what a strategy saves and loads, on any number of processes, at once or while training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_gr.checkpoint.export_format import is_export
from lightning_gr.checkpoint.manifest import Base, Manifest
from lightning_gr.checkpoint.reader import META_FILENAME, TABLES_FOLDER, CheckpointReader, rank_filename
from lightning_gr.checkpoint.storage import FileSum, Storage
from lightning_gr.checkpoint.tensors import Shapes, read_tensors, write_tensors
from lightning_gr.checkpoint.writer import CheckpointWriter, named, pack
from lightning_gr.plugins.dense_optimizer_state import DenseOptimizerState
from lightning_gr.plugins.rank_state import LoggedSums, rank_state, restore_generators, restore_metrics
from lightning_gr.plugins.save_options import SaveOptions
from lightning_gr.plugins.stage_thread import StageThread, done
from lightning_gr.plugins.static_rows import dynamic_from_static
from lightning_gr.plugins.tensor_trees import copied, tensors_only

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torchrec.distributed.model_parallel import DistributedModelParallel

    from lightning_gr.embeddings.dynamic.table_files import TablesSnapshot
    from lightning_gr.plugins.dynamic_training import DynamicTraining


@dataclass
class _Save:
    """A save under way.

    Args:
        target: the directory that the checkpoint will be.
        where: the directory that files go to.
        tensors: of the module and its optimisers.
        own: what this process keeps for itself, as it goes to its file.
        tables: by collection.
        options: how it is saved.
        next_steps: by collection, the step that follows.
        base: what it adds to.
        delta_of: by collection, the step after its base.
        writer: on the process that commits.
        meta: what Lightning keeps, packed there, since it goes on changing.
        step: optimizer steps done.
        epoch: epochs done.
        is_abandoned: whether training has failed since.
    """

    target: Storage
    where: Storage
    tensors: dict[str, Any]
    own: bytes
    tables: dict[str, TablesSnapshot]
    options: SaveOptions
    next_steps: dict[str, int]
    base: Base | None
    delta_of: dict[str, int]
    writer: CheckpointWriter | None = None
    meta: bytes = b""
    step: int = 0
    epoch: int = 0
    is_abandoned: bool = False

    def check(self) -> None:
        """Raises where nobody wants it any more."""
        if self.is_abandoned:
            raise RuntimeError(f"checkpoint {self.target}: given up, since training has failed")


@dataclass
class _Published:
    """The last checkpoint that later ones may add to."""

    target: Storage
    id: str
    next_steps: dict[str, int] = field(default_factory=dict)
    deltas: int = 0


class Checkpoints:
    """The checkpoints of one strategy.

    Args:
        module: wrapped.
        dmp: its wrap.
        dynamic: its dynamic tables.
        trainer: which trains it.
        group: processes that save together; nothing else talks in it.

    Attributes:
        last_base: name of the checkpoint that the one saved last adds to; None of a full one.
        blocked_seconds: how long training stood still for saves, those of the present background save included.
        loaded: the checkpoint that was loaded.
    """

    def __init__(
        self,
        *,
        module: pl.LightningModule,
        dmp: DistributedModelParallel,
        dynamic: DynamicTraining,
        trainer: pl.Trainer,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._module, self._dmp, self._dynamic, self._trainer, self._group = module, dmp, dynamic, trainer, group
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.last_base: str | None = None
        self.blocked_seconds = 0.0
        self.loaded: CheckpointReader | None = None
        self._published: _Published | None = None
        self._thread: StageThread | None = None
        self._pending: Future[Manifest] | None = None
        self._present: _Save | None = None
        self._states: list[dict[str, Any]] = []
        self._sums: LoggedSums | None = None
        self._is_first_batch = False
        self._epoch = 0

    # ---- saving ------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any], path: str, options: SaveOptions) -> None:
        """Saves Lightning's dictionary with everything that it does not know of; every process calls it.

        Raises:
            OSError: some process could not write; nothing is left of the save, and earlier checkpoints are as before.
        """
        began = time.perf_counter()
        self.wait()
        tensors = self._take_tensors(checkpoint)
        failed, writer, where, meta = None, None, "", b""
        if self._rank == 0:
            try:
                if options.still_ours is not None:
                    options.still_ours()
                meta = pack(checkpoint)
                writer = CheckpointWriter(Storage(path))
                where = writer.where.location
            except Exception as error:  # the others must hear of it
                failed = error
        target = Storage(path)
        decided: list[Any] = [where, failed is None and self._may_add_to(target, options)]
        dist.broadcast_object_list(decided, src=0, group=self._group)
        where, adds = decided
        if failed is not None:
            raise failed
        if not where:
            raise OSError(f"checkpoint {path}: process 0 could not begin it; its own message says why")
        save = self._begin(tensors, target, Storage(where), options, adds)
        save.writer, save.meta = writer, meta
        save.step, save.epoch = int(checkpoint.get("global_step", 0)), int(checkpoint.get("epoch", 0))
        if options.background:
            save.tensors = copied(save.tensors)
            self._thread = self._thread or StageThread("checkpoint")
            self._present = save
            self._pending = self._thread.submit(lambda: self._write(save))
        else:
            self._pending = done(lambda: self._write(save))
            self.wait()
        self.blocked_seconds += time.perf_counter() - began

    def _may_add_to(self, target: Storage, options: SaveOptions) -> bool:
        """Whether the next checkpoint holds changes alone; decided by one process, since it looks at files."""
        last = self._published
        if last is None or options.full_every < 2 or last.deltas + 1 >= options.full_every:
            return False
        return last.target.parent == target.parent and last.target != target and _has_id(last.target, last.id)

    def _take_tensors(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What goes to DCP's files, out of Lightning's dictionary, which keeps the optimisers' groups."""
        tensors: dict[str, Any] = {"state_dict": checkpoint.pop("state_dict")}
        if checkpoint.pop("optimizer_states", None) is not None:
            dense, groups = self._dense_optimizers().tensors_and_groups()
            tensors |= {"dense_optimizer": dense, "sparse_optimizer": self._sparse_optimizer_state()}
            checkpoint["dense_param_groups"] = groups
        return tensors_only(tensors)

    def _begin(
        self, tensors: dict[str, Any], target: Storage, where: Storage, options: SaveOptions, adds: bool
    ) -> _Save:
        own = pack(rank_state(self._trainer))  # before the tables are held: it may refuse
        last = self._published if adds else None
        self.last_base = None if last is None else last.target.name
        tables = self._dynamic.begin_save(
            since=None if last is None else last.next_steps,
            journals=options.full_every > 1,
            max_copied_bytes=options.max_copied_bytes,
        )
        return _Save(
            target=target,
            where=where,
            tensors=tensors,
            own=own,
            tables=tables,
            options=options,
            next_steps={path: engine.next_step for path, engine in self._dynamic.engines.items()},
            base=None if last is None else Base(last.target.name, last.id),
            delta_of={} if last is None else dict(last.next_steps),
        )

    def _write(self, save: _Save) -> Manifest:
        """Writes the files of this process; the first one commits when all have done so."""
        failure: Exception | None = None
        files: dict[str, FileSum] = {}
        try:
            try:
                files |= write_tensors(save.where, save.tensors, group=self._group)
                name = rank_filename(self._rank, self._world)
                files[name] = save.where.publish(name, save.own)
                for path, tables in save.tables.items():
                    save.check()
                    folder = f"{TABLES_FOLDER}/{path}"
                    written = tables.write(save.where / folder)
                    files |= {f"{folder}/{name}": found for name, found in written.items()}
                save.tensors = {}
            except Exception as error:
                failure = error
            all_files = self._agree(failure, files)
            manifest, failure = None, None
            if save.writer is not None:
                try:
                    save.check()
                    manifest = save.writer.commit(
                        save.meta,
                        {name: found for of_rank in all_files for name, found in of_rank.items()},
                        step=save.step,
                        epoch=save.epoch,
                        world_size=self._world,
                        attempt=save.options.attempt,
                        base=save.base,
                        delta_of=save.delta_of,
                        still_ours=save.options.still_ours,
                    )
                except Exception as error:
                    failure = error
            manifest = self._agree(failure, manifest)[0]
            assert isinstance(manifest, Manifest)
            for tables in save.tables.values():
                tables.published()
            if save.options.full_every > 1:
                deltas = 0 if save.base is None or self._published is None else self._published.deltas + 1
                self._published = _Published(save.target, manifest.id, save.next_steps, deltas)
            return manifest
        except BaseException:
            if save.writer is not None:
                save.writer.give_up()
            raise
        finally:
            self._present = None
            for tables in save.tables.values():
                tables.close()
                self.blocked_seconds += tables.waited_seconds if save.options.background else 0.0

    def _agree(self, failure: Exception | None, value: Any) -> list[Any]:
        """What all processes have, or an error on all of them."""
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        gathered: list[Any] = [None] * self._world
        dist.all_gather_object(gathered, (reason, value), group=self._group)
        if failure is not None:
            raise failure
        for rank, (reason, _) in enumerate(gathered):
            if reason is not None:
                raise OSError(f"process {rank} could not save: {reason}")
        return [value for _, value in gathered]

    @property
    def is_saving(self) -> bool:
        """Whether a background save is under way."""
        return self._pending is not None and not self._pending.done()

    def poll(self) -> bool:
        """Whether nothing is under way any more; raises the error of a background save that failed."""
        if self.is_saving:
            return False
        self.wait()
        return True

    def wait(self) -> Manifest | None:
        """Waits for a background save and raises its error; what was saved last."""
        pending, self._pending = self._pending, None
        if pending is not None and pending.exception() is not None and self._thread is not None:
            self._thread.close()
            self._thread = None  # one that has failed does nothing more
        return None if pending is None else pending.result()

    def close(self, *, wait: bool) -> None:
        """Ends the thread; with `wait` after the save under way, which else is given up."""
        if not wait and self._present is not None:
            self._present.is_abandoned = True
            for tables in self._present.tables.values():
                tables.close()
        try:
            if wait:
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.close(abandon=not wait)
            self._thread = self._pending = None

    # ---- loading -----------------------------------------------------------------------------------------------

    def load(self, path: str, *, fitting: bool, fallbacks: Sequence[str] = ()) -> dict[str, Any]:
        """Reads a checkpoint into the module, its optimisers and tables; every process calls it.

        Every file of it is verified before anything changes.

        Args:
            path: of its directory; a path or a URL.
            fitting: whether optimisers are restored too.
            fallbacks: others to try where it turns out to be damaged, in this order; that is said.

        Returns:
            Lightning's dictionary.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is torn, damaged or of another model; names the file.
        """
        path = named(path.removesuffix(f"/{META_FILENAME}"))
        if is_export(path):
            if fitting:
                raise ValueError(
                    f"ckpt_path={path}: an export has weights and tables and no optimiser, so nothing can go on from "
                    "it; begin a new run with its weights: --init_from in the place of --ckpt_path"
                )
            return self._load_export(path)
        candidates = [path, *(x for x in fallbacks if x != path)]
        for place, candidate in enumerate(candidates):
            try:
                reader = self.verified(candidate, but_tables=True)
                return self._load(reader, self._verifying_tables(reader), fitting=fitting)
            except _Damaged as error:
                if place + 1 == len(candidates):
                    raise ValueError(str(error)) from error
                rank_zero_warn(f"{error}; {candidates[place + 1]} is tried instead")
        raise AssertionError(candidates)

    def verified(self, path: str, *, but_tables: bool = False) -> CheckpointReader:
        """A checkpoint whose files are shared out over the processes to be read through; all agree on the outcome.

        Args:
            path: of its directory; a path or a URL.
            but_tables: leaves the files of dynamic tables to `_verifying_tables`.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: a file is missing or damaged; names it.
        """
        failure: Exception | None = None
        reader = None
        try:
            reader = CheckpointReader(path)
            self._check_share([x for x in reader.files() if not (but_tables and _is_of_tables(x))])
        except Exception as error:  # the others must hear of it
            failure = error
        self._agree_on_damage(failure)
        assert reader is not None
        return reader

    def _check_share(self, files: Sequence[_File]) -> None:
        loads = [0] * self._world
        for manifest, storage, name in sorted(files, key=lambda x: x[0].files[x[2]].size, reverse=True):
            rank = loads.index(min(loads))
            loads[rank] += manifest.files[name].size + 1
            if rank == self._rank:
                manifest.check_contents(storage, [name])

    def _agree_on_damage(self, failure: BaseException | None) -> None:
        reasons: list[Any] = [None] * self._world
        dist.all_gather_object(reasons, None if failure is None else str(failure), group=self._group)
        if isinstance(failure, FileNotFoundError):
            raise failure
        found = next((x for x in reasons if x is not None), None)
        if found is not None:
            raise _Damaged(found) from failure

    def _verifying_tables(self, reader: CheckpointReader) -> Callable[[], None]:
        """Reads the tables' files through while they are loaded; what it returns waits for that, and tells all."""
        files = [x for x in reader.files() if _is_of_tables(x)]
        thread = StageThread("verification")
        future = thread.submit(lambda: self._check_share(files))
        thread.close()
        told = False

        def confirm() -> None:
            nonlocal told
            if not told:
                told = True
                self._agree_on_damage(future.exception())

        return confirm

    def _load(self, reader: CheckpointReader, confirm: Callable[[], None], *, fitting: bool) -> dict[str, Any]:
        meta, shapes, storage = reader.meta(), reader.shapes(), reader.storage
        weights = self._dmp.state_dict()
        self._check_weights(storage, weights, shapes)
        tensors: dict[str, Any] = {"state_dict": weights}
        optimizers = "dense_param_groups" in meta
        if fitting and not optimizers:
            raise ValueError(
                f"checkpoint {storage}: was saved with weights alone, so nothing can go on from it; begin a new run "
                "with them: init_from"
            )
        optimizers &= fitting
        self._dynamic.load(
            reader.collections(),
            confirm=confirm,
            otherwise=lambda path: dynamic_from_static(path, reader, self._dynamic),
        )
        if optimizers:
            tensors["dense_optimizer"] = self._dense_optimizers().empty_tensors(storage, shapes)
            tensors["sparse_optimizer"] = self._sparse_optimizer_state()
        read_tensors(storage, tensors_only(tensors))
        self._dmp.load_state_dict(weights)
        if optimizers:
            self._dense_optimizers().load(tensors["dense_optimizer"], meta["dense_param_groups"])
        self._published, self.loaded = None, reader
        if fitting:
            self._states = reader.rank_states()
            self._say(reader, meta)
        return meta

    def _load_export(self, path: str) -> dict[str, Any]:
        from lightning_gr.checkpoint.export_tables import load_export

        weights = self._dmp.state_dict()
        meta: dict[str, Any] = load_export(path, weights, self._dynamic.engines)
        self._dmp.load_state_dict(weights)
        return meta

    def _say(self, reader: CheckpointReader, meta: Mapping[str, Any]) -> None:
        manifest = reader.manifest
        rows = sum(len(table) for engine in self._dynamic.engines.values() for table in engine.tables)
        counted = torch.tensor(rows)
        if self._dynamic.engines:
            dist.all_reduce(counted, group=self._group)
        parts = [
            f"step {manifest.step}",
            f"epoch {manifest.epoch}",
            f"{len(self._dmp.state_dict())} weights",
            "their optimisers" if "dense_param_groups" in meta else "no optimisers",
        ]
        if self._dynamic.engines:
            parts.append(f"{int(counted):,} rows of dynamic tables")
        parts.append("random generators" if len(self._states) == self._world else "generators of other processes")
        chain = f", with {len(reader.chain) - 1} before it" if len(reader.chain) > 1 else ""
        processes = f"saved by {manifest.world_size} process(es), now {self._world}"
        rank_zero_info(f"resumed from {reader.storage}{chain}: {', '.join(parts)}; {processes}")

    def _check_weights(self, storage: Storage, weights: Mapping[str, Any], shapes: Shapes) -> None:
        for name, weight in weights.items():
            saved = shapes.get(f"state_dict.{name}")
            if saved is None:
                raise ValueError(
                    f"checkpoint {storage}: has no {name}; it was saved by another model, so use its own configuration"
                )
            if tuple(weight.size()) != saved[0]:
                raise ValueError(
                    f"checkpoint {storage}: {name} has shape {saved[0]}, the model wants {tuple(weight.size())}; use "
                    "the configuration and data it was trained with"
                )

    def _dense_optimizers(self) -> DenseOptimizerState:
        return DenseOptimizerState(self._module, self._trainer.strategy.optimizers)

    def _sparse_optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._dmp.fused_optimizer.state_dict()["state"]
        return state

    # ---- taking up ---------------------------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Puts back what a resumed run has to have just before its first batch."""
        if not self._states:
            return
        restore_metrics(self._trainer, self._states)
        self._sums = LoggedSums(self._states, rank=self._rank, world_size=self._world)
        restore_generators(self._states, self._rank)
        self._states, self._is_first_batch, self._epoch = [], True, self._trainer.current_epoch

    def begin_batch(self) -> None:
        """Before each batch. Lightning may not have counted the one before a checkpoint for loggers yet."""
        if self._is_first_batch and self._module.automatic_optimization:
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self._trainer.global_step
        self._is_first_batch = False
        if self._trainer.current_epoch != self._epoch:
            self._sums = None
        self.after_batch()

    def after_batch(self) -> None:
        """Adds what was logged before the checkpoint to what has been logged since."""
        if self._sums is not None:
            self._sums.take_up(self._trainer)


class _Damaged(ValueError):
    """A file is missing or not what was saved; nothing has changed yet."""


_File = tuple[Manifest, Storage, str]


def _is_of_tables(file: _File) -> bool:
    return file[2].startswith(f"{TABLES_FOLDER}/")


def _has_id(storage: Storage, wanted: str) -> bool:
    """Whether a checkpoint is still there and still the same."""
    try:
        return CheckpointReader(storage).manifest.id == wanted
    except (ValueError, OSError):
        return False
