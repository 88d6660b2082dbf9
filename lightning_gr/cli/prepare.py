"""``lightning-gr prepare``: from an event log, in the form its owner publishes, to an event store."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

from lightning_gr.cli.errors import UserError

if TYPE_CHECKING:
    from lightning_gr.data.event_store import Field

_POSITIONAL = ("path", "output")
_OF_EXPOSURES = ("mtgr/exposures", "mtgr/tiny")
"""Recipes of rankings, those that need most of a store first."""
_OF_TASKS = ("gmeta/kuairand-1k", "gmeta/movielens", "gmeta/tiny")
"""The same of meta learning."""


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    from rich.console import Console

    from lightning_gr.data.event_store.writer import refuse_to_replace
    from lightning_gr.data.formats import open_log, with_history, with_tasks
    from lightning_gr.data.prepare import prepare

    arguments = _parse(_named(list(argv)))
    for name in _POSITIONAL:
        if arguments[name] is None:
            raise UserError(f"prepare: {name} is missing; lightning-gr prepare PATH OUTPUT")
    output = Path(arguments["output"])
    refuse_to_replace(output, overwrite=arguments["overwrite"])
    try:
        log = open_log(arguments["path"], arguments["form"], columns=arguments["columns"], **arguments["options"])
    except TypeError as error:
        raise UserError(f"prepare: options={arguments['options']}: {_unknown_option(error)}") from error
    if arguments["history"] is not None:
        log = with_history(log, arguments["history"])
    if arguments["tasks"] is not None:
        log = with_tasks(log, arguments["tasks"])
    with _Bar() as progress:
        store = prepare(
            log, output, settings=arguments["settings"], overwrite=arguments["overwrite"], progress=progress
        )
    _show(store.path, store.summary, store.num_items)
    said = f"{_next_step(store.fields, tasks='tasks' in store.summary)} --data.init_args.path {store.path}"
    Console().print(said, highlight=False, markup=False, soft_wrap=True)
    return 0


def _named(words: list[str]) -> list[str]:
    """Gives the leading words without a flag their names: a configuration file may hold them too."""
    named = []
    for name in _POSITIONAL:
        if words and not words[0].startswith("-"):
            named.append(f"--{name}={words.pop(0)}")
    return named + words


def _parse(words: list[str]) -> dict[str, Any]:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from lightning_gr.cli.parse_errors import boil
    from lightning_gr.data.formats import FORMS, Columns
    from lightning_gr.data.prepare import PrepareSettings

    parser = ArgumentParser(
        prog="lightning-gr prepare",
        usage="lightning-gr prepare PATH OUTPUT [--history PATH] [--tasks COLUMN] [--form FORM] "
        "[--columns.user_id NAME ...] [--config FILE]",
        description="Writes an event store from a log. PATH is a file or a publisher's folder, OUTPUT the new folder.",
        exit_on_error=False,
    )
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a YAML file with the settings below")
    parser.add_argument("--path", type=str | None, default=None, help="the log: a file or a folder")
    parser.add_argument("--output", type=str | None, default=None, help="where the store goes")
    parser.add_argument(
        "--history",
        type=str | None,
        default=None,
        help="a second table of user, item and time, whose events are history alone; PATH then holds exposures",
    )
    parser.add_argument(
        "--tasks",
        type=str | None,
        default=None,
        help="for meta learning: the column whose values records are grouped by, user_id, item_id or another one",
    )
    parser.add_argument("--form", type=str, default="auto", help=f"auto, or one of {', '.join(FORMS)}")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace a store that is there already")
    parser.add_argument(
        "--options", type=dict[str, Any], default={}, help="of the form, as filter: turbogr of kuairand"
    )
    parser.add_class_arguments(Columns, "columns", help="what the columns of a table mean")
    parser.add_class_arguments(PrepareSettings, as_group=True)
    try:
        found = parser.parse_args(words)
        settings = {name: found.pop(name) for name in PrepareSettings.__dataclass_fields__}
        columns = found.columns.as_dict()
    except argparse.ArgumentError as error:
        raise UserError(f"prepare: {boil(str(error))}") from error
    return {
        "path": found.path,
        "output": found.output,
        "history": found.history,
        "tasks": found.tasks,
        "form": found.form,
        "overwrite": found.overwrite,
        "options": dict(found.options),
        "columns": Columns(**columns),
        "settings": PrepareSettings(**settings),
    }


def _unknown_option(error: TypeError) -> str:
    return str(error).rpartition("() ")[2] + "; see the form's options in docs/data.md"


class _Bar:
    """A progress bar with the time left; silent where nobody watches."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._shown = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not self._shown,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self._update

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _update(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total)
        self._bar.update(self._tasks[stage], completed=done, total=total)


def _show(path: Path, summary: dict[str, Any], num_items: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{path} ({summary['form']})", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def row(what: str, value: Any) -> None:
        table.add_row(what, f"{value:,}" if isinstance(value, int | float) else str(value))

    row("rows read", summary["rows_read"])
    if "history_rows_read" in summary:
        row("of them history", summary["history_rows_read"])
    if summary["blank_rows"]:
        row("blank rows, left out", summary["blank_rows"])
    for reason, count in summary["dropped"].items():
        row(f"dropped, {reason}", count)
    row("events", summary["events_kept"])
    if "history_events_kept" in summary:
        row("of them history", summary["history_events_kept"])
    who = f"tasks ({summary['tasks']})" if "tasks" in summary else "users"
    row(who, summary["users"])
    row("items", num_items)
    row("events a task, mean" if "tasks" in summary else "events a user, mean", summary["mean_length"])
    row("median, 99 %, longest", f"{summary['median_length']:,}, {summary['p99_length']:,}, {summary['longest']:,}")
    if summary["first_time"] is not None:
        row("from", _date(summary["first_time"]))
        row("to", _date(summary["last_time"]))
    for what, name in (
        ("duplicate events", "duplicates"),
        ("events out of order, sorted", "out_of_order"),
        ("tasks with one event" if "tasks" in summary else "users with one event", "users_with_one_event"),
    ):
        if summary[name]:
            row(what, summary[name])
    if "left_out_features" in summary:
        row("features of users, lists, left out", ", ".join(summary["left_out_features"]))
    for name, count in summary["missing"].items():
        row(f"events without {name}", count)
    if len(summary["time_units"]) > 1:
        row("times of mixed units", ", ".join(f"{n:,} in {unit}" for unit, n in summary["time_units"].items()))
    Console().print(table, highlight=False)


def _next_step(fields: Sequence[Field], *, tasks: bool) -> str:
    """Training on a store of these fields: a recipe that needs no others, else next items."""
    from lightning_gr import recipes
    from lightning_gr.data.event_store.fields import EXPOSED

    labels, names = {field.name for field in fields if field.kind == "label"}, {field.name for field in fields}
    known = _OF_TASKS if tasks else _OF_EXPOSURES
    for name in known:
        data = yaml.safe_load(recipes.path(name).read_text(encoding="utf-8"))["data"]["init_args"]
        wanted = {task["field"] for task in data["tasks"].values()}
        asked = {x if isinstance(x, str) else x["name"] for x in data.get("features") or []}
        if wanted <= labels and asked <= names:
            return f"lightning-gr fit --config {name}"
    if EXPOSED in names or (tasks and labels):
        # No shipped recipe has its labels, and training on next items would take what was shown for what was wanted.
        cp = f"lightning-gr recipes cp {known[-1]} mine.yaml"
        return f"{cp}, name its tasks, then lightning-gr fit --config mine.yaml"
    return "lightning-gr fit --config hstu/tiny"


def _date(seconds: int) -> str:
    from datetime import datetime, timezone

    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"
