"""Balancing: what it takes, from Python and YAML, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_gr.balancing import Balancing, SequenceCost


def parse(text: str) -> Balancing:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--balancing", type=Balancing)
    parsed: Balancing = parser.instantiate_classes(parser.parse_string(text)).balancing
    return parsed


def test_from_yaml() -> None:
    assert parse("balancing: {mode: local, partitioner: zigzag, cost: tokens, tokens_per_rank: 4096}") == Balancing(
        mode="local", partitioner="zigzag", cost="tokens", tokens_per_rank=4096
    )
    assert parse("balancing: {cost: {linear: 2, quadratic: 0.5}}") == Balancing(cost=SequenceCost(2, 0.5))
    assert parse("balancing: {}") == Balancing()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "global"}, r"^mode='global': expected one of auto, planned, local, exchange"),
        ({"partitioner": "best"}, r"^partitioner='best': expected one of lpt, karmarkar_karp, zigzag, contiguous"),
        ({"cost": "flops"}, r"^cost='flops': expected model, tokens or a SequenceCost"),
        ({"tokens_per_rank": 0}, r"^tokens_per_rank=0: expected at least 1, or null"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balancing(**changes)
