"""Peak rates: what chips' datasheets say, what a machine without an entry reaches, and precisions."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from lightning_gr.observability import peak_rate as module
from lightning_gr.observability.peak_rate import PeakRate, compute_dtype, measured_rate, peak_rate

CUDA = torch.device("cuda")
CHIPS = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA H800": 989.4,
    "NVIDIA H20": 148.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A800-SXM4-80GB": 312.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L4": 121.0,
    "AMD Instinct MI300X": 1307.4,
}
"""Dense bfloat16, TFLOP/s, from the makers' datasheets."""


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Names a GPU that is not there; a measurement on it gives 7."""

    def name(chip: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: chip)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "measured_rate", lambda device, dtype: 7.0)
    return name


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chips_have_their_datasheets_dense_rate(chip: Any, name: str, dtype: torch.dtype) -> None:
    chip(name)
    found = peak_rate(CUDA, dtype)
    assert found.flops / 1e12 == pytest.approx(CHIPS[name], rel=0.01)
    assert found.source != "measured"


@pytest.mark.filterwarnings("ignore:FLOPs not found")
@pytest.mark.parametrize("name", ["NVIDIA Z9000", "NVIDIA GeForce RTX 9999", "AMD Radeon Pro"])
def test_a_chip_that_no_table_has_is_measured(chip: Any, name: str) -> None:
    chip(name)
    assert peak_rate(CUDA, torch.bfloat16) == PeakRate(7.0, "measured")


def test_float32_is_what_tensor_cores_may_do_with_it(chip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, plain in (("NVIDIA H200", 66.9e12), ("NVIDIA H100 80GB HBM3", 66.9e12), ("NVIDIA L40S", 91.6e12)):
        chip(name)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
        assert peak_rate(CUDA, torch.float32).flops == pytest.approx(plain, rel=0.01)
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        fast = peak_rate(CUDA, torch.float32)
        # TF32 is in Lightning's table, or measured; never taken for the rate of plain float32.
        assert fast.source == "measured" or fast.flops > 5 * plain


def test_a_dtype_that_a_chip_has_no_entry_for_is_measured(chip: Any) -> None:
    chip("NVIDIA L40S")
    assert peak_rate(CUDA, torch.float64) == PeakRate(7.0, "measured")


def test_a_cpu_is_measured_once() -> None:
    found = peak_rate(torch.device("cpu"), torch.float32)
    assert found.source == "measured"
    assert peak_rate(torch.device("cpu"), torch.float32) == found
    # Another number of threads is another machine.
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert ("cpu", torch.float32, threads + 1) not in module._measured
        peak_rate(torch.device("cpu"), torch.float32)
        assert ("cpu", torch.float32, threads + 1) in module._measured
    finally:
        torch.set_num_threads(threads)
        module._measured.pop(("cpu", torch.float32, threads + 1), None)


def test_a_measured_rate_is_that_of_products() -> None:
    """The best of some is at least that of a loop's mean, and within what a disturbed machine may lose."""
    found = measured_rate(torch.device("cpu"), torch.float32, size=256, repeats=20)
    one = torch.ones(256, 256)
    one @ one
    rates = []
    for _ in range(40):
        start = time.perf_counter()
        one @ one
        rates.append(2 * 256**3 / (time.perf_counter() - start))
    assert 0.1 * max(rates) < found < 10 * max(rates)


def test_measuring_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    measured_rate(torch.device("cpu"), torch.float32, size=8, repeats=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("32", torch.float32),
        ("16-mixed", torch.float16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("64-true", torch.float64),
        ("transformer-engine", torch.float32),
    ],
)
def test_products_are_computed_in_the_trainers_precision(precision: str, dtype: torch.dtype) -> None:
    assert compute_dtype(precision) == dtype


@pytest.mark.gpu
def test_a_gpus_measured_rate_is_below_its_table() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    table, found = peak_rate(device, torch.bfloat16), measured_rate(device, torch.bfloat16, size=8192, repeats=10)
    if table.source == "measured":
        pytest.skip(f"{torch.cuda.get_device_name(device)}: no table has it")
    assert 0.3 * table.flops < found < 1.05 * table.flops
