"""``lightning-gr export``: weights, tables and configuration of a checkpoint in files that others can read.

Shape suffixes: N rows of a piece, D width.
"""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_gr.checkpoint.export_format import Pieces
    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.embeddings.dynamic.policies import TablePolicy

DIFFERENT = 1
"""Exit code where the export does not predict what the checkpoint does."""

_NOT_EXPORTED = ("state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "dense_param_groups")
_SETTINGS = ("seed_everything", "trainer", "model", "data")


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 where predictions differ."""
    args, settings = _parser().parse_known_args(argv)
    if not any(word.partition("=")[0] in ("-c", "--config", "--model") for word in settings):
        raise UserError("export: --config: missing; name a recipe or a file (lightning-gr recipes ls)")
    if args.check_batches < 0:
        raise UserError(f"--check_batches {args.check_batches}: expected a number of batches; 0 compares nothing")
    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.checkpoint.storage import Storage

    output = Storage(args.output)
    if output.is_file() or output.names():
        raise UserError(f"--output {args.output}: exists and is not empty; give another directory")
    for message in ("torch.distributed is disabled", "Be aware that when using `ckpt_path`"):
        warnings.filterwarnings("ignore", message=message)
    reader = CheckpointReader(args.ckpt_path)
    reader.verify()
    run = _built(settings)
    _check_fits(run, reader)
    wanted = _predictions(settings, args.ckpt_path, args.check_batches) if args.check_batches else []
    _write(output, reader, run, args.tables)
    if not args.check_batches:
        print("export: predictions were not compared (--check_batches 0)")
        return 0
    return _compare(wanted, _predictions(settings, args.output, args.check_batches), output)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-gr export",
        usage="lightning-gr export --config RECIPE [--setting VALUE ...] --ckpt_path CHECKPOINT --output DIR "
        "[--tables parquet|safetensors] [--check_batches N]",
        description="Writes the weights, tables and configuration of a checkpoint for those who serve them, and "
        "compares what both predict, bit for bit. Settings are those of `predict`.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", metavar="CHECKPOINT", required=True, help="a checkpoint directory, or its URL")
    parser.add_argument("--output", metavar="DIR", required=True, help="where the export goes: an empty directory")
    parser.add_argument(
        "--tables", choices=("parquet", "safetensors"), default="parquet", help="files of tables (default: parquet)"
    )
    parser.add_argument(
        "--check_batches",
        metavar="N",
        type=int,
        default=2,
        help="batches of `predict` that are compared (default: 2); one process loads the whole model for it",
    )
    return parser


# ---- the run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What a configuration says.

    Args:
        config: all of its settings, as YAML.
        model: after `configure_model`, its static tables without memory.
        keep: what must stay alive.
    """

    config: str
    model: Any
    keep: Any


def _cli(settings: Sequence[str], *, batches: int | None) -> Any:
    """A `predict` on one process; with `batches` it runs and keeps the predictions, without it stops before."""
    import logging

    from lightning_gr.cli.quiet import quiet_library_noise

    quiet_library_noise()
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse
    from jsonargparse import Namespace
    from typing_extensions import override

    from lightning_gr.cli.training import GRCLI

    for name in ("lightning.pytorch", "lightning.fabric", "lightning_gr"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Predicting(GRCLI):
        @override
        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            # The versions are its header.
            dumped = self.parser.dump(self.config, skip_link_targets=False, skip_none=False)
            header = [line for line in dumped.splitlines() if line.startswith("#")]
            found = yaml.safe_load(dumped)["predict"]
            kept = {name: found[name] for name in _SETTINGS if name in found}
            self.dumped = "\n".join([*header, yaml.safe_dump(kept, sort_keys=False)])
            here = {"devices": 1, "num_nodes": 1, "logger": False, "callbacks": None, "profiler": None}
            quiet = dict.fromkeys(("enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
            self.config.predict.trainer.update(Namespace({**here, **quiet, "limit_predict_batches": batches}))

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            if batches is not None:
                self.predictions = self.trainer.predict(
                    self.model, datamodule=self.datamodule, ckpt_path=self.config.predict.ckpt_path
                )

    return Predicting(args=["predict", *settings])


def _built(settings: Sequence[str]) -> _Run:
    """The configuration with its model, of no table more than its shape."""
    from lightning.pytorch.trainer.states import TrainerFn

    from lightning_gr.embeddings.static_tables import deferred_tables

    cli = _cli(settings, batches=None)
    model, trainer = cli.model, cli.trainer
    if cli.datamodule is not None:
        cli.datamodule.prepare_data()
        cli.datamodule.setup(TrainerFn.PREDICTING)
        trainer.datamodule = cli.datamodule
    model.trainer = trainer
    model.setup(TrainerFn.PREDICTING)
    with deferred_tables():
        model.configure_model()
    return _Run(cli.dumped, model, cli)


def _check_fits(run: _Run, reader: CheckpointReader) -> None:
    """Refuses a configuration whose model is not that of the checkpoint."""
    from lightning_gr.embeddings.dynamic.table_parts import BUCKET
    from lightning_gr.plugins.dynamic_sharding import dynamic_collections

    remedy = "give the configuration and data that it was trained with"
    saved = {name: shape for name, (shape, _) in _weights(reader).items()}
    wanted = {name: tuple(value.shape) for name, value in run.model.state_dict().items()}
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            has, wants = (f"of shape {x[name]}" if name in x else "missing" for x in (saved, wanted))
            raise UserError(f"{reader.storage}: {name} is {has} there, and {wants} in the configured model; {remedy}")
    collections = dynamic_collections(run.model)
    tables = {f"{path}/{config.name}": config.embedding_dim for path, x in collections.items() for config in x.configs}
    found = {f"{path}/{name}": width for path, name, width in _tables(reader) if not name.endswith(BUCKET)}
    for name in sorted(tables.keys() | found.keys()):
        if found.get(name) != tables.get(name):
            has, wants = (f"{x[name]} wide" if name in x else "missing" for x in (found, tables))
            raise UserError(
                f"{reader.storage}: dynamic table {name} is {has} there, and {wants} in the configured model; {remedy}"
            )


def _weights(reader: CheckpointReader) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and types of the module's weights; those that an average was made of are left out."""
    from lightning_gr.callbacks.ema import RAW_PREFIX

    weights = {
        key.removeprefix("state_dict."): x for key, x in reader.shapes().items() if key.startswith("state_dict.")
    }
    return {name: x for name, x in weights.items() if not name.startswith(RAW_PREFIX)}


def _tables(reader: CheckpointReader) -> Iterator[tuple[str, str, int]]:
    """Collection path, name and width of every dynamic table."""
    from lightning_gr.embeddings.dynamic.table_files import read_header, table_names

    for path, folders in reader.collections().items():
        for name in table_names(folders[-1]):
            yield path, name, read_header(folders, name)[0].dim


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(output: Storage, reader: CheckpointReader, run: _Run, tables: Any) -> None:
    import torch

    from lightning_gr import __version__
    from lightning_gr.checkpoint.export_format import ExportInfo
    from lightning_gr.checkpoint.export_writer import ExportWriter
    from lightning_gr.embeddings.dynamic.table_files import read_header, table_names
    from lightning_gr.plugins.dynamic_sharding import dynamic_collections

    manifest = reader.manifest
    info = ExportInfo(
        checkpoint=reader.storage.name,
        checkpoint_id=manifest.id,
        step=manifest.step,
        epoch=manifest.epoch,
        versions={"lightning_gr": __version__, "torch": torch.__version__},
    )
    static = _static_tables(run.model)
    collections = dynamic_collections(run.model)
    with ExportWriter(output, info, tables=tables) as writer:
        writer.add_config(run.config)
        writer.add_module({name: x for name, x in reader.meta().items() if name not in _NOT_EXPORTED})
        writer.add_weights({name: _whole(reader, name) for name in _weights(reader) if name not in static})
        for name in static:
            writer.add_static_table(name, _whole(reader, name))
        for path, folders in reader.collections().items():
            policies = {config.name: config.policy for config in collections[path].configs}
            for name in table_names(folders[-1]):
                header, _ = read_header(folders, name)
                writer.add_dynamic_table(
                    f"{path}/{name}",
                    functools.partial(_pieces, folders, name, policies.get(name)),
                    width=header.dim,
                    precision=header.precision,
                    seed=header.seed,
                    group_bits=header.group_bits,
                    buckets_per_group=header.buckets_per_group,
                )
    print(
        f"wrote {output}: step {manifest.step}, {len(static)} static and {sum(1 for _ in _tables(reader))} dynamic "
        "tables"
    )


def _static_tables(model: nn.Module) -> list[str]:
    """Names of the weights of TorchRec's collections."""
    from lightning_gr.embeddings.static_tables import is_static_collection

    collections = [(path, x) for path, x in model.named_modules() if is_static_collection(x)]
    return [
        f"{path}.{name}".lstrip(".")
        for path, x in collections
        for name, value in x.state_dict().items()
        if value.dim() == 2
    ]


def _whole(reader: CheckpointReader, name: str) -> Tensor:
    return reader.tensors(f"state_dict.{name}")[f"state_dict.{name}"]


def _pieces(folders: Sequence[Storage], name: str, policy: TablePolicy | None) -> Pieces:
    """Ids and values of a table's rows; each from the last link of the chain that has something of it.

    Args:
        folders: of its collection, the full one and then what adds to it.
        name: of the table.
        policy: of it; rows that have expired are left out, since lookups do not find them. None of shared rows.
    """
    import torch

    from lightning_gr.checkpoint.export_format import PIECE_ROWS
    from lightning_gr.embeddings.dynamic.eviction import is_expired
    from lightning_gr.embeddings.dynamic.row_storage import Metadata
    from lightning_gr.embeddings.dynamic.table_chain import links_of

    links = links_of(folders, name)
    header = links[-1].header
    for i, link in enumerate(links):
        later = [x for after in links[i + 1 :] for x in (after.removed, *(part.read("ids") for part in after.parts))]
        known_N = torch.cat([torch.zeros(0, dtype=torch.int64), *later])
        for part in link.parts:
            for start in range(0, part.num_rows, PIECE_ROWS):
                rows = [(start, min(start + PIECE_ROWS, part.num_rows))]
                ids_N, values_ND = part.read("ids", rows), part.read("values", rows)
                kept_N = ~torch.isin(ids_N, known_N) if len(known_N) else torch.ones_like(ids_N, dtype=torch.bool)
                if policy is not None and policy.expires:
                    metadata = Metadata(*(part.read(x, rows) for x in ("counts", "last_steps", "last_times")))
                    kept_N &= ~is_expired(policy, metadata, header.next_step, header.time)
                yield ids_N[kept_N], values_ND[kept_N].float()


# ---- comparing -----------------------------------------------------------------------------------------------------


def _predictions(settings: Sequence[str], path: str, batches: int) -> list[Any]:
    """What a checkpoint or an export predicts for the first batches."""
    import torch.distributed as dist

    had_group = dist.is_initialized()
    try:
        predictions = _cli(
            [*settings, "--ckpt_path", path, "--return_predictions", "true"], batches=batches
        ).predictions
    finally:
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()
    return list(predictions or [])


def _compare(wanted: list[Any], found: list[Any], output: Storage) -> int:
    import torch

    users = _num_users(wanted)
    if not users:
        sys.stderr.write("export: nothing was predicted, so nothing is compared; see the data of predict\n")
        return DIFFERENT
    ours, theirs = dict(_flat(wanted)), dict(_flat(found))
    if ours.keys() == theirs.keys() and all(torch.equal(_bits(ours[key]), _bits(theirs[key])) for key in ours):
        print(f"export: predictions of {users:,} users are equal")
        return 0
    worst, where = 0.0, "in their number"
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key].shape == theirs[key].shape:
            a, b = ours[key].double(), theirs[key].double()
            difference = float(torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).max())
            if not difference <= worst:
                worst, where = difference, f"by up to {difference:.3g} in {key}"
    sys.stderr.write(f"export: predictions of {users:,} users differ {where}; {output} was left as it is\n")
    return DIFFERENT


def _num_users(predictions: Sequence[Any]) -> int:
    from lightning_gr.batch import PADDING_SAMPLE_ID

    users = 0
    for prediction in predictions:
        found = dict(_flat(prediction))
        if (ids := found.get("sample_ids")) is not None:
            users += int((ids != PADDING_SAMPLE_ID).sum())
        elif (ids := found.get("user_rows")) is not None:
            users += len(ids.unique())
        else:
            users += max((len(x) for x in found.values() if x.dim()), default=0)
    return users


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, by where it is."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{key}[{i}]")


def _bits(value: Tensor) -> Tensor:
    import torch

    return value.contiguous().view(-1).view(torch.uint8) if value.numel() else value.new_zeros(0, dtype=torch.uint8)
