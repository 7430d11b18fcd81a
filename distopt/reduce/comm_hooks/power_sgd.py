"""PowerSGD: gradients of matrices are sent as products of two thin ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distopt.backends import Backend, Handle
from distopt.config.reduce import ReduceOptions
from distopt.reduce.comm_hooks.base import CommHook
from distopt.reduce.layout import Bucket, ParamSpec
from distopt.reduce.messages import RoundSummary


class PowerSGD(CommHook):
    """Low-rank gradients with error feedback.

    Each gradient is seen as a matrix M (rows × columns, trailing axes flattened). One step of subspace iteration gives
    P = orthonormal(Σ M Q), Q = Σ Mᵀ P, and the sum over ranks is replaced by P Qᵀ. What a rank's own M loses, M − P Pᵀ
    M, it adds to its next gradient; Q is kept as the next step's start. Parameters that gain nothing (vectors, and
    matrices whose factors are not smaller) are summed as they are.

    Cost:
        Two all-reduces a bucket: the plain gradients with all P, then all Q.

    References:
        Vogels et al., PowerSGD, arXiv 1905.13727, algorithms 1 and 2.
    """

    has_rank_local_state = True

    def __init__(self, backend: Backend, options: ReduceOptions) -> None:
        super().__init__(backend, options)
        self._rank = options.power_sgd_rank
        self._errors: dict[str, Tensor] = {}  # (rows, columns), differ between ranks
        self._starts: dict[str, Tensor] = {}  # (columns, rank), equal on all ranks
        self._loaded: set[str] = set()  # of a checkpoint, and not used yet

    def start(self, bucket: Bucket) -> tuple[Handle, Tensor]:
        """Adds the kept errors and starts the sum of the plain gradients and all P."""
        pieces = [view.reshape(-1) for view in self._plain(bucket)]
        for spec, matrix in self._matrices(bucket):
            matrix += self._errors.setdefault(spec.name, torch.zeros_like(matrix))
            pieces.append((matrix @ self._start_of(spec, matrix)).reshape(-1))
        flat = torch.cat(pieces)
        return self.backend.all_reduce(flat), flat

    def finish(self, bucket: Bucket, started: Any, summary: RoundSummary | None) -> None:
        """Sums all Q, writes P Qᵀ and keeps the error and Q, those of before where nothing is stepped by P Qᵀ."""
        handle, flat = started
        handle.wait()
        plain, matrices = self._plain(bucket), self._matrices(bucket)
        sizes = [view.numel() for view in plain] + [matrix.shape[0] * self._rank for _, matrix in matrices]
        pieces = torch.split(flat, sizes)
        for view, piece in zip(plain, pieces, strict=False):
            view.copy_(piece.view(view.shape))
        if not matrices:
            return

        # P is the same on all ranks, Q = Mᵀ P of this rank and, after the sum, of all.
        lefts = [_orthonormal(piece.view(-1, self._rank)) for piece in pieces[len(plain) :]]
        local = torch.cat([(matrix.T @ left).reshape(-1) for (_, matrix), left in zip(matrices, lefts, strict=True)])
        summed = local.clone()
        self.backend.all_reduce(summed).wait()

        # A round whose gradients are thrown away must leave the errors as they were: they are added anew to the
        # gradients of the round that is made in its place, and a parameter that no rank has touched loses nothing.
        stepped = {
            spec.name
            for spec, index in zip(bucket.specs, bucket.indices, strict=True)
            if summary is not None and summary.is_stepped(index)
        }
        sizes = [matrix.shape[1] * self._rank for _, matrix in matrices]
        for (spec, matrix), left, q_local, q_summed in zip(
            matrices, lefts, torch.split(local, sizes), torch.split(summed, sizes), strict=True
        ):
            right = q_summed.view(-1, self._rank)
            if spec.name in stepped:
                self._errors[spec.name] = matrix - left @ q_local.view(-1, self._rank).T
                self._starts[spec.name] = right.clone()
                self._loaded.discard(spec.name)
            matrix.copy_(left @ right.T)

    def forget(self, names: set[str]) -> None:
        """Drops errors and starts, as after a step that was skipped for a gradient that was not finite.

        Those that were loaded stay until they are used: the agreement that follows a restore brings the parameters
        they belong to.
        """
        for name in names - self._loaded:
            self._errors.pop(name, None)
            self._starts.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """Returns what is kept from step to step, by parameter name: this rank's errors, and the starts of all."""
        return {"errors": dict(self._errors), "starts": dict(self._starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self._errors = dict(state["errors"])
        self._starts = dict(state["starts"])
        self._loaded = self._errors.keys() | self._starts.keys()

    def _gains(self, spec: ParamSpec) -> bool:
        if len(spec.shape) < 2 or spec.dtype not in (torch.float32, torch.float64):
            return False
        rows, columns = spec.shape[0], torch.Size(spec.shape[1:]).numel()
        return (rows + columns) * self._rank < rows * columns

    def _plain(self, bucket: Bucket) -> list[Tensor]:
        views = [view for spec, view in zip(bucket.specs, bucket.views, strict=True) if not self._gains(spec)]
        return [torch.view_as_real(view) if view.is_complex() else view for view in views]

    def _matrices(self, bucket: Bucket) -> list[tuple[ParamSpec, Tensor]]:
        pairs = zip(bucket.specs, bucket.views, strict=True)
        return [(spec, view.view(spec.shape[0], -1)) for spec, view in pairs if self._gains(spec)]

    def _start_of(self, spec: ParamSpec, matrix: Tensor) -> Tensor:
        start = self._starts.get(spec.name)
        if start is None or start.shape[0] != matrix.shape[1]:
            # The same on all ranks, and drawn from a generator that the user's model does not draw from.
            generator = torch.Generator().manual_seed(matrix.numel())
            start = torch.randn(matrix.shape[1], self._rank, generator=generator, dtype=matrix.dtype)
            self._starts[spec.name] = start = start.to(matrix.device)
        return start


def _orthonormal(columns: Tensor) -> Tensor:
    """Returns an orthonormal basis of the columns; columns that vanish stay small instead of becoming noise."""
    scale = columns.norm().clamp_min(torch.finfo(columns.dtype).tiny)
    basis: Tensor = torch.linalg.qr(columns / scale).Q
    return basis
