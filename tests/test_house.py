"""The house rules that a machine can check: links, who imports whom, one class a file, no paths of one machine."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("plugins", "callbacks", "recipes")
MODULES = [
    *(ROOT / "lightning_gr").glob("*.py"),
    *(
        x
        for room in (ROOT / "lightning_gr").iterdir()
        if room.is_dir() and not room.is_symlink()
        for x in room.rglob("*.py")
    ),
    *(x for room in ROOMS for x in (ROOT / room).rglob("*.py")),
]
# What is loaded inside functions only, so that reading signatures stays quick and a kernel needs torch alone.
# A file that can only subclass TorchRec's classes, or needs those that do, is itself imported inside functions.
SUBCLASSES_OF_TORCHREC = {"lightning_gr.plugins.dynamic_sharding", "lightning_gr.plugins.lookup_prefetch"}
HEAVY = {"torchrec", "fbgemm_gpu", "triton", "polars", "pyarrow", "tensordict", "matplotlib"}


def _name(file: Path) -> str:
    """The dotted name by which a file is imported; the rooms at the root are inside the package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "lightning_gr" else ("lightning_gr", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; those for type checkers alone do not count where only loading matters."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        children = list(ast.iter_child_nodes(node))
        if top_level_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            children = node.orelse  # type: ignore[assignment]
        for child in children:
            yield from walk(child)

    for node in walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def _room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "lightning_gr" and len(parts) > 1 else ""


def _forbidden(importer: str, imported: str) -> bool:
    """Whether the module ``importer`` may not import ``imported`` (dotted names)."""
    room, top, target = _room(importer), imported.partition(".")[0], _room(imported)
    if room == "ops":
        free = top in sys.stdlib_module_names or top in ("torch", "triton", "typing_extensions")
        return not free and target != "ops"
    if top in ROOMS:
        return True  # never by their bare names
    if top in ("pytorch_lightning", "lightning_fabric"):
        return True  # the other name of the same package: isinstance would fail between the two
    if top != "lightning_gr":
        return False
    if room == "cli":
        return False
    if target == "cli":
        return importer != "lightning_gr.__main__"
    if room == "layers":
        return target not in ("ops", "layers")
    if room == "recipes":
        return True
    if room in ("embeddings", "negatives", "data", "metrics") and target == "models":
        return True
    if target == "callbacks":
        return room != "callbacks"
    if target == "plugins":
        return room not in ("plugins", "callbacks", "observability")
    if target == "observability":
        return room not in ("callbacks", "observability", "report", "cli")
    return False


def test_the_rooms_are_linked_into_the_package() -> None:
    for room in ROOMS:
        link = ROOT / "lightning_gr" / room
        assert (ROOT / room / "__init__.py").is_file()
        assert not (ROOT / room).is_symlink()
        assert os.readlink(link) == f"../{room}"
        assert link.resolve() == ROOT / room


def test_there_are_no_other_links() -> None:
    links = {x for x in _files() if x.is_symlink()} | {x for x in (ROOT / "lightning_gr").rglob("*") if x.is_symlink()}
    assert links == {ROOT / "lightning_gr" / room for room in ROOMS}


def test_who_imports_whom() -> None:
    assert len(MODULES) > 20
    wrong = [f"{_name(x)} -> {y}" for x in MODULES for y in _imports(x) if _forbidden(_name(x), y)]
    assert wrong == []


@pytest.mark.parametrize(
    ("importer", "imported", "forbidden"),
    [
        ("lightning_gr.ops.a", "torch.nn", False),
        ("lightning_gr.ops.a", "numpy", True),
        ("lightning_gr.ops.a", "lightning_gr.batch.SequenceBatch", True),
        ("lightning_gr.layers.a", "lightning_gr.ops.b", False),
        ("lightning_gr.layers.a", "lightning_gr.batch.SequenceBatch", True),
        ("lightning_gr.data.a", "lightning_gr.models.b", True),
        ("lightning_gr.models.a", "lightning_gr.plugins.b", True),
        ("lightning_gr.plugins.a", "lightning_gr.callbacks.b", True),
        ("lightning_gr.callbacks.a", "lightning_gr.plugins.b", False),
        ("lightning_gr.callbacks.a", "plugins.b", True),
        ("lightning_gr.observability.a", "lightning_gr.plugins.b", False),
        ("lightning_gr.models.a", "lightning_gr.observability.b", True),
        ("lightning_gr.batch", "lightning_gr.cli.errors", True),
        ("lightning_gr.cli.training", "lightning_gr.callbacks", False),
    ],
)
def test_the_rules_themselves(importer: str, imported: str, forbidden: bool) -> None:
    assert _forbidden(importer, imported) is forbidden


def test_heavy_packages_are_imported_where_they_are_needed() -> None:
    wrong = [
        f"{_name(x)} -> {y}"
        for x in MODULES
        if _name(x) not in SUBCLASSES_OF_TORCHREC
        for y in _imports(x, top_level_only=True)
        if y.partition(".")[0] in HEAVY or y.rpartition(".")[0] in SUBCLASSES_OF_TORCHREC
    ]
    assert wrong == []


def test_one_public_class_a_file_in_plugins_and_callbacks() -> None:
    for room in ("plugins", "callbacks"):
        for file in (ROOT / room).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            public = [x.name for x in tree.body if isinstance(x, ast.ClassDef) and not x.name.startswith("_")]
            assert len(public) <= 1, f"{file.relative_to(ROOT)}: {public}"


def test_every_module_says_its_subject() -> None:
    silent = [
        _name(x) for x in MODULES if not (ast.get_docstring(ast.parse(x.read_text(encoding="utf-8"))) or "").strip()
    ]
    assert silent == []


def _files() -> Iterator[Path]:
    """Files of the repository, without environments, caches and outputs."""
    skipped = {"build", "dist", "outputs", "lightning_logs", "site", "results", "__pycache__"}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [x for x in folders if x not in skipped and (not x.startswith(".") or x == ".ci")]
        folders[:] = [x for x in folders if not x.endswith(".egg-info")]
        yield from (Path(folder, name) for name in names)


def test_no_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|mnt)/\w|\.\./shared")
    kinds = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ".in", ".cfg", ""}
    found = []
    for file in _files():
        if file.suffix in kinds and not file.is_symlink() and file != Path(__file__):
            text = file.read_text(encoding="utf-8", errors="replace")
            found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []
