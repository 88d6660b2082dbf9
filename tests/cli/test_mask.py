"""`lightning-gr mask`: what it shows of the shipped recipes, and how it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gr.batch import SequenceBatch
from lightning_gr.cli import main
from lightning_gr.cli.mask import _blocks, picture
from lightning_gr.models import MTGR, RankingModule, RetrievalModule
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "masks.md"


class ToyLeaky(RetrievalModule):
    """Sees the event that it is asked for."""

    def attention_inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        inputs = super().attention_inputs(batch)
        end_T = torch.minimum(inputs["mask"].a_T + 1, batch.layout.lengths_B[batch.layout.sequence_T])
        return inputs | {"mask": IntervalMask(end_T, end_T, end_T, inputs["mask"].self_T)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The tiny recipes with a small log of their kind."""
    from lightning_gr.data import write_synthetic_log
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    folder = tmp_path_factory.mktemp("mask")
    log = folder / "events.csv"
    write_synthetic_log(log, num_users=30, num_items=20, mean_length=12, max_length=24, seed=0)
    store = prepare(open_log(log, columns=Columns(labels=("click",))), folder / "store")
    return {
        "hstu": ["--config", "hstu/tiny", f"--data.init_args.path={log}", "--data.init_args.max_length=8"],
        "mtgr": ["--config", "mtgr/tiny", f"--data.init_args.path={store.path}", "--data.init_args.block=6"],
    }


@pytest.fixture
def show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["mask", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("split", ["train", "test"])
def test_retrieval_is_causal_and_asks_at_the_next_events_time(
    data: dict[str, list[str]], show: Callable[..., tuple[int, str, str]], split: str, tmp_path: Path
) -> None:
    code, out, _ = show(*data["hstu"], "--split", split, "--sequence", "1")
    assert code == 0
    assert out.startswith(f"hstu/tiny, first {split} batch: ")
    assert re.search(r"no leak in the batch's \d+ sequences\n$", out)
    rows = re.findall(r"^ *(\d+) r ([■·][ ■·]*?)  (\S+) +(\S+ \S+)  (\S+ \S+)$", out, re.M)
    assert 2 <= len(rows) <= 8
    for i, (number, marks, sees, time, asks) in enumerate(rows):
        assert int(number) == i
        assert marks.split() == ["■"] * (i + 1) + ["·"] * (len(rows) - i - 1)
        assert sees == f"[0,{i + 1})"
        assert i + 1 == len(rows) or asks == rows[i + 1][3]
        assert time < asks
    assert list(tmp_path.iterdir()) == []


def test_ranking_shows_every_kind(data: dict[str, list[str]], show: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = show(*data["mtgr"], "--data.init_args.user_token", "true")
    assert code == 0
    assert re.search(r"1 contextual \(c\), \d+ static \(s\), \d+ real-time \(r\), \d+ candidate \(x\)", out)
    rows = {kind: re.findall(rf"^ *\d+ {kind} .*$", out, re.M) for kind in "csrx"}
    assert all(rows.values())
    assert rows["c"][0].endswith("-")
    assert all(re.search(r"\[0,\d+\) self  \d{4}-\d\d-\d\d ", row) for row in rows["x"])


def test_a_leak_is_named_and_plotted_and_is_an_exit_code(
    data: dict[str, list[str]], show: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    leaky = ["--model", "tests.cli.test_mask.ToyLeaky", "--model.encoder", "HSTUEncoder"]
    code, out, _ = show("--data", "SequenceDataModule", *data["hstu"][2:], *leaky, "--plot", "leak.png")
    assert code == 1
    assert out.startswith("ToyLeaky, first train batch: ")
    assert "plotted to leak.png" in out
    assert (tmp_path / "leak.png").read_bytes().startswith(b"\x89PNG")
    line = (
        r"^leak: sequence \d+: token 0 \(real-time at (\d+)\) sees token 1 \(real-time at (\d+)\), which comes after it"
    )
    found = re.findall(line, out, re.M)
    assert found
    assert all(int(time) <= int(later) for time, later in found)
    assert re.search(r"^\.\.\. and \d+ more leaks$", out, re.M)


def test_a_long_sequence_is_drawn_in_blocks() -> None:
    seen = torch.ones(144, 144, dtype=torch.bool).tril()
    head, *rows, scale = _blocks(seen, torch.full((144,), 2))
    assert head.strip() == "r" * 72
    assert scale == "each character stands for 4.0 x 2.0 pairs"
    assert [row.split(" r ")[1] for row in rows] == ["█" * 2 * i + "▓▒" for i in range(36)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "mask: --config: missing; name a recipe"),
        (["--config", "hstu/tinny"], "--config hstu/tinny: unknown recipe; did you mean"),
        (["HSTU", "--sequence", "999"], "--sequence 999: the batch has the sequences 0 ... "),
        (["HSTU", "--sequence", "one"], "mask: argument --sequence: invalid int value: 'one'; see lightning-gr mask"),
        (["HSTU", "--split", "all"], "mask: argument --split: invalid choice: 'all'"),
        (["HSTU", "--plot", "no/such.png"], "--plot no/such.png: no such folder; make it first"),
        (["HSTU", "--plot", "mask.xyz"], "--plot mask.xyz: no such format; give a file that ends in .png, .pdf, .svg"),
        (["MTGR", "--model.network", "DLRM"], "network: DLRM has no attention between the tokens of a sequence"),
        (["HSTU", "--data", "null"], "data: missing; the mask is shown for a batch of a datamodule"),
        (["HSTU", "--model", "BoringModel"], "model: BoringModel has no attention_inputs(batch)"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, data: dict[str, list[str]], show: Callable[..., tuple[int, str, str]]
) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel  # noqa: F401  so that its name is known

    words = [x for word in words for x in data.get(word.lower(), [word])]
    code, _, error = show(*words)
    assert code == 2
    lines = [x for x in error.splitlines() if "lightning-gr: error: " in x]
    assert len(lines) == 1
    assert lines[0].startswith(f"lightning-gr: error: {said}"), lines[0]


class ToyRecorder(nn.Module):
    """An encoder that keeps what it is told."""

    dim = 4

    def forward(self, x_TD: torch.Tensor, **inputs: Any) -> torch.Tensor:
        self.told = inputs
        return x_TD


def test_what_is_shown_is_what_runs() -> None:
    from torchrec import KeyedJaggedTensor

    lengths = torch.tensor([4, 5])
    batch = SequenceBatch(
        features=KeyedJaggedTensor(keys=["item_id"], values=torch.arange(9), lengths=lengths),
        token_counts_B4=torch.tensor([[1, 0, 2, 1], [0, 2, 1, 2]]),
        sample_ids_B=torch.arange(2),
        timestamps_T=torch.tensor([0, 4, 5, 6, 1, 2, 8, 8, 9]),
        request_timestamps_T=torch.tensor([0, 5, 6, 6, 2, 8, 8, 9, 9]),
    )
    recorder, tokens = ToyRecorder(), torch.zeros(9, 4)
    retrieval, mtgr = RetrievalModule(encoder=recorder, num_items=9), MTGR(dim=4, num_layers=1, max_length=9)
    mtgr.encoder, mtgr.tokens = recorder, lambda embedded, batch: tokens  # type: ignore[assignment]
    ranking = RankingModule(network=mtgr)
    for shown, run in (
        (retrieval.attention_inputs(batch), lambda: retrieval.encode({"item_id": tokens}, batch)),
        (ranking.attention_inputs(batch), lambda: mtgr({}, batch)),
    ):
        run()
        assert shown.keys() == recorder.told.keys()
        for name, value in recorder.told.items():
            if name == "mask":
                assert torch.equal(value.visible(batch.layout, batch.layout), shown[name].visible(*[batch.layout] * 2))
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, shown[name])
            else:
                assert value is shown[name]
    assert "request_times_T" not in ranking.attention_inputs(batch)


def examples() -> dict[str, tuple[IntervalMask, list[int]]]:
    """The masks that the guide shows, by the call that it names, with the tokens of each kind."""

    def layout(counts: list[int]) -> JaggedLayout:
        return JaggedLayout.from_lengths(torch.tensor([sum(counts)]))

    def one(*values: int) -> torch.Tensor:
        return torch.tensor(values)

    found: dict[str, tuple[IntervalMask, list[int]]] = {}
    kinds = [0, 0, 8, 0]
    found["causal(layout)"] = (IntervalMask.causal(layout(kinds)), kinds)
    kinds = [3, 0, 5, 0]
    found["contextual_prefix(layout, num_contextual_B)"] = (
        IntervalMask.contextual_prefix(layout(kinds), one(3)),
        kinds,
    )
    kinds = [0, 0, 5, 3]
    found["candidates(layout, num_candidates_B)"] = (IntervalMask.candidates(layout(kinds), one(3)), kinds)
    kinds = [2, 0, 4, 5]
    lists = IntervalMask.listwise_groups(layout(kinds), one(2), one(2, 3), num_contextual_B=one(2))
    found["listwise_groups(layout, num_groups_B, group_sizes_G, num_contextual_B=...)"] = (lists, kinds)
    kinds = [2, 0, 7, 2]
    parts: dict[str, Any] = {"num_contextual_B": one(2), "num_candidates_B": one(2)}
    window = IntervalMask.sliding_window(layout(kinds), 3, **parts)
    found["sliding_window(layout, 3, num_contextual_B=..., num_candidates_B=...)"] = (window, kinds)
    kinds = [0, 0, 9, 2]
    paper = IntervalMask.semi_local(layout(kinds), 3, num_prefix=2, num_candidates_B=one(2))
    found["semi_local(layout, 3, num_prefix=2, num_candidates_B=...)"] = (paper, kinds)
    code = IntervalMask.semi_local(layout(kinds), 3, num_full=2, num_candidates_B=one(2))
    found["semi_local(layout, 3, num_full=2, num_candidates_B=...)"] = (code, kinds)
    kinds = [2, 2, 4, 3]
    earlier = one(0, 0, 0, 0, 0, 1, 2, 3, 1, 3, 4)
    found["dynamic(layout, token_counts_B4, num_earlier_T)"] = (
        IntervalMask.dynamic(layout(kinds), torch.tensor([kinds]), earlier),
        kinds,
    )
    return found


@pytest.mark.parametrize("call", list(examples()))
def test_the_guides_pictures_are_the_masks(call: str) -> None:
    mask, kinds = examples()[call]
    layout = JaggedLayout.from_lengths(torch.tensor([sum(kinds)]))
    lines = picture(mask.visible(layout, layout)[0], torch.repeat_interleave(torch.tensor(kinds)))
    assert f"`{call}`" in GUIDE.read_text(encoding="utf-8")
    assert "\n".join(["```text", *lines, "```"]) in GUIDE.read_text(encoding="utf-8")
