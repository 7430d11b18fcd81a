"""What needs a GPU, and what can be known of it without one: `python -m tests.gpu` and `python -m tests.gpu.audit`."""
