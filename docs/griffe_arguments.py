"""The API reference's docstrings: what they say of each argument begins a line of a list (mkdocs.yml, mkdocstrings)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import griffe


def listed(text: str, names: Iterable[str]) -> str:
    """A docstring in which each `name: …`, or `name, other: …`, at the start of a sentence is an item of a list."""
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not name:
        return text
    item = re.compile(rf"(^|(?<=[.;)])[ \n])((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if item.search(paragraph):
            before, *rest = item.split(" ".join(paragraph.split()))
            items = [f"- **{of}**: {what.strip()}" for of, what in zip(rest[1::3], rest[2::3], strict=True)]
            paragraphs += [before.strip(), "\n".join(items)] if before.strip() else ["\n".join(items)]
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


class Arguments(griffe.Extension):
    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        if func.docstring:
            names = [parameter.name for parameter in func.parameters if parameter.name not in ("self", "cls")]
            func.docstring.value = listed(func.docstring.value, names)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """A class's docstring tells of the arguments of `__init__`; `__doc__ = f"… {Base.__doc__}"` is one too."""
        text = re.fullmatch(r'f"(.*)\{(\w+)\.__doc__\}"', str(getattr(cls.members.get("__doc__"), "value", "")))
        if text and not cls.docstring:
            base = cls.module.members[text[2]].docstring
            cls.docstring = griffe.Docstring(text[1] + (base.value if base else ""), parent=cls)
        if cls.docstring:
            made = cls.members.get("__init__")
            names = [p.name for p in made.parameters if p.name != "self"] if isinstance(made, griffe.Function) else []
            cls.docstring.value = listed(cls.docstring.value, names)
