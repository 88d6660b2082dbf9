"""The number of table groups that `lightning-gr plan` recommends: figures by hand, by loops, and of a small log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_gr.cli import main
from lightning_gr.cli.errors import UserError
from lightning_gr.cli.plan_groups import GroupAdvice, Link, Network, distinct_of_ranks, parse_link, recommend
from lightning_gr.cli.plan_memory import Scores, Table
from lightning_gr.data import SequenceDataModule

ITEM = Table("item", ("item_id", "target"), rows=1000, dim=4, row_bytes=100, cut="row_wise")
NETWORK = Network(2, inside=Link(1e9, 1e-6), between=Link(1e8, 1e-5))
DISTINCT = {1: [100.0], 2: [150.0], 4: [200.0]}
Run = Callable[..., tuple[int, str, str]]


def advice_of(*, limit: int | None = None, network: Network = NETWORK, **settings: Any) -> GroupAdvice:
    """Of four ranks whose memory holds the tables and 500 bytes."""
    return recommend(
        [ITEM],
        DISTINCT.__getitem__,
        ranks=4,
        network=network,
        held=lambda ranks: (1000 // ranks * 100, 1000 // ranks * 100 + 500),
        limit=limit,
        **settings,
    )


# ---- the pure function -------------------------------------------------------------------------------------------


def test_exchange_by_hand() -> None:
    """Two machines of two ranks; an id is 16 bytes, and a row 16; sizes, keys, rows and gradients travel one by one."""
    one, two, four = advice_of().choices
    # One group: to each of 4 ranks a quarter of 100 keys, rows and gradients; two of them are on the other machine.
    assert (one.table_groups, one.replica_bytes, one.replica_seconds) == (1, 0, 0)
    assert one.group_bytes == pytest.approx(3 * 3 * 25 * 16)
    assert one.group_seconds == pytest.approx(4 * 2 * 1e-5 + 2 * 3 * 25 * 16 / 1e8)
    # Two: half of them to the neighbour; to a replica on the other machine the keys and gradients of 75 rows.
    assert two.group_bytes == pytest.approx(3 * 50 * 16)
    assert two.group_seconds == pytest.approx(4 * 1e-6 + 3 * 50 * 16 / 1e9)
    assert two.replica_bytes == pytest.approx(2 * 75 * 16)
    assert two.replica_seconds == pytest.approx(3 * 1e-5 + 2 * 75 * 16 / 1e8)
    # Four: all that a rank looks up to three replicas.
    assert (four.group_bytes, four.group_seconds) == (0, 0)
    assert four.replica_bytes == pytest.approx(3 * 2 * 100 * 16)
    assert four.replica_seconds == pytest.approx(3 * 2 * 1e-5 + 2 * 2 * 100 * 16 / 1e8)
    assert two.seconds == two.group_seconds + two.replica_seconds
    assert [choice.table_bytes for choice in (one, two, four)] == [25_000, 50_000, 100_000]
    assert [choice.total_bytes for choice in (one, two, four)] == [25_500, 50_500, 100_500]


def test_micro_steps_exchange_each() -> None:
    for once, thrice in zip(advice_of().choices, advice_of(micro_steps=3).choices, strict=True):
        assert thrice.group_bytes == 3 * once.group_bytes
        assert thrice.replica_bytes == 3 * once.replica_bytes
        assert thrice.seconds == pytest.approx(3 * once.seconds)


def test_a_corpus_is_activated_whole_and_queries_stay_in_a_group() -> None:
    """Ten queries a rank of width 4 go to each rank of the group, and their gradients come back."""
    scores = Scores(1000, queries_per_token=0.5, dim=4)
    corpus = Table("item", ("item_id", "target", "corpus"), rows=1000, dim=4, row_bytes=100, cut="row_wise")
    assert advice_of(scores=Scores(None, 0.5, 4), tokens=20) == advice_of()  # against labels of all ranks
    choices = [advice_of(scores=scores, tokens=20).choices, advice_of().choices]
    for table in (ITEM, corpus):
        advice = recommend(
            [table],
            DISTINCT.__getitem__,
            ranks=4,
            network=NETWORK,
            held=lambda ranks: (0, 0),
            scores=scores,
            tokens=20,
        )
        choices.append(advice.choices)
    for size, scored, plain, _, whole in zip((4, 2, 1), *choices, strict=True):
        assert scored.group_bytes - plain.group_bytes == pytest.approx((size - 1) * 2 * 10 * 4 * 4)
        assert whole.group_bytes == pytest.approx(scored.group_bytes)
        assert scored.replica_bytes == pytest.approx(plain.replica_bytes)
        assert whole.replica_bytes == pytest.approx((4 // size - 1) * 2 * 1000 / size * 16)
    assert choices[0][1].group_seconds - choices[1][1].group_seconds == pytest.approx(2 * (1e-6 + 10 * 4 * 4 / 1e9))


def test_the_quickest_that_fits_is_recommended() -> None:
    assert advice_of().table_groups == 2
    assert advice_of().reason == "the quickest"
    assert (advice_of(limit=50_500).table_groups, advice_of(limit=50_499).table_groups) == (2, 1)
    assert [choice.fits for choice in advice_of(limit=50_499).choices] == [True, False, False]
    none = advice_of(limit=25_499)
    assert none.table_groups == 1
    assert "none fits" in none.reason
    # The same link everywhere: bytes alone are 225, 300 and 600 x 16; messages alone 4 x 3, 4 + 3 and 3 x 3.
    evenly = Network(4, inside=Link(1e9, 0.0), between=Link(1e9, 0.0))
    assert advice_of(network=evenly).table_groups == 1
    assert advice_of(network=Network(1, inside=Link(1e12, 0.0), between=Link(1e30, 1e-3))).table_groups == 2
    # Of equal ones the least.
    assert advice_of(network=Network(4, inside=Link(1e30, 0.0), between=Link(1e30, 0.0))).table_groups == 1


@pytest.mark.parametrize(("ranks", "node"), [(12, 4), (12, 8), (12, 5), (16, 1), (6, 8)])
def test_seconds_are_those_of_the_rank_with_the_fewest_near(ranks: int, node: int) -> None:
    network = Network(node, inside=Link(3e3, 0.5), between=Link(1e2, 2.0))
    for size in (x for x in range(1, ranks + 1) if ranks % x == 0):
        for kind in ("group", "replicas"):
            worst = 0.0
            for rank in range(ranks):
                alike = [
                    x
                    for x in range(ranks)
                    if (x // size == rank // size if kind == "group" else x % size == rank % size)
                ]
                near = sum(x // node == rank // node for x in alike) - 1
                far = len(alike) - 1 - near
                worst = max(worst, near * (0.5 + 60 / 3e3), far * (2 + 60 / 1e2))
            sets = np.arange(ranks) // size if kind == "group" else np.arange(ranks) % size
            assert network.seconds(sets, 60.0) == pytest.approx(worst)


def test_distinct_ids_grow_by_a_power_law() -> None:
    few, many = (100, [50, 10, 90, 7]), (400, [100, 10, 360, 0])
    tables = [ITEM, ITEM, Table("user", ("user",), None, 4, 100, "row_wise"), ITEM]
    of = distinct_of_ranks(tables, 100, few, many)
    assert of(1) == pytest.approx([50, 10, 90, 7])
    assert of(4) == pytest.approx([100, 10, 360, 28])
    assert of(16) == pytest.approx([200, 10, 1440, 112])
    assert of(1024)[0] == 1000  # as many as there are rows
    assert distinct_of_ranks(tables, 25, few, many)(4) == pytest.approx([50, 10, 90, 7])
    assert distinct_of_ranks([ITEM], 100, (100, [50]), (100, [50]))(3) == [150]


@pytest.mark.parametrize("text", ["300", "300,5,1", "fast,5", "0,5", "300,-1", "inf,5", ""])
def test_a_link_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--inside {text}: expected GB/s and microseconds")):
        parse_link("--inside", text)
    assert parse_link("--inside", "12.5, 3") == Link(12.5e9, 3e-6)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lightning_gr.data import write_synthetic_log

    path = tmp_path_factory.mktemp("groups") / "events.csv"
    write_synthetic_log(path, num_users=600, num_items=2000, mean_length=12, max_length=60, seed=0)
    return path


@pytest.fixture
def run(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(recipe: str, *words: str) -> tuple[int, str, str]:
        settings = [f"--data.init_args.path={log}", "--data.init_args.global_tokens=200"]
        code = main(["plan", "--config", recipe, *settings, *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


SAMPLED = ["--model.init_args.loss=sampled_softmax", "--model.init_args.num_negatives=2"]


def test_advice_for_a_recipe(run: Run, log: Path) -> None:
    words = ["--model.init_args.loss=sampled_softmax", "--model.init_args.negatives=in_batch"]
    words.append("--data.init_args.global_tokens=2000")
    code, out, error = run("hstu/tiny-dynamic", *words, "--trainer.devices=4", "--json", "--ranks", "1,4")
    assert code == 0, error
    found = json.loads(out)
    advice, row = found["table_groups"], found["ranks"][1]
    choices = {choice["table_groups"]: choice for choice in advice["choices"]}
    assert (advice["ranks"], list(choices)) == (4, [1, 2, 4])
    assert advice["recommended"] == min(choices, key=lambda m: choices[m]["seconds"])
    assert choices[1]["group_bytes"] == pytest.approx(row["exchange"]["ids"] + row["exchange"]["rows"], rel=0.1)
    (item,) = found["tables"]
    shares = [-(-item["rows"] // ranks) * item["row_bytes"] for ranks in (4, 2, 1)]
    assert [choices[m]["table_bytes"] for m in (1, 2, 4)] == shares
    rest = row["memory"]["total"] - row["memory"]["tables"]
    assert [choices[m]["total_bytes"] for m in (1, 2, 4)] == pytest.approx([share + rest for share in shares])
    # A rank of two groups sends its half of what the two ranks of its group look up: half of a batch's samples.
    data = SequenceDataModule(path=str(log), global_tokens=2000, raw_ids=True, max_length=50, seed=42)
    batch = next(iter(data.train_dataloader()))
    middle = int(batch.layout.offsets_B1[(batch.layout.offsets_B1 <= batch.num_tokens // 2).sum() - 1])
    seen = torch.cat([batch.features["item_id"].values()[:middle], batch.labels["next_item"].values_N[:middle]])
    distinct = len(seen.unique()) * batch.num_tokens / (2 * middle)
    assert choices[2]["replica_bytes"] == pytest.approx(distinct / 2 * (16 + 4 * 128), rel=0.1)


def test_what_is_printed_can_be_pasted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gr.cli.plan_show._WIDTH_OF_FILES", 80)
    words = ["--ranks", "8", "--ranks_per_node", "4", "--memory", "4.1MB"]
    code, out, error = run("hstu/tiny-dynamic", *SAMPLED, *words)
    assert code == 0, error
    lines = out.splitlines()
    shown = lines[next(place for place, line in enumerate(lines) if line.startswith("table groups: ")) :]
    assert max(map(len, shown)) <= 80
    assert "…" not in "".join(shown)
    assert [line.split("│")[1].strip() for line in shown if line.startswith("│")] == ["1*", "2", "4", "8"]
    assert any(re.search(r"K! │$", line) for line in shown)
    assert "! with all else that a rank holds, more than its memory" in shown
    assert "a machine of 4 ranks" in out
    assert shown[-2] == "put this under trainer.strategy.init_args:"
    recommended = re.match(r"recommended: (\d+), the quickest that fits in ", shown[-3])
    assert recommended is not None
    assert yaml.safe_load(shown[-1]) == {"table_groups": int(recommended[1])}


@pytest.mark.parametrize(
    ("recipe", "ranks", "reason"),
    [
        ("hstu/tiny", "4", "table item is static: only dynamic ones can be held by every group"),
        ("hstu/tiny-dynamic", "1", "there is one rank"),
    ],
)
def test_one_group_with_the_reason(recipe: str, ranks: str, reason: str, run: Run) -> None:
    code, out, _ = run(recipe, "--ranks", ranks)
    assert code == 0
    assert out.splitlines()[-1] == f"table_groups: 1, since {reason}"
    code, out, _ = run(recipe, "--ranks", ranks, "--json")
    advice = {"ranks": int(ranks), "recommended": 1, "reason": reason, "choices": []}
    assert json.loads(out)["table_groups"] == advice


def test_groups_of_the_recipe_that_do_not_fit(run: Run) -> None:
    words = [*SAMPLED, "--ranks", "8", "--memory", "4.1MB", "--trainer.strategy.init_args.table_groups"]
    code, _, error = run("hstu/tiny-dynamic", *words, "8")
    assert code == 2
    said = re.fullmatch(r"lightning-gr: error: table_groups=8: a rank would hold tables of .*; use (\d)\n", error)
    assert said is not None
    code, out, error = run("hstu/tiny-dynamic", *words, said[1])
    assert code == 0, error
    assert f"\n│ {said[1] + '*':>6} │" in out
    assert f"is of 1 group, and not of {said[1]}" in out or said[1] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--between", "25"], "--between 25: expected GB/s and microseconds a message, such as 300,5"),
        (["--ranks_per_node", "0"], "--ranks_per_node 0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, run: Run) -> None:
    code, _, error = run("hstu/tiny-dynamic", *words)
    assert (code, error) == (2, f"lightning-gr: error: {said}\n")
