"""Self-contained HTML pages, and what they are put together from."""

import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from kforcing_jax.evaluation.tables import Column, table_rows

# Headings of rows stay where they are while a table scrolls, unless they are so long that little else would be seen.
_LONGEST_HEADING = 24
_TEMPLATE = string.Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def page(title: str, head: str, sections: Sequence[str]) -> str:
    """A page that needs nothing but itself: a title (text), what stands below it and the sections (HTML)."""
    return _TEMPLATE.substitute(title=html.escape(title), head=head, sections="\n".join(filter(None, sections)))


def section(heading: str, *content: str) -> str:
    """Content (HTML) below a heading (text)."""
    return "\n".join([f"<section>\n<h2>{html.escape(heading)}</h2>", *content, "</section>\n"])


def paragraph(text: str) -> str:
    """A paragraph of text."""
    return f"<p>{html.escape(text)}</p>"


def definitions(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of names and what they mean, or their values."""
    items = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in pairs)
    return f"<dl>{items}</dl>"


def table(rows: Mapping[str, dict], columns: Sequence[Column], first: str = "stage") -> str:
    """One row per entry, its name in the first column, which is called `first`; wide tables scroll in themselves."""
    sides = [column.to_the_left for column in columns]
    texts = [[name, *cells] for name, *cells in table_rows(dict(rows), list(columns))]
    return text_table([first, *(column.name for column in columns)], texts, [True, *sides])


def text_table(names: Sequence[str], rows: Sequence[Sequence[str]], to_the_left: Sequence[bool]) -> str:
    """A table of texts; the first cell of a row is its heading."""
    sides = [' class="left"' if left else "" for left in to_the_left]

    def cell(tag, side, text):
        return f"<{tag}{side}>{html.escape(text)}</{tag}>"

    def row(cells, tag):
        first, *rest = cells
        others = "".join(cell(tag, side, text) for side, text in zip(sides[1:], rest, strict=True))
        return f"<tr>{cell('th', '', first)}{others}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    is_wide = any(len(first) > _LONGEST_HEADING for first, *_ in rows)
    return (
        f'<div class="wide"><table{" class=unfixed" if is_wide else ""}>\n<thead>{row(names, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
