"""jsonargparse's errors, which are trees of many lines, boiled down to the one branch that matters."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass

_FLAG = re.compile(r"^unrecognized arguments: (.*)$", re.S)
_SETTING = re.compile(r"^Subcommand '(\w+)' does not accept option '(.*)'$")
_CHOICE = re.compile(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)")
_FILE = re.compile(r"^File does not exist: '?(.*?)'?$|^Expected a path but (\S+) either not accessible")
_ONE_OF = re.compile(r"^(?:typing\.)?Literal\[(.*)\]$")


@dataclass
class _Line:
    indent: int
    text: str
    parents: tuple[_Line, ...] = ()


@dataclass
class _Finding:
    """One complaint: the setting's path, the class it belongs to, what is said, and how telling that is."""

    keys: list[str]
    owner: str | None
    text: str
    given: str | None
    weight: int


def boil(message: str, parser: argparse.ArgumentParser | None = None) -> str:
    """One line with culprit, complaint and remedy.

    Args:
        message: what jsonargparse said.
        parser: the parser of the subcommand, for the names of its options.
    """
    message = message.strip()
    options = _option_names(parser)
    if match := _FLAG.match(message):
        return _unknown_flag(match[1].split(), options)
    if match := _SETTING.match(message):
        return f"{match[2]}: no such setting of {match[1]!r}; {_did_you_mean(match[2], options, 'fit --help')}"
    if match := _CHOICE.search(message):
        choices = [choice.strip(" '") for choice in match[2].split(",")]
        return f"{match[1]}: unknown; choose from {', '.join(choices)}"
    if message.startswith("the following arguments are required:"):
        missing = message.partition(":")[2].strip()
        return f"{missing}: missing; give it on the command line or in a --config (lightning-gr recipes ls)"
    finding = _most_telling(message)
    return _flat(message) if finding is None else _explain(finding, message)


def boil_config(message: str, source: str, parser: argparse.ArgumentParser) -> str:
    """The same for an error inside one `--config`, which is named.

    Args:
        message: what jsonargparse said.
        source: the value of `--config`.
        parser: the parser of the subcommand.
    """
    if message.startswith("Unexpected config"):
        return f"--config {source}: not settings: {_flat(message.partition(':')[2])[:60]!r}; write `name: value` lines"
    said = re.sub(r' in "<unicode string>",|^Problems parsing config:|^Parser key "config":', "", message)
    if said != message:
        return f"--config {_flat(source)}: not valid YAML: {_flat(said)}; mend it"
    return f"{boil(message, parser)} (in --config {_flat(source)})"


def _most_telling(message: str) -> _Finding | None:
    """The deepest complaint; among equally deep ones the most specific, then the first."""
    lines = _tree(message)
    findings = []
    for line in lines:
        weight = _specificity(line.text)
        if weight == 0:
            continue
        keys, owner, given, depth = [], None, None, 0
        for parent in line.parents:
            if match := re.match(r'^Parser key "(.*)":', parent.text):
                keys += (["init_args"] if owner else []) + [match[1]]
                given, depth = _given(lines, parent), depth + 1
            elif match := re.match(r"^Problem with given class_path '(.*)':", parent.text):
                owner, depth = match[1], depth + 1
        findings.append(_Finding(keys, owner, line.text, given, 10 * depth + weight))
    return max(findings, key=lambda finding: finding.weight, default=None)


def _tree(message: str) -> list[_Line]:
    """Lines with the chain of less indented lines above them; what stands after a key's colon is its child."""
    lines: list[_Line] = []
    open_lines: list[_Line] = []
    for raw in message.splitlines():
        text = raw.strip()
        if not text:
            continue
        line = _Line(len(raw) - len(raw.lstrip()), text.removeprefix("- "))
        while open_lines and open_lines[-1].indent >= line.indent:
            open_lines.pop()
        line.parents = tuple(open_lines)
        lines.append(line)
        open_lines.append(line)
        if match := re.match(r'^(Parser key ".*?":) (.+)$', line.text):
            line.text = match[1]
            lines.append(_Line(line.indent + 1, match[2], (*line.parents, line)))
    return lines


def _given(lines: list[_Line], parent: _Line) -> str | None:
    """The value that a key's complaint quotes, when it is the user's own and not jsonargparse's wrapping."""
    for line in lines:
        if parent in line.parents and (
            match := re.match(r"^Given value: (.*)$|^Expected .*\. Got value: (.*)$", line.text)
        ):
            value = match[1] or match[2] or ""
            return None if value.startswith(("NestedArg(", "Namespace(", "{")) else value
    return None


def _specificity(text: str) -> int:
    if text.startswith(("Subtypes:", "Errors:", "Given value", "Does not validate", "Problem with", "Parser key")):
        return 0
    if text.startswith("Option ") or "arguments are required" in text:
        return 6
    if text.startswith(
        ("No module named", "module '", "Import path does not", "Expected a dot import path", "File does")
    ):
        return 5
    if "NoneType" in text:
        return 1
    if text.startswith("Expected a path but"):
        return 2
    return 4 if "Got value" in text else 3


def _explain(finding: _Finding, message: str) -> str:
    key = ".".join(finding.keys) or "configuration"
    text = finding.text
    if match := re.match(r"^Option '(.*)' is not accepted", text):
        name = f"{key}.init_args.{match[1]}" if finding.owner else match[1]
        return (
            f"{name}: {_last(finding.owner)} has no such option; {_did_you_mean(match[1], _parameters(finding.owner))}"
        )
    if "arguments are required" in text:
        missing = [f"{key}.init_args.{name.strip()}" for name in text.partition(":")[2].split(",")]
        return f"{', '.join(missing)}: missing; {_last(finding.owner)} needs it"
    if text.startswith(("No module named", "module '", "Import path does not", "Expected a dot import path")):
        wanted = finding.owner if text.startswith(("No module", "module '")) else None
        wanted = wanted or finding.given or text.rsplit(": ", 1)[-1] or _quoted(message)
        reason = "not the right kind of class" if text.startswith("Import path") else "no such class"
        return f"{key}: {wanted}: {reason}; {_did_you_mean_class(wanted, _bases(message))}"
    if (match := _FILE.match(text)) is not None:
        return f"{key}: {match[1] or match[2]}: no such file; check the path"
    if text.startswith("Expected"):
        return f"{key}: expected {_expected(finding, message)}, got {_value(finding)}; correct the value"
    return f"{key}: {_flat(text)}"


def _expected(finding: _Finding, message: str) -> str:
    """The accepted types; of a union, all of them."""
    siblings = [finding.text]
    for line in (lines := _tree(message)):
        if line.text == finding.text and line.parents and line.parents[-1].text == "Errors:":
            siblings = [x.text for x in lines if x.parents == line.parents]
            break
    kinds = [
        _kind(re.sub(r"^Expected (?:an? )?|\. Got value:.*$", "", x)) for x in siblings if x.startswith("Expected")
    ]
    return " or ".join(dict.fromkeys(kinds))


def _kind(annotation: str) -> str:
    annotation = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", annotation).replace("NoneType", "null")
    if match := _ONE_OF.match(annotation):
        return "one of " + match[1].replace("'", "")
    return annotation.replace("typing.", "")


def _value(finding: _Finding) -> str:
    got = re.search(r"Got value: (.*)$", finding.text)
    value = got[1] if got else finding.given
    return "another type" if value is None else repr(value)


def _quoted(message: str) -> str:
    match = re.search(r"Given value: (.*)$", message, re.M)
    return match[1] if match else ""


def _bases(message: str) -> list[str]:
    return re.findall(r"<class '([\w.]+)'>", message.partition("Subtypes:")[2].partition("\n")[0])


def _unknown_flag(words: list[str], options: list[str]) -> str:
    flag = next((word for word in words if word.startswith("-")), words[0] if words else "")
    if not flag.startswith("-"):
        return f"{flag}: unexpected argument; settings are given as --name value"
    name = flag.lstrip("-").partition("=")[0]
    return f"--{name}: no such option; {_did_you_mean(name, options, 'fit --help', dashes='--')}"


def _option_names(parser: argparse.ArgumentParser | None) -> list[str]:
    if parser is None:
        return []
    from lightning_gr._compat import option_strings

    return [option.lstrip("-") for option in option_strings(parser) if option.startswith("--")]


def _parameters(class_path: str | None) -> list[str]:
    cls = _import(class_path)
    if cls is None:
        return []
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def _import(class_path: str | None) -> type | None:
    module, _, name = (class_path or "").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def _did_you_mean(name: str, known: Iterable[str], help_of: str | None = None, *, dashes: str = "") -> str:
    known = list(known)
    # A typo is mostly in the last part: trainer.max_epocs is compared with the trainer's other settings alone.
    group = name.rpartition(".")[0]
    inside = {_last(option): option for option in known if option.rpartition(".")[0] == group}
    near = [inside[last] for last in difflib.get_close_matches(_last(name), inside, n=1, cutoff=0.7)]
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    if near:
        return f"did you mean {' or '.join(dashes + option for option in near)}?"
    if help_of is None and known:
        return f"it has {', '.join(known)}"
    return f"see lightning-gr {help_of or 'fit --help'}"


def _did_you_mean_class(wanted: str, bases: list[str]) -> str:
    paths: dict[str, str] = {}
    for base in bases:
        if (cls := _import(base)) is not None and cls is not type(None):
            paths |= {sub.__name__: _shortest_path(sub) for sub in _subclasses(cls)}
    near = difflib.get_close_matches(_last(wanted), list(paths), n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(paths[name] for name in near)}?"
    ours = sorted(path for path in paths.values() if path.startswith("lightning_gr."))
    return f"give the full import path of a class{', such as ' + ', '.join(ours[:3]) if ours else ''}"


def _subclasses(cls: type) -> set[type]:
    children: list[type] = type.__subclasses__(cls)
    return {cls}.union(*(_subclasses(child) for child in children))


def _shortest_path(cls: type) -> str:
    parts = cls.__module__.split(".")
    for end in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:end]))
        if module is not None and module.__dict__.get(cls.__name__) is cls:
            return f"{'.'.join(parts[:end])}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _last(path: str | None) -> str:
    return (path or "the class").rpartition(".")[-1]


def _flat(text: str) -> str:
    return " ".join(text.split())
