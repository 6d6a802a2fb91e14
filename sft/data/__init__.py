"""Turn rows into samples: source, template, tokens and labels."""
