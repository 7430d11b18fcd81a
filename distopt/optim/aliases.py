"""Which other tensors share a parameter's memory only because Pyro forgot them there."""

from __future__ import annotations

import gc
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

_OWN_REFERENCES = 4  # of `num_forgotten_aliases` itself: a dict, a list, a variable, an argument
_SITE = frozenset({"type", "name", "fn", "value"})


def num_forgotten_aliases(params: Sequence[Tensor]) -> list[int]:
    """Counts, for each of `params`, the tensors on its memory that nobody will read again.

    Those are the samples of traces from which an autoguide took its initial values, and tensors that `PyroParam`
    replaced in the parameter store and that its index of names still holds. Any other holder may want to see the
    parameter change: such a tensor is not counted.

    Cost: one or two walks over all objects of the garbage collector, about 0.1 s.
    """
    addresses = {p.data_ptr(): p for p in params}
    aliases: dict[int, Tensor] = {}
    for candidate in gc.get_objects():
        if type(candidate) in (Tensor, torch.nn.Parameter) and candidate.layout is torch.strided:
            p = addresses.get(candidate.data_ptr()) if candidate.numel() else None
            if p is not None and p is not candidate:
                aliases[id(candidate)] = candidate
        del candidate
    watched = list(aliases.values())
    ours = {id(watched), id(aliases)}
    store_index = pyro.get_param_store()._param_to_name
    forgotten: dict[int, int] = defaultdict(int)  # alias -> references by holders that will not read it
    for holder in gc.get_referrers(*watched) if watched else ():
        if id(holder) not in ours and (holder is store_index or _is_site(holder)):
            for x in gc.get_referents(holder):
                forgotten[id(x)] += id(x) in aliases
    counts: dict[int, int] = defaultdict(int)
    for i, alias in aliases.items():
        # All references are accounted for; variables of running functions show in no other way.
        counts[alias.data_ptr()] += sys.getrefcount(alias) == forgotten[i] + _OWN_REFERENCES
    return [counts[p.data_ptr()] for p in params]


def _is_site(holder: Any) -> bool:
    return isinstance(holder, dict) and holder.keys() >= _SITE
