"""A page in a real browser: what a script finds in it after it was used."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: install Debian's package of that name")

# Before anything else of the page runs: what goes wrong is kept.
WATCH = """
window.wrong = [];
for (const name of ["error", "warn"]) console[name] = (...words) => wrong.push(words.join(" "));
addEventListener("error", (event) => wrong.push(event.message));
addEventListener("securitypolicyviolation", (event) => wrong.push("refused: " + event.blockedURI));
"""


def look(page: Path, script: str, folder: Path, *, width: int = 1280, dark: bool = False) -> dict:
    """Open the page in a frame of that width and run `script` in it, an expression of what to return. Beside that:
    wrong (errors and warnings of the console, refused requests), requests, overflow (pixels it is too wide)."""
    text = page.read_text().replace("<head>", f"<head><script>{WATCH}</script>", 1)
    text = text.replace("</body>", f"<script>window.use = () => {script};</script></body>")  # eval is forbidden there
    outer = f"""<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text, quote=True)}"></iframe>
<script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentWindow;
  const found = inner.use();
  const page = inner.document.documentElement;
  const result = {{ found, wrong: inner.wrong, overflow: page.scrollWidth - page.clientWidth,
    requests: inner.performance.getEntriesByType("resource").map((each) => each.name) }};
  document.body.textContent = "";
  const out = document.createElement("pre");
  out.textContent = "RESULT" + JSON.stringify(result) + "END";
  document.body.append(out);
}});
</script>"""
    file = folder / "frame.html"
    file.write_text(outer)
    flags = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", "--virtual-time-budget=2000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    result = re.search(r"<pre>RESULT(.*)END</pre>", done.stdout, re.DOTALL)
    assert result, done.stderr[-2000:]
    return json.loads(html.unescape(result[1]))
