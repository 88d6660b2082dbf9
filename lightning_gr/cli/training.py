"""``fit``, ``validate``, ``test``, ``predict``: a thin LightningCLI that takes recipes by name."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]  # it comes with jsonargparse
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus
from typing_extensions import override

# Imported so that the help lists their classes and short class names work; none of them imports torchrec.
import lightning_gr.callbacks
import lightning_gr.data.datamodule
import lightning_gr.data.stream_datamodule
import lightning_gr.models
import lightning_gr.plugins  # noqa: F401
from lightning_gr import __version__
from lightning_gr._compat import child_processes
from lightning_gr.callbacks import InitFrom, ResumeCheckpoint
from lightning_gr.cli.config_trust import FLAG, Trust, is_denied
from lightning_gr.cli.demo_data import make_where_absent
from lightning_gr.cli.errors import USER_ERROR, UserError, one_line
from lightning_gr.cli.null_settings import refuse_null
from lightning_gr.cli.parse_errors import boil, boil_config
from lightning_gr.cli.quiet import quiet_library_noise
from lightning_gr.cli.recipes import resolve_config
from lightning_gr.substrate import fbgemm, version_of

_SECONDS_FOR_A_CHILD_TO_EXIT = 1.0
_FORGET = "replace_lists"
_ADAPT, _ADAPTS = "adapt", "adapt_in_predict"


def main(argv: Sequence[str]) -> int:
    """Parses, instantiates and runs; returns the exit code."""
    quiet_library_noise()
    GRCLI(args=list(argv))
    return 0


class RecipeAction(ActionConfigFile):
    """``--config``: a file, a recipe's name, or YAML itself; a file wins over a recipe of the same name."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        source = resolve_config(values)
        _forget_lists(cfg, source)
        _refuse_what_is_no_setting(source, str(values))
        try:
            super().__call__(parser, cfg, source, option_string)
        except (TypeError, ValueError, argparse.ArgumentError) as error:
            if is_denied(str(error)):
                raise  # Trust knows which file it was
            raise UserError(boil_config(str(error), str(values), parser)) from error


class ForgetLists(argparse.Action):
    """``--replace_lists KEY=VALUE``, which `with_lists_replaced` puts before ``--KEY VALUE``; nobody else gives it."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        key, _, source = values.partition("=")
        _forget_lists(cfg, source, key)


def with_lists_replaced(words: Sequence[str]) -> list[str]:
    """A command line in which a list that is given replaces the one before it, as one in a further file does."""
    found: list[str] = []
    for place, word in enumerate(words):
        if word.startswith("--") and word.partition("=")[0] != "--config":
            key, is_joined, value = word[2:].partition("=")
            if not is_joined:
                value = words[place + 1] if place + 1 < len(words) else ""
            holds_list = set("[{\n") & set(value) or value.endswith((".yaml", ".yml", ".json"))
            # --KEY+ appends, and a path is no list, whatever its file ends with.
            if holds_list and not key.endswith(("+", "path")) and not value.startswith("--"):
                found.append(f"--{_FORGET}={key}={value}")
        found.append(word)
    return found


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):
        return False  # longer than names may be


def _forget_lists(cfg: Any, source: str, key: str = "") -> None:
    """Lets a list in a file or value replace the one before it: jsonargparse would merge items of equal place and type.

    Args:
        cfg: the settings so far.
        source: a file, or YAML itself.
        key: the setting whose value it is; empty means all settings.
    """
    try:
        content = yaml.safe_load(Path(source).read_text(encoding="utf-8") if _is_file(source) else source)
    except (OSError, ValueError, yaml.YAMLError):
        return  # whoever parses it says why

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                walk(each, (*path, *str(name).split(".")))
        elif isinstance(value, list):
            _forget_list(cfg, path)

    walk(content, tuple(key.split(".")) if key else ())


def _refuse_what_is_no_setting(source: str, name: str) -> None:
    """Refuses what jsonargparse fails at without a word on the culprit.

    Args:
        source: a file, or YAML itself.
        name: as the user gave it.

    Raises:
        UserError: a configuration that names further ones, or has nothing where settings of its parts belong.
    """
    try:
        content = yaml.safe_load(Path(source).read_text(encoding="utf-8") if _is_file(source) else source)
    except (OSError, ValueError, yaml.YAMLError):
        return  # whoever parses it says why
    if not isinstance(content, dict):
        return
    if content.get("config") is not None:
        raise UserError(f"{name}: config={content['config']!r}: a configuration names no other; give each by --config")
    if "trainer" in content and not isinstance(content["trainer"], dict):
        raise UserError(f"{name}: trainer={content['trainer']!r}: expected settings of the Trainer; or leave it out")


def _forget_list(settings: Any, path: Sequence[str]) -> None:
    """Sets the list at a path to None; the path may leave out ``init_args``, as a command line may."""
    while len(path) > 1 or (path and path[0] not in settings):
        if path[0] in settings:
            settings, path = settings[path[0]], path[1:]
        elif "init_args" in settings:
            settings = settings["init_args"]
        else:
            return
        if not isinstance(settings, Namespace | dict):
            return
    if path and isinstance(settings[path[0]], list):
        settings[path[0]] = None


class GRCLI(LightningCLI):
    """LightningCLI with recipes by name, any module and datamodule by class path, and one-line errors.

    Args:
        args: the command line; None means this process's own.
        run: whether to run the subcommand; False only parses and instantiates.
    """

    def __init__(self, *, args: ArgsType = None, run: bool = True) -> None:
        words = sys.argv[1:] if args is None else args
        with Trust(words if isinstance(words, list) else []) as self._trust:
            super().__init__(
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"default_env": True, "env_prefix": "LIGHTNING_GR", "exit_on_error": False},
                # It would build the optimiser before configure_model has made the parameters.
                auto_configure_optimizers=False,
                args=with_lists_replaced(self._trust.words) if isinstance(words, list) else words,
                run=run,
            )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", _versions())
        kwargs.setdefault("exit_on_error", False)
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=RecipeAction,
            help="A recipe's name or a YAML file; may be repeated, the last wins.",
        )
        parser.add_argument(f"--{_FORGET}", action=ForgetLists, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return parser

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            # A corpus of predictions does not fit into memory; callbacks write them as they come.
            parser.set_defaults({"return_predictions": False})
            parser.add_argument(
                f"--{_ADAPT}",
                action="store_true",
                help="Adapts a model of meta learning to each task's support before its query is scored.",
            )
        # The others take it too, and do nothing with it: a configuration that fit has saved holds it.
        what = "A checkpoint whose weights training begins with; its step, epoch and optimisers are left out."
        shown = what if subcommand == "fit" else argparse.SUPPRESS
        parser.add_argument("--init_from", type=str | None, default=None, help=shown)
        # Trust takes it from the command line, so that no configuration can ask for it.
        parser.add_argument(
            FLAG,
            action="store_true",
            default=argparse.SUPPRESS,
            help="Lets a configuration that came with a checkpoint or an export name any class.",
        )
        return parser

    @override
    def before_instantiate_classes(self) -> None:
        path = self._get(self.config, "init_from") if self.subcommand == "fit" else None
        resumed = self._get(self.config, "ckpt_path")
        if path is not None and resumed is not None:
            raise UserError(
                f"init_from={path}: ckpt_path={resumed} brings weights of its own; leave out one of the two "
                "(--init_from null takes it back from a configuration)"
            )
        self._init_from = None if path is None else InitFrom(path=path)
        settings = self.config[self.subcommand] if self.subcommand else self.config
        if "weights_only" in settings and settings.weights_only is None:
            settings.weights_only = True  # Lightning would unpickle what comes from a URL
        if settings.get(_ADAPT):
            _let_adapt(settings)
        refuse_null(settings.as_dict())
        make_where_absent(settings.get("data.init_args.path"))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResumeCheckpoint):
                callback.trainer = trainer
        if self._init_from is not None:
            trainer.callbacks.insert(0, self._init_from)  # type: ignore[attr-defined]
        return trainer

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            if isinstance(args, list):
                # LightningCLI warns when it is given arguments beside sys.argv; here they are the same.
                self.config = parser.parse_args(args)
            else:
                super().parse_arguments(parser, args)
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            if (refused := self._trust.explained(str(error))) is not None:
                raise refused from error
            if not isinstance(error, argparse.ArgumentError):
                raise
            words = args if isinstance(args, list) else sys.argv[1:]
            known = getattr(self, "_subcommand_parsers", {})  # with run=False there are none
            used = next((known[word] for word in words if word in known), None)
            raise UserError(boil(str(error), used)) from error
        subcommand = self.config.get("subcommand")
        if subcommand is not None:
            settings = self.config[subcommand]
            self._trust.check_hyperparameters(settings.get("ckpt_path"), settings.as_dict())

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            children = child_processes(self.trainer)
            if one_line(error) is None and _a_child_has_reported(children):
                raise SystemExit(USER_ERROR) from None
            for child in children:
                child.send_signal(signal.SIGKILL)
            interrupted = self.trainer.state.status == TrainerStatus.INTERRUPTED
            if isinstance(error, SystemExit) and error.code == 1 and interrupted:
                raise KeyboardInterrupt from None
            raise


def _let_adapt(settings: Any) -> None:
    """Sets the model's `adapt_in_predict`, as ``predict --adapt`` asks.

    Raises:
        UserError: the model has no such setting.
    """
    if f"model.init_args.{_ADAPTS}" not in settings:
        raise UserError(
            f"--{_ADAPT}: {settings.get('model.class_path')} has no setting {_ADAPTS}, so it cannot adapt to a task; "
            "leave the flag out, or predict with a MetaRankingModule"
        )
    settings[f"model.init_args.{_ADAPTS}"] = True


def _a_child_has_reported(children: list[Any]) -> bool:
    """Whether a process that this one started has ended with a user's mistake, and so broke a collective here."""
    if not children:
        return False
    deadline = time.monotonic() + _SECONDS_FOR_A_CHILD_TO_EXIT
    while time.monotonic() < deadline:
        if any(child.poll() == USER_ERROR for child in children):
            return True
        time.sleep(0.05)
    return False


def _versions() -> list[str]:
    """The header of every saved configuration: what it was made with."""
    versions = [f"lightning_gr=={__version__}", f"lightning.pytorch=={pl.__version__}", f"torch=={torch.__version__}"]
    if (torchrec := version_of("torchrec")) is not None:
        versions.append(f"torchrec=={torchrec}")
    if (found := fbgemm()) is not None:
        versions.append("==".join(found))
    return versions
