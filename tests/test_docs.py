"""README and docs/: whatever they point to exists, and the answers to two exercises are right."""

import importlib
import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "pretrained" / "README.md"]
SCRIPTS = sorted(ROOT.glob("0*.py"))


def headings(page):
    """The anchors that GitHub makes from a page's headings."""
    titles = re.findall(r"^#+ \[?(.+?)(?:\]\(.+\))?$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in links(page):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.is_file(), target
            assert not anchor or path.suffix == ".py" or anchor in headings(path), target


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
        *_, (script, arguments) = re.findall(r"(\S+\.py)\b([^#]*)", command)
        assert (ROOT / script).is_file(), command
        assert set(re.findall(r"--[a-z][\w-]+", arguments)) <= options, command


def test_each_section_has_its_place_among_the_pictures():
    """In the scripts' order, under the scripts' titles, linked to their lines; no picture in docs/ is left over."""
    text, expected = (ROOT / "docs" / "lessons.md").read_text(encoding="utf-8"), []
    for script in SCRIPTS:
        expected.append(f"## `{script.name}`")
        for number, line in enumerate(script.read_text(encoding="utf-8").splitlines(), 1):
            if found := re.match(r"# %% (\d+\. .*)", line):
                expected.append(f"### [{found[1]}](../{script.name}#L{number})")
    assert re.findall(r"^(?:## `0.*|### .*)$", text, flags=re.MULTILINE) == expected
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    pictures = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".gif")}
    assert len(pictures) > 30
    assert pictures <= shown
    assert sum(path.stat().st_size for path in pictures) < 4e6


# The exercises
EXERCISES = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")


def test_the_answer_about_max_period():
    lesson1 = importlib.import_module("01_time_embedding")
    t, fits = torch.linspace(0, 2247, 100), []
    for max_period in (10, 100, 1000, 10_000):
        matrix = lesson1.timestep_embedding(t, 16, max_period)
        assert (matrix.amax(dim=0) - matrix.amin(dim=0)).min() > 0.02
        fits.append(f"{lesson1.linear_fit(matrix, t):.2f}")
    assert fits[2] == fits[3]
    assert f"R² {fits[0]} and {fits[1]}, no better than chance" in EXERCISES and f"it can (R² {fits[2]})" in EXERCISES


def test_the_answer_about_added_skips(tmp_path, monkeypatch):
    """The answer's lines, put into a copy of 03, make a U-Net with as many parameters as the answer says."""
    match, constructor, forward = re.findall(r"```python\n(.*?)```", EXERCISES, flags=re.DOTALL)
    code, inside, level = (ROOT / "03_unet_uncond.py").read_text(encoding="utf-8"), " " * 16, " " * 8
    for pattern, new in (
        (r"^ *self\.up, self\.upsample = .*\n", rf"\g<0>{textwrap.indent(match, level)}"),
        (r"^ *blocks\.append\(self\.make_block\(width \+ skips.*\n", textwrap.indent(constructor, inside)),
        (r"^ *for i, blocks in enumerate\(self\.up\):\n", rf"{level}matches = iter(self.match)\n\g<0>"),
        (r"^ *h = torch\.cat\(\[h, savers.*\n", textwrap.indent(forward, inside)),
    ):
        code, replaced = re.subn(pattern, new, code, flags=re.MULTILINE)
        assert replaced == 1, pattern
    (tmp_path / "added.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    counts = []
    for name in ("added", "03_unet_uncond"):
        lesson = importlib.import_module(name)
        counts.append(f"{lesson.count_parameters(lesson.UNet(1, (32, 64, 128, 256), depth=2, groups=2)):,}")
    assert "{} of {} parameters remain.".format(*counts) in EXERCISES


def test_the_code_that_readme_shows_is_the_scripts():
    """Function by function, but for docstrings and comments."""
    (shown,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    code = "\n".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    code = re.sub(r'^ *""".*?"""\n|  # [^\n]*', "", code, flags=re.DOTALL | re.MULTILINE)
    for function in shown.strip().split("\n\n\n"):
        assert f"\n{function}\n\n\n" in code, function
