"""The page around the panels: one file, no script, no font or picture from elsewhere; light, dark and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d9dee3; --panel: #f6f8fa; --mark: #d7f0dc; --mark-ink: #0b5c2a;
  --c0: #1668c7; --c1: #d2691e; --c2: #1a7f4e; --c3: #b0368f; --c4: #7a5af5; --c5: #8a6d00; --c6: #c0302e; --c7: #0f8b8d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #0f1419; --ink: #e4e8ec; --soft: #98a4b0; --rule: #2e3740; --panel: #171d24; --mark: #17402a; --mark-ink: #a6ecbf;
  --c0: #6cb2ff; --c1: #ffa45c; --c2: #5fd39a; --c3: #f08bd4; --c4: #b3a1ff; --c5: #e3c04b; --c6: #ff8480; --c7: #5fd6d8; } }
@media print { :root { color-scheme: light;
  --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb; --panel: #fff; --mark: #e4e4e4; --mark-ink: #000;
  --c0: #1668c7; --c1: #d2691e; --c2: #1a7f4e; --c3: #b0368f; --c4: #7a5af5; --c5: #8a6d00; --c6: #c0302e; --c7: #0f8b8d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }
h3, h4 { font-size: .95rem; margin: .8rem 0 .3rem; }
nav { margin-top: .4rem; color: var(--soft); }
nav a { color: inherit; margin-right: 1rem; }
.note { color: var(--soft); margin: .4rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .32rem 1.4rem .32rem 0; border-bottom: 1px solid var(--rule); }
tbody th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table.texts { width: 100%; table-layout: fixed; min-width: 34rem; }
table.texts td { white-space: pre-wrap; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font: 13px/1.5 ui-monospace, monospace; }
pre.row { white-space: pre-wrap; overflow-wrap: anywhere; }
mark.scored { background: var(--mark); color: var(--mark-ink); border-bottom: 2px solid currentColor; }
.charts { display: grid; gap: 1.2rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure > svg { display: block; width: 100%; height: auto; max-width: 46rem; }
figcaption, .empty { color: var(--soft); font-size: .85rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 0 0 .3rem; padding: 0; font-size: .85rem; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
.swatch { width: 26px; height: 8px; margin-right: .45rem; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.tick { fill: var(--soft); font: 12px system-ui, sans-serif; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.pale { stroke-width: 1; opacity: .35; }
.line.dashed { stroke-dasharray: 6 4; }
.dot { fill: currentColor; }
.hit { fill: transparent; pointer-events: all; }
.hit:hover { fill: currentColor; fill-opacity: .25; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
@media print { main { max-width: none; padding: 0; } nav { display: none; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; } mark.scored { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(title: str, sections: Sequence[tuple[str, str]], notes: Sequence[str] = ()) -> str:
    """A whole HTML document.

    Args:
        title: of the page; escaped here.
        sections: (heading, HTML), in order; headings are escaped here, the HTML is taken as it is.
        notes: sentences below the title; escaped here.
    """
    links = "".join(f'<a href="#s{at}">{escape(heading)}</a>' for at, (heading, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{at}"><h2>{escape(heading)}</h2>{html}</section>' for at, (heading, html) in enumerate(sections)
    )
    said = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1><nav>{links}</nav>{said}{body}</main></body></html>\n"
    )
