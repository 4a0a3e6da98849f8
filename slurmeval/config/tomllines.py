"""On which line a TOML document sets each key; ``tomllib`` reads the values."""

from __future__ import annotations

import re

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'",
    re.DOTALL,
)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Return the 1-based line of each key and table header of a valid TOML document.

    Keys inside an inline table or array have no line of their own: theirs is that of the key
    that holds them.
    """
    scanner = _Scanner(text)
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    while scanner.skip_blank():
        line = scanner.line()
        header = scanner.at("[")
        if header:
            scanner.pos += 2 if scanner.at("[[") else 1
        keys = scanner.keys()
        if header:
            table = keys
            scanner.skip_line()
        else:
            keys = (*table, *keys)
            scanner.skip_value()
        for length in range(1, len(keys) + 1):
            lines.setdefault(keys[:length], line)
    return lines


class _Scanner:
    """A position in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0

    def at(self, what: str) -> bool:
        return self.text.startswith(what, self.pos)

    def line(self) -> int:
        return self.text.count("\n", 0, self.pos) + 1

    def skip_blank(self) -> bool:
        """Skip white space and comments; return whether anything is left."""
        blank = _BLANK.match(self.text, self.pos)
        self.pos = blank.end() if blank else self.pos
        return self.pos < len(self.text)

    def skip_line(self) -> None:
        end = self.text.find("\n", self.pos)
        self.pos = len(self.text) if end < 0 else end

    def keys(self) -> tuple[str, ...]:
        """Read a dotted key up to its ``=`` or ``]``, and past that."""
        keys = []
        while self.pos < len(self.text) and self.text[self.pos] not in "=]":
            bare, quoted = (p.match(self.text, self.pos) for p in (_BARE, _STRING))
            if bare:
                keys.append(bare.group())
            elif quoted:
                keys.append(quoted.group()[1:-1])
            match = bare or quoted
            self.pos = match.end() if match else self.pos + 1
        self.pos += 1
        return tuple(keys)

    def skip_value(self) -> None:
        """Skip a value: to the end of its line, or of the array or inline table it opens."""
        depth = 0
        while self.pos < len(self.text):
            char = self.text[self.pos]
            string = _STRING.match(self.text, self.pos) if char in "\"'" else None
            if string:
                self.pos = string.end()
                continue
            if char == "#":
                self.skip_line()
                continue
            if char == "\n" and depth == 0:
                return
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(char, 0)
            self.pos += 1
