"""Building blocks of the pages: escaping, tables, the style sheet. Called by all parts of the report.

A page is one file that makes no network request and runs no script. Class names, keys and messages come from the data, and so from anyone:
all text goes through `tag`, which escapes it, first as `printable` does (no secrets, nothing that reorders or hides text), then for HTML.
Parts that open use `details` and `popover`, without a script.
"""

import html
import re
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from cluster.text import printable


class Html(str):
    """Text that is HTML already. Only `tag`, plots.svg and constants of the pages' modules create it."""

    __slots__ = ()


NOTHING = Html("")


def tag(name: str, *children: object, **attributes: str) -> Html:
    """An HTML element. Children that are not Html are text and are escaped, as are attributes; `class_` becomes `class`."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"' for key, value in attributes.items())
    inside = "".join(map(_escaped, children))
    return Html(f"<{name}{words}>{inside}</{name}>")


def _escaped(text: object) -> str:
    return text if isinstance(text, Html) else html.escape(printable(text, limit=sys.maxsize), quote=True)


def image(*, src: str, alt: str, **attributes: str) -> Html:
    """An image embedded in the page."""
    assert re.fullmatch(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]*", src), src[:40]
    return Html(tag("img", src=Html(src), alt=alt, **attributes).removesuffix("</img>"))


def quoted(*text: object, **attributes: str) -> Html:
    """A text of the data, or its beginning, as `tag` takes it."""
    return tag("blockquote", *text, style="margin:0;overflow-wrap:anywhere;white-space:pre-line;font-size:.85rem", **attributes)


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = ()) -> Html:
    """A table that scrolls inside itself, by keyboard too, where it is wider than the page. A shadow marks the side on which there is more,
    and the bar does not hide as phones' bars do."""

    def cell(kind: str, index: int, value: object) -> Html:
        return tag(kind, value, class_="n") if index in numeric else tag(kind, value)

    body = join(tag("tr", *(cell("td", index, value) for index, value in enumerate(row))) for row in rows)
    top = tag("thead", tag("tr", *(cell("th", index, value) for index, value in enumerate(head)))) if head else NOTHING
    return scrolling(tag("table", top, tag("tbody", body)))


def scrolling(inside: Html) -> Html:
    return tag("div", inside, class_="scroll", tabindex="0")


def section(title: str, *parts: Html) -> Html:
    return tag("section", tag("h2", title), *parts)


def page(title: str, *parts: Html) -> str:
    """The whole file as HTML."""
    begin, end = frame(title)
    return f"{begin}{join(parts)}{end}"


def frame(title: str) -> tuple[str, str]:
    """What stands before and behind the parts of a page."""
    head = join(
        [
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            # A second line of defence: if text ever slips through unescaped, the browser still loads and runs nothing.
            Html("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", title),
            Html(f"<style>{STYLE}</style>"),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>', "</main></body></html>\n"


def shade(share: float, *, is_right: bool) -> str:
    """A transparent colour, so that one value serves light and dark pages."""
    return f"background:rgba({'46,160,67' if is_right else '218,54,51'},{0.08 + 0.5 * share if share else 0:.3f})"


def meter(share: float | None, text: str) -> Html:
    """A value with a bar of its share (0 to 1) below it; no bar if the share is unknown."""
    width = 0.0 if share is None else 100 * min(1.0, max(0.0, share))
    return tag("span", text, tag("i", style=f"width:{width:.1f}%"), class_="meter")


def short(value: object, limit: int = 600) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def number_or_none(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


_LIGHT = """--paper:#fff;--ink:#1f2328;--soft:#59636e;--line:#d1d9e0;--card:#f6f8fa;--good:#1a7f37;--warn:#9a6700;--bad:#cf222e;
--shadow:rgba(31,35,40,.28);
--s0:#0969da;--s1:#bc4c00;--s2:#8250df;--s3:#1a7f37;--s4:#bf8700;--s5:#8b949e;--s6:#1b7c83;--s7:#bf3989"""
_DARK = """--paper:#0d1117;--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--card:#151b23;--good:#3fb950;--warn:#d29922;--bad:#f85149;
--shadow:rgba(230,237,243,.3);
--s0:#58a6ff;--s1:#f0883e;--s2:#bc8cff;--s3:#3fb950;--s4:#e3b341;--s5:#6e7681;--s6:#39c5cf;--s7:#f778ba"""

STYLE = (
    f":root{{{_LIGHT}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:70rem;margin:auto;padding:1rem}
header p{margin:0;color:var(--soft)}
.soft{color:var(--soft);font-size:.85rem}
.nobreak{white-space:nowrap}
h1{margin:0;font-size:1.6rem;overflow-wrap:anywhere}
h1 .first{color:var(--s0)}h1 .second{color:var(--s1)}
h2{margin:2rem 0 .6rem;font-size:1.15rem;border-bottom:1px solid var(--line)}
h3{margin:1.2rem 0 .4rem;font-size:1rem}
h3 .soft{font-weight:400}
td a{color:var(--s0)}
header .verdict{margin:.8rem 0;padding:.7rem 1rem;border-left:4px solid;background:var(--card);color:var(--ink);font-size:1.1rem;
overflow-wrap:anywhere}
.verdict.good{border-color:var(--good)}.verdict.warn{border-color:var(--warn)}.verdict.bad{border-color:var(--bad)}
.notes{color:var(--warn)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:0}
dl div{padding:.5rem .7rem;background:var(--card);border-radius:6px}
dt{color:var(--soft);font-size:.8rem}
dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.interval{display:block;color:var(--soft);font-size:.8rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.2rem}
figure{margin:0}
figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,sans-serif!important}
.bar,.timeline{display:flex;height:1.4rem;border-radius:4px;overflow:hidden;margin-bottom:.5rem}
.bar.thin{height:.9rem;min-width:12rem;margin:.3rem 0 0}
.timeline{height:2.2rem;margin:0}
.timeline .off{flex:0 0 3px;background:repeating-linear-gradient(var(--ink) 0 3px,var(--paper) 3px 6px)}
.axis{display:flex;justify-content:space-between;color:var(--soft);font-size:.8rem}
.marks{position:relative;height:1.5rem}
.marks a{position:absolute;bottom:0;padding:0 .2rem;font-size:.8rem;line-height:1.3rem;font-weight:600;color:var(--bad);
text-decoration:none}
.marks .left{border-left:2px solid}.marks .right{border-right:2px solid}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.4rem 0;font-size:.85rem}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.5em;border-radius:2px}
.scroll{overflow-x:auto;background:linear-gradient(to right,var(--paper) 40%,transparent) left/3rem 100% no-repeat local,
linear-gradient(to left,var(--paper) 40%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to right,var(--shadow),transparent) left/.9rem 100% no-repeat scroll,
linear-gradient(to left,var(--shadow),transparent) right/.9rem 100% no-repeat scroll}
.scroll::-webkit-scrollbar{height:.5rem}.scroll::-webkit-scrollbar-thumb{background:var(--s5);border-radius:.25rem}
.meter{display:inline-block;min-width:6rem}
.meter i{display:block;height:.3rem;margin:.1rem 0 0;border-radius:2px;background:var(--s0)}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.wrap{overflow-wrap:anywhere;white-space:pre-wrap}
td>.wrap,td>.soft{display:inline-block;min-width:12rem}
.events>div{display:grid;grid-template-columns:5.5rem minmax(0,1fr);padding:.5rem 0;border-bottom:1px solid var(--line);font-size:.9rem}
.events p{margin:0}
.what{font-weight:600}
.when{color:var(--soft);font-variant-numeric:tabular-nums}
summary{cursor:pointer;color:var(--soft)}
.confusion td{min-width:2.4rem;border:1px solid var(--line)}
.confusion .up{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;max-height:9rem;overflow:hidden}
.confusion td:has(button){padding:0}
.confusion th[scope=row]{position:sticky;left:0;background:var(--paper)}
.confusion button{width:100%;text-align:right}
button{font:inherit;font-variant-numeric:tabular-nums;color:var(--ink);background:none;border:0;padding:.25rem .6rem;cursor:pointer;
text-decoration:underline dotted;text-underline-offset:.2em}
td>button{padding:0 .2rem}
.confusion td>button{padding:.25rem .6rem}
button:hover{text-decoration-style:solid}
:focus-visible{outline:2px solid var(--s0);outline-offset:-2px}
:target{outline:2px solid var(--s0)}
[popover]{width:min(46rem,calc(100vw - 2rem));max-height:85vh;overflow:auto;padding:1rem;border:1px solid var(--line);border-radius:8px;
background:var(--paper);color:var(--ink)}
[popover]::backdrop{background:rgba(0,0,0,.45)}
.top{display:flex;justify-content:space-between;align-items:start;gap:1rem}
.top h3{margin:0}
.thumbnails{display:grid;grid-template-columns:repeat(auto-fill,minmax(6.4rem,1fr));gap:.8rem}
.thumbnails figure{min-width:0}
.thumbnails.wide{grid-template-columns:repeat(auto-fill,minmax(9.6rem,1fr))}
.thumbnails.wide figcaption{gap:.15rem}
.thumbnails img{display:block;width:6rem;height:6rem;max-width:100%;object-fit:contain;background:var(--card);border-radius:4px}
td img.small{display:block;max-width:4rem;max-height:4rem;background:var(--card);border-radius:4px}
.thumbnails .pixels{image-rendering:pixelated}
.thumbnails .explained{grid-column:span 2}
.thumbnails .pair{display:flex;gap:.3rem}.thumbnails .pair img{min-width:0;flex:0 1 auto}
.thumbnails figcaption{display:grid;font-weight:400;font-size:.8rem;line-height:1.3;margin-top:.25rem}
.thumbnails figcaption *{overflow-wrap:anywhere}
.thumbnails b{font-weight:600;color:var(--bad)}
.thumbnails b::before{content:"→ "}
.thumbnails .id{color:var(--soft)}
.confusion .corner{vertical-align:bottom;font-weight:400;color:var(--soft);white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere;padding:.7rem;background:var(--card);border-radius:6px;font-size:.85rem}
@media(max-width:40rem){th,td{padding:.25rem .35rem}dl{grid-template-columns:repeat(auto-fill,minmax(8rem,1fr))}
.confusion{font-size:.8rem}.confusion td>button{padding:.25rem .3rem}.confusion td{min-width:1.9rem}
.thumbnails:not(.wide){grid-template-columns:repeat(auto-fill,minmax(5rem,1fr))}.thumbnails img{width:5rem;height:5rem}
.thumbnails .explained{grid-column:1/-1;display:flex;gap:.6rem}.thumbnails .pair{flex:none}}
@page{margin:14mm}
@media print{:root{color-scheme:light}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}body{font-size:11px}
main{max-width:none;padding:0}
[popover]{display:none}.scroll{overflow:visible}button{text-decoration:none}.thumbnails img{width:4.5rem;height:4.5rem}
details::details-content{content-visibility:visible;height:auto;display:block}
figure,tr,dl div,.events>div,.timeline,.bar{break-inside:avoid}h2,h3{break-after:avoid}}
""".strip()
)
