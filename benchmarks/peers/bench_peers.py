"""This project beside what a user would pick instead, on one log: what ``make bench-peers`` calls.

python benchmarks/peers/bench_peers.py [--data sequences.txt] [--seconds 40] [--repeats 3] [--epochs E [--budget S]]
                                       [--only NAME ...] [--prepare] [--no-publish] [--json]

Every system has an environment of its own (peer_environments), the same log (cut by peer_log.shortened; without
`--data` a synthetic one of as many users, items and events as Amazon Beauty), the same size (width 64, 2 layers,
2 heads, length 50), the softmax over all items, about the same targets a batch, and the same threads; else it keeps its
own defaults. Each run is a process (peer_run).

Speed: runs of `--seconds` each take turns, `--repeats` rounds; each round begins with another system. Seconds of an
epoch are those of a step times the steps of an epoch, the median of the rounds; tokens/s are the targets of an epoch by
those. Memory is the median as well. Quality, with `--epochs`: one run a system, after each epoch its ten best of all
items for every user, judged by peer_quality; the test's figures are those of the epoch that validation found best. Time
to `--recall` is the epochs until validation reaches it times the seconds of an epoch.

One row a system goes to benchmarks/results/peers.csv, and from there into the table of docs/peers.md; a system that
failed has a row with the reason. Ours has `speedup_vs_fastest_peer` where every peer was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from peer_environments import PeerEnvironmentError, interpreter  # noqa: E402
from peer_log import PeerLog, read_sequences, renumbered, shortened, write_sequences  # noqa: E402
from peer_page import main as write_page  # noqa: E402
from reporting import commit, device, publish  # noqa: E402

LOG = HERE.parents[1] / "build" / "peers" / "log.txt"


@dataclass(frozen=True)
class Peer:
    """A system: the environment it runs in, and which of the package's models."""

    name: str
    package: str
    model: str


PEERS = (
    Peer("lightning-gr HSTU", "lightning_gr", "hstu"),
    Peer("rectools SASRec", "rectools", "sasrec"),
    Peer("rectools HSTU", "rectools", "hstu"),
    Peer("torch-rechub HSTU", "torch_rechub", "hstu"),
    Peer("RecBole SASRec", "recbole", "sasrec"),
)


@dataclass
class Found:
    """What the runs of a system gave; `error` is why it has no more of them."""

    speed: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] | None = None
    error: str = ""


def turns(names: list[str], rounds: int) -> list[str]:
    """Who runs when: everyone once a round, each round beginning with another."""
    return [names[(first + place) % len(names)] for first in range(rounds) for place in range(len(names))]


def last_words(text: str) -> str:
    """The line of a failed process that tells most: the last that is not empty."""
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    return lines[-1][:300] if lines else "no message"


def run(peer: Peer, arguments: list[str], *, data: Path, threads: int, limit_s: float) -> dict[str, Any]:
    """A run of a peer in a process of its own.

    Raises:
        RuntimeError: with the process's last words, if it failed or took longer than `limit_s`.
        PeerEnvironmentError: if it has no environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(interpreter(peer.package, make=False)), str(HERE / f"run_{peer.package}.py")]
        command += ["--model", peer.model, "--data", str(data.resolve()), "--out", str(out)]
        command += ["--threads", str(threads), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {limit_s:.0f} s") from None
        if done.returncode or not out.exists():
            reason = last_words(done.stderr)
            raise RuntimeError(f"killed by signal {-done.returncode}: {reason}" if done.returncode < 0 else reason)
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def epochs_until(epochs: list[dict[str, Any]], recall: float) -> int | None:
    """Epochs until validation reaches a Recall, None if it never does."""
    return next((x["epoch"] for x in epochs if x["val_recall"] >= recall), None)


def row(peer: Peer, found: Found, *, recall: float) -> dict[str, Any]:
    """A system's row: medians of its runs of speed, the best epoch of its run of quality."""
    runs = [*found.speed, *([found.quality] if found.quality else [])]
    result: dict[str, Any] = {"system": peer.name, "error": found.error}
    if runs:
        result |= {name: runs[0][name] for name in ("versions", "settings", "targets", "steps_per_epoch")}
    timed = [x for x in found.speed if x["step_s"]]
    if timed:
        epoch_s = statistics.median(x["step_s"] * x["steps_per_epoch"] for x in timed)
        result |= {
            "runs": len(timed),
            "epoch_s": round(epoch_s, 2),
            "epoch_s_least": round(min(x["step_s"] * x["steps_per_epoch"] for x in timed), 2),
            "epoch_s_most": round(max(x["step_s"] * x["steps_per_epoch"] for x in timed), 2),
            "measured_steps": min(x["measured_steps"] for x in timed),
            "extrapolated": any(x["measured_steps"] < x["steps_per_epoch"] for x in timed),
            "tokens_per_s": round(runs[0]["targets"] / epoch_s),
            "peak_mb": round(statistics.median(x["peak_bytes"] for x in timed) / 1e6, 1),
        }
    if found.quality and found.quality["epochs"]:
        epochs = found.quality["epochs"]
        best = max(epochs, key=lambda x: x["val_recall"])
        result |= {"epochs": len(epochs), "best_epoch": best["epoch"], "trained_s": round(epochs[-1]["trained_s"], 1)}
        result |= {f"{part}_{x}": round(best[f"{part}_{x}"], 4) for part in ("val", "test") for x in ("recall", "ndcg")}
        needed = epochs_until(epochs, recall)
        result |= {"recall_to_reach": recall, "epochs_to_recall": needed}
        result["recall_by_epoch"] = " ".join(f"{x['val_recall']:.4f}" for x in epochs)
        if needed and timed:
            result["to_recall_s"] = round(needed * result["epoch_s"], 1)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, with how many times quicker ours is; what a row lacks is a dash."""
    ours = next((x.get("epoch_s") for x in rows if x["system"] == PEERS[0].name), None)
    columns = {"epoch_s": "s/epoch", "tokens_per_s": "tokens/s", "peak_mb": "MB", "test_recall": "Recall@10"}
    columns |= {"test_ndcg": "NDCG@10", "epochs": "epochs", "to_recall_s": "s to recall"}
    lines = [f"{'':20}" + "".join(f"{x:>12}" for x in columns.values()) + f"{'to ours':>10}"]
    for x in rows:
        cells = [x.get(name) for name in columns]
        text = "".join(f"{'-' if y is None else format(y, ','):>12}" for y in cells)
        ratio = f"{x['epoch_s'] / ours:.2f}" if ours and x.get("epoch_s") else "-"
        lines.append(f"{x['system']:20}{text}{ratio:>10}{'  ' + x['error'] if x['error'] else ''}")
    return "\n".join(lines)


def with_ratio(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours last, with how many times an epoch of ours fits into one of the fastest peer, if all peers were tried."""
    ours = [x for x in rows if x["system"] == PEERS[0].name]
    peers = [x for x in rows if x["system"] != PEERS[0].name]
    timed = [x for x in peers if "epoch_s" in x]
    if ours and "epoch_s" in ours[0] and timed and len(peers) == len(PEERS) - 1:
        fastest = min(timed, key=lambda x: x["epoch_s"])
        speedup = round(fastest["epoch_s"] / ours[0]["epoch_s"], 3)
        ours = [ours[0] | {"fastest_peer": fastest["system"], "speedup_vs_fastest_peer": speedup}]
    return peers + ours


def prepare_log(path: str | None, max_length: int) -> str:
    """Writes the log that all read; returns what it is."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    if path:
        sequences, name = read_sequences(path), Path(path).name
    else:
        from end_to_end_retrieval import synthetic_log

        with tempfile.TemporaryDirectory() as folder:
            sequences, name = read_sequences(synthetic_log(Path(folder))), "synthetic"
    cut = shortened(sequences, max_length)
    if not cut:
        raise SystemExit(f"{name}: no user has the three items that are needed to hold two out")
    write_sequences(renumbered(cut), LOG)
    return name


def measure(peers: list[Peer], args: argparse.Namespace) -> dict[str, Found]:
    """Runs all systems; a failed one runs no more."""
    found = {peer.name: Found() for peer in peers}
    by_name = {peer.name: peer for peer in peers}
    for peer in peers:
        try:
            interpreter(peer.package, pip_flags=args.pip_flags.split())
        except PeerEnvironmentError as error:
            found[peer.name].error = f"environment: {error}"
    if args.prepare:
        return found
    common = ["--tokens", str(args.tokens), "--max-length", str(args.max_length)]
    plan = [(name, "speed") for name in turns(list(found), args.repeats)]
    plan += [(name, "quality") for name in found if args.epochs]
    for name, kind in plan:
        if found[name].error:
            continue
        speed = ["--seconds", str(args.seconds)]
        quality = ["--epochs", str(args.epochs), *(["--budget", str(args.budget)] if args.budget else [])]
        began = time.perf_counter()
        try:
            result = run(
                by_name[name],
                common + (speed if kind == "speed" else quality),
                data=LOG,
                threads=args.threads,
                limit_s=args.limit,
            )
        except (RuntimeError, PeerEnvironmentError) as error:
            found[name].error = f"{kind}: {error}"
            print(f"  {name:20}{found[name].error}", flush=True)
            continue
        if kind == "speed":
            found[name].speed.append(result)
            epoch_s = (result["step_s"] or float("nan")) * result["steps_per_epoch"]
            told = f"{epoch_s:9.2f} s an epoch, {result['measured_steps']} of {result['steps_per_epoch']} steps"
        else:
            found[name].quality = result
            told = "validation Recall@10 " + " ".join(f"{x['val_recall']:.4f}" for x in result["epochs"])
        took = time.perf_counter() - began
        print(f"  {name:20}{told}, {result['peak_bytes'] / 1e6:,.0f} MB, {took:.0f} s in all", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="lines of `user item item ...`; else a synthetic log")
    parser.add_argument("--seconds", type=float, default=40.0, help="that each run of speed measures")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of speed; 0 for none")
    parser.add_argument("--epochs", type=int, default=0, help="of the run of quality, at most; 0 for none")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds of training that begin no other epoch")
    parser.add_argument("--recall", type=float, default=0.08, help="validation Recall@10 whose time is told")
    parser.add_argument("--tokens", type=int, default=2048, help="targets of a batch, about")
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a run has failed")
    parser.add_argument("--only", nargs="+", choices=[x.name for x in PEERS], metavar="NAME", help="some systems")
    parser.add_argument("--pip-flags", default="", help="more words for pip install, as --pip-flags='--index-url URL'")
    parser.add_argument("--prepare", action="store_true", help="make environments and log, and run nothing")
    parser.add_argument("--no-publish", action="store_true", help="append no rows to benchmarks/results/peers.csv")
    parser.add_argument("--json", action="store_true", help="one JSON object a row at the end")
    args = parser.parse_args()
    peers = [x for x in PEERS if not args.only or x.name in args.only]
    data = prepare_log(args.data, args.max_length)
    log = PeerLog.read(LOG)
    print(f"{device()}; commit {commit()}; {args.threads} threads")
    print(f"{data}: {len(log.sequences):,} users, {log.num_targets:,} targets an epoch", flush=True)
    found = measure(peers, args)
    if args.prepare:
        for name, each in found.items():
            print(f"  {name:20}{each.error or 'ready'}")
        return
    rows = [row(peer, found[peer.name], recall=args.recall) for peer in peers]
    print(table(rows))
    rows = with_ratio(rows)
    given = {"data": data, "threads": args.threads, "batch_targets": args.tokens}
    if args.repeats:
        given["seconds"] = args.seconds
    for each in rows:
        if args.no_publish:
            if args.json:
                print(json.dumps(given | each))
        else:
            publish("peers", given | each, as_json=args.json)
    if not args.no_publish:
        write_page()
    if any(x["error"] for x in rows):
        raise SystemExit("not every system ran; see above")


if __name__ == "__main__":
    main()
