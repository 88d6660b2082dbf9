"""The picture of docs/architecture.md: ``python docs/images/architecture.py`` writes architecture.svg beside itself.

The picture has a ground of its own, so it is readable on any page; where the reader's system is dark, it is dark.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1180, 600

# Boxes: x, y, width, height, kind, title, lines below it.
BOXES = [
    (
        20,
        20,
        1140,
        56,
        "command",
        "lightning-gr, a LightningCLI or a script of your own",
        ["recipes: YAML by class_path"],
    ),
    (20, 112, 200, 76, "data", "event log", ["CSV, Parquet, KuaiRand,", "MovieLens, a stream"]),
    (20, 228, 200, 76, "data", "EventStore", ["a row a user, vocabularies,", "splits"]),
    (
        20,
        344,
        200,
        92,
        "data",
        "GlobalBatchPlan",
        ["batches by (seed, epoch),", "dealt out by cost,", "the same on every rank"],
    ),
    (
        300,
        344,
        220,
        92,
        "plugin",
        "PipelinedLoader",
        ["fetch, copy and exchange of", "later batches' ids,", "beside training"],
    ),
    (300, 228, 220, 76, "model", "SequenceBatch", ["a rank's jagged ids,", "all ranks' denominators"]),
    (
        300,
        112,
        460,
        76,
        "model",
        "LightningModule",
        ["Retrieval-, Ranking-, MetaRankingModule, or yours:", "embed, score, exact loss, negatives, metrics"],
    ),
    (570, 228, 190, 76, "model", "layers, ops", ["HSTU, FuXi, MTGR; plain,", "C++, Triton"]),
    (860, 112, 300, 76, "table", "static tables", ["TorchRec, FBGEMM; sharded;", "updated inside backward"]),
    (
        860,
        228,
        300,
        76,
        "table",
        "dynamic tables",
        ["any id; admission, eviction, shards;", "updated with the optimiser's step"],
    ),
    (
        860,
        344,
        300,
        92,
        "plugin",
        "ranks over gloo or NCCL",
        ["ids and rows within a table group,", "gradients between groups; DDP;", "RankWatch names who failed"],
    ),
    (
        570,
        344,
        220,
        92,
        "plugin",
        "SequenceBalancedStrategy",
        ["wraps the module, shards,", "balances, saves, resumes"],
    ),
    (
        20,
        494,
        300,
        84,
        "callback",
        "ResumeCheckpoint",
        ["complete or refused, checksums,", "any number of ranks; export"],
    ),
    (
        350,
        494,
        400,
        84,
        "callback",
        "monitors",
        ["MFUMonitor, BalanceMonitor, TableMonitor,", "StepProfiler, GRProgressBar"],
    ),
    (
        780,
        494,
        380,
        84,
        "callback",
        "loggers and reports",
        ["report, compare, verify, plan: what runs say", "of themselves, and what they are held against"],
    ),
]

# Arrows: from and to a place, and what goes along.
ARROWS = [
    ((120, 188), (120, 228), "prepare"),
    ((120, 304), (120, 344), ""),
    ((220, 390), (300, 390), "batches"),
    ((410, 344), (410, 304), ""),
    ((410, 228), (410, 188), ""),
    ((665, 228), (665, 188), ""),
    ((760, 140), (860, 140), "ids, rows"),
    ((760, 166), (860, 250), ""),
    ((1010, 344), (1010, 304), ""),
    ((790, 390), (860, 390), ""),
    ((570, 390), (520, 390), ""),
    ((665, 344), (665, 304), ""),
    ((665, 436), (570, 494), "hooks"),
    ((600, 436), (200, 494), "saves"),
    ((750, 536), (780, 536), ""),
]

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24303a; }
  .title { font-weight: 600; font-size: 13.5px; }
  .label { font-size: 11.5px; font-style: italic; }
  .ground { fill: #ffffff; stroke: #c9d3da; }
  .box { stroke-width: 1.4; }
  .command { fill: #eef1f3; stroke: #7b8a95; }
  .data { fill: #e3f0fa; stroke: #2f78ad; }
  .model { fill: #fdf0d9; stroke: #b57a1c; }
  .table { fill: #f6e4ee; stroke: #a8487f; }
  .plugin { fill: #dff3ea; stroke: #20805a; }
  .callback { fill: #ece8f7; stroke: #6a57ab; }
  .arrow { stroke: #56636d; stroke-width: 1.6; fill: none; marker-end: url(#head); }
  .head { fill: #56636d; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4eaee; }
    .ground { fill: #1b2127; stroke: #3b464f; }
    .command { fill: #2b333a; } .data { fill: #16344a; } .model { fill: #443113; }
    .table { fill: #45203a; } .plugin { fill: #143b2b; } .callback { fill: #2d2650; }
    .arrow { stroke: #a9b6c0; } .head { fill: #a9b6c0; }
  }
"""


def picture() -> str:
    """The picture as SVG, without scripts, fonts or anything from elsewhere."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
        ' aria-label="A log becomes a store, a plan and batches; the strategy pipelines them, shards tables over ranks',
        ' and trains the module; callbacks save, measure and report.">\n',
        f"<style>{STYLE}</style>\n",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n',
        f'<rect class="ground" x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10"/>\n',
    ]
    for x, y, width, height, kind, title, lines in BOXES:
        parts.append(f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="7"/>\n')
        middle, top = x + width / 2, y + height / 2 - 8.5 * len(lines) + 4
        parts.append(f'<text class="title" text-anchor="middle" x="{middle}" y="{top}">{escape(title)}</text>\n')
        for number, line in enumerate(lines, start=1):
            parts.append(f'<text text-anchor="middle" x="{middle}" y="{top + 17 * number}">{escape(line)}</text>\n')
    for (x, y), (to_x, to_y), label in ARROWS:
        parts.append(f'<path class="arrow" d="M{x} {y} L{to_x} {to_y}"/>\n')
        if label:
            side = 8 if x == to_x else 0
            where = f'x="{(x + to_x) / 2 + side}" y="{(y + to_y) / 2 - (0 if side else 6)}"'
            anchor = "start" if side else "middle"
            parts.append(f'<text class="label" text-anchor="{anchor}" {where}>{escape(label)}</text>\n')
    return "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(picture(), encoding="utf-8")
