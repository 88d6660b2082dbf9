"""What a recipe's header expects of it: test metrics with tolerances, which ``lightning-gr verify`` compares with.

The comment at the head of a recipe has a line that people and programs read::

    # Expected: test HR@10 .083 ± .003, NDCG@10 .044 ± .003, measured with 3 seeds; docs/quality.md

Up to the first semicolon, opening bracket or ``, measured`` there are metrics alone. ``test HR@10`` is logged as
``test/HR@10``, ``test like AUC`` as ``test/like/AUC``; the first word holds for the metrics after it too. A recipe of
which nothing is known has ``not yet measured; why`` in that place. ``# Published:`` holds figures of others, as text.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

UNMEASURED = "not yet measured"
EXAMPLE = "# Expected: test HR@10 .083 ± .003, NDCG@10 .044 ± .003, measured with 3 seeds"
STAGE = "test"

_END = re.compile(r";|\(|, measured")
_METRIC = re.compile(r"(?P<name>\S.*?) (?P<value>-?\d*\.?\d+) (?:±|\+-) (?P<tolerance>\d*\.?\d+)")
_FIELD = re.compile(r"# ?(?P<name>[A-Z][\w ]*):(?:\s+(?P<text>.*))?")
_MORE = re.compile(r"#\s{2,}(?P<text>\S.*)")


@dataclass(frozen=True)
class Expected:
    """A metric that a recipe should reach.

    Args:
        metric: as the run logs it, such as ``test/HR@10``.
        value: the mean over seeds that is expected.
        tolerance: how far from it a mean may be.
    """

    metric: str
    value: float
    tolerance: float

    def verdict(self, mean: float) -> str:
        """``within`` the tolerance, ``below`` or ``above``; ``not finite`` where the mean is no number.

        Args:
            mean: of the metric over the runs.
        """
        # Figures of a header have few decimals; the sum of two of them in binary may be off in the last place.
        slack = 1e-9 * max(1.0, abs(self.value))
        if mean != mean or mean in (float("inf"), float("-inf")):
            return "not finite"
        if abs(mean - self.value) <= self.tolerance + slack:
            return "within"
        return "below" if mean < self.value else "above"


@dataclass(frozen=True)
class Header:
    """What the comment at the head of a recipe says of its quality.

    Args:
        expected: the metrics with their tolerances; empty where the recipe is not yet measured.
        text: the whole of ``# Expected:``.
        published: the whole of ``# Published:``; empty where there is none.
    """

    expected: tuple[Expected, ...]
    text: str
    published: str = ""


def read_header(file: Path) -> Header:
    """What a recipe's header expects.

    Args:
        file: a recipe.

    Raises:
        ValueError: there is no such line in its header, or one that cannot be read.
    """
    fields = header_fields(file)
    text = fields.get("Expected")
    if not text:
        raise ValueError(f"{file}: its header has no expectation; write a line such as {EXAMPLE!r}")
    if text.startswith(UNMEASURED):
        return Header((), text, fields.get("Published", ""))
    try:
        expected = _metrics(_END.split(text, maxsplit=1)[0])
    except ValueError as error:
        raise ValueError(
            f"{file}: # Expected: {error}; write it as {EXAMPLE!r}, or as '# Expected: {UNMEASURED}; why'"
        ) from None
    return Header(expected, text, fields.get("Published", ""))


def header_fields(file: Path) -> dict[str, str]:
    """The fields of the comment at the head of a recipe, such as ``Data`` and ``Launch``, each as one line.

    Args:
        file: a recipe.
    """
    fields: dict[str, str] = {}
    name = None
    with file.open(encoding="utf-8") as lines:
        for line in itertools.takewhile(lambda line: line.startswith("#"), lines):
            if (found := _FIELD.fullmatch(line.rstrip())) is not None:
                name = found["name"]
                fields[name] = found["text"] or ""
            elif name is not None and (found := _MORE.fullmatch(line.rstrip())) is not None:
                fields[name] = f"{fields[name]} {found['text']}".strip()
            else:
                name = None
    return fields


def _metrics(text: str) -> tuple[Expected, ...]:
    found: list[Expected] = []
    for part in re.split(r", (?:and )?| and ", text.strip().rstrip(".")):
        match = _METRIC.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{part.strip()!r} is no metric with a value and a tolerance")
        name = match["name"].replace(" ", "/")
        if not found and not name.startswith(f"{STAGE}/"):
            raise ValueError(f"{part.strip()!r} does not begin with the word {STAGE}")
        name = name if name.startswith(f"{STAGE}/") else f"{STAGE}/{name}"
        if name in (x.metric for x in found):
            raise ValueError(f"{name} is there twice")
        found.append(Expected(name, float(match["value"]), float(match["tolerance"])))
    return tuple(found)
