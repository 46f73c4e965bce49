"""The suites of networks that the census judges: suite name -> function that lists its cases."""

from __future__ import annotations

from benchmarks.suites.case import Case

SUITES = (
    "awkward",
    "segmentation",
    "video",
    "detection",
    "transformers",
    "classification",
    "timm",
)


def cases(suite: str) -> list[Case]:
    """Return the cases of ``suite`` without building any model."""
    if suite == "awkward":
        from benchmarks.suites import awkward

        return awkward.CASES
    if suite == "timm":
        from benchmarks.suites import timm_families

        return timm_families.CASES
    if suite == "transformers":
        from benchmarks.suites import transformers_kinds, transformers_media, transformers_text  # noqa: F401

        return transformers_kinds.CASES
    if suite in SUITES:
        from benchmarks.suites import zoo

        return zoo.CASES[suite]
    raise ValueError(f"no suite is called {suite!r}; the suites are {', '.join(SUITES)}.")


def find(suite: str, name: str) -> Case:
    """Return one case by name."""
    return next(case for case in cases(suite) if case.name == name)
