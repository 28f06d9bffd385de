"""What the pages of the book may not contain, and what they must: checks that the builder does not make."""

import json
import re
from pathlib import Path

import pytest

import cvxlib

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
PAGES = sorted([*BOOK.rglob("*.md"), *BOOK.rglob("*.ipynb")])
#: environments that MathJax 3 knows (base and ams); LaTeX has more, and one that MathJax lacks shows as a red error on the page
ENVIRONMENTS = {
    "align", "aligned", "alignat", "alignedat", "array", "bmatrix", "Bmatrix", "cases", "equation", "gather", "gathered",
    "matrix", "multline", "pmatrix", "smallmatrix", "split", "subarray", "vmatrix", "Vmatrix",
}  # fmt: skip


def prose(page: Path) -> str:
    """The text of a page: its Markdown, or the Markdown cells of a notebook."""
    if page.suffix == ".md":
        return page.read_text("utf8")
    cells = json.loads(page.read_text("utf8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def outputs(page: Path) -> str:
    """What the code cells of a notebook printed when it was stored."""
    cells = json.loads(page.read_text("utf8"))["cells"]
    found = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in found)


def unknown_environments(text: str) -> set[str]:
    """LaTeX environments in a text that MathJax does not have."""
    return {name.rstrip("*") for name in re.findall(r"\\begin\{([a-zA-Z]+\*?)\}", text)} - ENVIRONMENTS


def test_unknown_environments_finds_one_that_latex_has_and_mathjax_has_not():
    assert unknown_environments(r"$\begin{psmallmatrix} x \end{psmallmatrix}$ and \begin{align*}") == {"psmallmatrix"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(BOOK)))
def test_page_uses_what_mathjax_knows_and_links_chapters(page):
    text = prose(page)
    assert unknown_environments(text) == set()
    assert not re.search(r'chapter "', text), "a chapter named in quotation marks instead of linked"


def test_stored_certificates_are_printed_as_certificates_are_now():
    now = re.match(r"Certificate\(\w+=", repr(cvxlib.Certificate(primal=1.0, dual=0.5)))[0]
    for page in PAGES:
        if page.suffix == ".ipynb":
            assert set(re.findall(r"Certificate\(\w+=", outputs(page))) <= {now}, page.name


def test_first_pages_say_that_there_is_no_softmax():
    for page in (BOOK / "intro.md", ROOT / "README.md"):
        assert "softmax" in page.read_text("utf8").split("```")[0], page.name


def test_every_reference_has_a_link():
    entries = re.split(r"\n(?=@)", (BOOK / "references.bib").read_text("utf8").strip())
    assert len(entries) > 20
    for entry in entries:
        assert re.search(r"^ +(doi|eprint|url) = ", entry, re.M), entry.splitlines()[0]


def test_latex_has_the_macros_of_mathjax():
    config = (ROOT / "_config.yml").read_text("utf8")
    macros = re.findall(r"^ {10}(\w+): '", config[config.index("macros:") :], re.M)
    assert len(macros) >= 5
    for macro in macros:
        assert re.search(rf"\\(provide|renew)command\{{\\{macro}\}}", config), macro
