"""Makes today's definitions of custom resources known to a server of release 1.20."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def for_1_20(path: Path) -> dict[str, Any]:
    """Returns a file's definition without what came later: rules in CEL, and defaults that are the empty string.

    1.20 reads an empty default as null, which it refuses; lists whose keys relied on one become lists without keys.
    """
    documents = yaml.load_all(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    definition: dict[str, Any] = next(one for one in documents if one and one["kind"] == "CustomResourceDefinition")
    definition.pop("status", None)
    for version in definition["spec"]["versions"]:
        _simplify(version["schema"]["openAPIV3Schema"])
    return definition


def _simplify(schema: Any) -> None:
    if not isinstance(schema, dict):
        return
    schema.pop("x-kubernetes-validations", None)
    if schema.get("default") == "":
        del schema["default"]
    items = schema.get("items")
    keys = schema.get("x-kubernetes-list-map-keys", ())
    if isinstance(items, dict) and any(items["properties"][key].get("default") == "" for key in keys):
        del schema["x-kubernetes-list-map-keys"]
        schema["x-kubernetes-list-type"] = "atomic"
    for child in (*schema.get("properties", {}).values(), items, schema.get("additionalProperties")):
        _simplify(child)
    for key in ("allOf", "anyOf", "oneOf"):
        for child in schema.get(key, ()):
            _simplify(child)
