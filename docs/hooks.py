"""Makes pages of files that lie elsewhere in the repository, under their own paths.

In `nav` and in every link a path is that of the repository, so that a link works there
and on the site. A notebook is shown with the outputs it was committed with, and a file
that is linked and is no page, image or JSON as it is. Equations become MathML.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
AS_THEY_ARE = (".md", ".json", ".png", ".svg", ".jpg", ".gif", ".pdf")
LANGUAGES = {".py": "python", ".toml": "toml", ".cff": "yaml", ".yml": "yaml"}

LINK = re.compile(r"(\]\(|^\[[^\]]+\]:\s+)<?([^()<>\s#]+)", re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
SESSION = re.compile(r"^```python\n(>>> .*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"^::: gradsmooth_optax\.(\S+)", re.MULTILINE)
CODE_IN_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
CODE = re.compile(r"<code>(gs\.)?([A-Za-z_][\w.]*)(\([^<]*\))?</code>")
# Where code is a title, a link already, or an example.
NOT_LINKED = re.compile(r"<(a|autoref|h[1-6]|pre|summary)\b.*?</\1>", re.DOTALL)

# What it warns of fails a strict build.
log = logging.getLogger("mkdocs.hooks.gradsmooth_optax")

# {path on the site: path in the repository} of all pages.
origins: dict[str, str] = {}
# Names of the API that have a place to link to.
names: set[str] = set()


class LettersWithIndices(Extension):
    """Leaves Σ_l u'_l as it is: emphasis is by asterisks alone."""

    def extendMarkdown(self, md):
        # Before emphasis, which is at 60, and after code, links and HTML.
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_+)"), "index", 65)


def on_config(config):
    origins.clear()
    names.clear()
    config.nav = list(_nav(config.nav))
    config.markdown_extensions.append(LettersWithIndices())
    return config


def on_files(files, config):
    for file in files.documentation_pages():
        origins[file.src_uri] = f"docs/{file.src_uri}"
        names.update(NAMED.findall(file.content_string))
    waiting = list(origins)
    while waiting:
        page = waiting.pop()
        path = origins[page]
        if not path.startswith("docs/"):
            for uri, content in _contents(path):
                files.append(File.generated(config, uri, content=content))
        if not path.endswith((".md", ".ipynb")):
            continue
        text = files.get_file_from_path(page).content_string
        for _, target in LINK.findall(text):
            linked = _in_repository(target, path)
            if linked and files.get_file_from_path(_uri(linked)) is None:
                if _uri(linked) not in origins:
                    waiting.append(_uri(linked))
                origins[_uri(linked)] = linked
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri

    def on_the_site(link: re.Match[str]) -> str:
        linked = _in_repository(link[2], origins[uri])
        if linked is None:
            return link[0]  # Broken, external or no link at all: mkdocs tells.
        return link[1] + posixpath.relpath(_uri(linked), posixpath.dirname(uri) or ".")

    def without_marks(session: re.Match[str]) -> str:
        return f"```pycon\n{session[1].replace('<BLANKLINE>', '')}```"

    if page.parent is None:  # The navigation has no more than the tabs.
        page.meta.setdefault("hide", ["navigation"])
    markdown = SESSION.sub(without_marks, LINK.sub(on_the_site, markdown))
    return markdown.replace("<details>", '<details markdown="1">')


def on_page_content(html, page, config, files):
    uri = page.file.src_uri
    module = PurePosixPath(uri).stem  # The page of a module has its name.

    def linked(code: re.Match[str]) -> str:
        prefix, name, _ = code.groups()
        if not prefix and f"{module}.{name}" in names:
            name = f"{module}.{name}"
        if name not in names or not (prefix or uri.startswith("api/")):
            return code[0]
        return f'<autoref identifier="gradsmooth_optax.{name}">{code[0]}</autoref>'

    # As GitHub has it: in a table, code cannot hold a bare bar.
    html = CODE_IN_CELL.sub(lambda code: code[0].replace(r"\|", "|"), html)
    html = MATH.sub(lambda math: _mathml(math[2], uri), html)
    parts, end = [], 0
    for closed in NOT_LINKED.finditer(html):
        parts += [CODE.sub(linked, html[end : closed.start()]), closed[0]]
        end = closed.end()
    return "".join([*parts, CODE.sub(linked, html[end:])])


def _nav(entries: list[Any]) -> Iterator[Any]:
    """The entries with paths on the site, and patterns expanded."""
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            inner = list(_nav([value] if isinstance(value, str) else value))
            yield {title: inner[0] if isinstance(value, str) else inner}
            continue
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(entry)]
        origins.update((_uri(path), path) for path in found)
        # mkdocs tells of a name that there is no file for.
        yield from map(_uri, sorted(found) if found or "*" in entry else [entry])


def _uri(path: str) -> str:
    """The path on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    return path if path.endswith(AS_THEY_ARE) else f"{path.removeprefix('.')}.md"


def _in_repository(target: str, page: str) -> str | None:
    """The file that `page` links to, or the README.md of the directory."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _contents(path: str) -> Iterator[tuple[str, str | bytes]]:
    """The page that is made of a file, and its images."""
    content = (ROOT / path).read_bytes()
    if path.endswith(".ipynb"):
        yield from _notebook(json.loads(content), _uri(path))
    elif path.endswith(AS_THEY_ARE):
        yield _uri(path), content
    else:
        language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
        title = PurePosixPath(path).name
        yield _uri(path), f"# {title}\n\n````{language}\n{content.decode()}\n````\n"


def _notebook(notebook: dict[str, Any], uri: str) -> Iterator[tuple[str, str | bytes]]:
    blocks = []
    for i, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            blocks.append(source)
            continue
        blocks.append(f"````python\n{source}\n````")
        text = ""
        for j, output in enumerate(cell["outputs"]):
            data = output.get("data", {"text/plain": output.get("text", "")})
            data = {kind: "".join(value) for kind, value in data.items()}
            if "image/png" in data:
                image = f"{uri.removesuffix('.md')}-{i}-{j}.png"
                yield image, base64.b64decode(data["image/png"])
                alt = html.escape(f"Output of cell {i}")
                shown = f"![{alt}]({posixpath.basename(image)})"
            elif "text/html" in data:
                shown = f"<div>\n{data['text/html']}\n</div>"
            else:
                text += data["text/plain"]
                continue
            shown = f'<div class="output" markdown="1">\n\n{shown}\n\n</div>'
            blocks += [*_printed(text), shown]
            text = ""
        blocks += _printed(text)
    yield uri, "\n\n".join(blocks) + "\n"


def _printed(text: str) -> list[str]:
    return [f"````{{.text .output}}\n{text.rstrip()}\n````"] if text.strip() else []


def _mathml(delimited: str, uri: str) -> str:
    latex = html.unescape(delimited).strip()
    display = "block" if latex.startswith(r"\[") else "inline"
    mathml = convert(latex[2:-2].strip(), display=display)
    if "\\" in mathml:
        log.warning("%s: no MathML for all of $%s$: %s", uri, latex[2:-2], mathml)
    # Without a mathematical font a prime is too small for a superscript.
    return mathml.replace("<mi>&#x02032;</mi>", '<mi class="prime">&#x02032;</mi>')
