"""Files that are replaced as a whole, with the permissions that any new file gets."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

__all__ = ["replace_files"]


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files so that each is, at any moment, what it was or all that it will be.

    All are written before the first takes its place, and they do so in the order given.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            written[path] = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            with written[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, new in written.items():
            new.replace(path)
    finally:
        for new in written.values():
            new.unlink(missing_ok=True)
