"""The binary substrate: which versions of torch, torchrec and fbgemm-gpu fit together, and whether they are here."""

from __future__ import annotations

import importlib.metadata
import importlib.util

FITTING = {(2, 13): ("1.8.0", "1.8.0"), (2, 11): ("1.6.1", "1.6.0")}
"""By torch's minor version, the versions of torchrec and fbgemm-gpu that were built against it."""

FBGEMM_DISTRIBUTIONS = ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def fbgemm() -> tuple[str, str] | None:
    """Name and version of the installed FBGEMM distribution, or None."""
    found = ((name, version_of(name)) for name in FBGEMM_DISTRIBUTIONS)
    return next(((name, version) for name, version in found if version is not None), None)


def fitting_versions() -> tuple[str, str] | None:
    """The torchrec and fbgemm-gpu that fit the installed torch; None when no pair is known for it."""
    torch_version = version_of("torch")
    if torch_version is None:
        return None
    major, minor = torch_version.split(".")[:2]
    return FITTING.get((int(major), int(minor)))


def install_command() -> str:
    """The command that installs the pair that fits the torch at hand."""
    torchrec, fbgemm_version = fitting_versions() or FITTING[(2, 13)]
    gpu = version_of("triton") is not None and "+cpu" not in (version_of("torch") or "")
    name = "fbgemm-gpu" if gpu else "fbgemm-gpu-cpu"
    return f"pip install --no-deps torchrec=={torchrec} {name}=={fbgemm_version}"


def same_minor(version: str, other: str) -> bool:
    """Whether two versions agree in their first two numbers, all that the binary interface depends on."""
    return version.split("+")[0].split(".")[:2] == other.split("+")[0].split(".")[:2]


def problem() -> str | None:
    """What keeps torchrec from working here, in one line with the remedy; None when it should work."""
    if version_of("torchrec") is None or importlib.util.find_spec("torchrec") is None:
        return f"torchrec is not installed; run: {install_command()}"
    found = fbgemm()
    if found is None or importlib.util.find_spec("fbgemm_gpu") is None:
        return f"fbgemm-gpu, torchrec's binary half, is not installed; run: {install_command()}"
    pair = fitting_versions()
    if pair is not None:
        torchrec = version_of("torchrec")
        assert torchrec is not None
        for name, here, wanted in (("torchrec", torchrec, pair[0]), (*found, pair[1])):
            if not same_minor(here, wanted):
                return (
                    f"{name} {here} does not fit torch {version_of('torch')}, which wants {wanted}; "
                    f"run: {install_command()}"
                )
    return None


def require_torchrec() -> None:
    """Makes sure that torchrec can be imported, before anything is built on it.

    Raises:
        ImportError: it is missing or of the wrong binary version; one line with the command that mends it.
    """
    if (what := problem()) is not None:
        raise ImportError(what)
    try:
        import torchrec  # noqa: F401
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ImportError(f"torchrec cannot be imported ({reason}); run: {install_command()}") from error
