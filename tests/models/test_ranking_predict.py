"""What `predict` returns: each candidate's probabilities, or the best of each sample, down to TopKWriter's files.

Shape suffixes: B samples, N candidates of all samples together, K best ones of a sample.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import polars
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_gr.batch import PADDING_SAMPLE_ID, SequenceBatch
from lightning_gr.callbacks import TopKWriter
from lightning_gr.layers import MultiTaskHeads
from lightning_gr.models import RankingModule
from lightning_gr.models.best_candidates import best_candidates
from tests.models.ranking_samples import FEATURES, Sample, collate, disturb, draw_sample, make_mtgr


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=6), max_size=5), st.integers(1, 7))
def test_the_best_are_those_of_a_sort_with_ties_by_item_row(samples: Any, k: int) -> None:
    flat = [pair for sample in samples for pair in sample]
    items_BK, scores_BK = best_candidates(
        torch.tensor([score for score, _ in flat], dtype=torch.float64),
        torch.tensor([item for _, item in flat], dtype=torch.int64),
        torch.tensor([len(sample) for sample in samples], dtype=torch.int64),
        k,
    )
    assert items_BK.shape == scores_BK.shape == (len(samples), k)
    for b, sample in enumerate(samples):
        wanted = sorted(sample, key=lambda x: (-x[0], x[1]))[:k]
        padding = k - len(wanted)
        assert items_BK[b].tolist() == [item for _, item in wanted] + [-1] * padding
        assert scores_BK[b].tolist() == [score for score, _ in wanted] + [-float("inf")] * padding


def make_module(**changes: Any) -> RankingModule:
    torch.manual_seed(3)
    module = RankingModule(**({"network": make_mtgr().float(), "features": FEATURES, "embedding_dim": 3} | changes))
    module.setup("fit")
    module.configure_model()
    disturb(module)
    return module.eval()


def samples() -> list[Sample]:
    rng = np.random.default_rng(1)
    return [draw_sample(rng, *x) for x in ((4, 3, 7), (0, 0, 2), (5, 5, 0), (2, 4, 11))]


def float_batch(of: list[Sample], ids: list[int] | None = None) -> SequenceBatch:
    batch = collate(of)
    batch.dense = {name: x.float() for name, x in batch.dense.items()}
    if ids is not None:
        batch.sample_ids_B = torch.tensor(ids)
    return batch


@pytest.mark.parametrize("task", ["click", "buy"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_best_candidates_are_those_of_all_probabilities(task: str, micro_batch: int | None) -> None:
    drawn = samples()
    batch = float_batch(drawn, ids=[103, 4, 205, 9])
    module = make_module(micro_batch=micro_batch)
    with torch.inference_mode():
        everything = module.predict_step(batch, 0)
        module.top_k, module.top_k_task = 4, None if task == "click" else task
        best = module.predict_step(batch, 0)
    assert everything.keys() == {"user_rows", "item_rows", "probabilities"}
    assert everything["item_rows"].tolist() == [e.item for x in drawn for e in x.candidates]
    assert everything["user_rows"].tolist() == [x.user for x in drawn for _ in x.candidates]
    assert best["sample_ids"].tolist() == [103, 4, 205, 9]
    assert best["user_rows"].tolist() == [x.user for x in drawn]
    assert best["timestamps"].tolist() == [x.candidates[0].time if x.candidates else 0 for x in drawn]
    first = 0
    for b, x in enumerate(drawn):
        p = everything["probabilities"][task][first : first + len(x.candidates)].tolist()
        wanted = sorted(zip(p, (e.item for e in x.candidates), strict=True), key=lambda pair: (-pair[0], pair[1]))[:4]
        assert best["item_rows"][b, : len(wanted)].tolist() == [item for _, item in wanted]
        assert best["scores"][b, : len(wanted)].tolist() == [score for score, _ in wanted]
        assert bool((best["item_rows"][b, len(wanted) :] == -1).all())
        first += len(x.candidates)


class Data(pl.LightningDataModule):
    """Ranking samples of users with raw ids; a user has two samples, and one sample is padding."""

    ranking_features = FEATURES
    users = [f"user {row}" for row in range(9)]
    item_ids = [f"item {row}" for row in range(40)]

    @override
    def predict_dataloader(self) -> Any:
        drawn = samples()
        again = drawn[0].of(list(drawn[3].candidates))
        batches = [float_batch([*drawn, again], ids=[8, 0, 3, 2, 17]), float_batch([Sample(0, 0)], [PADDING_SAMPLE_ID])]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def test_a_run_writes_the_best_of_each_request_with_raw_ids_and_times(tmp_path: Path) -> None:
    module, data = make_module(top_k=3, top_k_task="buy", micro_batch=4), Data()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[TopKWriter(output_dir=str(tmp_path), timestamps=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    frame = polars.read_parquet(tmp_path / "part-0.parquet")
    assert frame.columns == ["user_id", "timestamp", "item_ids", "scores"]
    batch = next(iter(data.predict_dataloader()))
    module.eval()
    with torch.inference_mode():
        best = module.predict_step(batch, 0)
    drawn = samples()
    assert frame["user_id"].to_list() == [f"user {x.user}" for x in (*drawn, drawn[0])]
    assert frame["timestamp"].to_list() == best["timestamps"].tolist()
    for b, (items, scores) in enumerate(zip(frame["item_ids"].to_list(), frame["scores"].to_list(), strict=True)):
        kept = best["item_rows"][b] >= 0
        assert items == [f"item {row}" for row in best["item_rows"][b][kept].tolist()]
        assert scores == best["scores"][b][kept].float().tolist()
    assert frame["item_ids"].list.len().to_list() == [3, 2, 0, 3, 3]


def test_times_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    module = make_module(top_k=3)
    original = module.predict_step
    module.predict_step = lambda *args: {k: v for k, v in original(*args).items() if k != "timestamps"}  # type: ignore[method-assign]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[TopKWriter(output_dir=str(tmp_path), timestamps=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ValueError, match="and timestamps \\(B,\\) for timestamps=True; missing: timestamps"):
        trainer.predict(module, datamodule=Data(), return_predictions=False)


def test_gates_mix_the_experts_that_they_weigh_most() -> None:
    torch.manual_seed(0)
    heads = MultiTaskHeads(dim=5, tasks=["a", "b"], num_experts=4, hidden_dim=3, top_k_experts=2).double()
    disturb(heads)
    x_ND = torch.randn(9, 5, dtype=torch.float64)
    logits = heads(x_ND)
    assert heads.gates is not None
    for number, task in enumerate(("a", "b")):
        for n, x in enumerate(x_ND):
            gates = heads.gates[number](x).tolist()
            chosen = sorted(range(4), key=lambda e: -gates[e])[:2]
            shares = torch.tensor([gates[e] for e in chosen], dtype=torch.float64).softmax(0)
            mixed = sum(share * heads.experts[e](x) for share, e in zip(shares, chosen, strict=True))
            torch.testing.assert_close(logits[task][n], heads.towers[number](mixed)[0], rtol=1e-10, atol=1e-12)
    everyone = MultiTaskHeads(dim=5, tasks=["a", "b"], num_experts=4, hidden_dim=3, top_k_experts=4).double()
    plain = MultiTaskHeads(dim=5, tasks=["a", "b"], num_experts=4, hidden_dim=3).double()
    everyone.load_state_dict(plain.state_dict())
    torch.testing.assert_close(everyone(x_ND)["b"], plain(x_ND)["b"])
    sum(logits.values()).sum().backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k=0: expected at least 1, or leave it out"),
        ({"micro_batch": -2}, "micro_batch=-2: expected at least 1, or leave it out"),
        ({"top_k_task": "buy"}, "top_k_task=buy: orders the best top_k; give top_k too"),
        ({"top_k": 2, "top_k_task": "bui"}, "top_k_task=bui: no such task; choose from click, buy"),
        ({"top_k_experts": 5}, "top_k_experts=5: expected 1 ... num_experts=4, or leave it out"),
        ({"top_k_experts": 1, "num_experts": 0}, "top_k_experts=1: expected 1 ... num_experts=0, or leave it out"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError)) as error:
        make_module(**changes)
    assert message in str(error.value)
