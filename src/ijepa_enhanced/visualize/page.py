"""One HTML file that needs nothing else: tables, pictures and charts, all inline."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from PIL import Image

NOTHING = "\N{EN DASH}"
"""Shown in a table for a value that is missing."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Collection[int] = ()) -> str:
    """Return a table of plain text. The first column names the rows; the rows numbered in `marked` are emphasized."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for place, (name, *cells) in enumerate(rows):
        mark = ' class="marked"' if place in marked else ""
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr{mark}><th>{escape(name)}</th>{inner}</tr>")
    first = f"<thead><tr>{titles}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{first}<tbody>{"".join(lines)}</tbody></table></div>'


def picture(image: Image.Image, alt: str, height: int | None = None, exact: bool = False) -> str:
    """Return an image inline.

    Args:
        image: RGB.
        alt: what it shows, in words.
        height: on the page, in pixels; None: the height of the image.
        exact: keep every pixel (PNG, not smoothed when enlarged) instead of compressing it (JPEG).
    """
    data = io.BytesIO()
    if exact:
        image.save(data, format="PNG", optimize=True)
    else:
        image.save(data, format="JPEG", quality=85, optimize=True)
    height = height or image.height
    width = max(1, round(image.width * height / image.height))
    kind = "png" if exact else "jpeg"
    encoded = base64.b64encode(data.getvalue()).decode()
    style = ' class="exact"' if exact else ""
    return (
        f'<img{style} src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}" width="{width}" height="{height}">'
    )


def note(text: str) -> str:
    """Return a paragraph of plain text that explains what is shown."""
    return f'<p class="note">{escape(text)}</p>'


def anchor(title: str) -> str:
    """Return the name of a section in links."""
    return title.lower().replace(" ", "-")


def compared(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with a column for each of several names; a single name needs no heading."""
    return table(["", *names] if len(names) > 1 else [""], rows)


def document(title: str, head: str, sections: Mapping[str, str]) -> str:
    """Return the whole page.

    Args:
        title: plain text.
        head: HTML above the menu.
        sections: HTML of each by its title; empty ones are left out.
    """
    present = {name: html for name, html in sections.items() if html}
    menu = "".join(f'<a href="#{anchor(name)}">{escape(name)}</a>' for name in present)
    body = "\n".join(
        f'<section id="{anchor(name)}"><h2>{escape(name)}</h2>{html}</section>' for name, html in present.items()
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        # The page may fetch nothing. The empty icon stops the browser's own request for one.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style></head>\n<body><main><header>{head}</header><nav>{menu}</nav>\n{body}</main>\n"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


STYLE = """
:root { --ink: #1d2430; --soft: #64707f; --line: #e3e7ec; --shade: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 12px; }
h3 { font-size: 13px; margin: 20px 0 8px; color: var(--soft); font-weight: 600; }
section { padding-top: 36px; }
p { margin: 0 0 12px; max-width: 90ch; }
.note, .sub, small { color: var(--soft); }
.note { font-size: 14px; }
.scroll + .note { margin-top: 10px; }
.sub { margin: 0 0 16px; }
small { font-size: inherit; font-weight: 400; }
.badge { display: inline-block; vertical-align: 4px; margin-left: 10px; padding: 2px 10px; border-radius: 99px;
  font-size: 13px; font-weight: 600; background: #e3f3ec; color: #00654b; }
.badge.open { background: #fbe9dc; color: #9a4300; }
.warning { margin: 16px 0 0; padding: 10px 14px 10px 32px; border-left: 3px solid #d55e00; background: #fdf4ee; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 20px; padding-bottom: 10px;
  border-bottom: 1px solid var(--line); }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 0; }
.tiles div { padding: 10px 14px; background: var(--shade); border-radius: 8px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 19px; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 400; color: var(--soft); white-space: nowrap; }
td { overflow-wrap: anywhere; }
thead ~ tbody td { overflow-wrap: break-word; }
thead th { font-weight: 600; color: var(--ink); }
tr.marked td:first-of-type { font-weight: 700; color: var(--accent); }
.groups { columns: 340px; column-gap: 36px; }
.groups > div { break-inside: avoid; padding-bottom: 12px; }
.groups h3 { margin-top: 0; }
.groups table { width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 18px 16px; }
figure { margin: 0; }
.chart { position: relative; min-width: 0; }
.chart figcaption { font-size: 14px; font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; }
svg text { font-size: 10.5px; fill: var(--soft); }
svg .y, svg .axis { text-anchor: end; }
svg .x { text-anchor: middle; }
svg .rule { stroke: var(--line); }
svg g { fill: none; mix-blend-mode: multiply; }
svg .line { stroke-width: 1.6; stroke-linejoin: round; }
svg .dots { stroke-width: 4; stroke-linecap: round; }
svg .cursor { stroke: var(--soft); stroke-dasharray: 2 2; }
.tip { position: absolute; pointer-events: none; z-index: 2; padding: 4px 9px; background: #fff; font-size: 13px;
  border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 2px 8px #0002; white-space: nowrap; }
.tip b { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0; padding: 6px 0; list-style: none; position: sticky;
  top: 0; background: #fff; z-index: 1; }
.key { display: inline-block; width: 18px; height: 0; margin-right: 7px; vertical-align: 4px;
  border-top: 3px solid; }
.key.dashed { border-top-style: dashed; }
img { display: block; max-width: 100%; height: auto; outline: 1px solid #0001; outline-offset: -1px; }
img.exact { image-rendering: pixelated; }
.pictures { display: flex; flex-wrap: wrap; gap: 20px 28px; }
.pictures figcaption, .near figcaption { font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.row { display: flex; gap: 6px; align-items: flex-start; }
.near { display: flex; gap: 8px; align-items: flex-end; padding: 10px 0; border-top: 1px solid var(--line); }
.near figure { min-width: 0; }
.near .query { padding-right: 14px; margin-right: 6px; border-right: 2px solid var(--ink); }
.near figcaption.same { color: #00654b; font-weight: 600; }
@media (max-width: 640px) { main { padding: 20px 14px 48px; }
  .near { flex-wrap: wrap; } }
@media print { nav { display: none; } .legend { position: static; } }
"""

SCRIPT = """
const format = (value, percent) => percent ? (100 * value).toPrecision(4) + "%"
  : Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4);
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const {lines, x, y, frame, percent} = JSON.parse(svg.dataset.chart);
  const [left, top, right, bottom] = frame;
  const cursor = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
  cursor.setAttribute("class", "cursor");
  const tip = svg.parentNode.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
    const wanted = x[0] + ((event.clientX - box.left) / scale - left) / (right - left) * (x[1] - x[0]);
    const near = lines.map(line => line.points.reduce((best, point) =>
      Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best));
    const step = near.reduce((best, point) =>
      Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best)[0];
    const at = left + (step - x[0]) / (x[1] - x[0]) * (right - left);
    cursor.setAttribute("d", `M${at} ${top}V${bottom}`);
    tip.replaceChildren(...lines.map((line, place) => {
      const row = document.createElement("div"), key = row.appendChild(document.createElement("span"));
      key.className = "key";
      key.style.borderColor = line.color;
      const name = lines.length > 1 ? line.name + ", " : "";
      row.append(`${name}step ${near[place][0]}: `);
      row.appendChild(document.createElement("b")).append(format(near[place][1], percent));
      return row;
    }));
    tip.hidden = false;
    const inside = at * scale > box.width / 2 ? at * scale - tip.offsetWidth - 8 : at * scale + 8;
    tip.style.left = Math.max(0, Math.min(inside, box.width - tip.offsetWidth)) + "px";
    tip.style.top = svg.offsetTop + top * scale + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.removeAttribute("d"); });
}
"""
