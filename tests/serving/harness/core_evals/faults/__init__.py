"""A harness that goes wrong as it is told to; it asks nothing and always exits with 0."""
