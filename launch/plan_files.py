"""Names inside a run directory that the launcher and its guards share."""

CONFIG_FILE = "config.yaml"
CONFIG_VARIABLE = "DISTOPT_CONFIG"
LAUNCH_FILE = "launch.json"
LOCK_FILE = "launch.lock"
LOGS = "logs"
SECRETS_FILE = ".secrets.json"
STOP_FILE = "stop"
