"""Plain values that the user's code read during a recorded step, to be looked at again before each captured one.

A captured step does not run the model's Python code, so a number that the code reads from a global, a closure or an
attribute would keep its recorded value. While a step is recorded, a profile function notes each function of the
user's that runs; its bytecode says which paths `root.attribute[constant]...` it loads; and one generated expression
compares what is there now with what was there then, in a tenth of a microsecond to a few microseconds.

Bytecode does not show computed keys, `getattr`, or values inside objects of C extensions. What changes there is seen
when the step is recorded again: always twice before a capture, and at steps 8, 16, 32, ... and every 1,000th.
"""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

import distopt
from distopt.infer.sharded_plate import Sharded
from distopt.rng import _policy

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_TORCH_MODULES = os.path.join(os.path.dirname(torch.__file__), "nn", "modules") + os.sep
_EXAMPLES = os.path.join(os.path.dirname(distopt.__file__), "examples") + os.sep
_LIBRARIES = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (torch, pyro, np, distopt))

_PACKAGES = frozenset({"torch", "pyro", "numpy", "opt_einsum", "distopt", ""})

PLAIN = (int, float, str, bool, type(None), bytes, complex, torch.Size, torch.dtype, torch.device, slice, range)

# Functions whose results differ from call to call, or that a user would miss. The profile function sees their calls.
_EFFECTS = {("builtins", "print"), ("builtins", "input"), ("io", "open"), ("_io", "open")}
_EFFECT_MODULES = frozenset({"time", "posix", "_thread", "_socket"})
_READS = frozenset({"numpy", "tolist", "item", "data_ptr"})

_STORES = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR"})
_SKIPPED = frozenset({"CACHE", "RESUME", "PRECALL", "COPY_FREE_VARS", "EXTENDED_ARG", "NOP", "PUSH_NULL"})

Step = tuple[str, Any]  # (".", attribute) or ("[", constant)


@dataclass(frozen=True, slots=True)
class Path:
    """What a function loads or assigns: a global, closure cell or `self`, and attributes and items from there."""

    root: str  # "global", "cell" or "self"
    name: str
    steps: tuple[Step, ...] = ()

    def then(self, kind: str, key: Any) -> Path:
        """Returns the path one step further."""
        return Path(self.root, self.name, (*self.steps, (kind, key)))


@functools.cache
def is_user_file(file: str) -> bool:
    """Returns whether code of `file` may read plain values of the user's.

    That is all code but the libraries'; of torch the layers count, since their attributes are the user's to set.
    """
    if file.startswith(_TORCH_MODULES) and not file.endswith("module.py"):
        return True
    if file.startswith(_EXAMPLES):
        return True
    if f"{os.sep}opt_einsum{os.sep}" in file:
        return False  # Pyro's, for enumerated variables
    in_stdlib = file.startswith(_STDLIB) and "site-packages" not in file
    return not (file.startswith((*_LIBRARIES, "<frozen")) or in_stdlib)


def is_user_code(frame: FrameType) -> bool:
    """Returns whether a frame runs code of the user's; code that was made from a string belongs to its module."""
    file = frame.f_code.co_filename
    if file.startswith("<"):
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        return package not in _PACKAGES and package not in sys.stdlib_module_names - {"__main__"}
    return is_user_file(file)


class _Call(NamedTuple):
    """A function of the user's that ran: its code, globals, first argument if that is `self`, and free variables."""

    code: CodeType
    module_globals: dict[str, Any]
    instance: Any
    free: dict[str, Any]


class Watch:
    """Notes the user's functions and the modules that run inside it; a context manager."""

    def __init__(self) -> None:
        self.frames: dict[tuple[Any, ...], _Call] = {}
        self.modules: dict[int, nn.Module] = {}
        self.effects: list[str] = []
        self._importing = 0

    def __enter__(self) -> Watch:
        # A collection would run other people's callbacks and finalizers within the step.
        self._collects = gc.isenabled()
        gc.disable()
        self._previous = sys.getprofile()
        sys.setprofile(self._on_event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(self._previous)
        if self._collects:
            gc.enable()

    def calls(self) -> Iterator[tuple[_Call, dict[str, Any]]]:
        """Yields each call with the closure cells of its function: the cells, since their contents may be replaced.

        A frame does not know its function, so the garbage collector is asked, once for all. Functions that the step
        itself made are gone by now: nobody else can change what they close over, or an enclosing function has it too.
        """
        # One pass over all objects takes some 30 ms, whatever the number of functions that are looked for.
        calls = list(self.frames.values())
        codes = list(dict.fromkeys(call.code for call in calls if call.code.co_freevars))
        functions: dict[CodeType, list[types.FunctionType]] = {code: [] for code in codes}
        for referrer in gc.get_referrers(*codes) if codes else ():
            if isinstance(referrer, types.FunctionType) and referrer.__code__ in functions and referrer.__closure__:
                functions[referrer.__code__].append(referrer)

        for call in calls:
            named = [
                dict(zip(call.code.co_freevars, each.__closure__ or (), strict=True))
                for each in functions.get(call.code, ())
            ]
            # Functions of one definition are told apart by what they close over; all of them count where it changed.
            same = [
                cells for cells in named if all(_content(cell) is call.free.get(name) for name, cell in cells.items())
            ]
            for cells in (same[:1] or named) if named else [{}]:
                yield call, cells

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        # It is called for every function of the step, some 100,000 times: all but a few end at the first look-up.
        code = frame.f_code
        kind = _kinds.get(code)
        if kind is None:
            kind = _kinds[code] = _kind_of(frame)
        if kind == _LIBRARY:
            return
        if event == "call":
            self._on_call(frame, kind)
        elif event == "c_call" and kind == _USER:
            self._on_c_call(frame, argument)
        elif event == "return" and kind == _IMPORT:
            self._importing = max(0, self._importing - 1)

    def _on_call(self, frame: FrameType, kind: int) -> None:
        if kind == _IMPORT:
            self._importing += 1  # modules that are imported within the step are no code of the step
        elif self._importing:
            return
        elif kind == _USER:
            self._note(frame)
        elif kind == _LAYER:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                self.modules[id(module)] = module
        elif kind == _LOG:
            self._note_effect(frame, "logging")

    def _note(self, frame: FrameType) -> None:
        code = frame.f_code
        instance = None
        values = frame.f_locals
        if code.co_argcount and code.co_varnames[0] in ("self", "cls"):
            instance = values.get(code.co_varnames[0])
        free = {name: values.get(name) for name in code.co_freevars}
        key = (code, id(instance), *map(id, free.values()))
        if key not in self.frames:
            self.frames[key] = _Call(code, frame.f_globals, instance, free)

    def _on_c_call(self, frame: FrameType, function: Any) -> None:
        if self._importing:
            return
        # Prints, clocks and files: what they do to the user, or to the model, would stop with the capture.
        name = getattr(function, "__name__", "")
        module = getattr(function, "__module__", None)
        if name in _READS and isinstance(getattr(function, "__self__", None), Tensor):
            return  # the recorder's modes see these
        if (module, name) in _EFFECTS or module in _EFFECT_MODULES:
            self.effects.append(f"{name}() at {frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})")

    def _note_effect(self, frame: FrameType, name: str) -> None:
        caller: FrameType | None = frame
        while caller is not None and not is_user_code(caller):
            caller = caller.f_back
        if caller is not None:
            self.effects.append(f"{name} at {caller.f_code.co_filename}:{caller.f_lineno} ({caller.f_code.co_name})")


_LIBRARY, _USER, _IMPORT, _LAYER, _LOG = range(5)

_kinds: dict[CodeType, int] = {}  # what a code object's calls mean to a watch


def _kind_of(frame: FrameType) -> int:
    code = frame.f_code
    if code.co_filename.startswith("<frozen importlib") and code.co_name == "_find_and_load":
        return _IMPORT
    if is_user_code(frame):
        return _USER
    if code.co_name == "_call_impl":
        return _LAYER
    if code.co_name == "_log" and frame.f_globals.get("__name__") == "logging":
        return _LOG
    return _LIBRARY


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


@functools.lru_cache(maxsize=4096)
def paths_of(code: CodeType) -> tuple[Path, ...]:
    """Returns the paths that a function's bytecode loads or assigns, each with all its beginnings."""
    reader = _PathReader(code)
    for instruction in dis.get_instructions(code):
        if instruction.opname not in _SKIPPED:
            reader.read(instruction.opname, instruction.argval)
    return tuple(reader.paths)


class _PathReader:
    """Follows what lies on top of the stack as long as it is a path, instruction by instruction.

    An instruction that it does not know ends the path, so that what it returns was loaded for certain; what it misses
    are values that travel through variables and function calls, which the callee's own bytecode shows.
    """

    def __init__(self, code: CodeType) -> None:
        self.paths: dict[Path, None] = {}
        self._free = frozenset(code.co_freevars)
        self._instance = code.co_varnames[0] if code.co_argcount and code.co_varnames[0] in ("self", "cls") else None
        self._current: Path | None = None
        self._indexed: tuple[Path, Any] | None = None  # a path, and the constant that was loaded on top of it

    def read(self, name: str, value: Any) -> None:
        """Takes the next instruction."""
        indexed, self._indexed = self._indexed, None
        current = self._current
        if name == "LOAD_CONST" and current is not None:
            self._indexed = (current, value)
        elif name == "COPY" and current is not None:
            pass  # self.count += 1 copies self before it loads the attribute
        elif name in _STORES:
            self._store(name, value, indexed)
        else:
            self._current = self._root(name, value) or self._extended(name, value, indexed)
            if self._current is not None:
                self.paths[self._current] = None

    def _root(self, name: str, value: Any) -> Path | None:
        if name in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"):
            return Path("global", value)
        if name in ("LOAD_DEREF", "LOAD_CLASSDEREF", "STORE_DEREF", "DELETE_DEREF") and value in self._free:
            return Path("cell", value)
        if name == "LOAD_FAST" and value == self._instance:
            return Path("self", value)
        return None

    def _extended(self, name: str, value: Any, indexed: tuple[Path, Any] | None) -> Path | None:
        if name in ("LOAD_ATTR", "LOAD_METHOD") and self._current is not None:
            return self._current.then(".", value)
        if name == "BINARY_SUBSCR" and indexed is not None:
            return indexed[0].then("[", indexed[1])
        return None

    def _store(self, name: str, value: Any, indexed: tuple[Path, Any] | None) -> None:
        by_item = name.endswith("SUBSCR")
        base = indexed[0] if by_item and indexed is not None else self._current
        if base is not None:
            key = (indexed[1] if indexed is not None else ...) if by_item else value
            self.paths[base.then("[" if by_item else ".", key)] = None
        self._current = None


class Assumptions:
    """Values that a captured step takes for granted; calling it says whether they still hold.

    Args:
        watch: What ran during the recorded step.
        roots: Objects whose settings count as well: the ELBO, the model, the guide.
        earlier: The assumptions of an equal step before: objects that are new in each step are left out, since nobody
            else can change them.
    """

    def __init__(self, watch: Watch, roots: dict[str, Any], earlier: Assumptions | None = None) -> None:
        self._environment: dict[str, Any] = {}
        self._earlier = earlier

        self._names: dict[int, str] = {}
        self._tests: dict[str, tuple[str, str, Any]] = {}  # by expression: (description, operator, value)
        for call, cells in watch.calls():
            for path in paths_of(call.code):
                self._follow(path, call.module_globals, call.instance, cells)

        for module in watch.modules.values():
            self._add_module(module)

        # Settings of this package that decide what a step does, wherever they are read.
        self._add("the noise policy", f"{self._name(_policy)}[0]", _policy[0])
        for name, root in roots.items():
            self._add_settings(name, self._name(root), root, depth=3)
        self._earlier = None
        self._compile()

    def _name(self, value: Any) -> str:
        if id(value) not in self._names:
            name = self._names[id(value)] = f"r{len(self._names)}"
            self._environment[name] = value
        return self._names[id(value)]

    def _lasts(self, root: Any) -> bool:
        return self._earlier is None or id(root) in self._earlier._names

    def _follow(self, path: Path, module_globals: Any, instance: Any, cells: dict[str, Any]) -> None:
        """Adds the test of one path, if it leads to a value now."""
        # The source is Python code that the compiled test runs; the text is what a message shows. Nothing of the user's
        # may run: properties and methods are left alone here, and are watched as functions of their own if they run.
        value: Any
        if path.root == "global":
            if path.name not in module_globals or not self._lasts(module_globals):
                return  # a builtin
            value, source, text = module_globals[path.name], f"{self._name(module_globals)}[{path.name!r}]", path.name
        elif path.root == "cell":
            if path.name not in cells or not self._lasts(cells[path.name]):
                return
            value, source, text = _content(cells[path.name]), f"{self._name(cells[path.name])}.cell_contents", path.name
        else:
            if not self._lasts(instance):
                return
            value, source, text = instance, self._name(instance), type(instance).__name__

        for step in path.steps:
            if isinstance(value, types.ModuleType | type | types.FunctionType):
                return  # math.pi, torch.float32: taken as fixed
            if step == ("[", ...):
                break  # an item that is assigned under a computed key: the container is compared
            try:
                value, source = _take(value, source, step)
            except (AttributeError, KeyError, IndexError, TypeError):
                return
            text += f".{step[1]}" if step[0] == "." else f"[{step[1]!r}]"

        self._add(text, source, value)

    def _add(self, text: str, source: str, value: Any) -> None:
        if source in self._tests:
            return

        # Tensors are compared by identity here: their values are read by the program, or compared by it.
        if is_plain(value):
            self._tests[source] = (text, "plain", value)
        elif isinstance(value, Tensor | np.ndarray):
            self._tests[source] = (text, "is", value)
        elif isinstance(value, list | dict | set | tuple):
            self._add_container(text, source, value)
        elif not isinstance(value, types.ModuleType | type | types.MethodType | types.BuiltinFunctionType):
            self._tests[source] = (text, "is", value)
            self._add_settings(text, source, value, depth=2)

    def _add_container(self, text: str, source: str, value: Any) -> None:
        """Compares a container: up to 64 plain items by value, tensors by identity, others by its length."""
        self._tests[f"len({source})"] = (f"len({text})", "==", len(value))
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        if isinstance(value, set) or len(items) > 64:
            return
        for key, item in items:
            if isinstance(key, int | str) and (is_plain(item) or isinstance(item, Tensor)):
                self._add(f"{text}[{key!r}]", f"{source}[{key!r}]", item)

    def _add_module(self, module: nn.Module) -> None:
        if not self._lasts(module):
            return
        name, text = self._name(module), type(module).__name__
        self._tests[f"{name}.training"] = (f"{text}.training", "==", module.training)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            self._tests[f"len({name}.{hooks})"] = (f"{text}'s hooks", "==", len(getattr(module, hooks)))

        for key, child in module._modules.items():
            self._tests[f"{name}._modules[{key!r}]"] = (f"{text}'s layer {key}", "is", child)
        self._tests[f"len({name}._modules)"] = (f"{text}'s layers", "==", len(module._modules))

    def _add_settings(self, text: str, source: str, value: Any, depth: int) -> None:
        """Compares the attributes of handlers, distributions and ELBOs, whose code is Pyro's and is not watched."""
        if isinstance(value, Sharded):  # a captured step does not tell its plates how many datapoints they have
            for name, shard in value.plates.items():
                self._add(f"the size of plate {name!r}", f"{source}.plates[{name!r}].size", shard.size)
        if isinstance(value, functools.partial):
            for index, each in enumerate((value.func, *value.args)):
                inner = f"{source}.func" if index == 0 else f"{source}.args[{index - 1}]"
                self._add_settings(f"{text}'s argument", inner, each, depth)
            return

        if depth == 0 or not isinstance(value, Messenger | Distribution | Transform | pyro.infer.ELBO):
            return
        for key, each in vars(value).items():
            if key.startswith("__") or not key.isidentifier() or (isinstance(value, Messenger) and key == "trace"):
                continue
            if is_plain(each) or isinstance(each, Tensor):
                self._add(f"{text}.{key}", f"{source}.__dict__[{key!r}]", each)
            else:
                self._add_settings(f"{text}.{key}", f"{source}.__dict__[{key!r}]", each, depth - 1)

    def _compile(self) -> None:
        lines = []
        for index, (source, (_, operator, value)) in enumerate(self._tests.items()):
            self._environment[f"w{index}"] = value
            if operator == "plain":  # 1, 1.0 and True are equal and make tensors of other types
                self._environment[f"t{index}"] = type(value)
                lines.append(f"((v := {source}) == w{index} and type(v) is t{index})")
            else:
                lines.append(f"({source} {operator} w{index})")
        code = f"def holds():\n  return {' and '.join(lines) or 'True'}\n"
        code += f"def tests():\n  return [{', '.join(f'(lambda: {line})' for line in lines)}]\n"
        exec(code, self._environment)
        self._holds: Callable[[], bool] = self._environment["holds"]

    def __len__(self) -> int:
        return len(self._tests)

    def __call__(self) -> bool:
        """Returns whether all values are what they were."""
        try:
            return self._holds()
        except Exception:  # a path that leads nowhere any more
            return False

    def names(self) -> list[str]:
        """Returns the paths that are compared, as they stand in the code."""
        return list(dict.fromkeys(text for text, _, _ in self._tests.values()))

    def changed(self) -> list[str]:
        """Returns the paths whose values differ now, as they stand in the code."""
        paths = []
        for (text, _, _), test in zip(self._tests.values(), self._environment["tests"](), strict=True):
            try:
                holds = test()
            except Exception:  # a path that leads nowhere any more
                holds = False
            if not holds:
                paths.append(text)
        return list(dict.fromkeys(paths))


def is_plain(value: Any) -> bool:
    """Returns whether a value is compared by value: numbers, strings and the like, and tuples of them."""
    if isinstance(value, tuple | frozenset):
        return all(is_plain(each) for each in value)
    # NaN differs from itself, so it can be no assumption.
    return isinstance(value, PLAIN) and value == value


def _take(value: Any, source: str, step: Step) -> tuple[Any, str]:
    """Follows one step of a path, without running code of the user's.

    Raises:
        AttributeError: There is no such attribute, or a property or method stands there: its code is watched itself.
    """
    kind, key = step

    if kind == "[":
        if not isinstance(value, list | tuple | dict):
            raise TypeError(key)
        return value[key], f"{source}[{key!r}]"
    if isinstance(getattr(type(value), key, None), property | types.FunctionType | types.MethodDescriptorType):
        raise AttributeError(key)

    if isinstance(value, nn.Module):
        # nn.Module.__getattr__ is slow, and PyroModule's has effects.
        for table in ("_parameters", "_buffers", "_modules"):
            if key in value.__dict__.get(table, ()):
                return value.__dict__[table][key], f"{source}.__dict__[{table!r}][{key!r}]"
        if key not in value.__dict__:
            raise AttributeError(key)
        return value.__dict__[key], f"{source}.__dict__[{key!r}]"
    return getattr(value, key), f"{source}.{key}"
