"""`lightning-gr compare`: real runs against the same by hand, restarts, failures, statistics, one line a mistake."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.cli import compare_asked, compare_runs, compare_statistics, main
from lightning_gr.cli.errors import UserError
from lightning_gr.data.synthetic import write_synthetic_log
from tests.forked_command import run_command

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SETTINGS = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"]
COMPARE = ["compare", "one.yaml", "two.yaml", "--seeds", "2", "--json", "numbers.json", "--", *SETTINGS]


def run(folder: Path, *words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "lightning_gr", *words]
    done = run_command(command, cwd=folder, env=ENV)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def rows(numbers: Any) -> dict[str, Any]:
    return {row["recipe"]: row for row in numbers["recipes"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it, with the comparison of two small recipes whose paths are relative to it."""
    folder = tmp_path_factory.mktemp("compare")
    write_synthetic_log(folder / "events.csv", num_users=80, num_items=40, mean_length=10, max_length=20)
    recipe = yaml.safe_load(recipes.path("hstu/tiny").read_text())
    recipe["trainer"]["devices"] = 1
    recipe["data"]["init_args"] |= {"path": "events.csv", "global_tokens": 256}
    recipe["model"]["init_args"]["encoder"]["init_args"] |= {"dim": 16, "num_layers": 1}
    (folder / "one.yaml").write_text(yaml.safe_dump(recipe))
    recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.02
    checkpoint = next(x for x in recipe["trainer"]["callbacks"] if x["class_path"].endswith("ResumeCheckpoint"))
    checkpoint["init_args"]["dirpath"] = "shared"  # all runs would write into it
    (folder / "two.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "broken.yaml").write_text("model: {init_args: {temperature: -1.0}}")
    (folder / "said.txt").write_text(run(folder, *COMPARE))
    return folder


@pytest.mark.slow
def test_two_recipes_with_two_seeds(folder: Path) -> None:
    said = (folder / "said.txt").read_text()
    for line in ("[1/4] one, seed 1: started", "[2/4] two, seed 1: started", "[4/4] two, seed 2: "):
        assert line in said
    assert "above 0" in said
    numbers = read(folder / "numbers.json")
    one, two = rows(numbers)["one"], rows(numbers)["two"]
    items, dim = 40, 16
    for row in (one, two):
        assert row["failed"] == {}
        assert row["parameters"] > items * dim
        assert 0 < row["minutes"] < 1
    for metric in ("test/HR@10", "test/NDCG@10"):
        a, b = ([row["runs"][seed]["metrics"][metric] for seed in "12"] for row in (one, two))
        assert a[0] != a[1]
        assert one["metrics"][metric]["mean"] == pytest.approx(sum(a) / 2)
        assert f"{sum(a) / 2:.4f} ± " in said
        # Of two values: half their distance times tan(0.475 pi).
        assert one["metrics"][metric]["half_width"] == pytest.approx(abs(a[0] - a[1]) / 2 * math.tan(0.475 * math.pi))
        against = two["against_first"][metric]
        assert against["differences"] == {"1": b[0] - a[0], "2": b[1] - a[1]}
        assert against["above_zero"] == (against["mean"] - against["half_width"] > 0)
    assert "against_first" not in one
    assert not (folder / "shared").exists()
    assert {x.name for x in (folder / "outputs").iterdir()} == {"compare"}


@pytest.mark.slow
def test_a_run_is_what_fit_and_test_give_by_hand(folder: Path) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "hand", "name": "", "version": "logs"}}
    common = ["--config", "one.yaml", *SETTINGS, "--seed_everything=2", "--trainer.logger", json.dumps(logger)]
    # Two commands of one interpreter, which saves the seconds of a second start.
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom lightning_gr.cli import main\n"
        "common = json.loads(sys.argv[1])\nassert main(['fit', *common]) == 0\n"
        "(checkpoint,) = Path('hand/logs/checkpoints').glob('best.ckpt')\n"
        "sys.exit(main(['test', *common, '--ckpt_path', str(checkpoint)]))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(common)]
    done = run_command(command, cwd=folder, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout
    (checkpoint,) = (folder / "hand" / "logs" / "checkpoints").glob("best.ckpt")
    result = rows(read(folder / "numbers.json"))["one"]["runs"]["2"]
    assert Path(result["checkpoint"]).name == checkpoint.resolve().name
    reached = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    assert len(reached) >= 3
    for name, value in reached.items():
        (line,) = [x for x in printed.splitlines() if f" {name} " in x]
        assert float(line.strip("│ ").split("│")[1]) == pytest.approx(value, abs=1e-6)


@pytest.mark.slow
def test_a_second_time_nothing_is_run(folder: Path) -> None:
    files = {x: x.stat().st_mtime_ns for x in (folder / "outputs" / "compare").rglob("*") if x.is_file()}
    numbers = read(folder / "numbers.json")
    said = run(folder, *COMPARE)
    assert said.count(": there already, test/HR@10 ") == 4
    assert "started" not in said
    assert {x: x.stat().st_mtime_ns for x in files} == files
    assert read(folder / "numbers.json") == numbers


@pytest.mark.slow
def test_a_failing_recipe_is_left_out(folder: Path) -> None:
    words = ["one.yaml", "one.yaml+broken.yaml", "--seeds=1,", "--json=failed.json", "--", *SETTINGS]
    said = run(folder, "compare", *words, code=2)
    log = Path("outputs/compare/one+broken/seed-1/log.txt")
    assert "[2/2] one+broken, seed 1: failed after" in said
    assert "temperature=-1.0: expected a number above 0" in said
    assert said.splitlines()[-1] == (
        f"lightning-gr: error: compare: 1 of 2 runs failed; read {log}; the others are not run again"
    )
    assert "temperature=-1.0" in (folder / log).read_text()
    assert "one+broken is left out" in said
    assert "1 of 1" in said
    row = rows(read(folder / "failed.json"))["one+broken"]
    assert "temperature=-1.0" in row["failed"]["1"]
    assert row["runs"] == {}


@pytest.mark.slow
def test_an_unknown_metric_lists_the_ones_there_are(folder: Path) -> None:
    said = run(folder, "compare", "one.yaml", "--seeds=1", "--metrics", "test/HR@99", "--", *SETTINGS, code=2)
    assert "--metrics test/HR@99: one has no such metric; there are: " in said
    assert "test/HR@10, " in said


@pytest.mark.slow
def test_told_to_stop_it_leaves_no_process(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "lightning_gr", "compare", "one.yaml", "--seeds=1", "--output=stopped"]
    process = subprocess.Popen(command, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "started" in process.stdout.readline()
    process.terminate()
    assert process.communicate(timeout=60)[1] == "lightning-gr: interrupted\n"
    assert process.returncode == 130
    wanted = str(folder / "stopped").encode()

    def left() -> list[Path]:
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                found += [file] if wanted in file.read_bytes() else []
        return found

    # Processes that were killed take a moment to go.
    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


def test_what_decides_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("a")
    first = compare_runs.fingerprint([file], ["--x=1"], 1)
    assert compare_runs.fingerprint([file], ["--x=1"], 1) == first
    others = [compare_runs.fingerprint([file], ["--x=2"], 1), compare_runs.fingerprint([file], ["--x=1"], 2)]
    monkeypatch.setenv("LIGHTNING_GR_FIT__TRAINER__MAX_EPOCHS", "5")
    others.append(compare_runs.fingerprint([file], ["--x=1"], 1))
    monkeypatch.undo()
    file.write_text("# a comment at the head\n# Expected: nothing\na")
    assert compare_runs.fingerprint([file], ["--x=1"], 1) == first
    file.write_text("b")
    others.append(compare_runs.fingerprint([file], ["--x=1"], 1))
    assert len({first, *others}) == 5


def test_quantiles_of_student() -> None:
    # Closed forms of one and two degrees of freedom, then printed tables.
    assert compare_statistics.t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert compare_statistics.t_quantile(2) == pytest.approx(math.sqrt(2 * 0.95**2 / (1 - 0.95**2)), rel=1e-12)
    for freedom, t in ((3, 3.182446305), (4, 2.776445105), (9, 2.262157163), (30, 2.042272456), (120, 1.979930405)):
        assert compare_statistics.t_quantile(freedom) == pytest.approx(t, abs=1e-8)
    assert compare_statistics.t_quantile(7, 0.99) == pytest.approx(3.499483297, abs=1e-8)
    # The density, integrated.
    for freedom in (1, 5, 6, 19):
        x = np.linspace(0, compare_statistics.t_quantile(freedom, 0.9), 20001)
        scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
        density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
        assert 2 * x[1] * (density.sum() - (density[0] + density[-1]) / 2) == pytest.approx(0.9, abs=1e-7)


def test_intervals_and_paired_differences() -> None:
    found = compare_statistics.interval([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    # Deviations -2, -1, 3: variance 7, so the half width is 4.3027 times the root of 7 / 3.
    assert found.half_width == pytest.approx(4.302652730 * math.sqrt(7 / 3), rel=1e-8)
    assert found.lower == pytest.approx(3.0 - 6.572399, abs=1e-4)
    assert f"{found:+.4f}" == "+3.0000 ± 6.5724"
    alone = compare_statistics.interval([0.5])
    assert (alone.half_width, alone.lower, f"{alone:.4f}") == (None, None, "0.5000")
    assert math.isnan(compare_statistics.interval([1.0, math.nan]).half_width or 0.0)
    differences = compare_statistics.paired({1: 0.5, 2: 0.75, 3: 1.0}, {3: 0.5, 1: 0.25, 4: 9.0})
    assert differences == {1: 0.25, 3: 0.5}
    # The means lie far inside each other's intervals; seed by seed the second one is better.
    base, better = {1: 0.1, 2: 0.5, 3: 0.9}, {1: 0.11, 2: 0.512, 3: 0.911}
    lower = compare_statistics.interval(list(compare_statistics.paired(better, base).values())).lower
    assert lower is not None
    assert lower > 0
    assert compare_statistics.interval(list(better.values())).lower < base[1]  # type: ignore[operator]


def test_seeds_and_names(tmp_path: Path) -> None:
    assert compare_asked.parse_seeds("3") == [1, 2, 3]
    assert compare_asked.parse_seeds("7, 8,9") == [7, 8, 9]
    assert compare_asked.parse_seeds("7,") == [7]
    for name in ("a/x.yaml", "b/x.yaml", "y.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("seed_everything: 1\n")
    given = [*(str(tmp_path / name) for name in ("a/x.yaml", "b/x.yaml", "y.yaml")), "hstu/tiny"]
    given.append(f"{given[0]}+{given[2]}")
    found = compare_asked.contenders(given)
    assert [x.name for x in found] == ["a/x", "b/x", "y", "hstu/tiny", "a/x+y"]
    assert found[-1].files == ((tmp_path / "a/x.yaml").resolve(), (tmp_path / "y.yaml").resolve())
    (tmp_path / "c+d.yaml").write_text("seed_everything: 1\n")
    assert [x.name for x in compare_asked.contenders([str(tmp_path / "c+d.yaml")])] == ["c+d"]
    with pytest.raises(UserError, match="is there twice"):
        compare_asked.contenders(["hstu/tiny", "hstu/tiny.yaml"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hstu/tinny"], "hstu/tinny: unknown recipe; did you mean the recipe hstu/tiny"),
        (["absent.yaml"], "absent.yaml: no such file; "),
        (["{a: 1}"], "{a: 1}: no recipe and no file; "),
        ([], "compare: the following arguments are required: RECIPE; "),
        (["hstu/tiny", "--seeds", "0"], "--seeds 0: no seeds; give at least 1"),
        (["hstu/tiny", "--seeds=-1"], "--seeds -1: no number of seeds; "),
        (["hstu/tiny", "--seeds", "many"], "--seeds many: no number of seeds; "),
        (["hstu/tiny", "--seeds", "7,7"], "--seeds 7,7: a seed is there twice; "),
        (["hstu/tiny", "--seeds", "1,4294967296"], "--seeds 1,4294967296: 4294967296 is too large; "),
        (["hstu/tiny", "--json", "absent/x.json"], "--json absent/x.json: no such folder; make it first"),
        (["hstu/tiny", "--trainer.max_epochs", "1"], "compare: unrecognized arguments: --trainer.max_epochs 1; "),
        (["hstu/tiny", "--", "--seed_everything=3"], "--seed_everything: every run has its own; "),
        (["hstu/tiny", "--", "--config", "absent.yaml"], "--config absent.yaml: no such file; "),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lightning-gr: error: {said}")
    assert list(tmp_path.iterdir()) == []


def test_help_without_torch() -> None:
    script = (
        "import sys\nfrom lightning_gr.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit as ended:\n    print('exit', ended.code)\n"
        "print([x for x in ('torch', 'lightning', 'numpy', 'jsonargparse') if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENV, check=True)
    assert done.stdout.splitlines()[-2:] == ["exit 0", "[]"]
    assert "--seeds" in done.stdout
