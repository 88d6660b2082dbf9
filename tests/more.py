"""Values of a test's parameter that only `make test-all` takes: further combinations of a law that one has shown."""

from __future__ import annotations

from typing import Any

import pytest


def more(*values: Any) -> list[Any]:
    """Each value as one of a parameter; a tuple is one of several parameters together."""
    return [pytest.param(*value if isinstance(value, tuple) else [value], marks=pytest.mark.long) for value in values]
