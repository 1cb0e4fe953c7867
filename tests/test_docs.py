"""Whatever the documentation points to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("qlip_core", "backends", "cli", "tests", "benchmarks", "recipes")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_sections_of_the_spec_that_sources_cite_exist() -> None:
    spec = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^#+ (\d(?:\.\d)?)\.? ", spec, re.MULTILINE))
    files = [
        path
        for name in SOURCES
        for kind in ("py", "toml")
        for path in (ROOT / name).rglob(f"*.{kind}")
    ]
    cited = {
        section: path
        for path in files
        for section in re.findall(
            r"SPEC (?:sections? )?(\d(?:\.\d)?)", path.read_text(encoding="utf-8")
        )
    }
    assert {"1.3", "4"} <= set(cited)
    assert {section: path for section, path in cited.items() if section not in sections} == {}
