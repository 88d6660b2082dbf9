"""MetaRankingModule: its gradients against a MAML in plain loops, and what it shares between support and query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gr.episode_batch import episode_batch
from lightning_gr.models import MetaRankingModule, RankingModule
from tests.models.episode_samples import (
    DIVISOR,
    FEATURES,
    TABLE_OF,
    Episode,
    ExactTables,
    Record,
    collate,
    draw_episodes,
    draw_record,
    label_counts,
    make_module,
    make_network,
    tables,
    train,
    training_batch,
)
from tests.models.maml import Net, adapted, mean_loss, meta_gradients, rows_of, step_sizes

LR, LR_ROWS = 0.3, 0.7


def gradients_of(module: MetaRankingModule) -> dict[str, Tensor]:
    """By name as in `meta_gradients`."""
    found = {name: x.grad for name, x in Net(module).named_parameters()}
    found |= {f"tables.{table}": x.grad for table, x in tables(module).items()}
    found |= {f"sizes.{name.replace(':', '.')}": x.grad for name, x in module.step_sizes.items()}
    assert all(x is not None for x in found.values())
    return found  # type: ignore[return-value]


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=tolerance, msg=lambda x, n=name: n + x)


PATTERNS = ["heads.*", "tables.item_id"]
QUICK: list[Any] = [
    ("none", "first", 1, "dense", True),
    ("none", "first", 3, "both", False),
    ("none", "second", 1, "embedding", True),
    ("none", "second", 3, PATTERNS, True),
    ("sum", "first", 3, "embedding", False),
    ("sum", "second", 1, "both", False),
    ("target_attention", "second", 1, "both", True),
    ("mtgr", "first", 3, "both", True),
    ("mtgr", "second", 1, "both", False),
]
CASES: list[Any] = [
    (kind, order, steps, adapt, learned)
    for kind in ("none", "sum", "target_attention", "mtgr")
    for order in ("first", "second")
    for steps in (1, 3)
    for adapt in ("dense", "embedding", "both", PATTERNS)
    for learned in (False, True)
]


@pytest.mark.parametrize(
    ("kind", "order", "steps", "adapt", "learned"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.long) for case in CASES],
)
def test_gradients_are_those_of_a_maml_in_plain_loops(
    kind: str, order: Any, steps: int, adapt: Any, learned: bool
) -> None:
    episodes = draw_episodes(3, history=2 if kind != "none" else 0, support=2, query=2)
    module = make_module(kind, order=order, inner_steps=steps, adapt=adapt, learn_step_sizes=learned)
    loss = train(module, training_batch(episodes))
    sizes = step_sizes(Net(module), adapt, LR, LR_ROWS)
    if learned:  # parameters begin in float32
        sizes = {name: x.float().double() for name, x in sizes.items()}
    weights = {table: x.detach() for table, x in tables(module).items()}
    wanted_loss, wanted = meta_gradients(
        module, weights, episodes, steps=steps, second_order=order == "second", sizes=sizes
    )
    if not learned:
        wanted = {name: x for name, x in wanted.items() if not name.startswith("sizes.")}
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    assert_equal(gradients_of(module), wanted)


def test_second_order_gradients_are_finite_differences() -> None:
    module = make_module("none", order="second", inner_steps=2, learn_step_sizes=True, num_experts=0)
    batch = training_batch(draw_episodes(1, history=0))
    train(module, batch)
    parameters = list(module.parameters())
    gradients = [x.grad.clone() for x in parameters if x.grad is not None]
    assert len(gradients) == len(parameters)
    generator = torch.Generator().manual_seed(1)
    names = [name.partition(".")[0] for name, _ in module.named_parameters()]
    for kind in ("network", "heads", "tables", "step_sizes"):
        group = [i for i, name in enumerate(names) if name == kind]
        ways = [torch.randn(parameters[i].shape, generator=generator, dtype=torch.float64) for i in group]
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                for i, way in zip(group, ways, strict=True):
                    parameters[i].add_(way, alpha=step)
            losses.append(train(module, batch))
        with torch.no_grad():
            for i, way in zip(group, ways, strict=True):
                parameters[i].add_(way, alpha=1e-5)
        wanted = (losses[0] - losses[1]) / 2e-5
        found = sum(float((gradients[i] * way).sum()) for i, way in zip(group, ways, strict=True))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def record(item: int, bought_with: int, click: float) -> Record:
    return Record(item, bought_with, (3,), 0.5, 0, (("click", click), ("buy", 1.0 - click)))


def test_the_query_sees_rows_as_its_own_support_left_them() -> None:
    """Item 5 is in support and query, 6 in the query alone, 7 in the other episode's support alone."""
    first = Episode(4, (5,), (), (record(5, 1, 1.0),), (record(5, 6, 0.0), record(6, 2, 1.0), record(7, 5, 1.0)))
    second = Episode(4, (5,), (), (record(5, 7, 0.0),), (record(5, 7, 0.0), record(1, 6, 1.0)))
    module = make_module("none", adapt="embedding", inner_steps=2)
    seen: list[dict[str, Tensor]] = []
    module.network.register_forward_pre_hook(
        lambda _, inputs: seen.append({k: x.detach() for k, x in inputs[0].items()})
    )
    train(module, training_batch([first, second], shots=1))
    *supports, query = seen
    assert len(supports) == 2  # steps on both supports together
    net, weights = Net(module), {table: x.detach() for table, x in tables(module).items()}
    dense = {name: x.detach() for name, x in net.named_parameters()}
    sizes = step_sizes(net, "embedding", LR, LR_ROWS)
    wanted = []
    for episode in (first, second):
        _, rows = adapted(
            lambda dense, rows, x=episode: mean_loss(net, dense, rows, x, [x.support]),  # type: ignore[misc]
            dense,
            rows_of(episode, weights),
            steps=2,
            second_order=False,
            sizes=sizes,
        )
        wanted.append(rows)
    for feature, table in TABLE_OF.items():
        rows = [wanted[n][table, i] for n, x in enumerate((first, second)) for i in x.ids(feature, x.query)]
        torch.testing.assert_close(query[feature], torch.stack(rows), rtol=0, atol=1e-12)
    items = weights["item_id"]
    assert not torch.allclose(wanted[0]["item_id", 5], items[5])
    assert not torch.allclose(wanted[0]["item_id", 5], wanted[1]["item_id", 5])
    for alone in (2, 6, 7):
        assert torch.equal(wanted[0]["item_id", alone], items[alone])
    assert not torch.allclose(wanted[0]["city", 5], weights["city"][5])
    assert torch.equal(tables(module)["item_id"], items)


def joint_gradients(module: MetaRankingModule, kind: str, episodes: list[Episode]) -> dict[str, Tensor]:
    """Those of a `RankingModule` with the same parameters on the queries alone."""
    joint = RankingModule(
        network=make_network(kind),
        features=FEATURES,
        embedding_dim=4,
        task_weights={"buy": 0.5},
        num_experts=2,
        head_dim=3,
        backend="reference",
    )
    joint.setup("fit")
    joint.configure_model()
    joint.tables = ExactTables(joint.tables)  # type: ignore[assignment, arg-type]
    joint.double()
    state = {name: x for name, x in module.state_dict().items() if not name.startswith(("step_sizes", "metrics"))}
    assert not joint.load_state_dict(state, strict=False).unexpected_keys
    joint.log = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    batch = collate([(x, x.query) for x in episodes], denominators=label_counts(episodes))
    joint.training_step(batch, 0).backward()
    found = {name: x.grad for name, x in Net(joint).named_parameters()}
    found |= {f"tables.{table}": x.grad for table, x in tables(joint).items()}  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["first", "second"])
def test_without_adaptation_it_is_joint_training_on_the_queries(order: Any) -> None:
    episodes = draw_episodes(3)
    for changes in ({"inner_steps": 0}, {"inner_steps": 2, "learn_step_sizes": True}):
        module = make_module("sum", order=order, **changes)
        with torch.no_grad():
            for size in module.step_sizes.values():
                size.zero_()
        train(module, training_batch(episodes))
        found = {name: x for name, x in gradients_of(module).items() if not name.startswith("sizes.")}
        # A step of size 0 still multiplies by the Hessian's zero.
        assert_equal(found, joint_gradients(module, "sum", episodes))


def test_reptile_goes_where_descent_on_all_records_leads() -> None:
    episodes = draw_episodes(3)
    module = make_module("none", order="reptile", inner_steps=3)
    train(module, training_batch(episodes))
    net, counts = Net(module), label_counts(episodes)
    weights = {table: x.detach() for table, x in tables(module).items()}
    dense = {name: x.detach() for name, x in net.named_parameters()}
    wanted = {name: torch.zeros_like(x) for name, x in dense.items()}
    wanted |= {f"tables.{table}": torch.zeros_like(x) for table, x in weights.items()}
    shares = []
    for episode in episodes:
        rows = rows_of(episode, weights)
        new_dense, new_rows = adapted(
            lambda dense, rows, x=episode: mean_loss(net, dense, rows, x, [x.support, x.query]),  # type: ignore[misc]
            dense,
            rows,
            steps=3,
            second_order=False,
            sizes=step_sizes(net, "both", LR, LR_ROWS),
        )
        own = {task: sum(task in dict(x.labels) for x in episode.query) for task in counts}
        shares.append(sum(own[task] / counts[task] for task in counts) / len(counts))
        for name, x in dense.items():
            wanted[name] += (x - new_dense[name]) / LR * shares[-1] * DIVISOR
        for (table, i), x in rows.items():
            wanted[f"tables.{table}"][i] += (x - new_rows[table, i]) / LR_ROWS * shares[-1] * DIVISOR
    assert sum(shares) == pytest.approx(1.0)
    assert_equal(gradients_of(module), wanted)


@pytest.mark.parametrize("order", ["first", "second"])
def test_activations_computed_again_are_those_of_the_adapted_copies(order: Any) -> None:
    batch = training_batch(draw_episodes(2))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = make_network("mtgr", recompute=recompute, num_layers=1)
        module = make_module(network=network, order=order, inner_steps=2)
        train(module, batch)
        found.append(gradients_of(module))
    assert_equal(*found)


def test_episodes_adapted_together_are_as_episodes_adapted_alone() -> None:
    batch = training_batch(draw_episodes(4))
    module = make_module("sum", adapt="embedding", order="second", inner_steps=2)
    together = train(module, batch), gradients_of(module)
    module.zero_grad()
    apart = episode_batch(batch, module._tables(), apart=True)
    assert len(apart.groups[3]) == 4
    loss = module.training_step(apart, 0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(together[0], rel=1e-12)
    assert_equal(gradients_of(module), together[1])


def test_tables_of_torchrec_get_the_same_gradients() -> None:
    """In float32, which is all that they give."""
    found = []
    for exact in (True, False):
        module = make_module("sum", exact=exact, order="second", inner_steps=2)
        train(module, training_batch(draw_episodes(3)))
        found.append({name: x.double() for name, x in gradients_of(module).items()})
    assert_equal(*found, tolerance=1e-4)


def test_a_frozen_parameter_is_neither_adapted_nor_trained() -> None:
    module = make_module("none", inner_steps=2, learn_step_sizes=True)
    module.network.requires_grad_(False)
    batch = training_batch(draw_episodes(2))
    train(module, batch)
    assert all(x.grad is None for x in module.network.parameters())
    found = {name: x.grad for name, x in module.heads.named_parameters()}  # type: ignore[union-attr]
    other = make_module("none", inner_steps=2, learn_step_sizes=True, adapt=["heads.*", "tables.*"])
    train(other, batch)
    assert_equal(found, {name: x.grad for name, x in other.heads.named_parameters()})  # type: ignore[union-attr, arg-type]
    frozen = make_module("none", adapt=["network.*"])
    frozen.network.requires_grad_(False)
    train(frozen, batch)
    assert_equal(
        {name: x.grad for name, x in frozen.heads.named_parameters()},  # type: ignore[union-attr, misc]
        {
            name.removeprefix("heads."): x
            for name, x in joint_gradients(frozen, "none", draw_episodes(2)).items()
            if "heads" in name
        },
    )


def test_a_rank_without_an_episode_gets_gradients_of_zero() -> None:
    from lightning_gr.batch_samples import padding_like

    module = make_module("none", learn_step_sizes=True)
    loss = train(module, padding_like(training_batch(draw_episodes(1))))
    assert loss == 0
    assert all(x.grad is not None and not x.grad.any() for x in module.parameters())


def test_dropout_is_drawn_anew_in_each_pass() -> None:
    batch = training_batch(draw_episodes(2))
    module = make_module(network=make_network("none", dropout=0.5), inner_steps=2)
    losses = {train(module, batch) for _ in range(4)}
    assert len(losses) == 4
    module.eval()
    assert len({train(module, batch) for _ in range(2)}) == 1


def test_labels_weigh_what_they_are_given() -> None:
    """A label of weight 0 is as one that is not there, for every rule."""
    rng = np.random.default_rng(2)
    episodes = draw_episodes(2)
    extra = [draw_record(rng, 9) for _ in episodes]
    longer = [
        Episode(x.user, x.city, x.history, (*x.support, y), (*x.query, y)) for x, y in zip(episodes, extra, strict=True)
    ]
    for order in ("first", "reptile"):
        found = []
        for own in (episodes, longer):
            batch = training_batch(own)
            batch.denominators = label_counts(episodes)
            for labels in batch.labels.values():
                assert batch.timestamps_T is not None
                labels.weights_N = (batch.timestamps_T[labels.tokens_N] != 9).float()
            module = make_module("none", order=order)
            loss = train(module, batch)
            found.append(gradients_of(module))
            found[-1]["loss"] = torch.tensor(loss)
        shown = [name for name in found[0] if "item_id" not in name and "tags" not in name]
        assert_equal({name: found[0][name] for name in shown}, {name: found[1][name] for name in shown})
