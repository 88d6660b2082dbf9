"""Tables said feature by feature."""

from __future__ import annotations

import pytest

from lightning_gr.embeddings.dynamic import FeatureConfig, tables_of_features


def test_features_of_one_table_share_it() -> None:
    configs = tables_of_features(
        [
            FeatureConfig("clicked", 8, ("item",)),
            FeatureConfig("bought", 8, ("item", "bought_item")),
            FeatureConfig("city", 4, ("city",), "mean"),
        ]
    )
    assert [(c.name, c.embedding_dim, tuple(c.feature_names), c.pooling) for c in configs] == [
        ("item", 8, ("clicked", "bought"), "sum"),
        ("bought_item", 8, ("bought",), "sum"),
        ("city", 4, ("city",), "mean"),
    ]


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (
            [FeatureConfig("a", 8, ("t",)), FeatureConfig("b", 16, ("t",))],
            "feature b: embedding_dim=16, but table t has 8, by feature a; make them equal",
        ),
        (
            [FeatureConfig("a", 8, ("t",)), FeatureConfig("b", 8, ("t",), "mean")],
            "feature b: pooling=mean, but table t has sum",
        ),
        ([FeatureConfig("a", 8, ("t",)), FeatureConfig("a", 8, ("u",))], "feature a: two configs of this name"),
        ([FeatureConfig("a", 8, ())], "feature a: looks up no table"),
    ],
)
def test_what_does_not_fit_is_named(features: list[FeatureConfig], said: str) -> None:
    with pytest.raises(ValueError, match="feature") as error:
        tables_of_features(features)
    assert str(error.value).startswith(said)
