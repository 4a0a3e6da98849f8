"""The exceptions a user can meet, each with its exit code.

::

    SlurmevalError
    ├── EvaluationFailed        1  the job ran, and its evaluation failed or is not valid
    ├── ConfigError             2  usage, configuration, profile, template
    ├── ClusterError            3  the cluster could not be reached, or refused
    │   ├── ConnectionFailed       no connection, or it broke
    │   │   ├── Unreachable            there was none: host, port, network
    │   │   └── AccessDenied           login or host key refused: trying again does not help
    │   └── CommandFailed          a command on the cluster ended with an error
    └── ResultsIncomplete       4  results are missing or do not match their checksums
"""

from __future__ import annotations

from typing import ClassVar

import click


class SlurmevalError(click.ClickException):
    """An error that ends a command with one message and no traceback.

    Args:
        message: What is wrong and where.
        hint: What to do about it, shown on a line of its own.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def format_message(self) -> str:
        """Return the message, followed by the hint where there is one."""
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class EvaluationFailed(SlurmevalError):
    """The job ran, and its evaluation failed or is not valid."""

    exit_code = 1


class ConfigError(SlurmevalError):
    """Usage, configuration, profile or template is wrong."""

    exit_code = 2


class ClusterError(SlurmevalError):
    """The cluster could not be reached, or refused."""

    exit_code = 3


class ConnectionFailed(ClusterError):
    """No connection to the cluster, it broke, or no answer came."""


class Unreachable(ConnectionFailed):
    """A connection could not be made: host, port or network."""


class AccessDenied(ConnectionFailed):
    """The login or the host key was refused; trying again does not help."""


class CommandFailed(ClusterError):
    """A command on the cluster ended with an error."""


class ResultsIncomplete(SlurmevalError):
    """Results are missing or do not match their checksums."""

    exit_code = 4
