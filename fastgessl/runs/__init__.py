"""The files of a run."""

from fastgessl.runs.folder import (
    PACKAGES,
    JsonLines,
    continuation,
    create,
    environment,
    hyperparameters,
    read_config,
    record_changes,
    run_folder,
    write_bytes,
    write_json,
    writing,
)

__all__ = [
    "PACKAGES",
    "JsonLines",
    "continuation",
    "create",
    "environment",
    "hyperparameters",
    "read_config",
    "record_changes",
    "run_folder",
    "write_bytes",
    "write_json",
    "writing",
]
