"""ResumeCheckpoint: when it saves, what it keeps, what it resumes from, and how a run ends by SIGTERM."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from fsspec.spec import AbstractFileSystem
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

pytestmark = pytest.mark.dist

EPOCH = 8
SCORES = [9.0, 3.0, 7.0, 1.0, 8.0, 5.0, 2.0, 6.0, 4.0, 0.5]
"""Of validations, in their order."""


class Numbers:
    """A loader with a position: the batches 0 ... 7."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[Tensor]:
        if self.next >= EPOCH:
            self.next = 0
        while self.next < EPOCH:
            self.next += 1
            yield torch.tensor([float(self.next - 1)])

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Line(pl.LightningModule):
    """A dense module; what it trained, and scores that were settled before."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.trained: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.trained.append(int(batch))
        loss = self.head(batch / 10).square().sum()
        return {"loss": loss, "loss_sums": {"all": (loss, 1)}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append(self.global_step)
            self.log("val/score", SCORES[self.global_step % len(SCORES)], sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class AtStep(pl.Callback):
    """Does something at the end of a step."""

    def __init__(self, do: Callable[[Any], None], step: int | None = None) -> None:
        self.do, self.step = do, step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if self.step is None or trainer.global_step == self.step:
            self.do(trainer)


def bases(folder: Any) -> dict[str, str | None]:
    """Complete checkpoints of a folder and what each adds to, read as a stranger would."""
    found = {}
    for meta in Path(folder).glob("*/meta.pt"):
        if not meta.parent.is_symlink() and not meta.parent.name.startswith("."):
            base = json.loads((meta.parent / "manifest.json").read_bytes())["base"]
            found[meta.parent.name.removesuffix(".ckpt")] = base and base["name"].removesuffix(".ckpt")
    return found


def steps_in(folder: Any) -> list[int]:
    return sorted(int(name.rpartition("=")[2]) for name in bases(folder))


def fit(
    folder: str | None,
    *callbacks: pl.Callback,
    world_size: int = 1,
    ckpt_path: str | None = None,
    save: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[pl.Trainer, Line]:
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(3)
    module = Line()
    asked: dict[str, Any] = {"filename": "{step}", "keep_last": -1} | (save or {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=world_size,
            strategy=SequenceBalancedStrategy(),
            callbacks=[*callbacks, *settings.pop("callbacks", []), ResumeCheckpoint(dirpath=folder, **asked)],
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"max_steps": 10, "logger": False, "limit_val_batches": 0} | settings),
        )
        trainer.fit(module, Numbers(), Numbers(), ckpt_path=ckpt_path)
    return trainer, module


def run(folder: str | None, **settings: Any) -> dict[str, Any]:
    """In a process of the pool: what was trained, and the names that are there after it."""
    trainer, module = fit(folder, **settings)
    callback: Any = trainer.checkpoint_callback
    return {
        "trained": module.trained,
        "validated": module.validated,
        "step": trainer.global_step,
        "weights": [float(x) for x in module.parameters()],
        "best": callback.best_model_path,
        "last": callback.last_model_path,
    }


# ---- when --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.long)])
def test_every_n_steps_and_at_the_end(gloo: Any, tmp_path: Path, background: bool) -> None:
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        save = {"every_n_steps": 3, "background": background}
        gloo(world_size).run(run, str(folder), world_size=world_size, save=save)
        assert steps_in(folder) == [3, 6, 9, 10]


def test_at_the_end_of_epochs_where_nothing_is_said(gloo: Any, tmp_path: Path) -> None:
    gloo(1).run(run, str(tmp_path), max_epochs=3, max_steps=-1)
    assert steps_in(tmp_path) == [8, 16, 24]
    gloo(1).run(run, str(tmp_path / "two"), max_epochs=2, max_steps=-1, limit_val_batches=2)
    assert steps_in(tmp_path / "two") == [8, 16]


def test_every_n_minutes(gloo: Any, tmp_path: Path) -> None:
    for world_size in (1, 2):
        often, seldom = tmp_path / f"often {world_size}", tmp_path / f"seldom {world_size}"
        pool = gloo(world_size)
        pool.run(run, str(often), world_size=world_size, save={"every_n_minutes": 1e-6})
        assert len(steps_in(often)) >= 5
        pool.run(run, str(seldom), world_size=world_size, save={"every_n_minutes": 60})
        assert steps_in(seldom) == [10]


def test_accumulation_saves_whole_steps_alone(gloo: Any, tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 3, "max_steps": 7}
    (full,) = gloo(1).run(run, str(tmp_path), save={"every_n_steps": 1}, **settings)
    assert steps_in(tmp_path) == list(range(1, 8))
    for step in (1, 2, 3, 4):
        path = str(tmp_path / f"step={step}.ckpt")
        (rest,) = gloo(1).run(run, str(tmp_path / "again"), ckpt_path=path, **settings)
        done = [0, 3, 6, 8, 11][step]  # an epoch's last step is of two batches
        assert rest["trained"] == full["trained"][done:]
        assert rest["weights"] == full["weights"]


def test_a_watched_validation_between_two_steps_loses_no_gradient(gloo: Any, tmp_path: Path) -> None:
    settings = {"accumulate_grad_batches": 2, "max_steps": 8, "limit_val_batches": 1, "val_check_interval": 5}
    save = {"every_n_steps": 100, "monitor": "val/score", "save_top_k": 9}
    (full,) = gloo(1).run(run, str(tmp_path), save=save, **settings)
    assert full["validated"] == [2, 6]
    assert len(steps_in(tmp_path)) >= 3
    for step in steps_in(tmp_path)[:-1]:
        path = str(tmp_path / f"step={step}.ckpt")
        (rest,) = gloo(1).run(run, str(tmp_path / "again"), ckpt_path=path, **settings)
        assert rest["weights"] == full["weights"], step


def test_nothing_is_saved_without_training(gloo: Any, tmp_path: Path) -> None:
    gloo(1).run(run, str(tmp_path / "dry"), save={"every_n_steps": 1}, fast_dev_run=3)
    assert bases(tmp_path / "dry") == {}


# ---- names -------------------------------------------------------------------------------------------------------


def test_names(gloo: Any, tmp_path: Path) -> None:
    save = {"every_n_steps": 5, "filename": "{epoch}-{step}-{val/score:.1f}", "monitor": "val/score", "save_top_k": 9}
    gloo(1).run(run, str(tmp_path), save=save, val_check_interval=5, limit_val_batches=1)
    found = bases(tmp_path)
    assert len(found) == 2
    assert all(name.startswith("epoch=") and "step=" in name for name in found), found


def run_in(folder: str) -> list[str]:
    trainer, _ = fit(None, default_root_dir=folder, save={"every_n_steps": 5})
    return [str(x.relative_to(folder)) for x in Path(folder).rglob("step=5.ckpt")]


def test_the_folder_is_that_of_lightning_where_none_is_given(gloo: Any, tmp_path: Path) -> None:
    assert gloo(1).run(run_in, str(tmp_path)) == [["checkpoints/step=5.ckpt"]]


# ---- what is kept ------------------------------------------------------------------------------------------------


class Whole(pl.Callback):
    """Looks after every batch whether each checkpoint of the folder has all that it adds to; notes what is there."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        found = bases(self.folder)
        assert all(base is None or base in found for base in found.values()), found
        self.seen.append(steps_in(self.folder))


def run_watched(folder: str, **settings: Any) -> list[list[int]]:
    watch = Whole(folder)
    fit(folder, watch, **settings)
    return watch.seen


def kept(step: int, every: int, keep_last: int, top_k: int, full_every: int, validated: range) -> set[int]:
    """What should be there when the checkpoint of `step` is the newest one."""
    saved = list(range(every, step + 1, every))
    wanted = set(saved if keep_last == -1 else saved[-keep_last:])
    wanted |= set(sorted((x for x in validated if x <= step), key=lambda x: SCORES[x % len(SCORES)])[:top_k])
    for number in sorted(wanted):
        place = saved.index(number)
        wanted |= set(saved[place - place % full_every : place])  # from its full one on
    return wanted


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("keep_last", "top_k", "full_every"),
    [
        (1, 2, 3),
        *(pytest.param(*x, marks=pytest.mark.long) for x in ((1, 0, 1), (2, 0, 3), (1, 2, 1), (2, 1, 4), (-1, 1, 2))),
    ],
)
def test_retention(gloo: Any, tmp_path: Path, background: bool, keep_last: int, top_k: int, full_every: int) -> None:
    save: dict[str, Any] = {"every_n_steps": 1, "keep_last": keep_last, "full_every": full_every}
    save |= {"background": background, "monitor": "val/score" if top_k else None, "save_top_k": top_k}
    settings = {"limit_val_batches": 1 if top_k else 0, "val_check_interval": 2, "max_steps": 15}
    (seen,) = gloo(1).run(run_watched, str(tmp_path), save=save, **settings)
    rule = (1, keep_last, top_k, full_every, range(2, 16, 2) if top_k else range(0))
    if not background:
        for step, there in enumerate(seen[2:], 2):  # the callback looks before step + 1 is saved
            assert set(there) == kept(step, *rule), step
    for step, there in enumerate(seen[2:], 2):
        # Those of a save under way are still there, and none has gone too early.
        assert set(there) >= kept(step - 1, *rule) & kept(step, *rule), step
    assert set(steps_in(tmp_path)) == kept(15, *rule)
    assert not [x for x in tmp_path.glob("*.ckpt") if not (x / "meta.pt").exists()], "nothing torn is left"


def test_retention_goes_on_after_a_resume(gloo: Any, tmp_path: Path) -> None:
    save = {"every_n_steps": 1, "keep_last": 2, "full_every": 3, "monitor": "val/score", "save_top_k": 1}
    settings = {"limit_val_batches": 1, "val_check_interval": 2}
    gloo(1).run(run, str(tmp_path), save=save, max_steps=7, **settings)
    assert steps_in(tmp_path) == [1, 2, 4, 5, 6, 7][1:] or steps_in(tmp_path)[-2:] == [6, 7]
    (resumed,) = gloo(1).run(run, str(tmp_path), save=save, max_steps=13, ckpt_path="last", **settings)
    assert resumed["trained"] == [7, 0, 1, 2, 3, 4]
    there = bases(tmp_path)
    assert all(base is None or base in there for base in there.values())
    assert {12, 13} <= set(steps_in(tmp_path))
    assert len(steps_in(tmp_path)) <= 6
    best = min((x for x in range(2, 14, 2)), key=lambda x: SCORES[x % len(SCORES)])
    assert best in steps_in(tmp_path)
    assert Path(resumed["best"]).name == f"step={best}.ckpt"


def run_best(folder: str, mode: str) -> tuple[str, float]:
    save = {"every_n_steps": 100, "monitor": "val/score", "mode": mode}
    trainer, module = fit(folder, save=save, limit_val_batches=1, val_check_interval=2, max_steps=9)
    callback: Any = trainer.checkpoint_callback
    before = [float(x) for x in module.parameters()]
    for _ in range(2):
        trainer.validate(module, Numbers(), ckpt_path="best", verbose=False)
        assert [float(x) for x in module.parameters()] != before
    return Path(callback.best_model_path).name, float(callback.best_model_score)


def test_the_best_is_found_and_can_be_evaluated(gloo: Any, tmp_path: Path) -> None:
    assert gloo(1).run(run_best, str(tmp_path / "min"), "min") == [("step=6.ckpt", 2.0)]
    assert gloo(1).run(run_best, str(tmp_path / "max"), "max") == [("step=4.ckpt", 8.0)]


def run_best_afresh(folder: str, mode: str) -> list[str]:
    """What a Trainer that has not trained evaluates for the best, with and without the link."""
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.plugins import SequenceBalancedStrategy

    save = {"every_n_steps": 100, "monitor": "val/score", "mode": mode}
    fit(folder, save=save, limit_val_batches=1, val_check_interval=2, max_steps=9)
    found = []
    for _ in range(2):
        callback = ResumeCheckpoint(dirpath=folder, monitor="val/score", mode=mode)  # type: ignore[arg-type]
        trainer = pl.Trainer(
            accelerator="cpu",
            strategy=SequenceBalancedStrategy(),
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            limit_val_batches=1,
        )
        trainer.validate(Line(), Numbers(), ckpt_path="best", verbose=False)
        found.append(Path(str(trainer.ckpt_path)).name)
        (Path(folder) / "best.ckpt").unlink(missing_ok=True)
    return found


def test_the_best_is_found_by_a_process_that_has_not_trained(gloo: Any, tmp_path: Path) -> None:
    assert gloo(1).run(run_best_afresh, str(tmp_path / "min"), "min") == [["step=6.ckpt"] * 2]
    assert gloo(1).run(run_best_afresh, str(tmp_path / "max"), "max") == [["step=4.ckpt"] * 2]


def run_best_of_the_second(folder: str, rates: bool) -> tuple[str, str]:
    """Where the link of a first run points to, and what is the best after another one in its folder."""
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.checkpoint.best import best_checkpoint

    rated = {"save": {"every_n_steps": 2, "monitor": "val/score"}, "limit_val_batches": 1.0, "val_check_interval": 2}
    fit(folder, **rated)
    linked = Path(folder, "best.ckpt").resolve().name
    asked = rated if rates else {"save": {"every_n_steps": 5}}
    fit(folder, max_steps=15, **asked)
    found = best_checkpoint(folder, callback=ResumeCheckpoint.__qualname__, mode="min")
    return linked, Path(str(found)).name


def test_a_run_that_rates_nothing_has_not_the_best_of_the_run_before_it(gloo: Any, tmp_path: Path) -> None:
    assert gloo(1).run(run_best_of_the_second, str(tmp_path / "not"), False) == [("step=6.ckpt", "step=15.ckpt")]
    assert gloo(1).run(run_best_of_the_second, str(tmp_path / "too"), True)[0][1] != "step=15.ckpt"


def test_before_training_there_is_no_best_in_an_empty_folder(tmp_path: Path) -> None:
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint

    callback = ResumeCheckpoint(dirpath=str(tmp_path), monitor="val/score")
    assert callback.best_model_path == ""
    callback.trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    callback.trainer.state.fn = TrainerFn.TESTING
    with pytest.raises(MisconfigurationException, match=r"ckpt_path=best: no complete checkpoint in .*; train or give"):
        _ = callback.best_model_path


def test_the_best_stays_the_best_after_a_resume_from_it(gloo: Any, tmp_path: Path) -> None:
    save = {"every_n_steps": 2, "keep_last": 1, "monitor": "val/score"}
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "save": save}
    gloo(1).run(run, str(tmp_path), max_steps=6, **settings)
    assert steps_in(tmp_path) == [6]
    gloo(1).run(run, str(tmp_path), max_steps=9, ckpt_path="last", **settings)
    assert steps_in(tmp_path) == [6, 9]


def run_refused(folder: str, **settings: Any) -> str:
    try:
        fit(folder, **settings)
    except (MisconfigurationException, ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_metric_that_nobody_logs_is_named(gloo: Any, tmp_path: Path) -> None:
    save = {"monitor": "val/other"}
    (text,) = gloo(1).run(run_refused, str(tmp_path), save=save, limit_val_batches=1, val_check_interval=2)
    assert "MisconfigurationException: monitor='val/other'" in text
    assert "val/score" in text


# ---- what is resumed ---------------------------------------------------------------------------------------------


def test_last_is_the_newest_complete_one(gloo: Any, tmp_path: Path) -> None:
    save = {"every_n_steps": 2}
    (full,) = gloo(1).run(run, str(tmp_path), save=save, ckpt_path="last")
    assert full["trained"] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1], "it begins anew where there is none"
    (tmp_path / "step=10.ckpt" / "meta.pt").unlink()  # torn
    next((tmp_path / "step=8.ckpt").glob("*.distcp")).unlink()  # a shard is missing
    newest = tmp_path / "step=6.ckpt"
    for path in (newest, *newest.iterdir()):
        os.utime(path, (1, 1))  # a clock that went wrong
    (rest,) = gloo(1).run(run, str(tmp_path), save=save, ckpt_path="last")
    assert rest["trained"] == [6, 7, 0, 1]
    assert rest["weights"] == full["weights"]


def test_a_damaged_one_is_passed_over_with_a_warning(gloo: Any, tmp_path: Path) -> None:
    gloo(1).run(run, str(tmp_path), save={"every_n_steps": 2}, max_steps=6)
    shard = next((tmp_path / "step=6.ckpt").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    ((trained, said),) = gloo(1).run(run_warned, str(tmp_path), ckpt_path="last", max_steps=6)
    assert trained == [4, 5]
    assert any(str(shard) in text and "damaged" in text and "step=4.ckpt" in text for text in said)
    (text,) = gloo(1).run(run_refused, str(tmp_path / "x"), ckpt_path=str(shard.parent))
    assert str(shard) in text, "one that was asked for by its name is refused"


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("steps", [3, 8, *(pytest.param(x, marks=pytest.mark.long) for x in (4, 11))])
def test_more_steps_later(gloo: Any, tmp_path: Path, accumulate: int, steps: int) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    (full,) = gloo(1).run(run, str(tmp_path / "full"), max_steps=14, **settings)
    (short,) = gloo(1).run(run, str(tmp_path), max_steps=steps, **settings)
    (rest,) = gloo(1).run(run, str(tmp_path), max_steps=14, ckpt_path="last", **settings)
    assert short["trained"] + rest["trained"] == full["trained"]
    assert rest["weights"] == full["weights"]


def run_warned(folder: str, **settings: Any) -> tuple[list[int], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, module = fit(folder, **settings)
    return module.trained, [str(x.message) for x in caught]


def test_last_is_of_the_newer_run_after_one_was_abandoned(gloo: Any, tmp_path: Path) -> None:
    gloo(1).run(run, str(tmp_path), save={"every_n_steps": 2}, max_steps=8)
    older = str(tmp_path / "step=2.ckpt")
    gloo(1).run(run, str(tmp_path), save={"every_n_steps": 3, "full_every": 2}, max_steps=5, ckpt_path=older)
    assert {2, 3, 4, 5, 6, 8} == set(steps_in(tmp_path))
    (rest,) = gloo(1).run(run, str(tmp_path), ckpt_path="last", max_steps=7)
    assert rest["trained"] == [5, 6], "from step 5 of the newer run, not from 8 of the abandoned one"


def fit_log(folder: str, log: str, tokens: int, **settings: Any) -> tuple[str, list[list[int]]]:
    """A run on an event log; its refusal, or the samples of its batches."""
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    class Samples(Line):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            samples.append(sorted(batch.sample_ids_B.tolist()))
            items_N = batch.labels["next_item"].values_N[:, None].float()
            return batch.mean_over_global_batch({"next_item": self.head(items_N).sum()})

    samples: list[list[int]] = []
    pl.seed_everything(3)
    asked = settings.pop("save", {})
    callback = ResumeCheckpoint(dirpath=folder, filename="{step}", every_n_steps=1, keep_last=-1, **asked)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SequenceBalancedStrategy(),
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_steps=4,
    )
    try:
        trainer.fit(Samples(), datamodule=SequenceDataModule(path=log, global_tokens=tokens, max_length=8), **settings)
    except ValueError as error:
        return str(error), samples
    return "", samples


def test_another_plan_is_refused_unless_its_epoch_may_begin_anew(gloo: Any, tmp_path: Path) -> None:
    lines = [f"{user},{(user + place) % 9},{1000 + place}" for user in range(20) for place in range(5)]
    log = tmp_path / "events.csv"
    log.write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    ((_, first),) = gloo(1).run(fit_log, str(tmp_path / "a"), str(log), 16)
    path = str(tmp_path / "a" / "step=2.ckpt")
    ((_, same),) = gloo(1).run(fit_log, str(tmp_path / "b"), str(log), 16, ckpt_path=path)
    assert same == first[2:]
    ((text, none),) = gloo(1).run(fit_log, str(tmp_path / "c"), str(log), 24, ckpt_path=path)
    assert text.startswith("global_tokens: the checkpoint's data plan has 16, this run has 24")
    assert none == []
    ((_, fresh),) = gloo(1).run(fit_log, str(tmp_path / "d"), str(log), 24)
    save = {"on_other_plan": "restart_epoch"}
    ((text, anew),) = gloo(1).run(fit_log, str(tmp_path / "e"), str(log), 24, ckpt_path=path, save=save)
    assert (text, anew) == ("", fresh[:2])
    ((text, same),) = gloo(1).run(fit_log, str(tmp_path / "f"), str(log), 16, ckpt_path=path, save=save)
    assert (text, same) == ("", first[2:]), "the same plan goes on"


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_n_steps", 0),
        ("every_n_minutes", 0.0),
        ("every_n_minutes", -1.0),
        ("keep_last", 0),
        ("keep_last", -2),
        ("save_top_k", -1),
        ("full_every", 0),
        ("max_copied_bytes", 0),
        ("filename", "best"),
        ("on_other_plan", "ignore"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(name: str, value: Any) -> None:
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint

    with pytest.raises(MisconfigurationException, match=f"^{name}="):
        ResumeCheckpoint(**{name: value})


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    from lightning_gr.callbacks.resume_checkpoint import ResumeCheckpoint

    callback = ResumeCheckpoint(dirpath=str(tmp_path))
    trainer = pl.Trainer(accelerator="cpu", devices=1, callbacks=[callback], logger=False, max_steps=1)
    with pytest.raises(MisconfigurationException, match=r"^strategy=SingleDeviceStrategy: ResumeCheckpoint saves"):
        trainer.fit(Line(), Numbers())


# ---- SIGTERM -----------------------------------------------------------------------------------------------------


class Terminate(pl.Callback):
    """Sends SIGTERM to its own process, on one rank or on all, while a step is under way."""

    def __init__(self, ranks: list[int], step: int) -> None:
        self.ranks, self.step = ranks, step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step - 1 and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)


def run_until_terminated(folder: str, ranks: list[int], step: int, **settings: Any) -> None:
    """Ends the process as a script would."""
    try:
        fit(folder, Terminate(ranks, step), **settings)
    except SystemExit as error:
        os._exit(0 if error.code is None else int(error.code))
    except BaseException:
        os._exit(77)
    os._exit(78)


class Fresh:
    """Processes of their own, which a test may end."""

    def __init__(self, pool: Any, world_size: int) -> None:
        self.pool = pool(world_size)

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        for pipe in self.pool._pipes:
            pipe.send((__file__, function.__name__, args, kwargs))

    def codes(self) -> list[int | None]:
        for process in self.pool._processes:
            process.join(60)
        return [process.exitcode for process in self.pool._processes]


@pytest.fixture
def fresh(gloo: Any) -> Iterator[Callable[[int], Fresh]]:
    made: list[Fresh] = []

    def start(world_size: int) -> Fresh:
        made.append(Fresh(type(gloo(1)), world_size))
        return made[-1]

    yield start
    for each in made:
        each.pool.close()


@pytest.mark.parametrize(
    ("world_size", "ranks"), [(1, [0]), (2, [1]), *(pytest.param(2, x, marks=pytest.mark.long) for x in ([0], [0, 1]))]
)
def test_sigterm_saves_and_exits_cleanly(
    gloo: Any, fresh: Any, tmp_path: Path, world_size: int, ranks: list[int]
) -> None:
    (full, *_) = gloo(world_size).run(run, str(tmp_path / "full"), world_size=world_size)
    group = fresh(world_size)
    folder = str(tmp_path / "cut")
    group.start(run_until_terminated, folder, ranks, 4, world_size=world_size, save={"every_n_steps": 100})
    assert group.codes() == [0] * world_size
    (step,) = steps_in(folder)
    assert step in (4, 5), "at the end of the step, or of the next one, where others have to hear of it"
    (rest, *_) = gloo(world_size).run(run, folder, world_size=world_size, ckpt_path="last")
    assert rest["trained"] == full["trained"][step:]
    assert rest["weights"] == full["weights"]


@pytest.mark.parametrize("step", [4, 8])
def test_sigterm_at_a_validation_leaves_it_to_nobody(gloo: Any, fresh: Any, tmp_path: Path, step: int) -> None:
    settings = {"limit_val_batches": 1, "val_check_interval": 4, "max_steps": 12}
    (full,) = gloo(1).run(run, str(tmp_path / "full"), **settings)
    assert full["validated"] == [4, 8, 12]
    group = fresh(1)
    group.start(run_until_terminated, str(tmp_path / "cut"), [0], step, save={"every_n_steps": 100}, **settings)
    assert group.codes() == [0]
    assert steps_in(tmp_path / "cut") == [step]
    (rest,) = gloo(1).run(run, str(tmp_path / "cut"), ckpt_path="last", **settings)
    assert rest["weights"] == full["weights"]
    # The run that was ended has had this step's validation, which the resumed one need not repeat.
    meta = torch.load(tmp_path / "cut" / f"step={step}.ckpt" / "meta.pt", weights_only=True)
    progress = meta["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]["completed"]
    assert rest["validated"] == [x for x in full["validated"] if x > step]
    assert progress >= 1


@pytest.mark.long
def test_sigterm_while_saving(gloo: Any, fresh: Any, tmp_path: Path) -> None:
    """The save that is under way and the one at the end both come to be."""
    group = fresh(2)
    save = {"every_n_steps": 1, "full_every": 3}
    group.start(run_until_terminated, str(tmp_path), [1], 5, world_size=2, save=save)
    assert group.codes() == [0, 0]
    assert steps_in(tmp_path) in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
    assert not list(tmp_path.glob("*/saving.json"))


def run_twice(folder: str, world_size: int) -> None:
    """Two runs one after the other in one process group; the first one is ended by SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(SystemExit):
        fit(f"{folder}/1", Terminate([0], 3), world_size=world_size, save={"every_n_steps": 100})
    assert signal.getsignal(signal.SIGTERM) == handler
    fit(f"{folder}/2", world_size=world_size, save={"every_n_steps": 100})


def test_the_next_run_of_a_process_is_not_stopped(gloo: Any, fresh: Any, tmp_path: Path) -> None:
    fresh(2).pool.run(run_twice, str(tmp_path), 2)
    assert steps_in(tmp_path / "2") == [10]


# ---- two runs on one folder --------------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def run_beside(folder: str, first: bool, **settings: Any) -> str:
    """The first run waits at step 3 until the second one has saved."""

    def wait(trainer: Any) -> None:
        wait_for(Path(folder, "step=2.ckpt", "meta.pt"))  # else the second run begins anew, and saves a step 2 as well
        Path(f"{folder}.first").touch()
        wait_for(Path(f"{folder}.second"))

    if first:
        return run_refused(folder, callbacks=[AtStep(wait, 3)], **settings)
    wait_for(Path(f"{folder}.first"))
    refused = run_refused(folder, **settings)
    Path(f"{folder}.second").touch()
    return refused


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_first_of_two_runs_on_a_folder_stops(gloo: Any, fresh: Any, tmp_path: Path, background: bool) -> None:
    folder = str(tmp_path / "runs")
    save = {"every_n_steps": 2, "background": background}
    one, two = fresh(1), fresh(1)
    one.start(run_beside, folder, True, save=save)
    two.start(run_beside, folder, False, save=save, max_steps=6, ckpt_path="last")
    texts = []
    for group in (one, two):
        (pipe,) = group.pool._pipes
        assert pipe.poll(100)
        texts.append(pipe.recv())
    assert texts[1] == (True, "")
    assert "another run (process" in texts[0][1]
    assert f"{folder}/run.json" in texts[0][1]
    assert steps_in(folder) == [2, 4, 6], "nothing of either run is lost"
    (rest,) = gloo(1).run(run, folder, ckpt_path="last", max_steps=8)
    assert rest["trained"] == [6, 7]


# ---- elsewhere than on a disk ------------------------------------------------------------------------------------


class _Put(io.BytesIO):
    """A file that is there once it is closed, as in an object store."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path, self.given_up = path, False

    def discard(self) -> None:
        self.given_up = True

    @override
    def close(self) -> None:
        if not self.closed and not self.given_up:
            beside = f"{self.path}.{os.getpid()}.{id(self)}"
            Path(beside).write_bytes(self.getvalue())
            os.replace(beside, self.path)
        super().close()


class Bucket(AbstractFileSystem):
    """An object store in a folder: names with slashes, no directories, nothing that renames."""

    protocol = "bucket"
    cachable = False

    @property
    def root(self) -> Path:
        return Path(os.environ["TEST_BUCKET"])

    def _at(self, path: str) -> Path:
        return self.root / self._strip_protocol(path).strip("/").replace("/", "%")

    def _names(self) -> list[str]:
        return [x.name.replace("%", "/") for x in self.root.iterdir()]

    @override
    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        path = self._strip_protocol(path).strip("/")
        below = f"{path}/" if path else ""
        found: dict[str, Any] = {}
        for name in self._names():
            if name == path or name.startswith(below):
                first, deeper, _ = name[len(below) :].partition("/")
                full = path if name == path else below + first
                size = None if deeper and name != path else self._at(name).stat().st_size
                found[full] = {"name": full, "size": size or 0, "type": "file" if size is not None else "directory"}
        if not found and path:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    @override
    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return _Put(str(self._at(path))) if mode == "wb" else self._at(path).open("rb")

    @override
    def _rm(self, path: str) -> None:
        self._at(path).unlink()

    rm_file = _rm

    @override
    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """There are none."""

    mkdir = makedirs

    @override
    def rmdir(self, path: str) -> None:
        """There are none."""

    @override
    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("an object store renames nothing")

    rename = move = cp_file = copy = mv

    @override
    def modified(self, path: str) -> Any:
        import datetime

        return datetime.datetime.fromtimestamp(self._at(path).stat().st_mtime, datetime.timezone.utc)


def in_bucket(root: str, function: str, *args: Any, **kwargs: Any) -> Any:
    os.environ["TEST_BUCKET"] = root
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    return globals()[function](*args, **kwargs)


def named(root: Path) -> dict[int, set[str]]:
    """By step the files of a bucket's complete checkpoints."""
    files = [x.name.split("%") for x in root.iterdir()]
    complete = {x[-2] for x in files if x[-1] == "meta.pt"}
    return {int(name.partition("=")[2].partition("-")[0]): {x[-1] for x in files if x[-2] == name} for name in complete}


@pytest.mark.parametrize("world_size", [1, 2])
def test_behind_a_url_without_rename(gloo: Any, tmp_path: Path, world_size: int) -> None:
    root, url = str(tmp_path), "bucket://runs/one"
    save: dict[str, Any] = {"every_n_steps": 2, "keep_last": 3, "full_every": 2}
    settings: dict[str, Any] = {"world_size": world_size, "save": save, "ckpt_path": "last"}
    (full, *_) = gloo(world_size).run(in_bucket, root, "run", url, **settings)
    assert full["trained"] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert sorted(named(tmp_path)) == [6, 8, 10]
    ranks = {f"rank-0000{x}-of-0000{world_size}.pt" for x in range(world_size)}
    wanted = {"meta.pt", "manifest.json", ".metadata", *ranks}
    assert all(wanted <= files for files in named(tmp_path).values())
    (mark,) = tmp_path.glob("*step=10-*%meta.pt")
    mark.rename(mark.with_name(mark.name.replace("meta.pt", "saving.json")))  # a save that was cut off
    (rest, *_) = gloo(world_size).run(in_bucket, root, "run", url, **settings)
    assert rest["trained"] == [0, 1]
    assert rest["weights"] == full["weights"]
    assert 10 in named(tmp_path)
    (eighth,) = tmp_path.glob("*step=8-*%meta.pt")
    (again, *_) = gloo(1).run(in_bucket, root, "run", url, ckpt_path=f"{url}/{eighth.name.split('%')[-2]}")
    assert again["trained"] == [0, 1]


def test_in_memory(gloo: Any) -> None:
    url = f"memory://runs{time.time_ns()}"
    (full,) = gloo(1).run(run, url, save={"every_n_steps": 3, "full_every": 2})
    (rest,) = gloo(1).run(run, url, save={"every_n_steps": 3}, ckpt_path=full["last"].replace("=10-", "=9-"))
    assert rest["trained"] == [1]
    assert rest["weights"] == full["weights"]
