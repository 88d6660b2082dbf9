"""Pages of figures say what the rows say, and nothing where there is no row."""

import csv
import re

import goals
import pytest
import render
from goals import Goal


def write_rows(folder, name, rows):
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def test_committed_pages_are_what_the_rows_give():
    assert render.main(["--check"]) == 0


def test_every_goal_names_a_column_of_its_result():
    for goal in goals.GOALS:
        rows = render.rows_of(render.RESULTS, goal.result)
        assert not rows or any(goal.column in row for row in rows), goal
    assert len({(goal.result, goal.column) for goal in goals.GOALS}) == len(goals.GOALS)
    assert set(render.IN_README) <= {(goal.result, goal.column) for goal in goals.GOALS}


def test_the_newest_row_that_fits_is_taken(tmp_path):
    write_rows(tmp_path, "a", [{"threads": 1, "x": 3}, {"threads": 2, "x": 4}, {"threads": 1, "x": 5}, {"y": 6}])
    assert render.latest(tmp_path, "a", threads=1)["x"] == 5
    assert render.latest(tmp_path, "a", threads=2)["x"] == 4
    assert render.latest(tmp_path, "a") == {"y": 6}
    with pytest.raises(LookupError, match=r"a\.csv .* no row with \{'threads': 3\}"):
        render.latest(tmp_path, "a", threads=3)


def test_commits_that_look_like_numbers_stay_words(tmp_path):
    write_rows(tmp_path, "a", [{"commit": "12e5678", "x": "12e5"}])
    assert render.latest(tmp_path, "a") == {"commit": "12e5678", "x": 12e5}


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.412, 2, ".41"), (-0.068, 2, "-.07"), (1024, 0, "1,024"), (10.04, 1, "10.0"), (0, 0, "0"), (100.3, 1, "100.3")],
)
def test_figures_are_written_without_the_zero_before_the_point(value, digits, text):
    assert render.written(value, digits) == text


def test_a_goal_says_whether_it_was_reached_and_how_many_times():
    least, most, none = (
        Goal("a", "x", 2, "x"),
        Goal("a", "x", 0.5, "x", at_most=True),
        Goal("a", "x", 0, "x", at_most=True),
    )
    assert least.reached(2)
    assert not least.reached(1.99)
    assert least.share(3) == 1.5
    assert most.reached(0.5)
    assert not most.reached(0.51)
    assert most.share(0.25) == 2
    assert none.reached(0)
    assert not none.reached(1)
    assert none.share(0) is None


def test_the_table_marks_what_is_missed_and_leaves_out_what_is_not_measured(tmp_path):
    write_rows(tmp_path, "a", [{"commit": "abc", "x": 1.4}])
    table = render.goals_table(tmp_path, (Goal("a", "x", 1.5, "speed"), Goal("b", "x", 1, "nothing yet")))
    assert "| speed | **1.40**, missed | 1.5 | `a.csv`, `x`, abc |" in table
    assert "nothing yet" not in table


def test_a_goal_is_of_rows_that_have_what_it_asks_for(tmp_path):
    write_rows(
        tmp_path, "a", [{"commit": "abc", "x": 1.4, "malloc": "default"}, {"commit": "b", "x": 2, "malloc": "own"}]
    )
    for where, found in (({}, 2), ({"malloc": "default"}, 1.4), ({"malloc": "none"}, None)):
        measured = render.measured(tmp_path, Goal("a", "x", 1, "x", where=where))
        assert (measured and measured[1]) == found, where


def test_readme_keeps_all_but_the_table(tmp_path):
    write_rows(tmp_path, "softmax", [{"commit": "abc", "softmax_speedup": 3.0}])
    page = render.readme_page(tmp_path, f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert "old" not in page
    assert "| **3** | 2 |" in page
    for broken in ("no marks", f"{render.END} {render.BEGIN}", render.BEGIN * 2 + render.END):
        with pytest.raises(ValueError, match=re.escape(render.BEGIN)):
            render.readme_page(tmp_path, broken)


def test_the_picture_has_a_bar_for_each_figure_with_a_goal(tmp_path):
    write_rows(tmp_path, "softmax", [{"softmax_speedup": 3.0}])
    write_rows(tmp_path, "cli", [{"fit_help_ratio": 2.6}])
    render.draw_goals(tmp_path, tmp_path / "goals.svg")
    picture = (tmp_path / "goals.svg").read_text()
    assert "1.50" in picture
    assert "0.50" in picture
    assert "#0072b2" in picture
    assert "#d55e00" in picture
