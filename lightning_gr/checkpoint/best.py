"""The best checkpoint of a folder, as a process finds it that has not trained."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_gr.checkpoint.reader import complete_checkpoints
from lightning_gr.checkpoint.storage import Storage

BEST_LINK = "best.ckpt"


def best_checkpoint(folder: str | Path | Storage, *, callback: str, mode: str) -> str | None:
    """Where the best complete checkpoint of a folder is; the newest where none was rated, None without any.

    The link to it decides where the newest checkpoint's run has made it; else, and behind a URL, what the newest
    checkpoint knows of those before it.

    Args:
        folder: of the checkpoints, a path or a URL.
        callback: by which checkpoints keep what the callback knows that has rated them.
        mode: `min` or `max`: whether the smallest or the largest value is best.

    Raises:
        ValueError: the newest checkpoint is damaged.
    """
    storage = Storage(folder)
    found = {x.storage.name: x for x in complete_checkpoints(storage)}
    if not found:
        return None
    newest = next(iter(found.values()))
    saved = newest.meta().get("callbacks", {}).get(callback, {}).get("saved", {})
    known = {os.path.basename(path): score for path, score in saved.items()}
    if storage.is_link(BEST_LINK):
        linked = os.path.basename(os.path.realpath(storage.path_of(BEST_LINK)))
        # One that a run knows nothing of is that of a run before it in the same folder.
        if linked in found and (not known or linked in known or linked == newest.storage.name):
            return found[linked].storage.location
    rated = {name: score for name, score in known.items() if score is not None and name in found}
    if not rated:
        return newest.storage.location
    return found[(min if mode == "min" else max)(rated, key=lambda name: rated[name])].storage.location
