"""What search engines and social networks read of a page: a description, a picture, its address where it has one."""

import html
import re
from typing import Any

SITE = "Keras Optimizers from the Inside"
DEFAULT = "What a Keras optimizer is and does, with every formula, number and figure held by a test."


def description(body: str) -> str:
    """The first paragraph of a page, cut to what a search engine shows.

    Args:
        body: the page's HTML.
    """
    for paragraph in re.findall(r"<p>(.*?)</p>", body, re.DOTALL):
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", paragraph))).strip()
        if len(text) > 60 and "\\(" not in text:
            return text if len(text) <= 160 else text[:157].rsplit(" ", 1)[0] + " …"
    return DEFAULT


def _add(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    title = re.sub(r"<[^>]+>", "", context.get("title") or SITE)
    told = {"og:type": "article", "og:site_name": SITE, "og:title": html.unescape(title)}
    words = description(context.get("body", ""))
    told["og:description"] = words
    if base := app.config.html_baseurl:
        site = base.rstrip("/")
        told["og:url"], told["og:image"] = f"{site}/{pagename}.html", f"{site}/_static/readme.png"
    tags = [f'<meta name="description" content="{html.escape(words)}" />']
    tags += ['<meta name="twitter:card" content="summary_large_image" />'] if base else []
    tags += [f'<meta property="{name}" content="{html.escape(value)}" />' for name, value in told.items()]
    context["metatags"] = context.get("metatags", "") + "\n    ".join(tags)


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("html-page-context", _add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
