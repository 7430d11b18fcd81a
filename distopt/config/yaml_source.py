"""Reads YAML that may be hostile: no Python objects, no exponential aliases, no duplicate keys.

A configuration may come from a web page or a pull request, and `distopt config` should be safe on any of them. PyYAML's
safe loader keeps code from being run. The checks here keep a document of a few lines from filling memory ("a billion
laughs": aliases of lists of aliases) or from overflowing the stack, and a key that is written twice from being ignored.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# Far above anything that is written by hand or by a sweep, far below anything that hurts.
MAX_BYTES = 1 << 20
MAX_ALIASES = 100
MAX_DEPTH = 32
MAX_NODES = 100_000


class UnsafeYAML(ValueError):
    """A document that exceeds the limits above."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats (`1e-3`), without its dates and its numbers in base 60."""

    # Copies, because the class attribute is shared with yaml.SafeLoader, and other users of it should see no change.
    # Without the resolver of timestamps, a value such as 2013-01-01 stays a string. So does 1:30:00, a time
    # limit of Slurm's, by a resolver that comes first: YAML 1.1 reads it as the number 5400.
    yaml_implicit_resolvers = {
        char: [("tag:yaml.org,2002:str", re.compile(r"^[-+0-9_.]+(?::[0-9_.]+)+$"))]
        + [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


# YAML 1.1, which PyYAML reads, takes `1e-3` for a string: it wants a dot and a sign, `1.0e-3`.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """Returns the content of `text` as plain dicts, lists and scalars.

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
        return loader.construct_document(node)
    finally:
        loader.dispose()


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
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} appears twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
            size += 1 + _expanded_size(value, known)
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_expanded_size(item, known) for item in node.value)

    if size > MAX_NODES:
        raise UnsafeYAML(f"more than {MAX_NODES:,} values once its aliases are written out")
    known[id(node)] = size
    return size
