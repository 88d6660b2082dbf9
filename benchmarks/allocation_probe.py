"""A callback that writes down what a process's allocators hold, to tell a leak from free memory that is not returned.

`soak.py --allocations FOLDER` puts it into its run.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

_COLUMNS = ("step", "resident", "malloc_in_use", "malloc_free", "mapped", "python_blocks")
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


class AllocationProbe(pl.Callback):
    """Appends a row to ``rank-R.csv`` every few steps.

    Columns: the step; resident bytes; bytes that malloc's arenas have given out, keep free, and that malloc has mapped
    one by one; blocks of Python's own allocator.

    Args:
        folder: of the files; made if missing.
        every_n_steps: between rows.
    """

    def __init__(self, *, folder: str, every_n_steps: int = 100) -> None:
        self._folder = Path(folder)
        self._every_n_steps = every_n_steps
        self._mallinfo2 = ctypes.CDLL(None).mallinfo2
        self._mallinfo2.restype = _Mallinfo2

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step % self._every_n_steps:
            return
        status = Path("/proc/self/status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0]) * 1024
        held = self._mallinfo2()
        row = (trainer.global_step, resident, held.uordblks, held.fordblks, held.hblkhd, sys.getallocatedblocks())
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank-{trainer.global_rank}.csv"
        lines = [_COLUMNS, row] if not path.exists() else [row]
        with path.open("a") as file:
            file.writelines(",".join(map(str, line)) + "\n" for line in lines)
