"""FeatureConfig: a feature of ranking samples, declared once; data and models are built by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Group = Literal["user", "event", "history", "candidate"]
Pooling = Literal["sum", "mean"]
Scaling = Literal["none", "standard", "log"]


@dataclass(frozen=True)
class FeatureConfig:
    """What becomes of a column of the store; `docs/features.md` has examples.

    Args:
        name: a column of the store's events, users or items; or `item_id` or `user_id`, to give them a table or width.
        group: whose tokens have it. `user`: a contextual token, for columns of users. `event`: history and candidates.
            `history`: history alone. `candidate`: candidates alone, which is where cross features live (MTGR, arXiv
            2505.18654, section 3.2); what the column holds at events of the history is then not read. None means `user`
            for columns of users and `event` for those of events and items.
        table: embedding table of a sparse feature; features that name the same one share its rows, value by value.
            None means a table of its own.
        dim: width of that table's rows; None means the model's `embedding_dim`, or what another feature of the table
            says.
        pooling: what becomes of several values of a sparse feature; None means `mean`.
        normalisation: of a dense feature. `standard`: less the mean, over the standard deviation. `log`: the same of
            ``sign(x) log(1 + |x|)``. `none`: numbers as they are. None means `standard`. A missing number becomes 0.
        mean: used instead of the training part's, after the logarithm where there is one; with `std`.
        std: used instead of the training part's; with `mean`.

    Raises:
        ValueError: a setting that no column can have, with the feature's name.
    """

    name: str
    group: Group | None = None
    table: str | None = None
    dim: int | None = None
    pooling: Pooling | None = None
    normalisation: Scaling | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        where = f"features.{self.name}"
        if not self.name:
            raise ValueError(f"features: name={self.name!r}: expected the name of a column")
        choices: tuple[tuple[str, Any], ...] = (("group", Group), ("pooling", Pooling), ("normalisation", Scaling))
        for name, allowed in choices:
            if getattr(self, name) not in (None, *get_args(allowed)):
                raise ValueError(
                    f"{where}: {name}={getattr(self, name)!r}: expected one of {', '.join(get_args(allowed))}"
                )
        if self.table is not None and (not self.table or set(self.table) & set("./#")):
            raise ValueError(f"{where}: table={self.table!r}: expected a name without '.', '/' and '#'")
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"{where}: dim={self.dim}: expected at least 1")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"{where}: mean={self.mean}, std={self.std}: give both, or none to have them counted")
        if self.mean is not None and self.std is not None:
            if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
                raise ValueError(f"{where}: mean={self.mean}, std={self.std}: expected numbers, std above 0")
            if self.normalisation == "none":
                raise ValueError(
                    f"{where}: mean={self.mean}, std={self.std}: not used with normalisation=none; leave one out"
                )
