"""The judgement of one model: everything that must hold after half of the units of every group are cut."""

from __future__ import annotations

import contextlib
import copy
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from benchmarks.judging.checks import TOLERANCE, coverage, differences, distance, gradients, outputs, wide, widen
from benchmarks.suites.case import Case

KEEP = 0.5
UNEVEN_LIMIT = 30_000_000  # parameters; larger models are cut evenly only


class Trial:
    """The judgement as it goes on: failed checks, notes, and the step that is running."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.row: dict[str, Any] = {"status": "right", "reason": ""}
        self.failed: list[str] = []
        self.notes: list[str] = []
        self.step = "build"

    def check(self, fine: bool, message: str) -> None:
        """Note a failed check."""
        if not fine:
            self.failed.append(message)

    @contextlib.contextmanager
    def at(self, step: str) -> Iterator[None]:
        """Name the step that runs and take its time."""
        self.step = step
        begin = time.perf_counter()
        yield
        self.row.setdefault("steps", {})[step] = round(time.perf_counter() - begin, 3)


def judge(case: Case, folder: Path | None = None) -> dict[str, Any]:
    """Judge ``case``; with ``folder`` the small model and its outputs are left there for ``reloaded``.

    Returns a row: status ``right``, ``frozen`` (nothing can be cut, each layer says why), ``wrong`` (a silent
    difference or a broken model) or ``error`` (an exception), with reason, seconds, parameters dense and kept.
    """
    trial = Trial(case)
    begin = time.perf_counter()
    try:
        _judge(trial, folder)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{trial.step}: {type(error).__name__}: {error} [{Path(where.filename).name}:{where.lineno}]"
        trial.row.update(status="error", reason=" ".join(text.split())[:600])
    if trial.failed and trial.row["status"] != "error":
        trial.row.update(status="wrong", reason="; ".join(trial.failed)[:800])
    trial.row["seconds"] = round(time.perf_counter() - begin, 2)
    if trial.notes:
        trial.row["notes"] = trial.notes
    return trial.row


def _judge(trial: Trial, folder: Path | None) -> None:
    case, row = trial.case, trial.row
    with trial.at("dense"):
        model, args, kwargs = case.build()
        row["dense"] = sum(p.numel() for p in model.parameters())
        graded = _dense_gradients(trial, model)
        outputs(model, args, kwargs)  # first: some models change their own buffers when they run
        before = _digests(model)
    with trial.at("trace"):
        modes = [m.training for m in model.modules()]
        graph = sc.trace(model, example(model, args, kwargs))
        trial.check(modes == [m.training for m in model.modules()], "trace changed the modes")
    row.update(groups=len(graph.groups), operators=graph.operators)
    used = set(graded) if graded else {n for n, _ in model.named_parameters()}
    cover = coverage(graph, used | {n for n, p in model.named_parameters() if not p.requires_grad})
    row.update(layers=cover.layers, cut=cover.cut, tied=cover.tied, covered=round(cover.fraction, 4))
    trial.check(
        not cover.unexplained, f"layers neither cut nor frozen with a reason: {', '.join(cover.unexplained[:5])}"
    )
    if cover.frozen:
        row["frozen"] = list(cover.frozen[:8])
    prunable = [g for g in graph.groups if g.prunable]
    row["inexact"] = sum(not g.exact for g in prunable)
    with trial.at("verify"):
        proof = sc.verify(graph, joint=True)  # one run; a failure is judged group by group
        bad = [f"{r.group} ({r.error:.0e})" for r in proof.rows if not r.ok]
        trial.check(not bad, f"permutation proof fails for {len(bad)} of {len(proof.rows)}: {', '.join(bad[:4])}")
        trial.check(len(proof.rows) == len(prunable), f"{len(proof.rows)} proofs for {len(prunable)} groups")
    if not prunable:
        reasons = sorted({g.frozen for g in graph.groups if g.frozen})
        row.update(status="frozen", reason="; ".join(reasons)[:600] or "no group", kept=row["dense"])
        trial.check(bool(reasons), "nothing can be cut and no reason is given")
        return
    plan = half(graph, prunable)
    with trial.at("compact"):
        small = sc.compact(graph, plan)
    row["kept"] = sum(p.numel() for p in small.parameters())
    row["class_kept"] = type(small) is type(model)
    trial.check(row["kept"] < row["dense"], "the compact model has no fewer parameters")
    for lost in differences(model, small):
        trial.check(False, lost)
    with trial.at("other batch"):
        _other_batch(trial, model, small)
    with trial.at("train"):
        _train(trial, small, graded)
    exact = [g for g in prunable if g.exact]
    with trial.at("masked"):
        if exact and len(exact) == len(prunable):
            _masked_equals_compact(trial, graph, exact, plan, small)
        elif exact:
            part = half(graph, exact)
            _masked_equals_compact(trial, graph, exact, part, sc.compact(graph, part))
    if row["dense"] < UNEVEN_LIMIT:
        with trial.at("uneven"):
            _uneven(trial, graph, prunable, exact)
        with trial.at("again"):
            _again(trial, small, args, kwargs)
    after = _digests(model)
    changed = [n for n in before if before[n] != after.get(n)]
    trial.check(not changed, f"the dense model was changed: {', '.join(changed[:4])}")
    if folder is not None:
        with trial.at("save"):
            sc.save(small, folder / "small.safetensors")
            torch.save([outputs(small, *case.feed(b)) for b in case.batches], folder / "outputs.pt")


def _digests(model: nn.Module) -> dict[str, int]:
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    return {
        k: zlib.crc32(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for k, v in state.items()
        if v.numel()
    }


def example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return args and kwargs as what ``sc.trace`` takes."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    import inspect

    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def half(graph: Any, groups: list[Any], seed: int = 0) -> Any:
    """Return a plan that keeps a random half of the units of each of ``groups``."""
    rng = np.random.default_rng(seed)
    rows = []
    for g in groups:
        count = max(1, int(g.units * KEEP))
        rows.append((g.name, g.units, tuple(sorted(rng.permutation(g.units)[:count].tolist()))))
    return sc.Plan(graph.fingerprint, tuple(rows))


def uneven(graph: Any, groups: list[Any], multiple: int = 1, seed: int = 1) -> Any:
    """Return a plan that keeps a random number of random units, at least a quarter, of each of ``groups``.

    Groups of 16 units or more keep a ``multiple``.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for g in groups:
        count = int(rng.integers(max(1, g.units // 4), g.units)) if g.units > 1 else 1
        if g.units >= 16:
            count = max(1, count // multiple) * multiple
        rows.append((g.name, g.units, tuple(sorted(rng.permutation(g.units)[:count].tolist()))))
    return sc.Plan(graph.fingerprint, tuple(rows))


def _dense_gradients(trial: Trial, model: nn.Module) -> dict[str, bool]:
    """Gradients of the dense model, whose state is as before afterwards (no copy: models may fill the memory)."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        return gradients(model, *trial.case.feed(trial.case.batches[1], train=True))
    except Exception as error:
        trial.notes.append(f"the dense model has no backward in train mode: {type(error).__name__}: {error}"[:200])
        return {}
    finally:
        model.eval()
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for name, value in model.named_buffers():
                if value.shape == buffers[name].shape:
                    value.copy_(buffers[name])


def _other_batch(trial: Trial, model: nn.Module, small: nn.Module) -> None:
    for batch in trial.case.batches:
        want, got = outputs(model, *trial.case.feed(batch)), outputs(small, *trial.case.feed(batch))
        if trial.case.suite != "detection":  # the number of boxes depends on the values
            trial.check([t.shape for t in want] == [t.shape for t in got], f"output shapes differ at batch {batch}")
        sound = all(bool(torch.isfinite(t).all()) for t in want)
        trial.check(not sound or all(bool(torch.isfinite(t).all()) for t in got), f"not finite at batch {batch}")


def _train(trial: Trial, small: nn.Module, graded: dict[str, bool]) -> None:
    if not graded:
        return
    trained = copy.deepcopy(small)
    found = gradients(trained, *trial.case.feed(trial.case.batches[1], train=True))
    missing = sorted(set(graded) - set(found))
    trial.check(not missing, f"no gradient after the cut for {', '.join(missing[:4])}")
    broken = sorted(n for n, fine in found.items() if not fine and graded.get(n, True))
    trial.check(not broken, f"gradient not finite after the cut for {', '.join(broken[:4])}")


def _masked_equals_compact(trial: Trial, graph: Any, groups: list[Any], plan: Any, small: nn.Module) -> None:
    """Compare on both batches after cutting exact groups; ``small`` is the compact model of ``plan``."""
    feeds = [trial.case.feed(batch) for batch in trial.case.batches]
    sc.mask_(graph, plan)
    try:
        gaps = [distance(outputs(graph.model, *feed), outputs(small, *feed)) for feed in feeds]
        if max(gaps) > TOLERANCE:
            gaps = _gaps_in_double(trial, graph.model, small, feeds, gaps)
    finally:
        sc.unmask_(graph)
    trial.row["gap"] = max(float(f"{max(gaps):.2g}"), trial.row.get("gap", 0.0))
    trial.check(max(gaps) <= TOLERANCE, f"masked and compact differ by {max(gaps):.1e} ({len(groups)} exact groups)")


def _uneven(trial: Trial, graph: Any, prunable: list[Any], exact: list[Any]) -> None:
    """Cut every group to a different width: sizes that were halved right by chance show here."""
    plan, multiple = uneven(graph, prunable), 1
    try:
        small = sc.compact(graph, plan)
    except sc.SecateurError as error:
        if "multiple of 16 bytes" not in str(error):  # what PyTorch's grouped products ask for
            raise
        multiple = 8
        plan = uneven(graph, prunable, multiple)
        small = sc.compact(graph, plan)
        trial.notes.append("uneven widths rounded to 8: grouped products take no others")
    _other_batch(trial, graph.model, small)
    if exact:
        if len(exact) < len(prunable):
            plan = uneven(graph, exact, multiple)
            small = sc.compact(graph, plan)
        _masked_equals_compact(trial, graph, exact, plan, small)


def _again(trial: Trial, small: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Cut the small model once more, as iterative pruning does."""
    graph = sc.trace(small, example(small, args, kwargs))
    groups = [g for g in graph.groups if g.prunable]
    if not groups:
        return
    smaller = sc.compact(graph, half(graph, groups))
    _other_batch(trial, small, smaller)
    exact = [g for g in groups if g.exact]
    if exact:
        plan = half(graph, exact)
        _masked_equals_compact(trial, graph, exact, plan, sc.compact(graph, plan))


def _gaps_in_double(
    trial: Trial, model: nn.Module, small: nn.Module, feeds: list[Any], single: list[float]
) -> list[float]:
    try:
        a, b = wide(model), wide(small)
        return [distance(outputs(a, *widen(feed)), outputs(b, *widen(feed))) for feed in feeds]
    except Exception as error:
        trial.notes.append(f"not judged in float64: {type(error).__name__}: {error}"[:160])
        return single


def reloaded(case: Case, folder: Path) -> dict[str, str]:
    """Load what ``judge`` left in ``folder`` (in another process) and compare; returns the changes to its row.

    First by the name in the file alone, then onto a dense model built by the case.
    """
    path = folder / "small.safetensors"
    if not path.exists():
        return {}
    try:
        way = "by name"
        try:
            small = sc.load(path)
        except sc.SecateurError:
            way = "onto the dense model"
            small = sc.load(path, model=case.model())
        want = torch.load(folder / "outputs.pt", weights_only=True)
        gap = max(distance(w, outputs(small, *case.feed(b))) for w, b in zip(want, case.batches, strict=True))
        if gap > 1e-6:
            return {"status": "wrong", "reason": f"loaded ({way}) outputs differ by {gap:.1e}", "loaded": way}
        return {"loaded": way}
    except Exception as error:
        return {"status": "error", "reason": f"load: {type(error).__name__}: {error}"[:400]}
