"""Every numbered equation of docs/derivations.md is checked: exactly with SymPy where it can be, else in float64.

A test names the equations it checks by `proves`; an equation that no test names is a failure.
"""

from __future__ import annotations

import re
import sys

import test_derivations_layers  # noqa: F401  which fills PROVED
import test_derivations_points  # noqa: F401  and this
import test_derivations_softmax  # noqa: F401
import test_derivations_trace  # noqa: F401  and this
import test_float16_scale  # noqa: F401  and this
from proofs import DOCUMENT, PROVED, ROOT, TAGS


def test_every_equation_has_a_test_and_every_test_an_equation() -> None:
    assert sorted(PROVED) == sorted(TAGS)
    for tag, test in PROVED.items():
        assert test.__name__.startswith("test_"), f"the test of ({tag}) is not collected"
        assert getattr(sys.modules[test.__module__], test.__name__) is test, (
            f"the test of ({tag}) is shadowed by another of its name"
        )


def test_equations_are_numbered_in_order_within_their_sections() -> None:
    by_section: dict[int, list[int]] = {}
    for tag in TAGS:
        section, number = map(int, tag.split("."))
        by_section.setdefault(section, []).append(number)
    assert list(by_section) == [1, 2, 3, 4, 5]
    for section, numbers in by_section.items():
        assert numbers == list(range(1, len(numbers) + 1)), f"section {section}"
        heading = DOCUMENT.index(f'<a id="s{section}"></a>\n## {section} ')
        assert heading < DOCUMENT.index(rf"\tag{{{section}.1}}")


def test_every_displayed_formula_is_numbered_or_it_could_escape_its_test() -> None:
    displays = re.findall(r"```math\n(.*?)\n```", DOCUMENT, flags=re.S)
    assert len(displays) == len(TAGS)
    assert all(display.count(r"\tag{") == 1 for display in displays)


def test_contents_headings_and_anchors_agree() -> None:
    headings = re.findall(r'^<a id="s([\d.]+)"></a>\n##+ ([\d.]+) ', DOCUMENT, flags=re.M)
    assert [anchor for anchor, _ in headings] == [number for _, number in headings]
    assert len(headings) == len(re.findall(r"^##+ ", DOCUMENT, flags=re.M))
    assert re.findall(r"\(#s([\d.]+)\)", DOCUMENT) == [anchor for anchor, _ in headings]


def test_citations_in_the_code_name_sections_and_equations_that_exist() -> None:
    sections = set(re.findall(r'<a id="s([\d.]+)"', DOCUMENT))
    code = [*ROOT.glob("hw3gpu/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    sources = [*code, *ROOT.glob("kernels/*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]
    cited = 0
    for path in (path for path in sources if path.exists()):
        text = re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8"))
        for citation in re.findall(r"derivations\.md`*,? \(?sections? ((?:[\d.]*\d(?:, | and | to )?)+)", text):
            for section in re.findall(r"\d[\d.]*\d|\d", citation):
                assert section in sections, f"{path.name} cites section {section}"
                cited += 1
    equations = set(re.findall(r"\((\d\.\d+)\)", (ROOT / "hw3gpu" / "reference.py").read_text(encoding="utf-8")))
    assert equations <= set(TAGS), equations - set(TAGS)
    assert cited >= 5
    assert len(equations) > 15


def test_inline_formulas_survive_github() -> None:
    """Plain $…$ passes through Markdown first, which eats backslashes and reads _ and * as emphasis."""
    text = re.sub(r"```math\n.*?\n```", "", DOCUMENT, flags=re.S)
    assert "$$" not in text
    for left, guarded, plain, right in re.findall(r"(.?)\$(?:`([^`]*)`|([^$`]+))\$(.?)", text, flags=re.S):
        formula = guarded or plain
        assert "\n" not in formula, formula
        assert left in " \n(", f"{left!r} before {formula}"
        assert right in " \n.,;:)", f"{right!r} after {formula}"
        assert not re.search(r"\\[^a-zA-Z]|[*<>\[\]`]|[^a-zA-Z]_|_[^a-zA-Z0-9]", plain), f"needs $`…`$: {plain}"
    for macro in (r"\operatorname", r"\color", r"\mbox", r"\phantom", r"\newcommand", r"\def"):
        assert not re.search(re.escape(macro) + r"\b", DOCUMENT), f"GitHub refuses {macro}"
