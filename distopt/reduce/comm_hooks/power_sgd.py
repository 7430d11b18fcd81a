"""PowerSGD: gradients of matrices cross as products of two thin ones."""

from __future__ import annotations

import torch
from torch import Tensor

from distopt.backends import Backend, Handle
from distopt.reduce.layout import Bucket, Entry
from distopt.reduce.messages import Heard


class PowerSgd:
    """Low-rank gradients with error feedback.

    Each gradient is seen as a matrix M (rows × columns, trailing axes flattened). One step of subspace iteration gives
    P = orthonormal(Σ M Q), Q = Σ Mᵀ P, and the sum over ranks is replaced by P Qᵀ. What a rank's own M loses, M − P Pᵀ
    M, it adds to its next gradient; Q is kept as the next step's start. Parameters that gain nothing (vectors, and
    matrices whose factors are not smaller) cross as they are.

    Args:
        backend: Link to the other ranks.
        rank: Columns of P and Q.

    Cost:
        Two all-reduces a bucket: the plain gradients with all P, then all Q.

    References:
        Vogels et al., PowerSGD, arXiv 1905.13727, algorithms 1 and 2.
    """

    rides = False
    scales_first = False

    def __init__(self, backend: Backend, rank: int) -> None:
        self._backend, self._rank = backend, rank
        self._handles: dict[int, tuple[Handle, Tensor]] = {}
        self._errors: dict[str, Tensor] = {}
        self._starts: dict[str, Tensor] = {}
        self._loaded: set[str] = set()  # of a checkpoint, and not used yet

    def start(self, bucket: Bucket) -> None:
        """Adds the kept errors and starts the sum of the plain gradients and all P."""
        if bucket.slots is not None:
            self._handles[id(bucket)] = (self._backend.all_reduce(bucket.buffer), bucket.buffer)
            return
        sent = [view.reshape(-1) for view in self._plain(bucket)]
        for entry, matrix in self._matrices(bucket):
            matrix += self._errors.setdefault(entry.name, torch.zeros_like(matrix))
            sent.append((matrix @ self._start(entry, matrix)).reshape(-1))
        flat = torch.cat(sent)
        self._handles[id(bucket)] = (self._backend.all_reduce(flat), flat)

    def finish(self, bucket: Bucket, heard: Heard | None = None) -> None:
        """Sums all Q, writes P Qᵀ and keeps the error and Q, those of before where nothing is stepped by P Qᵀ."""
        handle, flat = self._handles.pop(id(bucket))
        handle.wait()
        if bucket.slots is not None:
            return
        at, bases, lefts = 0, {}, []
        for view in self._plain(bucket):
            view.copy_(flat[at : at + view.numel()].view(view.shape))
            at += view.numel()
        matrices = self._matrices(bucket)
        for entry, matrix in matrices:
            size = matrix.shape[0] * self._rank
            bases[entry.name] = _orthonormal(flat[at : at + size].view(matrix.shape[0], self._rank))
            at += size
            lefts.append((matrix.T @ bases[entry.name]).reshape(-1))
        if not matrices:
            return
        stepped = {
            each.name for each, i in zip(bucket.entries, bucket.indices, strict=True) if heard and heard.steps(i)
        }
        summed = torch.cat(lefts)
        own = summed.clone()
        self._backend.all_reduce(summed).wait()
        at = 0
        for entry, matrix in matrices:
            shape, basis = (matrix.shape[1], self._rank), bases[entry.name]
            size = shape[0] * shape[1]
            right = summed[at : at + size].view(shape)
            if entry.name in stepped:
                self._errors[entry.name] = matrix - basis @ own[at : at + size].view(shape).T
                self._starts[entry.name] = right.clone()
                self._loaded.discard(entry.name)
            matrix.copy_(basis @ right.T)
            at += size

    def forget(self, names: set[str]) -> None:
        """Drops errors and starts, as after a step that was skipped for a gradient that was not finite.

        Those that were loaded stay until they are used: the agreement that follows a restore brings the parameters
        they belong to.
        """
        for name in names - self._loaded:
            self._errors.pop(name, None)
            self._starts.pop(name, None)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns what is kept from step to step, by parameter name: this rank's errors, and the starts of all."""
        return {"errors": dict(self._errors), "starts": dict(self._starts)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Goes on from what `state_dict` returned."""
        self._errors, self._starts = dict(state["errors"]), dict(state["starts"])
        self._loaded = self._errors.keys() | self._starts.keys()

    def _gains(self, entry: Entry) -> bool:
        if len(entry.shape) < 2 or entry.dtype not in (torch.float32, torch.float64):
            return False
        rows, columns = entry.shape[0], torch.Size(entry.shape[1:]).numel()
        return (rows + columns) * self._rank < rows * columns

    def _plain(self, bucket: Bucket) -> list[Tensor]:
        views = [view for entry, view in zip(bucket.entries, bucket.views, strict=True) if not self._gains(entry)]
        return [torch.view_as_real(view) if view.is_complex() else view for view in views]

    def _matrices(self, bucket: Bucket) -> list[tuple[Entry, Tensor]]:
        pairs = zip(bucket.entries, bucket.views, strict=True)
        return [(entry, view.view(entry.shape[0], -1)) for entry, view in pairs if self._gains(entry)]

    def _start(self, entry: Entry, matrix: Tensor) -> Tensor:
        start = self._starts.get(entry.name)
        if start is None or start.shape[0] != matrix.shape[1]:
            # The same on all ranks, and never the user's noise.
            generator = torch.Generator().manual_seed(matrix.numel())
            start = torch.randn(matrix.shape[1], self._rank, generator=generator, dtype=matrix.dtype)
            self._starts[entry.name] = start = start.to(matrix.device)
        return start


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns; columns that vanish stay small instead of becoming noise."""
    scale = columns.norm().clamp_min(torch.finfo(columns.dtype).tiny)
    basis: Tensor = torch.linalg.qr(columns / scale).Q
    return basis
