"""Fine-tune causal language models: configured, audited, resumable, and merged with proof."""

import sys

__version__ = "0.1.0"

# Every command imports this first. Locks (fcntl), workers (fork, sched_getaffinity), children that
# end with their parent (prctl) and copies of files (copy_file_range) need Linux.
if sys.platform != "linux":
    raise SystemExit(
        f"error: sft runs on Linux only, and this is {sys.platform}\n"
        "    fix: a Linux machine or container; on Windows, WSL 2"
    )
