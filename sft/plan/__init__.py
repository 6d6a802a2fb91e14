"""The decisions for settings that are ``auto``, and an estimate of a step's memory."""
