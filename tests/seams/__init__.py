"""Plug-ins as a user writes them: each one class in one file that distopt does not know. `test_seams.py` runs them."""
