"""``python -m deployfa.cli``."""

from deployfa.cli import main

main()
