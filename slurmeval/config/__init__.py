"""Layers of configuration become one validated ``Config``."""
