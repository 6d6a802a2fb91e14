"""The trainer and the functions that build it."""
