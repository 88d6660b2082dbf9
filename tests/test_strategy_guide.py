"""docs/strategy.md, followed by somebody who types what it says: its code prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_gr.balancing import SequenceCost, cost_of
from lightning_gr.data.synthetic import write_synthetic_log
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "strategy.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
SCRIPT = next(code for kind, code in BLOCKS if code.startswith("# stages.py"))
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.replace("\\\n", " ").splitlines()]
NEEDS_A_MODEL = ("strategy = ", "def training_step", "# stages.py")


def test_its_code_prints_what_it_says() -> None:
    names: dict[str, Any] = {}
    compared = 0
    for place, (kind, code) in enumerate(BLOCKS):
        if kind != "python" or code.startswith(NEEDS_A_MODEL):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"docs/strategy.md, block {place}", "exec"), names)
        if printed.getvalue():
            assert BLOCKS[place + 1] == ("text", printed.getvalue())
            compared += 1
    assert compared == 2
    module = type("Module", (), {"sequence_cost": names["sequence_cost"]})()
    assert cost_of(module) == SequenceCost(3.3e5, 512.0)


def test_its_settings_are_taken() -> None:
    from lightning_gr.balancing import Balancing
    from lightning_gr.plugins import SequenceBalancedStrategy

    settings = [yaml.safe_load(code) for kind, code in BLOCKS if kind == "yaml"]
    first, short, stream = settings
    written = first["trainer"]["strategy"]["init_args"]
    assert Balancing(**written["balancing"]) == Balancing()
    default = SequenceBalancedStrategy()
    assert default.pipeline_depth == written["pipeline_depth"]
    assert str(default.collective_timeout) == "0:30:00"
    for found in (short["balancing"], stream["trainer"]["strategy"]["init_args"]["balancing"]):
        assert Balancing(**found).mode == "exchange"


@pytest.mark.slow
@pytest.mark.dist
def test_the_script_logs_its_stages(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "events.csv", num_users=1200, num_items=300, seed=0)
    (tmp_path / "stages.py").write_text(SCRIPT)
    printed = run(shell("python stages.py"), tmp_path)
    pattern = r"^(fetch|copy|lookup|train) +(\d+) +[\d.]+ +[\d.]+$"
    said = next(code for kind, code in BLOCKS if kind == "text" and code.startswith("fetch"))
    shown = [found for found in re.findall(pattern, printed, re.M) if int(found[1]) >= 10]
    assert sorted(shown) == sorted(re.findall(pattern, said, re.M))
    assert re.search(r"^lookup: \d+% of it beside the training of another batch$", printed, re.M)
    assert (tmp_path / "stages.csv").is_file()


@pytest.mark.slow
@pytest.mark.dist
def test_its_commands_run(tmp_path: Path) -> None:
    write_synthetic_log(tmp_path / "events.csv", num_users=120, num_items=40, seed=0)
    fit, plan = COMMANDS
    printed = run([*shell(fit), "--trainer.max_epochs", "1"], tmp_path)
    assert "tokens_per_rank=256: each global batch is computed in 3 micro-steps" in printed
    assert "balance; tokens a rank stay" in run(shell(plan), tmp_path)
