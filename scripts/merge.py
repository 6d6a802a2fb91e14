"""The merge command for those who look here: `python scripts/merge.py run=outputs/NAME`."""

from sft.merge.__main__ import main

main()
