"""The command ``lightning-gr``: dispatch without torch, so that help and listings answer at once."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from lightning_gr.cli import errors

TRAINING = {
    "fit": "train a model",
    "validate": "evaluate it on the validation split",
    "test": "evaluate it on the test split",
    "predict": "write predictions",
}
TOOLS = {
    "recipes": "ls, show NAME, cp NAME DEST: the shipped configurations",
    "prepare": "PATH OUTPUT: an event log to an event store",
    "store": "check, info, index PATH: event stores",
    "table": "inspect, export, delta, import: dynamic embedding tables in a checkpoint",
    "checkpoint": "ls, verify, compact: checkpoints, each whole or refused",
    "resume-check": "--config RECIPE: a run that is killed and resumed ends as one that never stopped",
    "import": "meta-hstu, torcheasyrec: a model or features of another project, as ours",
    "export": "--config RECIPE --ckpt_path CHECKPOINT --output DIR: weights and tables for those who serve them",
    "compare": "RECIPE ...: train each with several seeds, test metrics with intervals",
    "verify": "RECIPE: does it reach the test metrics that its header expects? several seeds, an exit code",
    "plan": "--config RECIPE: balance, FLOPs, exchange and memory on 1 to 1,024 ranks, from the store alone",
    "mask": "--config RECIPE: which tokens see which in a batch, and leaks of the future",
    "report": "RUN ...: one page of training runs, beside each other",
    "demo": "train on two processes and show recommendations",
    "doctor": "what is installed, what fits together, what is missing",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    A user's mistake is one line on stderr and exit code 2; any other exception keeps its traceback.

    Args:
        argv: the words after ``lightning-gr``; None means this process's own. Lightning starts further processes by
            repeating this process's own command line, so several devices need None, torchrun or
            ``start_method: spawn``.
    """
    if argv is None and "" not in sys.path:
        # Classes of the user's own in the present folder, as under `python -m`; last, so that no file hides a library.
        sys.path.append("")
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write("lightning-gr: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        line = errors.one_line(error)
        if line is None:
            raise
        if errors.wants_traceback():
            import traceback

            traceback.print_exc()
        errors.report(line)
        return errors.USER_ERROR


def _dispatch(args: list[str]) -> int:
    command = args[0] if args else "--help"
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        from lightning_gr import __version__

        print(f"lightning-gr {__version__}")
        return 0
    if command == "recipes":
        from lightning_gr.cli import recipes

        return recipes.main(args[1:])
    if command == "prepare":
        from lightning_gr.cli import prepare

        return prepare.main(args[1:])
    if command == "store":
        from lightning_gr.cli import store

        return store.main(args[1:])
    if command == "table":
        from lightning_gr.cli import table

        return table.main(args[1:])
    if command == "checkpoint":
        from lightning_gr.cli import checkpoint

        return checkpoint.main(args[1:])
    if command == "resume-check":
        from lightning_gr.cli import resume_check

        return resume_check.main(args[1:])
    if command == "import":
        from lightning_gr.cli import importers

        return importers.main(args[1:])
    if command == "export":
        _check_configs(args)
        from lightning_gr.cli import export

        return export.main(args[1:])
    if command == "compare":
        from lightning_gr.cli import compare

        return compare.main(args[1:])
    if command == "verify":
        from lightning_gr.cli import verify

        return verify.main(args[1:])
    if command == "plan":
        _check_configs(args)
        from lightning_gr.cli import plan

        return plan.main(args[1:])
    if command == "mask":
        _check_configs(args)
        from lightning_gr.cli import mask

        return mask.main(args[1:])
    if command == "report":
        from lightning_gr.cli import report

        return report.main(args[1:])
    if command == "demo":
        from lightning_gr.cli import demo

        return demo.main(args[1:])
    if command == "doctor":
        from lightning_gr.cli import doctor

        return doctor.main(args[1:])
    if command in TRAINING or command.startswith("-"):
        _check_configs(args)
        from lightning_gr.cli import training

        return training.main(args)
    known = [*TRAINING, *TOOLS]
    near = difflib.get_close_matches(command, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    raise errors.UserError(f"{command}: no such command; {remedy}")


def _check_configs(args: list[str]) -> None:
    """Finds a missing file or recipe before the seconds that torch takes to load."""
    from lightning_gr.cli.recipes import resolve_config

    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word in ("-c", "--config") and following:
            resolve_config(following)
        elif word.startswith("--config="):
            resolve_config(word.partition("=")[2])


def _help() -> str:
    def listed(commands: dict[str, str]) -> str:
        return "\n".join(f"  {name:<14}{what}" for name, what in commands.items())

    return f"""usage: lightning-gr COMMAND [--config RECIPE_OR_FILE ...] [--setting VALUE ...]

Trains generative recommenders with TorchRec inside PyTorch Lightning.

training (a LightningCLI; `lightning-gr fit --help` lists the settings):
{listed(TRAINING)}

tools:
{listed(TOOLS)}

  -h, --help     this text
  -V, --version  the version

A recipe is taken by name and may be followed by more files and settings, the last one wins:
  lightning-gr fit --config hstu/tiny --data.init_args.path events.csv --trainer.max_epochs 3"""
