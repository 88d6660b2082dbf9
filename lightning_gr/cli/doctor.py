"""``lightning-gr doctor``: what is installed, what fits together, what is missing and how to get it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_gr import __version__, substrate
from lightning_gr.cli.errors import Parser

State = Literal["ok", "missing", "wrong", "optional"]

_REQUIRED = (
    ("lightning", ">=2.6.4,<2.7", "2.6.2 and 2.6.3 were malicious uploads"),
    ("jsonargparse", ">=4.41,<5", ""),
    ("torchmetrics", ">=1.0.3", ""),
    ("tensordict", "", "torchrec imports it"),
    ("pyre-extensions", "", "torchrec imports it"),
    ("polars", "", ""),
    ("pyarrow", "", ""),
    ("tensorboard", "", ""),
)
_OPTIONAL = (
    ("triton", "fused kernels on a GPU; comes with the CUDA build of torch", ""),
    ("wandb", "its logger", "pip install 'lightning-gr[wandb]'"),
    ("mlflow", "its logger", "pip install 'lightning-gr[mlflow]'"),
)
_PROBE = """
import json, sys
import torch, torch.distributed as dist
backends = [x for x in ("gloo", "nccl") if dist.is_available() and getattr(dist, f"is_{x}_available")()]
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"devices": devices, "backends": backends, "cuda": torch.version.cuda}), flush=True)
import torchrec
lengths = torch.tensor([2, 0, 3])
assert torch.ops.fbgemm.asynchronous_complete_cumsum(lengths).tolist() == [0, 2, 2, 5]
if devices:
    assert torch.ops.fbgemm.asynchronous_complete_cumsum(lengths.cuda()).tolist() == [0, 2, 2, 5]
print(json.dumps({"operators": True}), flush=True)
"""
_PROBE_SECONDS = 180


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is a command or a short instruction."""

    name: str
    found: str | None
    state: State
    note: str = ""
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Prints the report; returns 0 when a training run can work here, else 1."""
    parser = Parser(prog="lightning-gr doctor", description="Says what is installed, what fits, what is missing.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args(argv)
    findings = examine()
    can_train = not any(finding.state in ("missing", "wrong") for finding in findings)
    if args.json:
        print(json.dumps({"can_train": can_train, "findings": [asdict(finding) for finding in findings]}))
    else:
        _show(findings, can_train)
    return 0 if can_train else 1


def examine() -> list[Finding]:
    """Looks at versions first, then loads torch and FBGEMM in a process of their own, for a wrong binary may crash."""
    findings = [
        Finding("lightning-gr", __version__, "ok"),
        Finding("python", platform.python_version(), "ok" if sys.version_info >= (3, 10) else "wrong", "3.10 or later"),
        *_substrate(),
    ]
    findings += [_required(*entry) for entry in _REQUIRED]
    for name, note, remedy in _OPTIONAL:
        version = substrate.version_of(name)
        findings.append(Finding(name, version, "ok" if version else "optional", note, "" if version else remedy))
    return findings + _probed()


def _substrate() -> list[Finding]:
    torch_version = substrate.version_of("torch")
    if torch_version is None:
        return [Finding("torch", None, "missing", remedy="pip install torch==2.13.0")]
    pair = substrate.fitting_versions()
    known = ", ".join(f"{major}.{minor}" for major, minor in substrate.FITTING)
    findings = [Finding("torch", torch_version, "ok", "" if pair else f"no known torchrec pair; tried with {known}")]
    found = substrate.fbgemm()
    for name, version, wanted in (
        ("torchrec", substrate.version_of("torchrec"), pair and pair[0]),
        (*(found or ("fbgemm-gpu", None)), pair and pair[1]),
    ):
        fits = version is not None and (wanted is None or substrate.same_minor(version, wanted))
        state: State = "ok" if fits else "missing" if version is None else "wrong"
        note = f"torch {torch_version} wants {wanted}" if wanted else ""
        findings.append(Finding(name, version, state, note, "" if fits else substrate.install_command()))
    return findings


def _required(name: str, specifier: str, note: str) -> Finding:
    version = substrate.version_of(name)
    if version is None:
        return Finding(name, None, "missing", note, f'pip install "{name}{specifier}"')
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(specifier).contains(version, prereleases=True):
        return Finding(name, version, "ok", specifier)
    return Finding(name, version, "wrong", f"{specifier} {note}".strip(), f'pip install "{name}{specifier}"')


def _probed() -> list[Finding]:
    try:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        output, errors, code = run.stdout, run.stderr, run.returncode
    except subprocess.TimeoutExpired:
        output, errors, code = "", f"no answer within {_PROBE_SECONDS} s", 1
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    reason = f"killed by signal {-code}" if code < 0 else (errors.strip().splitlines() or [""])[-1]
    if "backends" not in facts:
        return [Finding("torch loads", "no", "wrong", reason, "pip install --force-reinstall torch==2.13.0")]
    devices = ", ".join(facts["devices"]) or "CPU only"
    no_nccl = "" if "nccl" in facts["backends"] else "NCCL comes with the CUDA build of torch"
    findings = [
        Finding("devices", devices, "ok", f"CUDA {facts['cuda']}" if facts["cuda"] else "torch was built without CUDA"),
        Finding("backends", ", ".join(facts["backends"]) or "none", "ok" if facts["backends"] else "wrong", no_nccl),
    ]
    if facts.get("operators"):
        return [*findings, Finding("FBGEMM operators", "load and compute", "ok")]
    return [*findings, Finding("FBGEMM operators", "fail", "wrong", reason, substrate.install_command())]


def _show(findings: list[Finding], can_train: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    marks = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "wrong": "[red]wrong[/]", "optional": "not there"}
    table = Table(title="What is here", title_justify="left")
    for column in ("", "found", "", ""):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, finding.found or "-", marks[finding.state], finding.note)
    console.print(table)

    here = substrate.fitting_versions()
    fits = Table(title="What fits together", title_justify="left")
    for column in ("torch", "torchrec", "fbgemm-gpu or fbgemm-gpu-cpu", ""):
        fits.add_column(column)
    for (major, minor), pair in substrate.FITTING.items():
        fits.add_row(f"{major}.{minor}", *pair, "<- this torch" if pair == here else "")
    console.print(fits)

    remedies = dict.fromkeys(f.remedy for f in findings if f.remedy and f.state != "optional")
    if remedies:
        console.print("To mend it:")
    for remedy in remedies:
        console.print(f"  {remedy}", markup=False, soft_wrap=True)
    for finding in findings:
        if finding.state == "optional" and finding.remedy:
            console.print(f"Optional, {finding.name}: {finding.remedy}", markup=False, soft_wrap=True)
    if substrate.version_of("lightning-gr") is None:
        console.print("lightning-gr itself is not installed and runs from this folder only: pip install -e .")
    console.print("A training run can work here." if can_train else "[red]A training run cannot work here.[/]")
