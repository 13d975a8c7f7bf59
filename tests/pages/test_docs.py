"""The site builds without a warning, and needs nothing from elsewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("mkdocs", "mkdocstrings_handlers", "material", "latex2mathml")


@pytest.mark.slow
@pytest.mark.skipif(
    # Not imported: what it warns of would be an error here.
    any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason='needs the extra "docs"',
)
def test_the_site_builds_loads_nothing_from_elsewhere_and_has_what_it_links_to(
    tmp_path,
):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    for path in tmp_path.rglob("*.html"):
        for tag in re.findall(r"<[a-z][^>]*>", path.read_text()):
            for name, url in re.findall(
                r'\s(src|srcset|data|poster|href)="?([^" >]*)', tag
            ):
                is_link = name == "href" and not tag.startswith("<link")
                assert is_link or not re.match(r"(\w+:)?//", url), (path.name, url)
                target = unquote(url.split("#")[0])
                # The theme's own page for what is missing is for a server's root.
                if not re.match(r"\w+:", target) and path.name != "404.html":
                    assert (path.parent / target).exists(), (path.name, url)
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text())
