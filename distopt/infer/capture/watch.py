"""Which code of the user's runs during a step, with what it was called, and which names it reads."""

from __future__ import annotations

import copy
import dis
import functools
import gc
import io
import operator
import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CellType, CodeType, FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn

import distopt

if TYPE_CHECKING:
    from distopt.infer.capture.python_state import PythonState

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_TORCH_MODULES = os.path.join(os.path.dirname(torch.__file__), "nn", "modules") + os.sep
_EXAMPLES = os.path.join(os.path.dirname(distopt.__file__), "examples") + os.sep
_LIBRARIES = tuple(os.path.dirname(str(m.__file__)) + os.sep for m in (torch, pyro, np, distopt))

_PACKAGES = frozenset({"torch", "pyro", "numpy", "opt_einsum", "distopt", ""})

PLAIN = (int, float, str, bool, type(None), bytes, complex, torch.Size, torch.dtype, torch.device, slice, range)

# Functions whose results differ from call to call, or that a user would miss. The profile function sees their calls.
_EFFECTS = {("builtins", "print"), ("builtins", "input"), ("io", "open"), ("_io", "open")}
_EFFECT_MODULES = frozenset({"time", "posix", "_thread", "_socket"})
_HARMLESS = frozenset({"fspath", "_path_normpath", "_path_splitroot", "_path_splitroot_ex"})  # of `posix`
_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedReader, io.BufferedRandom, io.BufferedRWPair, io.FileIO)
_USES_OF_FILES = frozenset({"write", "writelines", "read", "read1", "readline", "readlines", "readinto", "seek"})
_READS = frozenset({"numpy", "tolist", "item", "data_ptr"})
_CLOCKS = frozenset({"now", "today", "utcnow"})

# Functions that read attributes under names that are computed: of objects that such code sees, all attributes count.
_COMPUTED = frozenset(
    {"getattr", "hasattr", "setattr", "vars", "dir", "attrgetter", "asdict", "astuple", "fields", "__dict__", "copy"}
    | {"deepcopy", "replace", "globals", "locals", "__getattribute__", "__getattr__", "__slots__"}
    | {"getmembers", "getmembers_static", "getattr_static"}
)
# The same, under whatever name a user's module has them.
_COMPUTING = (getattr, hasattr, setattr, vars, dir, globals, locals, operator.attrgetter, copy.copy, copy.deepcopy)


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
        if package.startswith("namedtuple_"):
            return False
        return package not in _PACKAGES and package not in sys.stdlib_module_names - {"__main__"}
    return is_user_file(file)


def may_watch() -> bool:
    """Returns whether a profiler that runs, such as cProfile's, can take up again where a `Watch` ends."""
    profiler = sys.getprofile()
    return profiler is None or callable(profiler) or callable(getattr(profiler, "enable", None))


def _resume_profiler(profiler: Any) -> None:
    # What sys.getprofile() returns of a profiler in C is no function that sys.setprofile() takes.
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        sys.setprofile(None)
        profiler.enable()


_remembered: list[CodeType] = []


def remembered(code: CodeType) -> int:
    """Keeps a code object for good, and returns its id; its hash is of all its bytecode, computed at each look-up."""
    _remembered.append(code)
    return id(code)


def pause() -> Any:
    """Ends the watch that runs, if any, for as long as no code of the user's does; returns what `resume` takes."""
    profiler = sys.getprofile()
    if not isinstance(getattr(profiler, "__self__", None), Watch):
        return None
    sys.setprofile(None)
    return profiler


def resume(paused: Any) -> None:
    """Lets a paused watch go on."""
    if paused is not None:
        sys.setprofile(paused)


class Call(NamedTuple):
    """A function of the user's that ran: its code, globals, arguments that are no plain values, and closure cells.

    Cells and not their contents, since these may be replaced.
    """

    code: CodeType
    module_globals: dict[str, Any]
    args: dict[str, Any]
    cells: dict[str, CellType]


class Watch:
    """Notes the user's functions and the modules that run inside it; a context manager.

    Args:
        state: Is told of each function as it begins.
    """

    def __init__(self, state: PythonState | None = None) -> None:
        self._state = state
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._open: list[tuple[FrameType, dict[str, Any]]] = []  # of functions with closures, and their arguments
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
        _resume_profiler(self._previous)
        if self._collects:
            gc.enable()
        self._settle()
        for frame, _ in self._open:
            self.effects.append(f"a generator that it leaves unfinished{_location(frame)}")
        self._open.clear()

    def calls(self) -> Iterable[Call]:
        """Returns the functions that ran, each once for its arguments and what it closes over."""
        return self._calls.values()

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        # It is called for every function of the step, some 100,000 times: all but a few end at the first look-up.
        kind = _kinds.get(id(frame.f_code))
        if kind is None:
            kind = _kinds[remembered(frame.f_code)] = _kind_of(frame)
        if kind == _LIBRARY:
            return
        if self._open:
            self._settle()
        if event == "call":
            self._on_call(frame, kind)
        elif event == "c_call" and kind in (_USER, _STANDARD, _THREADS):
            self._on_c_call(frame, argument, kind)
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
        elif kind == _THREADS and (caller := _user_of(frame)) is not None:
            self.effects.append(f"{frame.f_code.co_name}(), which other threads wait for{_location(caller)}")

    def _note(self, frame: FrameType) -> None:
        if self._state is not None:
            self._state.note(frame)
        code = frame.f_code
        values = frame.f_locals
        args = {
            name: value
            for name in code.co_varnames[: _num_args(code)]
            if not isinstance(value := values.get(name), (Tensor, *PLAIN)) and not name.startswith(".")
        }
        if code.co_freevars:
            self._open.append((frame, args))
        else:
            self._add(frame, args, {})

    def _settle(self) -> None:
        """Finds out what functions close over whose frames have ended.

        Only an ended frame tells its function, to the garbage collector. Other functions of the same definition close
        over other variables, and the frame's own variables are contents: nobody sees there when they are replaced.
        """
        still_open = []
        for frame, args in self._open:
            code = frame.f_code
            functions = (each for each in gc.get_referents(frame) if isinstance(each, types.FunctionType))
            function = next((each for each in functions if each.__code__ is code), None)
            if function is None:
                still_open.append((frame, args))
            else:
                self._add(frame, args, dict(zip(code.co_freevars, function.__closure__ or (), strict=True)))
        self._open = still_open

    def _add(self, frame: FrameType, args: dict[str, Any], cells: dict[str, CellType]) -> None:
        if self._state is not None:
            self._state.note_cells(frame, cells)
        key = (frame.f_code, *map(id, args.values()), *map(id, cells.values()))
        if key not in self._calls:
            self._calls[key] = Call(frame.f_code, frame.f_globals, args, cells)

    def _on_c_call(self, frame: FrameType, function: Any, kind: int) -> None:
        if self._importing:
            return
        # Prints, clocks, files and threads: what they do to the user, or to the model, would stop with the capture.
        name = getattr(function, "__name__", "")
        module = getattr(function, "__module__", None)
        owner = getattr(function, "__self__", None)
        if name in _READS and isinstance(owner, Tensor):
            return  # the recorder's modes see these
        if kind != _USER and module == "_thread" and not name.startswith(("start", "_start")):
            return  # locks, which much of the standard library has
        is_clock = name in _CLOCKS and isinstance(owner, type)
        is_file = name in _USES_OF_FILES and isinstance(owner, _FILES)
        is_system = module in _EFFECT_MODULES and name not in _HARMLESS
        if (module, name) in _EFFECTS or is_system or is_clock or is_file:
            caller = frame if kind == _USER else _user_of(frame)
            if caller is not None:
                self.effects.append(f"{name}(){_location(caller)}")

    def _note_effect(self, frame: FrameType, name: str) -> None:
        caller: FrameType | None = frame
        while caller is not None and not is_user_code(caller):
            caller = caller.f_back
        if caller is not None:
            self.effects.append(f"{name}{_location(caller)}")


_LIBRARY, _USER, _IMPORT, _LAYER, _LOG, _STANDARD, _THREADS = range(7)

_kinds: dict[int, int] = {}  # by remembered code object: what its calls mean to a watch


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
    if not _is_standard(frame):
        return _LIBRARY
    module = str(frame.f_globals.get("__name__"))
    return _THREADS if (module.split(".")[0], code.co_name) in _FEEDS else _STANDARD


# Functions of the standard library that hand work to threads that run already, or wake them up.
_FEEDS = frozenset({("concurrent", "submit"), ("threading", "notify"), ("multiprocessing", "apply_async")})


def _is_standard(frame: FrameType) -> bool:
    """Returns whether a frame runs code of the standard library."""
    file = frame.f_code.co_filename
    if file.startswith("<"):
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        return package in sys.stdlib_module_names and not is_user_code(frame)
    return file.startswith(_STDLIB) and "site-packages" not in file


def _user_of(frame: FrameType) -> FrameType | None:
    """Returns the user's frame on whose behalf the standard library runs; None where it runs for another library."""
    caller: FrameType | None = frame
    while caller is not None and _is_standard(caller):
        caller = caller.f_back
    return caller if caller is not None and is_user_code(caller) else None


def _location(frame: FrameType) -> str:
    return f" at {frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def content(cell: Any) -> Any:
    """Returns what a closure cell holds, None where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _num_args(code: CodeType) -> int:
    stars = bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + stars


# Names of instructions, of all releases of Python that are supported.
_GLOBALS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "STORE_GLOBAL", "DELETE_GLOBAL"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM"})
_CALL_OF_ONE = ("PRECALL" if sys.version_info < (3, 12) else "CALL", 1)


class Names(NamedTuple):
    """What a function's bytecode names.

    Attributes:
        roots: Globals that it loads or assigns.
        attributes: Attributes that it loads or assigns.
        used: Globals, free variables and attributes of which it may do more than ask for the length or shape.
        counted: Those of which it does more than ask for the length.
        whole: Those of which it may do more than load attributes.
        imports: Modules that it imports, each with the number of packages that a relative name goes up.
        computed: Whether it may read attributes under other names.
    """

    roots: frozenset[str]
    attributes: frozenset[str]
    used: frozenset[str]
    counted: frozenset[str]
    whole: frozenset[str]
    imports: frozenset[tuple[str, int]]
    computed: bool


@functools.lru_cache(maxsize=4096)
def names_of(code: CodeType) -> Names:
    """Returns what a function's bytecode names."""
    roots: set[str] = set()
    attributes: set[str] = set()
    used: set[str] = set()
    counted: set[str] = set()
    whole: set[str] = set()
    imports: set[tuple[str, int]] = set()
    computed = False
    instructions = [*dis.get_instructions(code)]
    for index, instruction in enumerate(instructions):
        kind, value = instruction.opname, instruction.argval
        if kind in _GLOBALS:
            roots.add(value)
        elif kind in _ATTRIBUTES:
            attributes.add(value)
        elif not kind.endswith("DEREF"):
            if kind == "IMPORT_NAME":
                imports.add((value, instructions[index - 2].argval))
            computed |= kind == "MATCH_CLASS"  # whose attributes are named by constants
            continue
        measure = _measure(instructions, index)
        if measure is None:
            used.add(value)
        if measure != "len":
            counted.add(value)
        if index + 1 == len(instructions) or not _loads_attribute(instructions[index + 1]):
            whole.add(value)
    computed = computed or bool(_COMPUTED & (roots | attributes))
    return Names(
        frozenset(roots),
        frozenset(attributes),
        frozenset(used),
        frozenset(counted),
        frozenset(whole),
        frozenset(imports),
        computed,
    )


def _loads_attribute(instruction: dis.Instruction) -> bool:
    """Returns whether an instruction loads an attribute, and not a method, which is bound to the whole object."""
    # Since Python 3.12 the same instruction does both, and its lowest bit says which.
    is_method = sys.version_info >= (3, 12) and (instruction.arg or 0) & 1
    return instruction.opname == "LOAD_ATTR" and not is_method


def _measure(instructions: list[dis.Instruction], index: int) -> str | None:
    """Returns for which measure alone what an instruction loads is asked: "len" or "shape"; None for anything else."""
    following = instructions[index + 1] if index + 1 < len(instructions) else None
    if following is None or not instructions[index].opname.startswith("LOAD_"):
        return None
    if _loads_attribute(following):
        return "shape" if following.argval in ("shape", "ndim", "dtype") else None
    if (following.opname, following.arg) != _CALL_OF_ONE:
        return None
    while index > 0 and instructions[index].opname == "LOAD_ATTR":
        index -= 1
    is_length = (instructions[index - 1].opname, instructions[index - 1].argval) == ("LOAD_GLOBAL", "len")
    return "len" if is_length else None


def computes_names(value: Any) -> bool:
    """Returns whether a value is a function that reads attributes under names that are computed."""
    return any(value is each for each in _COMPUTING)
