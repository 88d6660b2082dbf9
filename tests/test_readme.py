"""What the README tells a user to type is run as it stands there, from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gr.data.synthetic import write_synthetic_log
from tests.forked_command import run_command

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
SCRIPT, OWN_CLI = blocks("python")
(OWN_YAML,) = blocks("yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: an event log, the README's files, nothing of the checkout."""
    folder = tmp_path_factory.mktemp("readme")
    write_synthetic_log(folder / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "train.py").write_text(OWN_CLI)
    (folder / "train.yaml").write_text(OWN_YAML)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_command(command, cwd=folder, env=environment)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    assert "Traceback" not in output
    return output


def shell(line: str) -> list[str]:
    """The words of a command, by this interpreter instead of whatever lies on the path."""
    words = line.split()
    modules = {"lightning-gr": ["-m", "lightning_gr"], "torchrun": ["-m", "torch.distributed.run"], "python": []}
    return [sys.executable, *modules[words[0]], *words[1:]]


def test_every_command_is_one_that_these_tests_know() -> None:
    kinds = {line.split()[0] for line in COMMANDS}
    assert kinds == {"make", "pip", "lightning-gr", "python", "torchrun"}


def test_the_script_is_short_and_trains_on_two_processes(folder: Path) -> None:
    assert len([line for line in SCRIPT.splitlines() if line.strip()]) <= 20
    output = run([sys.executable, "script.py"], folder)
    assert "Starting with 2 processes" in output
    assert "test/NDCG@10" in output


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.split()[0] in ("python", "torchrun")])
def test_a_plain_lightningcli(line: str, folder: Path) -> None:
    output = run(shell(line), folder)
    assert "Starting with 2 processes" in output
    assert "val/NDCG@10" in output


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.startswith("lightning-gr")])
def test_a_command_of_ours(line: str, folder: Path) -> None:
    run(shell(line), folder)
    if "fit" in line:
        assert list(folder.glob("outputs/hstu-tiny/*/checkpoints/best.ckpt"))


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.startswith("make")])
def test_a_target_is_there(line: str) -> None:
    plan = subprocess.run(["make", "-n", *line.split()[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {"demo": "-m lightning_gr demo", "test": "-m pytest"}[line.split()[1]]
    assert wanted in plan.stdout


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.startswith("pip")])
def test_an_extra_is_declared(line: str) -> None:
    (extra,) = re.findall(r"lightning-gr\[(\w+)\]", line)
    assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


def test_the_registry_name_under_a_plain_lightningcli(folder: Path) -> None:
    by_name = OWN_CLI.replace("from lightning", "import lightning_gr.plugins\nfrom lightning", 1)
    (folder / "by_name.py").write_text(by_name)
    settings = re.sub(
        r"  strategy:\n.*\n.*init_args.*\n",
        "  strategy: sequence_balanced\n",
        OWN_YAML.replace("epochs: 2", "epochs: 1"),
    )
    assert "SequenceBalancedStrategy" not in settings
    (folder / "by_name.yaml").write_text(settings)
    output = run([sys.executable, "by_name.py", "fit", "--config", "by_name.yaml"], folder)
    assert "Starting with 2 processes" in output


def test_the_demo_without_its_file_writes_nothing(folder: Path) -> None:
    done = subprocess.run(
        [*shell("lightning-gr demo"), "--data", "absent.csv", "--out", "unmade"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines() == [
        "lightning-gr demo: error: --data absent.csv: no such file; give a CSV, S3-Rec or MovieLens log"
    ]
    assert not (folder / "unmade").exists()


def test_the_demo_on_a_users_file(folder: Path) -> None:
    command = [*shell("lightning-gr demo"), "--data", "events.csv", "--epochs", "1", "--out", "shown"]
    output = run(command, folder)
    assert "most popular items" in output
    assert "as they come" in output
    assert output.count("history ") == 3
    assert list((folder / "shown/predictions").glob("*.parquet"))
    assert (folder / "shown/csv/metrics.csv").is_file()
    assert (folder / "shown/report.html").is_file()
    assert list((folder / "shown/tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "shown/tensorboard/checkpoints").glob("best.ckpt/meta.pt"))
