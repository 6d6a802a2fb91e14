"""Rows become samples: source, template, tokens and labels."""
