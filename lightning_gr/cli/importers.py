"""``lightning-gr import meta-hstu|torcheasyrec``: what other projects have trained or configured, as ours."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.importers.meta_hstu import MetaHSTU

NOTHING_MAPS = 1
"""Exit code where no feature maps, or with ``--strict`` where some does not."""

_TABLE = "tables.embeddings.item.weight"
_WIDTH_OF_KERNELS = 4


def main(argv: Sequence[str]) -> int:
    """Runs the subcommand and returns its exit code."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lightning-gr import", description="What other projects have trained or configured, as ours.")
    commands = parser.add_subparsers(dest="command", metavar="meta-hstu|torcheasyrec", required=True)
    what = "a checkpoint of Meta's research HSTU as an export with a recipe, with equal logits"
    meta = commands.add_parser("meta-hstu", help=what, description=what)
    meta.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of Meta's trainer, or a state dict")
    meta.add_argument("output", metavar="OUTPUT", help="an empty directory, or one that is not there")
    meta.add_argument("--config", metavar="FILE.gin", help="the gin file of the run: checked, and used for the recipe")
    meta.add_argument("--num_heads", metavar="N", type=int, help="heads of a layer; without a gin file that says so")
    meta.add_argument(
        "--data",
        metavar="PATH",
        help="the store or log that the model will see: items are put in its order by their raw ids; without it row i "
        "is item i + 1",
    )
    meta.set_defaults(run=_meta_hstu)
    what = "feature configs of TorchEasyRec as FeatureConfigs, and what does not map"
    easy = commands.add_parser("torcheasyrec", help=what, description=what)
    easy.add_argument("config", metavar="PIPELINE.config", help="a pipeline configuration")
    easy.add_argument("output", metavar="OUTPUT.yaml", nargs="?", help="where features go; without it they are printed")
    easy.add_argument("--strict", action="store_true", help="exit code 1 where any feature does not map")
    easy.add_argument("--force", action="store_true", help="overwrite OUTPUT")
    easy.set_defaults(run=_torcheasyrec)
    return parser


# ---- Meta's HSTU ---------------------------------------------------------------------------------------------------


def _meta_hstu(args: argparse.Namespace) -> int:
    from lightning_gr.checkpoint.storage import Storage
    from lightning_gr.importers.gin_settings import read_gin
    from lightning_gr.importers.meta_hstu import convert, read_state_dict

    output = Storage(args.output)
    if output.is_file() or output.names():
        raise UserError(f"import: {args.output}: exists and is not empty; give another directory")
    settings = {} if args.config is None else read_gin(args.config)
    num_heads = settings.get("hstu_encoder.num_heads", 1 if settings else None)
    if args.num_heads is not None:
        if settings and num_heads != args.num_heads:
            raise UserError(f"--num_heads {args.num_heads}: {args.config} says {num_heads}; leave one of them out")
        num_heads = args.num_heads
    if num_heads is None:
        raise UserError("--num_heads: missing, and the weights do not tell; give it, or the run's gin file as --config")
    model = convert(read_state_dict(args.checkpoint), num_heads=num_heads, settings=settings)
    items_ID, vocabulary = model.items_ID, None
    if args.data is not None:
        items_ID, vocabulary = _in_order_of(args.data, items_ID)
    _write_model(output, args, model, items_ID, vocabulary, settings)
    return 0


def _in_order_of(path: str, items_ID: Tensor) -> tuple[Tensor, str | None]:
    """Item rows in the order of a log's vocabulary, and its fingerprint."""
    import torch

    from lightning_gr.data import SequenceDataModule
    from lightning_gr.models.corpus import item_vocabulary

    data = SequenceDataModule(path=path)
    data.setup()
    rows = []
    for raw in data.item_ids:
        try:
            number = int(raw)
        except (TypeError, ValueError):
            number = 0
        if not 1 <= number <= len(items_ID):
            raise UserError(
                f"--data {path}: item {raw!r} is none of the checkpoint's 1 ... {len(items_ID)}; write the log with "
                "the item ids of the run, or leave --data out"
            )
        rows.append(number - 1)
    if left := len(items_ID) - len(rows):
        print(f"import: {left:,} of the checkpoint's {len(items_ID):,} items are not in {path} and are left out")
    return items_ID[torch.tensor(rows, dtype=torch.int64)], item_vocabulary(data)


def _write_model(
    output: Storage,
    args: argparse.Namespace,
    model: MetaHSTU,
    items_ID: Tensor,
    vocabulary: str | None,
    settings: dict[str, Any],
) -> None:
    import lightning

    encoder = model.encoder
    weights = {f"encoder.{name}": value.float() for name, value in model.encoder_weights.items()}
    meta = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": lightning.__version__}
    meta |= {"item_vocabulary": vocabulary}
    recipe = _recipe(args, model, settings)
    if encoder["dim"] % _WIDTH_OF_KERNELS == 0:
        checkpoint = _write_export(output, args.checkpoint, recipe, meta, weights, items_ID.float())
    else:
        checkpoint = _write_file(output, recipe, {**meta, "state_dict": {**weights, _TABLE: items_ID.float()}})
        print(
            f"import: kernels of sharded tables take widths that {_WIDTH_OF_KERNELS} divides, and this one is "
            f"{encoder['dim']}: the recipe trains on one device, unsharded, and {checkpoint} is a file of Lightning"
        )
    print(
        f"wrote {output}: {encoder['num_layers']} layers, {encoder['num_heads']} heads, width {encoder['dim']}, "
        f"{len(items_ID):,} items"
    )
    order = "rows are in the order of the data" if vocabulary else "row i is item i + 1; --data puts rows in order"
    print(f"import: {order}")
    given = settings.get("train_fn.dropout_rate", encoder["dropout"])
    if given != encoder["dropout"]:
        sys.stderr.write(
            f"import: train_fn.dropout_rate={given}: ours has one rate, so the input's is {encoder['dropout']} too, "
            "the rate of the layers; logits are not concerned\n"
        )
    print(f"  lightning-gr predict --config {output}/config.yaml --ckpt_path {checkpoint}")
    print(f"  lightning-gr fit --config {output}/config.yaml --init_from {checkpoint}")


def _write_export(
    output: Storage, source: str, recipe: str, meta: dict[str, Any], weights: dict[str, Tensor], items_ID: Tensor
) -> str:
    import hashlib

    import torch

    from lightning_gr import __version__
    from lightning_gr.checkpoint.export_format import ExportInfo
    from lightning_gr.checkpoint.export_writer import ExportWriter

    digest = hashlib.sha256()
    with open(source, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    info = ExportInfo(
        checkpoint=os.path.basename(source),
        checkpoint_id=digest.hexdigest(),
        step=0,
        epoch=0,
        versions={"lightning_gr": __version__, "torch": torch.__version__},
    )
    with ExportWriter(output, info, tables="parquet") as writer:
        writer.add_config(recipe)
        writer.add_module(meta)
        writer.add_weights(weights)
        writer.add_static_table(_TABLE, items_ID)
    return str(output)


def _write_file(output: Storage, recipe: str, checkpoint: dict[str, Any]) -> str:
    """A checkpoint of Lightning and the recipe in a new directory, whole or not at all."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({**checkpoint, "state_dict": {name: x.clone() for name, x in checkpoint["state_dict"].items()}}, buffer)
    was_there = output.is_directory()
    try:
        output.publish("config.yaml", recipe.encode())
        with output.create("model.ckpt") as file:
            file.write(buffer.getvalue())
    except BaseException:
        output.remove_all()
        if was_there:
            output.make()
        raise
    return output.path_of("model.ckpt")


def _recipe(args: argparse.Namespace, model: MetaHSTU, settings: dict[str, Any]) -> str:
    import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse

    def given(name: str, default: Any) -> Any:
        return settings.get(f"train_fn.{name}", default)

    longest = model.encoder["max_length"]
    sharded = model.encoder["dim"] % _WIDTH_OF_KERNELS == 0
    strategy: Any = "auto"
    if sharded:
        init_args = {"sharding": "row_wise", "sparse_lr": 0.03}
        strategy = {"class_path": "lightning_gr.plugins.SequenceBalancedStrategy", "init_args": init_args}
    optimizer = {"lr": given("learning_rate", 1e-3), "betas": [0.9, 0.98], "weight_decay": given("weight_decay", 0.0)}
    loss = {"BCELoss": "bce"}.get(given("loss_module", "SampledSoftmaxLoss"), "sampled_softmax")
    init_args = {
        "loss": loss,
        "negatives": "in_batch" if given("sampling_strategy", "local") == "in-batch" else "uniform",
        "num_negatives": given("num_negatives", 128),
        "similarity": "cosine",
        "temperature": given("temperature", 0.05),
        "top_k": [10],
        "encoder": {"class_path": "lightning_gr.layers.HSTUEncoder", "init_args": model.encoder},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": optimizer},
    }
    recipe = {
        "seed_everything": 42,
        "trainer": {
            "accelerator": "auto",
            "devices": 1,
            "strategy": strategy,
            "max_epochs": 10,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning_gr.callbacks.GRProgressBar"}],
        },
        "model": {"class_path": "lightning_gr.models.RetrievalModule", "init_args": init_args},
        "data": {
            "class_path": "lightning_gr.data.SequenceDataModule",
            "init_args": {
                "path": "events.csv" if args.data is None else os.path.abspath(args.data),
                "max_length": min(given("max_sequence_length", longest), longest),
            },
        },
    }
    header = f"# Meta's research HSTU, imported from {os.path.basename(args.checkpoint)}\n"
    return header + str(yaml.safe_dump(recipe, sort_keys=False))


# ---- TorchEasyRec --------------------------------------------------------------------------------------------------


def _torcheasyrec(args: argparse.Namespace) -> int:
    from lightning_gr.importers.torcheasyrec import read_features

    if args.output is not None:
        _check_free(Path(args.output), force=args.force)
    found = read_features(args.config)
    text = found.to_yaml(source=os.path.basename(args.config))
    said = sys.stderr if args.output is None else sys.stdout
    for feature in found.unmapped:
        said.write(f"not mapped: {feature.name} ({feature.kind}): {feature.reason}\n")
    for note in found.notes:
        said.write(f"note: {note}\n")
    said.write(f"import: {len(found.features)} features map, {len(found.unmapped)} do not\n")
    if not found.features:
        sys.stderr.write(f"import: {args.config}: no feature maps, so nothing is written\n")
        return NOTHING_MAPS
    if args.output is None:
        print(text, end="")
    else:
        _write_text(Path(args.output), text)
        print(f"wrote {args.output}")
    return NOTHING_MAPS if args.strict and found.unmapped else 0


def _check_free(output: Path, *, force: bool) -> None:
    if not output.parent.is_dir():
        raise UserError(f"import: {output.parent}: no such folder; make it first")
    if output.is_dir() or (output.exists() and not force):
        raise UserError(f"import: {output}: exists; choose another name or add --force")


def _write_text(output: Path, text: str) -> None:
    """Writes under another name first, so that the file is whole or untouched."""
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise
