"""The trainer, and what a run is put together from."""
