"""A rank that is killed, raises or stalls in a Trainer's run: it ends in time, names the rank, leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TIMEOUT, STEP = 8, 3
SECONDS = TIMEOUT + 30
"""The time-out, the evidence (9 s at most), and starting two interpreters on a machine that has other work."""


def main(misfortune: str, met: Path) -> None:
    """What a user's script is; Lightning starts it once more, as rank 1."""
    import lightning.pytorch as pl
    import torch

    from lightning_gr.plugins import SequenceBalancedStrategy

    torch.set_num_threads(1)

    class Rows(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Any:
            if misfortune == "raise" and os.environ.get("LOCAL_RANK") == "1" and index >= 2 * STEP:
                raise ValueError("row 7 has no label")
            return torch.ones(4)

    class Strategy(SequenceBalancedStrategy):
        def setup_environment(self) -> None:
            # The time-out is that of the first meeting too, and rank 1 only now begins to import.
            if self.global_rank == 1:
                met.touch()
            while not met.exists():
                time.sleep(0.1)
            super().setup_environment()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == STEP and self.global_rank == 1:
                print("misfortune at", time.time(), flush=True)
                if misfortune == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if misfortune == "sleep":
                    time.sleep(600)
            return self.net(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=Strategy(timeout=timedelta(seconds=TIMEOUT)),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=1, num_workers=int(misfortune == "raise")))
    print("the end", flush=True)


def members(session: int) -> list[str]:
    """Living processes of a session, by /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state not in "ZX":
            found.append(f"{folder.name}: {(folder / 'cmdline').read_text()}")
    return found


def run(misfortune: str, folder: Path) -> tuple[int, str, float]:
    """Exit status, all output, and seconds from the misfortune to the end of the last process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, misfortune, str(folder / "met")],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            begin, since = time.time(), None
            while process.poll() is None or members(process.pid):
                time.sleep(0.2)
                said = (folder / "output").read_text()
                if since is None and "misfortune at" in said:
                    since = time.time()
                if since is None and "row 7 has no label" in said:
                    since = time.time()
                assert time.time() - (since or begin + 120) < SECONDS, f"{members(process.pid)} {said}"
        finally:
            for line in members(process.pid):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
            process.wait()
    assert since is not None
    return process.returncode, (folder / "output").read_text(), time.time() - since


def test_a_killed_rank_is_named_and_takes_the_run_with_it(tmp_path: Path) -> None:
    status, said, seconds = run("kill", tmp_path)
    assert status != 0
    assert seconds < SECONDS
    assert "the end" not in said
    assert "rank 1 (pid " in said
    assert "has given no sign of life" in said


def test_an_error_in_a_worker_surfaces_with_its_traceback(tmp_path: Path) -> None:
    status, said, seconds = run("raise", tmp_path)
    assert status != 0
    assert seconds < SECONDS
    assert "the end" not in said
    assert "Caught ValueError in DataLoader worker process 0" in said
    assert 'raise ValueError("row 7 has no label")' in said
    assert "rank 1 failed in" in said


def test_a_rank_that_sleeps_is_named(tmp_path: Path) -> None:
    status, said, seconds = run("sleep", tmp_path)
    assert status != 0
    assert seconds < SECONDS
    assert "the end" not in said
    assert "rank 1 (pid " in said
    assert "has stood in training step 3" in said


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
