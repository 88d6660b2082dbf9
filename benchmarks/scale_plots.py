"""Two pictures for docs/scale.md: speed-ups beside the published ones, and groups of tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scale_figures import Figure
from scale_mtgenrec import GPUS, SCALING
from scale_outlook import GROUP_RANKS, SYSTEMS, Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito: told apart by colour-blind readers too
MARKERS = ("o", "s", "^", "D")


def draw_speedups(figures: Sequence[Figure], path: Path) -> None:
    """Points are published, lines simulated, dashed where no stalls are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (size, factor), colour, marker in zip(SCALING, COLOURS, MARKERS, strict=True):
        name = f"{size} {factor}D"
        axes.plot(GPUS, SCALING[size, factor], marker, color=colour, label=f"{name}, published")
        for text, line in (("stalls", "-"), ("no stalls", "--")):
            of = [x for x in figures if x.table.endswith(f"8 GPUs, {text}") and x.name.startswith(f"{name},")]
            axes.plot(GPUS, [x.simulated for x in of], line, color=colour, linewidth=1)
    for text, line in (("simulated, with stalls", "-"), ("simulated, without", "--")):
        axes.plot([], [], line, color="black", linewidth=1, label=text)
    axes.plot(GPUS, [n / 8 for n in GPUS], ":", color="grey", label="linear")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="speed-up over 8")
    axes.set_xticks(GPUS, [str(n) for n in GPUS])
    axes.set_yticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    axes.minorticks_off()
    axes.legend(fontsize="small", frameon=False)
    drawing.savefig(path, dpi=90)


def draw_groups(rows: Sequence[Row], path: Path) -> None:
    """Throughput of each cut into groups over that of one group."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for panel, system in zip(panels, SYSTEMS, strict=True):
        for ranks, colour, marker in zip(GROUP_RANKS, COLOURS, MARKERS, strict=False):
            of = [row for row in rows if row.system == system and row.ranks == ranks]
            counts = [int(row.setting.split()[0]) for row in of]
            panel.plot(counts, [row.efficiency for row in of], marker + "-", color=colour, label=f"{ranks} processors")
        panel.axhline(1.0, color="grey", linewidth=0.8)
        panel.set(xscale="log", xlabel="groups of tables", title=system)
        panel.set_xticks([1, 2, 8, 32, 128], ["1", "2", "8", "32", "128"])
        panel.minorticks_off()
    panels[0].set_ylabel("throughput over one group")
    panels[0].legend(fontsize="small", frameon=False)
    drawing.savefig(path, dpi=90)
