"""The report's HTML: one page with its style inside, and the few elements it is made of. All text is escaped here."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --panel: #ffffff; --ink: #1b2330; --quiet: #5d6776; --line: #dde1e8;
  --accent: #1f5fbf; --good: #11734a; --bad: #b3321f; --warn: #fff4e0; --warn-line: #d98e04;
  --heat: #1f5fbf; }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --panel: #1a2029; --ink: #e6eaf0; --quiet: #9aa5b4;
  --line: #2e3744; --accent: #7fb0ff; --good: #5fd39b; --bad: #ff8a75; --warn: #33290f; --warn-line: #d98e04;
  --heat: #3f7fdf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .35rem; } h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; max-width: 95ch; } .scroll + p { margin-top: .75rem; } section > p:last-child
  { margin-bottom: 0; } .quiet, figcaption { color: var(--quiet); font-size: .875rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0 1rem; font-size: .9rem; }
a { color: var(--accent); } code, pre { font: .84rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 1rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: .6rem; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .8rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: .84rem; } .tile small { color: var(--quiet); font-size: .8rem; line-height:
  1.35;
  display: block; } .good { color: var(--good); } .bad { color: var(--bad); }
.alarm { background: var(--warn); border-left: 4px solid var(--warn-line); border-radius: 4px; padding: .5rem .75rem;
  margin: .5rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
table.wide { width: 100%; } th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th { color: var(--quiet); font-weight: 600; vertical-align: bottom; white-space: normal;
  min-width: 4.2rem; }
th:first-child, td:first-child { text-align: left; font-weight: 600; } td.text { text-align: left; font-weight: 400;
  width: 100%; }
.wide th:first-child, .wide td:first-child { position: sticky; left: 0; background: var(--panel); }
.heat td, .heat th { border: 0; padding: .3rem .15rem; text-align: center; min-width: 2.6rem; font-size: .82rem; }
.heat td:first-child { padding-right: .6rem; text-align: left; } .heat td.cell { border-radius: 4px; border: 2px
  solid
  var(--panel); background: color-mix(in srgb, var(--heat) var(--share), var(--page)); } .heat td.hot { color: #fff; }
.heats { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; } .chip { display: inline-block; width: .75em; height:
  .75em;
  border-radius: 3px; margin-right: .3em; vertical-align: -.05em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .875rem; margin: .25rem 0 .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(var(--width), 100%), 1fr)); gap: .75rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figcaption { margin: .1rem 0 .5rem; } pre { overflow-x: auto; background: var(--page); padding: .75rem; border-radius:
  6px; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 500px) { main { padding: 1rem .6rem 3rem; } section { padding: .8rem .7rem; } h1 { font-size:
  1.4rem; }
  .tile b { font-size: 1.3rem; } .tiles, .figures.small { grid-template-columns: repeat(2, 1fr); }
  .heat td, .heat th { min-width: 1.9rem; } .heat .chip { display: block; margin: 0 auto .1rem; } }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""


class Tile(NamedTuple):
    """One headline figure; ``verdict`` is "good", "bad" or empty."""

    label: str
    value: str
    note: str = ""
    verdict: str = ""


class Cell(NamedTuple):
    """A table entry that is words, not a number."""

    text: str


def page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[tuple[str, str]]) -> str:
    """The whole document; ``sections`` are (heading, HTML) and are linked from the top."""
    links = "".join(f'<a href="#part{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "".join(
        f'<section id="part{i}"><h2>{escape(heading)}</h2>{content}</section>'
        for i, (heading, content) in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="quiet">{escape(subtitle)}</p><div class="tiles">{"".join(map(_tile, tiles))}</div>'
        f"<nav>{links}</nav>{body}</main></body></html>\n"
    )


def paragraph(text: str, *, quiet: bool = False) -> str:
    return f"<p{' class=quiet' if quiet else ''}>{escape(text)}</p>"


def subheading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def alarm(text: str) -> str:
    return f'<div class="alarm">{escape(text)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """A table whose first column names the row; it scrolls sideways inside the page where the screen is narrow."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(_entry, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table class="wide"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def heat_table(title: str, rows: dict[str, Sequence[float | int]], colours: Sequence[str]) -> str:
    """Shares in [0, 1] as shaded percentages, one row a name, one column an expert with its colour above."""
    columns = max(len(row) for row in rows.values())
    head = "".join(f"<th>{chip(colours[i % len(colours)])}{i}</th>" for i in range(columns))
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(_heat_cell(share) for share in row)}</tr>" for name, row in rows.items()
    )
    return (
        f'<div class="scroll">{subheading(title)}<table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def chip(colour: str) -> str:
    return f'<span class="chip" style="background:{escape(colour)}"></span>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """(colour, name) pairs in a row."""
    return f'<div class="legend">{"".join(f"<span>{chip(c)}{escape(name)}</span>" for c, name in entries)}</div>'


def figures(items: Sequence[str], width: int) -> str:
    """Figures side by side, as many as fit at ``width`` pixels each; small ones in pairs even on a phone."""
    kind = "figures small" if width <= 250 else "figures"
    return f'<div class="{kind}" style="--width:{width}px">{"".join(items)}</div>'


def figure(light_png: str, dark_png: str, caption: str) -> str:
    """A figure from two base64 PNGs, of which the reader's colour scheme shows one."""
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark_png}">'
        f'<img src="data:image/png;base64,{light_png}" alt="{escape(caption)}"></picture>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def preformatted(summary: str, text: str) -> str:
    """Text behind a line that unfolds it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _tile(tile: Tile) -> str:
    return (
        f'<div class="tile"><span>{escape(tile.label)}</span><b class="{tile.verdict}">{escape(tile.value)}</b>'
        f"<small>{escape(tile.note)}</small></div>"
    )


def _entry(entry: str | Cell) -> str:
    if isinstance(entry, Cell):
        return f'<td class="text">{escape(entry.text)}</td>'
    return f"<td>{escape(entry)}</td>"


def _heat_cell(share: float | int) -> str:
    hot = " hot" if share > 0.55 else ""
    return f'<td class="cell{hot}" style="--share:{100 * share:.0f}%">{100 * share:.0f}</td>'
