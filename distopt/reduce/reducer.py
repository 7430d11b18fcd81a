"""The reducer: gradients of all ranks become one gradient, equal on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.config.reduce import ReduceOptions
from distopt.reduce.agreement import Agreement, News
from distopt.reduce.buckets import Cleared, fill_bucket_, take_out_
from distopt.reduce.comm_hooks import make_hook
from distopt.reduce.comm_hooks.power_sgd import PowerSgd
from distopt.reduce.drift import checksums, explain_drift, fold
from distopt.reduce.errors import PeerError
from distopt.reduce.layout import Bucket, Entry, Layout
from distopt.reduce.messages import (
    NUM_SLOTS,
    Brought,
    Control,
    Heard,
    Kind,
    Part,
    Reduced,
    fill_,
    read_control,
    write_control,
)
from distopt.reduce.overlap import Overlap
from distopt.reduce.sparse import sum_sparse
from distopt.rng import NoisePolicy
from distopt.sharding import any_local, local_parameter

# Whose `join` is open: a rank that is done follows the calls of one optimizer, and cannot know another's.


_OPEN: WeakKeyDictionary[Backend, object] = WeakKeyDictionary()


@contextmanager
def joining(backend: Backend, owner: object) -> Iterator[None]:
    """Lets `owner` alone call collectives of `backend` meanwhile.

    Raises:
        RuntimeError: Another owner's is open.
    """
    check_alone(backend, owner)
    _OPEN[backend] = owner
    try:
        yield
    finally:
        _OPEN.pop(backend, None)


def is_joining(backend: Backend) -> bool:
    """Whether ranks may have run out of data, and follow."""
    return backend in _OPEN


def check_alone(backend: Backend, owner: object) -> None:
    """Raises RuntimeError when the join of another owner is open, before ranks make calls that do not match."""
    if _OPEN.get(backend, owner) is not owner:
        raise RuntimeError(
            "join() of one DistributedOptimizer is open and another one is called: a rank that has run out of data "
            "follows the one alone, so the ranks' calls would not match. Give one optimizer all parameters (optim_args "
            "may be a callable of the name, see distopt.optim.by_name), or call the other one outside of join()."
        )


_gradient = attrgetter("grad")
_WITHOUT_GRADIENTS = (Kind.SCHEDULE, Kind.AGREE)
_MAX_PATTERNS = 64  # of which parameters are touched: enough for a model whose minibatches alternate


class Reducer:
    """Reduces gradients, and keeps the parameters that all ranks know.

    The steady state costs one all-reduce for each bucket and nothing else. Whatever is not steady (a parameter that
    appears, a rank that raised, ranks at different steps) shows in the control slots of that same all-reduce, to all
    ranks at once, and is settled in an `Agreement`.

    Args:
        backend: Link to the other ranks.
        options: How to reduce, the same on all ranks.
        noise: Whether ranks draw independent noise or the same.
        state: Returns the optimizer's state by parameter name, for the drift watch.
    """

    def __init__(
        self,
        backend: Backend,
        options: ReduceOptions,
        noise: NoisePolicy = "independent",
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.backend = backend
        self.options = options
        self.step = 0
        self.num_agreements = 0
        self.entries: dict[str, Entry] = {}
        self._state = state
        self._exchange = make_hook(options, backend)
        described = options.model_dump(mode="json", include=set(ReduceOptions.model_fields))
        self._agreement = Agreement(backend, described | {"noise": noise}, self.tensor_of)
        self._overlap: Overlap | None = None
        self.cleared = Cleared()
        self.layout = self._build()

    @property
    def rank_local_state(self) -> PowerSgd | None:
        """What keeps state that differs between ranks, to be checkpointed; None when nothing does."""
        return self._exchange if isinstance(self._exchange, PowerSgd) else None

    # What this rank has.

    def look(self, params: Iterable[Tensor]) -> Brought:
        """Finds out what this rank brings: which parameters, with which gradients, and what is new about them."""
        params = list(params)
        if not any_local():
            return self._look_at_shared(params)
        brought = self._look_at_shared([param for param in params if local_parameter(param) is None])
        own = [param for param in params if local_parameter(param) is not None]
        self.cleared.restore(own)
        brought.own = [(self._name(param), param, param.grad) for param in own if param.grad is not None]
        brought.params = params
        brought.num_summed = self.backend.world_size if self.options.op == "sum" else 1
        return brought

    def _look_at_shared(self, params: Sequence[Tensor]) -> Brought:
        layout = self.layout
        places = list(map(layout.index.get, map(id, params)))
        if None in places or not self._is_current(layout):
            return self._look_closely(params)
        if len(places) == len(layout.params) and not layout.sparse:
            gradients = list(map(_gradient, layout.params))
            addresses = _addresses(gradients)
            if addresses is not None:
                return Brought(params, gradients, complete=True, addresses=addresses)
        return self._look_closely(params)

    def tensor_of(self, name: str) -> Tensor | None:
        """Returns this rank's unconstrained tensor of a parameter, None when its store has none."""
        tensor: Tensor | None = pyro.get_param_store().named_parameters().mapping.get(name)
        return tensor

    def _name(self, param: Tensor) -> str:
        name: str | None = pyro.get_param_store().param_name(param)
        if name is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not in Pyro's parameter store, so the ranks cannot "
                "tell which it is. Register it by pyro.param or pyro.module."
            )
        return name

    def _is_current(self, layout: Layout) -> bool:
        # A cleared or replaced store lets go of all names at once, so one name answers for them all.
        return not layout.params or pyro.get_param_store().param_name(layout.params[0]) == layout.names[0]

    def _look_closely(self, params: Sequence[Tensor]) -> Brought:
        self.cleared.restore(params)
        layout = self.layout
        brought = Brought(params)
        gradients: list[Tensor | None] = [None] * len(layout.params)
        for param in params:
            name, gradient = self._name(param), param.grad
            place = layout.index.get(id(param))
            if place is None or layout.names[place] != name or _is_dense_now(layout.entries[place], gradient):
                brought.news[name] = (param, gradient)
            else:
                gradients[place] = gradient
        brought.gradients = gradients
        addresses = _addresses(gradients)
        brought.complete, brought.addresses = not layout.sparse and addresses is not None, addresses
        return brought

    # Rounds.

    def reduce(self, brought: Brought | None, said: Control) -> Reduced:
        """Takes part in one reduction and returns the gradients to step by.

        Args:
            brought: This rank's gradients; None when it only takes part (joined, failed, a scheduler's step).
            said: This rank's control slots; `checksum` and `news` are filled in here.

        Raises:
            PeerError: Another rank has raised.
            DisagreementError: Ranks differ in step, settings, shapes, dtypes or constraints.
            DriftError: Replicas differ.
            BackendError: A rank did not come in time, or is gone.

        Cost:
            One all-reduce per bucket; of a large model (more than one bucket and 4 MiB) a small one before. With news,
            an agreement and the round once more.
        """
        said.news = bool(brought is not None and brought.news)
        sums = None
        if self.options.drift_every_steps and said.step % self.options.drift_every_steps == 0:
            sums = checksums(zip(self.layout.names, self.layout.params, strict=True), self._state())
            said.checksum = fold(sums)
        heard = self._round(brought, said)
        if heard.num_abort or not heard.in_step:
            self.settle(brought, said)
        if sums is not None and heard.kind is Kind.GRADIENT and not heard.in_sync:
            raise explain_drift(self.backend, sums, said.step)
        if heard.num_news:
            self.settle(brought, said)
            brought = self.look(brought.params) if brought is not None else None
            said.news = False
            heard = self._round(brought, said)
        return self._collect(heard, brought)

    def abort(self, error: BaseException, said: Control) -> None:
        """Takes part in one reduction with an error instead of gradients; the others raise it as `PeerError`."""
        said.kind, said.abort = Kind.ABORT, True
        self._round(None, said)
        try:
            self.settle(None, said, error)
        except PeerError:
            return  # the caller raises its own

    def settle(self, brought: Brought | None, said: Control, error: BaseException | None = None) -> None:
        """Agrees with all ranks on what is known from now on; a collective call.

        Raises:
            PeerError, DisagreementError: As `Agreement.settle`.
        """
        news = News(said.step, said.kind.name.lower() if said.kind is not None else "joined", error=error)
        if brought is not None:
            news.names = set(brought.news)
            for name, (_, gradient) in brought.news.items():
                if gradient is not None:
                    is_sparse = gradient.is_sparse and not self.options.sparse_as_dense
                    (news.sparse if is_sparse else news.dense).add(name)
        self.backend.note(said.step, "agree")
        self.num_agreements += 1
        before, self.entries = self.entries, self._agreement.settle(news, self.entries)
        self._exchange.forget({n for n in before.keys() | self.entries if before.get(n) is not self.entries.get(n)})
        self.layout = self._build()

    def _build(self) -> Layout:
        tensors = {name: self.tensor_of(name) for name in self.entries}
        self._dense: list[Part] | None = None
        self._patterns: dict[tuple[bool, ...], list[tuple[Bucket, list[int], Part]]] = {}
        layout = Layout(
            self.entries,
            {name: tensor for name, tensor in tensors.items() if tensor is not None},
            bucket_mib=self.options.bucket_mib,
            groups=self.options.groups,
            rides=self._exchange.rides,
            control_device=self.backend.control_device,
        )
        if self._overlap is not None:
            self._overlap.close()
        if self.options.overlap:
            self._overlap = Overlap(layout, self._start_early)
        return layout

    @torch.no_grad()
    def _round(self, brought: Brought | None, said: Control) -> Heard:
        check_alone(self.backend, self)
        layout, exchange, overlap = self.layout, self._exchange, self._overlap
        if not self._sends_scaled and (brought is not None or said.kind is Kind.SCHEDULE):
            take_out_(layout, brought or Brought(gradients=list(map(_gradient, layout.params))))
        if brought is not None and brought.news:
            brought = None  # this round's sums are thrown away
        carrier, others = layout.buckets[0], layout.buckets[1:]
        fill_bucket_(carrier, brought, self._scale_before())
        write_control(layout.slots, said)
        if brought is not None:
            self._write_touched(layout.slots[NUM_SLOTS:], brought)
        # A joined rank cannot know whether the others bring gradients or only step a scheduler, say, which has no use
        # for the other buckets; it looks first, and so do all where these are large. With overlap they are on their
        # way.
        looks_first = overlap is None and (layout.looks_first or said.kind in (None, *_WITHOUT_GRADIENTS))
        if overlap is not None:
            self._start(overlap.waiting, brought)
        exchange.start(carrier)
        if overlap is None and not looks_first:
            self._start(others, brought)
        exchange.finish(carrier)
        heard = read_control(layout.slots, self.backend.world_size)
        if looks_first:
            if not self._brings_gradients(heard):
                return heard
            self._start(others, brought, heard.num_active)
        for bucket in others:
            exchange.finish(bucket, heard)
        if overlap is not None:
            overlap.reset()
        return heard

    @property
    def _sends_scaled(self) -> bool:
        """Whether gradients cross once the number of active ranks is known, divided by it as they are copied."""
        return self.layout.looks_first and self._overlap is None

    def _brings_gradients(self, heard: Heard) -> bool:
        """Whether the other buckets follow those that were looked at first; the same on all ranks."""
        if self._sends_scaled:
            return heard.kind is Kind.GRADIENT and not heard.num_news and not heard.num_abort
        return heard.num_active > 0 and heard.kind not in _WITHOUT_GRADIENTS

    def _start(self, buckets: Sequence[Bucket], brought: Brought | None, num_active: int | None = None) -> None:
        scale = self._scale_before()
        if self._sends_scaled and num_active is not None:
            scale *= self._scale_after(num_active)
        for bucket in buckets:
            fill_bucket_(bucket, brought, scale)
            self._exchange.start(bucket)

    def _start_early(self, bucket: Bucket) -> None:
        gradients: list[Tensor | None] = [param.grad for param in self.layout.params]
        brought = Brought(gradients=gradients)
        take_out_(self.layout, brought)
        self._start([bucket], brought)

    def _scale_before(self) -> float:
        if self.options.op != "average":
            return 1.0
        by_size = self._exchange.scales_first and self.options.gradient_predivide_factor == 1.0
        return 1.0 / (self.backend.world_size if by_size else self.options.gradient_predivide_factor)

    def _scale_after(self, num_active: int) -> float:
        if self.options.op != "average":
            return 1.0
        return 1.0 / (num_active * self._scale_before())

    def _write_touched(self, slots: Tensor, brought: Brought) -> None:
        fill_(slots, 1.0 if brought.complete else [float(gradient is not None) for gradient in brought.gradients])

    # What comes back.

    @torch.no_grad()
    def _collect(self, heard: Heard, brought: Brought | None) -> Reduced:
        reduced = Reduced(heard, brought)
        if heard.kind is not Kind.GRADIENT:
            return reduced
        layout, scale = self.layout, self._scale_after(heard.num_active)
        for bucket in layout.buckets:
            if scale != 1.0 and bucket.entries and not self._sends_scaled:
                bucket.flat.mul_(scale)
        if (
            not layout.sparse
            and all(not bucket.is_complex for bucket in layout.buckets)
            and min(heard.touched, default=0)
        ):
            if self._dense is None:
                self._dense = [
                    Part(bucket.names, tuple(layout.params[index] for index in bucket.indices), bucket.flat)
                    for bucket in layout.buckets
                    if bucket.entries
                ]
            reduced.dense = self._dense
        else:
            self._collect_touched(reduced, brought, scale)
        if brought is not None and brought.own:
            for _, param, gradient in brought.own:
                if (divisor := brought.own_divisor(param)) != 1:
                    gradient.div_(divisor)
            reduced.loose += brought.own
            reduced.num_own = len(brought.own)
        return reduced

    def _collect_touched(self, reduced: Reduced, brought: Brought | None, scale: float) -> None:
        layout, touched = self.layout, [count > 0 for count in reduced.heard.touched]
        for bucket, places, part in self._pattern(tuple(touched)):
            views = [bucket.views[place] for place in places]
            if len(places) == len(bucket.views) and not bucket.is_complex:
                reduced.dense.append(Part(part.names, part.params, bucket.flat))
            elif bucket.is_complex or bucket.is_large:
                reduced.loose += zip(part.names, part.params, views, strict=True)
            else:
                reduced.dense.append(part._replace(buffer=torch.cat([view.reshape(-1) for view in views])))
        sparse = [index for index in layout.sparse if touched[index]]
        if sparse:
            own = [brought.gradients[index] if brought is not None else None for index in sparse]
            sums = sum_sparse(self.backend, [layout.entries[index] for index in sparse], own)
            after = scale * self._scale_before()
            for index, total in zip(sparse, sums, strict=True):
                reduced.loose.append((layout.names[index], layout.params[index], total * after))

    def _pattern(self, touched: tuple[bool, ...]) -> list[tuple[Bucket, list[int], Part]]:
        """For each bucket: which of its parameters are touched, as the same tuples each time."""
        found = self._patterns.get(touched)
        if found is None:
            found = []
            for bucket in self.layout.buckets:
                places = [place for place, index in enumerate(bucket.indices) if touched[index]]
                if places:
                    params = tuple(self.layout.params[bucket.indices[place]] for place in places)
                    found.append((bucket, places, Part(tuple(bucket.names[p] for p in places), params, bucket.flat)))
            if len(self._patterns) >= _MAX_PATTERNS:
                self._patterns.clear()
            self._patterns[touched] = found
        return found

    def forget_errors(self) -> None:
        """Drops what compression keeps from step to step, as after a gradient that was not finite."""
        self._exchange.forget(set(self.layout.names))


def _addresses(gradients: Sequence[Tensor | None]) -> list[int] | None:
    """Where each gradient lies; None when one is missing or sparse."""
    try:
        # One loop of the interpreter's own: a thousand parameters are looked at in each step.
        return list(map(Tensor.data_ptr, gradients))  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # None has no address, nor has a sparse tensor
        return None


def _is_dense_now(entry: Entry, gradient: Tensor | None) -> bool:
    return entry.sparse and gradient is not None and not gradient.is_sparse
