"""A self-contained HTML page."""

STYLE = """
:root { --ink: #1c2127; --soft: #5f6670; --line: #e2e5ea; --paper: #ffffff; --band: #f5f7f9; --accent: #1f6f8b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a0a7b1; --line: #333a43; --paper: #15191e; --band: #1d2229; --accent: #6fb7cf; }
  figure svg { background: #f7f8fa; border-radius: 6px; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.2rem 5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.8rem 0 .7rem; }
.sub, .note { color: var(--soft); font-size: .9rem; } .answer { font-size: 1.12rem; margin: 1.4rem 0; padding-left:
1rem; border-left: 4px solid var(--accent); } .answer p { margin: .35rem 0; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; min-width: 100%; }
th, td { padding: .42rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; border-bottom:
2px solid var(--line); } td small { display: block; color: var(--soft); } td.best { font-weight: 700; color:
var(--accent); } figure { margin: 1rem 0; overflow-x: auto; } figure.small { max-width: 34rem; } thead th { white-space: normal;
vertical-align: bottom; } figure svg { width: 100%; height: auto; display: block; } pre { background: var(--band);
padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size:
.88rem; } details summary { cursor: pointer; color: var(--soft); } .pieces span { display: inline-block; background:
var(--band); border-radius: 4px; padding: .05rem .5rem; margin: .15rem; } .pair { display: grid;
grid-template-columns: 1fr 1fr; gap: 1rem; } @media (max-width: 40rem) { .pair { grid-template-columns: 1fr; } }
@media print { body { max-width: none; } pre { white-space: pre-wrap; } }
"""


def page(title: str, subtitle: str, body: str, style: str = "") -> str:
    """A self-contained page; `style` is added to the common one."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{style}</style></head><body><h1>{title}</h1><div class=sub>{subtitle}</div>{body}</body></html>\n"
    )
