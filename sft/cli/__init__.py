"""Code that all commands share: options, help, tab completion, errors."""
