"""What to do where something optional is not installed."""

from __future__ import annotations

import re
import shlex
from importlib import metadata


def installing(extra: str) -> str:
    """A command that installs what one of our extras brings. By the names of those packages: this distribution is on no
    index, and who installed it need not have its folder any more."""
    needed = [
        requirement.partition(";")[0].strip()
        for requirement in metadata.requires("pykvbm") or ()
        if re.search(rf"""extra == ['"]{extra}['"]""", requirement)
    ]
    return f"pip install {shlex.join(needed)}"
