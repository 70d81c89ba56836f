"""A table as text: for the terminal, as Markdown and LaTeX, and between the markers of a page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blemish.edge.errors import InputError
from blemish.files import write_text


class Grid(NamedTuple):
    """A table as text."""

    title: str
    columns: list[str]
    words: int  # the columns at the left that hold words; the others hold numbers
    rows: list[list[str]]
    best: set[tuple[int, int]]  # (row, column) of the cells to highlight
    notes: list[str]  # the first without a number, the others cited in cells as [1], [2], …


def show(console: Console, grid: Grid, bold: bool) -> None:
    """Print a grid and its notes; words that all rows share are printed above it, columns without any value are left out.

    Text wraps between words to fit the console, never inside a word: on a very narrow console the lines are longer.
    """
    cells = {j: [row[j] for row in grid.rows] for j in range(len(grid.columns))}
    same = {j: column[0] for j, column in cells.items() if len(column) > 1 and len(set(column)) == 1}
    shared = {j: text for j, text in same.items() if 0 < j < grid.words or text == "–"}
    above = [grid.title, *(f"{grid.columns[j]}: {text}" for j, text in shared.items() if text != "–")]
    kept = {
        j: [grid.columns[j].replace(" ", "\n", 1), *(cell.replace(" ± 0", "\n±") for cell in column)]
        for j, column in cells.items()
        if j not in shared
    }
    widths = {j: max(len(line) for cell in column for line in cell.split("\n")) for j, column in kept.items()}
    least = {j: max(len(word) for cell in kept[j] for word in cell.split()) if j < grid.words else widths[j] for j in kept}
    gaps = 2 * (len(kept) - 1)
    while sum(widths.values()) + gaps > console.width and widths != least:
        widths[max(kept, key=lambda j: widths[j] - least[j])] -= 1
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), width=sum(widths.values()) + gaps)
    for j, (name, *_) in kept.items():
        table.add_column(Text(name), justify="left" if j < grid.words else "right", width=widths[j])
    for i in range(len(grid.rows)):
        table.add_row(*(Text(column[i + 1], style="bold" if bold and (i, j) in grid.best else "") for j, column in kept.items()))
    if any(above):
        console.print(Text(" · ".join(filter(None, above))))
    console.print(table, crop=False)
    console.print(Text("\n".join(numbered(grid.notes, str))))


def numbered(notes: Sequence[str], escape: Callable[[str], str]) -> list[str]:
    return [f"[{i}] " * (i > 0) + escape(note) for i, note in enumerate(notes)]


def markdown(grid: Grid, bold: bool) -> str:
    """A grid as a Markdown table with its notes."""
    lines = [f"**{in_markdown(grid.title)}**\n"] if grid.title else []
    lines.append("| " + " | ".join(map(in_markdown, grid.columns)) + " |")
    lines.append("|" + " --- |" * grid.words + " ---: |" * (len(grid.columns) - grid.words))
    for i, row in enumerate(grid.rows):
        cells = [in_markdown(cell) for cell in row]
        lines.append("| " + " | ".join(f"**{cell}**" if bold and (i, j) in grid.best else cell for j, cell in enumerate(cells)) + " |")
    return "\n".join(lines) + "\n\n" + "\n\n".join(numbered(grid.notes, in_markdown)) + "\n"


def in_markdown(text: str) -> str:
    """Text that Markdown prints as it is, on one line of a table."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + sign if sign in "\\`*|" else sign for sign in text)


TEX = {sign: "\\" + sign for sign in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "→": r"$\to$", "−": "$-$", "×": r"$\times$"}
TEX |= {"–": "--", "≤": r"$\le$", "[": "{[}", "]": "{]}"}  # a bare bracket at the start of a row is an option of the line break


def in_latex(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(TEX.get(sign, sign) for sign in " ".join(text.split()))


def latex(grid: Grid) -> str:
    """A grid as a table environment that needs the packages booktabs and graphicx; the best cells in bold, the notes below."""
    form = "l" * grid.words + "r" * (len(grid.columns) - grid.words)
    lines = [r"\begin{table}", r"  \centering"]
    lines += [rf"  \caption{{{in_latex(grid.title)}}}"] if grid.title else []
    lines += [r"  \resizebox{\linewidth}{!}{%", rf"  \begin{{tabular}}{{{form}}}", r"    \toprule"]
    lines += ["    " + " & ".join(map(in_latex, grid.columns)) + r" \\", r"    \midrule"]
    for i, row in enumerate(grid.rows):
        cells = [rf"\textbf{{{in_latex(cell)}}}" if (i, j) in grid.best else in_latex(cell) for j, cell in enumerate(row)]
        lines.append("    " + " & ".join(cells) + r" \\")
    lines += [r"    \bottomrule", r"  \end{tabular}}", r"  \par\footnotesize"]
    lines += [f"  {note}\\par" for note in numbered(grid.notes, in_latex)]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def between(page: str | Path, name: str, text: str) -> None:
    """Put a text between the markers <!-- name: begin --> and <!-- name: end --> of a page; InputError if it has not one of each."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = Path(page).read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise InputError(f"{page}: expected one line {begin} and one {end}, around the text to replace")
    head, tail = old.split(begin)[0], old.split(end)[1]
    write_text(page, f"{head}{begin}\n{text}{end}{tail}")
