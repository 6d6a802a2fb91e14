"""What generation must know of a model, and greedy answers."""
