"""Puts figures into the pages themselves, in the page's own colours: an SVG behind an ``img`` cannot know the theme."""

import colorsys
import html
import itertools
import pathlib
import re
from typing import Any

# A colour of companion.figures on the light page, and the one that replaces it on the dark one.
DARK = {
    "#4d4d4d": "#c4c4c4",
    "#0072b2": "#56b4e9",
    "#d17c00": "#f0a43c",
    "#9c5c00": "#f0a43c",
    "#00795b": "#2fbf95",
    "#a8327d": "#e27fc0",
    "#a3492f": "#e58e70",
    "#7d7d7d": "#9a9a9a",
    "#6b6b6b": "#a8a8a8",
}
# A darker shade of one of them, in a figure with two lines of one method (chapters 03 and 08).
SHADES = {"#5c2415": "#f6c9b8", "#003f63": "#d6ecfa"}
_IMAGE = re.compile(r'<img\b(?=[^>]*\bsrc="[^"]*_images/([^"]+\.svg)")[^>]*>')


def dark(colour: str) -> str:
    """What a colour becomes on the dark page: the book's own have a partner, greys and pale tints turn around.

    Args:
        colour: a colour as ``#rrggbb``.
    """
    if partner := DARK.get(colour) or SHADES.get(colour):
        return partner
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if saturation > 0 and lightness < 0.8:
        return colour
    paper, ink = 0x12 / 255, 0xE6 / 255
    turned = colorsys.hls_to_rgb(hue, ink + (paper - ink) * lightness, min(saturation, 0.3))
    return "#" + "".join(f"{round(255 * part):02x}" for part in turned)


def themed(drawing: str, words: str) -> str:
    """A drawing as part of a page.

    Args:
        drawing: what ``companion.figures.show`` stored.
        words: what is read aloud in its place.

    Returns:
        An ``svg`` element. One that holds an image or many colours stays as it is, a light card on the dark page.
    """
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", drawing)
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawing))
    is_card = "<image" in drawing or len(colours) > 24
    if not is_card:
        for colour in sorted(colours):
            either = f"light-dark({colour}, {dark(colour)})"
            drawing = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: {colour}; \1: {either}", drawing)
    kind = "drawing card" if is_card else "drawing"
    return drawing.replace("<svg", f'<svg class="{kind}" role="img" aria-label="{html.escape(words)}"', 1)


def numbered(body: str, page: str) -> str:
    """The captions of an appendix, counted on its page, ``Fig. A1.1``: Sphinx counts through all appendices.

    Args:
        body: the page's HTML.
        page: such as ``"notebooks/a1_word_vectors_as_fast_as_gensim"``.
    """
    appendix, count = re.match(r"notebooks/(a\d)_", page), itertools.count(1)
    if appendix is None:
        return body
    number = re.compile(r'(<span class="caption-number">Fig\. )\d+ ')
    return number.sub(lambda found: f"{found[1]}{appendix[1].upper()}.{next(count)} ", body)


def _inline(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if "body" not in context:
        return
    paths = {name: path for path, name in app.builder.images.items()}

    def drawing(match: re.Match[str]) -> str:
        alt = re.search(r'alt="([^"]*)"', match[0])
        path = pathlib.Path(app.srcdir) / paths[match[1]]
        return themed(path.read_text(), html.unescape(alt[1]) if alt else "")

    body = numbered(_IMAGE.sub(drawing, context["body"]), pagename)
    context["body"] = re.sub(r'<th class="head[^"]*"><p></p></th>', "<td></td>", body)  # a corner is no heading


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("html-page-context", _inline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
