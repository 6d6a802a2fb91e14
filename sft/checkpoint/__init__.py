"""Checkpoints that are complete or absent, and hold all that the next step depends on."""
