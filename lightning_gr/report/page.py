"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_gr.report.cards import by_shots, less_is_better, metric_of, names_of, sections
from lightning_gr.report.drawing import percent, short
from lightning_gr.report.run import Run

_TEMPLATE = Path(__file__).with_name("page.html")
_NOT_THERE = "-"


@dataclass
class _Fact:
    """A number at the head of the page."""

    label: str
    value: str
    detail: str = ""


def write_page(runs: Sequence[Run], file: str | Path) -> None:
    """Writes the page, whole or not at all.

    Args:
        runs: at least one, in the order of their colours.
        file: HTML, replaced if it is there.
    """
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page(runs), encoding="utf-8")
    temporary.replace(path)


def page(runs: Sequence[Run]) -> str:
    """The page's HTML.

    Args:
        runs: at least one.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    # What comes from a user is escaped because it is text; only our own drawings are markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["drawing"] = Markup
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    facts = [headline(run) for run in runs]
    return template.render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        runs=runs,
        facts=facts,
        labels=list(dict.fromkeys(fact.label for found in facts for fact in found)),
        by_label=[{fact.label: fact for fact in found} for found in facts],
        states=[_state(run) for run in runs],
        sections=sections(runs),
        numbers=_numbers(runs),
        differing=differing_settings(runs),
        environments=_environments(runs),
        not_there=_NOT_THERE,
    )


# ---- facts -------------------------------------------------------------------------------------------------------


def headline(run: Run) -> list[_Fact]:
    """What a reader looks for first."""
    facts = []
    if (best := best_of(run)) is not None:
        name, value, step = best
        facts.append(_Fact(f"best {name}", f"{value:.4g}", f"at step {step:,}"))
    elif (loss := run.series.get("train/loss")) is not None and loss.finite:
        facts.append(_Fact("last train/loss", f"{loss.finite[-1]:.4g}"))
    for name, label, text in (
        ("gr/tokens_per_second", "tokens a second", short),
        ("gr/mfu", "MFU", percent),
        ("gr/tflops_per_device", "TFLOP/s a device", short),
    ):
        if name in run.series and (values := run.series[name].finite):
            facts.append(_Fact(label, text(statistics.median(values)), "median"))
    facts.append(_Fact("steps", f"{max(run.last_step, int(run.facts.get('step') or 0)):,}"))
    seconds = [x for one in run.series.values() for x in one.seconds if math.isfinite(x)]
    if (total := run.facts.get("seconds")) is not None or seconds:
        facts.append(_Fact("time", duration(max([*seconds, float(total or 0)]))))
    if (ranks := run.facts.get("ranks")) is not None:
        facts.append(_Fact("ranks", f"{ranks}", str((run.facts.get("environment") or {}).get("device", ""))))
    return facts


def best_of(run: Run) -> tuple[str, float, int] | None:
    """Name, best value and its step of the metric that checkpoints go by, else of validation's first, at most shots."""
    monitor = run.facts.get("monitor") or {}
    validated = [
        x for x in run.series if x.startswith("val") and not x.startswith("validate/") and run.series[x].finite
    ]
    validated.sort(key=less_is_better)
    name = monitor.get("name") if monitor.get("name") in run.series else next(iter(validated), None)
    if name is not None and name != monitor.get("name"):
        name = by_shots(validated).get(name.rpartition("@")[0], [name])[-1]
    if name is None or not run.series[name].finite:
        return None
    lower = monitor["mode"] == "min" if name == monitor.get("name") and "mode" in monitor else less_is_better(name)
    pairs = [(x, step) for step, x in zip(run.series[name].steps, run.series[name].values, strict=True)]
    value, step = (min if lower else max)((x for x in pairs if math.isfinite(x[0])), key=lambda pair: pair[0])
    return name, value, step


def duration(seconds: float) -> str:
    """``48 s``, ``12 min 5 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _state(run: Run) -> str:
    state = run.facts.get("state")
    said = {
        "finished": "finished",
        "running": "still running, or ended without a word",
        "interrupted": "interrupted",
        "failed": "failed",
    }.get(str(state), "")
    reason = run.facts.get("reason")
    parts = [run.facts.get("started") and f"started {run.facts['started']}", said + (f": {reason}" if reason else "")]
    return ", ".join(str(part) for part in parts if part)


def _numbers(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """By metric, of each run the last, lowest and highest value."""
    rows = []
    for name in sorted(names_of(runs)):
        text = metric_of(name).text
        cells = []
        for run in runs:
            values = run.series[name].finite if name in run.series else []
            found = (values[-1], min(values), max(values)) if values else ()
            cells.append(tuple(text(x) for x in found) if found else ("", "", ""))
        rows.append((name, cells))
    return rows  # type: ignore[return-value]


# ---- configuration and environment -------------------------------------------------------------------------------


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, dotted, with each run's value; of runs with a configuration."""
    if len(runs) < 2:
        return []
    flat = [_flat(_parsed(run.facts.get("config"))) for run in runs]
    keys = dict.fromkeys(key for found in flat for key in found)
    rows = [(key, [found.get(key, _NOT_THERE) for found in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _parsed(config: Any) -> Any:
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    try:
        return yaml.safe_load(config) if isinstance(config, str) else None
    except yaml.YAMLError:
        return None


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(settings, dict) and settings:
        items = [(str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(x, (dict, list)) for x in settings):
        items = [(str(number), value) for number, value in enumerate(settings)]
    else:
        return {prefix: str(settings)} if prefix else {}
    found: dict[str, str] = {}
    for key, value in items:
        found |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _environments(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    found = [run.facts.get("environment") or {} for run in runs]
    keys = dict.fromkeys(key for one in found for key in one)
    return [(str(key), [str(one.get(key, _NOT_THERE)) for one in found]) for key in keys]
