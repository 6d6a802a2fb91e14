"""Sweeps: what Hydra needs to find ``sft.sweep.trials``; it accepts plugins from here only."""
