"""Processes of a benchmark that train together over gloo, as torchrun would have started them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any


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


def cores_of_two() -> list[int]:
    """A core for each of two processes; the same one where there is no other."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return [cores[0], cores[1 % len(cores)]]


def _work(rank: int, world_size: int, port: int, core: int, function: Callable[..., Any], pipe: Any) -> None:
    """One process: calls the function when it is told to, until the other end of the pipe is closed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    be_a_rank(rank, world_size, port)
    try:
        while True:
            args, kwargs = pipe.recv()
            pipe.send(function(*args, **kwargs))
    except EOFError:
        pass


class World:
    """Processes that call a function together, one on each of these cores.

    Args:
        cores: one a process.
        function: of a module.
    """

    def __init__(self, cores: list[int], function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self._pipes, self._processes = [], []
        for rank, core in enumerate(cores):
            own, other = context.Pipe()
            process = context.Process(target=_work, args=(rank, len(cores), port, core, function, other), daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Has each process call the function."""
        for pipe in self._pipes:
            pipe.send((args, kwargs))

    def results(self) -> list[Any]:
        """What each returned, by rank."""
        return [pipe.recv() for pipe in self._pipes]

    def train(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Calls the function in each process and waits for it."""
        self.start(*args, **kwargs)
        return self.results()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
