"""Opens pages in headless Chromium."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROGRAM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
"""For tests that open a page; `.ci/run` installs it where it can, and a user's machine may do without."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_ASK = """<script>
document.title = JSON.stringify({
  pictures: [...document.images].map(image => [image.alt, image.complete ? image.naturalWidth : 0]),
  headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
  text: document.body.innerText,
})
</script></body>"""


def look(page: Path, tmp_path: Path) -> dict[str, Any]:
    """Returns what a page shows: pictures (alternative text, width in pixels once loaded, else 0), headings, text."""
    asked = tmp_path / "asked.html"
    asked.write_text(page.read_text().replace("</body>", _ASK))
    with tempfile.TemporaryDirectory() as profile:
        command = [str(PROGRAM), *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", asked.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    start = run.stdout.index("<title>") + len("<title>")
    title = run.stdout[start : run.stdout.index("</title>")]
    for code, character in (("&lt;", "<"), ("&gt;", ">"), ("&nbsp;", " "), ("&amp;", "&")):
        title = title.replace(code, character)
    found: dict[str, Any] = json.loads(title)
    return found
