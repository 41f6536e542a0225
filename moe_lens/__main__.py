"""`python -m moe_lens` is the command line."""

from moe_lens.cli import main

main()
