"""Run the merge command, as `sft merge` does: `python scripts/merge.py run=outputs/NAME`."""

from sft.merge.__main__ import main

main()
