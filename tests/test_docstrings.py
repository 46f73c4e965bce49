"""The examples in docstrings run, and what is public says what it is."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import secateur as sc

SOURCE = Path(__file__).parent.parent / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((SOURCE / "secateur").rglob("*.py"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


@pytest.mark.parametrize("name", [n for n in sc.__all__ if n != "criteria"])
def test_public_names_are_documented(name: str) -> None:
    assert len((inspect.getdoc(getattr(sc, name)) or "").split()) > 4


def test_there_are_at_most_25_public_names() -> None:
    assert len(sc.__all__) <= 25
