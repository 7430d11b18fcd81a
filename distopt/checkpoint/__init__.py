"""The state of a run on disk: safe to load, never half-written."""
