"""A sample of ``make fuzz``, and that the fuzzer would notice a careless loader."""

from __future__ import annotations

import pytest
from benchmarks.fuzz import fuzz

from secateur import checkpoint, recipe


class Any(str):
    """A digest that equals every other."""

    def __ne__(self, other: object) -> bool:
        return False


def test_damaged_files_are_refused_or_harmless() -> None:
    found = fuzz(200, seed=7)
    assert found["bad"] == []
    assert sum(found["total"].values()) == 200
    assert found["total"]["refused"] > 150


def test_the_fuzzer_notices_a_loader_without_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    original = checkpoint.data_digest
    monkeypatch.setattr(checkpoint, "data_digest", lambda items: Any(original(items)))
    assert any("other values" in line for line in fuzz(200, seed=7)["bad"])


def test_the_fuzzer_notices_errors_that_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.Header, "from_text", None)
    monkeypatch.setattr(recipe, "schema_problems", None)
    bad = fuzz(60, seed=7)["bad"]
    assert any("flip: crashed: TypeError" in line for line in bad)
    assert any("recipe_values: crashed: TypeError" in line for line in bad)
