"""Artifact registries: what ``run.model=NAME:VERSION`` means."""
