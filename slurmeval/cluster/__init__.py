"""What talks to a cluster: hosts (where commands run) and schedulers (how a job starts)."""
