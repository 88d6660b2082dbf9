#!/usr/bin/env bash
# Everything a GPU can tell with torch and triton alone, in one call: kernels against their references, then their speed.
# Rows go to benchmarks/results with the device's name; where OUT is set, copies and the logs go there.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-outputs/gpu}"
mkdir -p "$OUT"
status=0
"$PYTHON" -m pytest -q -m "gpu and not slow" -p no:cacheprovider tests/ops 2>&1 | tee "$OUT/tests.log" || status=1
for bench in "bench_attention.py --json" "bench_attention.py --table --rounds 3"; do
  # shellcheck disable=SC2086
  "$PYTHON" benchmarks/$bench 2>&1 | tee "$OUT/${bench//[^a-z_]/}.log" || status=1
done
cp -r benchmarks/results "$OUT/"
exit "$status"
