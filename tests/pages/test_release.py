"""A version is published only when all that names it says the same."""

import re
import shutil
import subprocess
from pathlib import Path

import gradsmooth_optax as gs

ROOT = Path(__file__).parents[2]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()


def test_the_version_is_the_changelogs_newest_and_the_one_to_cite():
    newest = re.search(r"^## \[(\S+)\]", CHANGELOG, re.MULTILINE)[1]
    cited = re.search(r"^version: (.*)$", CITATION, re.MULTILINE)[1]
    assert gs.__version__ == newest == cited


def test_a_tag_is_refused_before_its_version_has_a_day(tmp_path):
    for path in (".ci/tagged", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "gradsmooth_optax").mkdir()
    shutil.copy(
        ROOT / "gradsmooth_optax" / "__init__.py", tmp_path / "gradsmooth_optax"
    )

    def tagged(tag):
        command = ["bash", str(tmp_path / ".ci" / "tagged"), tag]
        return subprocess.run(command, capture_output=True, text=True)

    version = gs.__version__
    changelog, cited = tmp_path / "CHANGELOG.md", tmp_path / "CITATION.cff"
    changelog.write_text(
        re.sub(rf"(?m)^(## \[{version}\] - ).*", r"\1unreleased", CHANGELOG)
    )
    cited.write_text(re.sub(r"(?m)^date-released: .*\n", "", CITATION))
    assert "CHANGELOG.md has no line" in tagged(f"v{version}").stderr
    assert "__version__" in tagged("v99.0.0").stderr
    assert "a release's tag is" in tagged(version).stderr
    changelog.write_text(changelog.read_text().replace("unreleased", "2027-01-31", 1))
    assert "date-released: 2027-01-31" in tagged(f"v{version}").stderr
    cited.write_text(f"{cited.read_text()}date-released: 2027-01-31\n")
    assert tagged(f"v{version}").stdout == f"v{version} of 2027-01-31\n"
