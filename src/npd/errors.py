"""What npd raises when it can say what went wrong: one paragraph, and an exit status."""

from __future__ import annotations


class NpdError(Exception):
    """A failure that npd can explain; the command line prints it without a traceback."""

    exit_status = 1


class UserError(NpdError):
    """What the user gave is wrong: the message says what, where, and how to mend it."""

    exit_status = 2


class RunError(NpdError):
    """The run itself failed: a full disk, a loss that is not finite."""
