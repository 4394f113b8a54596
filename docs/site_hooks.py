"""What makes a site of pages that are written for a checkout: `make docs` (mkdocs.yml) calls these functions.

Pages from outside of `docs/` get a place in it; links are led to it, and those to files that the site has not become plain
text; and the mathematics of GitHub's Markdown becomes that of `pymdownx.arithmatex`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "kernels/README.md": "kernels.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> str:
    """Where a page of the site lies in the checkout."""
    return next((source for source, name in OUTSIDE.items() if name == page and source != "README.md"), f"docs/{page}")


def led(page: str, text: str) -> str:
    """The links of a page, as they are in the site."""
    folder = posixpath.dirname(source_of(page))

    def lead(link: re.Match[str]) -> str:
        image, label, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        name = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        return label if name is None else f"{image}[{label}]({name}{mark}{anchor})"

    return LINK.sub(lead, text)


def mathematics(text: str) -> str:
    """GitHub's ```math blocks and $`…`$, as $$…$$ and $…$."""
    text = re.sub(r"^```math\n(.*?)^```$", r"\n$$\n\1$$\n", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\$`([^`]+)`\$", r"$\1$", text)


def markdown(page: str, text: str) -> str:
    """A page of the checkout as the site's Markdown; code blocks stay as they are."""
    pieces = CODE.split(mathematics(text))
    return "".join(piece if piece.startswith("```") else led(page, piece) for piece in pieces)


def slug(heading: str, separator: str) -> str:
    """GitHub's anchor of a heading, which the pages' links use."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages from outside."""
    from mkdocs.structure.files import File

    for source, name in OUTSIDE.items():
        if source != "README.md":
            files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    return markdown(page.file.src_uri, text)
