"""Fuzzes readers, configurations, masks and checkpoints for some time, and counts what was tried and found.

python benchmarks/fuzz.py [--minutes 20] [--targets logs,masks] [--seed 0] [--findings DIR] [--no-row] [--json]

The targets are those of `tests/fuzz`, of which the suite tries a few inputs each. They take turns, each in a process of
its own, so that a crash or a hang is a finding too and ends nothing else. Inputs are made by hypothesis from the seed
and the number of the round. An input is `accepted`, `refused` in words, or a finding: any exception but a refusal, a
hang of more than 20 s, a refusal that does not name the file, damage that was taken in, something half-written.
Findings are printed once for each kind, with the input in the folder `--findings`. The exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
PER_ROUND, MOST_BYTES = 100, 12 << 30
SILENT_SECONDS = 600.0


def explore(name: str, seed: int, seconds: float, current: str, tell: Connection) -> None:
    """In a process of its own: tries inputs until time is over, and tells what came of each.

    Args:
        name: of the target.
        seed: of the first round.
        seconds: how long.
        current: file that holds the input under way.
        tell: gets the outcome of each input: its name, or a finding's text and the input.
    """
    sys.path.insert(0, str(ROOT))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(f"{current}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    warnings.filterwarnings("ignore")
    import hypothesis

    from tests.fuzz.outcome import Finding
    from tests.fuzz.targets import target

    chosen = target(name)
    deadline = None
    calm = hypothesis.settings(
        max_examples=PER_ROUND,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def one(value: Any) -> None:
        nonlocal deadline
        if deadline is not None and time.monotonic() > deadline:
            return
        packed = pickle.dumps(value)
        Path(current).write_bytes(packed)
        try:
            told: Any = chosen.check(value)
        except Finding as error:
            told = f"finding {error}", packed
        except Exception:
            told = f"finding the fuzzer itself failed\n{traceback.format_exc()}", packed
        if deadline is None:
            deadline = time.monotonic() + seconds  # what comes with the first input is not counted
        tell.send(told)

    while deadline is None or time.monotonic() < deadline:
        hypothesis.seed(seed)(calm(hypothesis.given(chosen.inputs)(one)))()
        seed += 1


class Tally:
    """What came of the inputs of one target.

    Args:
        name: of the target.
        folder: where inputs of findings go; None keeps none.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        self.name, self._folder = name, folder
        self.counts = Counter[str]()
        self.kinds = Counter[str]()

    def add(self, outcome: str, value: bytes = b"") -> None:
        """Counts an outcome; the pickled input is kept where it is the first finding of its kind."""
        self.counts["inputs"] += 1
        word, _, text = outcome.partition(" ")
        self.counts[word] += 1
        if word != "finding":
            return
        kind = re.sub(r"/tmp/\S+|\d+", "#", text.splitlines()[0] if text else "")[:100]
        frames = re.findall(r'File "[^"]*/(lightning_gr|plugins|callbacks)/([^"]+)", line (\d+)', text)
        kind += f" at {frames[-1][1]}:{frames[-1][2]}" if frames else ""
        self.kinds[kind] += 1
        if self.kinds[kind] > 1:
            return
        print(f"{self.name}: {text}\n", file=sys.stderr, flush=True)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            place = self._folder / f"{self.name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
            place.with_suffix(".txt").write_text(f"{text}\n")
            place.with_suffix(".pickle").write_bytes(value)


def turn(tally: Tally, seed: int, seconds: float, current: Path) -> None:
    """Has a process explore one target, begun anew where it dies or stands still."""
    context = multiprocessing.get_context("spawn")
    began = time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 0:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=explore, args=(tally.name, seed, left, str(current), theirs))
        process.start()
        theirs.close()
        first, end = True, ""
        while not end:
            if not ours.poll(SILENT_SECONDS):
                end = "hangs"
                break
            try:
                outcome = ours.recv()
            except EOFError:
                break
            if first:
                first, began = False, time.monotonic() - seconds + left
            tally.add(*(outcome if isinstance(outcome, tuple) else (outcome,)))
        if end:
            process.kill()
        process.join()
        if not end and process.exitcode == 0:
            return
        value = current.read_bytes() if current.exists() else b""
        log = Path(f"{current}.log").read_text(errors="replace")[-1500:]
        tally.add(f"finding {end or f'the process ended with {process.exitcode}'}\n{log}", value)
        seed += 1000
        if first:
            return  # it cannot even begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="of all targets together")
    parser.add_argument("--targets", help="some of them, with commas between; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, help="a folder for the inputs that were findings")
    parser.add_argument("--no-row", action="store_true", help="adds no row to benchmarks/results")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.fuzz.targets import MODULES

    names = args.targets.split(",") if args.targets else [*MODULES]
    if unknown := [name for name in names if name not in MODULES]:
        parser.error(f"--targets: {unknown[0]} is none of {', '.join(MODULES)}")
    tallies = {name: Tally(name, args.findings) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # what the targets write goes with it
        for name, tally in tallies.items():
            turn(tally, args.seed, args.minutes * 60 / len(names), Path(folder) / f"{name}.pickle")
    print(f"{device()}; commit {commit()}; seed {args.seed}, {args.minutes:g} minutes")
    print(f"{'target':<14}{'inputs':>10}{'accepted':>10}{'refused':>10}{'findings':>10}{'kinds':>7}")
    result: dict[str, Any] = {"minutes": args.minutes, "seed": args.seed}
    for name, tally in tallies.items():
        found = tally.counts
        counts = [found[x] for x in ("inputs", "accepted", "refused", "finding")]
        print(f"{name:<14}" + "".join(f"{x:>10,}" for x in counts) + f"{len(tally.kinds):>7}")
        result |= {f"{name}_inputs": counts[0], f"{name}_refused": counts[2], f"{name}_findings": counts[3]}
    result["inputs"] = sum(tally.counts["inputs"] for tally in tallies.values())
    result["findings"] = sum(tally.counts["finding"] for tally in tallies.values())
    if not args.no_row:
        publish("fuzz", result, as_json=args.json)
    elif args.json:
        print(json.dumps(result))
    return int(result["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
