"""Reads and writes YAML that may be hostile: no Python objects, no exponential aliases, no duplicate keys.

A configuration may come from a web page or a pull request, and `distopt config` should be safe on any of them. PyYAML's
safe loader keeps code from being run. The checks here keep a document of a few lines from filling memory ("a billion
laughs": aliases of lists of aliases) or from overflowing the stack, and a key that is written twice from being ignored.

A launcher hands its workers what it has read, as YAML. So everything that is read here has a text that is read back to
the same value: `parse_yaml(format_yaml(value)) == value`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.constructor import ConstructorError

# Far above anything that is written by hand or by a sweep, far below anything that hurts.
MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_DEPTH = 32
MAX_NODES = 100_000
MAX_DIGITS = 1_000  # Python itself refuses to print integers of more than 4,300

IsText: TypeAlias = Callable[[tuple[str, ...]], bool]
"""Whether the value at these keys is a text, even if it looks like a number."""


class UnsafeYAML(ValueError):
    """A document that exceeds the limits above."""


# PyYAML reads YAML 1.1, in which `yes` and `off` are booleans, `1:30` is 90, `010` is 8, `1e-3` is a string and
# `2013-01-01` a date. What people mean, and what YAML 1.2 says, is the table below: first character, tag, pattern. The
# underscores of `1_000` are YAML 1.1 and Python. Integers with leading zeros have a tag of their own, because they are
# refused: some readers take them for octal numbers.

_TAG = "tag:yaml.org,2002:"
_AMBIGUOUS = "!leading-zero"
_SCALARS = (
    ("<", "merge", r"<<"),
    ("~nN", "null", r"~|null|Null|NULL"),
    ("tTfF", "bool", r"true|True|TRUE|false|False|FALSE"),
    ("-+0123456789", "int", r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)"),
    ("-+0123456789", _AMBIGUOUS, r"[-+]?0[0-9_]+"),
    (
        "-+.0123456789",
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2, and no other types than JSON has."""

    # Not changed but replaced, because the class attributes are shared with yaml.SafeLoader.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes strings that YAML 1.1 or `_Loader` would take for something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        char: list(resolvers) for char, resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _first, _kind, _pattern in _SCALARS:
    for _class in (_Loader, _Dumper):
        _tag = _kind if _kind.startswith("!") else _TAG + _kind
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(_TAG + "null", re.compile("^$"), [""])


def _construct_str(loader: _Loader, node: ScalarNode) -> str:
    text = loader.construct_scalar(node)
    if not re.search("[\ud800-\udfff]", text):
        return text
    try:
        # JSON, which is YAML, writes characters beyond 16 bits as two escapes that PyYAML leaves apart.
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise _refusal(f"found {text!r}, in which half of a surrogate pair is missing", node) from None


def _construct_int(loader: _Loader, node: ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > MAX_DIGITS:
        raise _refusal(f"found an integer of {len(text):,} digits, expected at most {MAX_DIGITS:,}", node)
    try:
        return int(text.replace("_", ""), 0)
    except ValueError:
        raise _refusal(f"found {text!r}, expected an integer", node) from None


def _construct_float(loader: _Loader, node: ScalarNode) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(re.sub(r"^([-+]?)\.(?=[a-zA-Z])", r"\1", text.replace("_", "")))  # .inf and .nan
    except ValueError:
        raise _refusal(f"found {text!r}, expected a number", node) from None


def _construct_bool(loader: _Loader, node: ScalarNode) -> bool:
    text = loader.construct_scalar(node)
    if text.lower() not in ("true", "false"):
        raise _refusal(f"found {text!r}, expected true or false", node)
    return text.lower() == "true"


def _construct_ambiguous(loader: _Loader, node: ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    sign = text[0].strip("+0123456789")
    digits = text.lstrip("-+0_") or "0"
    octal = "" if set(digits) & set("89") else f", or {sign}0o{digits} for an octal number"
    raise _refusal(
        f"found {text}, which some readers of YAML take for an octal number; write {sign}{digits}{octal}, or "
        f"{text!r} for a string",
        node,
    )


for _tag, _constructor in (
    (_TAG + "str", _construct_str),
    (_TAG + "int", _construct_int),
    (_TAG + "float", _construct_float),
    (_TAG + "bool", _construct_bool),
    (_AMBIGUOUS, _construct_ambiguous),
):
    _Loader.add_constructor(_tag, _constructor)


def _refusal(problem: str, node: Node) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


def _represent_str(dumper: _Dumper, text: str) -> ScalarNode:
    # In single quotes PyYAML writes line separators as they are, and reads them back as spaces.
    return dumper.represent_scalar(
        _TAG + "str", text, style='"' if re.search("[\x85\u2028\u2029\ufeff]", text) else None
    )


_Dumper.add_representer(str, _represent_str)


def format_yaml(value: Any) -> str:
    """Returns plain dicts, lists and scalars as YAML that `parse_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, is_text: IsText = lambda keys: False, keys: tuple[str, ...] = ()) -> Any:
    """Returns the content of `text` as plain dicts, lists and scalars.

    Args:
        text: The document.
        is_text: Tells which values stay as they are written: `1.10` is then "1.10" and not 1.1.
        keys: Where the document belongs, if it is the value of a key.

    Raises:
        UnsafeYAML: The document is too large, too deep, or has too many, recursive or exploding aliases.
        yaml.YAMLError: It is not YAML, uses tags that are not part of YAML, or has a key twice.
    """
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise UnsafeYAML(f"more than {MAX_BYTES:,} bytes, no configuration is that long")
    _check_events(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return loader.construct_document(_as_written(node, is_text, keys))
    finally:
        loader.dispose()


def _as_written(node: Node, is_text: IsText, keys: tuple[str, ...]) -> Node:
    """Returns the node with strings for those numbers in it that are meant as text."""
    if isinstance(node, MappingNode):
        node.value = [
            (key, _as_written(value, is_text, (*keys, str(key.value))) if isinstance(key, ScalarNode) else value)
            for key, value in node.value
        ]
    elif isinstance(node, SequenceNode):
        node.value = [_as_written(each, is_text, (*keys, str(index))) for index, each in enumerate(node.value)]
    elif node.tag in (_TAG + "int", _TAG + "float", _TAG + "bool", _AMBIGUOUS) and is_text(keys):
        return ScalarNode(_TAG + "str", node.value, node.start_mark, node.end_mark)
    return node


def _check_events(text: str) -> None:
    """Refuses depth and aliases; events are a flat stream, so that this cannot overflow the stack itself."""
    depth = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if aliases > MAX_ALIASES:
            raise UnsafeYAML(f"more than {MAX_ALIASES} aliases")
        if depth > MAX_DEPTH:
            raise UnsafeYAML(f"nested more than {MAX_DEPTH} levels deep")


def _expanded_size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Counts nodes as if each alias were written out, refusing cycles, bombs and duplicate keys."""
    # An alias is the same node object again. None marks a node whose content is being counted: an alias to it would be
    # inside of what it refers to.
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise UnsafeYAML(f"line {node.start_mark.line + 1}: an alias refers to what contains it")
        return size
    known[id(node)] = None

    size = 1
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = _key_name(key)
            if name in seen and key.tag != _TAG + "merge":
                raise _refusal(f"the key {name!r} appears twice", key)
            seen.add(name)
            size += 1 + _expanded_size(value, known)
    elif isinstance(node, SequenceNode):
        size += sum(_expanded_size(item, known) for item in node.value)

    if size > MAX_NODES:
        raise UnsafeYAML(f"more than {MAX_NODES:,} values once its aliases are written out")
    known[id(node)] = size
    return size


def _key_name(key: Node) -> str:
    """Returns the text of a key; refuses keys that JSON or Python would take for another one."""
    if not isinstance(key, ScalarNode) or key.tag.removeprefix(_TAG) in ("bool", "float", "null"):
        shown = repr(key.value) if isinstance(key, ScalarNode) else "a list or a mapping"
        raise _refusal(f"found {shown} as a key, expected a string (in quotes) or an integer", key)
    if key.tag != _TAG + "int":
        return str(key.value)
    try:
        return str(int(key.value.replace("_", ""), 0))  # 0x10 and 16 are one key
    except ValueError:
        raise _refusal(f"found {key.value[:50]!r} as a key, expected an integer", key) from None
