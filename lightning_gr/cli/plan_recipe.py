"""What a configuration says of a run, with its model and plan built on this machine and no row of any table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import UserError

if TYPE_CHECKING:
    from lightning_gr.balancing.cost import SequenceCost
    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.data.plan import GlobalBatchPlan


@dataclass(frozen=True)
class Recipe:
    """What a configuration says, built on this machine without any process group or table rows.

    Args:
        title: the configuration's name.
        model: after `configure_model`, its static tables without memory.
        plan: of the training split.
        ranks: devices times nodes.
        ranks_known: whether the configuration names the devices.
        accumulate: global batches of an optimiser step.
        bf16: whether under bf16 autocast.
        balancing: settings of the strategy, or its defaults.
        sparse_optimizer: of tables without their own.
        sharding: how static tables are cut.
        table_groups: groups of ranks that hold a full set of dynamic tables each.
        other_strategy: the strategy's name where it is none of ours.
        cardinalities: by table, how many ids the data has.
        keep: what must stay alive.
    """

    title: str
    model: Any
    plan: GlobalBatchPlan
    ranks: int
    ranks_known: bool
    accumulate: int
    bf16: bool
    balancing: Balancing
    sparse_optimizer: str
    sharding: str
    table_groups: int
    other_strategy: str | None
    cardinalities: dict[str, int]
    keep: Any

    @property
    def cost(self) -> SequenceCost:
        """By which sequences are balanced."""
        from lightning_gr.balancing.cost import TOKENS, SequenceCost, cost_of

        if isinstance(self.balancing.cost, SequenceCost):
            return self.balancing.cost
        return TOKENS if self.balancing.cost == "tokens" else cost_of(self.model)


class _Recorded:
    """Settings of dynamic tables that note the configs which a collection is made from."""

    def __init__(self, settings: Any) -> None:
        self._settings, self.cardinalities = settings, dict[str, int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._settings, name)

    def collection(self, tables: Sequence[Any], **settings: Any) -> Any:
        self.cardinalities |= {table.name: table.num_embeddings for table in tables if table.num_embeddings > 1}
        return self._settings.collection(tables, **settings)


def build(settings: Sequence[str]) -> Recipe:
    """Builds model and data as `fit` does, on one process of whatever machine this is.

    Raises:
        UserError: there is no plan for these data, by name.
    """
    import logging

    from lightning_gr.cli.quiet import quiet_library_noise

    quiet_library_noise()
    from jsonargparse import Namespace
    from lightning.pytorch.trainer.states import TrainerFn
    from typing_extensions import override

    from lightning_gr.balancing.settings import Balancing
    from lightning_gr.cli.training import GRCLI
    from lightning_gr.data.stream_datamodule import StreamDataModule
    from lightning_gr.embeddings.static_tables import deferred_tables
    from lightning_gr.plugins import SequenceBalancedStrategy

    for name in ("lightning.pytorch", "lightning.fabric", "lightning_gr"):
        logging.getLogger(name).setLevel(logging.WARNING)

    class Built(GRCLI):
        """A `fit` that stops when all is built."""

        @override
        def before_instantiate_classes(self) -> None:
            super().before_instantiate_classes()
            trainer = self.config.fit.trainer
            self.asked = {name: trainer.get(name) for name in ("devices", "num_nodes", "precision", "strategy")}
            here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": None}
            unasked = {"logger": False, "callbacks": None, "plugins": None, "profiler": None}
            if not _is_ours(self.asked["strategy"]):
                here["strategy"] = "auto"  # it may need what this machine has not
            trainer.update(Namespace(here | unasked))

        @override
        def _run_subcommand(self, subcommand: str) -> None:
            pass

    built = Built(args=["fit", *settings])
    model, datamodule, trainer = built.model, built.datamodule, built.trainer
    if datamodule is None:
        raise UserError("data: missing; a plan is made for a datamodule")
    if isinstance(datamodule, StreamDataModule):
        raise UserError(
            "data: StreamDataModule: the lengths of a stream are known only as it comes, so there is no plan; prepare "
            "some days as a store (lightning-gr prepare) and plan with SequenceDataModule"
        )
    datamodule.prepare_data()
    datamodule.setup(TrainerFn.FITTING)
    loader = datamodule.train_dataloader()
    plan = getattr(loader, "plan", None)
    if plan is None:
        raise UserError(
            f"data: {type(datamodule).__name__}.train_dataloader() gives a {type(loader).__name__}, which has no plan; "
            "only loaders such as SequenceDataModule's know their batches ahead"
        )
    trainer.datamodule = datamodule  # type: ignore[attr-defined]
    trainer.training = True
    model.trainer = trainer
    model.setup(TrainerFn.FITTING)
    recorded = None
    if getattr(model, "dynamic_tables", None) is not None:
        recorded = model.dynamic_tables = _Recorded(model.dynamic_tables)
    with deferred_tables():
        model.configure_model()
    strategy = trainer.strategy
    ours = isinstance(strategy, SequenceBalancedStrategy)
    ranks, known = _ranks_of(built.asked["devices"], built.asked["num_nodes"])
    config = [value for word, value in zip(settings, [*settings[1:], ""], strict=True) if word in ("-c", "--config")]
    return Recipe(
        title=" ".join(config) or type(model).__name__,
        model=model,
        plan=plan,
        ranks=ranks,
        ranks_known=known,
        accumulate=trainer.accumulate_grad_batches,
        bf16=str(built.asked["precision"]).startswith("bf16"),
        balancing=getattr(strategy, "balancing", None) or Balancing(),
        sparse_optimizer=getattr(strategy, "sparse_optimizer", "rowwise_adagrad"),
        sharding=getattr(strategy, "sharding", "row_wise"),
        table_groups=getattr(strategy, "table_groups", 1),
        other_strategy=None if ours else str(getattr(built.asked["strategy"], "class_path", built.asked["strategy"])),
        cardinalities={} if recorded is None else recorded.cardinalities,
        keep=built,
    )


def _is_ours(strategy: Any) -> bool:
    """Whether a configuration's strategy is `SequenceBalancedStrategy` or made from it."""
    from lightning_gr.plugins import SequenceBalancedStrategy

    if isinstance(strategy, str) or strategy is None:
        return strategy == SequenceBalancedStrategy.strategy_name
    module, _, name = getattr(strategy, "class_path", "").rpartition(".")
    found = getattr(importlib.import_module(module), name) if module else type(strategy)
    return isinstance(found, type) and issubclass(found, SequenceBalancedStrategy)


def _ranks_of(devices: Any, num_nodes: Any) -> tuple[int, bool]:
    """Processes that a configuration asks for, and whether it says so."""
    if isinstance(devices, list):
        return len(devices) * int(num_nodes or 1), True
    known = str(devices).isdecimal() and int(devices) > 0
    return (int(devices) if known else 1) * int(num_nodes or 1), known
