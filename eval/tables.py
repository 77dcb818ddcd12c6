"""Tables for people: the same cells as markdown and on the terminal. Called by eval.compare, queries and report."""

import html

from markdown_it import MarkdownIt
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH = 80  # of text, at least
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto}"
    "th,td{border:1px solid #ccc;padding:.25rem .6rem}th{background:#f2f2f2}td{font-variant-numeric:tabular-nums}"
    "td[style*=right]{white-space:nowrap}"
    "img{max-width:100%}pre,code{background:#f5f5f5;font-size:.85em}pre{padding:.8rem;white-space:pre-wrap}"
    "blockquote{border-left:4px solid #D55E00;margin:0;padding:.2rem 1rem}summary{cursor:pointer}"
)
UNCUT = 1000  # of tables: a cell cut short says nothing, a line that the terminal wraps does


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]], text_columns: int = 1) -> list[str]:
    """Lines of a table, aligned so that it reads well as plain text too; the first columns are text, the rest numbers.

    Cells may hold any text but line ends; a pipe is escaped.
    """
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = tuple("-" * width if place < text_columns else "-" * (width - 1) + ":" for place, width in enumerate(widths))
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [
            cell.ljust(width) if place < text_columns else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def html_page(title: str, markdown: str) -> str:
    """The same text for a browser, links relative as they are."""
    body = MarkdownIt("commonmark").enable("table").render(markdown)
    window = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">\n{window}\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'


def print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]], text_columns: int = 1) -> None:
    """The same on the terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < text_columns else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = console()
    wide.width = UNCUT
    wide.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    wide.print(table)


def console() -> Console:
    """The terminal; at least so wide that text does not become a column."""
    found = Console()
    found.width = max(found.width, WIDTH)
    return found
