"""``lightning-gr report``: one page of one or several training runs, that opens anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_gr.cli.errors import Parser, UserError


def main(argv: Sequence[str]) -> int:
    """Writes the page and returns the exit code."""
    args = _parser().parse_args(argv)
    if args.output.is_dir():
        raise UserError(f"--output {args.output}: is a folder; give a file, as {args.output / 'report.html'}")
    if len({folder.resolve() for folder in args.runs}) < len(args.runs):
        raise UserError(f"{', '.join(map(str, args.runs))}: a run is there twice; name every run once")

    from lightning_gr.report.page import write_page
    from lightning_gr.report.run import read_run

    runs = [read_run(folder) for folder in args.runs]
    names = [run.name for run in runs]
    for run, folder in zip(runs, args.runs, strict=True):
        if names.count(run.name) > 1:
            run.name = str(folder)
    write_page(runs, args.output)
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{args.output}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="lightning-gr report", description="Shows training runs, several beside each other.")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folder of a run: with report/run.jsonl (ReportCallback), with run.jsonl, or with metrics.csv (CSVLogger)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (default report.html)"
    )
    return parser
