"""Sweeps: each trial runs in separate processes, and a table compares the trials."""
