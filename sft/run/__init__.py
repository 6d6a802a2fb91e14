"""The folder of a run, and whether it may be resumed."""
