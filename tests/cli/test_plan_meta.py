"""`lightning-gr plan` of an inner loop: operations and kept bytes against those of training steps as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_gr.cli import main
from lightning_gr.cli.plan_network import kept_bytes, step_flops
from lightning_gr.models import MetaRankingModule
from tests.models.episode_samples import draw_episodes, make_module, training_batch
from tests.more import more


def made(order: Any, steps: int, adapt: Any = "both") -> tuple[MetaRankingModule, Any]:
    module = make_module("sum", order=order, inner_steps=steps, adapt=adapt, embedding_dim=16, head_dim=32)
    return module, module.on_before_batch_transfer(training_batch(draw_episodes(3, seed=2)), 0)


@pytest.mark.parametrize(("order", "steps"), [("first", 3), ("second", 3), ("reptile", 2), *more(("second", 1))])
def test_operations_are_those_of_a_training_step(order: Any, steps: int) -> None:
    module, batch = made(order, steps)
    with FlopCounterMode(display=False) as counted:
        module.training_step(batch, 0)
    found = step_flops(module, batch)
    assert found is not None
    assert sum(found) * batch.num_tokens == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_where_only_rows_are_adapted_operations_are_a_bound() -> None:
    """The steps themselves need no gradient of a weight."""
    module, batch = made("second", 2, adapt="embedding")
    with FlopCounterMode(display=False) as counted:
        module.training_step(batch, 0)
    found = step_flops(module, batch)
    assert found is not None
    assert 1 < sum(found) * batch.num_tokens / counted.get_total_flops() < 1.5


def saved(module: MetaRankingModule, batch: Any) -> int:
    """Bytes of all storages that a training step saves, each held to its end, so that none has another's place."""
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *module.buffers()]}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module.training_step(batch, 0)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    return sum(size for place, size in storages.items() if place not in own)


def kept(order: Any, steps: int) -> tuple[int, int]:
    """What plan says of one episode, and what a step of it saves in all."""
    module = make_module("sum", exact=False, order=order, inner_steps=steps, embedding_dim=16, head_dim=32)
    batch = module.on_before_batch_transfer(training_batch(draw_episodes(1, seed=2)), 0)
    assert module.features is not None
    dims = {name: module.features.dim_of(name, 16) for shape in module.features.shapes(16) for name in shape.features}
    return kept_bytes(module, batch, dims), saved(module, batch)


def test_a_second_order_step_keeps_all_its_passes_and_one_of_first_order_the_largest() -> None:
    """With `second` nothing goes before the end; with `first` a pass has gone when the next is made."""
    for steps in (1, 3):
        found, all_ = kept("second", steps)
        assert found == pytest.approx(all_, rel=0.02)
    (one, all_of_one), (three, all_of_three) = kept("first", 1), kept("first", 3)
    assert one == pytest.approx(three, rel=0.3)  # of the second step on, dense values are copies too
    assert all_of_one / 2 < one < all_of_one
    assert three < 0.5 * all_of_three


def test_inner_steps_and_order_show_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_gr.data import write_synthetic_log
    from lightning_gr.data.formats import Columns, open_log
    from lightning_gr.data.prepare import prepare

    monkeypatch.chdir(tmp_path)
    log = tmp_path / "events.csv"
    write_synthetic_log(log, num_users=60, num_items=30, mean_length=30, max_length=40, seed=0)
    prepare(open_log(log, columns=Columns(labels=("click",))), tmp_path / "store")

    def row(*words: str) -> dict[str, Any]:
        base = ["plan", "--config", "gmeta/tiny", "--data.init_args.path=store", "--data.init_args.features=null"]
        settings = [f"--model.init_args.{x}" for x in ("adapt=both", *words)]
        assert main([*base, *settings, "--ranks", "1", "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["ranks"][0]
        return found

    one, three = (row(f"inner_steps={steps}", "order=first") for steps in (1, 3))
    second = row("inner_steps=3", "order=second")
    support = (three["forward_flops"] - one["forward_flops"]) / 2
    query = one["forward_flops"] - support
    assert support > 0
    assert query > 0
    assert [x["backward_flops"] for x in (one, three)] == [2 * x["forward_flops"] for x in (one, three)]
    assert second["forward_flops"] == three["forward_flops"]
    assert second["backward_flops"] == pytest.approx(8 * 3 * support + 2 * query)
    assert second["memory"]["activations"] > 2 * three["memory"]["activations"]
