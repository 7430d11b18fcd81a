"""The reducer: gradients of all ranks become one gradient, equal on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from torch import Tensor

from distopt.backends import Backend, Json
from distopt.config.reduce import ReduceOptions
from distopt.reduce.agreement import Agreement, LayoutChanges
from distopt.reduce.comm_hooks import CommHook, make_hook
from distopt.reduce.comm_hooks.allreduce import AllReduce
from distopt.reduce.drift import NonfiniteNames, checksums, combine_checksums, explain_drift, find_nonfinite
from distopt.reduce.errors import PeerError
from distopt.reduce.gradients import (
    BucketReader,
    DroppedGradients,
    LocalGradients,
    NamedGradient,
    ReducedGradients,
    changed_gradients,
    collect_gradients,
    gradient_of,
    keep_gradients_,
    move_out_of_buckets_,
    touched_slots,
    zero_in_buckets_,
)
from distopt.reduce.layout import Bucket, Layout, ParamSpec
from distopt.reduce.loop_counters import LoopCounters
from distopt.reduce.messages import (
    NUM_SLOTS,
    RankMessage,
    RoundKind,
    RoundSummary,
    read_summary,
    summary_of_one,
    write_message,
    write_slots_,
)
from distopt.reduce.overlap import Overlap
from distopt.reduce.running_averages import RunningAverages
from distopt.reduce.sparse import sum_sparse
from distopt.rng import NoisePolicy

SORTED_AFTER = 16
"""Rounds without a new parameter after which they are sorted in: what that takes is a few steps of theirs."""

_WITHOUT_GRADIENTS = (RoundKind.SCHEDULE, RoundKind.AGREE)


class Reducer:
    """Reduces gradients, and keeps the parameters that all ranks know.

    The steady state costs one all-reduce for each bucket and nothing else. Whatever is not steady (a parameter that
    appears, a rank that raised, ranks at different steps) shows in the control slots of that same all-reduce, to all
    ranks at once, and is resolved by an `Agreement`.

    Args:
        backend: Link to the other ranks.
        options: How to reduce, the same on all ranks.
        rng_policy: Whether the ranks draw independent noise or the same.
        state: Returns the optimizer's state by parameter name, for the drift watch.

    Attributes:
        backend: As given.
        options: As given.
        step: The step that this rank is at.
        num_agreements: How often the ranks have agreed on parameters.
        specs: The parameters that all ranks know, by name.
        layout: Their order and buckets.
        dropped: Gradients that were set to zero by dropping them.
        averages: Those that this rank's loss has computed.
        loop_counters: What tells whether this rank has left out a call.
        model_survey: What `ModelSurvey.describe` says of this rank's model, for the first agreement.
    """

    def __init__(
        self,
        backend: Backend,
        options: ReduceOptions,
        rng_policy: NoisePolicy = "independent",
        state: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.backend = backend
        self.options = options
        self.step = 0
        self.num_agreements = 0
        self.specs: dict[str, ParamSpec] = {}
        self.dropped = DroppedGradients()
        self.averages = RunningAverages()
        self.loop_counters = LoopCounters()
        self.model_survey: Json = None
        self._state = state
        self._hook = make_hook(backend, options)
        self._control_hook = self._hook if self._hook.carries_control else AllReduce(backend, options)
        compared = options.model_dump(mode="json", include=set(ReduceOptions.model_fields)) | {"noise": rng_policy}
        self._agreement = Agreement(backend, compared, tensor_of)
        self._overlap: Overlap | None = None
        self._num_rounds = 0  # since the last agreement
        self._saved: list[Bucket] = []  # whose gradients were copied aside in the last round
        self._use_layout(build_layout(self, {}, {}))

    @property
    def rank_local_state(self) -> CommHook | None:
        """The hook, if it keeps state that differs between ranks, to be checkpointed; else None."""
        return self._hook if self._hook.has_rank_local_state else None

    def forget_errors(self) -> None:
        """Drops what the hook keeps from step to step, as after a gradient that was not finite."""
        self._hook.forget(set(self.layout.names))

    def collect_gradients(self, params: Iterable[Tensor]) -> LocalGradients:
        """Returns this rank's gradients, and the parameters that the layout does not know yet."""
        local = collect_gradients(params, self.layout, self.dropped, self.averages)
        local.num_summed = self.backend.world_size if self.options.op == "sum" else 1
        return local

    # Reducing.
    #
    # A reduction is one round, or two with an agreement between them. In a round every rank sums its gradients and its
    # control slots with the others'. The slots say the same to all ranks, and everything that follows depends on them
    # alone: this is the invariant that keeps ranks in the same order of collectives although each of them knows only
    # its own parameters, data and errors. If some rank has parameters that the layout lacks, the ranks agree on a new
    # layout. Where that only adds some, the second round sums their gradients alone (`complete_round`); else the sums
    # are thrown away, and the round is made again with the new layout.

    def reduce(self, local: LocalGradients | None, message: RankMessage) -> ReducedGradients:
        """Takes part in one reduction and returns the gradients to step by.

        Args:
            local: This rank's gradients; None when it only takes part (joined, failed, a scheduler's step).
            message: What this rank tells; `checksum` and `has_changes` are filled in here.

        Raises:
            PeerError: Another rank has raised.
            DisagreementError: Ranks differ in step, options, shapes, dtypes or constraints.
            DriftError: Replicas differ.
            BackendError: A rank did not come in time, or is gone.

        Cost:
            One all-reduce per bucket; one before those of a large model; with changes, an agreement and a second round.
        """
        if sort_layout(self) and local is not None:
            local = self.collect_gradients(local.params)
        message.has_changes = local is not None and bool(local.changes)
        sums = None
        if self.options.drift_every_steps and message.step % self.options.drift_every_steps == 0:
            sums = checksums(zip(self.layout.names, self.layout.params, strict=True), self._state())
            message.checksum = combine_checksums(sums)
        if local is not None and self._scale_before() == 1.0 and is_alone(self, local):
            fill_alone_(self.layout, local)
            return self._read_out(summary_of_one(message, len(self.layout.names)), local)
        summary = self._round(local, message)
        kept = sums_to_keep(self, summary)
        if summary.num_aborts or summary.num_changed or not summary.in_step:
            for bucket in self._saved:
                bucket.restore_()

        if summary.num_aborts or not summary.in_step:
            self.renegotiate(local, message)  # raises the same error on all ranks, or finds that they are in step
            local, summary = self._repeat_round(local, message)
        if sums is not None and summary.kind is RoundKind.GRADIENT and not summary.in_sync:
            raise explain_drift(self.backend, sums, message.step)
        if summary.num_changed:
            saved = self._saved
            self.renegotiate(local, message)
            if kept is not None and not self.layout.is_sorted:
                self._saved = saved
                local, summary = complete_round(self, local, message, summary, kept)
            else:
                local, summary = self._repeat_round(local, message)
        return self._read_out(summary, local)

    def _repeat_round(
        self, local: LocalGradients | None, message: RankMessage
    ) -> tuple[LocalGradients | None, RoundSummary]:
        """Makes a round again after the ranks have agreed on what it has shown."""
        local = self.collect_gradients(local.params) if local is not None else None
        message.has_changes = False
        message.skipped_calls = 0
        return local, self._round(local, message)

    def zero_(self, params: Iterable[Tensor]) -> None:
        """Sets the gradient of each parameter that has one to zero, see `DroppedGradients`."""
        params = tuple(params)
        if not zero_in_buckets_(params, self.layout):
            self.dropped.zero_(params)

    def abort(self, error: BaseException, step: int) -> None:
        """Takes part in one reduction with an error instead of gradients; the others raise it as `PeerError`."""
        message = RankMessage(step, RoundKind.ABORT)
        sort_layout(self)
        self._round(None, message)
        try:
            self.renegotiate(None, message, error)
        except PeerError:
            return  # the caller raises its own

    def renegotiate(
        self, local: LocalGradients | None, message: RankMessage, error: BaseException | None = None
    ) -> None:
        """Agrees with all ranks on what is known from now on, and builds the new layout; a collective call.

        Raises:
            PeerError, DisagreementError: As `Agreement.renegotiate`.
        """
        activity = message.kind.name.lower() if message.kind is not None else "joined"
        changes = LayoutChanges(message.step, activity, schedule_steps=message.schedule_steps, error=error)
        changes.survey = self.model_survey
        self.model_survey = None
        if message.kind is not None:
            changes.loop_counters = self.loop_counters.describe()
        if local is not None:
            changes.names = set(local.changes)
            for name, (_, gradient) in local.changes.items():
                if gradient is not None:
                    is_sparse = gradient.is_sparse and not self.options.sparse_as_dense
                    (changes.sparse if is_sparse else changes.dense).add(name)

        self.backend.note(message.step, "agree")
        self.num_agreements += 1
        before = self.specs
        self.specs, changed = self._agreement.renegotiate(changes, before)
        self._hook.forget(changed)
        self._use_layout(_next_layout(self, before, changed))
        self._num_rounds = 0

    def _use_layout(self, layout: Layout) -> None:
        self.layout = layout
        self._reader = BucketReader(layout)
        self._saved = []
        self._started: dict[Bucket, Any] = {}
        if self._overlap is not None:
            self._overlap.close()
        if self.options.overlap:
            self._overlap = Overlap(layout, self._start_during_backward)

    # One round. The first bucket carries the control slots, and all buckets are under way before the first is waited
    # for, in two cases not:
    #  - A large model waits for the slots before it sends anything large: a round that is thrown away then costs a few
    #    hundred bytes, and the number of active ranks is known when gradients are copied into the buckets, so that the
    #    copy divides by it and no pass over the sums is needed.
    #  - A rank that has joined cannot know whether the others bring gradients or only step a scheduler, say, where no
    #    other buckets follow; so it looks at the slots before it starts the other buckets, and so do the ranks that
    #    step the scheduler. Ranks that bring gradients need not: they know that the others follow.
    # With overlap the other buckets are on their way in any case, started by backward or started here.

    @torch.no_grad()
    def _round(self, local: LocalGradients | None, message: RankMessage) -> RoundSummary:
        check_alone(self.backend, self)
        layout, overlap = self.layout, self._overlap
        self._saved = []
        if not self._divides_in_copy and (local is not None or message.kind is RoundKind.SCHEDULE):
            gradients = local or LocalGradients(gradients=list(map(gradient_of, layout.params)))
            # Of one rank alone the plain sum changes nothing, and the round is not made again.
            is_safe = self.backend.world_size == 1 and type(self._hook) is AllReduce
            self._saved = keep_gradients_(layout, gradients, is_safe=is_safe)
        if local is not None and local.changes and not may_keep_sums(self):
            local = None  # this round's sums are thrown away

        first, others = layout.buckets[0], layout.buckets[1:]
        _fill_(first, local, self._scale_before())
        write_message(layout.slots, message)
        if local is not None:
            write_slots_(layout.slots[NUM_SLOTS:], touched_slots(local))

        control_first = overlap is None and (layout.control_first or message.kind in (None, *_WITHOUT_GRADIENTS))
        if overlap is not None:
            self._start(overlap.waiting, local)
        self._started[first] = self._control_hook.start(first)
        if overlap is None and not control_first:
            self._start(others, local)
        self._control_hook.finish(first, self._started.pop(first), None)
        summary = read_summary(layout.slots, self.backend.world_size)

        if control_first:
            if not self._gradients_follow(summary):
                return summary
            if local is not None and self._divides_in_copy and not all(map(math.isfinite, summary.mean_values)):
                self._saved = keep_gradients_(layout, local, is_safe=False)  # the sums will not tell whose they are
            self._start(others, local, summary.num_active)
        for bucket in others:
            self._hook.finish(bucket, self._started.pop(bucket), summary)
        if overlap is not None:
            overlap.reset()
        return summary

    def _gradients_follow(self, summary: RoundSummary) -> bool:
        """Returns whether the other buckets follow where the control slots were waited for; the same on all ranks."""
        if self._divides_in_copy:
            return summary.kind is RoundKind.GRADIENT and not summary.num_changed and not summary.num_aborts
        return summary.num_active > 0 and summary.kind not in _WITHOUT_GRADIENTS

    def _start(self, buckets: Sequence[Bucket], local: LocalGradients | None, num_active: int | None = None) -> None:
        scale = self._scale_before()
        if self._divides_in_copy and num_active is not None:
            scale *= self._scale_after(num_active)
        for bucket in buckets:
            _fill_(bucket, local, scale)
            self._started[bucket] = self._hook.start(bucket)

    def _start_during_backward(self, bucket: Bucket) -> None:
        local = LocalGradients(gradients=[param.grad for param in self.layout.params])
        move_out_of_buckets_(self.layout, local)
        self._start([bucket], local)

    # An average is a sum over ranks times 1 / (number of active ranks), which is known only after the control slots
    # were summed. The factor is applied in two parts, before and after the sum: before it, what the user
    # (`gradient_predivide_factor`) or a hook of small range (`divides_first`) asks for; after it, the rest. Where the
    # slots are waited for first, both are applied as gradients are copied.

    @property
    def _divides_in_copy(self) -> bool:
        return self.layout.control_first and self._overlap is None

    def _scale_before(self) -> float:
        if self.options.op != "average":
            return 1.0
        predivide = self.options.gradient_predivide_factor
        by_size = self._hook.divides_first and predivide == 1.0
        return 1.0 / (self.backend.world_size if by_size else predivide)

    def _scale_after(self, num_active: int) -> float:
        if self.options.op != "average":
            return 1.0
        return 1.0 / (num_active * self._scale_before())

    def _read_out(self, summary: RoundSummary, local: LocalGradients | None) -> ReducedGradients:
        """Returns the gradients that a round has left in the buckets, and the sums of sparse ones."""
        reduced = ReducedGradients(summary, local, missing=self.layout.named(summary.missing))
        if summary.kind is not RoundKind.GRADIENT:
            return reduced

        scale = self._scale_after(summary.num_active)
        if scale != 1.0 and not self._divides_in_copy:
            for bucket in self.layout.buckets:
                if bucket.specs:
                    bucket.flat.mul_(scale)
        reduced.dense, reduced.loose = self._reader.read(summary.touched)
        if self.layout.sparse:
            reduced.loose += _sum_sparse(self, summary, local, scale * self._scale_before())
        if self.layout.averages:
            self.averages.share_(self.backend, self.layout, summary.num_active, local is not None)
        if local is not None:
            reduced.rank_local = local.scale_rank_local_()
            reduced.missing += local.rank_local_missing
        return reduced


@torch.no_grad()
def _sum_sparse(
    reducer: Reducer, summary: RoundSummary, local: LocalGradients | None, factor: float
) -> list[NamedGradient]:
    """Returns the sums of sparse gradients times `factor`."""
    layout = reducer.layout
    indices = [index for index in layout.sparse if summary.touched[index] > 0]
    if not indices:
        return []
    gradients = [local.gradients[index] if local is not None else None for index in indices]
    sums = sum_sparse(reducer.backend, [layout.specs[index] for index in indices], gradients)
    return [(layout.names[i], layout.params[i], total * factor) for i, total in zip(indices, sums, strict=True)]


def is_alone(reducer: Reducer, local: LocalGradients) -> bool:
    """Returns whether a rank has nobody to tell anything, and nothing to sum or to agree on."""
    return (
        reducer.backend.world_size == 1
        and local.complete
        and not local.changes
        and type(reducer._hook) is AllReduce
        and reducer._overlap is None
        and not is_joining(reducer.backend)
    )


def fill_alone_(layout: Layout, local: LocalGradients) -> None:
    """Overwrites the buckets of a rank that sums with nobody, but for those that its gradients fill already."""
    # A bucket may hold some of its gradients and not others, where the optimizer has stepped only some by views of it.
    whole = [bucket for bucket in layout.buckets if not bucket.indices or bucket.holds(local.addresses)]
    if len(whole) < len(layout.buckets):
        move_out_of_buckets_(layout, local, besides=whole)
        for bucket in layout.buckets:
            if bucket not in whole:
                _fill_(bucket, local, 1.0)


def _fill_(bucket: Bucket, local: LocalGradients | None, scale: float) -> None:
    if local is None:
        bucket.fill_(None, scale)
    else:
        bucket.fill_(local.gradients, scale, complete=local.complete, addresses=local.addresses)


def nonfinite_names(reducer: Reducer, local: LocalGradients | None) -> NonfiniteNames:
    """Returns which of the gradients that this rank brought to the last reduction are not finite."""
    return find_nonfinite(reducer.layout, reducer._saved, local, reducer.backend.world_size)


# A model that grows. What a round has summed before it found new parameters stays valid where these do not change what
# the buckets mean, so only the new gradients are summed in the second round: its cost follows from what is new.


def may_keep_sums(reducer: Reducer) -> bool:
    """Returns whether a round may be completed after an agreement, and need not be made again; the same on all ranks.

    It may where each bucket is one plain sum. A large model sends no gradients before the agreement.
    """
    layout = reducer.layout
    return type(reducer._hook) is AllReduce and reducer._overlap is None and not layout.control_first


def sums_to_keep(reducer: Reducer, summary: RoundSummary) -> list[Tensor] | None:
    """Returns what a round has summed, by bucket, if it holds besides new parameters; the same on all ranks."""
    is_whole = summary.kind is RoundKind.GRADIENT and not summary.num_aborts
    if not (summary.num_changed and is_whole and may_keep_sums(reducer)):
        return None
    saved = set(reducer._saved)  # these are restored before the agreement, which may raise
    return [bucket.flat.clone() if bucket in saved else bucket.flat for bucket in reducer.layout.buckets]


@torch.no_grad()
def complete_round(
    reducer: Reducer,
    local: LocalGradients | None,
    message: RankMessage,
    before: RoundSummary,
    kept: Sequence[Tensor],
) -> tuple[LocalGradients | None, RoundSummary]:
    """Completes a round after its layout was extended: sums the new gradients, in a layout of their own.

    Args:
        reducer: With the extended layout, whose buckets are filled.
        local: This rank's gradients as it brought them to the round; None if it only takes part.
        message: What it told.
        before: What the round has found.
        kept: What it has summed, by bucket.
    """
    layout, saved = reducer.layout, reducer._saved
    num_known = len(before.touched)
    names = layout.names[num_known:]
    specs = dict(zip(names, layout.specs[num_known:], strict=True))
    new = build_layout(reducer, specs, dict(zip(names, layout.params[num_known:], strict=True)))
    of_new = None if local is None else changed_gradients(local, new)
    message.has_changes = False
    message.skipped_calls = 0

    reducer.layout = new
    try:
        summary = reducer._round(of_new, message)
    finally:
        reducer.layout = layout
        reducer._saved = saved
    layout.take_sums_(kept, new)

    summary.touched = before.touched + summary.touched
    summary.missing = before.missing + tuple(num_known + index for index in summary.missing)
    return (None if local is None or of_new is None else local.extended(of_new)), summary


def _next_layout(reducer: Reducer, before: Mapping[str, ParamSpec], changed: set[str]) -> Layout:
    """Returns the layout of what the ranks have agreed on; `changed` are the names in question, `before` those known.

    With overlap each layout is sorted at once: buckets are under way before the round in which a sorted one would take
    its place, and not the same ones on all ranks.
    """
    params = pyro.get_param_store().named_parameters().mapping
    extends = changed.isdisjoint(before) and not reducer.options.overlap
    extended = reducer.layout.extended(reducer.specs, params) if extends else None
    return extended or build_layout(reducer, reducer.specs, params)


def sort_layout(reducer: Reducer) -> bool:
    """Makes an extended layout anew once no parameter has come for a while; returns whether it did.

    All ranks do it before the same round, as each of them takes part in every one.
    """
    layout = reducer.layout
    reducer._num_rounds += 1
    if layout.is_sorted or reducer._num_rounds < SORTED_AFTER:
        return False
    params = dict(zip(layout.names, layout.params, strict=True))
    reducer._use_layout(build_layout(reducer, reducer.specs, params))
    reducer.specs = reducer.layout.specs_by_name()
    return True


def build_layout(reducer: Reducer, specs: Mapping[str, ParamSpec], params: Mapping[str, Tensor]) -> Layout:
    """Returns the sorted layout of parameters that all ranks know, of which `params` has this rank's tensors."""
    return Layout(
        specs,
        params,
        bucket_mib=reducer.options.bucket_mib,
        groups=reducer.options.groups,
        carries_control=reducer._hook.carries_control,
        control_device=reducer.backend.control_device,
    )


def tensor_of(name: str) -> Tensor | None:
    """Returns this rank's unconstrained tensor of a parameter, None when its store has none."""
    tensor: Tensor | None = pyro.get_param_store().named_parameters().mapping.get(name)
    return tensor


# Which reducer's `join` is open on a backend. A rank that has run out of data follows the calls of one optimizer, and
# cannot know when the others call another one, so that their collectives would be paired with the wrong ones.

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
    """Returns whether ranks may have run out of data and follow the others."""
    return backend in _OPEN


def check_alone(backend: Backend, owner: object) -> None:
    """Raises RuntimeError when the join of another owner is open, before ranks make calls that do not match."""
    if _OPEN.get(backend, owner) is not owner:
        raise RuntimeError(
            "join() of one DistributedOptimizer is open and another one is called: a rank that has run out of data "
            "follows the one alone, so the ranks' calls would not match. Give one optimizer all parameters (optim_args "
            "may be a callable of the name, see distopt.optim.by_name), or call the other one outside of join()."
        )
