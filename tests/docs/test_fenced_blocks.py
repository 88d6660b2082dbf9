"""Every fenced command of README.md and docs/*.md is run by a test or marked; all parse, and so do the files."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import yaml

from lightning_gr.cli.errors import UserError
from tests.docs.fenced import BLOCKS, PAGES, ROOT, Block, copy_recipe, own_options, parse_ours, words_of

RUN_BY = {
    "README.md": "tests/test_readme.py",
    "data.md": "tests/test_data_guide.py",
    "embeddings.md": "tests/test_embeddings_guide.py",
    "features.md": "tests/test_features_guide.py",
    "gmeta.md": "tests/test_gmeta_guide.py",
    "lightning-module.md": "tests/test_lightning_module_guide.py",
    "migrating.md": "tests/test_migrating_guide.py",
    "mtgr.md": "tests/test_mtgr_guide.py",
    "multi-node.md": "tests/docs/test_multi_node.py",
    "observability.md": "tests/test_readme.py",  # the same command
    "quickstart.md": "tests/test_quickstart_guide.py",
    "recipes.md": "tests/test_recipes_guide.py",
    "strategy.md": "tests/test_strategy_guide.py",
}
"""The test that follows each page; other pages' commands are marked."""
LANGUAGES = {"bash", "console", "ini", "json", "proto", "protobuf", "python", "text", "yaml"}
STAND_INS = {
    "imported/config.yaml": "hstu/tiny",
    "mine.yaml": "hstu/tiny",
    "my-recipe.yaml": "hstu/tiny",
    "semi.yaml": "turbogr/hstu-tiny-amazon-beauty",
    "served/config.yaml": "hstu/tiny-dynamic",
    "train.yaml": "hstu/tiny",
}
"""Configurations that a page's earlier commands would have made."""
SHELL = {
    *("cat", "cd", "cp", "export", "git", "kill", "ls", "mkdir", "nvidia-smi", "pip", "sbatch", "scancel", "scontrol"),
    *("sed", "set", "source", "squeue", "srun", "ulimit", "watch"),
}
COMMANDS = [(block, line) for block in BLOCKS for line in block.commands if not block.text.startswith("#!")]
OURS = [(block, line) for block, line in COMMANDS if line.startswith("lightning-gr ")]
YAMLS = [block for block in BLOCKS if block.language == "yaml"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def by_page(blocks: list[tuple[Block, str]]) -> list[str]:
    return sorted({block.page for block, _ in blocks})


def test_every_block_has_a_language_that_is_looked_at() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []
    assert len(COMMANDS) > 80


def test_every_command_is_run_by_a_test_or_marked() -> None:
    for page, file in RUN_BY.items():
        if any(block.page == page for block in BLOCKS):
            assert (ROOT / file).is_file(), f"{page} is said to be run by {file}, which is not there"
    open_ends = [str(block) for block, _ in COMMANDS if block.reason is None and block.page not in RUN_BY]
    assert sorted(set(open_ends)) == [], "run them in a test, or write <!-- not run: reason --> before the block"


def prepared(folder: Path, page: str) -> None:
    """What the page's commands would find: its files, and those that commands before would have made."""
    for block in BLOCKS:
        if block.page == page and block.file is not None:
            (folder / block.file).write_text(block.text)
    text = "\n".join(line for block, line in COMMANDS if block.page == page)
    for source, target in re.findall(r"lightning-gr recipes cp (\S+) (\S+)", text):
        copy_recipe(source, folder / target)
    for name in set(re.findall(r"[\w./-]+\.yaml", text)) & STAND_INS.keys():
        if not (folder / name).exists():
            copy_recipe(STAND_INS[name], folder / name)
    for name in set(re.findall(r"[\w./-]+\.prepare\.yaml", text)):  # what a log's writer puts beside it
        (folder / name).write_text("path: log.csv\n")
    for block in BLOCKS:
        if block.page == page and block.language == "yaml" and block.file is None:
            name = "prepare.yaml" if _is_for_prepare(yaml.safe_load(block.text)) else "features.yaml"
            if name in text and not (folder / name).exists():
                (folder / name).write_text(block.text)
    if "features.yaml" in text and not (folder / "features.yaml").exists():  # an importer's, on top of a recipe
        (folder / "features.yaml").write_text("seed_everything: 1\n")


def _is_for_prepare(settings: object) -> bool:
    return isinstance(settings, dict) and bool({"options", "columns", "output", "history"} & settings.keys())


# Pages whose commands another test runs have been parsed there; the two others take tens of seconds.
LONG = {*RUN_BY, "quality.md", "turbogr.md"}


@pytest.mark.parametrize("page", [pytest.param(x, marks=pytest.mark.long) if x in LONG else x for x in by_page(OURS)])
def test_commands_of_ours_parse(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    prepared(tmp_path, page)
    for block, line in OURS:
        if block.page == page:
            try:
                parse_ours(words_of(line)[1:])
            except (UserError, SystemExit, ValueError) as error:
                pytest.fail(f"{block}: {line}\n{error}")


def test_the_parsing_refuses_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in (
        "fit --config hstu/tiniest",
        "fit --config hstu/tiny --trainer.epochs 3",
        "plan --config hstu/tiny --rank 16",
        "compare hstu/tiny --sead 2",
        "compare hstu/tiny -- --model.init_args.dims 3",
        "store look store",
        "checkpoint list last.ckpt",
        "traain",
    ):
        with pytest.raises((UserError, SystemExit, AssertionError)):
            parse_ours(words_of(wrong))


def test_other_commands_name_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block, line in COMMANDS:
        first, *rest = words_of(line) or [""]
        if first == "make":
            assert {word for word in rest if "=" not in word} <= targets, f"{block}: {line}"
        elif first in ("python", "torchrun"):
            _check_script(block, line, rest)
        else:
            assert first in {"lightning-gr", "lightning-gr\n", *SHELL}, f"{block}: {line}"


def _check_script(block: Block, line: str, words: list[str]) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
        return
    if words[0] == "-m":
        importlib.import_module(words[1])
        return
    (script, *_) = [word for word in words if word.endswith(".py")] or [None]
    if script is None:
        assert any(word == "lightning_gr" or "lightning-gr" in word for word in words), f"{block}: {line}"
        return
    if not script.startswith("benchmarks/"):
        assert any(other.file == script and other.page == block.page for other in BLOCKS) or script == "train.py", (
            f"{block}: {line}: no block is {script}"
        )
        return
    assert (ROOT / script).is_file(), f"{block}: {script} is not there"
    asked = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert asked <= own_options(ROOT / script) | {"--json"}, f"{block}: {line}"


@pytest.mark.parametrize("block", YAMLS, ids=str)
def test_yaml_is_what_the_command_takes(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(block.text)
    if settings is None or not isinstance(settings, dict) or not settings.keys() & {"trainer", "model", "data"}:
        if _is_for_prepare(settings):
            Path("prepare.yaml").write_text(block.text)
            parse_ours(["prepare", "--config", "prepare.yaml"])
        return
    prepared(tmp_path, block.page)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("part.yaml").write_text(block.text)
    refused = []
    for base in ("hstu/tiny", "mtgr/tiny", "hstu/tiny-dynamic", "gmeta/tiny", None):
        try:
            parse_ours(["fit", *(("--config", base) if base else ()), "--config", "part.yaml"])
        except (UserError, SystemExit, ValueError) as error:
            refused.append(f"on {base}: {error}")
        else:
            return
    pytest.fail(f"{block}:\n" + "\n".join(refused))


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_imports_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_gr"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block}: {node.module} has no {alias.name}"


def test_what_make_docs_installs_is_what_the_extra_names() -> None:
    (extra,) = re.findall(r"^docs = \[(.*?)\]  #", (ROOT / "pyproject.toml").read_text(), re.M)
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints" / "docs.txt").read_text(), re.M))
    named = {name.lower() for name in re.findall(r'"([\w-]+)', extra)}
    assert named == {"mkdocs-material", "mkdocstrings"}
    assert named <= pinned


def test_pages_are_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/-]+\.md", text))
    there = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert named == there
    assert {f"{page.name}" for page in PAGES[1:]} <= there
