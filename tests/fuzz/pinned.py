"""Cases that failed once: they are run first, and in `make test`. A fault that is found later becomes a case here."""

from __future__ import annotations

PINNED: dict[str, list[int]] = {}
