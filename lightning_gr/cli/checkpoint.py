"""``lightning-gr checkpoint ls|verify|compact``: which checkpoints are whole, and a chain of them as one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from lightning_gr.checkpoint.storage import Storage

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_WIDTH_OF_FILES = 10_000


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand and returns its exit code."""
    args = _parser().parse_args(argv)
    if args.command == "ls":
        return _list(args.folder)
    if args.command == "verify":
        return _verify(args.checkpoint)
    return _compact(args.checkpoint, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lightning-gr checkpoint", description="Looks at checkpoints, on a disk or behind a URL.")
    commands = parser.add_subparsers(dest="command", metavar="ls|verify|compact", required=True)
    listed = commands.add_parser("ls", help="list a folder's checkpoints, and why some are none")
    listed.add_argument("folder", metavar="FOLDER")
    verified = commands.add_parser("verify", help="read all files of one, and of those it adds to; exit code 1 if bad")
    verified.add_argument("checkpoint", metavar="CHECKPOINT")
    compacted = commands.add_parser("compact", help="write one and those it adds to as a full one")
    compacted.add_argument("checkpoint", metavar="CHECKPOINT")
    compacted.add_argument("out", metavar="OUT", help="a directory that is not there")
    return parser


# ---- ls ----------------------------------------------------------------------------------------------------------


def _list(location: str) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lightning_gr.checkpoint.storage import Storage

    folder = Storage(location)
    if not folder.is_directory():
        raise UserError(f"{folder}: no such folder; give one that has checkpoints")
    rows = [row for name in folder.names() if (row := _row(folder / name)) is not None]
    if not rows:
        raise UserError(f"{folder}: has no checkpoints; give the folder that they are in")
    table = Table(box=None)
    table.add_column("checkpoint", overflow="fold")
    for column in ("step", "epoch", "processes", "size"):
        table.add_column(column, justify="right")
    for column in ("rows", "saved at (UTC)", ""):
        table.add_column(column, overflow="fold")
    for _, cells in sorted(rows):
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    console.print(table)
    return 0


def _row(storage: Storage) -> tuple[tuple[int, str], list[str]] | None:
    """A checkpoint's line, and where it belongs; None for what none was ever meant to be."""
    from lightning_gr.checkpoint.manifest import MANIFEST_FILENAME, Manifest
    from lightning_gr.checkpoint.reader import META_FILENAME, CheckpointReader
    from lightning_gr.checkpoint.writer import SAVING_FILENAME

    if not any(storage.is_file(name) for name in (META_FILENAME, MANIFEST_FILENAME, SAVING_FILENAME)):
        return None
    try:
        manifest, state = CheckpointReader(storage).manifest, "link" if storage.is_link() else "complete"
    except (ValueError, FileNotFoundError) as error:
        state = str(error).replace(str(storage), storage.name)
        try:
            manifest = Manifest.read(storage)
        except ValueError:
            return (sys.maxsize, storage.name), [storage.name, *[""] * 6, state]
    rows = "all" if manifest.base is None else f"changed since {manifest.base.name}"
    numbers = [str(manifest.step), str(manifest.epoch), str(manifest.world_size), _size(manifest.num_bytes)]
    return (manifest.step, storage.name), [storage.name, *numbers, rows, manifest.saved_at[:19], state]


def _size(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.{1 if unit else 0}f} {_UNITS[unit]}"


# ---- verify, compact ---------------------------------------------------------------------------------------------


def _verify(location: str) -> int:
    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.checkpoint.storage import Storage

    if not Storage(location).exists():
        raise UserError(f"checkpoint {location}: no such directory; give the path of a saved checkpoint")
    try:
        reader = CheckpointReader(location)
        reader.verify()
    except ValueError as error:
        print(error)
        return 1
    files = reader.files()
    size = _size(sum(manifest.files[name].size for manifest, _, name in files))
    chain = "" if len(reader.chain) == 1 else f" of {len(reader.chain)} checkpoints that add to each other"
    print(f"{reader.storage}: OK, {len(files)} files{chain}, {size}")
    return 0


def _compact(location: str, out: str) -> int:
    from lightning_gr.checkpoint.reader import CheckpointReader
    from lightning_gr.checkpoint.storage import Storage

    target = Storage(out)
    if target.exists():
        raise UserError(f"{target}: exists; give a directory that is not there")
    reader = CheckpointReader(location)
    reader.verify()
    from lightning_gr.checkpoint.chain import compact

    compact(reader, target)
    whole = CheckpointReader(target)
    print(f"{target}: step {whole.manifest.step} of {len(reader.chain)} checkpoints, {_size(whole.manifest.num_bytes)}")
    return 0
