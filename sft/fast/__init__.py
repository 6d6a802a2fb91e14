"""The plain path's results, sooner."""
