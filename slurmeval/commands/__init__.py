"""Groups of commands; `slurmeval.cli` puts them together."""
