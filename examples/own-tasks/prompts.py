"""Functions that the tasks name with !function."""


def choices(doc: dict) -> list[str]:
    """Return the answers to choose from."""
    return list(doc["cities"])


def right(doc: dict) -> str:
    """Return the right answer, as the model would go on."""
    return " " + doc["cities"][doc["answer"]]
