"""Files that grow by a line at a time and survive whatever ends the run."""

import os
from pathlib import Path
from typing import TextIO


def open_for_appending(path: Path) -> TextIO:
    """The file, its last line ended: one torn by a kill must not swallow the next."""
    file = path.open("a")
    if file.tell():
        with path.open("rb") as end:
            end.seek(-1, os.SEEK_END)
            if end.read() != b"\n":
                file.write("\n")
    return file
