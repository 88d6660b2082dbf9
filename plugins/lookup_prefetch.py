"""LookupPrefetch: starts the table lookups of later batches, as far as that can be done without changing a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_gr._compat import collection_on_group
from lightning_gr.embeddings.dynamic.peers import Peers
from lightning_gr.plugins.dynamic_sharding import ShardedDynamicCollection
from lightning_gr.plugins.started_lookups import StartedLookups

if TYPE_CHECKING:
    from torchrec.distributed.types import ShardedModule

Place = tuple[str | int, ...]
"""Where in a batch a features object lies: attributes, keys and indices; () is the batch itself."""
_DEPTH = 3


class LookupPrefetch:
    """Exchanges the ids of later batches on a process group of its own, while the present one computes.

    What each collection looks up is learned from one step: the features object that its forward is given, as a place in
    the batch. From then on the ids of that place may be made distinct, sent, and made distinct again ahead of time; the
    rows themselves are read by the batch's own forward, so nothing is stale and no table changes early. A forward with
    anything else than what was prefetched does the whole lookup itself.

    Args:
        module: sharded collections are looked for inside.
        group: all processes, in a group that nothing else uses.
        key_peers: those with which dynamic tables exchange keys, in groups that nothing else uses.
        device: where batches are.
        time_of: the clock of the data at a batch, for dynamic tables; None where it does not matter.

    Attributes:
        made: collections that looked up features which are no part of the batch.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        group: dist.ProcessGroup,
        key_peers: Peers,
        device: torch.device,
        time_of: Callable[[Any], int | None] = lambda _: None,
    ) -> None:
        from torchrec.distributed.types import ShardedModule

        self._group, self._key_peers, self._device, self._time_of = group, key_peers, device, time_of
        self.made: set[str] = set()
        self._collections: dict[str, ShardedModule[Any, Any, Any, Any]] = {
            path: child for path, child in module.named_modules() if isinstance(child, ShardedModule)
        }
        self._places: list[tuple[str, Place]] | None = None
        self._ready: dict[tuple[str, int], tuple[Any, Any, Any]] = {}
        self._twins: dict[str, Any] = {}
        self._time = 0
        for path, collection in self._collections.items():
            if not isinstance(collection, ShardedDynamicCollection):
                collection.forward = self._pipelined_forward(path, collection)

    @property
    def knows(self) -> bool:
        """Whether a step has shown what is looked up."""
        return self._places is not None

    # ---- learning ----------------------------------------------------------------------------------------------

    @contextmanager
    def learning(self, batch: Any) -> Iterator[None]:
        """Watches what the forwards inside look up of a batch."""
        seen: list[tuple[str, Any]] = []
        hooks = [
            collection.register_forward_pre_hook(
                lambda _, args, kwargs, path=path: seen.append((path, _features(args, kwargs))), with_kwargs=True
            )
            for path, collection in self._collections.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        places = {id(value): place for place, value in _parts(batch, ())}
        self._places = [(path, places[id(features)]) for path, features in seen if id(features) in places]
        for path in {path for path, _ in self._places} - self._twins.keys():
            if not isinstance(self._collections[path], ShardedDynamicCollection):
                self._twins[path] = collection_on_group(self._collections[path], self._group)
        self.made = {path for path, features in seen if id(features) not in places}
        if self.made:
            rank_zero_warn(
                f"{min(self.made)}: looks up features that the training step makes, so that their exchange cannot run "
                "ahead; make them in on_before_batch_transfer or in the collate function, as a part of the batch"
            )

    # ---- ahead -------------------------------------------------------------------------------------------------

    def start(self, batch: Any) -> StartedLookups:
        """The lookups of a later batch, nothing of which has begun; empty until a step has been learned."""
        started = StartedLookups()
        found = [(path, _at(batch, place)) for path, place in self._places or ()]
        found = [(path, features) for path, features in found if features is not None]
        # Known here, in the order of batches: phases may run later, when further batches have been seen.
        self._time = time = max(self._time, self._time_of(batch) or 0)
        begun: list[Any] = []

        def begin() -> None:
            begun.extend(self._begin(path, features, time, started) for path, features in found)

        def send() -> None:
            begun[:] = [send() for send in begun]

        def receive() -> None:
            for receive in begun:
                receive()

        if found:
            started.phases, started.is_empty = [begin, send, receive], False
        return started

    def _begin(self, path: str, features: Any, time: int, started: StartedLookups) -> Callable[[], Callable[[], None]]:
        collection = self._collections[path]
        if isinstance(collection, ShardedDynamicCollection):
            engine = collection.engine
            lookup = engine.prefetch(features, time=time, key_peers=self._key_peers)
            started.undo.append(lambda: engine.drop(lookup))
            started.dynamic.setdefault(path, []).append(lookup)

            def send_keys() -> Callable[[], None]:
                lookup.exchange.send_keys()
                return lambda: _discard(lookup.exchange.received_keys())

            return send_keys
        context = collection.create_context()
        sizes = self._twins[path].input_dist(context, features)
        started.undo.append(lambda: _discard(self._ready.pop((path, id(features)), None)))

        def send() -> Callable[[], None]:
            tensors = sizes.wait()

            def receive() -> None:
                self._ready[path, id(features)] = (features, context, tensors.wait())

            return receive

        return send

    def _pipelined_forward(self, path: str, collection: Any) -> Callable[..., Any]:
        # Of the class: an earlier fit may have left its own on the instance.
        plain = functools.partial(type(collection).forward, collection)

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (path, id(_features(args, kwargs)))
            ready = self._ready.pop(key, None) if collection.training else None
            if ready is None:
                return plain(*args, **kwargs)
            _, context, features = ready
            if self._device.type == "cuda":
                stream = torch.cuda.current_stream(self._device)
                context.record_stream(stream)
                features.record_stream(stream)
            return collection.compute_and_output_dist(context, features)

        return forward


def _features(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a collection's forward is given to look up."""
    return args[0] if args else kwargs.get("features")


def _discard(_: object) -> None:
    return None


def _parts(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """Everything inside a batch with its place."""
    yield place, value
    if len(place) == _DEPTH:
        return
    children: Iterator[tuple[str | int, Any]]
    if isinstance(value, Mapping):
        children = iter(value.items())
    elif isinstance(value, (list, tuple)):
        children = iter(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        children = iter((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        return
    for name, child in children:
        yield from _parts(child, (*place, name))


def _at(value: Any, place: Place) -> Any:
    """What lies at a place of a batch; None where there is nothing."""
    for name in place:
        if dataclasses.is_dataclass(value):
            value = getattr(value, str(name), None)
        else:
            try:
                value = value[name]
            except (KeyError, IndexError, TypeError):
                return None
    return value
