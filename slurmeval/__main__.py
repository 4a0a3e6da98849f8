"""``python -m slurmeval``."""

from slurmeval.cli import main

main()
