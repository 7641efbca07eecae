"""`python -m whisperkv`: the command line."""

from .cli import main

main()
