"""Random permutations of which each process computes only the elements that it needs.

A permutation that is drawn whole costs every process the same time and memory, however many share the rows. A keyed
one-to-one function of the position gives any of its elements alone: a Feistel network over pairs of numbers, as in
Black and Rogaway, "Ciphers with arbitrary finite domains" (2002), whose rounds mix by additions modulo the sizes.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWN = 1 << 16
"""Elements up to which a permutation is drawn whole: it costs a millisecond, and networks this small mix less well."""

_NUM_ROUNDS = 8
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)  # odd, as found by a search for well-mixing ones (Wellons, "hash-prospector")


def permuted(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the elements at `positions` of the permutation of `range(size)` that belongs to a seed and an epoch.

    Args:
        positions: Any shape (n,), each in [0, size).
        size: Below 2**63.
        seed: Not negative.
        epoch: Not negative.

    Cost:
        About 8 ns an element. Up to 65,536 elements the permutation is drawn whole, and kept until the next epoch.
    """
    if size <= _DRAWN:
        return _drawn(size, seed, epoch)[positions]
    columns = math.isqrt(size)
    network = _Network(-(-size // columns), columns, seed, epoch)
    values = network.map(positions)
    # The pairs are a few more than the elements. What falls beyond is mapped on until it falls within.
    (beyond,) = np.nonzero(values >= size)
    while len(beyond):
        values[beyond] = network.map(values[beyond])
        beyond = beyond[values[beyond] >= size]
    return values


@lru_cache(maxsize=4)
def _drawn(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


class _Network:
    """A one-to-one function of the pairs (row, column) of a table, as numbers counted row by row."""

    def __init__(self, num_rows: int, num_columns: int, seed: int, epoch: int) -> None:
        self._sizes = (num_rows, num_columns)
        # Half of the bits are scaled to a row or a column, so there must be twice as many as these need.
        self._dtype: type[np.unsignedinteger] = np.uint32 if num_rows < 1 << 16 else np.uint64
        keys = np.random.default_rng([seed, epoch]).integers(0, 1 << 32, (_NUM_ROUNDS, 2), dtype=np.uint32)
        self._keys = keys.astype(self._dtype)

    def map(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the images, (n,)."""
        columns = self._sizes[1]
        rows = numbers // columns
        one, other = rows.astype(self._dtype), (numbers - rows * columns).astype(self._dtype)
        for round_, keys in enumerate(self._keys):
            size = self._dtype(self._sizes[round_ % 2])
            one += self._mixed(other, size, keys)
            np.minimum(one, one - size, out=one)  # modulo: a difference below 0 is a large unsigned number
            one, other = other, one
        return one.astype(np.int64) * columns + other.astype(np.int64)

    def _mixed(
        self, values: NDArray[np.unsignedinteger], size: np.unsignedinteger, keys: NDArray[np.unsignedinteger]
    ) -> NDArray[Any]:
        """Returns a pseudo-random number in [0, size) for each value."""
        half = self._dtype(4 * self._dtype().itemsize)
        mixed: NDArray[Any] = values ^ keys[0]
        mixed *= self._dtype(_MULTIPLIERS[0])
        mixed ^= mixed >> (half - self._dtype(1))
        mixed ^= keys[1]
        mixed *= self._dtype(_MULTIPLIERS[1])
        mixed >>= half
        mixed *= size
        mixed >>= half
        return mixed
