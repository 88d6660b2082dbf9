"""Protobuf's text format without a schema: its forms are read, and nothing but ValueError comes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.importers.text_format import DEEPEST, Message, parse


def test_every_form_of_a_field_is_read() -> None:
    text = r"""
    # a comment
    a: 1  b: -0x1F, c: .5f; d: 1e3 e: 017
    s: "one" ' two' t: "\x41\102\n\u00e9\303\251"
    word: SOME_WORD yes: true
    list: [1, -2.5, "x"] empty: []
    m { a: 2 } m: < a: 3 > n: [{a: 4}, {a: 5}]
    [some.extension/x-y]: 6
    i: -inf  k: nan
    """
    found = parse(text)
    assert math.isnan(found.pop("k")[0])  # type: ignore[arg-type]
    assert found == {
        "a": [1],
        "b": [-31],
        "c": [0.5],
        "d": [1000.0],
        "e": [15],
        "s": ["one two"],
        "t": ["AB\néé"],
        "word": ["SOME_WORD"],
        "yes": ["true"],
        "list": [1, -2.5, "x"],
        "empty": [],
        "m": [{"a": [2]}, {"a": [3]}],
        "n": [{"a": [4]}, {"a": [5]}],
        "[some.extension/x-y]": [6],
        "i": [-math.inf],
    }


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a:",
        "a: {",
        "a { b: 1",
        "a: 1 }",
        "a: 'x",
        'a: "\\q"',
        "a: 08",
        "a: [1",
        "a: [1 2]",
        "a: 1x",
        "a: -word",
        "a > 1",
    ]
    + ["a: <b: 1}", ": 1", "1: 2", "a: $", "[a: 1", "a: '\\U00110000'", "a: " + "9" * 5000],
)
def test_what_is_no_text_format_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^line 2"):
        parse("\n" + text)


def test_depth_is_limited() -> None:
    parse("a {" * DEEPEST + "}" * DEEPEST)
    with pytest.raises(ValueError, match="nested more than"):
        parse("a {" * 100_000)


@given(st.one_of(st.text(), st.text(alphabet="ab{}<>[]:,;#'\"\\x01.-+e \n")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse(text), Message)


NAMES = st.from_regex(r"[a-z_]{1,6}", fullmatch=True)
SCALARS = st.one_of(
    st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs"]))
)
MESSAGES = st.recursive(
    st.dictionaries(NAMES, st.lists(SCALARS, min_size=1, max_size=3), max_size=4),
    lambda inner: st.dictionaries(NAMES, st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=8,
)


def written(message: dict[str, Any]) -> str:
    lines = []
    for name, values in message.items():
        for value in values:
            if isinstance(value, dict):
                lines.append(f"{name} {{ {written(value)} }}")
            elif isinstance(value, str):
                lines.append(f'{name}: "' + "".join(f"\\{byte:03o}" for byte in value.encode()) + '"')
            else:
                lines.append(f"{name}: {value!r}")
    return "\n".join(lines)


@given(MESSAGES)
def test_what_was_written_is_read(message: dict[str, Any]) -> None:
    assert parse(written(message)) == message
