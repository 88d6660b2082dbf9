"""Makes the table of docs/peers.md from the rows in benchmarks/results/peers.csv; bench_peers calls it at its end.

python benchmarks/peers/peer_page.py
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "peers.md"
ROWS = ROOT / "benchmarks" / "results" / "peers.csv"
BEGIN, END = "<!-- peers: made by make bench-peers -->", "<!-- end of peers -->"
OURS = "lightning-gr HSTU"
Row = dict[str, str]


def newest(rows: list[Row]) -> list[Row]:
    """One row a system on the log of the newest row, each cell the newest that it has; ours first.

    A run that failed takes no figures away, and its reason stays until a later run of the system is without one.
    """
    if not rows:
        return []
    merged: dict[str, Row] = {}
    for row in rows:
        if row["data"] == rows[-1]["data"]:
            of_system = merged.setdefault(row["system"], {})
            of_system |= {name: cell for name, cell in row.items() if cell != "" or name == "error"}
    return sorted(merged.values(), key=lambda row: row["system"] != OURS)


def cells(row: Row, ours: Row) -> list[str]:
    """A line of the table; a dash for what was not measured."""

    def told(name: str, form: Callable[[float], str]) -> str:
        return form(float(row[name])) if name in row else "-"

    timed = "epoch_s" in row and "epoch_s" in ours
    needed = int(float(row["epochs_to_recall"])) if "epochs_to_recall" in row else None
    return [
        row["system"],
        told("epoch_s", lambda x: f"{x:,.1f}"),
        f"{float(row['epoch_s']) / float(ours['epoch_s']):.2f}" if timed else "-",
        told("tokens_per_s", lambda x: f"{x:,.0f}"),
        told("peak_mb", lambda x: f"{x:,.0f}"),
        told("test_recall", lambda x: f"{x:.4f}".removeprefix("0")),
        told("test_ndcg", lambda x: f"{x:.4f}".removeprefix("0")),
        f"{row['best_epoch']} of {row['epochs']}" if "epochs" in row else "-",
        f"{needed * float(row['epoch_s']):,.0f}" if needed and "epoch_s" in row else "-",
    ]


def peers_table(rows: list[Row]) -> str:
    """Markdown of all systems, and below it what each trained with or why it did not."""
    found = newest(rows)
    if not found:
        return "Not measured yet: run `make bench-peers DATA=amazon_beauty_sequences.txt EPOCHS=10`."
    ours = next((row for row in found if row["system"] == OURS), {})
    recall = next((row["recall_to_reach"] for row in found if "recall_to_reach" in row), None)
    head = ["system", "s an epoch", "ours = 1", "tokens/s", "MB", "Recall@10", "NDCG@10", "best epoch"]
    head.append(f"s to validation Recall@10 {recall}" if recall else "s to a Recall")
    lines = [head, ["---"] * len(head), *(cells(row, ours) for row in found)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = []
    for row in found:
        words = [row[name] for name in ("settings", "versions") if name in row]
        if row.get("extrapolated") == "True":
            words.append(f"an epoch extrapolated from {row['measured_steps']} of {row['steps_per_epoch']} steps each")
        if "trained_s" in row:
            words.append(f"of quality: {row['epochs']} epochs in {float(row['trained_s']):,.0f} s")
        if row.get("error"):
            words.append(f"**failed**: {row['error']}")
        notes.append(f"- {row['system']}: {'; '.join(words)}")
    last = found[0]
    at = f"{last['data']}, {last['threads']} threads, {last['machine']}, commit {last['commit']}, {last['date']}."
    return f"{at}\n\n{text}\n\n" + "\n".join(notes)


def page(rows: list[Row], text: str) -> str:
    """The page with its table made anew.

    Raises:
        ValueError: if the page has not both marks once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{PAGE.name} must have {BEGIN} and, after it, {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{peers_table(rows)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Writes the page."""
    rows: list[Row] = []
    if ROWS.exists():
        with ROWS.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    PAGE.write_text(page(rows, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
