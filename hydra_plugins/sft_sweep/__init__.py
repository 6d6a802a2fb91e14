"""The package in which Hydra finds the sweep's launcher: it searches hydra_plugins only."""
