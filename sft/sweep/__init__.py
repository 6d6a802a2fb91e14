"""Sweeps: trials that run in processes of their own, and their table."""
