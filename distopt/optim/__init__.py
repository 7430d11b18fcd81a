"""Per-parameter optimizers, drop-in for `pyro.optim`."""
