"""`lightning-gr plan`: its figures against loaders, layers and dictionaries, what it refuses, and how it looks."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_gr.balancing.cost import SequenceCost
from lightning_gr.cli import main
from lightning_gr.cli.plan import parse_ranks
from lightning_gr.cli.plan_balance import Lengths
from lightning_gr.cli.plan_memory import Memory, Scores, Table, gib, parse_bytes, table_bytes
from lightning_gr.cli.plan_network import Activations
from lightning_gr.cli.plan_show import bar, bins, short
from lightning_gr.data import LeaveOneOut, RankingDataModule, SequenceDataModule, Task
from lightning_gr.data.loader import PlannedLoader
from lightning_gr.layers import HSTUEncoder
from lightning_gr.models import MTGR, RankingModule, RetrievalModule

LONGEST, ITEMS = 24, 40
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The tiny recipes with a small log of their kind, and paths of the log and the store."""
    from lightning_gr.data import write_synthetic_log
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    folder = tmp_path_factory.mktemp("plan")
    log = folder / "events.csv"
    write_synthetic_log(log, num_users=150, num_items=ITEMS, mean_length=12, max_length=60, seed=0)
    store = prepare(open_log(log, columns=Columns(labels=("click",))), folder / "store")
    hstu = ["--config", "hstu/tiny", f"--data.init_args.path={log}", f"--data.init_args.max_length={LONGEST}"]
    mtgr = ["--config", "mtgr/tiny", f"--data.init_args.path={store.path}"]
    return {
        "hstu": [*hstu, "--data.init_args.global_tokens=200"],
        "mtgr": [*mtgr, "--data.init_args.global_tokens=400", "--data.init_args.max_history=20"],
        "paths": [str(log), str(store.path)],
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(["plan", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture(scope="module")
def planned(data: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Figures of both recipes with one partitioner."""
    found = {}
    for kind in ("hstu", "mtgr"):
        out = io.StringIO()
        words = ["--trainer.strategy.init_args.balancing.partitioner", "zigzag", "--ranks", "1,2,4,64", "--json"]
        with contextlib.redirect_stdout(out):
            assert main(["plan", *data[kind], *words]) == 0
        found[kind] = json.loads(out.getvalue())
    return found


def figures(run: Run, *words: str) -> dict[str, Any]:
    code, out, error = run(*words, "--json")
    assert code == 0, error
    found: dict[str, Any] = json.loads(out)
    return found


def loader_of(data: dict[str, list[str]], kind: str) -> PlannedLoader:
    """The recipe's training loader as `fit` has it, on one process."""
    datamodule: SequenceDataModule
    if kind == "hstu":
        datamodule = SequenceDataModule(path=data["paths"][0], global_tokens=200, max_length=LONGEST, seed=42)
    else:
        datamodule = RankingDataModule(
            path=data["paths"][1],
            tasks={"click": Task("click")},
            global_tokens=400,
            max_history=20,
            block=32,
            split=LeaveOneOut(),
            cross_task="click",
            cross_previous=True,
            user_token=False,
            seed=1,
        )
    return datamodule.train_dataloader()


def lengths_of(loader: PlannedLoader) -> list[Any]:
    return [batch.layout.lengths_B.numpy() for batch in loader]


def model_of(kind: str) -> Any:
    """The recipe's model by hand, with tables of values."""
    torch.manual_seed(5)
    if kind == "hstu":
        encoder = HSTUEncoder(dim=128, max_length=50, dropout=0.1, position_bias="recency", time_bias=False)
        return RetrievalModule(encoder=encoder, num_items=ITEMS, temperature=0.07)
    return RankingModule(network=MTGR(num_layers=2, max_length=128, position_bias="recency"))


# ---- figures -----------------------------------------------------------------------------------------------------


def test_balance_is_that_of_the_loaders(data: dict[str, list[str]], planned: dict[str, dict[str, Any]]) -> None:
    """At the recipe's two ranks, from the batches that the two ranks' loaders give."""
    found = planned["hstu"]
    whole = loader_of(data, "hstu")
    cost = SequenceCost(**found["cost"])
    encoder = model_of("hstu").encoder
    assert cost(np.array([7]))[0] == encoder.flops(7, 7 * 8 // 2)
    batches = lengths_of(whole)
    every = np.concatenate(batches)
    assert (found["samples"], found["tokens"], found["batches"]) == (len(every), int(every.sum()), len(batches))
    assert 2 < len(batches) <= 32  # all of them are looked at
    assert found["lengths"]["longest"] == every.max() == LONGEST
    assert found["lengths"]["mean"] == pytest.approx(every.mean())
    assert sum(x["samples"] for x in found["lengths"]["histogram"]) == len(every)

    source, plan = whole._source, whole._plan
    sums, tokens = {}, 0
    for method in ("zigzag", "contiguous"):
        parts = []
        for rank in range(2):
            loader = PlannedLoader(source, plan, rank=rank, world_size=2)
            loader.balance(cost=cost, method=method, tokens_per_rank=None)  # type: ignore[arg-type]
            own = lengths_of(loader)
            parts.append([cost(lengths).sum() for lengths in own])
            tokens = max(tokens, *(int(lengths.sum()) for lengths in own)) if method == "zigzag" else tokens
        sums[method] = np.array(parts)
    _, two, _, many = found["ranks"]
    waits = {method: float(((x.max(0) - x.mean(0)) / x.max(0)).mean()) for method, x in sums.items()}
    assert two["balanced"] == pytest.approx(waits["zigzag"])
    assert two["unbalanced"] == pytest.approx(waits["contiguous"])
    assert two["balanced"] < two["unbalanced"]
    assert (two["most_tokens"], two["batches"], two["repeats"]) == (tokens, len(batches), False)
    assert two["batch_tokens"] == pytest.approx(every.sum() / len(batches))

    assert many["repeats"]
    assert many["batch_tokens"] == pytest.approx(32 * two["batch_tokens"], rel=0.01)
    assert 0 <= many["bound"] <= many["balanced"] < many["unbalanced"]
    # From so many tokens a rank on, the longest costs no more than the mean rank's share of a batch.
    per_token = cost(every).sum() / every.sum()
    even = found["even_tokens_per_rank"]
    assert (even - 1) * per_token < cost(np.array([LONGEST]))[0] <= even * per_token


def test_work_and_exchange_of_retrieval(data: dict[str, list[str]], planned: dict[str, dict[str, Any]]) -> None:
    found = planned["hstu"]
    batches = list(loader_of(data, "hstu"))
    every = np.concatenate([batch.layout.lengths_B.numpy() for batch in batches])
    encoder = model_of("hstu").encoder
    one, _, four, _ = found["ranks"]
    # Each token asks, so full softmax scores each against all items, wherever they are.
    whole = sum(encoder.flops(int(n), int(n * (n + 1) // 2)) for n in every) + 2 * int(every.sum()) * ITEMS * 128
    for row in (one, four):
        per_epoch = row["forward_flops"] * found["tokens"] / (row["batch_tokens"] / row["ranks"])
        assert per_epoch == pytest.approx(whole, rel=1e-6)
        assert row["backward_flops"] == 2 * row["forward_flops"]

    dense = sum(p.numel() for p in encoder.parameters())
    assert found["dense_parameters"] == dense
    assert one["exchange"]["total"] == 0
    assert four["exchange"]["dense"] == pytest.approx(2 * 4 * dense * 3 / 4)
    # A rank's tokens: the first samples of the first batch, as many as fit; ids of history and labels, each once.
    first, seen, own = batches[0], set[int](), found["tokens"] / found["batches"] / 2
    starts, taken = first.layout.offsets_B1.tolist(), 0
    for begin, end in zip(starts, starts[1:], strict=False):
        if taken + end - begin > own:
            break
        taken += end - begin
        seen |= set(first.features["item_id"].values()[begin:end].tolist())
        seen |= set(first.labels["next_item"].values_N[begin:end].tolist())
    distinct = len(seen) * (four["batch_tokens"] / 4) / taken
    assert four["exchange"]["ids"] == pytest.approx(16 * distinct * 3 / 4)
    assert four["exchange"]["rows"] == pytest.approx(2 * 4 * 128 * distinct * 3 / 4)
    assert four["exchange"]["queries"] == pytest.approx(2 * 3 * four["batch_tokens"] / 4 * 128 * 4)

    # Row-wise AdaGrad has one number a row, AdamW two a parameter and a step a tensor.
    assert one["memory"]["tables"] == ITEMS * (128 + 1) * 4 == 4 * four["memory"]["tables"]
    assert one["memory"]["dense"] == 16 * dense + 4 * len(list(encoder.parameters()))


def kept_bytes(model: Any, batch: Any) -> int:
    """What autograd keeps of a whole training loss, rows looked up in real tables."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch.mean_over_global_batch(model.loss_sums(model(batch), batch))
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["hstu", "mtgr"])
def test_activations_are_those_of_a_whole_batch(
    data: dict[str, list[str]], planned: dict[str, dict[str, Any]], kind: str
) -> None:
    """Measured on a part of a batch and scaled, within a fifth of what a whole one keeps."""
    found = planned[kind]
    loader, model = loader_of(data, kind), model_of(kind)
    batches = list(loader)
    if kind == "hstu":
        model.configure_model()
        batches = [model.with_lookup_ids(batch, training=True) for batch in batches]
    else:
        model.features = loader._source.ranking_features  # type: ignore[attr-defined]
        model.configure_model()
    fullest = max(batches, key=lambda batch: batch.num_tokens)
    assert fullest.num_tokens > 100
    per_token = found["ranks"][0]["memory"]["activations"] / found["ranks"][0]["most_tokens"]
    assert per_token == pytest.approx(kept_bytes(model, fullest) / fullest.num_tokens, rel=0.2)


def test_recompute_takes_less_and_bf16_too(
    data: dict[str, list[str]], planned: dict[str, dict[str, Any]], run: Run
) -> None:
    def per_token(*words: str) -> float:
        size: float = figures(run, *data["hstu"], "--ranks", "1", *words)["activations"]["per_token"]
        return size

    plain, layers = planned["hstu"]["activations"]["per_token"], 2
    again = per_token("--model.init_args.encoder.init_args.recompute=true")
    assert plain / layers < again < 0.8 * plain  # inputs of all layers, and one layer's activations
    assert per_token("--trainer.precision=bf16-mixed") < plain


def test_dynamic_tables_count_state_metadata_and_keys(data: dict[str, list[str]], run: Run) -> None:
    found = figures(run, "--config", "hstu/tiny-dynamic", *data["hstu"][2:], "--ranks", "1,4")
    (table,) = found["tables"]
    assert table["rows"] == ITEMS  # fewer than the budget has room for
    # Row, one number of AdaGrad; count, step, time; and the key's share of its index.
    assert table["row_bytes"] == 4 * 128 + 4 + 3 * 8 + 38
    assert [row["memory"]["tables"] for row in found["ranks"]] == [ITEMS * table["row_bytes"], 10 * table["row_bytes"]]


def test_micro_steps_and_strong_scaling(data: dict[str, list[str]], run: Run) -> None:
    words = ["--trainer.strategy.init_args.balancing.tokens_per_rank=50", "--trainer.accumulate_grad_batches=2"]
    found = figures(run, *data["hstu"], *words, "--scaling", "strong", "--ranks", "1,2,8")
    assert (found["scaling"], found["accumulate"]) == ("strong", 2)
    loader = loader_of(data, "hstu")
    for row in found["ranks"]:
        own = PlannedLoader(loader._source, loader._plan, world_size=row["ranks"])
        steps = own.balance(cost=SequenceCost(1, 0), method="lpt", tokens_per_rank=50)
        assert row["micro_steps"] == steps
        assert row["most_tokens"] <= 50
        assert row["batch_tokens"] == pytest.approx(found["tokens"] / found["batches"])
    assert found["ranks"][0]["micro_steps"] > 2


# ---- memory ------------------------------------------------------------------------------------------------------


def test_tables_are_cut_as_the_strategy_cuts_them() -> None:
    def table(rows: int, cut: str, dim: int = 8) -> Table:
        return Table("t", ("f",), rows, dim, 4 * dim + 4, cut)

    assert table_bytes([table(10, "row_wise"), table(7, "row_wise")], 4) == (3 + 2) * 36
    assert table_bytes([table(10, "column_wise")], 8) == 10 * 36 // 2  # columns come in fours
    assert table_bytes([table(9, "table_wise"), table(5, "table_wise"), table(4, "table_wise")], 2) == 9 * 36
    assert table_bytes([Table("t", ("f",), None, 8, 36, "row_wise")], 2) == 0
    assert Table("t", ("f",), 100, 8, 36, "row_wise", cache_rows=20).bytes_on(2) == 20 * 36


def test_scores_are_spread_over_ranks() -> None:
    corpus, labels = Scores(1000, 0.5, 8), Scores(None, 0.5, 8)
    for ranks in (1, 4):
        queries = ranks * 50 * 0.5
        assert corpus.forward_flops(50, ranks) == 2 * queries * (1000 / ranks) * 8
        assert labels.forward_flops(50, ranks) == 2 * queries * (50 * 0.5) * 8
    assert corpus.kept_bytes(50, 4) == 4 * 100 * 250
    assert corpus.kept_bytes(10**9, 4) == 1 << 28


def test_a_refusal_names_the_figure_that_helps() -> None:
    """What it says to do, done, is accepted; a little less is refused."""
    table = Table("item", ("item_id",), 10**8, 127, 512, "row_wise")
    memory = Memory((table,), dense=10**9, activations=Activations(1e5, 0.0, 0.0), scores=None)
    gigabyte = 1 << 30
    with pytest.raises(Exception, match=r"^item: 100,000,000 rows x 512 bytes = 47\.7 GiB a rank on 1 rank") as refused:
        memory.refuse(16 * gigabyte, ranks=1, tokens=1000, longest=500)
    ranks = int(re.search(r"use at least (\d+) ranks", str(refused.value))[1])  # type: ignore[index]
    memory.refuse(16 * gigabyte, ranks=ranks, tokens=500, longest=500)
    with pytest.raises(Exception, match=r"^item: "):
        memory.refuse(16 * gigabyte, ranks=ranks - 1, tokens=500, longest=500)
    with pytest.raises(Exception, match=r"^activations: 900,000 tokens at once") as refused:
        memory.refuse(80 * gigabyte, ranks=1, tokens=900_000, longest=500)
    tokens = int(re.search(r"tokens_per_rank to at most (\d+)$", str(refused.value))[1])  # type: ignore[index]
    memory.refuse(80 * gigabyte, ranks=1, tokens=tokens, longest=500)
    with pytest.raises(Exception, match=r"^activations: "):
        memory.refuse(80 * gigabyte, ranks=1, tokens=tokens + 1, longest=500)
    with pytest.raises(Exception, match=r"^activations: the longest sequence alone has 900,000 tokens"):
        memory.refuse(80 * gigabyte, ranks=1, tokens=900_000, longest=900_000)
    with pytest.raises(Exception, match=r"^model: dense layers and their optimiser take 953\.7 MiB"):
        memory.refuse(10**8, ranks=64, tokens=1, longest=1)


def test_a_plan_that_cannot_fit_is_an_exit_code(data: dict[str, list[str]], run: Run) -> None:
    huge = ["--model.init_args.num_items=100000000", "--memory", "16GiB"]
    code, out, error = run(*data["hstu"], *huge, "--ranks", "1")
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"lightning-gr: error: item: 100,000,000 rows x 516 bytes = 48\.1 GiB a rank on 1 rank, and .* of other "
        r"things, where a rank has 16\.0 GiB; use at least 4 ranks or a smaller embedding_dim\n",
        error,
    )
    code, _, error = run(*data["hstu"], "--memory", "3.5MiB")
    assert code == 2
    assert re.search(
        r"error: activations: \d+ tokens at once on a rank .*; set tokens_per_rank to at most \d+\n$", error
    )


# ---- calibration -------------------------------------------------------------------------------------------------


def test_calibration_can_be_given_back(
    data: dict[str, list[str]], planned: dict[str, dict[str, Any]], run: Run
) -> None:
    code, out, _ = run(*data["hstu"], "--calibrate")
    assert code == 0
    *table, where, line = out.rstrip().splitlines()
    assert where == "put this under trainer.strategy.init_args.balancing:"
    cost = yaml.safe_load(line)["cost"]
    assert cost["linear"] + cost["quadratic"] > 0
    words = [f"--trainer.strategy.init_args.balancing.cost.{name}={value}" for name, value in cost.items()]
    assert figures(run, *data["hstu"], *words, "--ranks", "2")["cost"] == pytest.approx(cost)
    steps = [row.split("│")[1:-1] for row in table if row.startswith("│")]
    assert len(steps) >= 3
    total = sum(int(step[1].replace(",", "")) for step in steps)
    assert 0 < total <= planned["hstu"]["tokens"]


# ---- how it looks ------------------------------------------------------------------------------------------------


def test_a_terminal_of_80_columns_is_wide_enough(
    data: dict[str, list[str]], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_gr.cli.plan_show._WIDTH_OF_FILES", 80)
    code, out, _ = run(*data["mtgr"], "--plot", "plan.png")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out
    assert re.search(r"^mtgr/tiny: \d+ samples, [\d,]+ tokens an epoch; 2 ranks$", out, re.M)
    for ranks in ("1", r"2\*", "512", "1,024"):
        assert len(re.findall(rf"^│ +{ranks} │", out, re.M)) == 2
    assert re.search(r"^ +\d+-\d+ +\d+ +█+", out, re.M)
    assert re.search(r"^table item_id: 40 rows x 132 bytes \(width 32", out, re.M)
    assert lines[-1] == "plotted to plan.png"
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_bins_hold_every_length_once() -> None:
    random = np.random.default_rng(0)
    for tokens in (random.integers(3, 40, 500), random.lognormal(3, 1.5, 500).astype(int) + 1, np.array([5])):
        lengths = Lengths(np.bincount(tokens))
        found = bins(lengths)
        for first, last, samples in found:
            assert samples == ((tokens >= first) & (tokens <= last)).sum()
        assert [first for first, *_ in found[1:]] == [last + 1 for _, last, _ in found[:-1]]
        assert (found[0][0], found[-1][1]) == (tokens.min(), tokens.max())
        assert len(found) <= 16
        assert lengths.quantile(0.5) == np.sort(tokens)[(len(tokens) - 1) // 2]
    assert (bar(0.0), bar(1e-9), bar(0.5, 4), bar(1.0, 4)) == ("", "▏", "██", "████")


def test_sizes() -> None:
    assert parse_bytes("80GiB") == 80 << 30
    assert parse_bytes("80 gb") == 80 * 10**9
    assert parse_bytes("1.5M") == 3 << 19
    assert parse_bytes("77") == 77
    assert (gib(77), gib(1536), gib(3 << 50)) == ("77 B", "1.5 KiB", "3,072.0 TiB")
    assert (short(0), short(999), short(1 << 20), short(1000 << 20)) == ("0", "999", "1M", "0.977G")
    assert all(len(short(x * 10**power)) <= 6 for x in (1.0, 1.234, 9.999, 9.995) for power in range(15))
    assert parse_ranks("8, 1,8") == (1, 8)


# ---- mistakes ----------------------------------------------------------------------------------------------------


class ToyNoPlan(pl.LightningDataModule):
    """Its loader is torch's own."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([1, 2, 3])  # type: ignore[arg-type]


class ToyPlain(pl.LightningModule):
    """A module of a user's own, whose network cannot be run apart."""

    def configure_model(self) -> None:
        self.layer = nn.Linear(3, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "plan: --config: missing; name a recipe"),
        (["--config", "hstu/tinny"], "--config hstu/tinny: unknown recipe; did you mean"),
        (["HSTU", "--ranks", "0,2"], "--ranks 0,2: expected numbers from 1 to 65536, such as 1,8,64"),
        (["HSTU", "--memory", "80 apples"], "--memory 80 apples: expected a size such as 80GiB"),
        (["HSTU", "--plot", "no/such.png"], "--plot no/such.png: no such folder; make it first"),
        (["HSTU", "--plot", "plan.xyz"], "--plot plan.xyz: no such format; give a file that ends in .png, .pdf, .svg"),
        (["HSTU", "--data", "null"], "data: missing; a plan is made for a datamodule"),
        (["--model", "BoringModel", "--data", "tests.cli.test_plan.ToyNoPlan"], "data: ToyNoPlan.train_dataloader()"),
        (
            ["--model", "BoringModel", "--data", "StreamDataModule", "--data.folder", "."],
            "data: StreamDataModule: the ",
        ),
        (
            ["HSTU", "--trainer.strategy.init_args.balancing.tokens_per_rank=9"],
            "tokens_per_rank=9: the longest sample has 24 tokens; raise it to at least 24",
        ),
        (["PLAIN", "--calibrate"], "model: ToyPlain has no score() and loss_sums() to run apart from its tables"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, data: dict[str, list[str]], run: Run) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel  # noqa: F401  so that its name is known

    plain = ["--model", "tests.cli.test_plan.ToyPlain", "--data", "SequenceDataModule", *data["hstu"][2:]]
    words = [x for word in words for x in {"HSTU": data["hstu"], "PLAIN": plain}.get(word, [word])]
    code, _, error = run(*words)
    assert code == 2
    lines = [x for x in error.splitlines() if "lightning-gr: error: " in x]
    assert len(lines) == 1
    assert lines[0].startswith(f"lightning-gr: error: {said}"), lines[0]


def test_a_users_own_module_and_strategy(data: dict[str, list[str]], run: Run) -> None:
    words = ["--model", "tests.cli.test_plan.ToyPlain", "--data", "SequenceDataModule", *data["hstu"][2:]]
    code, out, _ = run(*words, "--trainer.strategy", "fsdp", "--trainer.devices", "auto")
    assert code == 0
    assert "1 rank, since trainer.devices names no number" in out
    assert "strategy fsdp: balance and memory are those of SequenceBalancedStrategy's defaults" in out
    assert "dense: 8 parameters" in out
    assert "activations: not measured; ToyPlain has no score() and loss_sums()" in out
    assert "FLOPs: not known; ToyPlain has no sequence_cost()" in out
    assert "cost of a sequence: 1 L + 0 L^2" in out
