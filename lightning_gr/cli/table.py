"""``lightning-gr table inspect|export|delta|import``: the dynamic embedding tables in a checkpoint.

Shape suffixes: N rows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.embeddings.dynamic.keyed_rows import KeyRows
    from lightning_gr.embeddings.dynamic.table_parts import TableHeader

_FORMATS = (".parquet", ".safetensors")
_BAR = 24
_HOTTEST = 10
_WIDTH_OF_FILES = 160


class _Saved(NamedTuple):
    """A table in a checkpoint, with those that it adds to."""

    collection: str
    folders: list[Storage]
    table: str

    @property
    def full_name(self) -> str:
        return f"{self.collection}/{self.table}"


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    run(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lightning-gr table", description="The dynamic embedding tables in a checkpoint directory.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], None], what: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory, or its URL")
        command.set_defaults(run=run)
        return command

    which = "its name; COLLECTION/NAME where several collections have one of that name"
    inspect = add("inspect", _inspect, "what tables hold: rows, ages, frequencies, the hottest keys")
    inspect.add_argument("--table", metavar="NAME", help="only this one: " + which)
    inspect.add_argument("--json", action="store_true", help="as one JSON object")
    export = add("export", _export, "a table's ids and vectors to one file")
    export.add_argument("out", metavar="OUT", type=Path, help="a new file that ends in .parquet or .safetensors")
    export.add_argument("--table", metavar="NAME", required=True, help=which)
    export.add_argument("--since", metavar="STEP", type=_step, help="only rows that were used in this step or later")
    delta = add("delta", _delta, "the rows of all tables that were used since a step, one file a table")
    delta.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    delta.add_argument("--since", metavar="STEP", type=_step, required=True, help="the first step that counts")
    delta.add_argument("--format", choices=[x[1:] for x in _FORMATS], default="parquet", help="default parquet")
    imported = add("import", _import, "a copy of the checkpoint in which a table has the given vectors")
    imported.add_argument("source", metavar="IN", type=Path, nargs="?", help="a .parquet or .safetensors file")
    imported.add_argument("--table", metavar="NAME", required=True, help=which)
    imported.add_argument("--out", metavar="NEW", type=Path, required=True, help="the new checkpoint directory")
    imported.add_argument(
        "--from-static", metavar="STATIC", type=Path, help="take the vectors of a static table in this checkpoint"
    )
    imported.add_argument("--key", help="of the static table: state_dict.tables.embeddings.item.weight, say")
    imported.add_argument(
        "--ids", metavar="FILE", type=Path, help="ids of the static table's rows, in order; default 0, 1, 2, ..."
    )
    return parser


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected a number of steps")
    return int(text)


def _reader(checkpoint: str) -> CheckpointReader:
    from lightning_gr.checkpoint.reader import CheckpointReader

    return CheckpointReader(checkpoint)


def _tables(reader: CheckpointReader) -> list[_Saved]:
    """All tables in a checkpoint."""
    from lightning_gr.embeddings.dynamic.table_files import table_names

    collections = reader.collections()
    found = [_Saved(collection, x, name) for collection, x in collections.items() for name in table_names(x)]
    if not found:
        raise UserError(f"{reader.storage}: has no dynamic tables; give a checkpoint of a model that has")
    return found


def _table(reader: CheckpointReader, name: str) -> _Saved:
    known = _tables(reader)
    found = [x for x in known if name in (x.table, x.full_name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--table {name}: several are called so; choose from {', '.join(x.full_name for x in found)}")
    raise UserError(
        f"--table {name}: no such table in {reader.storage}; choose from {', '.join(sorted({x.table for x in known}))}"
    )


# ---- inspect -------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> None:
    reader = _reader(args.checkpoint)
    chosen = _tables(reader) if args.table is None else [_table(reader, args.table)]
    tables = [_facts(saved) for saved in chosen]
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, "tables": tables}))
    else:
        _show(args.checkpoint, tables)


def _facts(saved: _Saved) -> dict[str, Any]:
    from lightning_gr.embeddings.dynamic.table_files import num_waiting, read_columns, read_header

    header, num_rows = read_header(saved.folders, saved.table)
    rows = read_columns(saved.folders, saved.table, ["ids", "counts", "last_steps"])
    files = [folder / saved.table for folder in saved.folders]
    hottest = rows["counts"].argsort(descending=True, stable=True)[:_HOTTEST]
    return {
        "collection": saved.collection,
        "table": saved.table,
        "rows": num_rows,
        "width": header.dim,
        "bytes": sum(folder.size(name) for folder in files for name in folder.names()),
        "precision": header.precision,
        "optimizer": header.optimizer,
        "budget": header.budget,
        "budget_share": None if header.budget is None else num_rows / header.budget,
        "admission": header.counter or None,
        "waiting": num_waiting(saved.folders, saved.table),
        "next_step": header.next_step,
        "time": header.time,
        "processes": header.world_size,
        "steps_since_last_use": _histogram((header.next_step - 1 - rows["last_steps"]).clamp(min=0)),
        "occurrences": _histogram(rows["counts"]),
        "hottest": [
            {"id": i, "count": count, "last_step": step}
            for i, count, step in zip(
                *(rows[x][hottest].tolist() for x in ("ids", "counts", "last_steps")), strict=True
            )
        ],
    }


def _histogram(values_N: Tensor) -> list[dict[str, int]]:
    """How many rows have 0, 1, 2-3, 4-7, ... of something, up to the most that one has."""
    import torch

    bins_N = torch.bucketize(values_N, 2 ** torch.arange(63), right=True)
    counts = torch.bincount(bins_N).tolist()
    return [{"from": (1 << i) >> 1, "to": max((1 << i) - 1, 0), "rows": rows} for i, rows in enumerate(counts)]


def _show(checkpoint: str, tables: list[dict[str, Any]]) -> None:
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    steps, time = max((x["next_step"], x["time"]) for x in tables)
    title = f"{checkpoint}: after {steps:,} steps" + (f", data up to {_date(time)}" if time else "")
    table = Table()
    table.add_column("table", overflow="fold")
    for column in ("rows", "width", "MB", "precision", "optimizer", "of budget", "waiting"):
        table.add_column(column, justify="right")
    for x in tables:
        share = "no limit" if x["budget"] is None else f"{x['budget_share']:.0%} of {x['budget']:,}"
        waiting = f"{x['waiting']:,}" if x["waiting"] is not None else x["admission"] or "-"
        cells = [f"{x['rows']:,}", f"{x['width']}", f"{x['bytes'] / 1e6:,.1f}", x["precision"], x["optimizer"]]
        table.add_row(Text(f"{x['collection']}/{x['table']}"), *map(Text, (*cells, share, waiting)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    console.print(Text(title), highlight=False, soft_wrap=True)
    console.print(table, highlight=False)
    for x in tables:
        if not x["rows"]:
            continue
        console.print(Text(f"\n{x['collection']}/{x['table']}"), highlight=False)
        bars = [_bars("steps since the last use", x["steps_since_last_use"]), _bars("occurrences", x["occurrences"])]
        hottest = Table(box=None, title="hottest", title_justify="left")
        for column in ("id", "count", "last step"):
            hottest.add_column(column, justify="right")
        for key in x["hottest"]:
            hottest.add_row(str(key["id"]), f"{key['count']:,}", f"{key['last_step']:,}")
        console.print(Columns([*bars, hottest], padding=(0, 4)), highlight=False)


def _bars(title: str, histogram: list[dict[str, int]]) -> Any:
    from rich.table import Table

    table = Table(box=None, title=title, title_justify="left", show_header=False)
    most = max(x["rows"] for x in histogram)
    for x in histogram:
        label = str(x["from"]) if x["from"] == x["to"] else f"{x['from']:,}-{x['to']:,}"
        # Rounded up, so that one row can be seen.
        table.add_row(label, f"{x['rows']:,}", "█" * -(-_BAR * x["rows"] // most))
    for column in table.columns[:2]:
        column.justify = "right"
    return table


def _date(seconds: int) -> str:
    from datetime import datetime, timezone

    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"


# ---- export and delta ----------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> None:
    from lightning_gr.embeddings.dynamic.table_files import read_table

    if args.out.suffix not in _FORMATS:
        raise UserError(f"{args.out}: no such format; give a file that ends in {' or '.join(_FORMATS)}")
    saved = _table(_reader(args.checkpoint), args.table)
    with _new(args.out) as temporary:
        rows, header = read_table(saved.folders, saved.table, args.since)
        _write_rows(temporary, rows, header)
    print(f"wrote {args.out}: {len(rows.ids_N):,} rows of table {saved.table}, {header.dim} wide")


def _delta(args: argparse.Namespace) -> None:
    from lightning_gr.embeddings.dynamic.table_files import read_table

    tables = _tables(_reader(args.checkpoint))
    lines, steps = [], 0
    with _new(args.out) as temporary:
        for saved in tables:
            rows, header = read_table(saved.folders, saved.table, args.since)
            name = f"{saved.full_name}.{args.format}"
            (temporary / saved.collection).mkdir(parents=True, exist_ok=True)
            _write_rows(temporary / name, rows, header)
            lines.append(f"  {name}: {len(rows.ids_N):,} rows")
            steps = max(steps, header.next_step)
    print("\n".join([f"wrote {args.out}; the next one is --since {steps}", *lines]))


def _write_rows(path: Path, rows: KeyRows, header: TableHeader) -> None:
    metadata = {name: str(getattr(header, name)) for name in ("table", "dim", "next_step", "time")}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {"ids": rows.ids_N, "values": rows.values_ND}
        save_file(
            tensors | {x: getattr(rows.metadata, x) for x in ("counts", "last_steps", "last_times")}, path, metadata
        )
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.values_ND.reshape(-1).numpy()), header.dim)
    columns = {
        "id": rows.ids_N.numpy(),
        "vector": vectors,
        "count": rows.metadata.counts.numpy(),
        "last_step": rows.metadata.last_steps.numpy(),
        "last_time": rows.metadata.last_times.numpy(),
    }
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it where all goes well."""
    if path.exists():
        raise UserError(f"{path}: exists; give another name")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute().parent}: no such folder; make it first")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


# ---- import --------------------------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> None:
    from lightning_gr.checkpoint.chain import compact
    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.checkpoint.writer import recommit
    from lightning_gr.cli import table_vectors
    from lightning_gr.embeddings.dynamic.table_files import FOLDER, read_header, upsert_rows

    if (args.source is None) == (args.from_static is None):
        raise UserError("table import: give either a file IN or --from-static STATIC")
    if args.from_static is None and (args.key or args.ids):
        raise UserError("table import: --key and --ids are of --from-static; leave them out")
    with _new(args.out) as temporary:
        reader = _reader(args.checkpoint)
        saved = _table(reader, args.table)
        header, _ = read_header(saved.folders, saved.table)
        if args.from_static is None:
            origin, (ids_N, values_ND) = str(args.source), table_vectors.read_file(args.source)
        else:
            origin = f"--key {args.key}"
            ids_N, values_ND = table_vectors.read_static(args.from_static, args.key, args.ids)
        table_vectors.check(origin, ids_N, values_ND, header)
        try:
            if reader.storage.is_local and len(reader.chain) == 1:
                shutil.copytree(reader.storage.location, temporary)
            else:
                compact(reader, Storage(temporary))
        except OSError as error:
            raise UserError(f"{args.out}: the checkpoint could not be copied ({error}); make room") from error
        new = upsert_rows(temporary / FOLDER / saved.collection, saved.table, ids_N, values_ND)
        recommit(temporary)
    print(f"wrote {args.out}: {len(ids_N):,} rows set in table {saved.table}, {new:,} of them new")
