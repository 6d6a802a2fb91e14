"""From the configuration of another tool to a settings file of sft."""
