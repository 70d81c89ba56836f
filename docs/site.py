"""Hook of mkdocs: links that leave docs/ become plain names, as the site holds the pages alone."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)[^)#]*(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep links between pages, and unlink those to files of the repository beside docs/."""
    depth = page.file.src_uri.count("/")

    def unlinked(match: re.Match) -> str:
        return match[0] if match[0].count("../") <= depth else match[1]

    return OUTSIDE.sub(unlinked, markdown)
