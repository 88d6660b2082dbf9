"""Protobuf's text format, read without a schema: messages become dictionaries from names to lists of values.

A reader of Google's needs the compiled schema of what it reads, which other projects have and we do not. The grammar is
that of protobuf.dev/reference/protobuf/textformat-spec. What only a schema could tell is left to the caller: whether a
name is repeated, and what kind of number it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

LONGEST = 16 << 20
"""Most characters of a text."""
DEEPEST = 64
"""Most messages within each other."""


class Word(str):
    """A bare word: an enumerator, ``true`` or ``false``."""

    __slots__ = ()


class Message(dict[str, "list[str | int | float | Word | Message]"]):
    """Values by name, in the order they stand in, each name's in one list."""


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


_TOKEN = re.compile(
    r"""(?P<space>[ \t\n\r\f\v]+|\#[^\n]*)
      | (?P<text>"(?:[^"\\\n]|\\[^\n])*"|'(?:[^'\\\n]|\\[^\n])*')
      | (?P<number>0[xX][0-9a-fA-F]+|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?)(?![\w.])
      | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<sign>[{}<>\[\]:,;/.\-])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_PLAIN = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "?": 63, "\\": 92, "'": 39, '"': 34}
_CLOSING = {"{": "}", "<": ">"}


def parse(text: str) -> Message:
    """A message from its text.

    Raises:
        ValueError: it is no text format, with the line; or longer or deeper than any configuration.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{len(text):,} characters: longer than the {LONGEST:,} that are read; is it a configuration?")
    return _Parser(text).message(closing="", depth=0)


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: {text[at : at + 20]!r} is no text format of protobuf; correct it")
        kind = str(match.lastgroup)
        if kind != "space":
            yield _Token(kind, match[0], line)
        line += match[0].count("\n")
        at = match.end()
    yield _Token("end", "", line)


class _Parser:
    """One pass over the tokens, one of which is looked at ahead."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._next = next(self._tokens)

    def _take(self) -> _Token:
        token = self._next
        if token.kind != "end":
            self._next = next(self._tokens)
        return token

    def _sees(self, *signs: str) -> bool:
        return self._next.kind == "sign" and self._next.text in signs

    def _fail(self, expected: str) -> ValueError:
        found = repr(self._next.text) if self._next.text else "the end"
        return ValueError(f"line {self._next.line}: expected {expected}, found {found}; correct it")

    def _want(self, sign: str) -> None:
        if not self._sees(sign):
            raise self._fail(repr(sign))
        self._take()

    def message(self, *, closing: str, depth: int) -> Message:
        """Fields up to the closing sign, or to the end."""
        if depth > DEEPEST:
            raise ValueError(f"line {self._next.line}: messages are nested more than {DEEPEST} deep")
        found = Message()
        while not (self._sees(closing) if closing else self._next.kind == "end"):
            name = self._name()
            has_colon = self._sees(":")
            if has_colon:
                self._take()
            values = found.setdefault(name, [])
            if self._sees("["):
                values.extend(self._list(depth))
            elif self._sees("{", "<"):
                values.append(self._nested(depth))
            elif has_colon:
                values.append(self._scalar())
            else:
                raise self._fail(f"':' or '{{' after {name}")
            if self._sees(",", ";"):
                self._take()
        if closing:
            self._take()
        return found

    def _name(self) -> str:
        if self._next.kind == "word":
            return self._take().text
        if not self._sees("["):
            raise self._fail("the name of a field")
        self._take()
        parts = []
        while not self._sees("]"):
            if self._next.kind != "word" and not self._sees(".", "/", "-"):
                raise self._fail("']'")
            parts.append(self._take().text)
        self._take()
        return f"[{''.join(parts)}]"

    def _nested(self, depth: int) -> Message:
        return self.message(closing=_CLOSING[self._take().text], depth=depth + 1)

    def _list(self, depth: int) -> list[str | int | float | Word | Message]:
        self._take()
        values: list[str | int | float | Word | Message] = []
        while not self._sees("]"):
            if values:
                self._want(",")
            values.append(self._nested(depth) if self._sees("{", "<") else self._scalar())
        self._take()
        return values

    def _scalar(self) -> str | int | float | Word:
        if self._next.kind == "text":
            parts = []
            while self._next.kind == "text":
                parts.append(_unescaped(self._take()))
            return b"".join(parts).decode("utf-8", errors="replace")
        negative = self._sees("-")
        if negative:
            self._take()
        if self._next.kind == "number":
            number = _number(self._take())
            return -number if negative else number
        if self._next.kind == "word":
            word = self._next.text
            if word.lower() in ("inf", "infinity", "nan"):
                self._take()
                return -float(word) if negative else float(word)
            if not negative:
                return Word(self._take().text)
        raise self._fail("a value")


def _number(token: _Token) -> int | float:
    text = token.text
    try:
        if text[:2] in ("0x", "0X"):
            return int(text, 16)
        if text.isdigit():
            return int(text, 8) if len(text) > 1 and text[0] == "0" else int(text)
        return float(text.rstrip("fF"))
    except ValueError as error:  # 08, or more digits than Python reads
        raise ValueError(f"line {token.line}: {text[:40]!r} is no number; correct it") from error


def _unescaped(token: _Token) -> bytes:
    """The bytes of a text in quotes: escapes name bytes, not characters."""
    body, found, at = token.text[1:-1], [], 0
    for match in _ESCAPE.finditer(body):
        found.append(body[at : match.start()].encode("utf-8", errors="replace"))
        found.append(_escaped(match, token))
        at = match.end()
    found.append(body[at:].encode("utf-8", errors="replace"))
    return b"".join(found)


def _escaped(match: re.Match[str], token: _Token) -> bytes:
    octal, hexadecimal, short, long, plain = match.groups()
    if octal or hexadecimal:
        return bytes([(int(octal, 8) if octal else int(hexadecimal, 16)) & 255])
    if plain in _PLAIN:
        return bytes([_PLAIN[plain]])
    code = int(short or long or "0", 16)
    if plain or code > 0x10FFFF:
        raise ValueError(f"line {token.line}: {match[0]!r} is no escape; correct it")
    return chr(code).encode("utf-8", errors="replace")
