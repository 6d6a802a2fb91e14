"""Callbacks that log a run."""
