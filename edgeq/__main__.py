"""`python -m edgeq`: the command line."""

from .cli import main

main()
