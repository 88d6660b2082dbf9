"""An environment of its own for each peer, made of the pins of its requirements file under ``build/peers``.

An environment that was made of other pins is made anew; one whose making was cut off as well. This project's own runs
in the interpreter that runs the driver.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / "build" / "peers"


class PeerEnvironmentError(Exception):
    """An environment could not be made; the message is pip's last line of error."""


def requirements(package: str) -> Path:
    """The file with the pins of a peer."""
    return HERE / f"requirements-{package}.txt"


def interpreter(package: str, *, root: Path = ENVIRONMENTS, make: bool = True, pip_flags: Sequence[str] = ()) -> Path:
    """The Python of a peer's environment, which is made if it is missing.

    Args:
        package: names the requirements file; ``lightning_gr`` has none and takes this interpreter.
        root: of all environments.
        make: whether to make what is missing.
        pip_flags: more words for ``pip install``, as where torch without CUDA is found.

    Raises:
        PeerEnvironmentError: if pip fails, or it is missing and not to be made.
    """
    if package == "lightning_gr":
        return Path(sys.executable)
    pins = requirements(package)
    python, stamp = root / package / "bin" / "python", root / package / ".pins"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == digest:
        return python
    if not make:
        raise PeerEnvironmentError(f"{root / package} is missing or of other pins; make it with --prepare")
    print(f"{package}: an environment in {root / package}", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(root / package)],
        [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *pip_flags, "-r", str(pins)],
    ):
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            errors = [x for x in made.stderr.splitlines() if x.startswith("ERROR")] or made.stderr.splitlines()
            raise PeerEnvironmentError((errors or [f"exit code {made.returncode}"])[-1])
    stamp.write_text(digest, encoding="utf-8")
    return python
