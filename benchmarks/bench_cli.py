"""How long the command takes to answer: `--help`, `recipes ls`, and `fit --help` against a bare LightningCLI.

python benchmarks/bench_cli.py [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from reporting import commit, device, publish

ROOT = Path(__file__).resolve().parents[1]
BARE = "from lightning.pytorch.cli import LightningCLI; LightningCLI(auto_configure_optimizers=False)"
COMMANDS = {
    "help_s": ["-m", "lightning_gr", "--help"],
    "recipes_ls_s": ["-m", "lightning_gr", "recipes", "ls"],
    "fit_help_s": ["-m", "lightning_gr", "fit", "--help"],
    "bare_fit_help_s": ["-c", BARE, "fit", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    # Interleaved, so that a busy minute of the machine does not fall on one command alone; the first round warms up.
    for repeat in range(args.repeats + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], env=env, stdout=subprocess.DEVNULL, check=True)
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    result: dict[str, float | str] = {name: round(statistics.median(x), 3) for name, x in seconds.items()}
    ratios = [ours / bare for ours, bare in zip(seconds["fit_help_s"], seconds["bare_fit_help_s"], strict=True)]
    result["fit_help_ratio"] = round(statistics.median(ratios), 3)

    print(f"{device()}; commit {commit()}; median of {args.repeats}")
    print(f"{'command':<32}{'seconds':>9}{'limit':>12}")
    print(f"{'lightning-gr --help':<32}{result['help_s']:>9.2f}{'1.00':>12}")
    print(f"{'lightning-gr recipes ls':<32}{result['recipes_ls_s']:>9.2f}{'1.00':>12}")
    print(f"{'lightning-gr fit --help':<32}{result['fit_help_s']:>9.2f}{'1.3 x bare':>12}")
    print(f"{'bare LightningCLI fit --help':<32}{result['bare_fit_help_s']:>9.2f}")
    print(f"ratio of fit --help to bare: {result['fit_help_ratio']:.2f}")

    publish("cli", result, as_json=args.json)


if __name__ == "__main__":
    main()
