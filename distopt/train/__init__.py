"""The loop that a YAML config runs, its progress and its metrics."""
