"""The files of a run."""

from fastgessl.runs.folder import (
    PACKAGES,
    JsonLines,
    changes,
    continuation,
    create,
    environment,
    read_config,
    run_folder,
    version_of,
    write_bytes,
    write_json,
    writing,
)

__all__ = [
    "PACKAGES",
    "JsonLines",
    "changes",
    "continuation",
    "create",
    "environment",
    "read_config",
    "run_folder",
    "version_of",
    "write_bytes",
    "write_json",
    "writing",
]
