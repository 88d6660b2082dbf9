"""No source of ours unpickles, evaluates or extracts what it was given, but where a reason is written down here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lightning_gr", "plugins", "callbacks", "recipes", "benchmarks")
ALLOWED = {
    ("lightning_gr/checkpoint/tensors.py", "pickle.Unpickler"): "its find_class admits a list of classes (a subclass)",
    ("lightning_gr/checkpoint/tensors.py", "_MetadataUnpickler.load"): "the same",
    **{
        (f"benchmarks/{name}.py", "torch.load"): "its own processes have just written it into a temporary folder"
        for name in ("bench_checkpoint", "bench_hsp", "bench_lookup", "bench_overlap")
    },
}
NEVER = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "cPickle.loads", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load"),
    *("pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all"),
    *("yaml.full_load_all", "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("shutil.unpack_archive", "tarfile.open", "zipfile.ZipFile", "tarfile.TarFile", "torch.jit.load", "torch.package"),
    *("torch.hub.load", "jsonpickle.decode", "subprocess.getstatusoutput"),
}
SAFE_LOADERS = ("SafeLoader", "CSafeLoader")
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile", "zipfile")


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of an expression; calls inside become their functions' names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return ""


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what runs or unpickles a thing it is given."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {x.asname: x.name for x in node.names if x.asname}
        elif isinstance(node, ast.ImportFrom) and node.module in (
            *MODULES,
            "torch",
            "yaml",
            "numpy",
            "os",
            "subprocess",
        ):
            aliases |= {x.asname or x.name: f"{node.module}.{x.name}" for x in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if name_of(base) in NEVER:
                    yield node.lineno, name_of(base)
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        first, dot, rest = name.partition(".")
        name = f"{aliases.get(first, first)}{dot}{rest}"
        given = {x.arg: x.value for x in node.keywords}
        plain_load = name == "torch.load" and not is_constant(given.get("weights_only"), True)
        if name in NEVER or plain_load or name.endswith(("Unpickler.load", ".extractall", ".extract")):
            yield node.lineno, name
        elif name in ("yaml.load", "yaml.load_all"):
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            said = ast.unparse(loader) if loader is not None else ""
            if not any(said.endswith((x, f"{x}')", f"{x})")) for x in SAFE_LOADERS):
                yield node.lineno, name
        elif name in ("np.load", "numpy.load") and not is_constant(
            given.get("allow_pickle", ast.Constant(False)), False
        ):
            yield node.lineno, name
        elif "shell" in given and not is_constant(given["shell"], False):
            yield node.lineno, f"{name}(shell)"


def test_nothing_that_was_given_is_unpickled_evaluated_or_extracted() -> None:
    found, seen = [], 0
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if any(part == "__pycache__" for part in file.parts):
                continue
            seen += 1
            path = file.resolve().relative_to(ROOT)
            for line, name in dangers(file.read_text(encoding="utf-8")):
                key = (f"lightning_gr/{path}" if path.parts[0] in ("plugins", "callbacks") else str(path), name)
                if key not in ALLOWED:
                    found.append(f"{path}:{line}: {name}")
    assert seen > 150
    assert not found, "\n".join(sorted(set(found)))


def test_what_is_allowed_is_still_there() -> None:
    for path, name in ALLOWED:
        assert name in {found for _, found in dangers((ROOT / path).read_text(encoding="utf-8"))}, (path, name)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "from pickle import loads\nloads(x)",
        "import pickle as p\np.load(f)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "from torch import load as read\nread(f)",
        "yaml.load(t)",
        "yaml.load(t, Loader=yaml.FullLoader)",
        "yaml.load(t, yaml.Loader)",
        "np.load(f, allow_pickle=True)",
        "eval(t)",
        "exec(t)",
        "subprocess.run(c, shell=True)",
        "os.system(c)",
        "tarfile.open(f).extractall(d)",
        "archive.extractall(d)",
        "class A(pickle.Unpickler): pass",
        "AnUnpickler(f).load()",
    ],
)
def test_the_walk_sees_what_it_looks_for(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(t)",
        "yaml.load(t, Loader=yaml.SafeLoader)",
        "yaml.load(t, Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))",
        "np.load(f, mmap_mode='r')",
        "subprocess.run([a, b])",
        "column.list.eval(x)",
        "model.eval()",
        "json.load(f)",
    ],
)
def test_the_walk_leaves_alone_what_is_safe(source: str) -> None:
    assert not list(dangers(source))
