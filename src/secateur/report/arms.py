"""Runs beside each other: grouped by recipe, means and spreads over seeds, controls, Pareto fronts.

All of it comes from records; see ``secateur.compare`` for the files.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.report.course import NEVER, Course, course
from secateur.report.metrics import of_measured
from secateur.types import Record, SecateurError

DENSE, WHOLE, PRUNED, RANDOM, SCRATCH = "dense", "not pruned", "pruned", "random control", "from scratch"
GATED = "gated"
ROLES = (DENSE, WHOLE, PRUNED, GATED, RANDOM, SCRATCH)
GATES = ("fbs", "rnp")  # sections of a recipe whose run ends with a model that chooses for each image
LABELS = ("name", "out", "seed", "track", "prune.criterion.args.seed", "rnp.budgets")  # what makes no new experiment
AFTER = ("prune", "recover", "measure", *GATES)  # what does not make another dense model

Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Outcome:
    """What one finished run measured: quantity -> value, of the dense and of the final model.

    The final model is the pruned one, or that with gates; the multiply-accumulates of gates are means over images.
    """

    folder: str
    recipe: Mapping[str, Any]
    hash: str
    where: str
    dense: Mapping[str, float]
    final: Mapping[str, float]
    units: Mapping[str, str]
    course: Course = NEVER
    dial: bool = False  # the final model of another outcome, at another density or budget

    @property
    def seed(self) -> tuple[Any, Any]:
        """The seed of the run, and that of a criterion that draws."""
        return self.recipe.get("seed"), flat(self.recipe).get("prune.criterion.args.seed")


@dataclass(frozen=True)
class Value:
    """A mean over ``n`` seeds, and their standard deviation (n - 1; None for one seed)."""

    mean: float
    spread: float | None
    n: int


@dataclass(frozen=True)
class Arm:
    """The runs of one recipe up to the seed: what sets it apart, its role, and its values.

    ``gains`` holds the accuracy minus that of the control of the same recipe, paired by seed.
    """

    label: str
    role: str
    values: Mapping[str, Value]
    runs: tuple[str, ...]
    gains: Mapping[str, Value]


@dataclass(frozen=True)
class Comparison:
    """All arms, the cost quantities they are compared on, and what a reader must know.

    ``fronts`` maps each cost to the places (in ``arms``) of the arms that no other arm beats: none is at least as
    accurate and at most as costly, and better in one.
    """

    arms: tuple[Arm, ...]
    accuracy: str
    costs: tuple[str, ...]
    units: Mapping[str, str]
    fronts: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]
    outcomes: tuple[Outcome, ...]


def compared(
    outcomes: Sequence[Outcome], *, part: str = "test", unfinished: Sequence[str] = (), notes: Sequence[str] = ()
) -> Comparison:
    """Return the comparison of ``outcomes``; accuracies are those on the ``part`` ("test" or "validation").

    Raises ``SecateurError`` when there is no outcome.
    """
    if not outcomes:
        raise SecateurError(
            f"there is no finished run to compare ({len(unfinished)} unfinished: {', '.join(unfinished) or 'none'}); "
            "give the folders of runs that went to their end."
        )
    accuracy = f"{part} {of_measured({name for one in outcomes for name in one.units}, part).measured}"
    outcomes, notes = _comparable(outcomes, accuracy, notes)
    arms = _arms(outcomes, accuracy)
    units = {name: unit for one in outcomes for name, unit in one.units.items()}
    masked = [name for name in ("unmasked params", "unmasked macs") if name in units]
    costs = ("params", "macs", *masked, *sorted((name for name in units if name.startswith("latency")), key=_batch))
    fronts = {cost: front([_point(arm, accuracy, cost) for arm in arms]) for cost in costs}
    said = [*notes, *_warnings(outcomes, arms, unfinished)]
    return Comparison(arms, accuracy, costs, units, fronts, tuple(said), tuple(one for one in outcomes if not one.dial))


def _comparable(
    outcomes: Sequence[Outcome], accuracy: str, notes: Sequence[str]
) -> tuple[Sequence[Outcome], Sequence[str]]:
    """Return the runs that measured ``accuracy``, and notes that name the others: runs of another task."""
    other = [one.folder for one in outcomes if accuracy not in one.final]
    said = [*notes, f"Left out, without {accuracy}: {', '.join(other)}."] if other else notes
    return [one for one in outcomes if accuracy in one.final], said


def _batch(name: str) -> int:
    return int(name.rsplit(" ", 1)[-1])


def outcomes(records: Sequence[Record], folder: str) -> tuple[Outcome, ...]:
    """Return what a run measured, none when it is not finished: its final model, then a gated one at other dials.

    Those are the densities and budgets that one gated model was tested at; each stands as a run whose recipe says so.
    """
    stages = {record.stage: record.data for record in records}
    run, measure = stages.get("run"), stages.get("measure", {})
    measured = measure.get("measurements")
    if not run or not measured:
        return ()
    values = {name: {m["name"]: m["value"] for m in rows if m["value"] is not None} for name, rows in measured.items()}
    units = {m["name"]: m["unit"] for rows in measured.values() for m in rows}
    threads = f", {run['threads']} thread{'s' if run['threads'] != 1 else ''}" if run["device"] == "cpu" else ""
    where = f"{run['device']}{threads}"
    way = course(records, anew=run["recipe"].get("recover", {}).get("name") == "scratch")
    final = values.get("gated", values["pruned"])
    last = Outcome(folder, run["recipe"], run["hash"], where, values["dense"], final, units, way)
    budgets = [_dialled(last, "rnp", "budget", row) for row in measure.get("budgets", ())]
    end = (run["recipe"].get("fbs") or {}).get("densities", [None])[-1]  # that of the final model
    others = [row for row in measure.get("densities", ()) if row["density"] != end]
    densities = [_dialled(last, "fbs", "density", row) for row in others]
    if densities:
        last = replace(last, recipe=_at(last.recipe, "fbs", "density", end))
    return (last, *densities, *budgets)


def _at(recipe: Mapping[str, Any], section: str, key: str, value: float) -> Mapping[str, Any]:
    return {**recipe, section: {**recipe[section], key: value}}


def _dialled(last: Outcome, section: str, key: str, row: Mapping[str, Any]) -> Outcome:
    """Return ``last`` at one density or budget: its size, and the work and quality of ``row`` on the test images."""
    recipe = _at(last.recipe, section, key, row[key])
    quality = {f"test {name}": value for name, value in row.items() if f"test {name}" in last.units}
    final = {name: last.final[name] for name in ("params", "file") if name in last.final}
    return replace(last, recipe=recipe, final={**final, **quality, "macs": row["macs"]}, course=NEVER, dial=True)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys.

    >>> flat({"a": {"b": 1, "c": {}}})
    {'a.b': 1, 'a.c': {}}
    """
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}{key}.").items()}
    return {prefix[:-1]: value}


def _key(recipe: Mapping[str, Any], without: Sequence[str] = ()) -> Key:
    """Return the recipe as a value, without its labels and the sections or keys ``without``.

    >>> _key({"seed": 1, "train": {"lr": 0.1}, "recover": {"epochs": 2}}, ["recover"])
    (('train.lr', '0.1'),)
    """
    gone = (*LABELS, *without)
    rows = flat(recipe).items()
    kept = {k: repr(v) for k, v in rows if not any(k == g or k.startswith(f"{g}.") for g in gone)}
    return tuple(sorted((k, v) for k, v in kept.items() if v not in ("None", "{}")))


def role(recipe: Mapping[str, Any]) -> str:
    """Return what a run is in a comparison: pruned, gated, a random control, a from-scratch baseline, or not pruned.

    The last is a training of the schedule ``during`` whose events take nothing, or a budget that keeps all.  What has
    gates is gated, however it was made before.
    """
    if any(recipe.get(section) for section in GATES):
        return GATED
    if recipe.get("recover", {}).get("name") == "scratch":
        return SCRATCH
    when = recipe["prune"].get("schedule", {})
    if when.get("name") == "during" and (when["keep"] == 1 or when["initial_iterations"] == when["total_epochs"]):
        return WHOLE
    if 1 in (recipe["prune"].get("budget") or {}).values():
        return WHOLE
    return RANDOM if recipe["prune"]["criterion"]["name"] == "random" else PRUNED


def _arms(outcomes: Sequence[Outcome], accuracy: str) -> tuple[Arm, ...]:
    """Return the dense models and the arms; controls stand right after what they are controls of."""
    cut, whole = (
        _grouped(outcomes, lambda one: _key(one.recipe)),
        _grouped(outcomes, lambda one: _key(one.recipe, AFTER)),
    )
    labels, dense_labels = _labels(cut), _labels(whole)
    dense = [
        Arm(f"dense {dense_labels[key]}".strip(), DENSE, _values(runs, dense=True), _folders(runs), {})
        for key, runs in whole.items()
    ]
    family = {key: _key(runs[0].recipe, ("prune.criterion", "recover")) for key, runs in cut.items()}
    order = {name: number for number, name in enumerate(dict.fromkeys(family.values()))}
    arms = []
    for key, runs in cut.items():
        kind, values = role(runs[0].recipe), _values(runs)
        label = labels[key] or str(runs[0].recipe.get("name", "run"))
        gains = _gains(runs, outcomes, accuracy)
        best = -values[accuracy].mean if accuracy in values else 0.0
        arms.append((order[family[key]], ROLES.index(kind), best, Arm(label, kind, values, _folders(runs), gains)))
    return (*dense, *(row[-1] for row in sorted(arms, key=lambda row: row[:-1])))


def _grouped(outcomes: Iterable[Outcome], key: Callable[[Outcome], Key]) -> dict[Key, list[Outcome]]:
    groups: dict[Key, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(key(one), []).append(one)
    return groups


def _folders(runs: Sequence[Outcome]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.folder for one in runs))


def _labels(groups: Mapping[Key, Sequence[Outcome]]) -> dict[Key, str]:
    """Return what sets each group apart: its name where each has another one, else with the values that differ."""
    names = {key: {str(one.recipe.get("name")) for one in runs} for key, runs in groups.items()}
    named = len(set().union(*names.values())) > 1
    if len(groups) > 1 and len(set().union(*names.values())) == sum(map(len, names.values())) == len(groups):
        return {key: next(iter(found)) for key, found in names.items()}
    shared = set.intersection(*(set(key) for key in groups)) if len(groups) > 1 else set()
    for section in GATES:  # where only some have gates, these differ by what is different among them
        own = [{(k, v) for k, v in key if k.startswith(f"{section}.")} for key in groups]
        with_gates = [rows for rows in own if rows]
        shared |= set.intersection(*with_gates) if len(with_gates) > 1 else set()
    found = {}
    for key in groups:
        parts = [f"{'.'.join(k.split('.')[-2:])}={v.strip(chr(39))}" for k, v in key if (k, v) not in shared]
        name = next(iter(names[key])) if named and len(names[key]) == 1 else ""
        found[key] = ", ".join([*([name] if name else []), *(parts if len(groups) > 1 else [])])
    return found


def _values(runs: Sequence[Outcome], dense: bool = False) -> dict[str, Value]:
    """Return the mean and spread over seeds; runs of one seed are averaged first, so that n counts seeds.

    The dense model does not know the seed of the criterion.
    """
    rows = [(one.seed[0] if dense else one.seed, one.dense if dense else one.final) for one in runs]
    names = dict.fromkeys(name for _, values in rows for name in values)
    return {name: over_seeds([(seed, values[name]) for seed, values in rows if name in values]) for name in names}


def over_seeds(rows: Iterable[tuple[Any, float]]) -> Value:
    """Return the mean over seeds of (seed, value) rows.

    >>> over_seeds([(0, 1.0), (0, 3.0), (1, 4.0)])
    Value(mean=3.0, spread=1.4142135623730951, n=2)
    """
    seeds: dict[Any, list[float]] = {}
    for seed, value in rows:
        seeds.setdefault(seed, []).append(value)
    means = [statistics.fmean(values) for values in seeds.values()]
    return Value(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else None, len(means))


def _gains(runs: Sequence[Outcome], outcomes: Sequence[Outcome], accuracy: str) -> dict[str, Value]:
    """Return how much more accurate ``runs`` are than their controls, seed by seed.

    The random control has the same recipe but for the criterion, the from-scratch baseline but for the recovery.
    """
    gains = {}
    for kind, section in ((RANDOM, "prune.criterion"), (SCRATCH, "recover")):
        mine = _key(runs[0].recipe, (section,))
        control = [one for one in outcomes if role(one.recipe) == kind and _key(one.recipe, (section,)) == mine]
        if role(runs[0].recipe) != PRUNED or not control:
            continue
        known: dict[Any, list[float]] = {}
        for one in control:
            known.setdefault(one.seed[0], []).append(one.final[accuracy])
        pairs = [(one.seed[0], one.final[accuracy]) for one in runs if one.seed[0] in known]
        if pairs:
            gains[kind] = over_seeds([(seed, value - statistics.fmean(known[seed])) for seed, value in pairs])
    return gains


def _point(arm: Arm, accuracy: str, cost: str) -> tuple[float, float] | None:
    values = arm.values
    return (values[accuracy].mean, values[cost].mean) if accuracy in values and cost in values else None


def front(points: Sequence[tuple[float, float] | None]) -> tuple[int, ...]:
    """Return the places of the (accuracy, cost) points that no other point beats, cheapest first.

    >>> front([(0.9, 100), (0.8, 50), (0.7, 60), None])
    (1, 0)
    """
    known = [(number, *point) for number, point in enumerate(points) if point is not None]
    best = [
        (cost, number)
        for number, high, cost in known
        if not any(h >= high and c <= cost and (h > high or c < cost) for _, h, c in known)
    ]
    return tuple(number for _, number in sorted(best))


def _warnings(outcomes: Sequence[Outcome], arms: Sequence[Arm], unfinished: Sequence[str]) -> list[str]:
    """Return what a reader must know: missing controls, unfinished runs, latencies that do not compare."""
    notes = [f"Not finished and left out: {', '.join(unfinished)}."] if unfinished else []
    for kind, how in (
        (RANDOM, "the same recipe with prune.criterion.name=random"),
        (SCRATCH, "the same small model trained from new weights, recover.name=scratch"),
    ):
        lacking = [arm.label for arm in arms if arm.role == PRUNED and kind not in arm.gains]
        some = any(arm.role == kind for arm in arms)
        if lacking and not some:
            notes.append(f"No {kind} run is among these ({how}): nothing says what the choice of units is worth.")
            if kind == SCRATCH:
                notes[-1] = f"No {kind} run is among these ({how}): nothing says what the trained weights are worth."
        elif lacking:
            notes.append(f"No {kind} run of equal recipe and seed ({how}) for: {'; '.join(lacking)}.")
    if any(arm.role == GATED for arm in arms):
        notes.append(
            "MACs of gated rows are means over the test images, without the predictors of FBS. Their latency is that "
            "of the fastest way to run them that the machine had; the other rows run in torch."
        )
    single = [arm.label for arm in arms if arm.role != DENSE and all(value.n == 1 for value in arm.values.values())]
    if single:
        notes.append(f"One seed only, so no spread: {'; '.join(single)}.")
    repeated = [f"{a.label} ({len(a.runs)} runs)" for a in arms if a.role != DENSE and len(a.runs) > _seeds(a)]
    if repeated:
        notes.append(f"Several runs of one seed, averaged first: {'; '.join(repeated)}.")
    places = sorted({one.where for one in outcomes})
    if len(places) > 1:
        notes.append(f"Latencies were taken on {'; '.join(places)}: they do not compare, speed-ups may.")
    sources = sorted({str(one.recipe.get("data", {}).get("name")) for one in outcomes})
    if len(sources) > 1:
        notes.append(f"Accuracies are on different data ({', '.join(sources)}): they do not compare.")
    draws = {one.seed for one in outcomes if role(one.recipe) == RANDOM}
    fixed = {criterion for _, criterion in draws}
    if len(draws) > 1 and len(fixed) == 1 and None not in fixed:
        notes.append("The random control has one seed of its own (prune.criterion.args.seed) in all its runs.")
    return notes


def _seeds(arm: Arm) -> int:
    return max((value.n for value in arm.values.values()), default=0)
