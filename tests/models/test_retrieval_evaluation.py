"""Evaluation that can be trusted: in training = afterwards = from predictions, on 3 ranks = on 1, chance = chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

NUM_ITEMS = 40


def write_log(path: Path) -> Path:
    rng = np.random.default_rng(3)
    lines = ["user_id,item_id,timestamp"]
    for user in range(50):
        items = (rng.integers(NUM_ITEMS) + np.arange(int(rng.integers(4, 15)))) % NUM_ITEMS
        lines += [f"u{user},{item},{1000 + step}" for step, item in enumerate(items)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_log(tmp_path_factory.mktemp("log") / "log.csv"))


def run(world_size: int, log: str, constant: bool = False, **settings: Any) -> dict[str, Any]:
    from lightning_gr.data import SequenceDataModule
    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule
    from lightning_gr.plugins import SequenceBalancedStrategy

    pl.seed_everything(5)
    data = SequenceDataModule(path=log, global_tokens=64, max_length=20, predict_from="test")
    module = RetrievalModule(
        encoder=HSTUEncoder(dim=8, num_layers=1, num_heads=1, max_length=20, dropout=0.0),
        top_k=[5],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.02),
        embedding_std=0.0 if constant else 0.02,
        **settings,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=SequenceBalancedStrategy(sparse_lr=0.1),
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    found: dict[str, Any] = {}
    if not constant:
        trainer.fit(module, datamodule=data)
        found["during"] = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        (found["after"],) = trainer.validate(module, datamodule=data, verbose=False)
    (found["test"],) = trainer.test(module, datamodule=data, verbose=False)
    predicted = trainer.predict(module, datamodule=data)
    assert predicted is not None
    found["top"] = {
        user: items
        for part in predicted
        for user, items in zip(part["sample_ids"].tolist(), part["item_rows"].tolist(), strict=True)
    }
    rows = {item: row for row, item in enumerate(data.item_ids)}
    events: dict[str, list[int]] = {}
    for line in Path(log).read_text().splitlines()[1:]:
        user, item, _ = line.split(",")
        events.setdefault(user, []).append(rows[int(item)])
    found["events"] = {number: events[user] for number, user in enumerate(data.users)}
    return found


@pytest.mark.dist
@pytest.mark.parametrize("settings", [{}, {"remove_seen": True}, {"corpus": [str(i) for i in range(0, NUM_ITEMS, 2)]}])
def test_evaluation_agrees_with_itself_and_with_any_number_of_ranks(
    gloo: Any, log: str, settings: dict[str, Any]
) -> None:
    (one,) = gloo(1).run(run, 1, log, **settings)
    many = gloo(3).run(run, 3, log, **settings)
    assert one["after"] == pytest.approx(one["during"], rel=1e-6)
    for rank in many:
        assert rank["after"] == pytest.approx(rank["during"], rel=1e-6)
        assert rank["test"] == pytest.approx(one["test"], rel=1e-4)
    for found in ([one], many):
        top = {user: items for rank in found for user, items in rank["top"].items()}
        assert len(top) == 50
        hits = gains = 0.0
        for user, items in top.items():
            *history, target = one["events"][user]
            if "remove_seen" in settings:
                assert not set(items) & set(history)
            if "corpus" in settings:
                assert all(item % 2 == 0 for item in items if item >= 0)
            if target in items:
                hits += 1
                gains += 1 / np.log2(items.index(target) + 2)
        assert hits / 50 == pytest.approx(found[0]["test"]["test/HR@5"])
        assert gains / 50 == pytest.approx(found[0]["test"]["test/NDCG@5"])
    if not settings:
        assert one["test"]["test/HR@5"] > 0.5


@pytest.mark.dist
def test_a_constant_scorer_gains_nothing(gloo: Any, log: str) -> None:
    """All items tie, and ties count against the model: the chance level of a full ranking is the last place."""
    for world_size in (1, 3):
        for found in gloo(world_size).run(run, world_size, log, constant=True):
            assert found["test"]["test/HR@5"] == found["test"]["test/NDCG@5"] == 0.0
            assert found["test"]["test/MRR"] == pytest.approx(1 / NUM_ITEMS)
            assert found["test"]["test/loss"] == pytest.approx(np.log(NUM_ITEMS), rel=1e-5)


def test_a_corpus_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lightning_gr.layers import HSTUEncoder
    from lightning_gr.models import RetrievalModule

    def setup(corpus: Any, top_k: int = 2) -> RetrievalModule:
        module = RetrievalModule(encoder=HSTUEncoder(dim=4), corpus=corpus, top_k=[top_k])
        module.trainer = SimpleNamespace(datamodule=SimpleNamespace(num_items=3, item_ids=[10, 20, 30]))  # type: ignore[assignment]
        module.setup("fit")
        return module

    file = tmp_path / "corpus.txt"
    file.write_text("30\n\n10\n10\n")
    for corpus in ([30, "10"], str(file)):
        rows = setup(corpus)._corpus.ranked_C
        assert rows is not None
        assert rows.tolist() == [0, 2]
    with pytest.raises(FileNotFoundError, match="no such file; give one with an item id a line"):
        setup(str(tmp_path / "absent.txt"))
    for corpus, message in (([], "corpus: names no item"), ([10, 11], r"corpus: 1 item\(s\) are not in the data, 11")):
        with pytest.raises(MisconfigurationException, match=message):
            setup(corpus)
    with pytest.raises(MisconfigurationException, match=r"top_k=\[3\]: the corpus has only 2 items"):
        setup([10, 20], top_k=3)
