"""Short words for writing LLVM functions: constants, addresses, vectors, loops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32 = ir.FloatType()
PTR, VOID = ir.PointerType(), ir.VoidType()
Value = Any  # llvmlite has no types


class Emit:
    """One function in the making; ``lanes`` is the number of floats in a vector of the target."""

    def __init__(self, module: ir.Module, name: str, args: Sequence[Any], lanes: int, result: Any = VOID) -> None:
        self.module = module
        self.lanes = lanes
        self.function = ir.Function(module, ir.FunctionType(result, args), name)
        self.function.linkage = "internal"
        self.function.attributes.add("nounwind")
        self.function.attributes.add("noinline")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.vector = ir.VectorType(F32, lanes)

    def field(self, desc: Value, index: int) -> Value:
        """Load number ``index`` of a descriptor (an array of int64)."""
        return self.b.load(self.b.gep(desc, [I64(index)], source_etype=I64), typ=I64)

    def at(self, base: Value, offset: Value, size: Any = I8) -> Value:
        """Return the address ``base`` plus ``offset`` elements of type ``size``."""
        return self.b.gep(base, [offset], source_etype=size)

    def get(self, base: Value, index: Value, kind: Any) -> Value:
        """Load element ``index`` of an array of ``kind``."""
        return self.b.load(self.at(base, index, kind), typ=kind)

    def put(self, value: Value, base: Value, index: Value) -> None:
        """Store ``value`` as element ``index`` of an array of its type."""
        self.b.store(value, self.at(base, index, value.type))

    def vload(self, base: Value, index: Value) -> Value:
        """Load a vector that begins at float ``index``; no alignment is asked for."""
        return self.b.load(self.at(base, index, F32), typ=self.vector, align=4)

    def vstore(self, value: Value, base: Value, index: Value) -> None:
        """Store a vector at float ``index``."""
        self.b.store(value, self.at(base, index, F32), align=4)

    def splat(self, scalar: Value) -> Value:
        """Return a vector of copies of ``scalar``."""
        kind = ir.VectorType(scalar.type, self.lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def floats(self, value: float) -> Value:
        """Return a constant vector."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def intrinsic(self, name: str, result: Any, args: Sequence[Value]) -> Value:
        """Call an intrinsic of LLVM, declaring it on first use."""
        known = self.module.globals.get(name)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.b.call(known, args)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """Return a * b + c of vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{self.lanes}f32", self.vector, [a, b, c])

    def prefetch(self, address: Value) -> None:
        """Ask for the cache line at ``address``; any address is allowed."""
        self.intrinsic("llvm.prefetch.p0", VOID, [address, I32(0), I32(3), I32(1)])

    def masked(self, value: Value, base: Value, index: Value, bits: Value) -> None:
        """Store the lanes of ``value`` whose bit in the integer ``bits`` is set at float ``index``."""
        self.give(value, base, index, self.bools(bits))

    def give(self, value: Value, base: Value, index: Value, inside: Value) -> None:
        """Store the lanes ``inside``."""
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        self.intrinsic(name, VOID, [value, self.at(base, index, F32), I32(4), inside])

    def take(self, base: Value, index: Value, inside: Value) -> Value:
        """Load the lanes ``inside``, the others are 0; nothing else is read."""
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        return self.intrinsic(name, self.vector, [self.at(base, index, F32), I32(4), inside, self.floats(0.0)])

    def bools(self, bits: Value) -> Value:
        """Return the low bits of an integer as one bool per lane."""
        kind = ir.IntType(self.lanes)
        low = bits if bits.type == kind else self.b.trunc(bits, kind)
        return self.b.bitcast(low, ir.VectorType(I1, self.lanes))

    def sum(self, vector: Value) -> Value:
        """Return the sum of the lanes."""
        kind = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        known = self.module.globals.get(kind)
        if known is None:
            known = ir.Function(self.module, ir.FunctionType(F32, [F32, self.vector]), kind)
        return self.b.call(known, [F32(-0.0), vector], fastmath=("reassoc",))

    @contextlib.contextmanager
    def loop(self, begin: Value, end: Value, step: int, *carried: Value) -> Iterator[tuple[Value, list[Value]]]:
        """Loop an int64 index from ``begin`` while below ``end``; yields it and the ``carried`` values.

        The body replaces items of the list to carry them on; after the loop the list holds the last ones.
        """
        before = self.b.block
        head, body, done = (self.function.append_basic_block(n) for n in ("head", "body", "done"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(begin, before)
        phis = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", index, end), body, done)
        self.b.position_at_end(body)
        values = list(phis)
        yield index, values
        last = self.b.block
        index.add_incoming(self.b.add(index, I64(step)), last)
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, last)
        self.b.branch(head)
        self.b.position_at_end(done)
        values[:] = phis
