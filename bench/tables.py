"""Tables as Markdown text: the same characters on a terminal, in a log and in a results file."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A padded Markdown table. Columns whose cells are all numbers, or empty, are set flush right."""
    cells = [[("" if value is None else str(value)).replace("|", "\\|") for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)])


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip(" x%") or "0")
    except ValueError:
        return text in ("", "–")
    return True
