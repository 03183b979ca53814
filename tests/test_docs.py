"""README and docs/: whatever they point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "pretrained" / "README.md"]
SCRIPTS = sorted(ROOT.glob("0*.py"))


def headings(page):
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in links(page):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).is_file(), target
            assert not anchor or anchor in headings(page.parent / path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_options_and_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    scripts = [*SCRIPTS, ROOT / "lesson_tools.py"]
    scripts += [path for path in (ROOT / "tests").glob("*.py") if not path.name.startswith("test_")]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    options = {"--help", *re.findall(r'(?:add|add_argument)\("(--[\w-]+)"', code)}
    for command in re.findall(r"(?:python|torchrun|uv run) [^`\n]*\.py[^`\n#&]*", text):
        *_, (script, told) = re.findall(r"(\S+\.py)\b([^#]*)", command)
        assert (ROOT / script).is_file(), command
        assert set(re.findall(r"--[a-z][\w-]+", told)) <= options, command


def test_each_section_has_its_place_among_the_pictures():
    """In the scripts' order and under the scripts' titles; and no picture in docs/ is left over."""
    text = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8")
    told = re.findall(r"^(?:## `(0.*)`|### (\d+\. .*))$", text, flags=re.MULTILINE)
    expected = []
    for script in SCRIPTS:
        titles = re.findall(r"^# %% (\d+\. .*)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
        expected += [(script.name, ""), *(("", title) for title in titles)]
    assert told == expected
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    pictures = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".gif")}
    assert len(pictures) > 30
    assert pictures <= shown
    assert sum(path.stat().st_size for path in pictures) < 4e6
