"""Leaves out every link to the repository as long as the book has no repository, and says what to type instead.

`make adopt REPO=owner/name` gives it one. Until then the owner is the placeholder, which nobody can be. With a
repository the book has an address of its own, too: that of its GitHub pages, unless `html_baseurl` says another.
"""

from typing import Any

from docutils import nodes

PLACEHOLDER = "OWNER_NAME"
HERE = "pip install ."
NOTE = (
    "Type this in the top folder of your copy of the repository, the one with pyproject.toml. "
    "(This copy of the book was built before the repository had an address.)"
)


def _without_buttons(app: Any, config: Any) -> None:
    options = config.html_theme_options
    owner, name = str(options.get("repository_url", "")).rstrip("/").split("/")[-2:]
    if owner != PLACEHOLDER:
        site = f"{owner.lower()}.github.io"
        config.html_baseurl = config.html_baseurl or f"https://{site}/" + ("" if name.lower() == site else f"{name}/")
    else:
        for name in ("use_issues_button", "use_edit_page_button", "use_repository_button"):
            options[name] = False
        options["launch_buttons"] = {}


def _without_links(app: Any, doctree: Any) -> None:
    for link in list(doctree.findall(nodes.reference)):
        if PLACEHOLDER in link.get("refuri", ""):
            inside = [child for child in link.children if not isinstance(child, nodes.image)]
            link.parent.replace(link, inside)
    for block in list(doctree.findall(nodes.literal_block)):
        if block.get("language") == "bash" and PLACEHOLDER in block.astext():
            command = nodes.literal_block(HERE, HERE, language="bash")
            block.parent.replace(block, [command, nodes.paragraph("", NOTE)])


def setup(app: Any) -> dict[str, bool]:
    """Registers the extension with Sphinx."""
    app.connect("config-inited", _without_buttons, priority=900)
    app.connect("doctree-read", _without_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
