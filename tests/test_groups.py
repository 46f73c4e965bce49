"""Classes of cells against naive sets; units into groups: names, kinds, exactness, reasons, sites."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph.cells import FIXED, Cells
from secateur.types import Graph, PlanError


class Naive:
    """The obvious slow reference: a set per class, facts as sets of reasons."""

    def __init__(self) -> None:
        self.of: list[set[int]] = []
        self.frozen: set[int] = set()
        self.inexact: set[int] = set()

    def fresh(self, n: int) -> None:
        self.of += [{len(self.of) + k} for k in range(n)]

    def union(self, a: int, b: int) -> None:
        if a >= 0 and b >= 0 and self.of[a] is not self.of[b]:
            both = self.of[a] | self.of[b]
            for k in both:
                self.of[k] = both


@pytest.mark.parametrize("seed", range(40))
def test_union_find_is_a_partition_of_sets(seed: int) -> None:
    rng = random.Random(seed)
    cells, naive = Cells(), Naive()
    for _ in range(rng.randint(2, 12)):
        n = rng.randint(1, 700)
        cells.fresh(n)
        naive.fresh(n)
        for _ in range(rng.randint(0, 3)):
            k = rng.randint(1, 40)
            a, b = (np.array([rng.randrange(-1, cells.count) for _ in range(k)]) for _ in range(2))
            cells.union(a, b)
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                naive.union(x, y)
            mark = np.array([rng.randrange(-1, cells.count) for _ in range(2)])
            if rng.random() < 0.5:
                cells.freeze(mark, f"reason {rng.random()}")
                naive.frozen |= {int(m) for m in mark if m >= 0}
            else:
                cells.mix(mark, "mixed")
                naive.inexact |= {int(m) for m in mark if m >= 0}
    roots = cells.find(np.arange(cells.count))
    for k, members in enumerate(naive.of):
        assert roots[k] == min(members)
        assert bool(cells.frozen[roots[k]]) == bool(members & naive.frozen)
        assert bool(cells.inexact[roots[k]]) == bool(members & naive.inexact)
    assert np.array_equal(cells.find(np.array([FIXED, 0])), [FIXED, roots[0]])


def test_the_first_reason_stays_and_wins_by_age_when_classes_meet() -> None:
    cells = Cells()
    ids = cells.fresh(3)
    cells.freeze(ids[:1], "first")
    cells.freeze(ids[:1], "second")
    assert cells.reasons[cells.frozen[ids[0]]] == "first"
    cells.union(ids[:2], ids[1:])
    assert cells.is_frozen(ids).all()


class Net(nn.Module):
    """A residual stage, a head over attention, a layer norm, tied and fixed parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.three, self.four = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.mix = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.stem(x)))
        h = h + self.two(F.relu(self.one(h)))
        h = h + self.four(F.relu(self.three(h)))
        t = self.mix(h.flatten(2).mT)
        t = t + self.attention(t, t, t)[0]
        return self.last(t.mean(1))


def graph() -> Graph:
    torch.manual_seed(0)
    return sc.trace(Net(), torch.rand(1, 3, 5, 5))


def test_groups_of_a_network() -> None:
    rows = [(g.name, g.units, g.granularity, g.exact, g.frozen) for g in graph().groups if g.name != "stem#2"]
    assert rows == [
        ("stem", 8, "channel", False, None),
        ("one", 4, "channel", True, None),
        ("three", 4, "channel", True, None),
        ("attention.in_proj_weight", 2, "head", True, None),
        ("last", 5, "neuron", True, "output of the model (axis 1)"),
    ]
    assert "layer_norm in mix" in graph().group("stem").why_inexact


def test_members_with_roles() -> None:
    members = [(m.tensor, m.axis, m.role) for m in graph().group("stem").members]
    assert members == [
        ("stem.weight", 0, "out"), ("stem.bias", 0, "along"), ("norm.weight", 0, "along"), ("norm.bias", 0, "along"),
        ("one.weight", 1, "in"), ("two.weight", 0, "out"), ("two.bias", 0, "along"), ("three.weight", 1, "in"),
        ("four.weight", 0, "out"), ("four.bias", 0, "along"), ("mix.weight", 0, "along"), ("mix.bias", 0, "along"),
        ("attention.in_proj_weight", 1, "in"), ("attention.out_proj.weight", 0, "out"),
        ("attention.out_proj.bias", 0, "along"), ("last.weight", 1, "in"),
        ("norm.running_mean", 0, "along"), ("norm.running_var", 0, "along"),
    ]  # fmt: skip


def test_heads_take_their_rows_of_all_projections() -> None:
    group = graph().group("attention.in_proj_weight")
    index = {(m.tensor, m.axis): m.index.tolist() for m in group.members}
    rows = [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]]
    assert index == {
        ("attention.in_proj_weight", 0): rows,
        ("attention.in_proj_bias", 0): rows,
        ("attention.out_proj.weight", 1): [[0, 1, 2, 3], [4, 5, 6, 7]],
    }


def test_equal_structures_have_equal_signatures() -> None:
    found = graph()
    assert found.group("one").signature == found.group("three").signature
    assert len({g.signature for g in found.groups if g.prunable}) == 3


def test_sites_are_the_inputs_of_the_modules_that_consume_the_units() -> None:
    found = graph()
    sites = {g.name: [(s.module, s.arg, s.axis) for s in g.sites] for g in found.groups if g.prunable}
    assert sites["one"] == [("two", 0, 1)]
    assert ("three", 0, 1) in sites["stem"]
    assert ("last", 0, 1) in sites["stem"]
    assert ("two", 0, 1) not in sites["stem"]


def test_sites_read_the_values_of_the_units() -> None:
    net, x, seen = Net().eval(), torch.rand(2, 3, 5, 5), {}
    found = sc.trace(net, x)
    (site,) = found.group("one").sites
    net.get_submodule(site.module).register_forward_pre_hook(lambda m, args: seen.update(value=args[site.arg]))
    net(x)
    with torch.no_grad():
        wanted = F.relu(net.one(F.relu(net.norm(net.stem(x)))))
    read = seen["value"].index_select(site.axis, torch.from_numpy(site.index.ravel()))
    torch.testing.assert_close(read, wanted)


def test_the_table_for_people() -> None:
    text = str(graph()).splitlines()
    assert "5 groups" in text[0] or "6 groups" in text[0]
    assert "4 prunable with 18 units" in text[0]
    line = next(row for row in text if row.startswith("last "))
    assert line.endswith("output of the model (axis 1)")
    assert " 5 " in line


def test_unknown_names_get_the_nearest_ones() -> None:
    with pytest.raises(PlanError, match="no group is called 'thre'; nearest: three"):
        graph().group("thre")


def test_values_of_a_group_are_plain_python() -> None:
    for group in graph().groups:
        assert type(group.exact) is bool
        assert type(group.units) is int
        assert type(group.offset) is int
        assert group.frozen is None or type(group.frozen) is str


class Unread(nn.Module):
    """Computes a mean and a side branch that nobody reads."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.a, self.side, self.b, self.read = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 2), read

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        mean, _ = h.mean(1, keepdim=True), self.side(h)
        return self.b(h + mean if self.read else h)


def test_results_that_nobody_reads_must_fit_but_do_not_mix() -> None:
    x = torch.rand(2, 3)
    assert not sc.trace(Unread(True), x).group("a").exact
    found = sc.trace(Unread(False), x)
    group = found.group("a")
    assert group.exact
    assert ("side.weight", 1) in {(m.tensor, m.axis) for m in group.members}
    sc.compact(found, sc.Plan(found.fingerprint, (("a", 6, (1, 4)),)))(x)


def test_parts_of_an_axis_with_other_uses_are_other_groups() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.c(self.b(h[:, :2]) + h[:, 2:])

    rows = [(g.name, g.units, [(m.tensor, m.index.ravel().tolist()) for m in g.members]) for g in
            sc.trace(Parts(), torch.rand(1, 3)).groups if g.prunable]  # fmt: skip
    assert rows == [
        ("a", 2, [("a.weight", [0, 1]), ("a.bias", [0, 1]), ("b.weight", [0, 1])]),
        ("a#2", 4, [
            ("a.weight", [2, 3, 4, 5]), ("a.bias", [2, 3, 4, 5]), ("b.weight", [0, 1, 2, 3]), ("b.bias", [0, 1, 2, 3]),
            ("c.weight", [0, 1, 2, 3]),
        ]),
    ]  # fmt: skip
