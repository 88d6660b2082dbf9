"""Laws of DynamicEngine on one process: settings that change no number, steps, gradients, prefetch, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gr.embeddings.dynamic import (
    Admission,
    DynamicEmbeddingCollection,
    DynamicEngine,
    DynamicTableConfig,
    DynamicTables,
    Eviction,
    SparseOptimizerConfig,
    TablePolicy,
)

FEATURES = ["k", "f", "g", "h"]
ANY_ID = torch.tensor([0, -1, 2**63 - 1, -(2**63), *range(1, 400)])
SMALL_ID = torch.arange(400)
BUSY = TablePolicy(
    admission=Admission(min_count=2),
    max_rows=130,
    rows_per_group=64,
    ttl_steps=9,
    on_missing="bucket",
    eviction=Eviction("lfu_lru"),
)
CALM = TablePolicy()


def collection(
    policy: TablePolicy = BUSY, *, optimizer: str = "adam", pool_policy: TablePolicy = CALM, **settings: Any
) -> DynamicEmbeddingCollection:
    """`item` and `shop` are of one width and share feature g, `tag` is apart."""
    settings = {"optimizer": SparseOptimizerConfig(optimizer, lr=0.1)} | settings  # type: ignore[arg-type]
    of_rows = {x: y for x, y in settings.items() if x in ("precision", "hot_count", "placement", "cache_rows")}
    torch.manual_seed(5)
    made = DynamicEmbeddingCollection(
        tables=[
            DynamicTableConfig("item", 8, ["f", "g"], policy=policy, **of_rows),
            DynamicTableConfig("tag", 3, ["k"], policy=pool_policy, **of_rows),
            DynamicTableConfig("shop", 8, ["h", "g"], policy=policy, **of_rows),
        ],
        settings=DynamicTables(**settings),
    )
    assert made.engine.seed == 5
    return made


def batches(num: int, *, seed: int = 1, pool: Tensor = ANY_ID, size: int = 6) -> list[Any]:
    """Jagged features of `size` samples; some ids are frequent."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(num):
        lengths = torch.randint(0, 5, (len(FEATURES) * size,), generator=generator)
        places = torch.rand(int(lengths.sum()), generator=generator).pow(2) * len(pool)
        made.append(jagged(pool[places.long()], lengths))
    return made


def jagged(values: Tensor, lengths: Tensor) -> Any:
    from torchrec import KeyedJaggedTensor

    return KeyedJaggedTensor(keys=FEATURES, values=values, lengths=lengths)


def part(features: Any, start: int, stop: int) -> Any:
    """Some samples of a batch."""
    rows = [x.values().split(x.lengths().tolist())[start:stop] for x in features.to_dict().values()]
    lengths = [x.lengths()[start:stop] for x in features.to_dict().values()]
    return jagged(
        torch.cat([x for row in rows for x in row] or [torch.zeros(0, dtype=torch.int64)]), torch.cat(lengths)
    )


def loss_of(output: dict[str, Any]) -> Tensor:
    return sum(((i + 1) * (x.values() - 0.1).square()).sum() for i, x in enumerate(output.values()))  # type: ignore


def train(made: DynamicEmbeddingCollection, features: list[Any]) -> list[list[float]]:
    """The outputs of every step."""
    outputs = []
    for i, batch in enumerate(features):
        made.engine.observe_time(10 * i)
        output = made(batch)
        outputs.append(torch.cat([x.values().detach().flatten() for x in output.values()]).tolist())
        loss_of(output).backward()
        made.engine.step()
    return outputs


def contents(engine: DynamicEngine, *, missing: bool = True) -> dict[str, Any]:
    """All that an engine keeps, by logical table."""
    made: dict[str, Any] = {"clocks": (engine.next_step, engine.time)}
    for table in engine.tables:
        for t, name in enumerate(table.key_names):
            rows, _ = table.rows_of(t)
            columns = (rows.values_ND, rows.state_NS, *rows.metadata[:3])
            made[name] = {x: row for x, *row in zip(rows.ids_N.tolist(), *(x.tolist() for x in columns), strict=True)}
        for t, name in enumerate(table.names):
            counted = table.counter_state(t)
            made[f"{name} waits"] = counted and {k: x.tolist() for k, x in counted[0].items()}
            made[f"{name} statistics"] = vars(table.statistics[t]) | ({} if missing else {"missing": 0})
    return made


def assert_close(a: Any, b: Any) -> None:
    """Equal keys, integers and shapes; floats to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    else:
        assert math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) if isinstance(a, float) else a == b, (a, b)


def assert_equal(a: Any, b: Any) -> None:
    assert a == b


# ---- settings that change no number --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        BUSY,
        CALM,
        TablePolicy(
            max_bytes=20_000, rows_per_group=64, eviction=Eviction("decayed"), ttl_seconds=60, on_missing="default_row"
        ),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"merge": False},
        {"id_encoding": "bits"},
        {"id_encoding": "bits", "merge": False},
        {"dedup": "none"},
        {"dedup": "before_exchange"},
        {"dedup": "before_lookup", "merge": False},
    ],
    ids=str,
)
def test_merging_encoding_and_deduplication_change_no_number(policy: TablePolicy, settings: dict[str, Any]) -> None:
    features = batches(12, pool=SMALL_ID)
    plain, other = collection(policy), collection(policy, **settings)
    assert len(plain.engine.tables) == 2
    assert len(other.engine.tables) == (3 if "merge" in settings else 2)
    # Of keys that share a row, the order of the sum differs.
    compare = assert_close if policy is BUSY and settings.get("dedup") == "none" else assert_equal
    compare(train(plain, features), train(other, features))
    a, b = contents(plain.engine), contents(other.engine)
    if settings.get("dedup") == "none":  # those are of what arrives
        for name in ("item", "shop", "tag"):
            for of in (a, b):
                del of[f"{name} statistics"]
    compare(a, b)


def test_a_neighbours_scores_take_no_bytes_of_a_budget() -> None:
    def rows(merge: bool) -> list[int]:
        policies = [TablePolicy(max_bytes=20_000, rows_per_group=64), TablePolicy(eviction=Eviction("score"))]
        configs = [DynamicTableConfig(f"t{i}", 8, [f"f{i}"], policy=policy) for i, policy in enumerate(policies)]
        engine = DynamicEngine(configs=configs, optimizer=SparseOptimizerConfig("sgd"), seed=0, merge=merge)
        return [budget for table in engine.tables for budget in table.budgets if budget is not None]

    assert rows(merge=True) == rows(merge=False)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference"])
@pytest.mark.parametrize(
    "settings", [{}, {"placement": "host", "cache_rows": 64}, {"precision": "mixed", "hot_count": 2}], ids=str
)
def test_evaluation_changes_nothing(mode: str, settings: dict[str, Any]) -> None:
    features = batches(6)
    made, untouched = collection(**settings), collection(**settings)
    outputs: list[Any] = []
    for i, batch in enumerate(features):
        before = contents(made.engine, missing=False)
        seen = evaluated(made, features[-i - 1], mode)
        assert contents(made.engine, missing=False) == before
        assert not any(x.values().requires_grad for x in seen.values())
        output = made(batch)
        evaluated(made, features[0], mode)  # between forward and backward, too
        loss_of(output).backward()
        evaluated(made, features[0], mode)
        made.engine.step()
        outputs.append(torch.cat([x.values().detach().flatten() for x in output.values()]).tolist())
        assert outputs[-1] == train(untouched, [batch])[0]
    made.engine.time = untouched.engine.time
    assert contents(made.engine, missing=False) == contents(untouched.engine, missing=False)
    assert vars(made.engine.statistics) == vars(untouched.engine.statistics)


def evaluated(made: DynamicEmbeddingCollection, batch: Any, mode: str) -> dict[str, Any]:
    if mode == "no_grad":
        with torch.no_grad():
            return made(batch)
    made.eval()
    with torch.inference_mode(mode == "inference"):
        output: dict[str, Any] = made(batch)
    made.train()
    return output


@pytest.mark.parametrize("settings", [{}, {"placement": "host", "cache_rows": 16}, {"id_encoding": "bits"}], ids=str)
def test_tables_made_in_inference_mode_train(settings: dict[str, Any]) -> None:
    features = batches(4, pool=SMALL_ID)
    plain = collection(**settings)
    torch.manual_seed(5)
    first = DynamicEmbeddingCollection(tables=plain.configs, settings=plain.settings)
    with torch.inference_mode():
        first(features[0])
    assert train(first, features) == train(plain, features)
    assert contents(first.engine, missing=False) == contents(plain.engine, missing=False)


# ---- steps and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("cuts", [(0, 6), (0, 3, 6), (0, 1, 1, 4, 6)])
def test_accumulated_micro_batches_are_one_batch(cuts: tuple[int, ...], optimizer: str) -> None:
    policy = TablePolicy(admission=Admission(min_count=3), ttl_steps=4, on_missing="bucket")
    whole, cut = collection(policy, optimizer=optimizer), collection(policy, optimizer=optimizer)
    for batch in batches(7):
        train(whole, [batch])
        for start, stop in zip(cuts, cuts[1:], strict=False):
            loss_of(cut(part(batch, start, stop))).backward()
        cut.engine.step()
    a, b = contents(whole.engine), contents(cut.engine)
    for name in ("item", "shop", "tag"):  # once a lookup
        assert a[f"{name} statistics"]["inserted"] == b[f"{name} statistics"]["inserted"]
        for of in (a, b):
            del of[f"{name} statistics"]
    a["clocks"] = b["clocks"] = None
    for of in (a, b):
        for rows in of.values():
            for row in (rows or {}).values():
                if isinstance(row, list) and len(row) == 5:
                    row[4] = 0  # of data without time
    assert_close(a, b)


def test_clipping_scales_what_the_optimiser_sees() -> None:
    """Against a step by hand: row -= lr * factor * gradient."""
    made, batch = collection(CALM, optimizer="sgd"), batches(1)[0]
    output = made(batch)
    before = contents(made.engine)
    grads: dict[str, dict[int, Tensor]] = {"item": {}, "shop": {}, "tag": {}}
    for i, (name, x) in enumerate(output.items()):
        feature, _, table = name.partition("@")
        table = table or {"k": "tag", "f": "item", "h": "shop"}[feature]
        for id_, row in zip(batch[feature].values().tolist(), x.values().detach().double(), strict=True):
            grads[table][id_] = grads[table].get(id_, 0) + 2 * (i + 1) * (row - 0.1)
    loss_of(output).backward()
    made.engine.flush()
    norm = sum(float(g.square().sum()) for of in grads.values() for g in of.values())
    assert float(made.engine.squared_norm()) == pytest.approx(norm, rel=1e-5)
    assert made.engine.gradients_are_finite()
    made.engine.scale_gradients(0.5)
    assert float(made.engine.squared_norm()) == pytest.approx(norm / 4, rel=1e-5)
    made.engine.clamp_gradients(0.2)
    made.engine.lr_factor = 3.0
    made.engine.step()
    after = contents(made.engine)
    for table, of in grads.items():
        assert of
        for id_, grad in of.items():
            expected = torch.tensor(before[table][id_][0]).double() - 0.3 * (grad / 2).clamp(-0.2, 0.2)
            assert after[table][id_][0] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-7)


def test_left_out_and_dropped_gradients_move_no_row() -> None:
    made, (first, second) = collection(CALM), batches(2)
    train(made, [first])
    before = contents(made.engine)["item"]
    loss_of(made(first)).backward()
    made.engine.flush()
    made.engine.scale_gradients(float("nan"))
    assert not made.engine.gradients_are_finite()
    made.engine.end_step()
    assert made.engine.next_step == 2
    loss_of(made(first)).backward()
    made.engine.drop_gradients()
    assert made.engine.next_step == 2
    assert float(made.engine.squared_norm()) == 0
    after = contents(made.engine)["item"]
    assert {x: row[:2] for x, row in after.items()} == {x: row[:2] for x, row in before.items()}
    train(made, [second])


def test_several_forwards_and_one_backward() -> None:
    """Two forwards of a step, whose losses are added, or backward called for each, or only after both."""

    def two(how: str) -> dict[str, Any]:
        made = collection(CALM)
        for first, second in zip(batches(5), batches(5, seed=2), strict=True):
            a = loss_of(made(first))
            if how == "in turn":
                a.backward()
            b = loss_of(made(second))
            if how == "together":
                (a + b).backward()
            elif how == "reversed":
                b.backward()
                a.backward()
            else:
                b.backward()
            made.engine.step()
        return contents(made.engine)

    assert two("together") == two("in turn") == two("reversed")


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rowwise_adagrad", "momentum"])
@pytest.mark.parametrize("used", [[], ["k"], ["f", "g@shop"]])
def test_what_does_not_reach_the_loss_has_a_gradient_of_zero(used: list[str], optimizer: str) -> None:
    made, zeros = collection(optimizer=optimizer), collection(optimizer=optimizer)
    features = batches(6)
    for c in (made, zeros):
        train(c, features[:3])
    for batch in features[3:]:
        outputs = [c(batch) for c in (made, zeros)]
        if used:
            loss_of({name: outputs[0][name] for name in used}).backward()
        weighted = [loss_of({name: outputs[1][name] for name in used})] if used else []
        (sum(weighted) + 0 * loss_of(outputs[1])).backward()  # type: ignore[union-attr]
        for c in (made, zeros):
            c.engine.step()
    assert contents(made.engine) == contents(zeros.engine)


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_second_backward_through_a_forward_is_refused(update: str) -> None:
    made, batch = collection(CALM, update=update), batches(1)[0]
    loss = loss_of(made(batch))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="add the losses and call backward once"):
        loss.backward(retain_graph=True)
    made.engine.step()
    with pytest.raises(RuntimeError, match="before the step"):
        loss.backward()
    assert made.engine.next_step == 1


@pytest.mark.parametrize("calls_step", [True, False])
def test_an_update_in_backward_is_a_step(calls_step: bool) -> None:
    features = batches(10)
    plain, fused = collection(), collection(update="backward")
    expected, outputs = train(plain, features), []
    for i, batch in enumerate(features):
        fused.engine.observe_time(10 * i)
        output = fused(batch)
        outputs.append(torch.cat([x.values().detach().flatten() for x in output.values()]).tolist())
        loss_of(output).backward()
        if calls_step:
            fused.engine.step()
        else:
            assert fused.engine.stepped_in_backward()
            assert not fused.engine.stepped_in_backward()
    assert outputs == expected
    assert contents(fused.engine) == contents(plain.engine)


# ---- prefetch ------------------------------------------------------------------------------------------------------


def test_prefetched_lookups_change_no_number() -> None:
    features = batches(8)
    plain, ahead = collection(), collection()
    outputs = []
    for batch in features[:2]:
        ahead.engine.prefetch(batch)
    for i, batch in enumerate(features):
        before = contents(ahead.engine)
        if i + 2 < len(features):
            ahead.engine.prefetch(features[i + 2])
        assert contents(ahead.engine) == before
        evaluated(ahead, features[0], "eval")  # takes none of them
        output = ahead(batch)
        outputs.append(torch.cat([x.values().detach().flatten() for x in output.values()]).tolist())
        loss_of(output).backward()
        ahead.engine.step()
    plain.engine.observe_time = lambda seconds: None  # type: ignore[method-assign]
    assert outputs == train(plain, features)
    assert contents(ahead.engine, missing=False) == contents(plain.engine, missing=False)


def test_other_features_than_those_prefetched_are_refused() -> None:
    made, (first, second) = collection(), batches(2)
    made.engine.prefetch(first)
    with pytest.raises(RuntimeError, match="other features than those prefetched; keep the order"):
        made(second)
    loss_of(made(first)).backward()
    made.engine.step()
    made(second)


# ---- by hand, and what is refused ----------------------------------------------------------------------------------


def test_rows_are_set_and_dropped_by_hand() -> None:
    made, ids = collection(CALM, optimizer="sgd"), torch.tensor([0, -1, 2**63 - 1, -(2**63), 5, 5])
    values = torch.arange(48.0).view(6, 8)
    assert made.engine.upsert(ids, values, "item") == 0
    rows = contents(made.engine)["item"]
    assert {x: row[0] for x, row in rows.items()} == dict(zip(ids.tolist(), values.tolist(), strict=True))
    assert contents(made.engine)["shop"] == {}
    batch = jagged(ids[:4], torch.tensor([0, 0, 4, 0]).repeat_interleave(1))
    made.eval()
    assert torch.equal(made(batch)["g@item"].values(), values[:4])
    assert made.engine.delete(torch.tensor([5, -1, 77, 5]), "item") == 2
    assert made.engine.delete(torch.tensor([5, -1, 77]), "shop") == 0
    assert sorted(contents(made.engine)["item"]) == sorted([0, 2**63 - 1, -(2**63)])


@pytest.mark.parametrize("state", ["forward", "backward", "flush"])
def test_rows_in_flight_are_not_set_or_dropped(state: str) -> None:
    made, batch = collection(CALM), batches(1)[0]
    loss = loss_of(made(batch))
    if state != "forward":
        loss.backward()
    if state == "flush":
        made.engine.flush()
    before = contents(made.engine)
    with pytest.raises(RuntimeError, match="delete between a forward and the optimiser's step"):
        made.engine.delete(torch.tensor([1]), "item")
    with pytest.raises(RuntimeError, match="upsert between a forward and the optimiser's step"):
        made.engine.upsert(torch.tensor([1]), torch.zeros(1, 8), "item")
    assert contents(made.engine) == before
    made.engine.step()
    made.engine.delete(torch.tensor([1]), "item")


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_mistakes_are_refused_by_name() -> None:
    engine, one = collection().engine, torch.tensor([1])
    refused(lambda: engine.upsert(one, torch.zeros(1, 7), "item"), r"table item: expected values of shape \(1, 8\)")
    refused(lambda: engine.upsert(one, torch.zeros(2, 8), "item"), r"got \(2, 8\)")
    refused(lambda: engine.delete(one, "user"), "table user: there is none; choose from item, shop, tag")
    refused(lambda: engine.set_scores(one, torch.ones(1), "item"), "table item: evicts by lfu_lru")
    config = DynamicTableConfig("t", 4, ["f"])
    refused(lambda: DynamicEmbeddingCollection(tables=[config, config]), "table t: two configs of this name")
    refused(lambda: DynamicEmbeddingCollection(tables=[]), "tables: expected at least one")
    refused(
        lambda: DynamicEmbeddingCollection(tables=[DynamicTableConfig("t", 4, ["f", "f"])]),
        "table t: feature f is named twice",
    )
    other = DynamicEmbeddingCollection(tables=[DynamicTableConfig("t", 4, ["z"])])
    refused(lambda: other(batches(1)[0]), "feature z: not in the batch, which has k, f, g, h")
    bits = collection(CALM, id_encoding="bits")
    ids = jagged(torch.tensor([3, -1]), torch.tensor([0, 2, 0, 0]))
    refused(lambda: bits(ids), "use id_encoding: pair")
    assert len(bits.engine.tables[0]) == 0
    policies = {"itme": CALM}
    refused(lambda: DynamicTables(policies=policies).configs(collection().configs), "policies.itme: no such table")


def test_the_collision_rate_is_the_share_of_ids_of_the_step_before() -> None:
    made, generator, before = collection(CALM), torch.Generator().manual_seed(3), set[int]()
    assert made.engine.collision_rate("item") != made.engine.collision_rate("item")  # not a number yet
    asked = again = 0
    for _ in range(6):
        ids = torch.randint(0, 60, (20,), generator=generator)
        train(made, [jagged(ids, torch.tensor([0, 20, 0, 0]))])
        own = set(ids.tolist())
        asked, again, before = asked + len(own), again + len(own & before), own
    assert made.engine.collision_rate("item") == again / asked
    assert made.engine.collision_rate("tag") != made.engine.collision_rate("tag")
