"""Fine-tune causal language models: configured, audited, resumable, and merged with proof."""

__version__ = "0.1.0"
