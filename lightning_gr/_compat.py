"""Every private name of Lightning, TorchRec, torch or jsonargparse that the project uses, each with its reason.

A test looks all of them up, so that an upgrade which moves one fails here and by name.
"""

from __future__ import annotations

import argparse
from typing import Any

PRIVATE_NAMES = {
    "lightning.pytorch.cli:LightningCLI._prepare_subcommand_parser": (
        "overridden: the only place where a default of a Trainer method's own argument (predict's return_predictions) "
        "can be set"
    ),
    "lightning.pytorch.cli:LightningCLI._run_subcommand": (
        "overridden: the only call that encloses a run, so that rank 0 can end the processes it started when it fails"
    ),
    "lightning.pytorch.strategies.launchers:_SubprocessScriptLauncher": (
        "its list of child processes (procs) is read to end them, and to see whether one has reported an error already"
    ),
    "argparse:ArgumentParser._option_string_actions": "read: the names of all options, to list near ones of a typo",
}
"""By ``module:qualified name``, why a private name is used."""


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """The spellings of all options of a parser."""
    return list(parser._option_string_actions)


def child_processes(trainer: Any) -> list[Any]:
    """The processes that this one's Trainer has started, as ``subprocess.Popen`` objects."""
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    launcher = trainer.strategy.launcher
    return list(launcher.procs) if isinstance(launcher, _SubprocessScriptLauncher) else []
