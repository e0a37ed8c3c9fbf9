"""Pages of the site whose files live outside docs/, with links that work there and on GitHub.

GitHub resolves a link from the file it stands in, MkDocs from its docs folder. The files keep
GitHub's form; this hook adds the pages and rewrites the links while the site is built.
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
    """Adds the pages from outside docs/."""
    for source, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to Markdown files at their pages."""
    name = page.file.src_uri
    source = next((s for s, p in PAGES.items() if p == name), f"docs/{name}")
    here = posixpath.dirname(source)

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, link[0]))
        found = PAGES.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(found, posixpath.dirname(name) or ".")

    return _LINK.sub(target, markdown)
