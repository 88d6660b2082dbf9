"""docs/images/architecture.svg is what its source draws, loads nothing, and no box or line of text leaves its place."""

from __future__ import annotations

import importlib.util
import re
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"
WIDEST = 8.7
"""Pixels of a letter of a title on the mean, in a wide font."""


def source() -> Any:
    spec = importlib.util.spec_from_file_location("architecture_picture", IMAGES / "architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_source_draws() -> None:
    drawn = (IMAGES / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == source().picture(), "run python docs/images/architecture.py"
    ElementTree.fromstring(drawn)
    assert re.findall(r"https?://[^\s\"]+", drawn) == ["http://www.w3.org/2000/svg"]


def test_boxes_lie_apart_and_hold_their_text() -> None:
    module = source()
    for one, other in combinations(module.BOXES, 2):
        apart_x = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
        apart_y = one[1] + one[3] <= other[1] or other[1] + other[3] <= one[1]
        assert apart_x or apart_y, f"{one[5]} lies on {other[5]}"
    for x, y, width, height, _, title, lines in module.BOXES:
        assert x + width <= module.WIDTH
        assert y + height <= module.HEIGHT
        assert max(len(title) * WIDEST, *(len(line) * 7.2 for line in lines)) <= width, title
        assert 17 * (1 + len(lines)) + 8 <= height, title
