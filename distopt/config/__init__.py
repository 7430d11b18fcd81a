"""The YAML of a run: every key typed and documented, read safely, wrong input answered with the right one.

Imports neither torch nor pyro, so that a bad configuration is refused before any worker starts.
"""

from distopt.config.base import ConfigError
from distopt.config.compare import MAY_CHANGE, comparable, differences
from distopt.config.keys import Key, all_keys, explain_yaml
from distopt.config.launch import LaunchConfig
from distopt.config.load import checkpoints_of, dump_yaml, load_config, parse_config
from distopt.config.reduce import ReduceConfig, ReduceOptions
from distopt.config.schema import (
    CheckpointConfig,
    ClipConfig,
    DataConfig,
    LogConfig,
    LoggerConfig,
    MetricConfig,
    OptimConfig,
    RunConfig,
    SchedulerConfig,
    ServeConfig,
    TrainConfig,
)

__all__ = [
    "MAY_CHANGE",
    "CheckpointConfig",
    "ClipConfig",
    "ConfigError",
    "DataConfig",
    "Key",
    "LaunchConfig",
    "LogConfig",
    "LoggerConfig",
    "MetricConfig",
    "OptimConfig",
    "ReduceConfig",
    "ReduceOptions",
    "RunConfig",
    "SchedulerConfig",
    "ServeConfig",
    "TrainConfig",
    "all_keys",
    "checkpoints_of",
    "comparable",
    "differences",
    "dump_yaml",
    "explain_yaml",
    "load_config",
    "parse_config",
]
