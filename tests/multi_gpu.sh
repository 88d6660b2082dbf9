#!/usr/bin/env bash
# The laws of training over NCCL, with one GPU a rank: what the tests prove on processes of the CPU, on your machine.
#
#     tests/multi_gpu.sh                    # as many ranks as there are GPUs, 2 to 4
#     tests/multi_gpu.sh -k micro_steps -x  # further arguments go to pytest
#     GPUS=2 tests/multi_gpu.sh             # fewer ranks than GPUs
#     PYTHON=python3.12 tests/multi_gpu.sh  # another interpreter than that of .venv
#
# It needs an environment with a CUDA build of torch, torchrec and fbgemm-gpu (pip install -e '.[gpu,dev]'). Ranks of
# tests/conftest.py then speak NCCL and own a GPU each; tests for more ranks than there are GPUs are skipped by name.
# Without the variable LIGHTNING_GR_TEST_GPUS, which this script sets, those tests run on the CPU over gloo.
#
# What runs: tests/plugins/test_laws_of_training.py (any number of ranks and micro-steps is one process: dense, static
# and dynamic tables, optimisers, accumulation, clipping, evaluation, resume) and tests/plugins/test_pipeline.py
# (pipelined = plain bit for bit). The latter runs with deterministic algorithms of torch where there are such.
#
# Exit status: 2 where there are fewer than 2 GPUs, else that of pytest.
#
# The authors have had no machine with several GPUs: this script has been checked and never run to its end. A tolerance
# that a GPU's order of summation breaks is possible; please report it with the output.

set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
found=$("$python" -c 'import torch; print(torch.cuda.device_count())') || {
  echo "multi_gpu.sh: error: $python cannot import torch; set PYTHON, or run: make env" >&2
  exit 2
}
gpus=${GPUS:-$((found > 4 ? 4 : found))}
if ((found < 2)); then
  echo "multi_gpu.sh: error: torch sees $found GPU(s), and this needs at least 2, one a rank; the same tests run on the" \
    "CPU: make test" >&2
  exit 2
fi
if [[ ! $gpus =~ ^[2-4]$ ]] || ((gpus > found)); then
  echo "multi_gpu.sh: error: GPUS=$gpus: expected 2 to 4, and no more than the $found that torch sees" >&2
  exit 2
fi

echo "multi_gpu.sh: $gpus ranks over NCCL"
export LIGHTNING_GR_TEST_GPUS=$gpus OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
exec "$python" -m pytest -m "not recipe" \
  tests/plugins/test_laws_of_training.py tests/plugins/test_pipeline.py "$@"
