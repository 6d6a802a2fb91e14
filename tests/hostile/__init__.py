"""Bad inputs for every command, as tables: each must be refused clearly, and do nothing else."""
