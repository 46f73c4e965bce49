"""Several threads on one convolution: whoever is free claims the next eight outputs.

The caller publishes a job and works on it like everybody else, so a helper that comes late, or never, costs nothing.
A ticket is one word, (number of the job, chunks, next chunk): a claim is one compare-and-swap of it, and the job
cannot change under a claimed chunk, because the caller waits until all chunks are done.
"""

from __future__ import annotations

from llvmlite import ir

from secateur.runtime.engine.emit import I64, PTR, Emit, Value

# words of the head of the workspace
HELPED, TICKET, DONE, STOP, JOB, LENGTH, BEGIN, END = range(3, 11)
HEAD = 128  # bytes
CHUNK = 8  # outputs
BITS = 16  # of each of chunks and next chunk in a ticket


def _word(e: Emit, ws: Value, number: int) -> Value:
    return e.at(ws, I64(number), I64)


def _load(e: Emit, ws: Value, number: int) -> Value:
    return e.b.load_atomic(_word(e, ws, number), "acquire", 8, typ=I64)


def _store(e: Emit, ws: Value, number: int, value: Value) -> None:
    e.b.atomic_rmw("xchg", _word(e, ws, number), value, "release")  # llvmlite stores atomically to typed pointers only


def _rest(e: Emit) -> None:
    """Tell the processor that this is a spin."""
    e.intrinsic("llvm.x86.sse2.pause", ir.VoidType(), [])


def _claim(e: Emit, ws: Value, cover: ir.Function) -> Value:
    """Try to claim one chunk and work on it; returns whether there was one (or another thread was faster)."""
    ticket = _load(e, ws, TICKET)
    chunks = e.b.and_(e.b.lshr(ticket, I64(BITS)), I64(2**BITS - 1))
    chunk = e.b.and_(ticket, I64(2**BITS - 1))
    there = e.b.icmp_unsigned("<", chunk, chunks)
    with e.b.if_then(there):
        swap = e.b.cmpxchg(_word(e, ws, TICKET), ticket, e.b.add(ticket, I64(1)), "acq_rel", "acquire")
        with e.b.if_then(e.b.extract_value(swap, 1)):
            desc = e.b.inttoptr(_load(e, ws, JOB), PTR)
            begin = e.b.add(_load(e, ws, BEGIN), e.b.mul(chunk, I64(CHUNK)))
            limit, far = _load(e, ws, END), e.b.add(begin, I64(CHUNK))
            end = e.b.select(e.b.icmp_signed("<", far, limit), far, limit)
            e.b.call(cover, [desc, ws, _load(e, ws, LENGTH), begin, end])
            e.b.atomic_rmw("add", _word(e, ws, DONE), I64(1), "acq_rel")
    return there


def _while(e: Emit, again: Value, body: ir.Block, after: ir.Block) -> None:
    e.b.cbranch(again, body, after)
    e.b.position_at_end(after)


def share(e: Emit, ws: Value, job: tuple[Value, Value, Value, Value], cover: ir.Function) -> None:
    """Do ``cover`` of (descriptor, length, begin, end), together with helpers if the caller has some."""
    desc, length, begin, end = job
    helped = e.b.icmp_signed("!=", e.get(ws, I64(HELPED), I64), I64(0))
    with e.b.if_else(helped) as (together, alone):
        with alone:
            e.b.call(cover, [desc, ws, length, begin, end])
        with together:
            chunks = e.b.sdiv(e.b.add(e.b.sub(end, begin), I64(CHUNK - 1)), I64(CHUNK))
            number = e.b.add(e.b.lshr(_load(e, ws, TICKET), I64(2 * BITS)), I64(1))
            for word, value in ((JOB, e.b.ptrtoint(desc, I64)), (LENGTH, length), (BEGIN, begin), (END, end)):
                _store(e, ws, word, value)
            _store(e, ws, DONE, I64(0))
            _store(e, ws, TICKET, e.b.or_(e.b.shl(number, I64(2 * BITS)), e.b.shl(chunks, I64(BITS))))
            work, wait, over = (e.function.append_basic_block(n) for n in ("work", "wait", "over"))
            e.b.branch(work)
            e.b.position_at_end(work)
            _while(e, _claim(e, ws, cover), work, wait)
            _rest(e)
            _while(e, e.b.icmp_signed("<", _load(e, ws, DONE), chunks), wait, over)


def helper(module: ir.Module, lanes: int, cover: ir.Function) -> ir.Function:
    """Write ``help(workspace)``: claim chunks until the caller says stop."""
    e = Emit(module, "help", [PTR], lanes)
    e.function.linkage = "external"
    (ws,) = e.function.args
    look, over = e.function.append_basic_block("look"), e.function.append_basic_block("over")
    e.b.branch(look)
    e.b.position_at_end(look)
    there = _claim(e, ws, cover)
    with e.b.if_then(e.b.not_(there)):
        _rest(e)
    stop = e.b.icmp_signed("!=", _load(e, ws, STOP), I64(0))
    _while(e, e.b.not_(stop), look, over)
    e.b.ret_void()
    return e.function
