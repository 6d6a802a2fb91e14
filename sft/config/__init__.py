"""Settings: every one declared, composed from YAML and the command line, and checked; no torch."""
