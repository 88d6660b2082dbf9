"""Shared fixtures: pools of real processes, started once a session and reused by every distributed test."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest

from tests.forked_command import PRELOADED

GPUS = int(os.environ.get("LIGHTNING_GR_TEST_GPUS", "0"))
"""GPUs, one a rank, over NCCL, as multi_gpu.sh sets it; 0 means ranks on the CPU over gloo."""

MOST_KEPT = 4
"""Ranks of the largest pool that is kept: threads of gloo cost time where they wait, too."""


PLACE_IN_A_RUN = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
)
"""Variables by which a process finds its run; a run that a test made in this process leaves some behind."""


def _load(file: str) -> Any:
    # Folders have files of the same name.
    name = "gloo_job_" + os.path.relpath(file, os.path.dirname(__file__)).removesuffix(".py").replace(os.sep, "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _work(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
    }
    if not GPUS:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if GPUS:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if GPUS else "gloo", timeout=timedelta(seconds=100))
    while (job := pipe.recv()) is not None:
        file, name, args, kwargs = job
        try:
            pipe.send((True, getattr(_load(file), name)(*args, **kwargs)))
        except BaseException:  # reported to the test, which fails with it
            pipe.send((False, traceback.format_exc()))


def pytest_configure(config: pytest.Config) -> None:
    """`make test` tries fewer examples of what Hypothesis makes up, where a test does not say how many."""
    hypothesis.settings.register_profile("quick", max_examples=30)
    if "not long" in config.option.markexpr:
        hypothesis.settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guides and the wheel first: few tests that take long, for which one worker would be waited for at the end."""
    items.sort(key=lambda item: os.path.dirname(item.path) != os.path.dirname(__file__))


@pytest.fixture(autouse=True)
def _no_run_left_behind() -> Iterator[None]:
    """Takes back a run in this process: its group, and its place, whose port the next process would look for."""
    yield
    for name in PLACE_IN_A_RUN:
        os.environ.pop(name, None)
    # What torchmetrics and others do depends on whether there is a group. Not imported for tests that have not.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


class GlooPool:
    """Runs a function of a test file on every rank of a world and returns the ranks' results in order."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forked from one process that has done the imports, which take seconds each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.world_size, self.closed = world_size, False
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180, **kwargs: Any) -> list[Any]:
        file = sys.modules[function.__module__].__file__
        for pipe in self._pipes:
            pipe.send((file, function.__name__, args, kwargs))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
            assert not self.closed, f"rank {rank} of {self.world_size} did not answer within {timeout} s"
            results.append(pipe.recv())
        failures = [text for ok, text in results if not ok]
        if failures:
            # The ranks may be out of step with each other; the next test gets new ones.
            self.close()
        assert not failures, "\n".join(failures)
        return [value for _, value in results]

    def close(self) -> None:
        self.closed = True
        for process in self._processes:
            process.kill()


@pytest.fixture(scope="session")
def gloo() -> Iterator[Callable[[int], GlooPool]]:
    """``gloo(n)`` is the session's pool of n processes; each pool has its own process group."""
    pools: dict[int, GlooPool] = {}

    def pool(world_size: int) -> GlooPool:
        if 0 < GPUS < world_size:
            pytest.skip(f"{world_size} ranks on {GPUS} GPUs")
        for size in [n for n in pools if n > MOST_KEPT and n != world_size]:
            pools.pop(size).close()
        if world_size not in pools or pools[world_size].closed:
            pools[world_size] = GlooPool(world_size)
        return pools[world_size]

    yield pool
    for opened in pools.values():
        opened.close()
