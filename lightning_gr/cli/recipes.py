"""``lightning-gr recipes ls|show|cp``: the shipped configurations."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lightning_gr import recipes
from lightning_gr.cli.errors import Parser, UserError


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand and returns its exit code."""
    parser = Parser(prog="lightning-gr recipes", description="Lists, shows or copies the shipped recipes.")
    commands = parser.add_subparsers(dest="command", metavar="ls|show|cp", required=True)
    listing = commands.add_parser("ls", help="list the recipes")
    listing.add_argument("--markdown", action="store_true", help="as a table with what each header expects")
    show = commands.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME")
    copy = commands.add_parser("cp", help="copy a recipe to a file of your own")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("dest", metavar="DEST", type=Path, help="a file, or a folder that exists")
    copy.add_argument("--force", action="store_true", help="overwrite DEST")
    args = parser.parse_args(argv)
    if args.command == "ls" and args.markdown:
        print(markdown_table(), end="")
    elif args.command == "ls":
        known = recipes.ls()
        width = max((len(name) for name in known), default=0)
        for name, description in known.items():
            print(f"{name:<{width}}  {description}".rstrip())
    elif args.command == "show":
        print(recipes.path(args.name).read_text(encoding="utf-8"), end="")
    else:
        print(f"wrote {_copy(args.name, args.dest, force=args.force)}")
    return 0


def markdown_table() -> str:
    """All recipes with what they train and what their headers expect, as ``docs/recipes.md`` has it."""
    from lightning_gr.recipes.expectation import header_fields

    lines = ["| recipe | trains | expected |", "|---|---|---|"]
    for name, description in recipes.ls().items():
        expected = header_fields(recipes.path(name)).get("Expected", "").partition(";")[0]
        lines.append(f"| `{name}` | {description} | {expected} |".replace("->", "to"))
    return "\n".join(lines) + "\n"


def resolve_config(value: str) -> str:
    """The file behind a value of ``--config``.

    Raises:
        UserError: neither a file nor a recipe.
    """
    file = Path(value).expanduser()
    if file.is_file():
        return str(file)
    if file.is_dir():
        raise UserError(f"--config {value}: is a folder; give a YAML file in it")
    if re.search(r"[\n{}]|: |://", value):
        return value
    if value.removesuffix(".yaml") in recipes.ls():
        return str(recipes.path(value))
    near = recipes.near_names(value.removesuffix(".yaml"), recipes.ls())
    meant = f"did you mean the recipe {' or '.join(near)}?" if near else ""
    if value.endswith((".yaml", ".yml", ".json")) or value.startswith((".", "/", "~")):
        raise UserError(f"--config {value}: no such file; {meant or 'check the path, or see lightning-gr recipes ls'}")
    raise UserError(f"--config {value}: unknown recipe; {meant or 'there are: ' + ', '.join(recipes.ls())}")


def _copy(name: str, dest: Path, *, force: bool) -> Path:
    """Copies under a temporary name first, so that DEST is whole or untouched."""
    source = recipes.path(name)
    if dest.is_dir():
        dest = dest / source.name
    if not dest.parent.is_dir():
        raise UserError(f"recipes cp: {dest.parent}: no such folder; make it first")
    if dest.exists() and not force:
        raise UserError(f"recipes cp: {dest}: exists; choose another name or add --force")
    handle, temporary = tempfile.mkstemp(dir=dest.parent, prefix=f".{dest.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
        # mkstemp makes files private; a recipe has the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, dest)
    except BaseException:
        os.unlink(temporary)
        raise
    return dest
