"""The Python in the pages that people read: found, and run as a reader would."""

import contextlib
import io
import re
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # "```py" is code of others, and is not run


def blocks(page):
    """The blocks of a page, as "docs/tutorial.md"."""
    return BLOCK.findall((ROOT / page).read_text())


def pages():
    """Those that have any."""
    return [page for page in all_pages() if blocks(page)]


def all_pages():
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def run(code, names, place):
    """What a block prints, which leaves its names behind."""
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.filterwarnings("error", message="attention was recorded")
        exec(compile(code, place, "exec"), names)
    return printed.getvalue()
