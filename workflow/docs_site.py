"""Hook of mkdocs.yml: files of the repository that a page of docs/ links are part of the site.

In the repository a link leads to `../results/...`. The site has no repository beside it, so the
file comes with it, under `repository/`: a picture as it is, text as a page.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./([^)#\s]+)")
PICTURES = (".svg", ".png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every linked file that exists; a link to none stays as it is, a fault for mkdocs."""
    pages = [file.content_string for file in files.documentation_pages()]
    for name in sorted({link for page in pages for link in LINK.findall(page)}):
        if (ROOT / name).is_file():
            files.append(_copy(name, config))
    return files


def _copy(name: str, config: MkDocsConfig) -> File:
    source = ROOT / name
    if source.suffix in PICTURES:
        return File.generated(config, f"repository/{name}", abs_src_path=str(source))
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".md":
        text = f"```{source.suffix[1:]}\n{text}\n```\n"
    page = f"---\nsearch: {{exclude: true}}\ntitle: {name}\n---\n{text}"
    return File.generated(config, _address(name), content=page)


def _address(name: str) -> str:
    is_page = name.endswith((".md", *PICTURES))
    return f"repository/{name}" if is_page else f"repository/{name}.md"


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead to what `on_files` added."""

    def link(match: re.Match) -> str:
        address = _address(match[1])
        return f"]({address}" if files.get_file_from_path(address) else match[0]

    return LINK.sub(link, markdown)
