"""The `launch` section: on which machines, through which engine, with how many workers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from distopt.config.section import Section

ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|PRIVATE_?KEY|ACCESS_?KEY", re.IGNORECASE)


def _number_as_text(value: Any) -> Any:
    """Lets `OMP_NUM_THREADS: 1` stand without quotes."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


EnvValue = Annotated[str, BeforeValidator(_number_as_text)]


class LaunchConfig(Section):
    """Where and how the run is started; `platform` alone changes between machines."""

    platform: Literal["local", "torchrun", "horovodrun"] = "local"
    """The engine that starts the workers; `local` is this machine, through the engine that `reduce.backend` needs."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Processes per host."""
    hosts: list[str] = Field(default_factory=list)
    """Names or addresses of the hosts, the first one leading; none means this machine."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """TCP port of the rendezvous on the first host; null takes a free one where the platform can."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times that the engine starts the workers again after one has died; each time they resume."""
    grace_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that workers get for their last checkpoint after Ctrl-C or SIGTERM before they are killed."""
    env: dict[str, EnvValue] = Field(default_factory=dict)
    """Environment variables of the workers; they are written into plans and run directories, so no secrets here."""
    secrets: list[str] = Field(default_factory=list)
    """Names of environment variables that workers inherit from yours; their values are written nowhere."""

    @field_validator("env")
    @classmethod
    def _no_secrets_in_env(cls, env: dict[str, str]) -> dict[str, str]:
        for key in env:
            if not ENV_NAME.match(key):
                raise ValueError(f"{key!r} is not the name of an environment variable")
            if SECRET_NAME.search(key):
                raise ValueError(
                    f"{key} looks like a secret, and env is written into plans and run directories; "
                    f"set it in your environment and name it in launch.secrets: [{key}]"
                )
        return env

    @field_validator("secrets")
    @classmethod
    def _names_only(cls, names: list[str]) -> list[str]:
        for name in names:
            if not ENV_NAME.match(name):
                raise ValueError("an entry is not the name of an environment variable; values never belong here")
        return names
