"""Cards of the report: a figure, its legend and the numbers under it, for every metric that runs have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_gr.report.balance import AS_THEY_COME
from lightning_gr.report.drawing import COLOURS, DASHES, Line, bar_chart, line_chart, percent, share_chart, short
from lightning_gr.report.lengths import bucket_name
from lightning_gr.report.run import Run, Series

_MOST_POINTS, _MOST_ROWS = 400, 40
_LONG_ENOUGH_TO_SMOOTH = 60
_MOST_TABLES = 8
_MOST_CARDS = 24
_LESS_IS_BETTER = re.compile(r"(?i)(loss|error|perplexity|nll|rmse|mae|mse)|(^|[/_])ne($|[/_@])")


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Args:
        title: in words; empty takes the name.
        text: writes a value.
        low: where the axis begins at the latest; None lets it begin at the lowest value.
    """

    title: str = ""
    text: Callable[[float], str] = short
    low: float | None = None


METRICS = {
    "train/loss": Metric("Training loss"),
    "gr/mfu": Metric("Model FLOPs utilisation (MFU)", percent, low=0.0),
    "gr/hfu": Metric("Hardware FLOPs utilisation (HFU)", percent, low=0.0),
    "gr/tflops_per_device": Metric("TFLOP/s a device", low=0.0),
    "gr/tokens_per_second": Metric("Tokens a second, all ranks", low=0.0),
    "gr/samples_per_second": Metric("Samples a second, all ranks", low=0.0),
    "gr/peak_memory_gib": Metric("Peak memory of the fullest rank, GiB", low=0.0),
    "gr/flops_total": Metric("Model FLOPs so far", low=0.0),
    "gr/tokens_total": Metric("Tokens so far", low=0.0),
    "gr/attention_share": Metric("Attention's share of the model's FLOPs", percent, low=0.0),
    "gr/padding_share": Metric("Padding's share of tokens", percent, low=0.0),
    "gr/padding_avoided": Metric("Padding that jagged batches avoid", percent, low=0.0),
    "gr/imbalance_tokens": Metric("Imbalance of tokens, max / mean", low=1.0),
    "gr/imbalance_flops": Metric("Imbalance of FLOPs, max / mean", low=1.0),
    "gr/wait_share": Metric("Waiting for the slowest rank, mean", percent, low=0.0),
    "gr/wait_share_max": Metric("Waiting for the slowest rank, most", percent, low=0.0),
    "gr/slowest_rank": Metric("The slowest rank", low=0.0),
    "gr/exposed_exchange_share": Metric("Exchange that nothing hides", percent, low=0.0),
    "gr/data_wait_share": Metric("Waiting for data", percent, low=0.0),
}
"""Of names with a fixed meaning; see docs/observability.md."""

_UTILISATION = {"MFU": "gr/mfu", "HFU": "gr/hfu"}
_IMBALANCE = {"FLOPs": "gr/imbalance_flops", "tokens": "gr/imbalance_tokens"}
_SPEED = ("gr/tokens_per_second", "gr/samples_per_second", "gr/tflops_per_device", "gr/peak_memory_gib")
_DATA = ("gr/padding_share", "gr/padding_avoided", "gr/attention_share")
_SHARES = {
    "Waiting for the slowest rank": "gr/wait_share",
    "Exchange that nothing hides": "gr/exposed_exchange_share",
    "Waiting for data": "gr/data_wait_share",
}
_TABLE = "gr/table/"
_FIRST_OF_TABLES = ("rows", "load_factor", "budget_share", "inserted", "evicted", "expired", "rejected", "failed")


@dataclass
class Card:
    """A figure with what belongs to it.

    Args:
        title: what it shows.
        svg: the drawing; empty where the numbers say it all.
        header: of the numbers under it.
        rows: the numbers.
        name: the metric's name, where there is one.
        legend: label, number of the colour and dash pattern of each line or kind of bar.
        note: what to know of it.
    """

    title: str
    svg: str
    header: list[str]
    rows: list[list[str]]
    name: str = ""
    legend: list[tuple[str, int, str]] = field(default_factory=list)
    note: str = ""


@dataclass
class Section:
    """Cards under a heading; `note` says what is not there, and why."""

    title: str
    cards: list[Card]
    note: str = ""


def sections(runs: Sequence[Run]) -> list[Section]:
    """Everything that can be drawn of one or several runs.

    Args:
        runs: in the order of their colours.
    """
    names = iter(f"f{number}" for number in range(1 << 30))
    return [
        Section(title, cards[:_MOST_CARDS], "" if len(cards) <= _MOST_CARDS else _and_more(len(cards) - _MOST_CARDS))
        if cards
        else Section(title, [], missing)
        for title, cards, missing in (
            ("Learning", list(_learning(runs, names)), "No loss and no metric was logged."),
            ("Speed", list(_speed(runs, names)), "Not measured: add the callback MFUMonitor."),
            ("Where the time goes", list(_time(runs, names)), "Not measured: add the callback BalanceMonitor."),
            ("Data", list(_data(runs, names)), "Not known of these runs."),
            ("Embedding tables", list(_tables(runs, names)), "Nothing kept: the callback TableMonitor tells more."),
        )
    ]


def _and_more(number: int) -> str:
    return f"{number} more are only in the table of all numbers."


def metric_of(name: str) -> Metric:
    """How a metric is shown; one of no fixed meaning by its own name."""
    if name.startswith(_TABLE):
        return Metric(text=percent if re.search(r"(share|rate|factor)$", name) else short, low=0.0)
    return METRICS.get(name, Metric())


def names_of(runs: Iterable[Run]) -> list[str]:
    """Metrics of all runs, without those that Lightning writes twice."""
    names = list(dict.fromkeys(name for run in runs for name, one in run.series.items() if one.finite))
    return [name for name in names if not (name.endswith("_step") and name.removesuffix("_step") in names)]


def by_shots(names: Iterable[str]) -> dict[str, list[str]]:
    """Metrics of meta learning by what stands before ``@``, fewest shots first; no cut-off, as of HR@10, is 0."""
    families: dict[str, list[str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.+)@\d+", name):
            families.setdefault(match[1], []).append(name)
    found = {x: sorted(own, key=lambda one: int(one.rpartition("@")[2])) for x, own in families.items()}
    return {x: own for x, own in found.items() if own[0] == f"{x}@0" and len(own) > 1}


def less_is_better(name: str) -> bool:
    """By a metric's name: of losses and errors."""
    return _LESS_IS_BETTER.search(name) is not None


# ---- sections ----------------------------------------------------------------------------------------------------


def _learning(runs: Sequence[Run], names: Iterator[str]) -> Iterator[Card]:
    ours = [name for name in names_of(runs) if not name.startswith("gr/")]
    ours.sort(key=lambda name: (not re.fullmatch(r"(train[/_])?loss", name), not name.startswith("val")))
    once = [name for name in ours if _measured_once(runs, name)]
    ours = [name for name in ours if name not in once]
    shots = by_shots(ours)
    for name in ours:
        family = name.rpartition("@")[0]
        if name not in shots.get(family, ()):
            yield _curve(runs, name, next(names))
        elif name == shots[family][0]:
            yield from _together(runs, {f"@{x.rpartition('@')[2]}": x for x in shots[family]}, family, names)
    validated = next(
        (x for x in ours if x.startswith("val") and not x.startswith("validate/") and not less_is_better(x)), None
    )
    timed = [x for x in runs if validated in x.series and any(map(math.isfinite, x.series[validated].seconds))]
    if validated is not None and len(timed) > 1:
        yield _curve(runs, validated, next(names), over_time=True)
    if once:
        yield _single_values(runs, once)


def _measured_once(runs: Sequence[Run], name: str) -> bool:
    return all(len(run.series[name].values) < 2 for run in runs if name in run.series)


def _speed(runs: Sequence[Run], names: Iterator[str]) -> Iterator[Card]:
    recomputes = any(
        x.series["gr/hfu"].values != x.series["gr/mfu"].values for x in runs if {"gr/hfu", "gr/mfu"} <= x.series.keys()
    )
    wanted = _UTILISATION if recomputes else {"MFU": "gr/mfu"}  # without recomputation the two are the same
    yield from _together(runs, wanted, "Utilisation of the device's peak rate", names)
    yield from _curves(runs, _SPEED, names)


def _curves(runs: Sequence[Run], wanted: Iterable[str], names: Iterator[str]) -> Iterator[Card]:
    found = names_of(runs)
    return (_curve(runs, name, next(names)) for name in wanted if name in found)


def _together(runs: Sequence[Run], wanted: dict[str, str], title: str, names: Iterator[str]) -> Iterator[Card]:
    """One card for metrics of one run that belong together; of several runs a card a metric."""
    found = names_of(runs)
    labels = [label for label, name in wanted.items() if name in found]
    if len(runs) > 1 or len(labels) == 1:
        yield from _curves(runs, wanted.values(), names)
    elif labels:
        series = [runs[0].series[wanted[label]] for label in labels]
        card = _lines(series, labels, title=title, metric=metric_of(wanted[labels[0]]), drawing=next(names))
        card.name = ", ".join(wanted[label] for label in labels)
        yield card


def _time(runs: Sequence[Run], names: Iterator[str]) -> Iterator[Card]:
    found = names_of(runs)
    if any(name in found for name in _SHARES.values()):
        yield _shares(runs, next(names))
    yield from _together(runs, _SHARES, "Time that is not computing", names)
    yield from _together(runs, _IMBALANCE, "Imbalance of the ranks' work, max / mean", names)
    yield from _curves(runs, ["gr/wait_share_max"], names)


def _data(runs: Sequence[Run], names: Iterator[str]) -> Iterator[Card]:
    if any(sum(x.lengths) for x in runs):
        yield _lengths(runs, next(names))
    for number, run in enumerate(runs):
        rows = (run.facts.get("balance") or {}).get("dealt") or {}
        if len(rows) > 1 and len(rows.get(AS_THEY_COME, ())) > 1:
            title = "Work of the ranks, before and after balancing"
            yield _balance(run, title if len(runs) == 1 else f"{title}: {_labels(runs)[number]}", next(names))
    yield from _curves(runs, _DATA, names)


def _tables(runs: Sequence[Run], names: Iterator[str]) -> Iterator[Card]:
    found = [name for name in names_of(runs) if name.startswith(_TABLE)]
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(name.rpartition("/")[2], []).append(name)
    first = [x for x in _FIRST_OF_TABLES if x in kinds]
    for kind in [*first, *(x for x in kinds if x not in first)]:
        if len(runs) > 1:
            for name in kinds[kind]:
                yield _curve(runs, name, next(names))
            continue
        shown, left_out = kinds[kind][:_MOST_TABLES], kinds[kind][_MOST_TABLES:]
        series = [runs[0].series[name] for name in shown]
        labels = [name.removeprefix(_TABLE).rpartition("/")[0] for name in shown]
        card = _lines(series, labels, title=kind.replace("_", " "), metric=metric_of(shown[0]), drawing=next(names))
        card.name = f"{_TABLE}.../{kind}"
        card.note = _and_more(len(left_out)) if left_out else card.note
        yield card
    histograms = [run.facts.get("histograms") or {} for run in runs]
    for name in dict.fromkeys(name for found in histograms for name in found):
        if name.startswith(_TABLE) and name.endswith("/age") and any(any(x.get(name) or ()) for x in histograms):
            yield _ages(runs, name, next(names))


# ---- cards -------------------------------------------------------------------------------------------------------


def _labels(runs: Sequence[Run]) -> list[str]:
    return [run.name for run in runs]


def _curve(runs: Sequence[Run], name: str, drawing: str, *, over_time: bool = False) -> Card:
    metric = metric_of(name)
    having = [(number, run) for number, run in enumerate(runs) if name in run.series and run.series[name].finite]
    title = metric.title or name
    card = _lines(
        [run.series[name] for _, run in having],
        _labels([run for _, run in having]) if len(runs) > 1 else [],
        title=f"{title} over time" if over_time else title,
        metric=metric,
        drawing=drawing,
        colours=[number for number, _ in having],
        smooth="loss" in name and name.startswith(("train", "loss")),
        over_time=over_time,
    )
    card.name = name if name != card.title else ""
    return card


def _single_values(runs: Sequence[Run], wanted: Sequence[str]) -> Card:
    """Metrics without a curve, as those of a test are: a table."""
    rows = [
        [name, *(_text(metric_of(name), run.series[name].values[0] if name in run.series else None) for run in runs)]
        for name in wanted
    ]
    return Card("Measured once", "", ["metric", *(["value"] if len(runs) == 1 else _labels(runs))], rows)


def _lines(
    series: Sequence[Series],
    labels: Sequence[str],
    *,
    title: str,
    metric: Metric,
    drawing: str,
    colours: Sequence[int] | None = None,
    smooth: bool = False,
    over_time: bool = False,
) -> Card:
    lines, notes = [], []
    kinds = list(range(len(series))) if colours is None else list(colours)
    for one, kind in zip(series, kinds, strict=True):
        x = [second / 60 for second in one.seconds] if over_time else [float(step) for step in one.steps]
        x, y = _thinned(x, one.values)
        # Where colours come round again, a dash tells lines apart.
        line = Line(x, y, colour=kind, dash=kind // COLOURS + kind % len(DASHES) if len(series) > 1 else 0)
        if smooth and len(one.finite) >= _LONG_ENOUGH_TO_SMOOTH:
            lines.append(Line(x, y, colour=kind, faint=True))
            line.y = _running_mean(y)
            notes = ["Bold: running mean over a twentieth of the run."]
        lines.append(line)
        if len(one.finite) < len(one.values):
            notes.append(f"{len(one.values) - len(one.finite)} values are not finite.")
    x_label = "minutes of training" if over_time else "step"
    svg = line_chart(lines, name=drawing, title=title, y_text=metric.text, x_label=x_label, low=metric.low)
    bold = [x for x in lines if not x.faint]
    legend = [(label, x.colour % COLOURS, DASHES[x.dash % len(DASHES)]) for label, x in zip(labels, bold, strict=False)]
    steps = sorted({step for one in series for step in one.steps})
    steps, thinned = _picked(steps)
    by_step = [dict(zip(one.steps, one.values, strict=True)) for one in series]
    rows = [[f"{step:,}", *(_text(metric, values.get(step)) for values in by_step)] for step in steps]
    header = ["some of the steps" if thinned else "step", *(labels or [title])]
    return Card(title, svg, header, rows, legend=legend, note=" ".join(dict.fromkeys(notes)))


def _shares(runs: Sequence[Run], drawing: str) -> Card:
    title = "Time of training, mean over the run"
    names = ["Computing, and what is not measured", *_SHARES]
    having = [run for run in runs if any(name in run.series for name in _SHARES.values())]
    rows, notes = [], []
    for run in having:
        parts = [
            float(np.mean(run.series[name].finite)) if name in run.series and run.series[name].finite else 0.0
            for name in _SHARES.values()
        ]
        if sum(parts) > 1:
            notes = ["Shares that overlap are drawn smaller, to fit."]
        rows.append([max(1 - sum(parts), 0.0), *parts])
    drawn = [[part / sum(row) for part in row] for row in rows]
    labels = [] if len(runs) == 1 else _labels(having)
    numbers = [""] if not labels else [str(number + 1) for number in range(len(having))]
    svg = share_chart(drawn, numbers, name=drawing, title=title)
    notes += [f"{number}: {label}." for number, label in zip(numbers, labels, strict=False)]
    table = [[name, *(percent(row[i]) for row in rows)] for i, name in enumerate(names)]
    legend = [(name, i, "bar") for i, name in enumerate(names)]
    return Card(title, svg, ["", *(labels or ["share"])], table, legend=legend, note=" ".join(notes))


def _lengths(runs: Sequence[Run], drawing: str) -> Card:
    title = "Lengths of training sequences"
    having = [run for run in runs if sum(run.lengths)]
    used = [i for i in range(len(having[0].lengths)) if any(run.lengths[i] for run in having)]
    buckets = range(used[0], used[-1] + 1)
    shares = [[run.lengths[i] / sum(run.lengths) for i in buckets] for run in having]
    labels = [bucket_name(i) for i in buckets]
    svg = bar_chart(shares, labels, name=drawing, title=title, y_text=percent, x_label="tokens")
    runs_labels = [] if len(runs) == 1 else _labels(having)
    rows = [[label, *(f"{run.lengths[i]:,}" for run in having)] for i, label in zip(buckets, labels, strict=True)]
    legend = [(label, i % COLOURS, "bar") for i, label in enumerate(runs_labels)]
    note = "Share of sequences, of all epochs; buckets grow with the length."
    return Card(title, svg, ["tokens", *(runs_labels or ["sequences"])], rows, legend=legend, note=note)


def _ages(runs: Sequence[Run], name: str, drawing: str) -> Card:
    title = f"Age of rows of {name.removeprefix(_TABLE).removesuffix('/age')} at the end"
    counts = [(run.facts.get("histograms") or {}).get(name) or [] for run in runs]
    buckets = max(map(len, counts))
    labels = ["0", "1", *(f"{1 << i}-{(2 << i) - 1}" for i in range(1, buckets))][:buckets]
    heights = [[*map(float, found), *[0.0] * (buckets - len(found))] for found in counts]
    svg = bar_chart(heights, labels, name=drawing, title=title, y_text=short, x_label="steps since the last use")
    shown = _labels(runs) if len(runs) > 1 else []
    rows = [[label, *(f"{found[i]:,.0f}" for found in heights)] for i, label in enumerate(labels)]
    legend = [(label, i % COLOURS, "bar") for i, label in enumerate(shown)]
    return Card(title, svg, ["steps", *(shown or ["rows"])], rows, name=name, legend=legend)


def _balance(run: Run, title: str, drawing: str) -> Card:
    found = run.facts["balance"]
    method = found["partitioner"]
    ways = [AS_THEY_COME] if method == AS_THEY_COME else [AS_THEY_COME, method]
    labels = ["as they come", f"balanced ({method})"][: len(ways)]
    ranks = range(len(found["dealt"][AS_THEY_COME]))
    waits = [[float(row["waits_mean"]) for row in found["dealt"][way]] for way in ways]
    names = [str(rank) for rank in ranks]
    svg = bar_chart(waits, names, name=drawing, title=title, y_text=percent, x_label="rank")
    rows = [
        [
            f"{rank}, {label}",
            *(f"{found['dealt'][way][rank][f'tokens_{kind}']:,.0f}" for kind in ("mean", "most")),
            *(short(found["dealt"][way][rank][f"flops_{kind}"]) for kind in ("mean", "most")),
            *(percent(found["dealt"][way][rank][f"waits_{kind}"]) for kind in ("mean", "most")),
        ]
        for way, label in zip(ways, labels, strict=True)
        for rank in ranks
    ]
    header = ["rank", "tokens, mean", "most", "work, mean", "most", "waits, mean", "worst"]
    note = (
        "Share of a step's work that a rank has less than the rank with most, for which it waits; mean of "
        f"{found['steps']:,} steps of this run's plan."
    )
    return Card(title, svg, header, rows, legend=[(x, i, "bar") for i, x in enumerate(labels)], note=note)


# ---- numbers -----------------------------------------------------------------------------------------------------


def _text(metric: Metric, value: float | None) -> str:
    if value is None:
        return ""
    return metric.text(value) if math.isfinite(value) else "not finite"


def _picked(steps: list[int]) -> tuple[list[int], bool]:
    if len(steps) <= _MOST_ROWS:
        return steps, False
    return [steps[i] for i in np.linspace(0, len(steps) - 1, _MOST_ROWS).round().astype(int)], True


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of equal runs of points, so that a long run is no larger a drawing than a short one."""
    if len(x) <= _MOST_POINTS:
        return list(x), list(y)
    bounds = np.linspace(0, len(x), _MOST_POINTS + 1).astype(int)
    parts = [(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return [float(np.mean(x[a:b])) for a, b in parts], [_mean_of_finite(y[a:b]) for a, b in parts]


def _running_mean(y: Sequence[float]) -> list[float]:
    half = max(len(y) // 40, 1)
    return [_mean_of_finite(y[max(i - half, 0) : i + half + 1]) for i in range(len(y))]


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [x for x in values if math.isfinite(x)]
    return float(np.mean(finite)) if finite else math.nan
