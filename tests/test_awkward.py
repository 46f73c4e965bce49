"""Every awkward network: cut or frozen with the reason, proved, trained, saved and loaded; never wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from benchmarks.judging import isolate
from benchmarks.judging.judge import example, half, judge, reloaded
from benchmarks.suites import find
from benchmarks.suites.awkward import CASES
from torch import nn

import secateur as sc

SAMPLE = ("Conv3d", "LSTM", "PackedThreeHeadsDim", "ShuffleUnit", "TiedEmbedding", "LayerNormHardCoded")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_awkward(case, tmp_path):
    row = judge(case, tmp_path)
    allowed = {True: ("right",), False: ("frozen",), None: ("right", "frozen")}[case.cut_expected]
    assert row["status"] in allowed, row
    assert reloaded(case, tmp_path).get("status", "right") == "right"


def test_names_are_unique_and_most_can_be_cut():
    assert max(Counter(case.name for case in CASES).values()) == 1
    assert len(CASES) >= 120
    assert sum(case.cut_expected is True for case in CASES) >= 0.85 * len(CASES)


@pytest.mark.filterwarnings("ignore")
def test_the_rules_know_nearly_everything():
    """The trial cut is the last resort: groups that it freezes here would be wrong without it."""
    frozen = {}
    for case in CASES:
        model, args, kwargs = case.build()
        for group in sc.trace(model, example(model, args, kwargs)).groups:
            if "in a trial cut" in (group.frozen or ""):
                frozen[case.name] = group.frozen
    assert set(frozen) == {"AssertedWidth", "WidthLimit"}, frozen


def _in_another_process(name, folder):
    from pathlib import Path

    return reloaded(find("awkward", name), Path(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_loads_in_a_new_process(name, tmp_path):
    assert judge(find("awkward", name), tmp_path)["status"] == "right"
    answer = isolate.isolated(_in_another_process, name, str(tmp_path), timeout=120, memory=8)
    assert answer.get("status", "right") == "right", answer


class Deaf(nn.Module):
    """A chain of two convolutions, so that the judge's own alarms can be tried."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


ALARMS = {
    "none": "",
    "weights": "masked and compact differ by",
    "gradient": "no gradient after the cut for a.weight",
    "proof": "1 proofs for 2 groups",
    "mask": "the dense model was changed: a.weight",
    "batch": "output shapes differ at batch",
    "reason": "layers neither cut nor frozen with a reason",
}


@pytest.mark.parametrize("damage", ALARMS)
def test_the_judge_notices(damage, tmp_path, monkeypatch):
    """Each alarm of the judge goes off when the thing that it watches is broken."""
    from benchmarks.suites.case import Case

    compact, trace, verify = sc.compact, sc.trace, sc.verify
    case = Case("awkward", "Deaf", Deaf, lambda n: torch.randn(n, 3, 4, 4))

    def broken_compact(graph, plan):
        small = compact(graph, plan)
        if damage == "weights":
            with torch.no_grad():
                small.c.weight += 0.1
        elif damage == "gradient":
            small.a.weight.requires_grad_(False)
        elif damage == "mask":
            with torch.no_grad():
                graph.model.a.weight[0] += 0.1
        elif damage == "batch":
            small.register_forward_hook(lambda m, args, out: out[:2])
        return small

    def broken_verify(graph, **options):
        proof = verify(graph, **options)
        return type(proof)(proof.rows[:-1]) if damage == "proof" else proof

    def broken_trace(model, inputs):
        graph = trace(model, inputs)
        if damage == "reason":
            graph = replace(graph, groups=tuple(replace(g, frozen="") for g in graph.groups))
        return graph

    monkeypatch.setattr("benchmarks.judging.judge.sc", _Stand(broken_compact, broken_trace, broken_verify))
    row = judge(case)
    assert row["status"] == ("wrong" if ALARMS[damage] else "right"), row
    assert ALARMS[damage] in row["reason"]


class _Stand:
    """secateur with three functions replaced."""

    def __init__(self, compact, trace, verify):
        self.compact, self.trace, self.verify = compact, trace, verify

    def __getattr__(self, name):
        return getattr(sc, name)


def test_half_keeps_half():
    model = Deaf()
    graph = sc.trace(model, torch.randn(1, 3, 4, 4))
    groups = [g for g in graph.groups if g.prunable]
    assert [len(kept) for _, _, kept in half(graph, groups).keep] == [4, 4]
