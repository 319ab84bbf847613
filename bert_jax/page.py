"""Self-contained HTML pages: style, script and data in one file, nothing fetched, text shown as text."""

import html
import json
import textwrap
from importlib import resources
from typing import Any

# A browser holds the page to it: whatever text is shown, nothing is fetched and no frame or form is made.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
TITLE = 100  # characters


def render(title: str, name: str, data: Any) -> str:
    """The page `pages/NAME.html`, whole, with `data` as JSON in an element `#data`. A long `title` is cut.

    `<`, `>` and `&` are escaped in the JSON, so no text can end the element that holds it.
    """
    packed = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        packed = packed.replace(character, f"\\u{ord(character):04x}")
    title = textwrap.shorten(title, TITLE, placeholder="…")
    return shell(title, f'<script type="application/json" id="data">{packed}</script>\n{_read(f"{name}.html")}')


def shell(title: str, body: str, style: str = "") -> str:
    """A page around `body`, which is HTML: `pages/style.css` and what is added to it."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_read('style.css')}{style}</style>\n</head>\n<body>\n"
        f"{body}</body>\n</html>\n"
    )


def _read(name: str) -> str:
    return resources.files("bert_jax").joinpath("pages", name).read_text(encoding="utf-8")
