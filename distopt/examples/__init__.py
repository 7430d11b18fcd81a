"""Real models on real data, used by `configs/`, the README and the tests."""
