"""What npd raises when it can say what went wrong: one paragraph, and an exit status."""

from __future__ import annotations

SHOWN = 300  # characters that are kept of somebody else's words


def foreign(value: object, limit: int = SHOWN) -> str:
    """Somebody else's words (a server's, a file's, a template's) as one line that is safe to print, to store and to log.

    White space is folded; what has no shape (what begins an escape sequence, what turns a line's direction, a lone surrogate)
    is left out; what is longer than `limit` is cut and says how long it was: "abc… (70000 characters)".
    """
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as error:  # an integer of thousands of digits, what nests too deep, a __str__ that fails
        text = f"a {type(value).__name__} that can't be shown ({type(error).__name__})"
    folded = " ".join(text[: 8 * limit].split())
    seen = "".join(filter(str.isprintable, folded))
    if len(seen) <= limit and len(text) <= 8 * limit:
        return seen
    return f"{seen[:limit]}… ({len(text)} characters)"


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
