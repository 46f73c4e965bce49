"""The end of a run: measure the dense and the pruned model side by side, and write the files that ship."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import choosing, gating, runtime, steering
from secateur.checkpoint import save
from secateur.folder import DENSE, GATED, PLAN, PROOF, PRUNED, RECORDS, REPORT
from secateur.masking import compacted, proved, told, unmasked
from secateur.measure.latency import compare, describe, race
from secateur.measure.summary import layers, table
from secateur.pictures import show
from secateur.report import render
from secateur.session import Run, costs, passport, traced
from secateur.track.local import read
from secateur.train.resume import atomic_write
from secateur.types import Check, Measurement, Proof

CLOCKED = ("ms", "times")  # units of what a clock measured: never twice the same, so not in the file that ships
SUMMARIES = {"dense": "model_summary.txt", "pruned": "pruned_model_summary.txt"}


def finish(run: Run, model: nn.Module) -> None:
    """Measure, save and report.  This is the one place that reads the test set.

    Several processes divide the images; then the first one goes on alone, so that nothing disturbs the latencies.
    """
    for name, units, kept in run.plan.keep:
        run.screen.line(f"group {name}: {units - len(kept)} of {units} units removed ({1 - len(kept) / units:.1%})")
    run.screen.line("measuring ...")
    gated = None if run.recipe.fbs is None and run.recipe.rnp is None else model
    model = model if gated is None else gating.ungated(run)
    models = {"dense": run.dense.model, "pruned": model}
    found: dict[str, list[Measurement]] = {name: _measured(run, net) for name, net in models.items()}
    if gated is not None:
        found["gated"] = _gated(run, gated)
    densities = [] if run.recipe.fbs is None else gating.tested(run)
    budgets = [] if run.recipe.rnp is None else steering.tested(run, model if gated is None else gated)
    run.team.dissolve()
    if not run.team.lead:
        return
    warnings: list[str] = []
    for size in run.recipe.measure.batch_sizes:
        inputs, repeats = _inputs(run, size), run.recipe.measure.repeats
        dense, pruned, gain = compare(models["dense"], models["pruned"], inputs, repeats=repeats)
        found["dense"].append(dense)
        found["pruned"] += [pruned, gain]
        if gain.value <= 1 and run.targets:
            warnings.append(
                f"NOT FASTER: at batch {size} the pruned model takes {pruned.value:.3f} ms, the dense one "
                f"{dense.value:.3f} ms ({gain.value:.2f} times its speed)."
            )
    if run.masking:
        warnings += told(run, model)
        compacted(run, model, passport(run.recipe, run.data))
    if gated is not None:
        save(gated, run.folder / GATED, recipe=run.recipe.hash, extra=passport(run.recipe, run.data))
        found["gated"] += [_size(run.folder / GATED), *_clocked(run, gated, warnings)]
    _save(run, model, [row for row in found["pruned"] if row.unit not in CLOCKED])
    for name in models:
        path = run.folder / {"dense": DENSE, "pruned": PRUNED}[name]
        found[name].append(_size(path))
    show(run, models)
    rows = {name: layers(net, run.example[:1]) for name, net in models.items()}
    for name, net in models.items():
        text = table(rows[name], costs(traced(net, run.data)))
        atomic_write(run.folder / SUMMARIES[name], text.encode())
    run.log.append(
        "measure",
        measurements={name: [asdict(m) for m in items] for name, items in found.items()},
        layers={name: [asdict(row) for row in items] for name, items in rows.items()},
        warnings=warnings,
        densities=densities,
        budgets=budgets,
    )
    atomic_write(run.folder / REPORT, render(read(run.folder / RECORDS)).encode())


def _measured(run: Run, model: nn.Module) -> list[Measurement]:
    """Return quality on validation and test images, parameters and multiply-accumulates."""
    device = describe(run.example.device)
    found = [row for part in ("validation", "test") for row in run.quality(model, part).measurements(device, part)]
    how = {"params": "counted from the traced graph", "macs": "counted from the traced graph, one image"}
    counted = costs(traced(model, run.data)).items()
    found += [Measurement(name, value, name, 1, 0.0, device, how[name]) for name, value in counted]
    return found + (unmasked(run, model) if run.masking else [])


def _gated(run: Run, model: nn.Module) -> list[Measurement]:
    """Return quality and multiply-accumulates of the gated model, per density of its schedule and of its end."""
    device = describe(run.example.device)
    found = [row for part in ("validation", "test") for row in run.quality(model, part).measurements(device, part)]
    counted = choosing.tell(run, model).macs
    how = "counted per image from the choices of the gates, mean over the test images; predictors not counted"
    params = sum(parameter.numel() for parameter in model.parameters())
    return [
        *found,
        Measurement("params", params, "params", 1, 0.0, device, "counted, predictors included"),
        Measurement("macs", float(counted.mean()), "macs", len(counted), float(counted.std()), device, how),
    ]


def _clocked(run: Run, model: nn.Module, warnings: list[str]) -> list[Measurement]:
    """Return the latencies of the gated model, run as fast as it can be here, and its speed-ups over the dense one."""
    rows: list[Measurement] = []
    for size in run.recipe.measure.batch_sizes:
        inputs = _inputs(run, size)
        fast = runtime.compile(model, inputs, threads=torch.get_num_threads())
        times, gains = race(
            {"dense": run.dense.model, "gated": fast}, inputs, {"dense"}, repeats=run.recipe.measure.repeats
        )
        taken, gain = times["gated"], gains["gated"]
        rows += [replace(row, how=f"by {fast.layer}; {row.how}") for row in (taken, gain)]
        if gain.value <= 1:
            others = "; ".join(f"not {layer}: {why}" for layer, why in fast.why.items())
            warnings.append(
                f"NOT FASTER: at batch {size} the gated model takes {taken.value:.3f} ms by {fast.layer}, "
                f"{gain.value:.2f} times the speed of the dense one{f' ({others})' if others else ''}."
            )
    return rows


def _inputs(run: Run, size: int) -> torch.Tensor:
    """Return ``size`` training images (repeated where there are fewer)."""
    indices = run.data.train
    return run.data.batch(indices[torch.arange(size) % len(indices)])[0]


def _size(path: Path) -> Measurement:
    return Measurement("file", path.stat().st_size, "bytes", 1, 0.0, "disk", f"size of {path.name}")


def _save(run: Run, model: nn.Module, measurements: list[Measurement]) -> None:
    """Write the plan, the proof and the pruned checkpoint."""
    records = read(run.folder / RECORDS)
    kept = next((record.data["back_to"] for record in records if record.stage == "stopped"), None)
    cuts = [record.data for record in records if record.stage == "cut"][:kept]
    proof = Proof(tuple(Check(**row) for cut in cuts for row in cut["proof"]))
    if run.masking:
        proof = Proof((*proof.rows, *proved(replace(run.dense, model=model), run.plan, "held").rows))
    rows: Mapping[str, Any] = {"ok": proof.ok, "rows": [asdict(row) for row in proof.rows]}
    atomic_write(run.folder / PLAN, run.plan.to_json().encode())
    atomic_write(run.folder / PROOF, json.dumps(rows, indent=1).encode())
    save(
        model,
        run.folder / PRUNED,
        plan=run.plan,
        proof=proof,
        measurements=measurements,
        recipe=run.recipe.hash,
        extra=passport(run.recipe, run.data),
    )
