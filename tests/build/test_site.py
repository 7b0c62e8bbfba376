"""The documentation as a site: it builds without a warning, nothing of it is loaded from elsewhere, README is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("mkdocs", reason="needs the packages of the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    return folder


def test_every_page_is_there(site):
    for page in [*(ROOT / "docs").rglob("*.md"), Path("commands.md"), Path("changelog.md")]:
        name = page.relative_to(ROOT / "docs") if page.is_absolute() else page
        assert (site / name).with_suffix(".html").is_file(), name
    assert "--target-size SIZE" in (site / "commands.html").read_text(encoding="utf-8")
    assert "tr((W - Wq) H (W - Wq)^T)" in (site / "reference" / "quantizing.html").read_text(encoding="utf-8")
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count('role="math"') > 20 and "```math" not in method


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]+src=\"(https?:[^\"]+)|<link[^>]+href=\"(https?:[^\"]+)")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page


def test_links_lead_somewhere_in_the_repository_too():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_is_a_guide():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500
