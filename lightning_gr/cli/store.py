"""``lightning-gr store check|info|index``: what an event store holds, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lightning_gr.cli.errors import Parser

_WRONG = 1


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 where `check` finds something."""
    parser = Parser(prog="lightning-gr store", description="Event stores, as `lightning-gr prepare` writes them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in (
        ("check", "read the whole store and say what is wrong with it, file, row and column"),
        ("info", "what the store holds"),
        ("index", "index Parquet files that another system wrote, so that they become a store"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("path", type=Path)
        if name == "check":
            command.add_argument("--most", type=int, default=20, help="problems after which to stop (default 20)")
        if name == "info":
            command.add_argument("--json", action="store_true", help="as one JSON object")
        if name == "index":
            command.add_argument(
                "--labels", nargs="*", default=[], help="list columns that tasks predict, where there is no manifest"
            )
    args = parser.parse_args(argv)
    if args.command == "check":
        return _check(args.path, args.most)
    if args.command == "index":
        return _index(args.path, args.labels)
    return _info(args.path, as_json=args.json)


def _check(path: Path, most: int) -> int:
    from lightning_gr.data.event_store import EventStore, check_store

    problems = check_store(path, most=most)
    for problem in problems:
        print(problem)
    if problems:
        more = " or more" if len(problems) == most else ""
        print(f"{path}: {len(problems)}{more} problem(s)")
        return _WRONG
    store = EventStore(path)
    print(f"{path}: sound; {store.num_users:,} users, {store.num_items:,} items, {store.num_events:,} events")
    return 0


def _index(path: Path, labels: Sequence[str]) -> int:
    from lightning_gr.data.event_store import complete_store

    complete_store(path, labels=labels)
    return _info(path, as_json=False)


def _info(path: Path, *, as_json: bool) -> int:
    from lightning_gr.data.event_store import EventStore

    store = EventStore(path)
    fields = [field.to_dict() for field in store.fields]
    what = {
        "path": str(path),
        "users": store.num_users,
        "items": store.num_items,
        "events": store.num_events,
        "longest": int(store.lengths.max(initial=0)),
        "row_groups": len(store.group_bounds) - 1,
        "times": store.has_timestamps,
        "fingerprint": store.fingerprint,
        "fields": fields,
        "summary": store.summary,
    }
    if as_json:
        print(json.dumps(what))
        return 0
    print(
        f"{path}: {store.num_users:,} users, {store.num_items:,} items, {store.num_events:,} events, the longest "
        f"history {what['longest']:,}, {'with' if store.has_timestamps else 'without'} times"
    )
    if "tasks" in store.summary:
        print(f"  tasks: {store.summary['tasks']}, whose values are called users here; for meta learning")
    for field in store.fields:
        size = f", {field.cardinality:,} values" if field.cardinality is not None else ""
        print(f"  {field.name}: {field.kind}, one each {field.per}{size}")
    return 0
