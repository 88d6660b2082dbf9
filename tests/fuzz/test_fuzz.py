"""A few inputs of each fuzzed target, the same in each run; benchmarks/fuzz.py tries many more."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import hypothesis
import polars as pl
import pytest
from hypothesis import strategies as st

from lightning_gr.data import read_events
from lightning_gr.data.formats import open_log
from tests.checkpoint.test_checkpoint_faults import save_some
from tests.fuzz import checkpoints, configs
from tests.fuzz.mutations import PAYLOADS, edited, edits
from tests.fuzz.outcome import Finding, refusal, time_limit
from tests.fuzz.targets import target


def _few(count: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("logs", 40), ("prepare", 10), ("masks", 60), pytest.param("configs", 10, marks=pytest.mark.long)],
)
def test_inputs_are_taken_or_refused_in_words(name: str, count: int) -> None:
    chosen, outcomes = target(name), set[str]()

    @_few(count)
    @hypothesis.given(chosen.inputs)
    def run(value: Any) -> None:
        outcomes.add(chosen.check(value))

    run()
    assert outcomes <= {"accepted", "refused"}
    assert "refused" in outcomes


@pytest.mark.dist
def test_checkpoints_whose_files_are_changed_are_refused(gloo: Any, tmp_path: Path) -> None:
    gloo(2).run(save_some, 2, str(tmp_path))
    chain = checkpoints.Chain(tmp_path)
    outcomes = set[str]()

    @_few(12)
    @hypothesis.given(checkpoints.CHECKPOINTS.inputs)
    def run(asked: dict[str, Any]) -> None:
        outcomes.add(chain.check(asked))

    run()
    assert "refused" in outcomes
    assert {path: path.read_bytes() for path in chain.files} == chain.data


# ---- the fuzzer itself -------------------------------------------------------------------------------------------


@time_limit(0.05)
def _never_ends() -> None:
    while True:
        pass


def test_the_fuzzer_finds_what_is_no_refusal() -> None:
    def fails(error: BaseException) -> Any:
        def call() -> None:
            raise error

        return call

    assert refusal(lambda: None) is None
    assert refusal(fails(ValueError("age=-1: expected at least 0"))) == "age=-1: expected at least 0"
    for error in (
        KeyError("x"),
        ValueError(""),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        AttributeError("x"),
    ):
        with pytest.raises(Finding):
            refusal(fails(error))
    with pytest.raises(Finding, match="hangs"):
        _never_ends()


@hypothesis.given(st.binary(max_size=80), edits)
def test_edits_are_a_function_of_their_arguments(data: bytes, changes: Any) -> None:
    assert edited(data, changes) == edited(data, copy.deepcopy(changes))


def test_a_changed_recipe_is_another_one() -> None:
    asked = {"recipe": "hstu/tiny", "changes": [("value", 0, 0, 2)], "text": None}
    assert configs._written(asked) != configs._written({**asked, "changes": []})
    assert all(PAYLOADS)


# ---- what it has found -------------------------------------------------------------------------------------------


def test_a_header_with_a_line_end_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.csv"
    path.write_bytes(b"user_id,item\r_id,timestamp\n1,2,3\n")
    with pytest.raises(ValueError, match=r"events\.csv: line 1 is no header"):
        open_log(path, "csv")


def test_a_panic_of_polars_is_a_refusal_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panics(*args: Any, **kwargs: Any) -> Any:
        raise pl.exceptions.PanicException("assertion failed")

    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id\n1,2\n")
    monkeypatch.setattr(pl, "read_csv", panics)
    with pytest.raises(ValueError, match=r"events\.csv: cannot be read \(assertion failed\)"):
        read_events(path)


def test_a_line_end_inside_a_header_of_movies_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,2,3,4\n")
    for content in (b"movieId\r,genres\n2,Drama\n", b"movieId,genres\n2,Dra\rma\n"):
        (tmp_path / "movies.csv").write_bytes(content)
        log = open_log(tmp_path)
        assert log.items is not None
        with pytest.raises(ValueError, match=r"movies\.csv: line \d cannot be read \(.+\); get the file again"):
            log.items.frame()


def test_a_name_of_a_column_that_no_store_can_hold_is_refused(tmp_path: Path) -> None:
    from lightning_gr.data.formats import Columns
    from lightning_gr.data.prepare import prepare

    atomic = tmp_path / "ml.inter"
    atomic.write_bytes(b"user_id:token\titem_id:token\tra\0ting:float\n1\t2\t3\n")
    with pytest.raises(ValueError, match=r"ml\.inter: line 1 has the field 'ra\\x00ting:float'"):
        open_log(atomic)
    for header, said in (("\t:float", "has the field ':float'"), ("\tuser_id:token", "has two fields user_id")):
        atomic.write_text(f"user_id:token\titem_id:token{header}\n1\t2\t3\n")
        with pytest.raises(ValueError, match=rf"ml\.inter: line 1 {said}"):
            open_log(atomic)
    table = tmp_path / "events.jsonl"
    table.write_text('{"user_id": 1, "item_id": 2, "a\\u0000b": 3}\n')
    with pytest.raises(ValueError, match=r"a\\x00b.*NUL"):
        prepare(open_log(table, columns=Columns(dense=("a\0b",))), tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("text", "culprit"),
    [("config: {x: 1}\n", "config="), ("trainer: null\n", "trainer=None"), ("trainer: [1]\n", "trainer=")],
)
def test_what_is_no_setting_is_refused_before_anything_is_parsed(tmp_path: Path, text: str, culprit: str) -> None:
    from lightning_gr.cli.errors import UserError
    from lightning_gr.cli.training import _refuse_what_is_no_setting

    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.yaml: {culprit}"):
        _refuse_what_is_no_setting(str(path), "mine.yaml")


def test_what_a_constructor_says_of_a_setting_of_several_types_is_one_line(tmp_path: Path) -> None:
    from lightning_gr.cli.errors import one_line
    from lightning_gr.cli.training import GRCLI

    path = tmp_path / "mine.yaml"
    init_args = "{sharding: row_wise, sparse_lr: -0.5}"
    path.write_text(
        "trainer:\n  logger: false\n  accelerator: cpu\n  strategy:\n"
        f"    class_path: lightning_gr.plugins.SequenceBalancedStrategy\n    init_args: {init_args}\n"
        "model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n"
        "data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}\n"
    )
    with pytest.raises(ValueError, match="sparse_lr") as raised:
        GRCLI(args=["--config", str(path)], run=False)
    assert one_line(raised.value) == "sparse_lr=-0.5: expected a rate >= 0"
