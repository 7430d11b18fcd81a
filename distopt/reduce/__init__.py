"""Gradients of many workers become one gradient."""
