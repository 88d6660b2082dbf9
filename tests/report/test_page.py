"""The page: self-contained, escaped, the same every time, with the numbers of the runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typing_extensions import override

from lightning_gr.report.cards import by_shots, less_is_better, names_of, sections
from lightning_gr.report.drawing import percent, short
from lightning_gr.report.page import best_of, differing_settings, duration, headline, page, write_page
from lightning_gr.report.run import Run, Series, read_run

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Elements, ids and texts; fails on an element that is closed twice or never."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag) if tag not in VOID else None

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[..., Path]) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    nasty = "<script>alert('&')</script> $x_1$"
    return [
        read_run(write_run(folder / "a", name="first", lr=0.1)),
        read_run(write_run(folder / "b", name=nasty, lr=0.2, steps=300)),
    ]


@pytest.fixture(scope="module")
def both(runs: list[Run]) -> str:
    return page(runs)


def test_nothing_comes_from_elsewhere(both: str) -> None:
    found = Page(both)
    assert not {"script", "iframe", "img", "object", "embed", "base", "form"} & set(found.tags)
    addresses = [(name, value) for name, value in found.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert all(value.startswith(("#", "data:")) for _, value in addresses)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all(x.startswith("url(#") for x in re.findall(r"url\([^)]*", both))
    assert "@import" not in both
    assert "default-src 'none'" in both


def test_what_a_user_wrote_is_text(both: str) -> None:
    assert "<script" not in both
    found = Page(both)
    said = " ".join(found.texts)
    assert "<script>alert('&')</script> $x_1$" in said  # a run's name
    assert "<script>alert(&)</script>" in said  # a setting
    assert "gr/table/<script>alert('&')</script> $x_1$ \"quoted\"/rows" in said  # a metric


def test_ids_are_unique_and_the_page_is_the_same_every_time(both: str, runs: list[Run]) -> None:
    ids = Page(both).ids
    assert len(ids) == len(set(ids))
    assert page(runs) == both


def test_every_figure_has_a_name_and_its_numbers(both: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", both, flags=re.DOTALL)
    assert len(figures) > 12
    for figure in figures:
        (title,) = re.findall(r'role="img" aria-labelledby="(f\d+-title)"', figure)
        assert re.search(rf'<title id="{title}">[^<]+</title>', figure)
        assert figure.count("<tr>") > 1
    assert not re.search(r"#0a0[bc]\d\d", both)  # no colour is left that is not the page's


def test_lines_are_drawn_where_the_values_are(tmp_path: Path) -> None:
    run = Run("x", {"val/a": Series([10, 20, 30], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0])})
    (card,) = sections([run])[0].cards
    (path,) = [x for x in re.findall(r"<path [^>]*>", card.svg) if "clip-path" in x and "var(--c0)" in x]
    points = [tuple(map(float, x)) for x in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2)  # downwards in SVG
    assert card.rows == [["10", "1"], ["20", "3"], ["30", "2"]]


def test_the_head_of_one_run(runs: list[Run]) -> None:
    facts = {fact.label: fact.value for fact in headline(runs[0])}
    assert facts == {
        "best val/NDCG@10": f"{max(runs[0].series['val/NDCG@10'].values):.4g}",
        "tokens a second": "40k",
        "MFU": "30%",
        "steps": "700",
        "time": "1 min 10 s",
        "ranks": "2",
    }
    assert best_of(runs[0]) == ("val/NDCG@10", max(runs[0].series["val/NDCG@10"].values), 600)


def test_the_best_of_a_run() -> None:
    def best(monitor: dict[str, str] | None, **series: list[float]) -> tuple[str, float, int] | None:
        made = {f"val/{x}": Series(list(range(len(y))), y, [0.0] * len(y)) for x, y in series.items()}
        return best_of(Run("x", made, {"monitor": monitor}))

    nan = float("nan")
    assert best(None, loss=[3.0, 1.0, 2.0], hr=[0.1, nan, 0.3]) == ("val/hr", 0.3, 2)
    assert best(None, loss=[3.0, 1.0, 2.0]) == ("val/loss", 1.0, 1)
    assert best({"name": "val/hr", "mode": "min"}, loss=[1.0], hr=[0.1, 0.2]) == ("val/hr", 0.1, 0)
    assert best({"name": "gone", "mode": "min"}, hr=[nan, 0.2]) == ("val/hr", 0.2, 1)
    assert best(None, hr=[nan]) is None
    assert less_is_better("val/NE@task")
    assert not less_is_better("val/oneness")
    apart = {"validate/hr": Series([0], [0.9], [0.0]), "val/hr": Series([0, 1], [0.1, 0.3], [0.0, 0.0])}
    assert best_of(Run("x", apart, {})) == ("val/hr", 0.3, 1), "a validation by itself is none of the curve"


def test_settings_that_differ(runs: list[Run]) -> None:
    assert differing_settings(runs) == [("model.lr", ["0.1", "0.2"])]
    assert differing_settings(runs[:1]) == []
    plain = [Run(x, {}, {"config": y}) for x, y in (("a", "x: [1, {y: 2}]\nz: 1"), ("b", "x: [1, {y: 3}]"), ("c", "{"))]
    assert differing_settings(plain) == [
        ("x.0", ["1", "1", "-"]),
        ("x.1.y", ["2", "3", "-"]),
        ("z", ["1", "-", "-"]),
    ]


def test_sections_without_data_say_so() -> None:
    run = Run("x", {"train/loss": Series([1], [2.0], [0.1])})
    text = page([run])
    assert "Not measured: add the callback MFUMonitor." in text
    assert "Not measured: add the callback BalanceMonitor." in text
    assert "not known." in text


def test_a_long_run_is_no_larger_a_page(tmp_path: Path) -> None:
    def size(points: int) -> int:
        values = [float(i % 97) for i in range(points)]
        write_page([Run("x", {"train/loss": Series(list(range(points)), values, values)})], tmp_path / "x.html")
        return (tmp_path / "x.html").stat().st_size

    assert size(50_000) < 3 * size(1_000)
    assert [x.name for x in tmp_path.iterdir()] == ["x.html"]


def test_the_hardwares_utilisation_is_shown_where_it_is_another() -> None:
    def shown(hfu: float) -> str:
        series = {"gr/mfu": Series([1], [0.5], [0.1]), "gr/hfu": Series([1], [hfu], [0.1])}
        return sections([Run("x", series)])[1].cards[0].name

    assert shown(0.5) == "gr/mfu"
    assert shown(0.6) == "gr/mfu, gr/hfu"


def test_what_lightning_writes_twice_is_shown_once() -> None:
    one = Series([1], [2.0], [0.1])
    run = Run(
        "x",
        {
            "train/loss": one,
            "train/loss_step": one,
            "train/other_step": one,
            "none": Series([1], [float("nan")], [0.1]),
        },
    )
    assert names_of([run]) == ["train/loss", "train/other_step"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234567.0, "1.235M"), (40000.0, "40k"), (9999.0, "9999"), (0.05, "0.05"), (-2e9, "-2G")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_percentages_and_durations() -> None:
    assert [percent(x) for x in (0.125, 0.0002, 1.0)] == ["12.5%", "0.02%", "100%"]
    assert [duration(x) for x in (48.2, 725, 12000)] == ["48 s", "12 min 5 s", "3 h 20 min"]


def test_metrics_by_shots_are_one_chart_and_cut_offs_are_not() -> None:
    names = ["val/click/AUC@0", "val/click/AUC@1", "val/click/AUC@10", "val/click/AUC@5", "val/HR@5", "val/HR@10"]
    series = {name: Series([1, 2], [0.1 * i, 0.1 * i + 0.05], [0.0, 0.0]) for i, name in enumerate(names)}
    run = Run("x", series)
    titles = [card.title for section in sections([run]) for card in section.cards]
    assert titles == ["val/click/AUC", "val/HR@5", "val/HR@10"]
    assert best_of(run) == ("val/click/AUC@10", pytest.approx(0.25), 2), "the most shots, by number"
    assert by_shots(names) == {"val/click/AUC": [f"val/click/AUC@{k}" for k in (0, 1, 5, 10)]}
    twice = [card.title for section in sections([run, run]) for card in section.cards]
    assert twice[:6] == [*by_shots(names)["val/click/AUC"], *titles[1:]], "of two runs a chart a metric"


def test_what_was_measured_once_is_a_table_and_no_curve_of_one_dot() -> None:
    curve, dot = Series([10, 20], [3.0, 2.0], [1.0, 2.0]), Series([0], [0.25], [math.nan])
    run = Run("x", {"val/loss": curve, "test/HR@10": dot, "test/AUC@0": dot, "test/AUC@1": dot})
    cards = sections([run])[0].cards
    assert [card.title for card in cards] == ["val/loss", "Measured once"]
    rows = [["test/HR@10", "0.25"], ["test/AUC@0", "0.25"], ["test/AUC@1", "0.25"]]
    assert (cards[1].svg, cards[1].header, cards[1].rows) == ("", ["metric", "value"], rows)
    assert page([run]).count("<details open>") == 1
    other = Run("y", {"val/loss": curve, "test/HR@10": Series([0], [math.nan], [math.nan])})
    last = sections([run, other])[0].cards[-1]
    assert (last.header, last.rows[0]) == (["metric", "x", "y"], ["test/HR@10", "0.25", "not finite"])
    tested_twice = Run("z", {"test/HR@10": Series([0, 20], [0.2, 0.3], [math.nan, math.nan])})
    assert [card.title for card in sections([run, tested_twice])[0].cards][1] == "test/HR@10"
