"""``make bench``: parts are scripts that exist, and one that fails is named and does not stop the others."""

import sys

import pytest
import render
import run_all
from run_all import Part


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A place of its own for scripts, rows and logs; gives the function that writes a script."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for module in (run_all, render):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(run_all, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(run_all, "render", lambda argv: 0)

    def write(name, text):
        (tmp_path / "benchmarks" / f"{name}.py").write_text(text)

    return write


ROW = "import pathlib\npathlib.Path('benchmarks/results/{0}.csv').write_text('commit,x\\nabc,1\\n')\n"


def test_every_part_is_a_script_that_exists():
    for part in run_all.PARTS:
        assert (render.ROOT / "benchmarks" / part.command.split()[0]).is_file(), part
        assert "--json" in part.command
    assert len({part.name for part in run_all.PARTS}) == len(run_all.PARTS)


def test_a_part_that_leaves_a_row_has_gone_well(small):
    small("good", ROW.format("good"))
    assert run_all.run(Part("good", "good.py", "good")) is None


def test_what_went_wrong_is_told(small):
    small("bad", "raise SystemExit(3)")
    small("silent", "pass")
    small("slow", "import time; time.sleep(60)")
    assert run_all.run(Part("bad", "bad.py", "bad")) == "exit code 3"
    assert run_all.run(Part("silent", "silent.py", "silent")) == "left no row"
    assert run_all.run(Part("slow", "slow.py", "slow", limit_s=0.5)) == "took longer than 0 s"


def test_a_failure_is_shown_with_the_end_of_its_log_and_the_rest_runs(small, monkeypatch, capsys):
    small("bad", "raise SystemExit('out of luck')")
    small("good", ROW.format("good"))
    monkeypatch.setattr(run_all, "PARTS", (Part("bad", "bad.py", "bad"), Part("good", "good.py", "good")))
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 1
    told = capsys.readouterr().out
    assert "out of luck" in told
    assert "1 of 2" in told


def test_parts_that_take_long_run_when_asked_for_by_name_alone(small, monkeypatch, capsys):
    small("good", ROW.format("good"))
    monkeypatch.setattr(run_all, "PARTS", (Part("good", "good.py", "good", on_request=True),))
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 0
    assert "0 of 0" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "good"])
    assert run_all.main() == 0
    assert "1 of 1" in capsys.readouterr().out


def test_a_log_goes_to_the_parts_that_take_one(small, tmp_path, monkeypatch, capsys):
    small("on_it", "import sys; assert sys.argv[1:] == ['--json', '--data', sys.argv[-1]]\n" + ROW.format("on_it"))
    small("without", "import sys; assert sys.argv[1:] == ['--json']\n" + ROW.format("without"))
    parts = (
        Part("on_it", "on_it.py --json", "on_it", takes_data=True),
        Part("without", "without.py --json", "without"),
    )
    monkeypatch.setattr(run_all, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--data", str(tmp_path / "log.txt")])
    with pytest.raises(SystemExit):
        run_all.main()
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "log.txt").touch()
    assert run_all.main() == 0


def test_a_part_that_does_not_exist_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "atention"])
    with pytest.raises(SystemExit):
        run_all.main()
    assert "no part is named atention; there are end_to_end" in capsys.readouterr().err
