"""The end-to-end benchmark compares like with like: the same samples, losses and tests on all of its sides."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import end_to_end_retrieval
import end_to_end_systems
import numpy as np
import pytest
import torch
from end_to_end_retrieval import Training, synthetic_log
from end_to_end_systems import SIZES, check, figure, forms, speedup, speedup_of_repeats
from gloo_processes import World, cores_of_two
from plain_lightning import FIELDS, TASK, Samples, Size

TINY = Size(embedding_dim=8, dim=8, num_layers=1, num_heads=2, mean=12.0, cap=40, samples=3)
ROWS = {name: min(count, 50) for name, count in FIELDS.items()}


@pytest.fixture(scope="module")
def pair():
    world = World(cores_of_two(), end_to_end_systems.train)
    yield world
    world.close()


def run(pair, **changes):
    return pair.train(replace(forms()["base"], **changes), TINY, steps=3, slow=False, rows=ROWS)


def total(ranks, name):
    return sum(np.sum(rank[name]) for rank in ranks)


def test_tables_dedup_and_the_padded_reference_train_the_same_to_rounding(pair):
    base = run(pair)
    for changes in ({"tables": "dynamic"}, {"tables": "dynamic", "dedup": True}, {"backend": "reference"}):
        other = run(pair, **changes)
        assert [x["tokens"] for x in other] == [x["tokens"] for x in base]
        assert total(other, "loss") == pytest.approx(total(base, "loss"), rel=1e-4), changes


def test_planned_batches_are_even_and_lose_no_sample(pair):
    base, balanced = run(pair, tables="dynamic"), run(pair, tables="dynamic", balanced=True)
    both = [np.array([x["tokens"] for x in ranks]) for ranks in (base, balanced)]
    assert both[0].sum() == both[1].sum()
    assert both[1].max(0).sum() < both[0].max(0).sum()
    pipelined = run(pair, tables="dynamic", balanced=True, pipeline_depth=2)
    assert total(pipelined, "loss") == pytest.approx(total(balanced, "loss"), rel=1e-6)


def test_deduplication_sends_less_and_the_bytes_sent_are_those_of_rows_that_leave(pair):
    plain, deduplicated = run(pair, tables="dynamic"), run(pair, tables="dynamic", dedup=True)
    assert total(deduplicated, "sent") < 0.8 * total(plain, "sent")
    # Of two processes each, about a half of the rows of six features leaves, forward, and so do their gradients.
    rows = total(plain, "tokens") * len(ROWS) * TINY.embedding_dim * 4
    assert 0.7 * rows < total(plain, "sent") < 1.6 * rows


def test_a_network_changes_no_number_and_no_byte(pair):
    form = forms()["dedup"]
    fast, slow = (pair.train(form, TINY, steps=3, slow=slow, rows=ROWS) for slow in (False, True))
    assert total(slow, "loss") == total(fast, "loss")
    assert total(slow, "sent") == total(fast, "sent")


def test_forms_grow_by_one_part_at_a_time():
    found = forms()
    for name, before in end_to_end_systems.SWITCHES.items():
        assert sum(a != b for a, b in zip(vars(found[name]).values(), vars(found[before]).values(), strict=True)) == 1
    assert vars(found["padded"]) == vars(found["base"]) | {"backend": "reference"}


def test_samples_have_a_long_tail_and_a_batch_has_them_in_order():
    samples = Samples(size=SIZES["lookups"], count=400)
    lengths = np.diff(samples.offsets)
    assert lengths.max() == SIZES["lookups"].cap
    assert lengths.mean() > 1.4 * np.median(lengths)
    batch = samples.collate([7, 2])
    assert batch.layout.lengths_B.tolist() == [lengths[7], lengths[2]]
    begin, end = samples.offsets[2], samples.offsets[3]
    assert torch.equal(batch.features["music"].values()[lengths[7] :], samples.ids["music"][begin:end])
    assert batch.denominators[TASK] == batch.num_tokens == batch.labels[TASK].num_labels


def test_runs_that_do_not_train_the_same_are_refused():
    run = {"tokens": np.array([4, 6]), "loss": 0.5}
    check({"base": [run], "tables": [run]})
    with pytest.raises(SystemExit, match="same samples"):
        check({"base": [run], "tables": [run | {"tokens": np.array([5, 6])}]})
    for loss in (0.6, math.nan):
        with pytest.raises(SystemExit, match="same loss"):
            check({"base": [run], "tables": [run | {"loss": loss}]})


def test_a_speed_up_is_of_tokens_a_second_whatever_else_the_machine_did_in_a_repeat():
    tokens = {"tokens": np.array([9, 10, 30])}  # the first is of the warm-up
    quick = [tokens | {"seconds": np.array(x)} for x in ([1.0, 3.0], [1.0, 3.0], [50.0, 3.0])]
    slow = [tokens | {"seconds": np.array(x)} for x in ([4.0, 6.0], [4.0, 60.0], [4.0, 6.0])]
    found = speedup(quick, slow)
    # Steps take 1.5 s more and less than 2.5 times as long: Student's t of one degree of freedom, 12.706, times
    # 2.5 times the root of 2 (1.5 ** 2 + 1.5 ** 2) over 10.
    assert figure("x", found) == {"x": 2.5, "x_half_width": pytest.approx(12.706 * 2.5 * 0.3, abs=1e-2)}


def test_a_speed_up_of_other_batches_has_the_spread_of_both():
    even = [{"tokens": np.array([20, 20]), "seconds": np.array([2.0, 2.0])}]
    uneven = [{"tokens": np.array([10, 30]), "seconds": np.array([3.0, 5.0])}]
    # 10 and 5 tokens a second; of the latter the steps have 5 tokens less and more than their share of 40.
    found = speedup(even, uneven)
    assert found.mean == 2
    assert found.half_width == pytest.approx(2 * 4.303 * math.sqrt(2 * (25 + 25)) / 40, rel=1e-3)
    assert speedup(uneven, even).mean == 0.5
    twice = [even[0], {"tokens": np.array([20, 20]), "seconds": np.array([4.0, 4.0])}]
    # 2 and 1 times as quick: Student's t of one degree of freedom over the root of 2, times the deviation .7071.
    found = speedup_of_repeats(twice, uneven * 2)
    assert (found.mean, found.half_width) == (1.5, pytest.approx(6.353, abs=1e-3))


def test_both_sides_of_the_epoch_train_and_test_the_same_log(tmp_path):
    path = synthetic_log(tmp_path, num_users=60, num_items=40, mean_length=8.0, max_length=70)
    of = Training(str(path), tokens=100, epochs=2, threads=1)
    plain, ours = end_to_end_retrieval.train_plainly(of), end_to_end_retrieval.train_ours(of)
    assert plain["tokens"] == ours["tokens"] > 0
    assert len(plain["seconds"]) == len(ours["seconds"]) == of.epochs
    for side in (plain, ours):
        assert 0 <= side["recall"] <= 1
        assert side["recall"] * 60 == pytest.approx(round(side["recall"] * 60), abs=1e-4)


def test_one_epoch_or_a_log_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    script = Path(end_to_end_systems.__file__).with_name("bench_end_to_end.py")
    for words, message in ((["--epochs", "1"], "at least 2"), (["--data", str(tmp_path / "no")], "no such file")):
        done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize("thorough", [False, True])
def test_the_quickest_way_of_each_side_is_compared_epoch_by_epoch(thorough, monkeypatch):
    def run(side, of):
        seconds = 10.0 if side == "plain" else 6.0
        seconds -= 2.0 * (of.table == "adagrad") + 1.0 * (of.processes == 2)
        epochs = [seconds] * (of.epochs - 1)
        return {
            "epochs": epochs,
            "epoch_s": seconds,
            "processor_s": 2 * seconds,
            "peak_mb": 1.0,
            "tokens": 9,
            "recall": 0.1,
        }

    monkeypatch.setattr(end_to_end_retrieval, "run", run)
    found = end_to_end_retrieval.compare("log", tokens=2048, epochs=4, repeats=2, thorough=thorough)
    assert found["speedup_vs_plain_loop"] == pytest.approx(8 / 5 if thorough else 10 / 6, abs=1e-3)
    assert found["plain_table_optimizer"] == ("adagrad" if thorough else "adamw")
    assert found["ours_processes_x_threads"] == ("2 x 1" if thorough else "1 x 2")
    assert ("ours_epoch_s_8192" in found) == thorough


@pytest.mark.parametrize("quick", [False, True])
def test_the_row_has_each_part_without_a_network_and_the_pipeline_with_one(quick, monkeypatch):
    import bench_end_to_end

    def compare(world, size, names, *, steps, repeats, slow):
        of = {"processor_ms": 1.0, "sent_mb": 1.0, "waits": 0.0, "tokens": np.ones(5), "loss": 1.0}
        return {name: [of | {"seconds": np.ones(2) / (1 + place)}] * repeats for place, name in enumerate(names)}

    monkeypatch.setattr(end_to_end_systems, "compare", compare)
    monkeypatch.setattr("gloo_processes.World", lambda *_: type("World", (), {"close": staticmethod(lambda: None)}))
    row = bench_end_to_end.systems(["systems", "total"], quick=quick, repeats=2, steps=8)
    assert row["speedup_systems"] == 5
    assert row["switch_pipeline"] == row["switch_pipeline_half_width"] + 1.25 == 1.25
    assert row["switch_pipeline_network"] == (1.5 if quick else 1.25)
    assert row["speedup_total"] == pytest.approx(2 / 3, abs=1e-3)
    assert ("speedup_systems_compute" in row) != quick
