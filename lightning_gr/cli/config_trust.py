"""Which classes a configuration may name that came with a checkpoint or an export, and so from somebody else.

Whoever writes a configuration says what is imported and called. One that lies in a checkpoint or an export, or that a
checkpoint file holds as hyper-parameters, is therefore looked through before anything is parsed; and while it is in
use jsonargparse imports nothing else by name, wherever the name stands and whatever type asks for it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning_gr.cli.errors import UserError

FLAG = "--trust_config"
VARIABLE = "LIGHTNING_GR_TRUST_CONFIG"
REMEDY = f"if you trust where it came from, add {FLAG} (or set {VARIABLE}=1)"

ALLOWED = (
    "lightning_gr.balancing",
    "lightning_gr.callbacks",
    "lightning_gr.data",
    "lightning_gr.embeddings",
    "lightning_gr.feature_config",
    "lightning_gr.FeatureConfig",  # as configurations spell it
    "lightning_gr.layers",
    "lightning_gr.metrics",
    "lightning_gr.models",
    "lightning_gr.negatives",
    "lightning_gr.plugins",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.strategies",
    "lightning.fabric.loggers",  # where some of these are defined
    "lightning.fabric.plugins",
    "torch.optim",
    "torch.nn",
    "torchmetrics",
    "torchrec",
)
"""Modules whose classes need no trust: a name counts by where it is defined, too."""

REFUSED = (
    "lightning.pytorch.strategies.launchers",  # start processes
    "lightning.fabric.plugins.io",  # unpickle
    "lightning.pytorch.plugins.io",
    "torchmetrics.audio",  # the next four fetch pretrained models
    "torchmetrics.image",
    "torchmetrics.multimodal",
    "torchmetrics.text",
    "torchmetrics.utilities",
    "torchrec.datasets",
    "torchrec.inference",
)
"""Exceptions inside these modules."""

_MARKS = ("meta.pt", "export.json")
_LEVELS = 3
_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_DENIED = re.compile(r"Importing '([^']*)' is not allowed")
_SUFFIXES = (".yaml", ".yml", ".json")
_DEEPEST = 20
_LONGEST_PATH = 4096


class Trust:
    """What the configurations of one command line may name; a context in which jsonargparse keeps to it.

    Args:
        words: of the command line.

    Attributes:
        words: the same without ``--trust_config``.

    Raises:
        UserError: a configuration from elsewhere names what is not allowed, by file, key and name.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [word for word in words if word != FLAG]
        self.all = len(self.words) < len(words) or os.environ.get(VARIABLE, "") not in ("", "0")
        self._untrusted: dict[str, Any] = {}
        self._own: set[str] = set()
        self._seen: set[str] = set()
        self._stack = ExitStack()
        if self.all:
            return
        before = ""
        for word in self.words:
            option, _, value = word.partition("=") if word.startswith("-") else (before, "", word)
            self._look_at(value, is_config=option in ("-c", "--config"))
            before = word
        for name, value in os.environ.items():
            if name.startswith("LIGHTNING_GR_"):
                self._look_at(value, is_config=name.endswith("CONFIG"))

    def _look_at(self, value: str, *, is_config: bool = False, folder: str = "") -> None:
        """Sorts a value that the user gave: a file of somebody else is checked, names in all else are the user's."""
        file = _file(value, folder)
        holds_settings = is_config or value.endswith(_SUFFIXES)
        if file is None:
            self._own |= {text for _, text in _strings(_parsed(value)) if _NAME.fullmatch(text)}
        elif file in self._seen:
            return
        elif is_untrusted(file):
            self._seen.add(file)
            self._untrusted[file] = _checked_file(file) if holds_settings else None
        elif holds_settings:
            self._seen.add(file)
            for _, text in _strings(_parsed(_text(file))):
                self._look_at(text, folder=os.path.dirname(file))

    def __enter__(self) -> Trust:
        if self._untrusted:
            self._stack.enter_context(_imports_only([*ALLOWED, *_defined(self._own)]))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check_hyperparameters(self, ckpt_path: str | None, config: Mapping[str, Any]) -> None:
        """Looks through what a checkpoint file would add to the parsed settings, which stay as they are.

        Args:
            ckpt_path: where it is; a directory holds none.
            config: settings, which the user's own or checked ones.
        """
        if self.all or ckpt_path is None or not Path(ckpt_path).is_file():
            return
        import torch

        try:
            content = torch.load(ckpt_path, weights_only=True, map_location="meta")
        except Exception:  # Lightning will say so
            return
        held = content.get("hyper_parameters") if isinstance(content, dict) else None
        if not held:
            return
        own = {text for _, text in _strings(config) if _NAME.fullmatch(text)}
        file = f"{ckpt_path} (hyper_parameters)"
        settings = {"class_path" if key == "_class_path" else key: value for key, value in dict(held).items()}
        _check(settings, file, allowed=(*ALLOWED, *own))
        self._untrusted[file] = settings
        self._stack.enter_context(_imports_only([*ALLOWED, *_defined(own)]))

    def explained(self, message: str) -> UserError | None:
        """The line for an import that jsonargparse refused; None for any other message."""
        if (match := _DENIED.search(message)) is None:
            return None
        name = match[1]
        for file, content in self._untrusted.items():
            for key, text in _strings(content):
                if text == name or text.endswith(f".{name.rpartition('.')[2]}"):
                    return _refused(file, key, name)
        return _refused(" and ".join(self._untrusted), "a setting", name)


def is_denied(message: str) -> bool:
    """Whether an error is jsonargparse's refusal to import something, of which `Trust.explained` makes a line."""
    return _DENIED.search(message) is not None


def is_untrusted(file: str) -> bool:
    """Whether a file lies in a checkpoint or an export, by its own path or by that which links lead to."""
    if "://" in file:
        from lightning_gr.checkpoint.storage import Storage

        folder, found = Storage(file), False
        for _ in range(_LEVELS):
            folder = folder.parent
            found |= any(folder.is_file(mark) for mark in _MARKS)
        return found
    paths = (Path(os.path.abspath(file)), Path(os.path.realpath(file)))
    folders = [folder for path in paths for folder in path.parents[:_LEVELS]]
    return any((folder / mark).is_file() for folder in folders for mark in _MARKS)


def _file(value: str, folder: str = "") -> str | None:
    """The file that a value names, from where the command runs or from a folder."""
    if not value or len(value) > _LONGEST_PATH or "\0" in value:
        return None
    if "://" in value:
        return value if value.endswith(_SUFFIXES) else None
    paths = (os.path.join(folder, os.path.expanduser(value)), os.path.expanduser(value))
    return next((path for path in paths if os.path.isfile(path)), None)


def _text(file: str) -> str:
    if "://" in file:
        from lightning_gr.checkpoint.storage import Storage

        folder, _, name = file.rpartition("/")
        return Storage(folder).read_bytes(name).decode(errors="replace")
    return Path(file).read_text(encoding="utf-8", errors="replace")


def _parsed(text: str) -> Any:
    """What YAML makes of a text, of which nothing but plain values is built; the text itself where it is no YAML."""
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _strings(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every text in settings with its key; a text that is YAML itself is looked through too."""
    if depth > _DEEPEST:
        raise UserError(f"{key}: settings are nested more than {_DEEPEST} deep; {REMEDY}")
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(content, list | tuple):
        for i, value in enumerate(content):
            yield from _strings(value, f"{key}[{i}]", depth + 1)
    elif isinstance(content, str):
        yield key, content
        if any(x in content for x in "{[:\n") and not isinstance(inner := _parsed(content), str):
            yield from _strings(inner, key, depth + 1)


def _checked_file(file: str) -> Any:
    import yaml

    text = _text(file)
    try:
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: came with a checkpoint or an export and is not plain YAML ({reason})") from error
    _check(content, file)
    return content


def _check(content: Any, file: str, allowed: Sequence[str] = ALLOWED) -> None:
    for key, text in _strings(content):
        if re.search(r"(^|\.)class_path\+?$", key) and not _is_allowed(text, allowed):
            raise _refused(file, key, text)
    for key, value in _leaves(content):
        parts = key.split(".")
        first = parts[1] if parts[0] in _SUBCOMMANDS and len(parts) > 1 else parts[0]
        name = re.sub(r"\[\d+\]|\+", "", first)
        # A file that the file names would not be looked through; an unpickled one may do anything.
        names_file = name in ("ckpt_path", "init_from") and value is not None
        unpickles = name == "weights_only" and value not in (None, True)
        if name == "config" or parts[-1] == "__path__" or names_file or unpickles:
            raise UserError(
                f"{file}: {key}: {value!r} is refused, since the file came with a checkpoint or an export; {REMEDY}"
            )


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list) and content:
        for i, value in enumerate(content):
            yield from _leaves(value, f"{key}[{i}]")
    else:
        yield key, content


def _is_allowed(name: str, allowed: Sequence[str]) -> bool:
    """Whether a class's name is of an allowed module; by where it is defined too, jsonargparse looks later."""
    if name in allowed:
        return True
    is_class = _NAME.fullmatch(name) is not None and name.rpartition(".")[2][0].isupper()
    return is_class and _within(name, allowed) and not _within(name, REFUSED)


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _refused(file: str, key: str, name: str) -> UserError:
    return UserError(
        f"{file}: {key}: {name} is not among the classes that a configuration which came with a checkpoint or an "
        f"export may name; {REMEDY}"
    )


def _defined(names: set[str]) -> Iterator[str]:
    """Names that the user gave, and where what they mean is defined."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        if not attribute[0].isupper():
            continue
        try:
            found = getattr(importlib.import_module(module), attribute)
        except Exception:  # whoever needs it will say so
            continue
        yield from (name, f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else name)


@contextmanager
def _imports_only(names: Sequence[str]) -> Iterator[None]:
    """While it is open, jsonargparse imports by name what is in some modules, and refuses all else."""
    from jsonargparse import _common, set_parsing_settings

    if "import_path_verdicts" not in _common.parsing_settings:
        raise UserError(f"jsonargparse: too old to keep a configuration to what it may name; upgrade it, or {REMEDY}")
    before = dict(_common.parsing_settings)
    set_parsing_settings(import_path_denylist=["*", *REFUSED], import_path_allowlist=list(names))
    try:
        yield
    finally:
        _common.parsing_settings.clear()
        _common.parsing_settings.update(before)
