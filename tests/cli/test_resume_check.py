"""`lightning-gr resume-check`: shipped recipes pass, planted faults are named by their kind, one line a mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_gr.checkpoint.reader import CheckpointReader
from lightning_gr.checkpoint.storage import Storage
from lightning_gr.checkpoint.tensors import write_tensors
from lightning_gr.checkpoint.writer import recommit
from lightning_gr.cli import main
from lightning_gr.cli.resume_check import report_of, show
from lightning_gr.cli.resume_check_compare import KINDS, TOLERANCE, Difference, compare, read_state
from lightning_gr.cli.resume_check_process import FINAL, Said
from lightning_gr.cli.resume_check_runs import Runs
from lightning_gr.data.synthetic import write_synthetic_log
from tests.forked_command import run_command

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),  # these tests change files of one
]

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS, AT = 6, 3
SMALL = [
    "--steps=6",
    "--at=3",
    "--data.init_args.path=events.csv",
    "--data.init_args.global_tokens=256",
    "--model.init_args.encoder.init_args.dim=16",
    "--model.init_args.encoder.init_args.num_layers=1",
    "--model.init_args.dynamic_tables.policy.admission.min_count=6",
]
DYNAMIC = {
    "dynamic tables: keys",
    "dynamic tables: values",
    "dynamic tables: optimiser",
    "dynamic tables: counters",
    "dynamic tables: clocks",
}
STATIC = {"static tables", "static tables' optimiser"}

# A run that is resumed by three processes goes on from other weights than were saved.
FAULT = """
import lightning.pytorch as pl


class Fault(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.world_size == 3:
            pl_module.encoder.layers[0].uvqk.weight.data += 0.5
"""


def command(folder: Path, *words: str, code: int = 0) -> tuple[str, Any]:
    """What it says, and the object in its last line."""
    found = [str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]
    done = run_command(
        [sys.executable, "-m", "lightning_gr", "resume-check", *words, "--json"],
        cwd=folder,
        env={**ENV, "PYTHONPATH": os.pathsep.join(found)},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a dynamic recipe was checked on 1, 2 and 3 processes, with a fault on 3."""
    folder = tmp_path_factory.mktemp("resume-check")
    write_synthetic_log(folder / "events.csv", num_users=300, num_items=60, mean_length=10, max_length=20)
    (folder / "faulty.py").write_text(FAULT)
    words = ["--config=hstu/tiny-dynamic", "--world=1,2,3", "--output=out", *SMALL, "--background"]
    text, report = command(folder, *words, "--trainer.callbacks+=faulty.Fault", code=1)
    (folder / "said.txt").write_text(text)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.recipe
@pytest.mark.long  # test_readme runs the same command
def test_the_smallest_recipe_passes_as_it_is_shipped(tmp_path: Path) -> None:
    said, report = command(tmp_path, "--config", "hstu/tiny", "--world", "1,2,3")
    assert (tmp_path / "outputs" / "demo" / "events.csv").is_file()
    assert "Writing a synthetic event log to outputs/demo/events.csv" in said
    assert "resume-check: OK" in said
    assert report["ok"]
    assert (report["steps"], report["at"], report["without_dropout"]) == (12, 7, [2, 3])
    for world, row in report["worlds"].items():
        assert set(row["kinds"]) == set(KINDS)
        compared = {kind for kind, x in row["kinds"].items() if x["entries"]}
        assert compared >= set(KINDS) - DYNAMIC - {"waiting for admission", "callbacks, others"}
        for kind, x in row["kinds"].items():
            assert x["ok"]
            assert x["problems"] == []
            assert x["absolute"] == 0 or (world != "1" and KINDS[kind] and x["relative"] <= TOLERANCE)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.recipe
def test_dynamic_tables_pass_and_a_fault_in_one_run_is_named(folder: Path) -> None:
    worlds = json.loads((folder / "report.json").read_text())["worlds"]
    assert {world: row["ok"] for world, row in worlds.items()} == {"1": True, "2": True, "3": False}
    for row in worlds.values():
        compared = {kind for kind, x in row["kinds"].items() if x["entries"]}
        assert compared >= set(KINDS) - STATIC - {"callbacks, others"}
    wrong = {kind for kind, x in worlds["3"]["kinds"].items() if not x["ok"]}
    assert wrong >= {"dense weights", "dense optimiser", "dynamic tables: values", "losses"}
    assert wrong.isdisjoint(kind for kind, is_approximate in KINDS.items() if not is_approximate)
    weights = worlds["3"]["kinds"]["dense weights"]
    assert 0.1 < weights["absolute"] < 1
    said = (folder / "said.txt").read_text()
    assert "resume-check: FAILED" in said
    assert f"dense weights, 3 processes: {weights['worst']} by " in said


def test_a_run_that_cannot_be_resumed_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path, [], STEPS, AT, background=False)
    runs.first, runs.failures = 1, {1: "checkpoint x: damaged", 2: "checkpoint x: has no y"}
    assert not show({}, runs, [1, 2])
    said = capsys.readouterr().out
    assert "1 process: checkpoint x: damaged" in said
    assert "2 processes: checkpoint x: has no y" in said
    assert "resume-check: FAILED" in said
    report = report_of({}, runs, [1, 2], ok=False)
    assert report["worlds"]["2"] == {"ok": False, "failure": "checkpoint x: has no y"}


# ---- faults in the last checkpoint -------------------------------------------------------------------------------


def said_by(folder: Path, run: str) -> list[Said]:
    return [Said(**json.loads((folder / "out" / run / "said-0.json").read_text()))]


def differences(folder: Path, final: Path) -> dict[str, Difference]:
    states = []
    for run, checkpoint in (("resumed-1", final), ("reference", folder / "out" / "reference" / FINAL)):
        reader = CheckpointReader(checkpoint)
        states.append(read_state(reader, said_by(folder, run), after=AT, ranks=1, merged=False))
    return compare(*states)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors: dict[str, Any] = dict(CheckpointReader(checkpoint).tensors())
    change(tensors)
    for file in checkpoint.glob("*.distcp"):
        file.unlink()
    write_tensors(Storage(checkpoint), tensors)


def first(tensors: dict[str, Tensor], prefix: str) -> str:
    return next(name for name in sorted(tensors) if name.startswith(prefix) and tensors[name].numel() > 1)


def weight(checkpoint: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors[first(tensors, "state_dict.encoder")].flatten()
        values[-1] = torch.nextafter(values[-1], torch.tensor(torch.inf))

    rewrite(checkpoint, change)


def lost_weight(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(first(tensors, "state_dict.encoder")))


def optimiser(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors[first(tensors, "dense_optimizer.")].zero_())


def in_file(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        content = torch.load(checkpoint / name, weights_only=True)
        change(content)
        torch.save(content, checkpoint / name)

    return harm


def in_table(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def harm(checkpoint: Path) -> None:
        file = next(checkpoint.glob("dynamic/*/item/part-*.safetensors"))
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no dictionary
            metadata = opened.metadata()
        change(tensors)
        save_file(tensors, file, metadata)

    return harm


def cursor(meta: Any) -> None:
    """The loader's first whole number moves on by one."""

    def move(tree: Any) -> bool:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(value, int) and not isinstance(value, bool):
                tree[key] = value + 1
                return True
            if isinstance(value, dict | list) and move(value):
                return True
        return False

    assert move(meta["loops"]["fit_loop"]["state_dict"]["combined_loader"])


def rows(tensors: dict[str, Tensor], column: str) -> Any:
    tensors[column][7] += 1


FAULTS: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "a weight by one bit": (weight, {"dense weights"}),
    "a lost weight": (lost_weight, {"dense weights"}),
    "a lost optimiser": (optimiser, {"dense optimiser"}),
    "a counter": (in_table(lambda x: rows(x, "counts")), {"dynamic tables: counters"}),
    "a clock": (in_table(lambda x: rows(x, "last_steps")), {"dynamic tables: clocks"}),
    "a row": (in_table(lambda x: rows(x, "values")), {"dynamic tables: values"}),
    "a row's optimiser": (in_table(lambda x: rows(x, "state")), {"dynamic tables: optimiser"}),
    "the cursor": (in_file("meta.pt", cursor), {"loader's cursor"}),
    "the step": (in_file("meta.pt", lambda x: x.update(global_step=5)), {"loop progress, step"}),
    "a learning rate": (
        in_file("meta.pt", lambda x: x["dense_param_groups"][0][0].update(lr=0.1)),
        {"schedules"},
    ),
    "a generator": (
        in_file("rank-00000-of-00001.pt", lambda x: x["generators"]["torch"].add_(1)),
        {"random generators"},
    ),
    "a lost metric": (in_file("rank-00000-of-00001.pt", lambda x: x["metrics"].clear()), {"metrics"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_resumed_checkpoint_is_named(folder: Path, tmp_path: Path, fault: str) -> None:
    harm, kinds = FAULTS[fault]
    checkpoint = tmp_path / FINAL
    shutil.copytree(folder / "out" / "resumed-1" / FINAL, checkpoint)
    assert all(x.within(0) for x in differences(folder, checkpoint).values())
    harm(checkpoint)
    recommit(checkpoint)
    assert {kind for kind, x in differences(folder, checkpoint).items() if not x.within(0)} == kinds


# ---- comparing ---------------------------------------------------------------------------------------------------


def between(found: Any, wanted: Any) -> Difference:
    empty: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    return compare(empty | {"losses": {"x": found}}, empty | {"losses": {"x": wanted}})["losses"]


@pytest.mark.parametrize(
    ("found", "wanted", "absolute", "relative"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), 2.0, 0.5),
        (torch.tensor([1 << 62]), torch.tensor([(1 << 62) + 1]), 1.0, 1 / (1 << 62)),
        (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.0]), 0.0, 0.0),
        (torch.tensor([torch.nan]), torch.tensor([1.0]), torch.inf, torch.inf),
        (torch.tensor([torch.inf]), torch.tensor([torch.inf]), 0.0, 0.0),
        (torch.tensor([1e-9]), torch.tensor([0.0]), 1e-9, torch.inf),
        (torch.zeros(0), torch.zeros(0), 0.0, 0.0),
        (3, 4, 1.0, 0.25),
        (0.5, 1, 0.5, 0.5),
        (torch.inf, torch.inf, 0.0, 0.0),
    ],
)
def test_distances(found: Any, wanted: Any, absolute: float, relative: float) -> None:
    difference = between(found, wanted)
    assert difference.problems == []
    assert difference.absolute == pytest.approx(absolute, rel=1e-6)
    assert difference.relative == pytest.approx(relative, rel=1e-6)
    assert difference.within(0) is (absolute == 0)
    assert difference.within(TOLERANCE) is (relative <= TOLERANCE)


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        (torch.zeros(2), torch.zeros(3), "float32 (2,) instead of float32 (3,)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), "float32 (2,) instead of int64 (2,)"),
        ("a", "b", "'a' instead of 'b'"),
        (True, False, "True instead of False"),
        (None, 0, "None instead of 0"),
    ],
)
def test_what_is_no_number_has_to_be_the_same(found: Any, wanted: Any, said: str) -> None:
    difference = between(found, wanted)
    assert said in difference.problems[0]
    assert not difference.within(1.0)
    assert between(wanted, wanted).within(0)


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config"),
        (["--config", "hstu/tinny"], "did you mean the recipe hstu/tiny"),
        (["--config", "hstu/tiny", "--steps", "7"], "--steps 7: nothing is left to train after --at 7"),
        (["--config", "hstu/tiny", "--at", "0"], "--at 0"),
        (["--config", "hstu/tiny", "--world", "1,two"], "--world 1,two: no numbers of processes"),
        (["--config", "hstu/tiny", "--world", "0"], "--world 0"),
        (["--config", "hstu/tiny", "--world", "1,1"], "--world 1,1: a number is there twice"),
        (["--config", "hstu/tiny", "--world", "100000"], "100000 processes are too many"),
        (["--config", "hstu/tiny", "--ckpt_path=x"], "--ckpt_path: is set by resume-check"),
        (["--config", "hstu/tiny", "--trainer.devices", "2"], "--trainer.devices: is set by resume-check; use --world"),
        (["--config", "hstu/tiny", "--output", "full"], "--output full: is not empty"),
        (["--config", "hstu/tiny", "--output", "full/file"], "--output full/file: is a file"),
    ],
)
def test_mistakes_are_one_line_at_once(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["resume-check", *words]) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith("lightning-gr: error: ")
    assert len(told.err.splitlines()) == 1
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "full"]


@pytest.mark.slow
@pytest.mark.long
def test_a_mistake_in_the_settings_is_that_of_the_run(tmp_path: Path) -> None:
    words = ["--config", "hstu/tiny", "--world", "1", "--data.init_args.path", "nowhere.csv"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_gr", "resume-check", *words],
        cwd=tmp_path,
        env={**ENV, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lightning-gr: error: resume-check: the killed run failed: nowhere.csv")
    assert "outputs/resume-check/killed/log.txt" in done.stderr
    assert not (tmp_path / "outputs" / "demo").exists()
