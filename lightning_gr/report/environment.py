"""What a run was made with: versions, machine, and its configuration without passwords."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_gr import __version__, substrate

_SECRET = re.compile(r"(?i)(^|[._-])(password|passwd|secret|token|api_?key|access_?key|credentials?)$")
_USER_IN_URL = re.compile(r"(://)[^/@\s:]+:[^/@\s]+@")
HIDDEN = "(left out)"
_LONG_TEXT = 100


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, without names or paths of it.

    Args:
        device: on which this process computes.
    """
    versions = {"lightning-gr": __version__, "Python": platform.python_version()}
    for name in ("torch", "lightning", "torchrec"):
        versions[name] = substrate.version_of(name) or "not installed"
    if (found := substrate.fbgemm()) is not None:
        versions[found[0]] = found[1]
    if device.type == "cuda":
        versions["device"] = torch.cuda.get_device_name(device)
        versions["CUDA"] = str(torch.version.cuda)
    else:
        versions["device"] = _processor()
    versions["CPU cores"] = str(os.cpu_count() or "unknown")
    versions["threads a process"] = str(torch.get_num_threads())
    versions["system"] = f"{platform.system()} {platform.machine()}"
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names and names[0] else platform.machine() or "CPU"


def without_secrets(settings: Any) -> Any:
    """A configuration whose passwords, tokens and keys of services are left out, by their names.

    Args:
        settings: mappings and lists of plain values; anything else becomes its text or, where that is long, its class.
    """
    if isinstance(settings, Mapping):
        return {
            str(key): HIDDEN if _SECRET.search(str(key)) and isinstance(x, str) else without_secrets(x)
            for key, x in settings.items()
        }
    if isinstance(settings, (list, tuple)):
        return [without_secrets(x) for x in settings]
    if settings is None or isinstance(settings, (bool, int, float)):
        return settings
    text = str(settings)
    if not isinstance(settings, (str, Path)) and len(text) > _LONG_TEXT:
        return type(settings).__name__
    return _USER_IN_URL.sub(rf"\1{HIDDEN}@", text)
