"""Steps whose bits do not follow from which thread of the CPU comes first."""

from __future__ import annotations

import torch


class Deterministic:
    """While entered, torch's operations on the CPU give the same bits each time; a context manager.

    Several threads add the gradients of gathered rows, `effects[level]`, to one number in whatever order they come,
    from 32,768 rows on. So a run that resumes would not have the bits of one that was never stopped. In the order of
    the rows, by one thread, it takes no longer, and for few levels a tenth of the time: threads wait for each other.

    Nothing changes once the process uses a GPU: torch's own choice there is to be deterministic or quick.

    Cost:
        3 microseconds.
    """

    __slots__ = ("_before",)
    _before: bool | None

    def __enter__(self) -> Deterministic:
        if torch.cuda.is_initialized() or torch.are_deterministic_algorithms_enabled():  # type: ignore[no-untyped-call]
            self._before = None
            return self
        # Without torch's filling of new memory, which is to find what reads it before it is written.
        self._before = torch._C._get_deterministic_fill_uninitialized_memory()
        torch._C._set_deterministic_fill_uninitialized_memory(False)
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            torch._C._set_deterministic_algorithms(False, warn_only=False)
            torch._C._set_deterministic_fill_uninitialized_memory(self._before)
