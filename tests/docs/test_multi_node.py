"""docs/multi-node.md: its commands on two "nodes" of one host, by torchrun and by the variables that SLURM sets."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from lightning_gr.data.synthetic import write_synthetic_log
from tests.docs.fenced import BLOCKS, ROOT, copy_recipe
from tests.forked_command import run_command

HERE = [block for block in BLOCKS if block.page == "multi-node.md"]
(TORCHRUN,) = [line for block in HERE for line in block.commands if line.startswith("torchrun")]
(SBATCH,) = [block.text for block in HERE if block.file == "train.sbatch"]
(SETTINGS,) = [block.text for block in HERE if block.file == "slurm.yaml"]
SMALL = ["--data.init_args.path=events.csv", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_synthetic_log(folder / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    copy_recipe("hstu/tiny", folder / "mine.yaml")
    (folder / "slurm.yaml").write_text(SETTINGS)
    return folder


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def on_both(commands: list[list[str]], folder: Path, environments: list[dict[str, str]]) -> list[str]:
    """Runs a command on each node at the same time; its output, once it has ended well."""
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}

    def run(place: int) -> subprocess.CompletedProcess[str]:
        return run_command(commands[place], cwd=folder, env=common | environments[place], timeout=280)

    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(run, range(2)))
    for node in done:
        assert node.returncode == 0, (node.stdout + node.stderr)[-3000:]
    return [node.stdout + node.stderr for node in done]


def step_of(folder: Path) -> int:
    (manifest,) = folder.glob("outputs/hstu-tiny/*/checkpoints/last.ckpt/manifest.json")
    return int(json.loads(manifest.read_text())["step"])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes_of_torchrun_train_as_one_run(folder: Path) -> None:
    port, commands = free_port(), []
    for node in range(2):
        line = TORCHRUN
        for written, put in (
            ("--node-rank 0", f"--node-rank {node}"),
            ("--nproc-per-node 8", "--nproc-per-node 1"),
            ("--master-addr node0", "--master-addr 127.0.0.1"),
            ("--master-port 29400", f"--master-port {port}"),
            ("--trainer.devices 8", "--trainer.devices 1"),
        ):
            assert written in line
            line = line.replace(written, put)
        words = [*shlex.split(line)[1:], *SMALL]
        commands.append([sys.executable, "-m", "torch.distributed.run", *words])
    first, _ = on_both(commands, folder, [{}, {}])
    assert "Starting with 2 processes" in first
    assert step_of(folder) > 0


@pytest.mark.slow
@pytest.mark.dist
def test_two_tasks_of_slurm_train_as_one_run(folder: Path, tmp_path: Path) -> None:
    for name in ("events.csv", "mine.yaml", "slurm.yaml"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (line,) = re.findall(r"lightning-gr (fit .*) &$", SBATCH, re.M)
    words = [*shlex.split(line), "--trainer.devices=1", *SMALL]
    port = free_port()
    environments = [
        {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "gr",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURM_NNODES": "2",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_PROCID": str(task),
            "SLURM_NODEID": str(task),
            "SLURM_LOCALID": "0",
            "MASTER_PORT": port,
        }
        for task in range(2)
    ]
    first, second = on_both([[sys.executable, "-m", "lightning_gr", *words]] * 2, tmp_path, environments)
    assert "GLOBAL_RANK: 0, MEMBER: 1/2" in first
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in second
    assert step_of(tmp_path) > 0


def test_lightning_reads_slurms_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    for name, value in {
        "SLURM_NTASKS": "16",
        "SLURM_JOB_NAME": "gr",
        "SLURM_PROCID": "11",
        "SLURM_LOCALID": "3",
        "SLURM_NODEID": "1",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_NTASKS_PER_NODE": "8",
    }.items():
        monkeypatch.setenv(name, value)
    settings = yaml.safe_load(SETTINGS)["trainer"]
    (plugin,) = settings["plugins"]
    environment = SLURMEnvironment(**plugin["init_args"])
    assert environment.detect()
    assert not environment.auto_requeue
    assert (environment.world_size(), environment.global_rank()) == (16, 11)
    assert (environment.local_rank(), environment.node_rank(), environment.main_address) == (3, 1, "gpu07")
    environment.validate_settings(num_devices=settings["devices"], num_nodes=settings["num_nodes"])
    with pytest.raises(ValueError, match="devices"):
        environment.validate_settings(num_devices=4, num_nodes=settings["num_nodes"])


def test_the_batch_script_asks_for_what_the_trainer_expects() -> None:
    settings = yaml.safe_load(SETTINGS)["trainer"]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", SBATCH, re.M))
    assert (int(asked["nodes"]), int(asked["ntasks-per-node"])) == (settings["num_nodes"], settings["devices"])
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["signal"].startswith("B:TERM@")


FAKES = {
    "srun": 'trap "touch saved; exit 0" TERM\ntouch started\nfor i in $(seq 100); do sleep 0.1; done\n',
    "scontrol": 'echo "$@" > requeued\n',
}


@pytest.mark.parametrize("preempted", [True, False])
def test_the_batch_script_requeues_what_was_stopped(preempted: bool, tmp_path: Path) -> None:
    """The script itself, with stand-ins for what SLURM brings."""
    script = SBATCH.replace("source .venv/bin/activate\n", "")
    (tmp_path / "train.sbatch").write_text(script)
    for name, text in FAKES.items():
        text = text if preempted else text.replace("seq 100", "seq 1")
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", "train.sbatch"], cwd=tmp_path, env=environment) as process:
        if preempted:
            for _ in range(100):
                if (tmp_path / "started").exists():
                    break
                subprocess.run(["sleep", "0.1"], check=True)
            process.terminate()
        assert process.wait(30) == 0
    assert (tmp_path / "saved").exists() is preempted
    assert (tmp_path / "requeued").exists() is preempted
    if preempted:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
