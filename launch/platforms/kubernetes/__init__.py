"""Kubernetes: the objects of a run, and the job that they make."""
