"""Criteria: how good a unit is.  Higher = keep.

The import list below is the registry: to add a criterion, write one file and import its class here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secateur.criteria.bn_scale import BNScale
from secateur.criteria.contribution import Contribution
from secateur.criteria.evidence import KNOWN, Criterion, Evidence, Slice
from secateur.criteria.fisher import Fisher
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.random import Random
from secateur.criteria.taylor import Taylor
from secateur.criteria.wrappers import Costed, Normalised, Worst, Wrapper, smooth

__all__ = [
    "BNScale",
    "Contribution",
    "Costed",
    "Criterion",
    "Evidence",
    "Fisher",
    "Magnitude",
    "Normalised",
    "Random",
    "Slice",
    "Taylor",
    "Worst",
    "Wrapper",
    "collect",
    "smooth",
]


def collect(found: Iterable[Any]) -> dict[str, type[Criterion]]:
    """Return name -> class of the criteria among ``found``, after checking each.

    Raises ``TypeError`` for a criterion without a name or docstring, with unknown evidence, that is not a
    frozen dataclass, or whose name is taken.
    """
    registry: dict[str, type[Criterion]] = {}
    for kind in found:
        if not (isinstance(kind, type) and issubclass(kind, Criterion)):
            continue
        if kind is Criterion or issubclass(kind, Wrapper):
            continue
        own = vars(kind)
        for problem, wrong in (
            ("a lower-case `name`", not (kind.name.isidentifier() and kind.name.islower())),
            ("a docstring of its own", not (own.get("__doc__") or "").strip()),
            ("to be a frozen dataclass", "__dataclass_params__" not in own),  # the base is: they all must be
            ("a name that is not taken", registry.get(kind.name, kind) is not kind),
        ):
            if wrong:
                raise TypeError(f"criterion {kind.__name__} needs {problem}; got name {kind.name!r}.")
        unknown = kind().evidence - KNOWN
        if unknown:
            raise TypeError(f"criterion {kind.__name__} declares evidence {sorted(unknown)}; known is {sorted(KNOWN)}")
        registry[kind.name] = kind
    return registry


REGISTRY = collect(list(globals().values()))
