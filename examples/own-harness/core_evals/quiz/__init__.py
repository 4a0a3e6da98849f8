"""A harness of one's own: a package below the namespace core_evals, found on PYTHONPATH."""
