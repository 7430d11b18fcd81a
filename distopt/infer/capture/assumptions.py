"""Plain values that the user's code may have read during a recorded step, to be looked at before each captured one.

A captured step does not run the model's Python code, so a number that the code reads from a global, a closure, an
attribute or a container would keep its recorded value. While a step is recorded, a profile function notes each function
of the user's that runs (see `watch`). Whatever can be reached from its globals, closures and arguments is taken for
read: containers with all that they hold, and of objects the attributes that any of these functions names, or all where
names are computed or a library's code reads them. Generated expressions compare what is there now with what was there
then, and C++ looks first whether most of it is the same objects (see `quick_tests`): a hundredth of a microsecond for
each value. What cannot be compared is a reason to stay eager: iterators, generators of random numbers, and objects of C
extensions, which have no attributes to look at.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyro
from torch import nn

from distopt.infer.capture.quick_tests import all_hold, separate
from distopt.infer.capture.reachable import ReachableValues
from distopt.infer.capture.watch import Call, Names, Watch, computes_names, content, names_of
from distopt.rng import _policy


class Assumptions:
    """Values that a captured step takes for granted; calling it says whether they still hold.

    Args:
        watch: What ran during the recorded step.
        roots: Objects whose settings count as well: the ELBO, the model, the guide.
        arguments: Objects that the step was given: all that they hold counts, since a library's model may read it.
        earlier: The assumptions of an equal step before: objects that are new in each step are left out, since nobody
            else can change them.

    Attributes:
        refusal: Why the step may depend on what cannot be compared; None where all can be.
    """

    def __init__(
        self,
        watch: Watch,
        roots: dict[str, Any],
        arguments: Sequence[Any] = (),
        earlier: Assumptions | None = None,
    ) -> None:
        calls = list(watch.calls())
        named = [names_of(call.code) for call in calls]
        computes = any(map(computes_names, _contents(calls, named)))
        self._reachable = reachable = ReachableValues(named, all_attributes=bool(arguments) or computes)
        self._earlier = earlier
        try:
            self._look(watch, calls, named, roots, arguments)
        except Exception as error:  # of an object of the user's that is looked at
            reachable.refuse(f"what the model may read cannot be looked at: {type(error).__name__}: {error}")
        self._earlier = None
        self.refusal = reachable.refusal
        self._compile()

    # Where reading begins.

    def _look(
        self, watch: Watch, calls: list[Call], named: list[Names], roots: dict[str, Any], arguments: Sequence[Any]
    ) -> None:
        reachable = self._reachable
        self._add_calls(calls, named)
        for module in watch.modules.values():
            self._add_root(type(module).__name__, module)
        for name, root in roots.items():
            self._add_root(name, root)
        for each in arguments:
            self._add_root(type(each).__name__, each)

        # Settings of this package and of torch that decide what a step does, wherever they are read.
        reachable.compare("the noise policy", f"{reachable.name(_policy)}[0]", _policy[0])
        hooks = nn.modules.module
        for each in (hooks._global_forward_hooks, hooks._global_forward_pre_hooks, hooks._global_backward_hooks):
            reachable.add("a hook of all modules", reachable.name(each), each)
        self._add_store()
        self._add_settings()

    def _add_root(self, text: str, value: Any) -> None:
        # An object that was not there in the equal step before is new in each step.
        if self._earlier is None or value in self._earlier._reachable:
            self._reachable.add(text, self._reachable.name(value), value)

    def _add_calls(self, calls: list[Call], named: list[Names]) -> None:
        reachable = self._reachable
        for call, names in zip(calls, named, strict=True):
            table = call.module_globals
            for name in sorted(names.roots & table.keys()):
                reachable.add(name, f"{reachable.name(table)}[{name!r}]", table[name], name)
            if "globals" in names.roots:
                reachable.add_table("globals()", reachable.name(table), table)
            elif missing := names.roots - table.keys():
                text = f"a global of {table.get('__name__')}"
                reachable.test(text, f"{reachable.name(table)}.keys().isdisjoint({reachable.name(missing)})")
                for name in sorted(missing & vars(builtins).keys()):
                    source = f"{reachable.name(vars(builtins))}[{name!r}]"
                    reachable.add(name, source, vars(builtins)[name], name)
            for name in sorted(_imported(names, table)):
                reachable.add(name, f"{reachable.name(sys.modules)}[{name!r}]", sys.modules[name])
            for name, cell in call.cells.items():
                if self._earlier is None or cell in self._earlier._reachable:
                    reachable.add(name, f"{reachable.name(cell)}.cell_contents", content(cell), name)
            for name, value in call.args.items():
                for each in (value, *value) if isinstance(value, tuple) else (value,):
                    self._add_root(type(each).__name__ if name in ("self", "cls") else name, each)

    def _add_store(self) -> None:
        reachable = self._reachable
        store = pyro.get_param_store()
        text = "the constraints of parameters"
        reachable.compare_items(
            text, f"{reachable.attributes(text, reachable.name(store), store)}['_constraints'].values()"
        )

        for name, param in store._params.items():
            for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):  # None until the first hook
                hooks = getattr(param, table)
                if hooks is not None:
                    reachable.test(f"a hook of {name}", f"[*{reachable.name(param)}.{table}] == {[*hooks]}")
            for hook in (param._post_accumulate_grad_hooks or {}).values():
                if not str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("distopt."):
                    reachable.refuse(f"{name} has a hook that runs after its gradient is accumulated")

    def _add_settings(self) -> None:
        # Pyro's validation is on in some steps, and changes no number.
        for name, (module, path, _) in pyro.settings._REGISTRY.items():
            if not name.startswith("validate_"):
                *owners, attribute = path.split(".")
                owner = functools.reduce(getattr, owners, sys.modules[module])
                source = f"{self._reachable.name(owner)}.{attribute}"
                self._reachable.compare(f"Pyro's setting {name}", source, getattr(owner, attribute))

    def _compile(self) -> None:
        self._quick, rest = separate(self._reachable.tests, self._reachable.environment)
        self._holds_besides = self._function(_conjunction(rest))
        self._holds: Callable[[], bool] | None = None

    def _function(self, expression: str) -> Callable[[], bool]:
        function: Callable[[], bool] = eval(f"lambda: {expression}", self._reachable.environment)
        return function

    def __len__(self) -> int:
        return len(self._reachable.tests)

    def __call__(self) -> bool:
        """Returns whether all values are what they were."""
        try:
            if all_hold is not None and all_hold(self._quick):
                return self._holds_besides()
            # Equal values in place of others, or others, or no extension.
            if self._holds is None:
                self._holds = self._function(_conjunction(self._reachable.tests))
            return self._holds()
        except Exception:  # a path that leads nowhere any more
            return False

    def names(self) -> list[str]:
        """Returns the paths whose values are compared, as they stand in the code."""
        return list(dict.fromkeys(text for text, is_value in self._reachable.tests.values() if is_value))

    def changed(self) -> list[str]:
        """Returns the paths whose values differ now, as they stand in the code."""
        paths = []
        for expression, (text, _) in self._reachable.tests.items():
            try:
                holds = self._function(expression)()
            except Exception:  # a path that leads nowhere any more
                holds = False
            if not holds:
                paths.append(text)
        return list(dict.fromkeys(paths))


def _conjunction(tests: Iterable[str]) -> str:
    return " and ".join(f"({test})" for test in tests) or "True"


def _contents(calls: list[Call], named: list[Names]) -> Iterator[Any]:
    """Yields what the globals and closures hold that functions read."""
    for call, names in zip(calls, named, strict=True):
        yield from (call.module_globals.get(name) for name in names.roots)
        yield from map(content, call.cells.values())


def _imported(names: Names, module_globals: dict[str, Any]) -> set[str]:
    """Returns the full names of the modules that a function imports and that are loaded."""
    package = module_globals.get("__package__") or ""
    modules = set()
    for name, level in names.imports:
        with contextlib.suppress(ImportError):
            modules.add(importlib.util.resolve_name("." * level + name, package) if level else name)
    return modules & sys.modules.keys()
