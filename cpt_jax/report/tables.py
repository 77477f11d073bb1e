"""Rows of cells as a table: HTML for a page, aligned text for a terminal; and what rows are called."""

from collections.abc import Sequence


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def stage_label(entry: dict) -> str:
    """Whose an entry of eval.json is."""
    return entry["stage"] + (" EMA" if entry["weights"] == "ema" else "")
