"""MetaRankingModule's evaluation: adaptation by hand for each number of shots, and copies that do not leak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.models import MetaRankingModule
from lightning_gr.models.forward_flops import ForwardFlops
from tests.models.episode_samples import (
    FEATURES,
    Episode,
    collate,
    draw_episodes,
    evaluation_batch,
    make_module,
    make_network,
    tables,
    train,
    training_batch,
)
from tests.models.maml import Net, adapted, label_losses, mean_loss, rows_of, step_sizes

SHOTS = [0, 1, 3]


def by_hand(module: MetaRankingModule, episode: Episode, shots: int, adapt: Any) -> dict[str, list[Tensor]]:
    """By task, the losses of an episode's query after adaptation to its first records."""
    net = Net(module)
    support = episode.support[:shots]
    dense, rows = adapted(
        lambda dense, rows: mean_loss(net, dense, rows, episode, [support]),
        {name: x.detach() for name, x in net.named_parameters()},
        rows_of(episode, {table: x.detach() for table, x in tables(module).items()}),
        steps=2 if shots else 0,
        second_order=False,
        sizes=step_sizes(net, adapt, 0.3, 0.7),
    )
    found: dict[str, list[Tensor]] = label_losses(net, dense, rows, episode, episode.query)
    return found


def area(scores: Sequence[float], labels: Sequence[float]) -> float | None:
    """The share of pairs in which the positive scores higher."""
    pairs = [
        (p > n) + 0.5 * (p == n)
        for p, x in zip(scores, labels, strict=True)
        for n, y in zip(scores, labels, strict=True)
        if x > y
    ]
    return sum(pairs) / len(pairs) if pairs else None


@pytest.mark.parametrize(
    ("kind", "adapt", "mode"),
    [
        ("none", "both", torch.inference_mode),
        ("sum", "embedding", torch.no_grad),
        ("mtgr", ["network.*", "tables.item_id"], torch.inference_mode),
    ],
)
def test_metrics_of_each_number_of_shots_are_those_of_adapting_by_hand(kind: str, adapt: Any, mode: Any) -> None:
    episodes = draw_episodes(4, seed=1, history=1, support=3, query=4)
    module = make_module(kind, adapt=adapt, inner_steps=2, shots=SHOTS).eval()
    with mode():
        batch = module.on_before_batch_transfer(evaluation_batch(episodes, [1, 3]), 0)
        module.validation_step(batch, 0)
    assert module.metrics is not None
    for shots in SHOTS:
        losses = [by_hand(module, x, shots, adapt) for x in episodes]
        for task in FEATURES.tasks:
            labels = [[dict(r.labels)[task] for r in x.query if task in dict(r.labels)] for x in episodes]
            # Of a label's cross entropy the logit is log(exp(loss) - 1), with the label's sign.
            scores = [
                [float(torch.log(torch.expm1(loss))) * (-1 if y else 1) for loss, y in zip(own[task], ys, strict=True)]
                for own, ys in zip(losses, labels, strict=True)
            ]
            metrics: Any = module.metrics["val"][f"{task}@{shots}"]  # type: ignore[index]
            flat = [x for own in losses for x in own[task]]
            assert float(metrics["loss"].compute()) == pytest.approx(float(torch.stack(flat).mean()), rel=1e-6)
            whole = area(sum(scores, []), sum(labels, []))
            assert float(metrics["AUC"].compute()) == pytest.approx(0.5 if whole is None else whole)
            by_user: dict[int, tuple[list[float], list[float]]] = {}
            for episode, s, y in zip(episodes, scores, labels, strict=True):
                own = by_user.setdefault(episode.user, ([], []))
                own[0].extend(s), own[1].extend(y)
            areas = [(area(*own), len(own[0])) for own in by_user.values()]
            weighed = [(a, n) for a, n in areas if a is not None]
            wanted = sum(a * n for a, n in weighed) / sum(n for _, n in weighed) if weighed else 0.5
            assert float(metrics["GAUC"].compute()) == pytest.approx(wanted)


def test_without_shots_it_is_the_plain_model() -> None:
    episodes = draw_episodes(3)
    module = make_module("sum").eval()
    batch = module.on_before_batch_transfer(evaluation_batch(episodes, [3]), 0)
    with torch.no_grad():
        found = module.adapted_logits(batch, shots=0)
        wanted = module(collate([(x, x.query) for x in episodes]))
        after = module.adapted_logits(batch, shots=3)
    for task in FEATURES.tasks:
        torch.testing.assert_close(found[task], wanted[task], rtol=0, atol=1e-12)
        assert not torch.allclose(after[task], wanted[task])


def state(module: MetaRankingModule) -> dict[str, Tensor]:
    held = {**dict(module.named_parameters()), **dict(module.network.named_buffers())}
    return {name: x.detach().clone() for name, x in held.items()}


@pytest.mark.parametrize("order", ["first", "second", "reptile"])
def test_what_a_step_adapts_is_forgotten_after_it(order: Any) -> None:
    episodes = draw_episodes(2)
    module = make_module(network=make_network("none", dropout=0.2), order=order, inner_steps=2)
    module.network.tokens.history.requires_grad_(False)  # type: ignore[union-attr]
    before, needs = state(module), [x.requires_grad for x in module.parameters()]
    identities = [id(x) for x in module.parameters()]
    train(module, training_batch(episodes))
    assert all(x.training for x in module.modules())
    module.eval()
    with torch.inference_mode():
        batch = module.on_before_batch_transfer(evaluation_batch(episodes, [3]), 0)
        module.test_step(batch, 0)
        module.predict_step(batch, 0)
    assert not any(x.training for x in module.modules())
    after = state(module)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert needs == [x.requires_grad for x in module.parameters()]
    assert identities == [id(x) for x in module.parameters()]
    assert not any(x.is_inference() for x in module.parameters())


def test_predict_adapts_to_the_largest_support_if_told_to() -> None:
    episodes = draw_episodes(3, query=4)
    found = {}
    for adapts in (False, True):
        module = make_module("none", adapt_in_predict=adapts, shots=[0, 1, 3]).eval()
        with torch.inference_mode():
            batch = module.on_before_batch_transfer(evaluation_batch(episodes, [1, 3]), 0)
            found[adapts] = module.predict_step(batch, 0)
            wanted = module.adapted_logits(batch, shots=3 if adapts else 0)
        assert found[adapts]["item_rows"].tolist() == [r.item for x in episodes for r in x.query]
        assert found[adapts]["user_rows"].tolist() == [x.user for x in episodes for _ in x.query]
        for task in FEATURES.tasks:
            torch.testing.assert_close(found[adapts]["probabilities"][task], wanted[task].sigmoid())
    assert not torch.allclose(found[False]["probabilities"]["click"], found[True]["probabilities"]["click"])


def test_adaptation_works_under_autocast_after_a_pass_without_it() -> None:
    """Casts that autocast kept of that pass would have no graph, and leave the inner loop without gradients."""
    episodes = draw_episodes(2)
    found = []
    for rounds in (False, True):
        module = make_module("none", exact=False, shots=SHOTS, inner_lr=2.0, inner_lr_rows=4.0).eval()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounds):
            batch = module.on_before_batch_transfer(evaluation_batch(episodes, [1, 3]), 0)
            found.append([module.adapted_logits(batch, shots=k)["click"].float() for k in SHOTS])
    (plain, *exact), (_, *rounded) = found
    for one, other in zip(exact, rounded, strict=True):
        assert (one - other).abs().max() < 0.2 * (one - plain).abs().max()


def test_a_rank_without_an_episode_still_counts_every_metric() -> None:
    from lightning_gr.batch_samples import padding_like

    module = make_module("none", shots=SHOTS).eval()
    logged: list[str] = []
    module.log = lambda name, *_, **__: logged.append(name)  # type: ignore[method-assign, assignment]
    batch = padding_like(evaluation_batch(draw_episodes(1), [1, 3]))
    with torch.inference_mode():
        made = module.on_before_batch_transfer(batch, 0)
        module.validation_step(made, 0)
        module.predict_step(made, 0)
    assert {f"val/{task}/AUC@{k}" for task in FEATURES.tasks for k in SHOTS} <= set(logged)


@pytest.mark.parametrize(("order", "passes"), [("first", 2), ("reptile", 4)])
def test_operations_are_counted_for_every_pass(order: Any, passes: int) -> None:
    episodes = draw_episodes(2)
    module = make_module("sum", order=order, inner_steps=2)
    batch = training_batch(episodes)
    found = module.flops(module.on_before_batch_transfer(batch, 0))
    parts = [collate([(x, x.support) for x in episodes]), collate([(x, x.query) for x in episodes])]
    support, query = (super(MetaRankingModule, module).flops(x) for x in parts)
    assert isinstance(found, ForwardFlops)
    assert support is not None
    assert query is not None
    assert int(found.forward) == 2 * int(support.forward) + (passes - 1) * int(query.forward)


def test_a_batch_with_other_shots_than_the_model_is_named() -> None:
    module = make_module("none", shots=[0, 1, 3], adapt_in_predict=True).eval()
    batch = module.on_before_batch_transfer(evaluation_batch(draw_episodes(2), [3]), 0)
    with pytest.raises(Exception, match=r"shots=1: the batches have supports of \[3\]"):
        module.validation_step(batch, 0)
    alone = replace(collate([(x, x.query) for x in draw_episodes(2)]), shots_B=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(Exception, match="adapt_in_predict=True: the batches have no supports"):
        module.predict_step(module.on_before_batch_transfer(alone, 0), 0)
