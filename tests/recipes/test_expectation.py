"""Headers of recipes: every shipped one can be read, and what cannot be read is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_gr import recipes
from lightning_gr.recipes.expectation import UNMEASURED, Expected, header_fields, read_header

FULL = sorted(x for x in recipes.ls() if "trainer" in yaml.safe_load(recipes.path(x).read_text(encoding="utf-8")))


def header(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(f"# A recipe\n{text}\n\nseed_everything: 1  # Expected: not this\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", [x for x in FULL if "/ablations/" not in x])
def test_every_recipe_says_what_to_expect_of_it(name: str) -> None:
    found = read_header(recipes.path(name))
    assert found.expected or found.text.startswith(UNMEASURED)
    assert all(one.metric.startswith("test/") and one.tolerance > 0 for one in found.expected)
    fields = header_fields(recipes.path(name))
    assert fields["Data"]
    assert name in fields["Launch"]


def test_the_figures_of_some_recipes() -> None:
    (hit_rate, gain) = read_header(recipes.path("hstu/amazon-beauty")).expected
    assert hit_rate == Expected("test/HR@10", 0.083, 0.003)
    assert gain == Expected("test/NDCG@10", 0.044, 0.003)
    assert [x.metric for x in read_header(recipes.path("mtgr/exposures")).expected] == [
        "test/click/GAUC",
        "test/ctcvr/GAUC",
    ]
    unmeasured = read_header(recipes.path("hstu/ml-1m"))
    assert unmeasured.expected == ()
    assert ".3097" in unmeasured.published


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("test loss 1.5 ± .25", [("test/loss", 1.5, 0.25)]),
        ("test/like/AUC .7 +- .01 (5 seeds), also HR 3", [("test/like/AUC", 0.7, 0.01)]),
        ("test like AUC .7 ± .01 and like NE 1 ± 0.5.", [("test/like/AUC", 0.7, 0.01), ("test/like/NE", 1.0, 0.5)]),
        ("test a 1 ± 1, and test b -2 ± .5, measured with 3 seeds", [("test/a", 1.0, 1.0), ("test/b", -2.0, 0.5)]),
        (
            "test HR@10 .1 ± .2,\n#           NDCG@10 .3 ± .4; docs",
            [("test/HR@10", 0.1, 0.2), ("test/NDCG@10", 0.3, 0.4)],
        ),
    ],
)
def test_forms_of_an_expectation(tmp_path: Path, text: str, expected: list[tuple[str, float, float]]) -> None:
    found = read_header(header(tmp_path, f"# Expected: {text}\n# Published: nothing"))
    assert [(x.metric, x.value, x.tolerance) for x in found.expected] == expected
    assert found.published == "nothing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# Launch: fit", "its header has no expectation; write a line such as '# Expected: test HR@10 .083 ± .003"),
        ("# Expected:", "its header has no expectation"),
        (
            "# Expected: test HR@10 .083, NDCG@10 .044 ± .003",
            "'test HR@10 .083' is no metric with a value and a tolera",
        ),
        (
            "# Expected: test HR@10 .083 ± .003, NDCG@10 .044",
            "'NDCG@10 .044' is no metric with a value and a tolerance",
        ),
        (
            "# Expected: as hstu/tiny",
            "'as hstu/tiny' is no metric with a value and a tolerance; write it as '# Expected",
        ),
        ("# Expected: HR@10 .083 ± .003", "'HR@10 .083 ± .003' does not begin with the word test"),
        ("# Expected: test HR .1 ± .1, test HR .2 ± .1", "test/HR is there twice"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml: ") as caught:
        read_header(header(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.083, "within"),
        (0.086, "within"),
        (0.08, "within"),
        (0.0861, "above"),
        (0.0799, "below"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_verdicts(mean: float, verdict: str) -> None:
    # In binary .083 + .003 is less than .086.
    assert Expected("test/HR@10", 0.083, 0.003).verdict(mean) == verdict
