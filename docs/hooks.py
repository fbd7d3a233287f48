"""How mkdocs reads this repository: README and others become pages, and links lead somewhere on GitHub and on the site.

Pages link to files as GitHub does, `../configs/tiny.py`; on the site that is a link to the repository, or to the page
that the file has become.
"""

import ast
import logging
import posixpath
import re
from pathlib import Path

import config_page

_LOG = logging.getLogger("mkdocs.plugins.kforcing_jax")

REPOSITORY = Path(__file__).parents[1]
# Files outside docs/ that are pages of the site.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

# [text](target), and what raw HTML has.
_LINK = re.compile(r"""(\]\(|\b(?:src|href|srcset)=")([^)\s"]+)""")
_CONFIGS_HEAD = """\
# Configurations

What the files of `configs/` say of themselves.
"""


def on_files(files, config):
    """Adds the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_links(text, name, page, config.repo_url)))
    files.append(File.generated(config, "configuration.md", content=config_page.page()))
    files.append(File.generated(config, "configs.md", content=configs_page()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the pages that are in docs/."""
    del files
    if page.file.generated_by:
        return markdown
    return with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri, config.repo_url)


def configs_page() -> str:
    """What every file of configs/ says of itself: the command, the hardware, what to expect."""
    parts = [_CONFIGS_HEAD]
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if text:
            parts.append(f"\n## {path.stem}\n\n{text}\n")
    return "".join(parts)


def with_links(text: str, file: str, page: str, repo_url: str) -> str:
    """The text of `file`, a path in the repository, with links as `page` of the site needs them."""

    def one(match):
        return match[1] + link(match[2], file, page, repo_url)

    return _LINK.sub(one, text)


def link(target: str, file: str, page: str, repo_url: str) -> str:
    """A link of `file`, as `page` of the site needs it: to another page, to the repository, or as it was."""
    path, mark, anchor = target.partition("#")
    if "://" in target or not path or path.startswith(("/", "mailto:")):
        return target
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
    if linked in PAGES or (linked.startswith("docs/") and not linked.endswith(".py")):
        on_site = PAGES.get(linked) or linked.removeprefix("docs/")
        return posixpath.relpath(on_site, posixpath.dirname(page) or ".") + mark + anchor
    there = REPOSITORY / linked
    if not there.exists():
        _LOG.warning(f"{file} links to {target}, which is not there")
        return target
    return f"{repo_url.rstrip('/')}/{'tree' if there.is_dir() else 'blob'}/main/{linked}{mark}{anchor}"
