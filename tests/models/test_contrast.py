"""Contrast: settings of negatives that do not go together, or do not fit the items or the machine, are named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gr.models import RetrievalModule
from lightning_gr.negatives import InBatchNegatives, Offload, PopularityNegatives, UniformNegatives

ITEMS = 13


class Encoder(nn.Module):
    """Has a width and runs nothing."""

    dim, max_length = 6, 100


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"negatives": "popular"}, "negatives='popular': expected uniform or in_batch, or a class of"),
    ({"negatives": InBatchNegatives(scope="rank"), "loss": "full_softmax"}, "negatives=InBatchNegatives: the full"),
    ({"negatives": "in_batch", "loss": "full_softmax"}, "negatives=in_batch: the full softmax has every item"),
    (
        {"negatives": UniformNegatives(log_q=True), "loss": "bce"},
        "negatives=UniformNegatives: log_q corrects a softmax",
    ),
    ({"negatives_dtype": "float64"}, "negatives_dtype='float64': expected one of float32, float16, bfloat16"),
    ({"logit_sharing": 0}, "logit_sharing=0: expected at least 1"),
    (
        {"logit_sharing": 2, "logit_sharing_reuse": "rows"},
        "logit_sharing_reuse='rows': expected one of negatives, logits",
    ),
    ({"logit_sharing": 2, "negatives": "in_batch"}, "logit_sharing=2: is about negatives that are drawn"),
    ({"negatives_dtype": "float16", "loss": "full_softmax"}, "negatives_dtype=float16: is about negatives that are"),
    ({"negatives_offload": Offload(), "loss": "full_softmax"}, "negatives_offload: is about negatives that are drawn"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match="^" + message):
        RetrievalModule(encoder=Encoder(), **({"loss": "sampled_softmax"} | changes))


def started(datamodule: Any = None, *, accumulate: int = 1, ranks_of_host: int = 2, **changes: Any) -> RetrievalModule:
    module = RetrievalModule(
        encoder=Encoder(), **({"loss": "sampled_softmax", "num_items": ITEMS, "top_k": [1]} | changes)
    )
    trainer = SimpleNamespace(
        datamodule=datamodule,
        enable_validation=False,
        world_size=2,
        num_devices=ranks_of_host,
        accumulate_grad_batches=accumulate,
        strategy=SimpleNamespace(broadcast=lambda seed: seed + 1),  # of a rank with another seed than this one's
    )
    module.trainer = trainer  # type: ignore[assignment]
    module.setup("fit")
    module.on_fit_start()
    return module


def test_what_does_not_fit_the_items_is_refused_at_start() -> None:
    counts = SimpleNamespace(num_items=ITEMS, training_item_counts=lambda: torch.ones(ITEMS + 1))
    for changes, message in (
        ({"num_negatives": ITEMS + 1}, f"num_negatives={ITEMS + 1}: the corpus has only num_items={ITEMS}"),
        (
            {"negatives": PopularityNegatives(num_negatives=2)},
            "PopularityNegatives: nothing counts how often items occur",
        ),
        (
            {"negatives": PopularityNegatives(num_negatives=2), "datamodule": counts},
            r"the counts of the training part cover 14 item\(s\), the corpus has num_items=13",
        ),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            started(**changes)
    started(num_negatives=ITEMS + 1, loss="full_softmax")


def test_offload_without_host_memory_for_it_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(num_items=1000, global_tokens=20)
    asked = {"datamodule": data, "num_items": 5000, "num_negatives": 100, "negatives_offload": Offload(segment=1)}
    monkeypatch.setattr("lightning_gr.negatives.offload.available_host_memory", lambda: 10_000)
    with pytest.raises(
        MisconfigurationException, match=r"^negatives_offload: 1,010 rows of 6 .* 10,000 are left"
    ) as error:
        started(**asked)
    assert "in each of 2 processes of this host, need 58,176 bytes" in str(error.value)  # 2 x (1,010 + 2 x 101) x 24
    data.max_length = 7
    # A rank that has a host of its own may exceed its half by a sequence.
    with pytest.raises(MisconfigurationException, match=r"^negatives_offload: 1,717 rows of 6 .* need 46,056 bytes"):
        started(**asked, ranks_of_host=1)
    monkeypatch.setattr("lightning_gr.negatives.offload.available_host_memory", lambda: 1_000_000)
    started(**asked)


def test_the_first_ranks_seed_is_everybodys() -> None:
    torch.manual_seed(3)
    assert started(num_negatives=3).contrast.seed == 4


@pytest.mark.parametrize("changes", [{"negatives": "in_batch"}, {"logit_sharing": 2, "num_negatives": 3}])
def test_negatives_of_a_part_of_a_step_are_said(changes: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="labels are contrasted within each of the batches that make a step"):
        started(accumulate=2, **changes)


def test_settings_that_are_not_honoured_are_said() -> None:
    with pytest.warns(UserWarning, match="num_negatives=7: not honoured, since negatives=in_batch"):
        RetrievalModule(encoder=Encoder(), loss="sampled_softmax", negatives="in_batch", num_negatives=7)
    with pytest.warns(
        UserWarning, match="num_negatives=7: not honoured, since negatives=UniformNegatives says how many"
    ):
        RetrievalModule(encoder=Encoder(), loss="sampled_softmax", negatives=UniformNegatives(), num_negatives=7)
    with pytest.warns(UserWarning, match="logit_sharing_reuse=logits: not honoured, since logit_sharing=1"):
        RetrievalModule(encoder=Encoder(), loss="sampled_softmax", logit_sharing_reuse="logits")
