"""Sweeps: what Hydra needs to find ``sft.sweep``; it accepts plugins from here only."""
