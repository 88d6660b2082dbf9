"""A synthetic cold-start log: tasks with hidden preferences, which a few of their records tell and nothing else does.

Items have hidden traits, near to those of their kind, and a quality. A task (a user of the log) has a hidden weight for
each trait, drawn anew for every task; its segment, which is no secret, says a little of it. A record is clicked with a
probability that follows from weights and traits, so items can be learned from all tasks, while of a new task its own
records say most. The best possible AUC after k records is known: Bayes' rule over the weights.

Shape suffixes: I items, K kinds, S segments, D traits, U tasks, L records of the longest task, P particles
of the prior.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gr.data.synthetic import auc_as_drawn

Array = np.ndarray[Any, Any]
NUM_KINDS, NUM_SEGMENTS = 16, 4
_NUM_TRAITS, _NUM_PARTICLES = 2, 512
_TASTE_GAIN, _OWN_TRAIT_STD, _QUALITY_STD = 2.5, 0.3, 0.5
_OF_SEGMENT_STD, _OWN_WEIGHT_STD = 0.3, 0.95
_FIRST_TIME, _BLOCK_TASKS, _SIGMA = 1_700_000_000, 256, 0.5


@dataclass(frozen=True)
class ColdStartLog:
    """What `write_cold_start_log` wrote.

    Args:
        num_tasks: tasks.
        num_items: items that can occur.
        num_records: records of all tasks.
        best: by number of support records, the AUC of the best possible prediction of the records after the first
            max(shots), on these very labels.
    """

    num_tasks: int
    num_items: int
    num_records: int
    best: dict[int, float]

    def __str__(self) -> str:
        best = ", ".join(f"{value:.4f} after {shots}" for shots, value in self.best.items())
        return (
            f"{self.num_tasks:,} tasks, {self.num_items:,} items, {self.num_records:,} records; the best possible AUC "
            f"is {best} of a task's records"
        )


class PlantedTasks:
    """The planted probabilities of clicks.

    Args:
        num_items: items.
        seed: seed of items and tasks.
    """

    def __init__(self, *, num_items: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        self.kind_I = rng.permutation(np.arange(num_items) % NUM_KINDS)
        of_kind_KD = rng.normal(size=(NUM_KINDS, _NUM_TRAITS))
        self.traits_ID = of_kind_KD[self.kind_I] + _OWN_TRAIT_STD * rng.normal(size=(num_items, _NUM_TRAITS))
        self.quality_I = rng.normal(0.0, _QUALITY_STD, num_items)
        self.of_segment_SD = _OF_SEGMENT_STD * rng.normal(size=(NUM_SEGMENTS, _NUM_TRAITS))
        self._seed = seed

    def weights(self, block: int, segments: Array) -> Array:
        """Hidden weights (U, D) of a block of tasks, given their segments."""
        own = np.random.default_rng([self._seed, 2, block]).normal(size=(len(segments), _NUM_TRAITS))
        weights: Array = self.of_segment_SD[segments] + _OWN_WEIGHT_STD * own
        return weights

    def probabilities(self, weights: Array, items: Array) -> Array:
        """Of clicks (U, L), given the weights (U, D) of tasks and the items (U, L) of their records."""
        taste_UL = (weights[:, None] * self.traits_ID[items]).sum(-1)
        probabilities: Array = 1 / (1 + np.exp(-_TASTE_GAIN * taste_UL - self.quality_I[items]))
        return probabilities

    def given_records(self, segments: Array, items: Array, clicked: Array, shots: Sequence[int]) -> list[Array]:
        """For each number of shots, probabilities (U, L) for who knows items, segments and a task's first records.

        Args:
            segments: (U,) of the tasks.
            items: (U, L) of each task's records.
            clicked: (U, L) whether each was clicked.
            shots: numbers of first records that are known, ascending.

        Returns:
            The mean over `_NUM_PARTICLES` draws from the prior of the weights, weighted by the likelihood of what is
            known.
        """
        own_PD = np.random.default_rng([self._seed, 3]).normal(size=(_NUM_PARTICLES, _NUM_TRAITS))
        found = [np.zeros(items.shape) for _ in shots]
        for segment in range(NUM_SEGMENTS):
            of = segments == segment
            weights_PD = self.of_segment_SD[segment] + _OWN_WEIGHT_STD * own_PD
            chances_PUL = self.probabilities(weights_PD, np.arange(len(self.kind_I))[None])[:, items[of]]
            logs_PUL = np.log(np.where(clicked[of], chances_PUL, 1 - chances_PUL))
            for result, number in zip(found, shots, strict=True):
                likelihood_PU = logs_PUL[:, :, :number].sum(2)
                weight_PU = np.exp(likelihood_PU - likelihood_PU.max(0))
                result[of] = (weight_PU[:, :, None] * chances_PUL).sum(0) / weight_PU.sum(0)[:, None]
        return found


def write_cold_start_log(
    path: str | Path,
    *,
    num_tasks: int = 800,
    num_items: int = 200,
    mean_records: float = 30.0,
    max_records: int = 60,
    shots: Sequence[int] = (0, 1, 5, 10),
    seed: int = 0,
) -> ColdStartLog:
    """Writes a CSV log ``user_id,item_id,timestamp,click``, and items, users and what is possible beside it.

    A task is a user. ``<name>.items.csv`` has the categorical column ``kind``, ``<name>.users.csv`` ``segment``, and
    ``<name>.oracle.json`` the best possible AUC. Tasks are written by blocks, and all files appear whole or not at all.

    Args:
        path: the CSV file.
        num_tasks: tasks.
        num_items: items that can occur.
        mean_records: about the mean records of a task; lengths are log-normal, two above max(shots) at least.
        max_records: most records of a task.
        shots: numbers of support records that the best possible AUC is told for.
        seed: everything is a function of it.

    Raises:
        ValueError: a setting that cannot work, by name.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks={num_tasks}: expected at least 1")
    if num_items < NUM_KINDS:
        raise ValueError(f"num_items={num_items}: expected at least {NUM_KINDS}, one of each kind")
    if not shots or min(shots) < 0:
        raise ValueError(f"shots={list(shots)}: expected numbers of at least 0")
    shots = sorted(set(shots))
    least = shots[-1] + 2
    if not least <= mean_records <= max_records:
        raise ValueError(
            f"mean_records={mean_records}: expected {least}, two more than the largest of shots, ... "
            f"max_records={max_records}"
        )
    path, planted = Path(path), PlantedTasks(num_items=num_items, seed=seed)
    raw_ids = np.sort(np.random.default_rng([seed, 4]).choice(num_items * 20, num_items, replace=False)) + 100_000
    chances: dict[int, list[Array]] = {number: [] for number in shots}
    labels, num_records = [], 0
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = {"log": path} | {name: path.with_suffix(f".{name}") for name in ("items.csv", "users.csv", "oracle.json")}
    temporary = {name: target.with_name(f".{target.name}.{os.getpid()}.tmp") for name, target in targets.items()}
    try:
        with temporary["log"].open("wb") as file, temporary["users.csv"].open("wb") as users:
            for block, begin in enumerate(range(0, num_tasks, _BLOCK_TASKS)):
                count, rng = min(_BLOCK_TASKS, num_tasks - begin), np.random.default_rng([seed, 5, block])
                lengths = rng.lognormal(np.log(mean_records) - _SIGMA**2 / 2, _SIGMA, count)
                lengths = np.clip(np.rint(lengths), least, max_records).astype(np.int64)
                segments = rng.integers(0, NUM_SEGMENTS, count)
                items = rng.integers(0, num_items, (count, int(lengths.max())))
                times = _FIRST_TIME + rng.integers(60, 86400, items.shape).cumsum(1)
                clicked = rng.random(items.shape) < planted.probabilities(planted.weights(block, segments), items)
                kept = np.arange(items.shape[1]) < lengths[:, None]
                _write_block(file, begin, lengths, raw_ids[items][kept], times[kept], clicked[kept])
                _write_users(users, begin, segments)
                num_records += int(lengths.sum())
                query = kept & (np.arange(items.shape[1]) >= shots[-1])
                labels.append(clicked[query])
                for number, known in zip(shots, planted.given_records(segments, items, clicked, shots), strict=True):
                    chances[number].append(known[query])
        best = {n: auc_as_drawn(np.concatenate(chances[n]), np.concatenate(labels)) for n in shots}
        settings = {"num_tasks": num_tasks, "num_items": num_items, "mean_records": mean_records}
        settings |= {"max_records": max_records, "seed": seed}
        text = json.dumps({"settings": settings, "AUC": {str(n): value for n, value in best.items()}}, indent=2) + "\n"
        temporary["oracle.json"].write_text(text)
        _write_items(temporary["items.csv"], raw_ids, planted.kind_I)
        for name, target in targets.items():
            os.replace(temporary[name], target)
    finally:
        for made in temporary.values():
            made.unlink(missing_ok=True)
    return ColdStartLog(num_tasks, num_items, num_records, best)


def write_cold_start_store(folder: str | Path, **settings: Any) -> ColdStartLog | None:
    """Makes a folder with the log, ``log.csv`` and what lies beside it, and ``store``, whose rows are the tasks.

    The folder appears whole or not at all. Of several processes that make it at once, the first one's stays.

    Args:
        folder: is not there yet.
        **settings: of `write_cold_start_log`.

    Returns:
        What was written; None where another process was first.
    """
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        temporary.chmod(folder.parent.stat().st_mode & 0o777)
        log = temporary / "log.csv"
        written = write_cold_start_log(log, **settings)
        items = {"path": str(log.with_suffix(".items.csv")), "sparse": ["kind"]}
        users = {"path": str(log.with_suffix(".users.csv")), "sparse": ["segment"]}
        prepare(open_log(log, columns=Columns(labels=("click",)), items=items, users=users), temporary / "store")
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def _write_block(file: Any, first: int, lengths: Array, items: Array, times: Array, clicked: Array) -> None:
    import polars as pl

    columns = {"item_id": items, "timestamp": times, "click": clicked.astype(np.int8)}
    names = _names(np.repeat(np.arange(first, first + len(lengths)), lengths))
    pl.DataFrame({"user_id": names, **columns}).write_csv(file, include_header=first == 0)


def _write_users(file: Any, first: int, segments: Array) -> None:
    import polars as pl

    names = _names(np.arange(first, first + len(segments)))
    pl.DataFrame({"user_id": names, "segment": segments}).write_csv(file, include_header=first == 0)


def _names(tasks: Array) -> Any:
    import polars as pl

    return "t" + pl.Series("user_id", tasks).cast(pl.String).str.zfill(6)


def _write_items(path: Path, raw_ids: Array, kinds: Array) -> None:
    import polars as pl

    pl.DataFrame({"item_id": raw_ids, "kind": kinds}).write_csv(path)
