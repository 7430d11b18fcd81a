"""Real models of real data, which `configs/`, the README and the tests use."""
