"""A KeyIndex's search and insertion on a GPU: a key is a lane, and new keys take slots by compare-and-swap.

Which slot a key gets depends on the order in which lanes arrive; its row does not.

Shape suffixes: N keys, M slots. In kernels K is the keys of a program and 8 the slots of a group.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_gr.embeddings.dynamic.key_slots import Keys, Slots, TorchIndex

tl: Any  # globals, since kernels look them up there
_hash: Any

_BLOCK = 128
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class TritonIndex(TorchIndex):
    """The operations in Triton where that pays, else in PyTorch.

    Raises:
        ValueError: the device is no GPU, and Triton does not interpret.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" and not _INTERPRETED:
            raise ValueError(f"backend='triton': the index is on {device}; use 'auto', or TRITON_INTERPRET=1 on a CPU")

    @override
    def find_slots(self, slots: Slots, keys: Keys) -> Tensor:
        found_N = torch.empty_like(keys.ids_N)
        self._launch("find", slots, keys, FOUND=found_N)
        return found_N

    @override
    def insert(self, slots: Slots, keys: Keys, rows_N: Tensor) -> int:
        reused_1 = torch.zeros(1, dtype=torch.int32, device=rows_N.device)
        nowhere_1 = torch.zeros(1, dtype=torch.int32, device=rows_N.device)
        self._launch("insert", slots, keys, NEW_ROWS=rows_N.int().contiguous(), REUSED=reused_1, NOWHERE=nowhere_1)
        return int(reused_1)

    def _launch(self, name: str, slots: Slots, keys: Keys, **own: Tensor) -> None:
        size = len(keys.ids_N)
        if size == 0:
            return
        with torch.cuda.device_of(keys.ids_N):
            _kernels()[name][(-(-size // _BLOCK),)](
                IDS=slots.ids_M,
                ROWS=slots.rows_M,
                TABLES=slots.rows_M if slots.tables_M is None else slots.tables_M,
                SALTS=slots.salts_T,
                groups=slots.num_groups,
                KEYS=keys.ids_N,
                KEY_TABLES=slots.rows_M if keys.tables_N is None else keys.tables_N,
                table=keys.table,
                size=size,
                SEVERAL=slots.tables_M is not None,
                GIVEN=keys.tables_N is not None,
                BLOCK=_BLOCK,
                **own,
            )


@cache
def _kernels() -> dict[str, Any]:
    global tl, _hash
    import triton
    import triton.language as tl

    @triton.jit
    def _hash(x):  # type: ignore[no-untyped-def]
        """As mix64 of counter_random."""
        x ^= (x >> 33) & 0x7FFFFFFF
        x *= -49064778989728563
        x ^= (x >> 33) & 0x7FFFFFFF
        x *= -4265267296055464877
        return x ^ ((x >> 33) & 0x7FFFFFFF)

    @triton.jit  # type: ignore[untyped-decorator]
    def find(  # type: ignore[no-untyped-def]
        IDS,
        ROWS,
        TABLES,
        SALTS,
        groups,
        KEYS,
        KEY_TABLES,
        table,
        size,
        FOUND,
        SEVERAL: tl.constexpr,
        GIVEN: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """The slot of each key, -1 where it is absent."""
        n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        open_K = n < size
        id_K = tl.load(KEYS + n, mask=open_K, other=0)
        table_K = tl.load(KEY_TABLES + n, mask=open_K, other=0).to(tl.int32) if GIVEN else tl.zeros_like(n) + table
        hash_K = _hash(id_K ^ tl.load(SALTS + table_K))
        group_K = hash_K & (groups - 1)
        stride_K = ((hash_K >> 32) & 0xFFFFFFFF) | 1
        found_K = tl.zeros_like(n) - 1
        while tl.max(open_K.to(tl.int32)) > 0:
            slot_K8 = group_K[:, None] * 8 + tl.arange(0, 8)[None, :]
            row_K8 = tl.load(ROWS + slot_K8, mask=open_K[:, None], other=-1)
            same_K8 = (tl.load(IDS + slot_K8, mask=open_K[:, None], other=0) == id_K[:, None]) & (row_K8 >= 0)
            if SEVERAL:
                same_K8 &= tl.load(TABLES + slot_K8, mask=open_K[:, None], other=-1) == table_K[:, None]
            hit_K = tl.max(tl.where(same_K8, slot_K8, -1), 1)
            found_K = tl.where(open_K, hit_K, found_K)
            open_K = open_K & (hit_K < 0) & (tl.max((row_K8 == -1).to(tl.int32), 1) == 0)
            group_K = (group_K + stride_K) & (groups - 1)
        tl.store(FOUND + n, found_K, mask=n < size)

    @triton.jit  # type: ignore[untyped-decorator]
    def insert(  # type: ignore[no-untyped-def]
        IDS,
        ROWS,
        TABLES,
        SALTS,
        groups,
        KEYS,
        KEY_TABLES,
        table,
        size,
        NEW_ROWS,
        REUSED,
        NOWHERE,
        SEVERAL: tl.constexpr,
        GIVEN: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Distinct keys that are absent take free slots; nobody searches meanwhile, so ids may follow rows."""
        n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        open_K = n < size
        id_K = tl.load(KEYS + n, mask=open_K, other=0)
        new_row_K = tl.load(NEW_ROWS + n, mask=open_K, other=0)
        table_K = tl.load(KEY_TABLES + n, mask=open_K, other=0).to(tl.int32) if GIVEN else tl.zeros_like(n) + table
        hash_K = _hash(id_K ^ tl.load(SALTS + table_K))
        group_K = hash_K & (groups - 1)
        stride_K = ((hash_K >> 32) & 0xFFFFFFFF) | 1
        while tl.max(open_K.to(tl.int32)) > 0:
            slot_K8 = group_K[:, None] * 8 + tl.arange(0, 8)[None, :]
            row_K8 = tl.load(ROWS + slot_K8, mask=open_K[:, None], other=0, volatile=True)
            free_K = tl.min(tl.where(row_K8 < 0, slot_K8, groups * 8), 1)
            tries_K = open_K & (free_K < groups * 8)
            before_K = tl.max(tl.where(slot_K8 == free_K[:, None], row_K8, -3), 1)
            # There is no mask: lanes that try nothing compare a spare word, which is 0, with what it never is.
            at_K = tl.where(tries_K, ROWS + free_K, NOWHERE + tl.zeros_like(n))
            wins_K = tries_K & (tl.atomic_cas(at_K, before_K, new_row_K) == before_K)
            tl.store(IDS + free_K, id_K, mask=wins_K)
            if SEVERAL:
                tl.store(TABLES + free_K, table_K.to(tl.int16), mask=wins_K)
            tl.atomic_add(REUSED, tl.sum((wins_K & (before_K == -2)).to(tl.int32)))
            # A lane that found its slot taken looks at the same group again.
            group_K = tl.where(open_K & ~tries_K, (group_K + stride_K) & (groups - 1), group_K)
            open_K = open_K & ~wins_K

    return {"find": find, "insert": insert}
