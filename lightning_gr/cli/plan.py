"""``lightning-gr plan``: what a run will ask of how many machines, from its recipe and its store alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_gr.cli.errors import Parser, UserError

if TYPE_CHECKING:
    from lightning_gr.cli.plan_balance import Deal, Lengths
    from lightning_gr.cli.plan_groups import GroupAdvice, Network
    from lightning_gr.cli.plan_memory import Exchange, Footprint, Memory
    from lightning_gr.cli.plan_recipe import Recipe

DEFAULT_RANKS = tuple(1 << i for i in range(11))
FORMATS = (".png", ".pdf", ".svg")


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args, settings = _parser().parse_known_args(argv)
    if not any(word.partition("=")[0] in ("-c", "--config", "--model") for word in settings):
        raise UserError("plan: --config: missing; name a recipe or a file (lightning-gr recipes ls)")
    if args.plot is not None and args.plot.suffix not in FORMATS:
        raise UserError(f"--plot {args.plot}: no such format; give a file that ends in {', '.join(FORMATS)}")
    if args.plot is not None and not args.plot.absolute().parent.is_dir():
        raise UserError(f"--plot {args.plot}: no such folder; make it first")
    from lightning_gr.cli.plan_groups import Network, parse_link
    from lightning_gr.cli.plan_memory import parse_bytes
    from lightning_gr.cli.plan_recipe import build

    limit = None if args.memory is None else parse_bytes(args.memory)
    ranks = None if args.ranks is None else parse_ranks(args.ranks)
    network = Network(args.ranks_per_node, parse_link("--inside", args.inside), parse_link("--between", args.between))
    if network.ranks_per_node < 1:
        raise UserError(f"--ranks_per_node {network.ranks_per_node}: expected at least 1")
    recipe = build(settings)
    if args.calibrate:
        return _calibrate(recipe, as_json=args.json)
    figures = Figures.of(recipe, ranks, strong=args.scaling == "strong", network=network, limit=limit)
    from lightning_gr.cli import plan_show

    if args.plot is not None:
        plan_show.plot(figures, args.plot)
    if args.json:
        print(json.dumps(plan_show.as_dict(figures)))
    else:
        plan_show.show(figures)
        if args.plot is not None:
            print(f"plotted to {args.plot}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-gr plan",
        usage="lightning-gr plan --config RECIPE [--setting VALUE ...] [--ranks 1,8,64] [--memory 80GiB] [--calibrate]",
        description="Prints what a run will ask of how many ranks, before any is rented: batches, balance, FLOPs, "
        "bytes exchanged, memory. Trains nothing and reads the store alone. Settings are those of `fit`.",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", metavar="N,N", help="numbers of ranks; default 1,2,4 ... 1024")
    parser.add_argument(
        "--scaling",
        choices=("weak", "strong"),
        default="weak",
        help="weak (default): tokens of a rank stay the recipe's, so global_tokens grows; strong: global_tokens stays",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="of a rank's device, 80GiB say: exits with 2 if the recipe's ranks, or the only one of --ranks, need more",
    )
    parser.add_argument(
        "--ranks_per_node", type=int, default=8, metavar="N", help="ranks of a machine, for table groups; default 8"
    )
    for option, where, default in (("--inside", "inside a machine", "300,5"), ("--between", "between them", "25,10")):
        parser.add_argument(
            option,
            default=default,
            metavar="GB/s,us",
            help=f"what a rank sends in a second {where}, and microseconds a message; default {default}",
        )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw lengths and imbalance to this PNG, PDF or SVG")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the cost of sequences on this machine instead"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    return parser


def parse_ranks(text: str) -> tuple[int, ...]:
    """The numbers of ``1,8,64``, ascending, each once.

    Raises:
        UserError: something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= 1 << 16 for word in words):
        raise UserError(f"--ranks {text}: expected numbers from 1 to 65536, such as 1,8,64")
    return tuple(sorted({int(word) for word in words}))


# ---- the figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The figures for one number of ranks; None where they could not be found.

    Args:
        deal: balance.
        forward_flops: of the mean rank in a step.
        backward_flops: the same of backward.
        exchange: bytes that a rank sends in a step.
        memory: bytes on the fullest rank.
    """

    deal: Deal
    forward_flops: float | None
    backward_flops: float | None
    exchange: Exchange | None
    memory: Footprint


@dataclass(frozen=True)
class Figures:
    """All that `plan` prints."""

    recipe: Recipe
    lengths: Lengths
    rows: tuple[Row, ...]
    memory: Memory
    dense_parameters: int
    even_tokens: int
    strong: bool
    groups: GroupAdvice
    network: Network

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        ranks: tuple[int, ...] | None,
        *,
        strong: bool,
        network: Network,
        limit: int | None = None,
    ) -> Figures:
        """Computes them.

        Args:
            recipe: the run.
            ranks: numbers of ranks; None takes the recipe's and `DEFAULT_RANKS`.
            strong: whether the global budget stays; else a rank's share of it does.
            network: by which table groups are weighed, for the recipe's ranks, or the most that were asked for.
            limit: bytes of a rank's memory.

        Raises:
            UserError: it does not fit on the recipe's ranks, or on the only number that was asked for.
        """
        from lightning_gr.balancing.cost import TOKENS, cost_of
        from lightning_gr.cli import plan_memory, plan_network
        from lightning_gr.cli.plan_balance import Lengths, deal
        from lightning_gr.cli.plan_groups import advise

        model, plan = recipe.model, recipe.plan
        lengths = Lengths.of(plan.index)
        tables = plan_memory.tables_of(
            model, recipe.cardinalities, optimizer=recipe.sparse_optimizer, cut=recipe.sharding
        )
        dims = {feature: table.dim for table in tables for feature in table.features}
        dense = plan_network.dense_parameters(model)
        dense_bytes = sum(2 * p.nbytes for p in dense) + plan_network.optimizer_bytes(model, dense)
        limited = recipe.ranks if ranks is None or len(ranks) > 1 else ranks[0]
        if limit is not None:
            # Before anything is measured: ids of a corpus that fits nowhere would fill this machine's memory.
            tables_alone = plan_memory.Memory(tuple(tables), dense_bytes, None, None)
            tables_alone.refuse(limit, ranks=limited, tokens=0, longest=lengths.longest)
        measured = plan_network.can_be_measured(model)
        scores, samples = None, None
        batch_tokens = plan.num_tokens / plan.num_batches
        if measured:
            own = min(batch_tokens / recipe.ranks, recipe.balancing.tokens_per_rank or batch_tokens)
            first = plan_network.first_samples(plan, min(int(own), plan_network.MOST_TOKENS_COLLATED))
            samples = plan_network.collated(model, plan, first)
            scores = _scores(model, samples)
        memory = plan_memory.Memory(
            tables=tuple(tables),
            dense=dense_bytes,
            activations=plan_network.measure_activations(model, plan, dims, bf16=recipe.bf16) if measured else None,
            scores=scores,
        )
        flops = cost_of(model)
        stepped = plan_network.step_flops(model, samples)
        num_dense = sum(p.numel() for p in dense)
        rows = []
        shown = {*DEFAULT_RANKS, recipe.ranks} if ranks is None else {*ranks}
        shown = shown if limit is None else {*shown, limited}
        for n in sorted(shown):
            steps, at_once = 1, recipe.balancing.tokens_per_rank
            if at_once is not None:
                steps = plan.micro_steps(world_size=n if strong else recipe.ranks, tokens_per_rank=at_once)
            dealt = deal(
                plan,
                ranks=n,
                batch_tokens=batch_tokens * (1 if strong else n / recipe.ranks),
                cost=recipe.cost,
                method=recipe.balancing.partitioner,
                micro_steps=steps,
                tokens_per_rank=at_once,
            )
            own_tokens = dealt.batch_tokens / n / dealt.micro_steps
            forward = backward = exchanged = None
            if stepped is not None:
                forward, backward = (x * dealt.batch_tokens / n for x in stepped)
            elif flops != TOKENS:
                forward = lengths.total(flops) / plan.num_tokens * dealt.batch_tokens / n
                if scores is not None:
                    forward += dealt.micro_steps * scores.forward_flops(own_tokens, n)
                backward = 2 * forward
            if samples is not None:
                share = own_tokens / samples.num_tokens
                exchanged = plan_memory.exchange(
                    tables,
                    [plan_memory.distinct_ids(samples, table) * share for table in tables],
                    ranks=n,
                    dense_parameters=num_dense,
                    scores=scores,
                    tokens=own_tokens,
                    micro_steps=dealt.micro_steps,
                )
            rows.append(Row(dealt, forward, backward, exchanged, memory.on(n, dealt.most_tokens)))
            if limit is not None and n == limited:
                memory.refuse(limit, ranks=n, tokens=dealt.most_tokens, longest=lengths.longest)
            if n == (limited if limited in shown else max(shown)):
                groups = advise(recipe, memory, samples, dealt=dealt, network=network, limit=limit)
        even_tokens = lengths.even_tokens(recipe.cost)
        return cls(recipe, lengths, tuple(rows), memory, num_dense, even_tokens, strong, groups, network)


def _scores(model: Any, batch: Any) -> Any:
    """Of a batch whose queries are scored against candidates of all ranks; None where there are none."""
    from lightning_gr.cli.plan_memory import Scores
    from lightning_gr.cli.plan_network import num_scored

    candidates = num_scored(model, batch)
    if not candidates:
        return None
    queries = sum(labels.num_labels for labels in batch.labels.values())
    dim = int(model.encoder.dim)
    return Scores(candidates if batch.holds_corpus else None, queries / max(batch.num_tokens, 1), dim)


# ---- calibration -------------------------------------------------------------------------------------------------


def _calibrate(recipe: Recipe, *, as_json: bool) -> int:
    """Measures and prints the cost of sequences; see `plan_network.timed_steps`."""
    import numpy as np

    from lightning_gr.balancing.cost import TOKENS, cost_of, fit_cost
    from lightning_gr.cli import plan_memory, plan_network

    model = recipe.model
    if not plan_network.can_be_measured(model):
        raise UserError(
            f"model: {type(model).__name__} has no score() and loss_sums() to run apart from its tables, so it cannot "
            "be measured; give cost: {linear: ..., quadratic: ...} by hand"
        )
    tables = plan_memory.tables_of(model, recipe.cardinalities, optimizer=recipe.sparse_optimizer, cut=recipe.sharding)
    dims = {feature: table.dim for table in tables for feature in table.features}
    steps = plan_network.timed_steps(model, recipe.plan, dims, bf16=recipe.bf16)
    tokens, seconds = [step[0] for step in steps], np.array([step[1] for step in steps])
    try:
        cost = fit_cost(tokens, seconds)
    except ValueError as error:
        raise UserError(f"--calibrate: {error}") from error
    measured = [
        {"sequences": len(own), "tokens": int(own.sum()), "longest": int(own.max()), "seconds": second}
        for own, second in zip(tokens, seconds.tolist(), strict=True)
    ]
    if as_json:
        print(json.dumps({"cost": {"linear": cost.linear, "quadratic": cost.quadratic}, "steps": measured}))
        return 0
    from lightning_gr.cli import plan_show

    counted = cost_of(model)
    plan_show.show_calibration(recipe.title, measured, cost, None if counted == TOKENS else counted)
    return 0
