"""docs/quickstart.md, followed by somebody who types what it says, on a smaller log."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.guide_blocks import ROOT, commands_of, files_of, words_of
from tests.test_readme import run

FILES, COMMANDS = files_of("quickstart.md"), commands_of("quickstart.md")
pytestmark = [pytest.mark.slow, pytest.mark.dist]


def command(beginning: str) -> str:
    (found,) = [line for line in COMMANDS if line.startswith(beginning)]
    return found


def small(text: str) -> str:
    for written, put in (("range(1500)", "range(60)"), ("max_epochs: 40", "max_epochs: 2"), ("dim: 64", "dim: 16")):
        text = text.replace(written, put)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my-shop")
    for name, text in FILES.items():
        (folder / name).write_text(small(text))
    run(words_of(command("python make_log.py")), folder)
    assert (folder / "shop.csv").is_file()
    return folder


def test_every_command_is_one_that_these_tests_know() -> None:
    known = ("make demo", "source", "mkdir", "python ", "timeout --signal KILL 20 lightning-gr fit")
    tools = ("doctor", "prepare", "fit", "test", "predict", "report")
    for line in COMMANDS:
        assert line.startswith((*known, *(f"lightning-gr {x}" for x in tools))), line


def test_a_bad_row_stops_prepare_unless_it_may_be_dropped(folder: Path) -> None:
    prepare = command("lightning-gr prepare")
    assert prepare.endswith(" --bad_rows drop")
    strict = words_of(prepare.removesuffix(" --bad_rows drop").replace(" store ", " strict "))
    from tests.forked_command import run_command

    done = run_command(strict, cwd=folder)
    assert done.returncode == 2
    assert re.search(r"shop\.csv: row \d+, column (customer|when)", done.stderr)
    assert not (folder / "strict").exists()


def test_from_the_csv_to_the_report(folder: Path) -> None:
    said = run(words_of(command("lightning-gr prepare")), folder)
    assert "dropped, bad row, customer: missing" in said
    fits = [line for line in COMMANDS if line.startswith("lightning-gr fit")]
    assert fits[0] in said, "the last line of prepare is the page's next command"
    printed = run(words_of(command("lightning-gr fit --config hstu/tiny --config mine.yaml --print_config")), folder)
    assert "top_k:\n    - 10\n    - 20\n" in printed
    assert "global_tokens: 1024" in printed, "what mine.yaml leaves out is the recipe's"
    killed, goes_on = command("timeout"), fits[-1]
    assert killed.endswith(goes_on)
    said = run([*words_of(goes_on), "--trainer.max_epochs", "1"], folder)
    assert "training begins anew" in said
    said = run(words_of(goes_on), folder)
    assert re.search(r"resumed from .*/outputs/mine/tensorboard/checkpoints/epoch=0-step=\d+\.ckpt: step", said)
    assert "test/HR@20" in run(words_of(command("lightning-gr test")), folder)
    run(words_of(command("lightning-gr predict")), folder)
    looked = run(words_of(command("python look.py")), folder)
    assert len(re.findall(r"^c\d{4}@shop( SKU-\d{4}){5}$", looked, re.M)) == 3
    run(words_of(command("lightning-gr report")), folder)
    assert (folder / "report.html").stat().st_size > 10_000


def test_the_demo_is_a_target() -> None:
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "-m lightning_gr demo" in plan.stdout
