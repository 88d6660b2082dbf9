"""Makes docs/performance.md, its picture and README's table of speeds from the rows in `benchmarks/results`.

python benchmarks/render.py [--check]

`--check` writes nothing and exits with 1 where a page is not what the rows give.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import GOALS, Goal

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "performance.md.jinja"
WORDS = ("date", "commit", "machine", "versions")  # a commit such as 12e5 is no number
BEGIN, END = "<!-- speeds: made by make bench -->", "<!-- end of speeds -->"
IN_README = (
    ("end_to_end", "speedup_vs_plain_loop"),
    ("peers", "speedup_vs_fastest_peer"),
    ("end_to_end", "speedup_systems"),
    ("attention", "speedup_vs_reference"),
    ("softmax", "softmax_speedup"),
    ("predict", "speedup_one_pass"),
    ("aggregation", "share_of_flops"),
    ("hash_table", "speedup_vs_mch"),
    ("lookup", "speedup_vs_torchrec"),
    ("balance", "imbalance_balanced_1024"),
    ("overlap", "exposed_share_semi_async"),
    ("meta", "speedup_meta"),
    ("mfu", "mfu"),
    ("checkpoint", "save_ratio"),
    ("checkpoint", "load_ratio"),
    ("checkpoint", "blocking_ratio"),
)


# ---- rows ------------------------------------------------------------------------------------------------------------


def number(text: str) -> int | float | str:
    """A cell of a CSV file as what it stands for."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def rows_of(results: Path, name: str) -> list[dict[str, Any]]:
    """All rows of a result, oldest first, without the cells that are empty; none where there is no file."""
    path = results / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: cell if key in WORDS else number(cell) for key, cell in row.items() if cell != ""} for row in rows]


def latest(results: Path, name: str, *, having: str | None = None, **where: Any) -> dict[str, Any]:
    """The newest row of a result that has this column and these values.

    Raises:
        LookupError: No row of the result has them.
    """
    for row in reversed(rows_of(results, name)):
        if (having is None or having in row) and all(row.get(key) == value for key, value in where.items()):
            return row
    raise LookupError(f"{name}.csv in {results} has no row with {having or where or 'anything'}; run its benchmark")


def has(results: Path, name: str, **where: Any) -> bool:
    """Whether a result has a row with these values; a part of the page may be left out until then."""
    try:
        return bool(latest(results, name, **where))
    except LookupError:
        return False


# ---- how figures are written -----------------------------------------------------------------------------------------


def written(value: float, digits: int) -> str:
    """With so many digits, thousands apart, without the zero before the point: 1,024, 3.3, .41."""
    text = f"{float(value):,.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def short(value: float) -> str:
    """With about three figures."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f} M"
    if abs(value) >= 100 or value == int(value):
        return written(value, 0)
    return written(value, 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 4)


def bare(value: float) -> str:
    """A goal as it was set: 1.5, .06, 8 M."""
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,g}".removeprefix("0") or "0"


FILTERS = {
    "n": written,
    "mb": lambda value, digits=3: written(value / 1e6, digits),
    "millions": lambda value: f"{value / 1e6:.2f} M" if value < 1e6 else f"{value / 1e6:.1f} M",
    "percent": lambda value, digits=0: f"{written(value * 100, digits)} %",
    "times": lambda value, factor: value * factor,
    "pm": lambda row, name, digits=2: f"{written(row[name], digits)} ± {written(row[f'{name}_half_width'], digits)}",
}


# ---- tables ----------------------------------------------------------------------------------------------------------


def measured(results: Path, goal: Goal) -> tuple[dict[str, Any], float] | None:
    """The newest row that has a goal's figure, and the figure."""
    for row in reversed(rows_of(results, goal.result)):
        if goal.column in row and goal.where.items() <= row.items():
            return row, float(row[goal.column])
    return None


def goals_table(results: Path, goals: tuple[Goal, ...] = GOALS, *, trace: bool = True) -> str:
    """Every goal beside what the newest row says; with `trace`, the file, column and commit it is from."""
    lines = ["| figure | measured | goal |" + (" row |" if trace else ""), "|---|---|---|" + ("---|" if trace else "")]
    for goal in goals:
        found = measured(results, goal)
        if found is None:
            continue
        row, value = found
        mark = "" if goal.reached(value) else ", missed"
        bound = f"{bare(goal.goal)}{' at most' if goal.at_most and goal.goal else ''}"
        line = f"| {goal.subject} | **{short(value)}**{mark} | {bound} |"
        if trace:
            line += f" `{goal.result}.csv`, `{goal.column}`, {row['commit']} |"
        lines.append(line)
    return "\n".join(lines)


def rows_table(results: Path) -> str:
    """The newest row of each result: when, at which commit and on what it was taken."""
    lines = ["| results | date | commit | machine |", "|---|---|---|---|"]
    for path in sorted(results.glob("*.csv")):
        row = rows_of(results, path.stem)[-1]
        lines.append(f"| `{path.name}` | {row['date']} | {row['commit']} | {row['machine']} |")
    return "\n".join(lines)


def performance_page(results: Path) -> str:
    """The text of docs/performance.md."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters.update(FILTERS)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(
        row=partial(latest, results),
        has=partial(has, results),
        rows_table=partial(rows_table, results),
        goals_table=partial(goals_table, results),
    ).lstrip()


def readme_page(results: Path, readme: str) -> str:
    """README's text with the table of speeds between its two marks made anew.

    Raises:
        ValueError: The marks are not there once each, in their order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README.md must have {BEGIN} and, after it, {END}, once each")
    chosen = tuple(goal for goal in GOALS if (goal.result, goal.column) in IN_README)
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{goals_table(results, chosen, trace=False)}\n\n{END}{rest.split(END)[1]}"


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw_goals(results: Path, path: Path) -> None:
    """How many times each goal was reached, as bars from 1 on a logarithmic axis; written as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = [(goal, measured(results, goal)) for goal in GOALS]
    shares = [(goal.subject, share) for goal, of in found if of and (share := goal.share(of[1]))]
    shares.sort(key=lambda each: each[1])
    with plt.rc_context({"svg.hashsalt": "lightning-gr", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(9, 0.24 * len(shares) + 0.9), layout="constrained")
        for place, (_, share) in enumerate(shares):
            met = share >= 1
            axes.barh(place, share - 1, left=1, color="#0072b2" if met else "#d55e00", height=0.7)
            axes.annotate(
                f"{share:.2f}" if share < 10 else f"{share:.0f}",
                (share, place),
                xytext=(3 if met else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if met else "right",
            )
        axes.set_xscale("log")
        least, most = min(share for _, share in shares), max(share for _, share in shares)
        axes.set_xlim(min(0.5, least * 0.7), most * 1.6)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(shares)), [subject for subject, _ in shares])
        axes.set_ylim(-0.6, len(shares) - 0.4)
        axes.set_xlabel("times the goal was reached (blue: met, orange: missed)")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is not current")
    args = parser.parse_args(argv)
    readme = ROOT / "README.md"
    pages = {
        ROOT / "docs" / "performance.md": performance_page(RESULTS),
        readme: readme_page(RESULTS, readme.read_text()),
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if args.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the rows give: python benchmarks/render.py", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path])
    draw_goals(RESULTS, ROOT / "docs" / "images" / "goals.svg")
    print(f"written: {', '.join([*(path.name for path in stale), 'docs/images/goals.svg'])}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
