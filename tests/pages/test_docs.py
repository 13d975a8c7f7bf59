"""The documentation names all that is public, and builds without a warning."""

import ast
import collections
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "gradsmooth_optax"

needs_mkdocs = pytest.mark.skipif(
    # Not imported: what it warns of would be an error here.
    any(
        importlib.util.find_spec(name) is None
        for name in ("mkdocs", "mkdocstrings_handlers", "material", "latex2mathml")
    ),
    reason='needs the extra "docs"',
)


def _public_names() -> set[str]:
    """The package, its modules without underscore, and what these hold for users.

    That is what they re-export (`import a as a`) and what they define under a name
    without underscore; a class or function counts if it has a docstring.
    """
    names = set()
    package = ROOT / PACKAGE
    for path in [*package.glob("*.py"), *package.glob("*/__init__.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts):
            continue
        module = ".".join(parts)
        found = {
            name for node in ast.parse(path.read_text()).body for name in _of(node)
        }
        names |= {module, *(f"{module}.{n}" for n in found if not n.startswith("_"))}
    return names


def _of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [a.name for a in node.names if a.asname == a.name]
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name] if ast.get_docstring(node) else []
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_every_public_name_is_on_one_page_and_no_page_has_another():
    pages = [path.read_text() for path in (ROOT / "docs" / "api").glob("*.md")]
    named = collections.Counter(re.findall(r"^::: (\S+)", "\n".join(pages), re.M))
    assert set(named) - _public_names() == set()
    assert _public_names() - set(named) == set()
    assert [name for name, count in named.items() if count > 1] == []


class _Page(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "srcset", "data", "poster"):
                self.loaded.append(value or "")
            elif name == "href":
                (self.loaded if tag == "link" else self.linked).append(value or "")


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_loads_nothing_from_elsewhere_and_has_what_it_links_to(
    tmp_path,
):
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stdout + built.stderr
    for path in site.rglob("*.html"):
        page = _Page(path)
        assert [url for url in page.loaded if re.match(r"(\w+:)?//", url)] == []
        for url in page.loaded + page.linked:
            target = unquote(url.split("#")[0])
            # The theme's own page for what is missing is written for a server's root.
            if re.match(r"\w+:", target) or path.name == "404.html":
                continue
            assert (path.parent / target).exists(), (path.name, url)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", style.read_text())
