"""Bytes that were a valid file once: cut, flipped, doubled, with numbers, marks and encodings that trip readers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PAYLOADS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x80",
        b"\xc3",
        b"\r",
        b"\n",
        b"\n\n",
        b"\r\n",
        b" ",
        b"\t",
        b"\x1a",
        b"\x1c",
    ),
    *(b"9" * 30, b"-1", b"0", b"-0", b"1e309", b"1e18", b"nan", b"inf", b"1.5", b"0x10", b"1_000", b"+7", b"007"),
    *(b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808", b"18446744073709551616"),
    *(b",", b",,", b"::", b":", b'"', b'""', b"'", b";", b"|", b"{}", b"[", b"[[[[", b"null", b"None", b"true", b"\\"),
    *(x.encode() for x in ("é", "\u2028", "²", "٣", "\u00a0", "\u200b", "𝟙", "user_id", "timestamp")),
)
_NUMBER = re.compile(rb"\d+")

Edit = tuple[str, int, int, int]
"""Kind, two places in 1/65536 of the length, and the number of a payload or byte."""

_KINDS = ("flip", "set", "delete", "double", "insert", "number", "cut", "swap_lines", "field", "line", "encode")

edits: st.SearchStrategy[list[Edit]] = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 65535), st.integers(0, 65535), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    """The bytes after some changes, which are a function of the arguments."""
    for kind, first, second, number in changes:
        data = _DO[kind](data, first, second, number)
    return data


def _place(data: bytes, where: int) -> int:
    return where * len(data) // 65536


def _span(data: bytes, first: int, second: int) -> tuple[int, int]:
    begin = _place(data, first)
    # Mostly short ones.
    return begin, begin + 1 + (second % 64 if second % 4 else _place(data, second))


def _flip(data: bytes, first: int, second: int, number: int) -> bytes:
    at = _place(data, first)
    return data[:at] + bytes(x ^ (1 << number % 8) for x in data[at : at + 1]) + data[at + 1 :]


def _set(data: bytes, first: int, second: int, number: int) -> bytes:
    at = _place(data, first)
    return data[:at] + bytes([number]) + data[at + 1 :]


def _delete(data: bytes, first: int, second: int, number: int) -> bytes:
    begin, end = _span(data, first, second)
    return data[:begin] + data[end:]


def _double(data: bytes, first: int, second: int, number: int) -> bytes:
    begin, end = _span(data, first, second)
    return data[:end] + data[begin:end] + data[end:]


def _insert(data: bytes, first: int, second: int, number: int) -> bytes:
    at = _place(data, first)
    return data[:at] + PAYLOADS[number % len(PAYLOADS)] + data[at:]


def _replace_number(data: bytes, first: int, second: int, number: int) -> bytes:
    found = [*_NUMBER.finditer(data)]
    if not found:
        return data
    match = found[first * len(found) // 65536]
    return data[: match.start()] + PAYLOADS[number % len(PAYLOADS)] + data[match.end() :]


def _cut(data: bytes, first: int, second: int, number: int) -> bytes:
    return data[: _place(data, first)]


def _swap_lines(data: bytes, first: int, second: int, number: int) -> bytes:
    lines = data.split(b"\n")
    i, j = first * len(lines) // 65536, second * len(lines) // 65536
    lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def _blank_field(data: bytes, first: int, second: int, number: int) -> bytes:
    fields = re.split(rb"([,\t: |]+)", data)
    at = 2 * (first * ((len(fields) + 1) // 2) // 65536)
    fields[at] = b""
    return b"".join(fields)


def _replace_line(data: bytes, first: int, second: int, number: int) -> bytes:
    lines = data.split(b"\n")
    lines[first * len(lines) // 65536] = PAYLOADS[number % len(PAYLOADS)] * (1 + second % 3)
    return b"\n".join(lines)


def _encode(data: bytes, first: int, second: int, number: int) -> bytes:
    codec = ("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig")[number % 5]
    return data.decode("utf-8", errors="replace").encode(codec, errors="replace")


_DO: dict[str, Callable[[bytes, int, int, int], Any]] = {
    "flip": _flip,
    "set": _set,
    "delete": _delete,
    "double": _double,
    "insert": _insert,
    "number": _replace_number,
    "cut": _cut,
    "swap_lines": _swap_lines,
    "field": _blank_field,
    "line": _replace_line,
    "encode": _encode,
}

garbage: st.SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=100).map(lambda text: text.encode("utf-8", errors="replace")),
    st.lists(st.sampled_from(PAYLOADS), max_size=20).map(b"".join),
)
