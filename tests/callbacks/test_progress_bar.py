"""GRProgressBar: what it shows with and without a terminal, and that it leaves everything as it found it."""

from __future__ import annotations

import io
import logging
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import pytest
import rich
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from lightning_gr.callbacks import GRProgressBar, progress_bar
from lightning_gr.metrics import HitRate
from lightning_gr.observability.run_length import batches_left

pytestmark = pytest.mark.filterwarnings("ignore")


class Clock:
    """Time passes only where a step says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_bar, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    """Takes what is written for a terminal."""

    @override
    def isatty(self) -> bool:
        return True

    def frames(self) -> list[str]:
        """What stood on the screen after each redraw; what was printed above the line included."""
        text = re.sub(r"\x1b\[\?25[lh]", "", self.getvalue())
        return [frame.strip("\n") for frame in re.split(r"(?:\x1b\[1A|\x1b\[2K|\r)+", text) if frame.strip("\n")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    def make(width: int) -> Terminal:
        terminal = Terminal()
        console = Console(
            file=terminal, force_terminal=True, force_interactive=True, width=width, color_system=None, _environ={}
        )
        monkeypatch.setattr(rich, "_console", console)
        return terminal

    return make


@pytest.fixture(autouse=True)
def _plain_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", Console())


class Module(pl.LightningModule):
    """Its n-th training step has loss n and takes a second; a validation batch takes half of one."""

    def __init__(self, clock: Clock | None = None, *, log: bool = True) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.clock = clock or Clock()
        self.log_metrics = log
        self.steps = 0
        self.fail_at: int | None = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.clock.now += 1.0
        if self.steps == self.fail_at:
            raise RuntimeError("the step failed")
        loss: Tensor = self.layer(torch.zeros(1)).sum() * 0 + self.steps
        if self.log_metrics:
            self.log("train/loss", loss)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 0.5
        if self.log_metrics:
            self.log("val/HR@10", 0.25 + self.steps / 1000, batch_size=1)

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.clock.now += 0.5

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += 0.5
        return torch.zeros(1)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int) -> DataLoader[Any]:
    return DataLoader(torch.zeros(batches * 2, 1), batch_size=2)  # type: ignore[arg-type]


def make_trainer(bar: GRProgressBar, **settings: Any) -> pl.Trainer:
    common: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=[bar], **(common | settings))


def test_plain_lines_of_a_whole_run(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(GRProgressBar(plain_every_s=3), max_epochs=3).fit(Module(clock), loader(4), loader(2))
    assert capsys.readouterr().out.splitlines() == [
        # 12 batches of a second each, and a validation of a second after every 4.
        "epoch 1/3  step 1  8%  train/loss 1",
        "epoch 1/3  step 4  33%  0:00:08 left  train/loss 4  2 samples/s",
        "epoch 1/3  step 4  33%  Validation in 0:00:01  train/loss 4  val/HR@10 0.254",
        # 6 batches and a validation since the first batch: 7 s for 6; the validation does not lower samples a second.
        "epoch 2/3  step 7  58%  0:00:06 left  train/loss 7  2 samples/s  val/HR@10 0.254",
        "epoch 2/3  step 8  66%  Validation in 0:00:01  train/loss 8  val/HR@10 0.258",
        "epoch 3/3  step 11  91%  0:00:01 left  train/loss 11  2 samples/s  val/HR@10 0.258",
        "epoch 3/3  step 12  100%  Validation in 0:00:01  train/loss 12  val/HR@10 0.262",
        "epoch 3/3  step 12  100%  in 0:00:15  train/loss 12  2 samples/s  val/HR@10 0.262",
    ]


def test_other_phases_are_short_and_training_can_go_on(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(GRProgressBar(plain_every_s=1.5), max_epochs=1)
    module = Module(clock)
    trainer.fit(module, loader(1), loader(1))
    trainer.validate(module, loader(4), verbose=False)
    trainer.test(module, loader(1), verbose=False)
    trainer.predict(module, loader(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(1), loader(1))
    assert capsys.readouterr().out.splitlines()[-7:] == [
        "Validation 3/4  4 samples/s",
        "Validation 4  in 0:00:02  4 samples/s  val/HR@10 0.251",
        "Testing 1  in 0:00:00  4 samples/s",
        "Predicting 2  in 0:00:01  4 samples/s",
        "epoch 2/2  step 2  100%  train/loss 2",
        "epoch 2/2  step 2  100%  Validation in 0:00:00  train/loss 2  val/HR@10 0.252",
        "epoch 2/2  step 2  100%  in 0:00:02  train/loss 2  val/HR@10 0.252",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 2, "max_steps": 100},
        {"max_epochs": 5, "max_steps": 8, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_epochs": 2, "limit_train_batches": 0.4, "accumulate_grad_batches": 3},
    ],
    ids=str,
)
def test_the_share_done_is_of_the_batches_that_the_run_has(
    settings: dict[str, Any], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Module(clock)
    make_trainer(GRProgressBar(plain_every_s=0), **settings).fit(module, loader(5))
    shown = re.findall(r"(\d+)%", capsys.readouterr().out)
    shares = [str(100 * (batch + 1) // module.steps) for batch in range(module.steps)]
    assert shown == [*shares, "100"]


def run_to_the_end(*, batches: int, max_epochs: int, max_steps: int, accumulate: int) -> list[dict[str, int]]:
    """The state after each batch, by running the loops."""
    states, step, epoch = [], 0, 0
    while not (epoch == max_epochs or step == max_steps):
        for batch in range(1, batches + 1):
            step += batch % accumulate == 0 or batch == batches
            states.append({"batch": batch, "epoch": epoch, "step": step})
            if step == max_steps:
                break
        epoch += 1
    return states


@given(st.integers(1, 7), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4), st.sampled_from("es*"))
def test_the_batches_left_are_those_that_the_loops_will_run(
    batches: int, epochs: int, steps: int, accumulate: int, bounds: str
) -> None:
    limits = {"max_epochs": -1 if bounds == "s" else epochs, "max_steps": -1 if bounds == "e" else steps}
    states = run_to_the_end(batches=batches, accumulate=accumulate, **limits)
    left = [batches_left(batches_per_epoch=batches, accumulate=accumulate, **limits, **state) for state in states]
    assert left == list(range(len(states)))[::-1]


def test_nobody_knows_the_end_of_an_endless_run() -> None:
    state: dict[str, Any] = {"batch": 3, "epoch": 0, "step": 3, "accumulate": 1}
    assert batches_left(batches_per_epoch=math.inf, max_epochs=3, max_steps=-1, **state) is None
    assert batches_left(batches_per_epoch=10, max_epochs=-1, max_steps=-1, **state) is None
    assert batches_left(batches_per_epoch=math.inf, max_epochs=3, max_steps=5, **state) == 2


class Growing:
    """Batch n of an epoch has n tokens, takes n seconds, and the loader says so."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((1, 1), float(n)) for n in range(1, self.batches + 1))

    def tokens_before(self, batches: int) -> int:
        return batches * (batches + 1) // 2


class Slowing(Module):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.clock.now += float(batch) - 1.0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        ({"max_epochs": 2}, [1, 2, 3, 4, 5] * 2),
        ({"max_epochs": 3, "limit_train_batches": 3}, [1, 2, 3] * 3),
        ({"max_epochs": -1, "max_steps": 13}, [1, 2, 3, 4, 5] * 2 + [1, 2, 3]),
    ],
    ids=str,
)
def test_the_time_left_is_that_of_the_tokens_left(
    settings: dict[str, Any], seconds: list[int], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(GRProgressBar(plain_every_s=0), **settings).fit(Slowing(clock), Growing(5))
    shown = re.findall(r"0:00:(\d\d) left", capsys.readouterr().out)
    assert [int(left) for left in shown] == [sum(seconds[done:]) for done in range(2, len(seconds) + 1)]


class Stream(IterableDataset[Tensor]):
    """Batches of unknown number."""

    @override
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.zeros(3, 1))


@pytest.mark.parametrize(("max_steps", "has_share"), [(-1, False), (4, True)])
def test_a_loader_without_a_length(
    max_steps: int, has_share: bool, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = GRProgressBar(plain_every_s=0)
    make_trainer(bar, max_epochs=2, max_steps=max_steps).fit(Module(clock), DataLoader(Stream(), batch_size=None))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (4 if has_share else 6) + 1
    assert all(("%" in line) == has_share for line in lines)
    assert lines[-1].startswith("epoch 2/2  step ")


@dataclass
class Tokens:
    """A batch that knows its tokens."""

    x: Tensor

    @property
    def num_tokens(self) -> int:
        return 1500

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        return self


@pytest.mark.parametrize(
    ("collate", "rate"),
    [
        (lambda rows: Tokens(torch.stack(rows)), "1.5k tokens/s"),
        (lambda rows: {"x": [torch.stack(rows)]}, "2 samples/s"),
        (lambda rows: "text", "1 batches/s"),
    ],
)
def test_speed_is_in_the_finest_unit_that_the_batch_knows(
    collate: Any, rate: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    data: DataLoader[Any] = DataLoader(torch.zeros(6, 1), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]
    make_trainer(GRProgressBar(), max_epochs=1).fit(Module(clock, log=False), data)
    # Without anything logged, the step's own loss is shown.
    assert capsys.readouterr().out.splitlines()[-1] == f"epoch 1/1  step 3  100%  in 0:00:03  loss 3  {rate}"


def test_one_line_on_a_wide_terminal(clock: Clock, terminal: Any) -> None:
    screen = terminal(120)
    make_trainer(GRProgressBar(refresh_every_s=0), max_epochs=2, num_sanity_val_steps=1).fit(
        Module(clock), loader(4), loader(2)
    )
    frames = screen.frames()
    assert frames[0].split() == ["Sanity", "Checking", "1/1", "━" * 40, "4", "samples/s"]
    assert not [frame for frame in frames if "\n" in frame and "stopped" not in frame]  # Lightning's own message
    middle = next(frame for frame in frames if "step 6" in frame)
    assert middle.split("  ")[:2] == ["epoch 2/2", "step 6"]
    assert re.search(r"━{15,}[╸ ] +75%  0:00:02 left  train/loss 6  2 samples/s  val/HR@10 0.254", middle)
    assert any("Validation 1/2" in frame for frame in frames)
    assert frames[-1].rstrip().endswith("100%  in 0:00:10  train/loss 8  2 samples/s  val/HR@10 0.258")


@pytest.mark.parametrize("width", [20, 45, 60])
def test_a_narrow_terminal_gets_a_second_line_and_nothing_wraps(width: int, clock: Clock, terminal: Any) -> None:
    screen = terminal(width)
    make_trainer(GRProgressBar(refresh_every_s=0), max_epochs=2).fit(Module(clock), loader(4), loader(2))
    text = re.sub(r"\x1b\[[?\d]*\w", "", screen.getvalue())
    rows = [row for row in re.split(r"[\r\n]+", text) if row.strip()]
    assert max(map(len, rows)) <= width
    if width == 20:  # validation metrics have a row of their own where they would push others out
        assert rows.pop().startswith("  val/HR@10 0")
    assert rows[-2].startswith("epoch 2")
    assert rows[-1].startswith("  train/")


def test_what_is_printed_goes_above_the_line(clock: Clock, terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(100)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    before = sys.stdout, sys.stderr, handler.stream

    class Printing(Module):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.print("printed", "[literally]")
            logger.warning("logged")
            return loss

    try:
        make_trainer(GRProgressBar(), max_epochs=1).fit(Printing(clock), loader(2))
    finally:
        logger.removeHandler(handler)
    assert (sys.stdout, sys.stderr, handler.stream) == before
    text = screen.getvalue()
    assert text.endswith("\x1b[?25h")  # the cursor is back
    text = re.sub(r"\x1b\[\?25[lh]", "", text)
    assert len(re.findall(r"^(?:.*\x1b\[2K)?printed \[literally\]$", text, re.MULTILINE)) == 2
    assert len(re.findall(r"^(?:.*\x1b\[2K)?logged$", text, re.MULTILINE)) == 2


@pytest.mark.parametrize("phase", ["fit", "validate"])
def test_an_error_stops_the_display_and_the_next_run_works(phase: str, clock: Clock, terminal: Any) -> None:
    screen = terminal(100)
    bar = GRProgressBar(refresh_every_s=0)
    trainer = make_trainer(bar, max_epochs=1)
    module, stdout = Module(clock), sys.stdout
    module.fail_at = 2

    def fail(*args: Any) -> None:
        raise RuntimeError("the step failed")

    if phase == "validate":
        module.validation_step = fail  # type: ignore[assignment, method-assign]
    with pytest.raises(RuntimeError, match="the step failed"):
        trainer.fit(module, loader(3)) if phase == "fit" else trainer.validate(module, loader(3))
    assert sys.stdout is stdout
    assert bar._display is None
    assert screen.getvalue().endswith("\x1b[?25h")
    make_trainer(bar, max_epochs=1).fit(Module(clock), loader(3))
    assert "100%  in 0:00:03" in screen.frames()[-1]


def test_no_control_codes_without_a_terminal_even_under_force_color(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(rich, "_console", Console())
    make_trainer(GRProgressBar(refresh_every_s=0, plain_every_s=0), max_epochs=1).fit(Module(clock), loader(2))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert out.replace("\n", "").isprintable()


def test_metrics_are_read_only_when_something_is_shown(clock: Clock) -> None:
    reads = []

    class Counting(GRProgressBar):
        @override
        def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
            reads.append(trainer.global_step)
            return super().get_metrics(trainer, pl_module)

    make_trainer(Counting(plain_every_s=20), max_epochs=2).fit(Module(clock), loader(30))
    assert reads == [1, 21, 30, 41, 60]  # the first, every 20 s, and each epoch's last


def test_what_the_user_logs_for_the_bar_is_shown_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    class Logging(Module):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("my_loss", 0.5, prog_bar=True)
            self.log("rate", 3.0, prog_bar=True)
            return super().training_step(batch, batch_idx)

        @override
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/auc", 0.75, prog_bar=True, batch_size=1)

    make_trainer(GRProgressBar(plain_every_s=0), max_epochs=2).fit(Logging(clock), loader(1), loader(1))
    last = capsys.readouterr().out.splitlines()[-1]
    assert "  my_loss 0.5  rate 3  " in last
    assert last.count("val/auc 0.75") == 1
    assert "train/loss" not in last


class Monitors(pl.Callback):
    """Writes what monitors do, from the third step on."""

    def __init__(self, **values: float) -> None:
        self.values = {f"gr/{name}": torch.tensor(value) for name, value in values.items()}

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step >= 3:
            trainer.callback_metrics.update(self.values)

    @override
    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.callback_metrics.update({name: value.clone() for name, value in self.values.items()})


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ({"mfu": 0.1234}, "2 samples/s  MFU 12%"),
        ({"mfu": 0.0346, "imbalance_tokens": 1.3}, "2 samples/s  MFU 3.5%  imbalance 1.30"),
        ({"imbalance_tokens": 1.3, "imbalance_flops": 1.0249}, "2 samples/s  imbalance 1.02"),
        ({"tokens_per_second": 1.234e6, "mfu": 1.02, "flops_total": 5.0}, "1.23M tokens/s  MFU 102%"),
    ],
    ids=str,
)
def test_what_monitors_measure_is_shown_by_short_names(
    values: dict[str, float], shown: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(GRProgressBar(plain_every_s=0), max_epochs=2)
    trainer.callbacks.insert(0, Monitors(**values))  # type: ignore[attr-defined]
    trainer.fit(Module(clock), loader(3), loader(1))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[1].endswith("train/loss 2  2 samples/s")
    assert lines[2].endswith(f"train/loss 3  {shown}")
    assert lines[-1] == f"epoch 2/2  step 6  100%  in 0:00:07  train/loss 6  {shown}  val/HR@10 0.256"
    assert "gr/" not in out


def test_disabled_it_shows_nothing_and_enabled_again_it_does(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    bar = GRProgressBar(plain_every_s=0)
    bar.disable()
    assert (bar.is_enabled, bar.is_disabled) == (False, True)
    trainer, module = make_trainer(bar, max_epochs=1), Module(clock)
    trainer.fit(module, loader(2), loader(1))
    trainer.validate(module, loader(1), verbose=False)
    trainer.predict(module, loader(1))
    assert capsys.readouterr().out == ""
    bar.enable()
    trainer.predict(module, loader(1))
    assert capsys.readouterr().out.startswith("Predicting 1/1")


def test_a_running_bar_can_be_pickled(clock: Clock, terminal: Any) -> None:
    terminal(100)
    copies = []

    class Pickling(GRProgressBar):
        @override
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            assert self._display is not None
            self._trainer = None
            state = self.__reduce_ex__(2)[2]
            copies.append(pickle.loads(pickle.dumps(state)))
            self._trainer = trainer

    make_trainer(Pickling(refresh_every_s=0.25), max_epochs=1).fit(Module(clock), loader(1))
    assert copies[0]["refresh_every_s"] == 0.25
    assert copies[0]["_display"] is None


@pytest.mark.parametrize("name", ["refresh_every_s", "plain_every_s"])
def test_negative_seconds_are_an_error(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{name}=-1: expected seconds >= 0"):
        GRProgressBar(**{name: -1})


def _fit_on_rank() -> list[str]:
    class Synced(Module):
        def __init__(self, clock: Clock) -> None:
            super().__init__(clock)
            self.hit_rate = HitRate(k=1)

        @override
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.hit_rate.update(torch.tensor([1 + torch.distributed.get_rank()]))
            self.log("val/hit", self.hit_rate)
            self.log("val/rank", float(torch.distributed.get_rank()), sync_dist=True, batch_size=1)

    clock, out, stdout = Clock(), io.StringIO(), sys.stdout
    setattr(progress_bar, "monotonic", clock)  # noqa: B010
    sys.stdout = out
    try:
        trainer = make_trainer(
            GRProgressBar(plain_every_s=0), max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=1
        )
        trainer.fit(Synced(clock), loader(4), loader(2))
    finally:
        sys.stdout = stdout
    return [line for line in out.getvalue().splitlines() if line.startswith(("epoch", "Sanity"))]


@pytest.mark.dist
def test_only_rank_zero_shows_and_asking_for_metrics_never_hangs(gloo: Any) -> None:
    first, second = gloo(2).run(_fit_on_rank)
    assert second == []
    assert first[0].startswith("Sanity Checking 1/1")
    assert first[-1] == "epoch 2/2  step 4  100%  in 0:00:04  train/loss 4  4 samples/s  val/hit 0.5  val/rank 0.5"


@pytest.mark.dist
def test_it_follows_into_spawned_processes(capfd: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(GRProgressBar(), max_epochs=1, limit_train_batches=2, devices=2, strategy="ddp_spawn")
    trainer.fit(BoringModel())
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines[0].startswith("epoch 1/1  step 1  50%")
    assert lines[-1].startswith("epoch 1/1  step 2  100%  in 0:")
