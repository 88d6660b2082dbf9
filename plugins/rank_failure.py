"""RankFailure: the exception that names the rank a run ended by, and what a failed communication looks like."""

from __future__ import annotations

import re

import torch.distributed as dist

_GLOO = re.compile(
    r"gloo.*("
    r"connection (closed|reset|refused)|socket closed|broken pipe|no route to host"
    r"|timed out|time ?out|operation was aborted"
    r")",
    re.IGNORECASE | re.DOTALL,
)
"""What gloo says in a RuntimeError that begins with its source file when it loses, or waits too long for, a peer."""


class RankFailure(RuntimeError):
    """A communication failed because of another rank, which the message names; the cause is torch's own error."""


def is_communication_failure(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from or after, is torch's for a lost or late peer."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, dist.DistError) or (isinstance(chain, RuntimeError) and _GLOO.search(str(chain))):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
