"""Links from a page to a file of the repository, such as `../corpus.json`, also work on the built site.

On GitHub such a link is right as it stands. The site has no folder above docs/, so the file is copied to `files/`.
A link to a file that is not there stays as it is, and `mkdocs build --strict` names it.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(\.\./([\w./-]+?)\)")


def _is_copied(path: str) -> bool:
    return (ROOT / path).is_file() and not path.endswith(".md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file of the repository that a page links to."""
    pages = [Path(config.docs_dir, page.src_uri).read_text("utf-8") for page in files.documentation_pages()]
    for path in {path for page in pages for path in LINK.findall(page) if _is_copied(path)}:
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links to those files at their copies."""
    return LINK.sub(lambda link: f"](files/{link[1]})" if _is_copied(link[1]) else link[0], markdown)
