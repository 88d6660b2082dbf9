"""Processes of a benchmark that train together over gloo, as torchrun would have started them."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """A port of this machine for the processes to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def be_a_rank(rank: int, world_size: int, port: int) -> None:
    """Makes this process one of several that train with a thread each, and keeps it quiet."""
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    of_rank = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    of_all = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in (of_rank | of_all).items()}
    os.environ["TORCHELASTIC_RUN_ID"] = "bench"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
