"""The run directory: its files, its columns, its states."""

from npd.store.disk import disk_usage, explained_disk, explained_run
from npd.store.files import append_line, json_lines, opened, remove_directory, sha256, write_json, write_text, writing
from npd.store.places import check_places
from npd.store.recorded import record, recorded
from npd.store.schema import REFERENCE, SCHEMA
from npd.store.store import DELETE_CHECKPOINT, Store

__all__ = [
    "DELETE_CHECKPOINT", "REFERENCE", "SCHEMA", "Store", "append_line", "check_places", "disk_usage", "explained_disk",
    "explained_run", "json_lines", "opened", "record", "recorded", "remove_directory", "sha256", "write_json",
    "write_text", "writing",
]  # fmt: skip
