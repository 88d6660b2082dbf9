"""The figures that were set out to be reached: where each stands in the results, and whether it may be more or less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Goal:
    """A column of a file in `benchmarks/results` and the figure it should reach; of 0 nothing but 0 will do.

    `where` has the columns that a row must have: a goal is for what a user has who changes nothing.
    """

    result: str
    column: str
    goal: float
    subject: str
    at_most: bool = False
    where: Mapping[str, str] = field(default_factory=dict)

    def reached(self, measured: float) -> bool:
        """Whether the figure is at least the goal, or at most it."""
        return measured <= self.goal if self.at_most else measured >= self.goal

    def share(self, measured: float) -> float | None:
        """How many times the goal was reached, above 1 where it was met; None where a ratio says nothing."""
        if not self.goal or measured <= 0:
            return None
        return self.goal / measured if self.at_most else measured / self.goal


GOALS = (
    Goal("end_to_end", "speedup_vs_plain_loop", 1.5, "an epoch of Beauty against a plain padded PyTorch loop"),
    Goal("peers", "speedup_vs_fastest_peer", 3, "an epoch of Beauty against the fastest peer"),
    Goal("end_to_end", "speedup_systems", 1.6, "the system against DDP with static tables, same attention"),
    Goal("attention", "fraction_of_peak", 0.4, "attention, forward and backward: share of the peak"),
    Goal("attention", "speedup_vs_reference", 40, "attention against the padded reference"),
    Goal("attention", "speedup_vs_per_sequence", 1.5, "attention against a loop over the sequences"),
    Goal("attention", "peak_memory_ratio", 0.2, "attention's memory over the padded reference's", at_most=True),
    Goal("attention", "time_bias_cost", 0.4, "what a time bias costs", at_most=True),
    Goal("attention", "mtgr_cost_per_pair", 0.25, "what MTGR's mask costs a visible pair", at_most=True),
    Goal("attention", "layer_fraction_of_peak", 0.55, "a whole HSTU layer: share of the peak"),
    Goal("softmax", "softmax_speedup", 2, "sampled softmax against a materialised one"),
    Goal("softmax", "softmax_memory_ratio", 0.1, "sampled softmax: memory over a materialised one's", at_most=True),
    Goal("negatives", "memory_ratio_offload", 0.6, "negatives with offload: memory over without", at_most=True),
    Goal("negatives", "time_ratio_offload", 1.15, "negatives with offload: time over without", at_most=True),
    Goal("mfu", "mfu", 0.55, "MFU of a training step of MTGR-small", where={"malloc": "default"}),
    Goal("mfu", "overhead", 0.01, "time of the monitors over time of the steps", at_most=True),
    Goal("predict", "speedup_one_pass", 100, "1,000 candidates in one pass against one at a time"),
    Goal("predict", "falcon_memory_ratio", 0.25, "candidates in micro-batches: memory over one pass", at_most=True),
    Goal("predict", "falcon_time_ratio", 1.15, "candidates in micro-batches: time over one pass", at_most=True),
    Goal("aggregation", "share_of_flops", 0.7, "aggregated samples: speed-up over what FLOPs predict"),
    Goal("hash_table", "ids_per_s", 8e6, "find or insert in the key index, ids a second"),
    Goal("hash_table", "insert_per_s", 3.5e6, "inserts into the key index a second, growth included"),
    Goal("hash_table", "speedup_vs_mch", 3, "key index against TorchRec's managed collisions"),
    Goal("hash_table", "bytes_per_key", 24, "bytes of a key in the index, beside its row", at_most=True),
    Goal("lookup", "speedup_vs_torchrec", 2, "lookup of repeated ids against TorchRec"),
    Goal("lookup", "speedup_vs_torchrec_dup1", 0.7, "lookup of distinct ids against TorchRec"),
    Goal("balance", "imbalance_balanced_1024", 0.01, "share of waiting on 1,024 ranks, balanced", at_most=True),
    Goal("balance", "plan_ms_per_1k", 1, "ms to deal out a thousand sequences", at_most=True),
    Goal("hsp", "alltoall_bytes_leaving_group", 0, "bytes of lookups that leave a group of ranks", at_most=True),
    Goal("overlap", "exposed_share_semi_async", 0.03, "exposed communication, semi-async", at_most=True),
    Goal("overlap", "exposed_share_exact", 0.06, "exposed communication, exact-async", at_most=True),
    Goal("scaling", "speedup_over_predicted", 0.8, "gain by balancing over the predicted gain"),
    Goal("scaling", "scaling_efficiency_2", 0.9, "two processes against one, the same work each"),
    Goal("scaling", "hidden_latency_fraction", 0.8, "latency that the pipeline hides"),
    Goal("meta", "speedup_meta", 1.5, "a meta step against the textbook's"),
    Goal("meta", "weak_scaling", 0.9, "a meta step on two processes against one"),
    Goal("meta", "speedup_meta_io", 2, "Meta-IO against a shuffle buffer"),
    Goal("checkpoint", "save_ratio", 0.7, "saving over the disk's plain rate"),
    Goal("checkpoint", "load_ratio", 0.5, "loading, verified, over the disk's plain rate"),
    Goal("checkpoint", "blocking_ratio", 0.2, "a background save's stop over a synchronous one's", at_most=True),
    Goal("cli", "fit_help_ratio", 1.3, "time of fit --help over a bare LightningCLI's", at_most=True),
)
