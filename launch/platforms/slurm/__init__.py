"""Slurm: the batch script of a run, and its job."""
