"""Types of values that become arguments and variables of processes, or names in a cluster."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # to be used with `fullmatch`: `match` and `$` let a newline pass

# What is refused in places that are written to disk or to command lines. It errs on the side of refusing: a variable
# that only looks like a secret can still be named in `launch.secrets`.
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY", re.IGNORECASE)


def _as_text(value: Any) -> Any:
    """Lets `OMP_NUM_THREADS: 1` stand without quotes; a YAML file is read so that `1.10` stays as it is written."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"found {value!r}, but arguments and variables of a process cannot hold a NUL character")
    return value


AS_TEXT = BeforeValidator(_as_text)
Text = Annotated[str, AS_TEXT]
"""An argument or a variable of a process: text, whatever it looks like."""

# These values become arguments of ssh, sbatch and mpirun, so none may begin with a dash, have a space or a quote.
# Labels are of 63 characters at most (RFC 1035), and workers meet by IPv4.
HOST_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,62}(\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?$"
HostName = Annotated[str, Field(pattern=HOST_PATTERN, max_length=253)]
ArgumentValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:/@=+*-]*$")]

DNS_LABEL = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"  # RFC 1123, which most names in Kubernetes keep to
DnsLabel = Annotated[str, Field(pattern=DNS_LABEL)]
