"""``lightning-gr mask``: which tokens of a real batch see which, printed or plotted, and looked through for leaks.

Shape suffixes: T tokens of all sequences together, Q tokens of one sequence as rows, K as columns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_gr.batch import SequenceBatch
    from lightning_gr.ops.interval_mask import IntervalMask

LEAKS = 1
"""Exit code where the mask shows what it must not."""

LETTERS = "csrx"
"""One for each kind: contextual, static, real-time, candidate."""

_COLORS = ("#7570b3", "#1b9e77", "#2c7fb8", "#d95f02")
_MOST_ROWS, _MOST_SPACED = 48, 24
_PICTURE_WIDTH, _PICTURE_HEIGHT = 72, 36
_LEAKS_SHOWN = 10
_FORMATS = (".png", ".pdf", ".svg")
_SHADES = " ░▒▓█"
_EARLIEST_DATE, _LATEST_DATE = 10**8, 2**33


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code: 1 where the mask leaks."""
    args, settings = _parser().parse_known_args(argv)
    if not any(word.partition("=")[0] in ("-c", "--config", "--model") for word in settings):
        raise UserError("mask: --config: missing; name a recipe or a file (lightning-gr recipes ls)")
    if args.plot is not None and args.plot.suffix not in _FORMATS:
        raise UserError(f"--plot {args.plot}: no such format; give a file that ends in {', '.join(_FORMATS)}")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {args.plot}: no such folder; make it first")
    view = _view(settings, args.split)
    leaks = view.leaks()
    index = args.sequence
    if index is None:
        full = (i for i, tokens in enumerate(view.batch.layout.lengths_B.tolist()) if tokens)
        index = leaks[0].sequence if leaks else next(full, 0)
    if not 0 <= index < view.batch.num_sequences:
        raise UserError(f"--sequence {index}: the batch has the sequences 0 ... {view.batch.num_sequences - 1}")
    print("\n".join(_described(view, index)))
    if args.plot is not None:
        _plot(view, index, args.plot)
        print(f"plotted to {args.plot}")
    else:
        print()
        print("\n".join(_rows(view, index)))
    print()
    for leak in leaks[:_LEAKS_SHOWN]:
        print(f"leak: {leak}")
    if len(leaks) > _LEAKS_SHOWN:
        print(f"... and {len(leaks) - _LEAKS_SHOWN} more leaks")
    if not leaks:
        print(f"no leak in the batch's {view.batch.num_sequences} sequences")
    return LEAKS if leaks else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-gr mask",
        usage="lightning-gr mask --config RECIPE [--setting VALUE ...] [--split SPLIT] [--sequence N] [--plot FILE]",
        description="Takes the first batch of a split as `fit` does and shows the attention mask of one sequence: "
        "which columns each row sees. Looks through the whole batch for rows that see a later event or another "
        "candidate, and exits with 1 if there are any. Settings are those of `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="train", help="default train")
    parser.add_argument(
        "--sequence",
        type=int,
        metavar="N",
        help="which sequence of the batch; default the first, or the first with a leak",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it to this PNG, PDF or SVG instead")
    return parser


# ---- the batch ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """A batch and what the model's attention is told of it."""

    title: str
    batch: SequenceBatch
    mask: IntervalMask
    times_T: Tensor | None
    request_times_T: Tensor | None
    groups_T: Tensor | None
    next_event: bool

    def leaks(self) -> list[Any]:
        from lightning_gr.ops.mask_lint import mask_leaks

        return mask_leaks(
            self.mask,
            self.batch.layout,
            self.batch.token_counts_B4,
            next_event=self.next_event,
            times_T=self.times_T,
            request_times_T=self.request_times_T,
            groups_T=self.groups_T,
        )

    def of_sequence(self, index: int) -> tuple[IntervalMask, Tensor, Tensor, list[int] | None]:
        """Its mask alone, which column each row sees, the tokens' kinds and their times."""
        from lightning_gr.ops.mask_lint import one_sequence

        alone, layout = one_sequence(self.mask, self.batch.layout, index)
        own = slice(*self.batch.layout.on_host().offsets_B1[index : index + 2].tolist())
        times = None if self.times_T is None else self.times_T[own].tolist()
        return alone, alone.visible(layout, layout)[0], self.batch.kind_T[own], times


def _view(settings: Sequence[str], split: str) -> _View:
    """Builds model and data as `fit` does, and takes the split's first batch."""
    import logging

    from lightning_gr.cli.quiet import quiet_library_noise

    quiet_library_noise()
    from jsonargparse import Namespace
    from lightning.pytorch.trainer.states import TrainerFn
    from typing_extensions import override

    from lightning_gr.batch import SequenceBatch, TokenKind
    from lightning_gr.cli.training import GRCLI

    # What Lightning tells of seeds, devices and processes is not about the mask.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Built(GRCLI):
        """A `fit` that stops when all is built, on one process of whatever machine this is."""

        @override
        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            # Loggers, callbacks and strategies are not asked for a mask, and may need what this machine has not.
            here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
            unasked = {"logger": False, "callbacks": None, "plugins": None, "profiler": None}
            self.config.fit.trainer.update(Namespace(here | unasked))

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    built = Built(args=["fit", *settings])
    inputs_of = getattr(built.model, "attention_inputs", None)
    if inputs_of is None:
        raise UserError(
            f"model: {type(built.model).__name__} has no attention_inputs(batch) to tell its mask; see docs/masks.md"
        )
    if built.datamodule is None:
        raise UserError("data: missing; the mask is shown for a batch of a datamodule")
    built.datamodule.prepare_data()
    built.datamodule.setup(TrainerFn.TESTING if split == "test" else TrainerFn.FITTING)
    batch = next(iter(getattr(built.datamodule, f"{split}_dataloader")()), None)
    if not isinstance(batch, SequenceBatch):
        raise UserError(f"--split {split}: expected SequenceBatch batches, got {type(batch).__name__}")
    # Some models have another mask while they are trained.
    built.model.train(split == "train")
    inputs = inputs_of(batch)
    groups_of = getattr(built.model, "candidate_groups", None)
    asked = [batch.kind_T[labels.tokens_N] for labels in batch.labels.values()]
    config = " ".join(
        value for word, value in zip(settings, [*settings[1:], ""], strict=True) if word in ("-c", "--config")
    )
    return _View(
        title=f"{config or type(built.model).__name__}, first {split} batch",
        batch=batch,
        mask=inputs["mask"],
        times_T=inputs.get("times_T"),
        request_times_T=inputs.get("request_times_T"),
        groups_T=None if groups_of is None else groups_of(batch),
        next_event=any(bool((kinds != TokenKind.CANDIDATE).any()) for kinds in asked),
    )


# ---- as text -----------------------------------------------------------------------------------------------------


def picture(seen_QK: Tensor, kind_Q: Tensor) -> list[str]:
    """A mask in characters, one line a row under a line of the columns' kinds; see `LETTERS`."""
    letters = [LETTERS[kind] for kind in kind_Q.tolist()]
    gap = " " if len(letters) <= _MOST_SPACED else ""
    lines = ["  " + gap.join(letters)]
    for letter, row in zip(letters, seen_QK.tolist(), strict=True):
        lines.append(f"{letter} {gap.join('■' if seen else '·' for seen in row)}")
    return lines


def _described(view: _View, index: int) -> list[str]:
    """What the batch and the sequence hold."""
    from lightning_gr.ops.mask_lint import KINDS

    batch, host = view.batch, view.batch.layout.on_host()
    num_visible = view.mask.num_visible_pairs(batch.layout, batch.layout)
    total = int((host.lengths_B**2).sum())
    counts = batch.token_counts_B4[index].tolist()
    kinds = ", ".join(f"{n} {name} ({x})" for n, name, x in zip(counts, KINDS, LETTERS, strict=True) if n)
    seen = int(view.of_sequence(index)[1].sum()) if counts else 0
    return [
        f"{view.title}: {batch.num_sequences} sequences, {batch.num_tokens:,} tokens, "
        f"{num_visible:,} pairs seen of {total:,} ({num_visible / max(total, 1):.0%})",
        f"sequence {index}: {sum(counts)} tokens: {kinds or 'padding'}; {seen:,} pairs seen",
    ]


def _rows(view: _View, index: int) -> list[str]:
    """The mask of a sequence: a line a row, or a picture of blocks of tokens where there are many."""
    alone, seen_QK, kind_Q, times = view.of_sequence(index)
    if len(kind_Q) > _MOST_ROWS:
        return _blocks(seen_QK, kind_Q)
    head, *lines = picture(seen_QK, kind_Q)
    width = len(str(max(len(kind_Q) - 1, 0)))
    bounds = zip(*(x.tolist() for x in (alone.a_T, alone.b_T, alone.c_T, alone.self_T)), strict=True)
    columns = [["sees", *(_ranges(*bound) for bound in bounds)]]
    if times is not None:
        columns.append(["time", *_times(times, kind_Q.tolist())])
    if view.request_times_T is not None and times is not None:
        begin = int(view.batch.layout.lengths_B[:index].sum())
        requests = view.request_times_T[begin : begin + len(times)].tolist()
        columns.append(["asks at", *_times(requests, kind_Q.tolist())])
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    notes = ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
    numbers = [" " * width, *(str(i).rjust(width) for i in range(len(lines)))]
    rows = zip(numbers, [head, *lines], notes, strict=True)
    return [f"{number} {row}  {note}".rstrip() for number, row, note in rows]


def _ranges(a: int, b: int, c: int, own: bool) -> str:
    """The columns that a row sees, as they are given to the kernels."""
    parts = [f"[{begin},{end})" for begin, end in ((0, a), (b, c)) if begin < end]
    return " ".join([*parts, *["self"] * own]) or "nothing"


def _times(times: list[int], kinds: list[int]) -> list[str]:
    """Seconds as dates, where they can be such; contextual tokens have none."""
    of_events = [time for time, kind in zip(times, kinds, strict=True) if kind]
    dates = all(_EARLIEST_DATE < time < _LATEST_DATE for time in of_events)

    def said(time: int) -> str:
        return f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M:%S}" if dates else str(time)

    return [said(time) if kind else "-" for time, kind in zip(times, kinds, strict=True)]


def _blocks(seen_QK: Tensor, kind_Q: Tensor) -> list[str]:
    """The mask of a long sequence: each character is a block of pairs, the darker the more of them are seen."""
    import torch

    total = len(kind_Q)
    row_edges = torch.linspace(0, total, min(_PICTURE_HEIGHT, total) + 1).long().tolist()
    column_edges = torch.linspace(0, total, min(_PICTURE_WIDTH, total) + 1).long().tolist()
    width = len(str(total))
    letters = [LETTERS[kind] for kind in kind_Q.tolist()]
    lines = [" " * (2 * width + 4) + "".join(letters[edge] for edge in column_edges[:-1])]
    for top, bottom in zip(row_edges, row_edges[1:], strict=False):
        shares = [
            float(seen_QK[top:bottom, left:right].float().mean())
            for left, right in zip(column_edges, column_edges[1:], strict=False)
        ]
        # Rounded up, so that one pair of a block can be seen, and only a full block is black.
        cells = "".join(_SHADES[4 if share == 1 else math.ceil(3 * share)] for share in shares)
        lines.append(f"{top:>{width}}-{bottom - 1:<{width}} {letters[top]} {cells}".rstrip())
    lines.append(
        f"each character stands for {total / (len(row_edges) - 1):.1f} x {total / (len(column_edges) - 1):.1f} pairs"
    )
    return lines


# ---- as a plot ---------------------------------------------------------------------------------------------------


def _plot(view: _View, index: int, file: Path) -> None:
    import numpy as np
    from matplotlib import ticker
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from lightning_gr.ops.mask_lint import KINDS

    _, seen_QK, kind_Q, _ = view.of_sequence(index)
    total, kinds = len(kind_Q), kind_Q.numpy()
    # 0 for what is not seen, then the kind of the column.
    shown = np.where(seen_QK.numpy(), kinds[None, :] + 1, 0)
    colors = ListedColormap(["#f4f4f4", *_COLORS])
    figure = Figure(figsize=(8.0, 8.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shown, cmap=colors, vmin=0, vmax=4, interpolation="nearest", aspect="equal")
    for edge in np.flatnonzero(np.diff(kinds)) + 0.5:
        axes.axhline(edge, color="black", linewidth=0.8)
        axes.axvline(edge, color="black", linewidth=0.8)
    if total <= 2 * _MOST_ROWS:
        axes.set_xticks(np.arange(total + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(total + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(integer=True, nbins=12))
    leaks = [leak for leak in view.leaks() if leak.sequence == index]
    for leak in leaks:
        axes.plot(leak.column, leak.row, "x", color="red", markersize=10, markeredgewidth=2)
    axes.set_xlabel("column: token that is seen")
    axes.set_ylabel("row: token that sees")
    found = f"; {sum(leak.num_pairs for leak in leaks)} leaks, the first of each sort crossed" if leaks else ""
    axes.set_title(f"{view.title}\nsequence {index}, {total} tokens{found}", fontsize=11)
    names = [
        Patch(color=color, label=name)
        for kind, (color, name) in enumerate(zip(_COLORS, KINDS, strict=True))
        if kind in kinds
    ]
    figure.legend(handles=names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, dpi=150)
