"""Merging: the adapter's changes, written into a copy of the base's files, and verified."""
