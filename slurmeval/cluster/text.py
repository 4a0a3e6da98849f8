"""Text that goes to a remote shell, and text that comes back from one."""

from __future__ import annotations

import re
import shlex

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def printable(text: str) -> str:
    """Return remote text with control characters and undecodable bytes made harmless."""
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode("utf-8", "replace"))


def one_line(text: str, limit: int = 400) -> str:
    """Return the words of a command's output on one line."""
    joined = " · ".join(line.strip() for line in printable(text).splitlines() if line.strip())
    return joined if len(joined) <= limit else f"{joined[: limit - 1]}…"


def quote_path(path: str) -> str:
    """Quote a remote path for ``sh``; a leading ``~`` stays the user's home directory."""
    if path == "~":
        return '"$HOME"'
    if path.startswith("~/"):
        return f'"$HOME"/{shlex.quote(path[2:])}'
    # A relative name that starts with a dash is no option.
    return shlex.quote(path if path.startswith("/") else f"./{path}")
