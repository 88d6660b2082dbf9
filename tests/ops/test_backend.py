"""Which implementation runs: by device, by a block, by the call."""

from __future__ import annotations

import pytest
import torch

from lightning_gr.ops.backend import choose_backend, use_backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


def test_the_call_goes_before_the_block_and_the_block_before_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [choose_backend("auto", device) for device in (CPU, CUDA, META)] == ["cpu", "triton", "reference"]
    with use_backend("reference"):
        assert choose_backend("auto", CPU) == choose_backend("auto", CUDA) == "reference"
        assert choose_backend("cpu", CPU) == "cpu"
        with use_backend("auto"):  # changes nothing
            assert choose_backend("auto", CPU) == "reference"
        with use_backend("cpu"):
            assert choose_backend("auto", CPU) == "cpu"
        assert choose_backend("auto", CPU) == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose_backend("auto", CPU) == "cpu"


def test_what_does_not_run_on_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='cpu': the tensors are on cuda"):
        choose_backend("cpu", CUDA)
    with pytest.raises(ValueError, match="backend='triton': the tensors are on cpu; .*TRITON_INTERPRET=1"):
        choose_backend("triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("triton", CPU) == "triton"
    with pytest.raises(ValueError, match="backend: expected one of auto, reference, cpu, triton, got 'cuda'"):
        choose_backend("cuda", CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: .*got 'x'"), use_backend("x"):  # type: ignore[arg-type]
        pass
