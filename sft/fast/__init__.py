"""Faster implementations that compute the same results as the libraries' own."""
