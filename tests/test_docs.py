"""README and the pages behind it: what they name exists, and CITATION.cff cites what the README cites."""

import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (".ci", "configs", "dev", "docs", "results", "runs", "tests")
SUFFIXES = ("cff", "json", "md", "py", "sh", "txt", "yaml", "yml")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def in_code(text):
    """What stands between single backticks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`]+)`", prose)


def anchors(path):
    """The sections of a page, as links name them."""
    titles = re.findall(r"^#+ (.+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "results").rglob("*.md"))], ids=str)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    """GitHub shows no table where the line below the head has another number."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for table in re.findall(r"(?:^ *\|.*\n)+", prose, re.MULTILINE):
        lines = table.splitlines()
        assert re.fullmatch(r" *\|[-:| ]+\|", lines[1])
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, lines[0]


@each_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, section = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not section or section in anchors(target), link


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_files_of_the_repository_that_a_page_names_exist(page):
    """A name is ours if it begins with one of our folders, or is that of a Python file. README: test_readme.py."""
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*in_code(text), *blocks(text, "bash")])
    names = re.findall(rf"(?<![\w./*-])[\w./-]+\.(?:{'|'.join(SUFFIXES)})\b", code)
    ours = {name for name in names if name.split("/")[0] in FOLDERS or re.fullmatch(r"[a-z]\w+\.py", name)}
    assert ours
    assert not [name for name in ours if not (ROOT / name).exists()]


@each_page
def test_make_targets_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    code = "\n".join([*in_code(text), *blocks(text, "bash")])
    targets = re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE)
    assert set(re.findall(r"^make ([\w-]+)", code, re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/design.md"])
def test_names_in_the_code_that_a_page_explains_exist(page):
    """Those with an underscore or an inner capital. What was rejected is not in the code."""
    text = (ROOT / page).read_text(encoding="utf-8").partition("\n## Tried")[0]
    names = {code for code in in_code(text) if re.fullmatch(r"\w*(_|[a-z][A-Z]|[A-Z]{2})\w*", code)}
    files = [path for pattern in ("*.py", "*/*.py", "configs/*.yaml") for path in ROOT.glob(pattern)]
    written = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert len(names) > 5
    assert not [name for name in names if not re.search(rf"{name}\b", written)]


def test_the_citation_is_the_readme_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"] and citation["title"] and citation["authors"]
    (entry,) = blocks(README, "bibtex")
    fields = dict(re.findall(r"^ *(\w+) *= *\{(.*)\},?$", entry, re.MULTILINE))
    fields = {key: value.replace("{", "").replace("}", "") for key, value in fields.items()}
    paper = citation["preferred-citation"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert paper["title"] == fields["title"]
    assert " and ".join(authors) == fields["author"]
    assert paper["year"] == int(fields["year"])
    assert paper["collection-title"] == fields["booktitle"]
    assert (paper["publisher"]["name"], paper["volume"]) == (fields["series"], int(fields["volume"]))
    assert paper["url"] in README


@pytest.mark.parametrize("script", sorted(ROOT.glob("tests/benchmarks/*.py")), ids=lambda path: path.name)
def test_a_benchmark_finds_all_that_it_imports(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
