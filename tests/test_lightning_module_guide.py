"""docs/lightning-module.md: its files are run as they stand, and what it says of them is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_gr.data.synthetic import write_synthetic_log
from tests.guide_blocks import blocks_of, commands_of, files_of, words_of
from tests.test_readme import run

FILES, BLOCKS = files_of("lightning-module.md"), blocks_of("lightning-module.md")
FRAGMENTS = [text for language, text in BLOCKS if language == "python" and not re.match(r"# [\w.]+\.py\n", text)]
LAST = 'print(f"weights {model.head.weight.double().sum().item():.17g}")'
pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def with_digest(text: str) -> str:
    """A script that ends by printing what it has learned."""
    call = re.search(r"^( *)trainer\.fit\(Visits\(\)(.*)\)$", text, re.M)
    assert call is not None
    indent = call[1]
    lines = ["model = Visits()", f"trainer.fit(model{call[2]})", "if trainer.is_global_zero:", f"    {LAST}"]
    return text.replace(call[0], "\n".join(indent + line for line in lines))


def digest(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(with_digest(text))
    (found,) = re.findall(r"^weights (\S+)$", run(words_of("python script.py"), folder), re.M)
    return found


def dynamic(text: str) -> str:
    """sharded.py with the line of section 4."""
    (line,) = [x for x in FRAGMENTS if "DynamicTables(" in x]
    text = text.replace("self.tables = embedding_collection([item])", line.strip())
    return text.replace(
        "from lightning_gr.embeddings import embedding_collection",
        "from lightning_gr.embeddings.dynamic import DynamicTables, TablePolicy",
    )


def with_own_loader(text: str) -> str:
    """sharded.py with the loader of section 6."""
    (hook,) = [x for x in FRAGMENTS if x.startswith("def train_dataloader")]
    hook = "".join(f"    {line}\n" for line in hook.splitlines())
    text = re.sub(r"^    loader = .*\n", "", text, flags=re.M)
    text = text.replace("Visits(), loader, ckpt_path", "Visits(), ckpt_path")
    text = text.replace("    def configure_optimizers", f"{hook}\n    def configure_optimizers")
    return text.replace("from visits import", "from loader import ResumableLoader\nfrom visits import")


def test_the_embedding_becomes_sharded_rows(folder: Path) -> None:
    said = run(words_of("python sharded.py"), folder)
    assert "ShardedEmbeddingCollection" in said
    assert "averaged rank by rank" not in said, "loss_sums make the gradient exact"
    assert "was given" not in said, "the optimiser has no shards"
    assert (folder / "checkpoints/last.ckpt").exists()


def test_sequence_batches_are_balanced(folder: Path) -> None:
    (folder / "balanced.py").write_text(FILES["balanced.py"].replace("max_epochs=3", "max_epochs=1"))
    said = run(words_of("python balanced.py"), folder)
    assert re.search(r"MFU [\d.]+%  imbalance 1\.0", said)
    assert "has no flops" not in said


def test_an_encoder_of_the_folder_trains_in_a_recipe(folder: Path) -> None:
    write_synthetic_log(folder / "events.csv", num_users=60, num_items=30, mean_length=8, max_length=15)
    (line,) = commands_of("lightning-module.md")
    said = run([*words_of(line), "--trainer.max_epochs", "1", "--trainer.devices", "1"], folder)
    assert re.search(r"train/loss [\d.]+", said)


def test_a_run_in_two_parts_ends_with_the_weights_of_one_in_one(folder: Path) -> None:
    text = (
        with_own_loader(FILES["sharded.py"])
        .replace("devices=2", "devices=1")
        .replace("make_visits()", "make_visits(640)")
    )
    whole = digest(folder, text)
    (folder / "checkpoints").rename(folder / "whole")
    first = text.replace("max_epochs=2", "max_steps=13")
    assert first != text
    assert digest(folder, first) != whole
    assert digest(folder, text) == whole


@pytest.mark.long
def test_what_is_migrated_from_runs(folder: Path) -> None:
    # On one process: Lightning's own ddp does not end a process that was forked after the imports.
    (folder / "script.py").write_text(FILES["plain.py"].replace('devices=2, strategy="ddp"', "devices=1"))
    assert "max_epochs=2` reached" in run(words_of("python script.py"), folder)


@pytest.mark.long
def test_a_bag_collection_is_sharded(folder: Path) -> None:
    assert "ShardedEmbeddingBagCollection" in run(words_of("python bags.py"), folder)


@pytest.mark.long
def test_dynamic_tables_are_one_line(folder: Path) -> None:
    text = dynamic(FILES["sharded.py"])
    assert text != FILES["sharded.py"]
    (folder / "script.py").write_text(text)
    assert "ShardedDynamic" in run(words_of("python script.py"), folder)
