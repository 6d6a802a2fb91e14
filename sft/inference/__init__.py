"""The settings of training that generation needs, and greedy answers."""
