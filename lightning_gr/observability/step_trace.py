"""StepTrace: what a recording of torch.profiler tells about time, read from its Chrome trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_gr.observability.time_shares import Span, StageEvent, divided

_COMMUNICATION = ("c10d::", "_c10d_functional::", "gloo:", "nccl:")


@dataclass
class StepTrace:
    """Spans of one process's recording, in seconds of the host's clock `time.perf_counter`.

    Args:
        ops: operators of the training thread; those that others call lie inside them.
        leaves: of these, the ones that call no other.
        collectives: of the training thread, over gloo, from their call to their result.
        kernels: on a GPU, those that compute.
        exchanges: on a GPU, NCCL's kernels.
        copies: on a GPU, copies from, to and within it.
    """

    ops: list[Span] = field(default_factory=list)
    leaves: list[Span] = field(default_factory=list)
    collectives: list[Span] = field(default_factory=list)
    kernels: list[Span] = field(default_factory=list)
    exchanges: list[Span] = field(default_factory=list)
    copies: list[Span] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]], *, mark: str, marked: float) -> StepTrace:
        """Reads the events of a Chrome trace.

        Args:
            events: `traceEvents`.
            mark: name of an annotation that the training thread made.
            marked: when it did so, by the host's clock.

        Raises:
            ValueError: the annotation is not there.
        """
        events = [event for event in events if event.get("ph") == "X"]
        anchor = next((x for x in events if x["name"] == mark and x.get("cat") == "user_annotation"), None)
        if anchor is None:
            raise ValueError(f"{mark}: not in the trace")
        found, ops = cls(), []
        for event in events:
            start = marked + (event["ts"] - anchor["ts"]) / 1e6
            span, name, kind = (start, start + event.get("dur", 0) / 1e6), event["name"], event.get("cat")
            if kind == "kernel":
                (found.exchanges if name.lower().startswith(("nccl", "rccl")) else found.kernels).append(span)
            elif kind == "gpu_memset":
                found.kernels.append(span)
            elif kind == "gpu_memcpy":
                found.copies.append(span)
            elif name.startswith("gloo:"):
                found.collectives.append(span)
            elif kind == "cpu_op" and event["tid"] == anchor["tid"] and not name.startswith(_COMMUNICATION):
                ops.append(span)
        # An operator that calls others begins before them and ends after them.
        found.ops = sorted(ops, key=lambda span: (span[0], -span[1]))
        followers = [start for start, _ in found.ops[1:]] + [float("inf")]
        found.leaves = [op for op, follower in zip(found.ops, followers, strict=True) if follower >= op[1]]
        return found

    def divided_by_gpu(self, window: Sequence[Span], *, data_waits: Sequence[Span]) -> dict[str, float]:
        """Seconds by class, of the device's time.

        Args:
            window: what is divided.
            data_waits: when the host waited for a batch to be fetched.
        """
        return divided(
            window,
            [
                ("compute", self.kernels),
                ("exposed exchange", self.exchanges),
                ("copy", self.copies),
                ("data wait", data_waits),
            ],
        )

    def divided_by_cpu(
        self,
        window: Sequence[Span],
        *,
        data_waits: Sequence[Span],
        copies: Sequence[Span],
        exchanges: Sequence[Span],
    ) -> dict[str, float]:
        """Seconds by class, of the training thread's time.

        An operator that waits for others, as one of an exchange does inside, computes only where no exchange is under
        way or where an operator that it calls is at work.

        Args:
            window: what is divided.
            data_waits: when the thread waited for a batch to be fetched, or fetched it.
            copies: when it called batch hooks and moved batches.
            exchanges: of a pipeline, those that it waited for.
        """
        return divided(
            window,
            [
                ("data wait", data_waits),
                ("copy", copies),
                ("compute", self.leaves),
                ("exposed exchange", [*self.collectives, *exchanges]),
                ("compute", self.ops),
            ],
        )


def add_stages(trace: dict[str, Any], stages: Iterable[StageEvent], *, mark: str, marked: float) -> None:
    """Puts events of a stage log into a Chrome trace, a row for each stage.

    Args:
        trace: changed.
        stages: events by the host's clock.
        mark: as of `StepTrace.of`.
        marked: likewise.
    """
    events = trace["traceEvents"]
    anchor = next(x for x in events if x.get("name") == mark and x.get("cat") == "user_annotation")
    events += [
        {
            "ph": "X",
            "cat": "stage",
            "name": f"{stage.stage} {stage.batch}",
            "pid": anchor["pid"],
            "tid": f"stage {stage.stage}",
            "ts": anchor["ts"] + (stage.start - marked) * 1e6,
            "dur": (stage.end - stage.start) * 1e6,
        }
        for stage in stages
    ]


def write_trace(trace: dict[str, Any], path: Path) -> None:
    """Writes a Chrome trace, packed; it appears when it is complete."""
    part = path.with_name(f".{path.name}.part")
    try:
        with gzip.open(part, "wt", compresslevel=3) as file:
            json.dump(trace, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
