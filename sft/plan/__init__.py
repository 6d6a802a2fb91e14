"""What auto decides, and how much memory a step needs."""
