"""The one judge of all peers: Recall@K and NDCG@K of lists of items against the item each user took.

Suffixes: U users, K places of a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def quality(lists_UK: Array, asked_U: Array) -> dict[str, float]:
    """Recall and NDCG of lists with the best item first, one item asked for by each user.

    Args:
        lists_UK: item ids; -1 where a list is shorter.
        asked_U: the item each user took.

    Raises:
        ValueError: if there are not as many lists as users, or a list has an item twice.
    """
    if lists_UK.ndim != 2 or len(lists_UK) != len(asked_U):
        raise ValueError(f"lists of shape {lists_UK.shape} for {len(asked_U)} users; one list a user is needed")
    sorted_UK = np.sort(lists_UK, axis=1)
    twice_U = ((sorted_UK[:, 1:] == sorted_UK[:, :-1]) & (sorted_UK[:, 1:] >= 0)).any(axis=1)
    if twice_U.any():
        raise ValueError(f"the list of user {int(twice_U.argmax())} has an item twice: {lists_UK[twice_U.argmax()]}")
    hits_UK = lists_UK == asked_U[:, None]
    gains_K = 1.0 / np.log2(np.arange(2, lists_UK.shape[1] + 2))
    return {"recall": float(hits_UK.any(axis=1).mean()), "ndcg": float((hits_UK * gains_K).sum(axis=1).mean())}
