"""TorchEasyRec's features: what maps means the same, what does not is said by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.cli import main
from lightning_gr.feature_config import FeatureConfig
from lightning_gr.importers.text_format import parse
from lightning_gr.importers.torcheasyrec import ImportedFeatures, import_features


def imported(*features: str, more: str = "") -> ImportedFeatures:
    return import_features(parse("\n".join(f"feature_configs {{ {x} }}" for x in features) + more))


def id_feature(name: str, side: str = "item", more: str = "") -> str:
    return (
        f'id_feature {{ feature_name: "{name}" expression: "{side}:{name}" embedding_dim: 16 num_buckets: 9 {more} }}'
    )


def raw_feature(name: str, more: str = "", side: str = "item") -> str:
    return f'raw_feature {{ feature_name: "{name}" expression: "{side}:{name}" {more} }}'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (id_feature("cate"), FeatureConfig("cate", dim=16, pooling="sum")),
        (id_feature("age", "user"), FeatureConfig("age", group="user", dim=16, pooling="sum")),
        (id_feature("hour", "context"), FeatureConfig("hour", group="candidate", dim=16, pooling="sum")),
        (
            id_feature("tag", more='embedding_name: "tags" pooling: "mean"'),
            FeatureConfig("tag", table="tags", dim=16, pooling="mean"),
        ),
        (raw_feature("price"), FeatureConfig("price", normalisation="none")),
        (
            raw_feature("price", 'normalizer: "method=zscore,mean=2.0,standard_deviation=10.0"'),
            FeatureConfig("price", normalisation="standard", mean=2.0, std=10.0),
        ),
        (
            raw_feature("price", 'normalizer: "method=minmax,min=2,max=6"'),
            FeatureConfig("price", normalisation="standard", mean=2.0, std=4.0),
        ),
    ],
)
def test_what_reads_one_column_maps(text: str, wanted: FeatureConfig) -> None:
    assert imported(text).features == [wanted]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('combo_feature { feature_name: "x" expression: ["user:a", "item:b"] }', "crosses"),
        ('lookup_feature { feature_name: "x" map: "user:m" key: "item:k" }', "looks a key up"),
        ('some_feature { feature_name: "x" }', "unknown kind"),
        (id_feature("x", more="weighted: true"), "weights"),
        (id_feature("x", more="stub_type: true"), "intermediate"),
        (id_feature("x", "feature"), "reads no column"),
        (id_feature("x", more='embedding_name: "a/b"'), "table='a/b'"),
        (id_feature("x", more="embedding_dim: 0"), "dim=0"),
        (raw_feature("x", "boundaries: [0.1, 0.2]"), "boundaries"),
        (raw_feature("x", "value_dim: 4"), "several numbers"),
        (raw_feature("x", 'normalizer: "method=expression,expr=log(x+3)"'), "none of ours"),
        (raw_feature("x", 'normalizer: "method=minmax,min=2,max=2"'), "std"),
        (raw_feature("x", 'normalizer: "method=zscore"'), "lacks a number"),
    ],
)
def test_what_does_not_map_is_named_with_its_reason(text: str, reason: str) -> None:
    found = imported(text, id_feature("item_id"))
    assert [x.name for x in found.features] == ["item_id"]
    (unmapped,) = found.unmapped
    assert unmapped.name == "x"
    assert reason in unmapped.reason


def test_what_is_not_carried_over_is_noted() -> None:
    found = imported(
        id_feature("item_id", more='zch { zch_size: 77 } default_value: "-1" init_fn: "f" trainable: false'),
        raw_feature("price", "embedding_dim: 4 mlp {}"),
    )
    said = "\n".join(found.notes)
    for part in ("zch of 77 rows", "default_value '-1'", "init_fn", "trainable", "mlp", "embedding_dim"):
        assert part in said, part


def test_sequences_are_the_history() -> None:
    sequence = 'sequence_feature { sequence_name: "clicks" sequence_length: 50 features { %s } features { %s } }'
    both = sequence % (id_feature("item_id"), id_feature("dwell", "user"))
    standalone = 'sequence_id_feature { feature_name: "seq" expression: "user:brands" embedding_dim: 8 }'
    found = imported(both, standalone, id_feature("item_id"))
    groups = {x.name: x.group for x in found.features}
    assert groups == {"item_id": None, "dwell": "history", "brands": "history"}
    assert any("clicks" in note and "50" in note for note in found.notes)


def test_labels_and_columns_named_twice_are_not_listed_again() -> None:
    twice = id_feature("cate").replace('feature_name: "cate"', 'feature_name: "again"')
    found = imported(id_feature("cate"), twice, id_feature("clk"), more='data_config { label_fields: "clk" }')
    assert [x.name for x in found.features] == ["cate"]
    assert {x.name for x in found.unmapped} == {"again", "clk"}


def test_the_command_writes_an_overlay_that_gives_the_features(tmp_path: Path, capsys: Any) -> None:
    config, output = tmp_path / "p.config", tmp_path / "f.yaml"
    bad = 'combo_feature { feature_name: "x" expression: ["user:a", "item:b"] }'
    config.write_text(f"feature_configs {{ {id_feature('item_id')} }} feature_configs {{ {bad} }}")
    assert main(["import", "torcheasyrec", str(config), str(output)]) == 0
    assert "not mapped: x (combo_feature)" in capsys.readouterr().out
    listed = yaml.safe_load(output.read_text())["data"]["init_args"]["features"]
    assert [FeatureConfig(**x) for x in listed] == [FeatureConfig("item_id", dim=16, pooling="sum")]
    before = output.read_bytes()
    assert main(["import", "torcheasyrec", str(config), str(output)]) == 2  # exists
    assert main(["import", "torcheasyrec", str(config), str(output), "--force", "--strict"]) == 1
    assert output.read_bytes() == before
    config.write_text(f"feature_configs {{ {bad} }}")
    assert main(["import", "torcheasyrec", str(config), str(tmp_path / "none.yaml")]) == 1
    config.write_text("feature_configs {")
    assert main(["import", "torcheasyrec", str(config), str(tmp_path / "none.yaml")]) == 2
    assert sorted(x.name for x in tmp_path.iterdir()) == ["f.yaml", "p.config"]


FIELDS = st.sampled_from(
    ["feature_name", "expression", "embedding_dim", "normalizer", "pooling", "value_dim", "zch", "features"]
)
VALUES = st.sampled_from(
    ['"a"', "3", "-1.5", "true", "{}", "[]", '["a", 1]', "{ zch_size: {} }", '"method=zscore,mean=x"']
)
KINDS = st.sampled_from(["id_feature", "raw_feature", "sequence_feature", "sequence_id_feature", "combo_feature"])


@given(st.lists(st.tuples(KINDS, st.lists(st.tuples(FIELDS, VALUES), max_size=4)), min_size=1, max_size=3))
def test_any_values_map_or_are_named(configs: list[tuple[str, list[tuple[str, str]]]]) -> None:
    bodies = [f"{kind} {{ " + " ".join(f"{k}: {v}" for k, v in fields) + " }" for kind, fields in configs]
    found = imported(*bodies)
    yaml.safe_load(found.to_yaml(source="x"))
