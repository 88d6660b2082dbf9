"""`lightning-gr verify`: real runs, runs that are there already, verdicts by hand, one line a mistake."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.cli import compare_asked, compare_runs, main, verify
from lightning_gr.data.synthetic import write_synthetic_log
from tests.forked_command import run_command

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
EXPECTED = "# A recipe\n# Data:     a log\n# Expected: {}; more\n\n"
BOTH = "test HR@10 {:.4f} ± .0001, NDCG@10 {:.4f} ± .0001"


def planted(folder: Path, expected: str, results: dict[int, float], settings: list[str] | None = None) -> Path:
    """A recipe, and what its runs would have left, had they reached these values."""
    file = folder / "mine.yaml"
    file.write_text(EXPECTED.format(expected) + "trainer: {}\ndata: {init_args: {path: events.csv}}\n")
    (folder / "events.csv").touch()
    (recipe,) = compare_asked.contenders([str(file)])
    for seed, value in results.items():
        run = compare_runs.folder_of(folder / "outputs" / "verify", recipe.name, seed)
        run.mkdir(parents=True, exist_ok=True)
        key = compare_runs.fingerprint(recipe.files, settings or [], seed)
        metrics = {"test/HR@10": value, "test/NDCG@10": value / 2, "val/loss": 1.0}
        (run / "result.json").write_text(json.dumps({"key": key, "metrics": metrics, "parameters": 1, "seconds": 1.0}))
    return file


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- what is said of results ---------------------------------------------------------------------------------------


def test_the_mean_is_held_against_the_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path, "test HR@10 .5 ± .05, NDCG@10 .2 ± .03", {1: 0.4, 2: 0.5, 3: 0.66})
    assert main(["verify", "mine.yaml", "--seeds", "3", "--json"]) == 1
    said = capsys.readouterr().out
    assert "seed 2: there already, test/HR@10 0.5000" in said
    assert "started" not in said
    numbers = last_line(said)
    hit_rate, gain = numbers["metrics"]["test/HR@10"], numbers["metrics"]["test/NDCG@10"]
    # Mean .52; deviations -.12, -.02, .14: variance .0172, and 4.302653 is Student's t of two degrees of freedom.
    assert hit_rate["mean"] == pytest.approx(0.52)
    assert hit_rate["half_width"] == pytest.approx(4.302653 * math.sqrt(0.0172 / 3), rel=1e-6)
    assert hit_rate["values"] == {"1": 0.4, "2": 0.5, "3": 0.66}
    assert (hit_rate["verdict"], gain["verdict"]) == ("within", "above")
    assert numbers["within"] is False
    (row,) = [line for line in said.splitlines() if line.startswith("│ test/HR@10")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "test/HR@10",
        "0.5000 ± 0.0500",
        "0.4000",
        "0.5000",
        "0.6600",
        "0.5200 ± 0.3258",
        "within",
    ]
    assert "mine: not as expected: test/NDCG@10. Header: test HR@10 .5 ± .05" in said


@pytest.mark.parametrize(
    ("expected", "code", "verdict"),
    [(".45 ± .01", 0, "within"), (".46 ± .01", 0, "within"), (".47 ± .01", 1, "below"), (".4 ± .049", 1, "above")],
)
def test_the_exit_code_follows_the_header(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: str, code: int, verdict: str
) -> None:
    planted(tmp_path, f"test HR@10 {expected}", {7: 0.4, 8: 0.5})
    assert main(["verify", "mine.yaml", "--seeds", "7,8", "--json"]) == code
    numbers = last_line(capsys.readouterr().out)
    assert numbers["metrics"]["test/HR@10"]["verdict"] == verdict
    assert numbers["within"] is (code == 0)
    assert list(numbers["metrics"]) == ["test/HR@10"]


def test_one_seed_has_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path, "test HR@10 .4 ± .01", {1: 0.4})
    assert main(["verify", "mine.yaml", "--seeds=1", "--json"]) == 0
    numbers = last_line(capsys.readouterr().out)
    assert numbers["metrics"]["test/HR@10"]["half_width"] is None
    assert numbers["seeds"] == [1]


def test_what_is_no_number_is_not_within(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path, "test HR@10 .4 ± .01", {1: 0.4, 2: math.nan})
    assert main(["verify", "mine.yaml", "--seeds=2", "--json"]) == 1
    found = last_line(capsys.readouterr().out)["metrics"]["test/HR@10"]
    assert (found["verdict"], found["mean"]) == ("not finite", None)


def test_settings_belong_to_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").touch()
    settings = ["--data.init_args.path", "other.csv", "--trainer.max_epochs=2", "--model.init_args.top_k=[10]"]
    planted(tmp_path, "test HR@10 .4 ± .01", {1: 0.4}, settings)
    words = ["verify", "mine.yaml", *settings[:2], "--seeds", "1", settings[2], "--json", "--", settings[3]]
    assert main(words) == 0
    assert last_line(capsys.readouterr().out)["settings"] == settings


def test_an_overlay_is_judged_by_its_own_figures_and_else_it_is_said_by_whose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = planted(tmp_path, "test HR@10 .4 ± .01", {})
    for head, verdict, warnings in (
        ("Expected: test HR@10 .9 ± .01", "within", []),
        (
            "Expected: loses; table 3",
            "above",
            ["mine+overlay: judged by the header of mine.yaml, since overlay.yaml expects no figures"],
        ),
        ("Launch: somehow", "above", ["mine+overlay: judged by the header of mine.yaml, since overlay.yaml expects"]),
    ):
        (tmp_path / "overlay.yaml").write_text(f"# An overlay\n# {head}\n\ntrainer: {{}}\n")
        (recipe,) = compare_asked.contenders(["mine.yaml+overlay.yaml"])
        folder = compare_runs.folder_of(tmp_path / "outputs" / "verify", recipe.name, 1)
        folder.mkdir(parents=True, exist_ok=True)
        key = compare_runs.fingerprint(recipe.files, [], 1)
        result = {"key": key, "metrics": {"test/HR@10": 0.9}, "parameters": 1, "seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(result))
        assert main(["verify", "mine.yaml+overlay.yaml", "--seeds=1", "--json"]) == (verdict != "within")
        said = capsys.readouterr().out
        numbers = last_line(said)
        assert numbers["metrics"]["test/HR@10"]["verdict"] == verdict
        assert len(numbers["warnings"]) == len(warnings)
        for found, wanted in zip(numbers["warnings"], warnings, strict=True):
            assert found.startswith(wanted)
            assert f"warning: {found}" in said
    assert file.exists()


def test_a_folder_without_a_best_checkpoint_has_its_last_one_tested_and_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, "test HR@10 .4 ± .01", {})
    results = {"metrics": {"test/HR@10": 0.4}, "parameters": 1, "seconds": 1.0}
    monkeypatch.setattr(verify, "run", lambda *_, **__: None)
    monkeypatch.setattr(verify, "stored", lambda *_: results)
    (tmp_path / "saved" / "last.ckpt").mkdir(parents=True)
    for place, warnings in (
        ("saved", ["--ckpt_path saved: has no best.ckpt; what is tested is last.ckpt"]),
        ("saved/best.ckpt", []),
    ):
        (tmp_path / place).mkdir(exist_ok=True)
        assert main(["verify", "mine.yaml", "--ckpt_path", "saved", "--json"]) == 0
        said = capsys.readouterr().out
        assert last_line(said)["warnings"] == warnings
        assert all(f"warning: {each}" in said for each in warnings)


def test_a_metric_that_no_run_has_logged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path, "test HR@99 .4 ± .01", {1: 0.4})
    assert main(["verify", "mine.yaml", "--seeds=1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lightning-gr: error: # Expected: test/HR@99: mine has no such metric; there are: test/HR@10, test/NDCG@10, "
        "val/loss"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "verify: the recipe is missing; it comes first: lightning-gr verify RECIPE"),
        (["--seeds", "1", "hstu/tiny"], "verify: the recipe is missing; it comes first"),
        (
            ["hstu/tiny", "mtgr/tiny"],
            "verify: mtgr/tiny: is neither a setting nor its value; give one recipe at a time",
        ),
        (["hstu/tinny"], "hstu/tinny: unknown recipe; did you mean the recipe hstu/tiny"),
        (["absent.yaml"], "absent.yaml: no such file; "),
        (["hstu/tiny", "--seeds", "0"], "--seeds 0: no seeds; give at least 1"),
        (["hstu/tiny", "--seeds", "x"], "--seeds x: no number of seeds; "),
        (["hstu/tiny", "--seed_everything=3"], "--seed_everything: every run has its own; "),
        (["hstu/tiny", "--seeds", "2", "--ckpt_path", "x"], "--seeds 2: a checkpoint is trained already; leave out "),
        (
            ["hstu/tiny"],
            "hstu/tiny: data.init_args.path=outputs/demo/events.csv: no such file or folder; give the data",
        ),
        (["hstu/tiny", "--data.init_args.max_length=9"], "hstu/tiny: data.init_args.path=outputs/demo/events.csv: no"),
        (["hstu/tiny", "--data.init_args.path", "absent.csv"], "--data.init_args.path absent.csv: no such file or fo"),
        (["hstu/tiny", "--data.init_args.path=absent.csv"], "--data.init_args.path absent.csv: no such file or folde"),
        (["hstu/tiny", "--data.init_args.path", ".", "--ckpt_path", "absent"], "--ckpt_path absent: no such file or "),
        (["hstu/tiny", "--data.init_args.path", ".", "--ckpt_path", "."], "--ckpt_path .: is no complete checkpoint, "),
        (["hstu/tiny", "--config", "absent.yaml"], "--config absent.yaml: no such file; "),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-gr: error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_which_nothing_is_known_says_what_others_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "hstu/ml-1m"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "hstu/ml-1m: nothing to verify, its header says: not yet measured; the data was not at hand." in line
    assert "Published: HR@10 .3097, NDCG@10 .1720 by Meta" in line
    assert "lightning-gr compare hstu/ml-1m --seeds 3" in line


def test_a_checkpoint_of_another_recipe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(tmp_path, "test HR@10 .4 ± .01", {})
    (tmp_path / "other.ckpt").mkdir()
    (tmp_path / "other.ckpt" / "meta.pt").touch()
    tested = str((tmp_path / "other.ckpt").resolve())
    started = []

    def fail(words: list[str], **_: Any) -> str:
        started.append(words)
        return f"checkpoint {tested}: head.weight has shape (16,), the model wants (32,)"

    monkeypatch.setattr(verify, "run", fail)
    assert main(["verify", "mine.yaml", "--ckpt_path", "other.ckpt", "--trainer.devices=1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--ckpt_path {tested}: its test as mine failed: head.weight has shape (16,), the model wants (32,)" in line
    assert line.endswith("give a checkpoint that this recipe has trained, with the settings it was trained with")
    config = ["--config", str((tmp_path / "mine.yaml").resolve())]
    assert started == [["test", *config, "--trainer.devices=1", "--ckpt_path", tested]]


def test_a_header_without_expectation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("# Mine\ntrainer: {}\n")
    assert main(["verify", "mine.yaml"]) == 2
    assert "mine.yaml: its header has no expectation; write a line such as" in capsys.readouterr().err


def test_help_without_torch() -> None:
    script = (
        "import sys\nfrom lightning_gr.cli import main\n"
        "try:\n    main(['verify', '--help'])\nexcept SystemExit as ended:\n    print('exit', ended.code)\n"
        "print([x for x in ('torch', 'lightning', 'numpy', 'jsonargparse') if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout.splitlines()[-2:] == ["exit 0", "[]"]
    assert "--ckpt_path" in done.stdout


# ---- for real ------------------------------------------------------------------------------------------------------


def run(folder: Path, *words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "lightning_gr", "verify", *words]
    done = run_command(command, cwd=folder, env=ENV, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_small_recipe_and_its_checkpoint(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    recipe = yaml.safe_load(recipes.path("hstu/tiny").read_text())
    recipe["trainer"] |= {"devices": 1, "max_epochs": 1, "check_val_every_n_epoch": 1}
    recipe["data"]["init_args"] |= {"path": "events.csv", "global_tokens": 256}
    recipe["model"]["init_args"]["encoder"]["init_args"] |= {"dim": 16, "num_layers": 1}
    text = yaml.safe_dump(recipe)
    (tmp_path / "small.yaml").write_text(EXPECTED.format("test HR@10 7 ± .1") + text)
    said = run(tmp_path, "small.yaml", "--seeds=1", "--json", code=1)
    assert "small, seed 1: started" in said
    reached = last_line(said)["metrics"]["test/HR@10"]["mean"]
    result = json.loads((tmp_path / "outputs/verify/small/seed-1/result.json").read_text())["metrics"]
    assert reached == result["test/HR@10"]
    assert 0 < result["test/NDCG@10"] < 1

    # With other figures in the header nothing is trained again.
    expected = BOTH.format(result["test/HR@10"], result["test/NDCG@10"])
    (tmp_path / "small.yaml").write_text(EXPECTED.format(expected) + text)
    said = run(tmp_path, "small.yaml", "--seeds=1")
    assert "there already" in said
    assert "small: as expected." in said

    checkpoints = "outputs/verify/small/seed-1/logs/checkpoints"
    numbers = last_line(run(tmp_path, "small.yaml", "--ckpt_path", checkpoints, "--json"))
    assert numbers["seeds"] == []
    assert numbers["metrics"]["test/NDCG@10"]["mean"] == pytest.approx(result["test/NDCG@10"], abs=1e-6)
