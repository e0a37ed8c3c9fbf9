"""Adds the Markdown files outside docs/ to the site, with links that work there and on GitHub.

GitHub resolves links relative to the file's place in the repository, MkDocs relative to the docs
folder. The files use GitHub's form; the links are rewritten when the site is built.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "getting_started.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
}
_LINK = re.compile(r"(?<=\]\()([\w./-]+\.md)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to Markdown files as links to their pages."""
    name = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == name), f"docs/{name}")
    here = posixpath.dirname(source)

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link[0]))
        found = PAGES.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(found, posixpath.dirname(name) or ".")

    return _LINK.sub(target, markdown)
