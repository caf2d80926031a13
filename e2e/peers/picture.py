"""Bars of tokens per second, one group per row of the table."""

from xml.sax.saxutils import escape

COLOURS = {"Foregate": "#1f5fbf", "vLLM": "#d08a1d", "llama.cpp": "#5c8f3a", "mistral.rs": "#9a4f9a"}
WIDTH, BAR, LEFT = 760, 16, 170


def write(path, record):
    medians = record["medians"]
    rows = [row for row in next(iter(medians.values())) if row.startswith(("decode", "prefill"))]
    parts, y = [], 28
    parts.append(text(10, 18, "tokens per second, medians of rounds", 13))
    for row in rows:
        y += 18
        parts.append(text(10, y, row, 12))
        y += 6
        there = {name: engine for name, engine in medians.items() if row in engine}
        most = max(engine[row] for engine in there.values())
        for name, engine in there.items():
            length = (WIDTH - LEFT - 90) * engine[row] / most
            colour = COLOURS.get(name.rsplit(" ", 1)[0], "#888888")
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 3}" fill="{colour}"/>')
            parts.append(text(24, y + 11, name, 11))
            parts.append(text(LEFT + length + 5, y + 11, f"{engine[row]:,.0f}", 11))
            y += BAR
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif">'
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n")


def text(x, y, words, size):
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}">{escape(words)}</text>'
