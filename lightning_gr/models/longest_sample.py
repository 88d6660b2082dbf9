"""Refuses, before the first batch, data whose samples are longer than a network takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_gr.data.longest_sample import LongestSample

_PARTS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


def refuse_longer_samples(module: pl.LightningModule, *, setting: str, max_length: int | None, stage: str) -> None:
    """Asks the Trainer's datamodule for its longest sample, where it has a method ``longest_sample(part, above=...)``.

    `fit` looks at training and validation, and warns of a longer sample of the test part.

    Args:
        module: the module that is being set up.
        setting: how messages call the limit.
        max_length: most positions of a sample that the network takes; None means that it has no limit.
        stage: Lightning's stage.

    Raises:
        MisconfigurationException: a sample is longer; the message has both lengths and what changes them.
    """
    try:
        datamodule = getattr(module.trainer, "datamodule", None)
    except RuntimeError:
        return  # the module is used without a Trainer
    longest_sample = getattr(datamodule, "longest_sample", None)
    if max_length is None or longest_sample is None:
        return

    taken = _PARTS.get(stage, ())
    for part in (*taken, *(["test"] if stage == "fit" else [])):
        sample: LongestSample | None = longest_sample(part, above=max_length)
        if sample is None:
            continue
        said = f"{setting}={max_length}: {sample.made_of}; raise it to at least {sample.positions}, or {sample.remedy}"
        skipped = part == "val" and not getattr(module.trainer, "limit_val_batches", 1.0)
        if sample.known and part in taken and not skipped:
            raise MisconfigurationException(said)
        rank_zero_warn(f"{said}; {'the test will refuse it' if sample.known else 'a longer one stops the run'}")
        return
