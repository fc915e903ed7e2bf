"""What is distributed, and the site: both built here."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.policy import default
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lightning_cwrf
from lightning_cwrf import _version

ROOT = Path(__file__).parents[1]


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'{package} is not installed: pip install -e ".[dev]"')


def run(*command, **variables):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_version_is_that_of_the_installed_metadata():
    assert lightning_cwrf.__version__ == _version.__version__ == importlib.metadata.version("lightning-cwrf")


def test_the_lowest_versions_are_those_of_pyproject():
    claimed = re.findall(r'"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    constraints = dict(line.split("==") for line in run("tools/lowest.py").splitlines())
    assert {"torch", "lightning", "scikit-learn", "dask"} <= constraints.keys()
    assert not {"pytest", "mkdocs", "hatchling"} & constraints.keys()
    assert set(constraints.items()) < set(claimed)


def test_examples_in_the_tools_hold():
    run("-m", "doctest", "tools/links.py", "tools/lowest.py", "tools/notebook.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


@pytest.mark.slow
@needs("hatchling")
def test_the_wheel_has_the_package_its_types_and_its_licence_alone(wheel):
    names = set(wheel.namelist())
    (info,) = {name.split("/")[0] for name in names} - {"lightning_cwrf"}
    package = (path for path in (ROOT / "lightning_cwrf").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {name for name in names if name.startswith("lightning_cwrf/")} == {str(p.relative_to(ROOT)) for p in package}
    assert "lightning_cwrf/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert info == f"lightning_cwrf-{lightning_cwrf.__version__}.dist-info"


@pytest.mark.slow
@needs("hatchling")
def test_the_metadata_have_the_readme_without_broken_links(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    metadata = message_from_bytes(wheel.read(name), policy=default)
    assert metadata["Version"] == lightning_cwrf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    shown = wheel.read(name).decode().split("\n\n", 1)[1]
    without_code = re.sub(r"```.*?```", "", shown, flags=re.S)
    assert [link for link in re.findall(r"\]\(([^)]+)\)", without_code) if "://" not in link and link[0] != "#"] == []
    plain = re.sub(r"\[([^\[\]]+)\]\([^()\s]+\)", r"\1", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert re.sub(r"\[([^\[\]]+)\]\([^()\s]+\)", r"\1", shown).split() == plain.split()


@pytest.mark.slow
@needs("hatchling")
def test_the_sdist_builds_the_same_and_has_the_tests(tmp_path):
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path))
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames()}
    assert names >= {"LICENSE", "README.md", "pyproject.toml", "tools/readme.py", "tools/links.py", "tests/conftest.py"}
    assert "lightning_cwrf/py.typed" in names
    assert not {name.split("/")[0] for name in names} & {".git", ".ci", "out", "dist", ".venv"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    run("-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), NO_MKDOCS_2_WARNING="1", PYTHONPATH=str(ROOT))
    return folder


class Loaded(HTMLParser):
    """What a page loads by itself, and where its links lead."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found.get("id"), found.get("name")}
        if tag == "a":
            self.links.append(found.get("href") or "")
        elif tag in ("link", "script", "img", "iframe") and found.get("rel") != "canonical":
            self.loads.append(found.get("src") or found.get("href") or "")


@pytest.mark.slow
@needs("mkdocs")
@needs("material")
@needs("mkdocstrings")
def test_the_site_builds_without_warnings_and_loads_nothing_from_a_network(site):
    pages = {page: Loaded(page) for page in site.rglob("*.html")}
    assert len(pages) > 30
    for page, found in pages.items():
        assert [each for each in found.loads if "//" in each] == [], page
        for link in found.links:
            if "//" in link or link.startswith("mailto:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if page.name == "404.html":
                continue
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in pages[target].ids, f"{page.name} links to {link}"
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


@pytest.mark.slow
@needs("mkdocs")
@needs("material")
@needs("mkdocstrings")
def test_the_api_pages_show_every_public_name(site):
    for title in ("attacks", "auditing", "callbacks", "defenses", "metrics", "recipes", "report", "shadows", "weights"):
        module = importlib.import_module(f"lightning_cwrf.{title}")
        ids = Loaded(site / "api" / f"lightning_cwrf.{title}.html").ids
        shown = {each.rpartition(".")[2] for each in ids if each}
        assert set(module.__all__) <= shown, title


def test_links_between_pages_lead_to_files_of_the_repository():
    code = re.compile(r"```.*?```|`[^`\n]*`", re.S)
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^()\s]+)\)", code.sub("", page.read_text(encoding="utf-8"))):
            if "://" not in target and not target.startswith("#"):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"
