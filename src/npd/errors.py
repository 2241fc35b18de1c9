"""What npd raises when it can say what went wrong: one paragraph, and an exit status."""

from __future__ import annotations


class NpdError(Exception):
    """A failure that npd can explain; the command line prints it without a traceback.

    Args:
        what: what is wrong, and where.
        remedy: how to mend it, as sentences of their own; whoever mends it by itself leaves them out.
    """

    exit_status = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} {remedy}" if remedy else what)
        self.what, self.remedy = what, remedy
        self.role: str | None = None
        """The process that failed, where another one tells of it: refresh-0, ..."""


class UserError(NpdError):
    """What the user gave is wrong: the message says what, where, and how to mend it."""

    exit_status = 2


class RunError(NpdError):
    """The run itself failed: a full disk, a loss that is not finite."""
