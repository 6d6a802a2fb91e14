"""What every command shares: options, help, tab completion, errors."""
