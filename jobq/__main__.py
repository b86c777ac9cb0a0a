"""`python -m jobq`: the command line."""

from .cli import main

main()
