"""From a Megatron checkpoint to verified benchmark scores in one command, on Slurm."""

__version__ = "0.1.0"
