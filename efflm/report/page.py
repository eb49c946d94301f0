"""The report as one self-contained HTML page: no outside requests, readable on a phone."""

import base64
import html
from pathlib import Path

from efflm.report.rows import Row
from efflm.report.table import COLUMNS
from efflm.rundir import write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 96rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; font-size: .9rem; }
th, td { border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
img { width: 100%; min-width: 44rem; max-width: 66rem; height: auto; background: #fff; border-radius: 6px; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0 0 0 1rem; }
li { margin: .3rem 0; } li, dd { max-width: 62rem; }
"""


def write(
    path: Path,
    *,
    title: str,
    rows: list[Row],
    facts: list[str],
    plot: Path,
    samples: dict[str, str],
    command: str,
    versions: dict[str, str],
) -> None:
    """Put table, notes, plot, samples, command and versions on one page."""
    escape = html.escape
    header = "".join(f"<th>{escape(heading)}</th>" for heading, _ in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(entry(row))}</td>" for _, entry in COLUMNS) + "</tr>" for row in rows
    )
    notes = "".join(f"<dt>{escape(row.name)}</dt><dd>{escape(row.note)}</dd>" for row in rows)
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    texts = "".join(f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in samples.items())
    picture = base64.b64encode(plot.read_bytes()).decode()
    listed = "\n".join(f"{name} {version}" for name, version in versions.items())
    write_whole(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<div class="wide"><table><thead><tr>{header}</tr></thead><tbody>
{body}
</tbody></table></div>
<h2>What it says</h2><ul>{items}</ul>
<h2>Quality against cost</h2><p>Lower left is better.</p>
<div class="wide"><img alt="bits per byte against bytes on disk and against decode time"
src="data:image/png;base64,{picture}"></div>
<h2>The rows</h2><dl>{notes}</dl>
{f"<h2>What they write</h2>{texts}" if texts else ""}
<h2>How it was made</h2><pre>{escape(command)}</pre><pre>{escape(listed)}</pre>
</body></html>
""",
    )
