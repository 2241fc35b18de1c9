"""The run directory: its files, its columns, its states."""

from npd.store.files import explained_full_disk, json_lines, remove_directory, sha256, write_json, write_text, writing
from npd.store.schema import REFERENCE, SCHEMA
from npd.store.store import Store

__all__ = [
    "REFERENCE", "SCHEMA", "Store", "explained_full_disk", "json_lines", "remove_directory", "sha256", "write_json",
    "write_text", "writing",
]  # fmt: skip
