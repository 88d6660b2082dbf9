"""Settings of offloaded negatives, and the memory that they need."""

from __future__ import annotations

import pytest
import torch

from lightning_gr.negatives.host_memory import available_host_memory
from lightning_gr.negatives.offload import Offload


def test_a_segment_of_no_labels_is_refused() -> None:
    assert Offload(segment=1).segment == 1
    with pytest.raises(ValueError, match=r"^segment=0: expected at least 1 label"):
        Offload(segment=0)


def test_what_is_needed_is_the_rows_and_two_segments_to_the_byte() -> None:
    for dtype, size in ((torch.float32, 4), (torch.float16, 2)):
        needed = 100 * 8 * size + 2 * 30 * 8 * size
        Offload().refuse_without_memory(100, 8, dtype=dtype, segment_rows=30, available=needed)
        with pytest.raises(ValueError, match=rf"^negatives_offload: 100 rows .* {needed:,} bytes .* {needed - 1:,}"):
            Offload().refuse_without_memory(100, 8, dtype=dtype, segment_rows=30, available=needed - 1)


def test_processes_of_a_host_ask_for_its_memory_together() -> None:
    Offload().refuse_without_memory(10, 8, ranks=3, available=960)
    with pytest.raises(ValueError, match=r", in each of 3 processes of this host, need 960 bytes .* 959 are left"):
        Offload().refuse_without_memory(10, 8, ranks=3, available=959)


def test_more_than_the_machine_has_is_refused_without_being_told_how_much_that_is() -> None:
    Offload().refuse_without_memory(1, 1)
    with pytest.raises(ValueError, match=r"^negatives_offload: "):
        Offload().refuse_without_memory(1 << 40, 1 << 10)


def test_pinned_memory_that_torch_kept_is_not_asked_for_again() -> None:
    offload = Offload()
    offload.refuse_without_memory(10, 1, pinned=True, available=64)  # 40 bytes, of which torch makes a power of two
    offload.refuse_without_memory(16, 1, pinned=True, available=0)
    for _ in range(2):  # what failed was not taken
        with pytest.raises(ValueError, match=r" need 64 bytes of host memory, and 63 are left"):
            offload.refuse_without_memory(17, 1, pinned=True, available=63)
    offload.refuse_without_memory(17, 1, pinned=True, available=64)
    with pytest.raises(ValueError, match=r" need 40 bytes"):  # what is not pinned goes back each step
        offload.refuse_without_memory(10, 1, available=39)


def test_this_machine_has_some_memory_left() -> None:
    assert 1 << 20 < available_host_memory() < 1 << 50
