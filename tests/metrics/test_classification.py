"""AUC, grouped AUC, normalized entropy and calibration against pair counting, plain sums, TorchRec and scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric

from lightning_gr.metrics import AUC, Calibration, GroupedAUC, NormalizedEntropy

METRICS: dict[str, Callable[[], Metric]] = {
    "AUC": lambda: AUC(),
    "AUC of bins": lambda: AUC(bins=2**9),
    "GAUC": lambda: GroupedAUC(),
    "NE": lambda: NormalizedEntropy(),
    "calibration": lambda: Calibration(),
}
OF_NOTHING = {"AUC": 0.5, "AUC of bins": 0.5, "GAUC": 0.5, "NE": 0.0, "calibration": 0.0}

Row = tuple[float, int, float, int]  # score, label, weight, group


def pairs_won(positives: list[Row], negatives: list[Row]) -> tuple[float, float]:
    """Weights of the pairs that the positive wins, and of all pairs."""
    won = total = 0.0
    for high, _, weight, _ in positives:
        for low, _, other, _ in negatives:
            total += weight * other
            if not (math.isnan(high) or math.isnan(low)):
                won += weight * other * (1.0 if high > low else 0.5 if high == low else 0.0)
    return won, total


def brute_force_auc(rows: list[Row]) -> float | None:
    won, total = pairs_won([row for row in rows if row[1]], [row for row in rows if not row[1]])
    return won / total if total else None


def brute_force_gauc(rows: list[Row]) -> float:
    areas, weights = [], []
    for group in {row[3] for row in rows}:
        members = [row for row in rows if row[3] == group]
        area = brute_force_auc(members)
        if area is not None:
            areas.append(area)
            weights.append(sum(row[2] for row in members))
    return float(np.average(areas, weights=weights)) if areas else 0.5


def brute_force_ne(rows: list[Row]) -> float:
    rows = [row for row in rows if row[2]]
    if not rows:
        return 0.0
    mean = sum(row[1] * row[2] for row in rows) / sum(row[2] for row in rows)
    if mean in (0, 1):
        return math.inf

    def entropy(probability: Callable[[float], float]) -> float:
        return -sum(w * math.log(probability(x) if y else 1 - probability(x)) for x, y, w, _ in rows)

    return entropy(lambda x: 1 / (1 + math.exp(-x))) / entropy(lambda _: mean)


def brute_force_calibration(rows: list[Row]) -> float:
    positives = sum(y * w for _, y, w, _ in rows)
    return sum(w / (1 + math.exp(-x)) for x, _, w, _ in rows if w) / positives if positives else 0.0


def updated(metric: Metric, rows: list[Row], weighted: bool = True) -> Metric:
    scores = torch.tensor([row[0] for row in rows], dtype=torch.float32)
    labels = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    weights = torch.tensor([row[2] for row in rows], dtype=torch.float32) if weighted else None
    groups = [torch.tensor([row[3] for row in rows], dtype=torch.int64)] if isinstance(metric, GroupedAUC) else []
    metric.update(scores, labels, *groups, weights)
    return metric


def computed(metric: Metric) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of compute before update
        value = metric.compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    return float(value)


def merged(shards: list[Metric]) -> Metric:
    """What a sync over processes makes of the shards: every state reduced by its own reduction."""
    whole = shards[0].clone()
    whole.reset()
    updated(whole, [])
    for shard in shards:
        shard.sync()  # alone; fills lists that saw nothing
    for state, reduce in whole._reductions.items():
        assert callable(reduce)
        parts = [getattr(shard, state) for shard in shards]
        whole_state = sum(parts, []) if isinstance(parts[0], list) else torch.stack(parts)
        setattr(whole, state, reduce(whole_state))
    return whole


FINITE = st.sampled_from([-3.0, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.25, 1.0, 2.5])
ANY = st.one_of(FINITE, st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, -1e-30]))
LABEL, WEIGHT, GROUP = st.integers(0, 1), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.sampled_from([-(2**60), 0, 1, 7])
FINITE_ROWS = st.lists(st.tuples(FINITE, LABEL, WEIGHT, GROUP), max_size=24)
ROWS = st.lists(st.tuples(ANY, LABEL, WEIGHT, GROUP), max_size=24)


@settings(deadline=None)
@given(ROWS, st.booleans(), st.integers(0, 24))
def test_auc_counts_pairs_in_two_batches(rows: list[Row], weighted: bool, cut: int) -> None:
    metric = AUC()
    for batch in (rows[:cut], rows[cut:]):
        updated(metric, batch, weighted)
    expected = brute_force_auc(rows if weighted else [(x, y, 1.0, g) for x, y, _, g in rows])
    assert computed(metric) == pytest.approx(0.5 if expected is None else expected, abs=1e-12)
    metric.reset()
    assert computed(metric) == 0.5


@settings(deadline=None)
@given(ROWS, st.sampled_from([1, 2, 3, 1000, 2**16]))
def test_auc_of_bins_is_off_by_half_of_the_pairs_that_share_a_bin_at_most(rows: list[Row], bins: int) -> None:
    metric = updated(AUC(bins=bins), rows)
    positives, negatives = metric.positives, metric.negatives
    assert positives.dtype == torch.float64
    assert positives.shape == (bins,)
    assert float(positives.sum()) == sum(w for _, y, w, _ in rows if y)
    assert float(negatives.sum()) == sum(w for _, y, w, _ in rows if not y)
    exact = brute_force_auc(rows)
    if exact is None:
        assert computed(metric) == 0.5
        return
    bound = float((positives * negatives).sum() / (positives.sum() * negatives.sum()) / 2)
    assert abs(computed(metric) - exact) <= bound + 1e-12


def test_the_bound_of_many_bins_is_small() -> None:
    scores = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e-4
    labels = (torch.arange(4096) % 3 == 0).float()
    exact, binned = AUC(), AUC(bins=2**20)
    for metric in (exact, binned):
        metric.update(scores + labels * 1e-4, labels)
    assert computed(exact) > 0.7
    assert computed(binned) == pytest.approx(computed(exact), abs=5e-4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("sign", [-1, 1])
def test_bins_are_as_fine_near_zero_as_elsewhere(scale: float, sign: int) -> None:
    metric = AUC(bins=2**20)
    scores = sign * scale * (1 + torch.arange(64) * 2.0**-10)
    metric.update(scores, (torch.arange(64) % 2).float())
    assert not (metric.positives * metric.negatives).any()


@pytest.mark.parametrize(("dtype", "bins"), [(torch.bfloat16, 2**16), (torch.float16, 2**19)])
def test_scores_of_half_precision_are_exact_even_in_bins(dtype: torch.dtype, bins: int) -> None:
    patterns = torch.randint(-(2**15), 2**15, (512,), generator=torch.Generator().manual_seed(1))
    scores = patterns.to(torch.int16).view(dtype)  # NaN, infinities and subnormal numbers among them
    scores[:4] = torch.tensor([math.nan, math.nan, math.inf, -math.inf])
    labels = (torch.arange(512) % 2).float()
    expected = brute_force_auc([(x, y, 1.0, 0) for x, y in zip(scores.tolist(), labels.int().tolist(), strict=True)])
    for metric in (AUC(), AUC(bins=bins)):
        metric.update(scores, labels)
        assert computed(metric) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["NE", "calibration"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype_are_summed_in_float64(kind: str, dtype: torch.dtype) -> None:
    logits = torch.linspace(-3, 3, 64).to(dtype)
    labels = torch.arange(64) % 2
    metric = METRICS[kind]()
    metric.update(logits, labels)
    rows = [(x, y, 1.0, 0) for x, y in zip(logits.tolist(), labels.tolist(), strict=True)]
    expected = brute_force_ne(rows) if kind == "NE" else brute_force_calibration(rows)
    assert computed(metric) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(ROWS, st.booleans(), st.integers(0, 24))
def test_gauc_is_the_mean_over_groups_spread_over_batches(rows: list[Row], weighted: bool, cut: int) -> None:
    metric = GroupedAUC()
    for batch in (rows[:cut], rows[cut:]):
        updated(metric, batch, weighted)
    expected = brute_force_gauc(rows if weighted else [(x, y, 1.0, g) for x, y, _, g in rows])
    assert computed(metric) == pytest.approx(expected, abs=1e-12)


def test_gauc_of_many_groups() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (float(np.float32(x)), int(y), float(w), int(g))
        for x, y, w, g in zip(
            rng.normal(size=600).round(1),
            rng.integers(2, size=600),
            rng.integers(4, size=600),
            rng.integers(150, size=600),
            strict=True,
        )
    ]
    assert computed(updated(GroupedAUC(), rows)) == pytest.approx(brute_force_gauc(rows), abs=1e-12)


@settings(deadline=None)
@given(FINITE_ROWS, st.integers(0, 24))
def test_ne_and_calibration_are_plain_sums(rows: list[Row], cut: int) -> None:
    for metric, expected in (
        (NormalizedEntropy(), brute_force_ne(rows)),
        (Calibration(), brute_force_calibration(rows)),
    ):
        for batch in (rows[:cut], rows[cut:]):
            updated(metric, batch)
        assert computed(metric) == pytest.approx(expected, rel=1e-7)  # float32 inputs
        metric.reset()
        assert computed(metric) == 0


def test_ne_is_stable_for_large_logits() -> None:
    metric = NormalizedEntropy()
    metric.update(torch.tensor([800.0, -900.0, math.inf, -math.inf, 0.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    entropy = -(3 * math.log(3 / 5) + 2 * math.log(2 / 5))
    assert computed(metric) == pytest.approx((1700 + math.log(2)) / entropy, rel=1e-12)
    metric.update(torch.tensor([math.inf]), torch.tensor([0.0]))
    assert computed(metric) == math.inf


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_area_and_no_entropy(label: float) -> None:
    scores, labels = torch.tensor([-1.0, 40.0]), torch.tensor([label, label])
    expected = {"AUC": 0.5, "AUC of bins": 0.5, "GAUC": 0.5, "NE": math.inf}
    expected["calibration"] = (1 + 1 / (1 + math.e)) / 2 if label else 0.0
    for name, make in METRICS.items():
        metric = make()
        metric.update(scores, labels, *([torch.tensor([3, 3])] if name == "GAUC" else []))
        assert computed(metric) == pytest.approx(expected[name], rel=1e-12)


def test_a_constant_scorer_gains_nothing() -> None:
    labels = (torch.arange(100) % 4 == 0).float()
    for metric in (AUC(), AUC(bins=1), AUC(bins=2**20)):
        metric.update(torch.full((100,), -1.25), labels)
        assert computed(metric) == 0.5
    grouped, entropy, calibration = GroupedAUC(), NormalizedEntropy(), Calibration()
    grouped.update(torch.full((100,), -1.25), labels, torch.arange(100) // 9)
    assert computed(grouped) == 0.5
    base_rate = torch.full((100,), math.log(1 / 3), dtype=torch.float64)
    for metric in (entropy, calibration):
        metric.update(base_rate, labels)
        assert computed(metric) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("make", [lambda: AUC(), lambda: AUC(bins=2**16)])
def test_nan_counts_against_the_model(make: Callable[[], AUC]) -> None:
    for score, label in ((-math.inf, 0.0), (math.nan, 0.0), (math.inf, 0.0)):
        metric = make()
        metric.update(torch.tensor([math.nan, score]), torch.tensor([1.0, label]))
        assert computed(metric) == 0
    metric = make()
    metric.update(torch.tensor([math.inf, math.nan]), torch.tensor([1.0, 0.0]))
    assert computed(metric) == 0


def test_a_nan_logit_that_counts_is_not_hidden() -> None:
    for metric in (NormalizedEntropy(), Calibration()):
        metric.update(torch.tensor([math.nan, 0.0]), torch.tensor([1.0, 0.0]))
        assert math.isnan(computed(metric))


@pytest.mark.parametrize("name", METRICS)
def test_what_has_no_weight_does_not_count(name: str) -> None:
    rows: list[Row] = [(0.5, 1, 2.0, 0), (-1.0, 0, 1.0, 0), (0.75, 0, 1.0, 0), (2.0, 1, 1.0, 1), (1.0, 0, 1.0, 1)]
    more = [*rows, (math.nan, 1, 0.0, 0), (math.nan, 0, 0.0, 1), (math.inf, 0, 0.0, 2), (-math.inf, 1, 0.0, 0)]
    assert computed(updated(METRICS[name](), more)) == computed(updated(METRICS[name](), rows))
    # Nor does its label.
    metric = METRICS[name]()
    nothing = [torch.tensor([math.nan]), torch.tensor([math.nan]), torch.tensor([0.0])]
    metric.update(*nothing[:2], *([torch.tensor([5])] if name == "GAUC" else []), nothing[2])
    assert computed(metric) == OF_NOTHING[name]


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=30, deadline=None)
@given(FINITE_ROWS, st.lists(st.integers(0, 24), min_size=2, max_size=2))
def test_uneven_shards_merge_to_the_single_process(name: str, rows: list[Row], cuts: list[int]) -> None:
    first, second = sorted(cuts)
    shards = []
    for part in (rows[:first], rows[first:second], rows[second:]):
        # A process that saw nothing was never updated.
        shards.append(updated(METRICS[name](), part) if part else METRICS[name]())
    single = computed(updated(METRICS[name](), rows))
    assert computed(merged(shards)) == pytest.approx(single, abs=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_states_made_in_inference_mode_can_be_updated_outside_it(name: str) -> None:
    rows: list[Row] = [(0.5, 1, 2.0, 0), (-1.0, 0, 1.0, 0), (0.75, 0, 1.0, 0), (2.0, 1, 1.0, 1), (1.0, 0, 1.0, 1)]
    metric = METRICS[name]()
    with torch.inference_mode():
        updated(metric, rows)
        metric.reset()
        updated(metric, rows[:3])
        computed(metric)
    updated(metric, rows[3:])
    assert computed(metric) == pytest.approx(computed(updated(METRICS[name](), rows)), rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_forward_gives_the_value_of_the_batch_and_keeps_all(name: str) -> None:
    scores, labels = torch.tensor([0.5, -1.0, 0.75, 2.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    groups = [torch.tensor([0, 0, 1, 1])] if name == "GAUC" else []
    metric, batch = METRICS[name](), METRICS[name]()
    metric(-scores, labels, *groups)
    batch.update(scores, labels, *groups)
    assert float(metric(scores, labels, *groups)) == computed(batch)
    batch.update(-scores, labels, *groups)
    assert computed(metric) == pytest.approx(computed(batch), rel=1e-12)


@pytest.mark.parametrize("name", METRICS)
def test_shapes_that_do_not_fit_are_an_error(name: str) -> None:
    good = {"scores_N": torch.zeros(3), "labels_N": torch.zeros(3), "weights_N": torch.ones(3)}
    if name == "GAUC":
        good["groups_N"] = torch.zeros(3, dtype=torch.int64)
    METRICS[name]().update(**good)
    for argument, tensor in good.items():
        for shape in ((3, 1), (1, 3), (2,), (1,), ()):
            if argument == "scores_N" and len(shape) == 1:
                continue  # then the labels are wrong
            wrong = {**good, argument: torch.zeros(shape, dtype=tensor.dtype)}
            with pytest.raises(ValueError, match=argument) as error:
                METRICS[name]().update(**wrong)
            assert str(shape) in str(error.value)


def test_group_ids_that_are_no_integers_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"groups_N is torch\.float32: expected int64"):
        GroupedAUC().update(torch.zeros(2), torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("bins", [0, -1, 2**31 + 1])
def test_bins_out_of_range_are_an_error(bins: int) -> None:
    with pytest.raises(ValueError, match=rf"bins={bins}: expected 1"):
        AUC(bins=bins)


STATES_OF_NE = ("cross_entropy_sum", "weighted_num_samples", "pos_labels", "neg_labels")


def random_rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(500, generator=generator)  # no ties: TorchRec counts them by their order
    labels = (torch.rand(500, generator=generator) < logits.sigmoid()).float()
    return logits, labels, torch.rand(500, generator=generator), torch.randint(20, (500,), generator=generator)


def test_the_metrics_are_those_of_torchrec() -> None:
    auc, ne = pytest.importorskip("torchrec.metrics.auc"), pytest.importorskip("torchrec.metrics.ne")
    calibration = pytest.importorskip("torchrec.metrics.calibration")
    logits, labels, weights, groups = random_rows()
    ours = {"AUC": AUC(), "NE": NormalizedEntropy(), "calibration": Calibration(), "GAUC": GroupedAUC()}
    for name, metric in ours.items():
        metric.update(logits, labels, *([groups] if name == "GAUC" else []), weights)
    tasks = logits.double()[None], labels.double()[None], weights.double()[None]
    assert computed(ours["AUC"]) == pytest.approx(float(auc.compute_auc(1, *([x] for x in tasks))), abs=1e-6)
    probabilities = tasks[0].sigmoid()
    states = ne.get_ne_states(tasks[1], probabilities.clone(), tasks[2], 1e-12)
    theirs = ne.compute_ne(*(states[key] for key in STATES_OF_NE), eta=1e-12)
    assert computed(ours["NE"]) == pytest.approx(float(theirs), rel=1e-9)
    sums = calibration.get_calibration_states(tasks[1], probabilities, tasks[2])
    assert computed(ours["calibration"]) == pytest.approx(float(calibration.compute_calibration(*sums.values())))
    # TorchRec's mean over groups is plain, with 0.5 for those of one class: here every group has both and the same
    # sum of weights.
    labels, groups = labels[:480].clone(), torch.arange(480) % 24
    labels[:24], labels[24:48] = 0, 1
    metric = GroupedAUC()
    metric.update(logits[:480], labels, groups)
    theirs = auc.compute_auc_per_group(1, [logits[None, :480]], [labels[None]], [torch.ones(1, 480)], groups)
    assert computed(metric) == pytest.approx(float(theirs), abs=1e-6)


def test_the_metrics_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels, weights, _ = random_rows()
    logits = logits.round(decimals=1)  # ties
    auc, ne = AUC(), NormalizedEntropy()
    for metric in (auc, ne):
        metric.update(logits, labels, weights)
    assert computed(auc) == pytest.approx(sklearn.roc_auc_score(labels, logits, sample_weight=weights), abs=1e-9)
    mean = np.full(500, np.average(labels, weights=weights.double()))
    losses = [sklearn.log_loss(labels, p, sample_weight=weights) for p in (logits.double().sigmoid().numpy(), mean)]
    assert computed(ne) == pytest.approx(losses[0] / losses[1], rel=1e-6)


def _evaluate_on_rank(shards: list[list[Row]]) -> list[float]:
    rows = shards[torch.distributed.get_rank()]
    metrics = [make() for make in METRICS.values()]
    values = []
    for metric in metrics:
        if rows:
            updated(metric, rows[:2])
            updated(metric, rows[2:])
        values.append(computed(metric))
        updated(metric, rows)  # unsynced states go on
    return values + [computed(metric) for metric in metrics]


@pytest.mark.dist
def test_two_processes_with_uneven_shards_agree_with_one(gloo: Any) -> None:
    rows: list[Row] = [
        (0.5, 1, 2.0, 0),
        (-1.0, 0, 1.0, 2**40),
        (0.75, 0, 1.0, 0),
        (2.0, 1, 1.0, 2**40),
        (1.0, 0, 0.5, 2**40),
        (math.inf, 1, 0.0, 1),
        (-2.0, 1, 1.0, 0),
    ]
    for shards in ([rows, []], [[], rows], [rows[:5], rows[5:]], [[], []]):
        expected = [computed(updated(make(), rows if any(shards) else [])) for make in METRICS.values()]
        for result in gloo(2).run(_evaluate_on_rank, shards):
            assert result == pytest.approx(expected * 2)
