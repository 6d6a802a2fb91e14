"""The tokenizer, the base model, its precision and the adapter."""
