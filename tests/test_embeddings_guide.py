"""docs/embeddings.md, followed by somebody who types what it says: its code prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_gr import recipes
from lightning_gr.cli import table
from lightning_gr.cli.training import GRCLI
from lightning_gr.embeddings.dynamic import DynamicTables
from tests.test_readme import ROOT, run, shell

TEXT = (ROOT / "docs" / "embeddings.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.M | re.S)
SCRIPT = next(place for place, (_, code) in enumerate(BLOCKS) if code.startswith("# shop.py"))
COMMANDS = [line for kind, code in BLOCKS if kind == "bash" for line in code.replace("\\\n", " ").splitlines()]


class Parsed(GRCLI):
    """Builds what `fit` runs, and does not run it."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(*words: str) -> Any:
    return Parsed(args=[*words, "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.logger=false"])


def test_the_guide_has_the_commands_that_are_tried_here() -> None:
    assert [line.split()[1] for line in COMMANDS] == ["fit", "shop.py", *["table"] * 5]


def test_its_commands_of_tables_are_taken() -> None:
    for line in COMMANDS[2:]:
        args = table._parser().parse_args(line.split()[2:])
        assert args.run.__name__ == f"_{line.split()[2]}"


def test_its_code_prints_what_it_says() -> None:
    names: dict[str, Any] = {}
    compared = 0
    for place, (kind, code) in enumerate(BLOCKS):
        if kind != "python" or place == SCRIPT:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, f"docs/embeddings.md, block {place}", "exec"), names)
        if printed.getvalue():
            following, said = BLOCKS[place + 1]
            assert (following, printed.getvalue()) == ("text", said)
            compared += 1
    assert compared == 12


@pytest.mark.slow
@pytest.mark.dist
def test_the_script_trains_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(BLOCKS[SCRIPT][1])
    printed = run(shell("python shop.py"), tmp_path)
    said = next(code for kind, code in BLOCKS[SCRIPT + 1 :] if kind == "text")
    assert all(line in printed.splitlines() for line in said.splitlines())
    assert (tmp_path / "shop.ckpt" / "dynamic" / "tables" / "item").is_dir()
    # The table of deduplication is made of what the script prints.
    moved = dict(re.findall(r"(\w+)=(\d+)", said))
    section = TEXT[TEXT.index("## Deduplication") : TEXT.index("## Memory")].replace(",", "")
    assert re.findall(r"^\| .* \| (\d+) \|$", section, re.M) == list(moved.values())


@pytest.mark.recipe
def test_its_settings_make_any_recipe_dynamic(tmp_path: Path) -> None:
    (block,) = (code for kind, code in BLOCKS if kind == "yaml")
    (tmp_path / "dynamic.yaml").write_text(block)
    for recipe in ("hstu/tiny", "mtgr/tiny"):
        cli = build("fit", "--config", recipe, "--config", str(tmp_path / "dynamic.yaml"))
        tables = cli.model.dynamic_tables
        assert isinstance(tables, DynamicTables)
        assert cli.datamodule.raw_ids
        assert (tables.policy.max_rows, tables.policies["item"].max_rows) == (10_000_000, 1_000_000)
    assert recipes.path(COMMANDS[0].split()[3]).is_file()
