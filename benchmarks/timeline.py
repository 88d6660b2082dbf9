"""Draws a few steps of a pipeline's event log: a lane for each stage, a colour for each batch, with its number.

python benchmarks/timeline.py EVENTS.csv PICTURE.svg [--steps 5]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

LANES = ("fetch", "exchange", "wait", "embed", "train", "embed_backward")
COLOURS = ("#8fbbe8", "#f5c27f", "#a5d6a0", "#e8a3a3", "#c6b1e1", "#d9c8b0")


def draw(events: Path, path: Path, *, steps: int = 5) -> None:
    """Draws some steps of an event log: a lane for each stage, a colour for each batch, with its number.

    Args:
        events: as `StageLog.write_csv` writes it.
        path: of the picture; its ending is the format.
        steps: to show.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    spans: dict[tuple[str, int], tuple[float, float]] = {}
    with events.open(newline="") as file:
        for row in csv.DictReader(file):
            key, start, end = (row["stage"], int(row["batch"])), float(row["start"]), float(row["end"])
            known = spans.get(key, (start, end))
            spans[key] = min(known[0], start), max(known[1], end)
    trained = sorted(batch for stage, batch in spans if stage == "train")
    first = trained[len(trained) * 2 // 3] - steps // 2
    begin, end = spans["train", first][0], spans["train", first + steps - 1][1]
    figure, axes = pyplot.subplots(figsize=(1000 / 96, 300 / 96), dpi=96, layout="constrained")
    for (stage, batch), (start, stop) in sorted(spans.items(), key=lambda x: x[1]):
        if stage not in LANES or stop < begin or start > end - 0.02 * (end - begin):
            continue
        lane, left, width = LANES.index(stage), (start - begin) * 1e3, (stop - start) * 1e3
        shown = max(width, 3.0)
        colour = COLOURS[batch % len(COLOURS)]
        axes.barh(lane, shown, left=left, height=0.72, color=colour, edgecolor="#555", linewidth=0.6)
        is_wide = width > 0.02 * (end - begin) * 1e3
        at = max(left, 0.0) + (min(stop, end) - max(start, begin)) * 500 if is_wide else left + shown + 4
        axes.text(at, lane, str(batch), ha="center" if is_wide else "left", va="center", fontsize=9, clip_on=True)
    axes.set(xlim=(0, (end - begin) * 1e3), yticks=range(len(LANES)), xlabel="milliseconds")
    axes.set_yticklabels([lane.replace("_", " ") for lane in LANES])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#ddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path, help="as StageLog.write_csv writes them")
    parser.add_argument("picture", type=Path, help="SVG or PNG")
    parser.add_argument("--steps", type=int, default=5, help="to show")
    args = parser.parse_args()
    draw(args.events, args.picture, steps=args.steps)


if __name__ == "__main__":
    main()
