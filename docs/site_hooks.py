"""What mkdocs does beside its plugins: Sphinx's roles in docstrings become plain code."""

import re

_ROLE = re.compile(r":(?:class|func|meth|data|mod):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """``:class:`~fastmerge.HardConcrete``` reads ``HardConcrete``."""
    return _ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)
