"""bench-peers without the peers: their log, judge, turns, clock and memory, rows, failures, the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "peers"))

import bench_peers
import peer_environments
import peer_run
from bench_peers import PEERS, Found, Peer, epochs_until, last_words, row, run, table, turns, with_ratio
from peer_environments import PeerEnvironmentError, interpreter
from peer_log import PeerLog, read_sequences, renumbered, shortened, write_sequences
from peer_page import BEGIN, END, PAGE, page, peers_table
from peer_quality import quality
from peer_run import WARM_UP_STEPS, EnoughError, Meter, in_batches, samples_of

LOGS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=8)


def _log(*sequences: list[int]) -> PeerLog:
    return PeerLog(sequences=[np.array(x) for x in sequences])


@given(sequences=LOGS, max_length=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_all_read_the_same_cut_of_a_log(
    sequences: list[list[int]], max_length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "log.txt"
    write_sequences(shortened([np.array(x) for x in sequences], max_length), path)
    kept = [x for x in sequences if len(x) >= 3]
    if not kept:
        assert read_sequences(path) == []
        return
    log = PeerLog.read(path)
    targets = 0
    for whole, cut in zip(kept, log.sequences, strict=True):
        pairs = [(whole[i], whole[i + 1]) for i in range(len(whole) - 3)][-max_length:]
        targets += len(pairs)
        assert cut.tolist()[-2:] == whole[-2:]
        assert [(x, y) for x, y in zip(cut[:-3], cut[1:-2], strict=True)] == pairs
    assert log.num_targets == targets
    assert log.asked("val").tolist() == [x[-2] for x in kept]
    assert log.asked("test").tolist() == [x[-1] for x in kept]
    for part, held_out in (("val", 2), ("test", 1)):
        seen = log.padded(log.histories(part), max_length, side="left")  # type: ignore[arg-type]
        for place, whole in zip(seen, kept, strict=True):
            latest = whole[:-held_out][-max_length:]
            assert place.tolist() == [0] * (max_length - len(latest)) + latest


def test_items_are_numbered_without_gaps_and_stay_apart() -> None:
    found = renumbered([np.array([700, 5, 700]), np.array([90]), np.array([5, 1000])])
    assert [x.tolist() for x in found] == [[3, 1, 3], [2], [1, 4]]


def test_what_is_trained_on_has_no_item_that_is_held_out() -> None:
    log = _log([1, 2, 3, 4, 5], [6, 7, 8])
    assert [x.tolist() for x in log.train] == [[1, 2, 3], [6]]
    assert [x.tolist() for x in log.histories("val")] == [[1, 2, 3], [6]]
    assert log.padded(log.histories("test"), 3, side="right").tolist() == [[2, 3, 4], [6, 7, 0]]


@pytest.mark.parametrize("line", ["1", "1 2 x", "1 0 2", "1 -2 3"])
def test_a_line_that_is_no_sequence_is_refused_by_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(f"1 2 3 4\n{line}\n")
    with pytest.raises(ValueError, match=r"log\.txt, line 2"):
        read_sequences(tmp_path / "log.txt")


def test_a_log_with_a_user_too_short_to_hold_two_out_is_refused() -> None:
    with pytest.raises(ValueError, match="user 1 has 2 items"):
        _log([1, 2, 3], [4, 5])


@given(seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_quality_is_what_a_plain_loop_and_torchmetrics_find(seed: int) -> None:
    from torchmetrics.retrieval import RetrievalNormalizedDCG, RetrievalRecall

    rng = np.random.default_rng(seed)
    scores_UI = rng.random((6, 15))
    asked_U = rng.integers(0, 15, 6)
    found = quality(np.argsort(-scores_UI, axis=1)[:, :4], asked_U)
    recall, ndcg = RetrievalRecall(top_k=4), RetrievalNormalizedDCG(top_k=4)
    target_UI = torch.from_numpy(np.arange(15) == asked_U[:, None])
    users_UI = torch.arange(6)[:, None].expand(6, 15)
    scores = torch.from_numpy(scores_UI)
    assert found["recall"] == pytest.approx(float(recall(scores, target_UI, indexes=users_UI)))
    assert found["ndcg"] == pytest.approx(float(ndcg(scores, target_UI, indexes=users_UI)))


def test_a_list_that_names_an_item_twice_or_a_missing_list_is_refused() -> None:
    with pytest.raises(ValueError, match="user 1 has an item twice"):
        quality(np.array([[1, 2], [3, 3]]), np.array([1, 2]))
    with pytest.raises(ValueError, match="for 3 users"):
        quality(np.array([[1, 2], [3, 4]]), np.array([1, 2, 3]))
    assert quality(np.array([[-1, -1]]), np.array([5])) == {"recall": 0.0, "ndcg": 0.0}


def test_everyone_runs_once_a_round_and_no_one_is_always_first() -> None:
    order = turns(["a", "b", "c"], 3)
    rounds = [order[:3], order[3:6], order[6:]]
    assert all(sorted(x) == ["a", "b", "c"] for x in rounds)
    assert [x[0] for x in rounds] == ["a", "b", "c"]


class Clock:
    """Seconds that are set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_seconds_of_a_step_leave_out_the_first_steps_and_end_a_run_of_speed() -> None:
    clock = Clock()
    meter = Meter(log=_log([1, 2, 3]), seconds=10.0, clock=clock)
    for _ in range(WARM_UP_STEPS):
        clock.now += 100.0
        meter.step()
    for _ in range(5):
        clock.now += 2.0
        meter.step()
    clock.now += 2.0
    with pytest.raises(EnoughError):
        meter.step()
    assert meter.step_seconds() == 2.0
    assert len(meter.steps) == WARM_UP_STEPS + 6


def test_every_step_of_a_torch_optimizer_is_a_step() -> None:
    meter = Meter(log=_log([1, 2, 3]), seconds=None)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    handle = register_optimizer_step_post_hook(lambda *_: meter.step())
    try:
        weight = torch.nn.Parameter(torch.ones(2))
        for kind in (torch.optim.SGD, torch.optim.Adam):
            optimizer = kind([weight], lr=0.1)
            weight.grad = torch.ones(2)
            optimizer.step()
    finally:
        handle.remove()
    assert len(meter.steps) == 2


def test_evaluation_is_not_on_the_clock_and_the_test_is_judged_where_validation_is_best() -> None:
    clock = Clock()
    log = _log([1, 2, 3, 4], [5, 6, 7, 8])
    meter = Meter(log=log, seconds=None, budget=25.0, clock=clock)
    of_epoch: list[dict[str, Any]] = [
        {"val": [[3], [1]], "test": [[4], [8]]},
        {"val": [[1], [1]], "test": [[1], [1]]},
        {"val": [[3], [7]], "test": [[4], [1]]},
    ]
    went_on, asked = [], []
    for lists in of_epoch:
        meter.begin()
        clock.now += 10.0
        meter.end()

        def listed(part: str, lists: dict[str, Any] = lists) -> np.ndarray[Any, Any]:
            clock.now += 1000.0
            asked.append(part)
            return np.array(lists[part])

        went_on.append(meter.evaluate(listed))
    assert went_on == [True, True, False]
    assert asked == ["val", "test", "val", "val", "test"]
    assert [x["trained_s"] for x in meter.epochs] == [10.0, 20.0, 30.0]
    assert [x["val_recall"] for x in meter.epochs] == [0.5, 0.0, 1.0]
    assert [x.get("test_recall") for x in meter.epochs] == [1.0, None, 0.5]


def test_memory_is_the_peak_since_imports_even_if_it_was_freed() -> None:
    before = np.ones(8_000_000)  # of imports; a peak that is not counted
    del before
    meter = Meter(log=_log([1, 2, 3]), seconds=None)
    held = np.ones(12_000_000)  # 96 MB
    del held
    meter.begin()
    meter.end()
    later = np.ones(40_000_000)  # of an evaluation
    meter.end()
    assert 90e6 < meter.peak_bytes < 200e6
    del later


def test_a_batch_of_users_has_about_the_targets_that_were_asked_for() -> None:
    log = _log(*[[1] * (3 + n % 7) for n in range(700)])  # 3 targets a user
    assert samples_of(300, log) == 100
    assert [len(x) for x in in_batches(np.arange(7), 3)] == [3, 3, 1]


def _speed(step_s: float, peak: int, steps: int = 30) -> dict[str, Any]:
    return {
        "versions": "x 1",
        "settings": "so",
        "targets": 1000,
        "steps_per_epoch": 50,
        "measured_steps": steps,
        "step_s": step_s,
        "peak_bytes": peak,
        "epochs": [],
    }


def test_a_row_has_medians_and_the_test_of_the_epoch_that_validation_chose() -> None:
    epochs = [
        {"epoch": 1, "val_recall": 0.02, "val_ndcg": 0.01, "test_recall": 0.5, "test_ndcg": 0.4},
        {"epoch": 2, "val_recall": 0.09, "val_ndcg": 0.05, "test_recall": 0.08, "test_ndcg": 0.04},
        {"epoch": 3, "val_recall": 0.05, "val_ndcg": 0.03},
    ]
    epochs = [x | {"trained_s": 7.0 * x["epoch"]} for x in epochs]
    found = Found(
        [_speed(0.2, 10**8), _speed(0.1, 3 * 10**8), _speed(0.9, 2 * 10**8)], _speed(9, 1) | {"epochs": epochs}
    )
    result = row(PEERS[0], found, recall=0.06)
    assert result["epoch_s"] == 10.0
    assert result["tokens_per_s"] == 100
    assert (result["epoch_s_least"], result["epoch_s_most"]) == (5.0, 45.0)
    assert result["peak_mb"] == 200.0
    assert result["extrapolated"] is True
    assert result["trained_s"] == 21.0
    assert (result["best_epoch"], result["test_recall"], result["test_ndcg"]) == (2, 0.08, 0.04)
    assert (result["epochs_to_recall"], result["to_recall_s"]) == (2, 20.0)
    assert epochs_until(epochs, 0.1) is None


def test_a_failed_system_has_a_row_with_the_reason_and_no_figures() -> None:
    result = row(PEERS[1], Found(error="environment: no such version"), recall=0.06)
    assert result == {"system": "rectools SASRec", "error": "environment: no such version"}
    assert "no such version" in table([row(PEERS[0], Found([_speed(0.2, 1)]), recall=0.06), result])


def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Peer:
    (tmp_path / "run_lightning_gr.py").write_text(text)
    monkeypatch.setattr(bench_peers, "HERE", tmp_path)
    return Peer("one", "lightning_gr", "hstu")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('no such model')", "no such model"),
        ("import time; time.sleep(60)", "not done after"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("pass", "no message"),
    ],
)
def test_a_run_that_fails_says_why(text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = _script(tmp_path, monkeypatch, text)
    limit_s = 1.0 if "sleep" in text else 60.0
    with pytest.raises(RuntimeError, match=reason):
        run(peer, [], data=tmp_path / "log.txt", threads=1, limit_s=limit_s)


def test_a_run_of_a_small_model_gives_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a peer: it always lists the most frequent items."""
    peers = str(Path(peer_run.__file__).parent)
    peer = _script(
        tmp_path,
        monkeypatch,
        f"""
import sys
sys.path.insert(0, {peers!r})
import numpy as np, torch
from peer_run import main

class Popular:
    steps_per_epoch, settings = 4, "popular"
    def __init__(self, log, args):
        self.log = log
        self.weight = torch.nn.Parameter(torch.zeros(3))
    def lists(self, part):
        items, counts = np.unique(np.concatenate(self.log.train), return_counts=True)
        return np.tile(items[np.argsort(-counts, kind="stable")][:2], (len(self.log.sequences), 1))
    def train(self, epochs, meter):
        meter.watch_optimizers()
        optimizer = torch.optim.SGD([self.weight], lr=1.0)
        for _ in range(epochs):
            meter.begin()
            for _ in range(self.steps_per_epoch):
                self.weight.sum().backward()
                optimizer.step()
            meter.end()
            if not meter.evaluate(self.lists):
                break

main(Popular, packages=["torch"])
""",
    )
    write_sequences([np.array(x) for x in ([7, 7, 9, 7, 3], [9, 2, 9, 5])], tmp_path / "log.txt")
    arguments = {"speed": ["--seconds", "0.05"], "quality": ["--epochs", "3"]}
    found = {k: run(peer, x, data=tmp_path / "log.txt", threads=1, limit_s=300) for k, x in arguments.items()}
    assert found["quality"]["targets"] == 3
    assert [x["val_recall"] for x in found["quality"]["epochs"]] == [1.0, 1.0, 1.0]
    assert [x.get("test_recall") for x in found["quality"]["epochs"]] == [0.0, None, None]
    assert found["speed"]["epochs"] == []
    assert found["speed"]["step_s"] > 0
    assert found["speed"]["measured_steps"] * found["speed"]["step_s"] >= 0.05
    assert "torch" in found["speed"]["versions"]


class Pip:
    """In place of the processes that make an environment; installs fail while `fails`."""

    fails = False

    def __init__(self) -> None:
        self.installs: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.touch()
        else:
            self.installs.append(command)
        failed = self.fails and "pip" in command
        return subprocess.CompletedProcess(command, int(failed), "", "WARNING: slow\nERROR: no such version\nnotice\n")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip()
    monkeypatch.setattr(peer_environments, "HERE", tmp_path)
    monkeypatch.setattr(peer_environments.subprocess, "run", made)
    (tmp_path / "requirements-one.txt").write_text("one==1\n")
    return made


def test_an_environment_that_cannot_be_made_is_a_reason_and_is_tried_again(pip: Pip, tmp_path: Path) -> None:
    with pytest.raises(PeerEnvironmentError, match="make it with --prepare"):
        interpreter("one", root=tmp_path / "made", make=False)
    pip.fails = True
    with pytest.raises(PeerEnvironmentError, match="^ERROR: no such version$"):
        interpreter("one", root=tmp_path / "made")
    pip.fails = False
    assert interpreter("one", root=tmp_path / "made") == tmp_path / "made" / "one" / "bin" / "python"
    assert len(pip.installs) == 2


def test_an_environment_is_made_once_for_the_same_pins(pip: Pip, tmp_path: Path) -> None:
    for _ in range(2):
        interpreter("one", root=tmp_path / "made", pip_flags=["--no-cache-dir"])
    assert len(pip.installs) == 1
    assert pip.installs[0][-3:] == ["--no-cache-dir", "-r", str(tmp_path / "requirements-one.txt")]
    (tmp_path / "requirements-one.txt").write_text("one==2\n")
    interpreter("one", root=tmp_path / "made")
    assert len(pip.installs) == 2
    assert interpreter("lightning_gr") == Path(sys.executable)


def test_the_last_words_of_a_process_are_those_that_tell() -> None:
    assert last_words("Traceback\n  a\nValueError: so\n\n") == "ValueError: so"
    assert last_words("") == "no message"
    assert json.dumps(last_words("x" * 1000))[:5] == '"xxxx'


def _cells(**cells: object) -> dict[str, str]:
    return {"data": "log", "threads": "2", "machine": "m", "commit": "c", "date": "d", "error": ""} | {
        name: str(cell) for name, cell in cells.items()
    }


def test_the_page_has_the_newest_figure_of_each_system_and_keeps_those_of_a_run_before() -> None:
    rows = [
        _cells(system="rectools HSTU", epoch_s=1.0, data="another log"),
        _cells(system="rectools HSTU", epoch_s=90.0, epochs_to_recall=2, recall_to_reach=0.08),
        _cells(system="lightning-gr HSTU", epoch_s=10.0, test_recall=0.081, peak_mb="", epochs=4, best_epoch=3)
        | {"trained_s": "41.2"},
        _cells(system="rectools HSTU", epoch_s=50.0, epochs_to_recall=""),
        _cells(system="RecBole SASRec", error="environment: no such version"),
    ]
    lines = peers_table(rows).splitlines()
    ours, *peers = [line for line in lines if line.startswith("| ")][2:]
    assert ours == "| lightning-gr HSTU | 10.0 | 1.00 | - | - | .0810 | - | 3 of 4 | - |"
    assert "| rectools HSTU | 50.0 | 5.00 | - | - | - | - | - | 100 |" in peers
    assert any("no such version" in line for line in lines)
    assert any("lightning-gr HSTU" in line and "4 epochs in 41 s" in line for line in lines)
    assert len(peers) == 2


def test_only_the_table_of_the_page_is_made_anew() -> None:
    text = f"above\n{BEGIN}\nold\n{END}\nbelow"
    made = page([], text)
    assert made.startswith("above\n")
    assert made.endswith("\nbelow")
    assert "old" not in made
    assert page([], made) == made
    with pytest.raises(ValueError, match="once each"):
        page([], "no marks")
    assert page([], PAGE.read_text()).count(BEGIN) == 1


def test_ours_tells_how_much_faster_than_the_fastest_peer_if_all_were_tried() -> None:
    rows: list[dict[str, Any]] = [{"system": x.name, "error": ""} for x in PEERS]
    assert "fastest_peer" not in with_ratio(rows)[-1]
    for x, seconds in zip(rows, [10.0, 90.0, 40.0, 30.0], strict=False):  # the last one failed
        x["epoch_s"] = seconds
    assert with_ratio(rows)[-1] == rows[0] | {"fastest_peer": "torch-rechub HSTU", "speedup_vs_fastest_peer": 3.0}
    assert "fastest_peer" not in with_ratio(rows[:3])[-1]
