"""Checkpoints that are complete or absent, and contain everything that the next step needs."""
