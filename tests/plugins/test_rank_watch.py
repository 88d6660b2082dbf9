"""The rank that a run ended by is named: real processes that are killed, raise, or stall while others wait for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gr.plugins.rank_failure import RankFailure, is_communication_failure
from lightning_gr.plugins.rank_watch import RankWatch

INTERVAL, TIMEOUT = 0.3, 3.0
STEP = 2  # where things go wrong, of 4
Misfortune = Callable[[int], None]


# ---- what happens to a rank while it loads batch 2: the others wait for it in training step 2 --------------------


def kill_1(rank: int) -> None:
    if rank == 1:
        time.sleep(3 * INTERVAL)  # its next mark says where it is
        os.kill(os.getpid(), signal.SIGKILL)


def kill_0(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def freeze_0(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


class Broken(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ValueError("row 7 has no label")


def raise_in_a_worker_of_1(rank: int) -> None:
    if rank == 1:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))


def raise_in_0(rank: int) -> None:
    if rank == 0:
        raise ValueError("row 7 has no label")


def stall_1(rank: int) -> None:
    if rank == 1:
        time.sleep(60)


def stall_1_then_go_on(rank: int) -> None:
    if rank == 1:
        time.sleep(TIMEOUT + 2 * INTERVAL)


def nothing(rank: int) -> None:
    pass


def leave_1(rank: int) -> None:
    if rank == 1:
        raise StopIteration


def train(rank: int, world_size: int, port: int, pipe: Any, misfortune: Misfortune) -> None:
    from lightning_gr._compat import default_store

    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT)
    init = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size, timeout=timeout)
    watch = RankWatch(store=default_store(), rank=rank, world_size=world_size, timeout=timeout, interval=INTERVAL)
    watch.start()
    seen, begin = None, time.monotonic()
    try:
        for step in range(4):
            watch.at("loading batch", step)
            with watch.guard():
                if step == STEP:
                    begin = time.monotonic()
                    misfortune(rank)
            watch.at("training step", step)
            with watch.guard(), watch.guard():
                dist.all_reduce(torch.ones(3))
    except (Exception, StopIteration) as error:
        seen = (type(error).__name__, str(error), type(error.__cause__).__name__)
    pipe.send((seen, time.monotonic() - begin))
    watch.stop()
    sys.exit(0 if seen is None else 1)


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Imports what the processes need, once: they are forked from a process that has it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_gr.plugins.rank_watch"])
    process = context.Process(target=nothing, args=(0,))
    process.start()
    process.join()


def run(
    world_size: int, misfortune: Misfortune, *, silent: int | None = None
) -> dict[int, tuple[tuple[str, str, str] | None, float]]:
    """Of each rank but the silent one: type, message and cause of what it raised, if anything, and the seconds."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=train, args=(rank, world_size, port, theirs, misfortune)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    answers, deadline = {}, time.monotonic() + 60
    try:
        for rank, pipe in enumerate(pipes):
            if rank != silent:
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} hangs"
                answers[rank] = pipe.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    return answers


def failure(answer: tuple[tuple[str, str, str] | None, float]) -> str:
    """The message of a rank that had to wait; it comes within the time-out and what the evidence takes."""
    seen, seconds = answer
    assert seen is not None
    kind, message, cause = seen
    assert (kind, cause) == ("RankFailure", "RuntimeError"), seen
    assert seconds < TIMEOUT + 20 * INTERVAL
    return message


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_killed_rank_is_named(world_size: int) -> None:
    answers = run(world_size, kill_1, silent=1)
    for answer in answers.values():
        message = failure(answer)
        assert message.startswith("rank 1 (pid ")
        assert "has given no sign of life for" in message
        assert "it was last seen in loading batch 2" in message
        assert "rank 0" not in message
        assert "rank 2" not in message


@pytest.mark.dist
@pytest.mark.parametrize("misfortune", [kill_0, freeze_0])
def test_rank_0_is_named_though_the_store_is_gone_with_it(misfortune: Misfortune) -> None:
    answers = run(3, misfortune, silent=0)
    for rank, answer in answers.items():
        message = failure(answer)
        assert message.startswith("rank 0, whose process keeps the ranks' store, is gone or does not answer")
        assert f"rank {rank} waits in training step 2" in message


@pytest.mark.dist
@pytest.mark.parametrize(("culprit", "misfortune"), [(0, raise_in_0), (1, raise_in_a_worker_of_1)])
def test_a_rank_that_raises_is_named_with_its_error(culprit: int, misfortune: Misfortune) -> None:
    answers = run(3, misfortune)
    seen, _ = answers.pop(culprit)
    assert seen is not None
    assert seen[0] == "ValueError"
    worker = "Caught ValueError in DataLoader worker process 0. ValueError: " if culprit == 1 else ""
    for answer in answers.values():
        assert failure(answer) == f"rank {culprit} failed in loading batch 2: ValueError: {worker}row 7 has no label"


@pytest.mark.dist
@pytest.mark.parametrize(("misfortune", "silent"), [(stall_1, 1), (stall_1_then_go_on, None)])
def test_a_rank_that_stalls_is_named_with_where_it_stands(misfortune: Misfortune, silent: int | None) -> None:
    messages = {failure(answer) for answer in run(3, misfortune, silent=silent).values()}
    assert len(messages) == 1
    message = messages.pop()
    assert message.startswith("rank 1 (pid ")
    assert "has stood in loading batch 2 for" in message
    assert message.endswith(("while rank 0 waits in training step 2", "while rank 2 waits in training step 2"))


@pytest.mark.dist
def test_a_rank_that_left_early_is_named() -> None:
    answers = run(2, leave_1)
    assert answers[1][0] is not None
    assert answers[1][0][0] == "StopIteration"
    assert failure(answers[0]).startswith("rank 1 has ended its run in loading batch 2")


@pytest.mark.dist
def test_nothing_is_said_when_nothing_fails() -> None:
    answers = run(2, nothing)
    assert [answers[rank][0] for rank in (0, 1)] == [None, None]


# ---- several watches in this process, which share a store ---------------------------------------------------------


def watches(store: dist.Store, *, timeout: float = 60, interval: float = 0.05) -> list[RankWatch]:
    made = [
        RankWatch(store=store, rank=rank, world_size=3, timeout=timedelta(seconds=timeout), interval=interval)
        for rank in range(3)
    ]
    for watch in made:
        watch.start()
    return made


LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"


def test_a_later_run_does_not_read_what_an_earlier_one_left() -> None:
    store = dist.HashStore()
    messages = []
    for step in (5, 6):
        made = watches(store)
        made[1].at("training step", step)
        assert made[1].explain(ValueError(f"bad {step}")) is None
        messages.append(str(made[2].explain(RuntimeError(LOST))))
        for watch in made:
            watch.stop()
            watch.stop()
    assert messages == [f"rank 1 failed in training step {step}: ValueError: bad {step}" for step in (5, 6)]


def test_the_first_error_is_the_cause_of_those_that_follow() -> None:
    made = watches(dist.HashStore())
    made[2].explain(ValueError("the cause"))
    made[1].explain(ValueError("a consequence"))
    assert "rank 2" in str(made[0].explain(RuntimeError(LOST)))
    for watch in made:
        watch.stop()


def test_ranks_that_only_lost_touch_are_not_blamed() -> None:
    from concurrent.futures import ThreadPoolExecutor

    made = watches(dist.HashStore())
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda watch: str(watch.explain(RuntimeError(LOST))), made))
    assert len(set(found)) == 1
    assert found[0].startswith("all 3 ranks live, none has failed by itself")
    for watch in made:
        watch.stop()


def test_who_is_waited_for_is_said_before_the_timeout(capfd: pytest.CaptureFixture[str]) -> None:
    made = watches(dist.HashStore(), timeout=0.5)
    for watch in (made[0], made[1]):
        watch.at("training step", 9)
    time.sleep(1.5)
    for watch in made:
        watch.stop()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rank 0: the time-out of 0 s is near: rank 2 (pid ")
    assert "has stood in setting up" in line
    assert line.endswith("while rank 0 waits in training step 9")


def test_the_guard_lets_the_end_of_a_loader_and_users_errors_through() -> None:
    made = watches(dist.HashStore())
    with pytest.raises(StopIteration), made[0].guard():
        next(iter([]))
    with pytest.raises(KeyError, match="mine"), made[1].guard():
        raise KeyError("mine")
    with pytest.raises(RankFailure, match="rank 1 failed in setting up: KeyError: 'mine'") as caught, made[2].guard():
        raise RuntimeError(LOST)
    assert str(caught.value.__cause__) == LOST
    for watch in made:
        watch.stop()


def test_one_process_is_not_watched() -> None:
    store = dist.HashStore()
    watch = RankWatch(store=store, rank=0, world_size=1, timeout=timedelta(seconds=1))
    before = store.num_keys()
    watch.start()
    watch.at("training step", 1)
    with pytest.raises(RuntimeError, match="Connection closed"), watch.guard():
        raise RuntimeError(LOST)
    watch.stop()
    assert store.num_keys() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(LOST), True),
        (RuntimeError("[a/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation"), True),
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:526] Application timeout caused pair closure"), True),
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:1] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("[a/gloo/transport/tcp/pair.cc:1] writev [127.0.0.1]:1: Broken pipe"), True),
        (
            RuntimeError("[enforce fail at a/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
            False,
        ),
        (RuntimeError("s3: Connection reset by peer"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (ValueError("bad row"), False),
    ],
)
def test_what_a_failed_communication_looks_like(error: Exception, expected: bool) -> None:
    assert is_communication_failure(error) is expected
    wrapped = KeyError("while cleaning up")
    wrapped.__context__ = error
    assert is_communication_failure(wrapped) is expected


@pytest.mark.parametrize(
    "wrong", [{"interval": 0.0}, {"timeout": timedelta(0)}, {"rank": 2}, {"rank": -1}, {"interval": float("nan")}]
)
def test_wrong_settings_are_refused_by_name(wrong: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"rank": 0, "world_size": 2, "timeout": timedelta(seconds=1), **wrong}
    with pytest.raises(MisconfigurationException, match=next(iter(wrong))):
        RankWatch(store=dist.HashStore(), **settings)
