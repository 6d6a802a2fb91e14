"""Merging: write the base's files with the adapter's change added, and verify the result."""
