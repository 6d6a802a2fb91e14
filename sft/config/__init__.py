"""Every setting is declared here, composed from YAML and the command line, and checked."""
