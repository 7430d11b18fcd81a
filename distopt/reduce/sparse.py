"""Sparse gradients, sent as sparse: the bytes grow with the rows touched, not with the parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distopt.backends import Backend
from distopt.reduce.layout import ParamSpec


def sum_sparse(backend: Backend, specs: Sequence[ParamSpec], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Returns the sums over all ranks of sparse gradients, coalesced and equal on all ranks.

    Args:
        backend: Link to the other ranks.
        specs: The parameters.
        gradients: This rank's gradients (sparse COO, all with the same number of sparse axes on all ranks, which is one
            for embeddings); None where it has none.

    Cost:
        One gather of two numbers per parameter, then two per parameter of as many elements as the fullest rank has.
    """
    coalesced = [None if gradient is None else gradient.coalesce() for gradient in gradients]
    counts = torch.tensor([[0, 0] if g is None else [g._nnz(), g.sparse_dim()] for g in coalesced], dtype=torch.int64)
    all_counts = backend.all_gather(counts)  # (world size, parameters, 2)

    sums = []
    for number, (spec, gradient) in enumerate(zip(specs, coalesced, strict=True)):
        nnz = all_counts[:, number, 0].tolist()
        sparse_dim = max(1, int(all_counts[:, number, 1].max()))
        device = gradient.device if gradient is not None else backend.device if spec.device != "cpu" else "cpu"

        # A gather needs equal shapes, so every rank pads to the longest and cuts the padding off again.
        longest = max(nnz)
        indices = torch.zeros(sparse_dim, longest, dtype=torch.int64, device=device)
        values = torch.zeros(longest, *spec.shape[sparse_dim:], dtype=spec.dtype, device=device)
        if gradient is not None:
            indices[:, : gradient._nnz()] = gradient.indices()
            values[: gradient._nnz()] = gradient.values()
        if longest:
            all_indices, all_values = backend.all_gather(indices), _gather_values(backend, values)
            indices = torch.cat([each[:, :count] for each, count in zip(all_indices, nnz, strict=True)], dim=1)
            values = torch.cat([each[:count] for each, count in zip(all_values, nnz, strict=True)])
        sums.append(torch.sparse_coo_tensor(indices, values, spec.shape, check_invariants=False).coalesce())
    return sums


def _gather_values(backend: Backend, values: Tensor) -> Tensor:
    if values.is_complex():
        return torch.view_as_complex(backend.all_gather(torch.view_as_real(values)))
    return backend.all_gather(values)
