"""YAML from anyone: it runs no code, and a small file stays small once it is read."""

from pathlib import Path
from typing import Any

import yaml

from fastgessl.config import UsageError

_LARGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases: ten lines of them stand for 10^9 items, which the first error message would
    print.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"found the alias *{event.anchor:.20}; write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file of at most 1 MiB. Raises FileNotFoundError, or UsageError for what is no
    plain YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UsageError(f"'{path}' is larger than 1 MiB, which no configuration is.")
        return yaml.load(content.decode("utf-8"), Loader=_Loader)
    except (FileNotFoundError, UsageError):
        raise
    except RecursionError:
        raise UsageError(f"'{path}' cannot be read as YAML: it is nested too deeply.") from None
    # Besides YAML's own errors: dates and numbers that Python refuses, keys that cannot be hashed, a folder
    # in place of a file.
    except (OSError, yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise UsageError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())[:300]}") from None
