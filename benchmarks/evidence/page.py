"""docs/evidence.md."""
from __future__ import annotations
def write(entries, path): pass
