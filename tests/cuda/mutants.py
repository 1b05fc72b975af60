"""`python -m tests.cuda.mutants [WORD ...]`: does the test in C notice when the helper for GPUs does something else?

Each mutant is a change of the text of `native/cuda.h`; the test runs over the fake driver with AddressSanitizer. Prints
which were found, for docs/gpu.md; ends with 1 where one was not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.cuda.build import NATIVE, run_helper

HEADER = NATIVE / "cuda.h"


class Mutant(NamedTuple):
    """`old` is there once."""

    name: str
    old: str
    new: str


MUTANTS = (
    Mutant("the engine is not waited for", "    result = lane_await_mark(lane, plan, progress);\n", ""),
    Mutant(
        "an error while waiting for the engine is nothing",
        'return code == CUDA_NOT_READY ? 0 : cuda_said(lane->cuda, code, "cuEventQuery");',
        "(void)code;\n    return 0;",
    ),
    Mutant(
        "a stop waits for the engine",
        "== CUDA_NOT_READY &&\n           !__atomic_load_n(&plan->control[1], __ATOMIC_SEQ_CST)) {",
        "== CUDA_NOT_READY) {",
    ),
    Mutant(
        "the mark is recorded on the default stream",
        "call.event_record(mark->event, engine)",
        "call.event_record(mark->event, NULL)",
    ),
    Mutant("a graph that is captured is marked", "        capturing) {", "        capturing && 0) {"),
    Mutant("after a failure nobody waits", "lane->dead = lane_drain(lane, plan->control) != 0;", "count = 0;"),
    Mutant(
        "a lost context is not noticed",
        "lane->dead = lane_drain(lane, plan->control) != 0;",
        "lane_drain(lane, plan->control);",
    ),
    Mutant("a refused chunk counts", "&& !flying[i].refused; i++)", "; i++)"),
    Mutant(
        "the last chunk is not waited for",
        "        if (!count) {\n            break;",
        "        if (over) {\n            break;",
    ),
    Mutant("what is with the device counts as copied", "done = flying[0].blocks;", "done = cursor.block;"),
    Mutant(
        "a stop is not seen",
        "over || cursor.block >= plan->blocks || __atomic_load_n(&plan->control[1], __ATOMIC_SEQ_CST);",
        "over || cursor.block >= plan->blocks;",
    ),
    Mutant(
        "giving up is not seen",
        "        if (__atomic_load_n(&control[1], __ATOMIC_SEQ_CST) == 2) {\n            return cuda_fail",
        "        if (0) {\n            return cuda_fail",
    ),
    Mutant("a lane that gave up goes on", "    if (lane->dead) {\n        return", "    if (0) {\n        return"),
    Mutant("three chunks are with the device", "enum { DEPTH = 2, EVENTS", "enum { DEPTH = 3, EVENTS"),
    Mutant("one chunk is with the device", "(over || count == DEPTH)", "(over || count == 1)"),
    Mutant("a chunk's bytes are not counted", "        left -= size;\n", ""),
    Mutant(
        "what is left of a row is forgotten",
        "cursor->offset = size == rest ? 0 : cursor->offset + size;\n            rows = size == rest;",
        "rows = 1;",
    ),
    Mutant("graphs of others are spoiled", "int mode = CAPTURE_RELAXED;", "int mode = 0;"),
    Mutant("pinned for one device", "PIN_PORTABLE | PIN_DEVICEMAP),", "PIN_DEVICEMAP),"),
    Mutant(
        "what was pinned before a failure stays",
        "            cuda_unpin(cuda, address);\n            return result;",
        "            return result;",
    ),
    Mutant("other addresses of the device are not noticed", "if (!result && alias != address + at) {", "if (0) {"),
    Mutant(
        "rows run across pieces of pinned memory",
        "lane->src[n - 1] + lane->size[n - 1] == src &&\n        (host - plan->pinned) % plan->piece)",
        "lane->src[n - 1] + lane->size[n - 1] == src)",
    ),
    Mutant(
        "rows of a rectangle are forgotten", "        cursor->plane += rows;", "        cursor->plane = plan->planes;"
    ),
    Mutant(
        "rows that are not evenly spaced are a rectangle",
        "        if (address[p] - address[p - 1] != pitch || row_bytes[p] != row_bytes[0] || stride[p] != stride[0]) {",
        "        if (row_bytes[p] != row_bytes[0] && stride[p] != stride[0] && 0) {",
    ),
    Mutant("more operations than a stream takes", "&& operations < OPERATIONS) {", ") {"),
    Mutant("slots are mixed up", "plan->dst_slots[cursor->block] *", "plan->src_slots[cursor->block] *"),
    Mutant(
        "a call that is full is forgotten", "lane->count == DESCRIPTORS ? lane_flush(lane, stream, progress) : 0", "0"
    ),
    Mutant("a batch may take multiprocessors", ".flags = PREFER_OVERLAP", ".flags = 0"),
    Mutant("streams wait for the default one", 'STREAM_NON_BLOCKING), "cuStreamCreate"', '0), "cuStreamCreate"'),
    Mutant("a child goes on", "    if (getpid() != cuda->process) {", "    if (0) {"),
    Mutant("the engine's thread gets another context", "    if (visit->changed) {", "    if (0) {"),
    Mutant(
        "a checksum is of the block before",
        "        plan->sums[i] = xxh3_end(&sum);",
        "        plan->sums[i ? i - 1 : 0] = xxh3_end(&sum);",
    ),
    Mutant(
        "the last blocks have no checksum",
        "        if (plan->sums && !result) {",
        "        if (plan->sums && !result && !over) {",
    ),
    Mutant(
        "chunks stay as long as the first",
        "    double bytes = CHUNK_NS / lane->ns_per_byte;",
        "    double bytes = CHUNK_FIRST;",
    ),
    Mutant(
        "chunks do not take turns on two streams",
        "cuda_stream stream = lane->streams[lane->sent & 1];",
        "cuda_stream stream = lane->streams[0];",
    ),
)


def main() -> int:
    words, text, missed = sys.argv[1:], HEADER.read_text(), []
    for mutant in MUTANTS:
        assert text.count(mutant.old) == 1, f"{mutant.name}: its text is there {text.count(mutant.old)} times"
    control, said = run_helper(13000, "address", 0.5)
    assert control == 0, said
    for mutant in MUTANTS:
        if words and not all(word in mutant.name for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            header = Path(folder) / "cuda.h"
            header.write_text(text.replace(mutant.old, mutant.new))
            status, _ = run_helper(13000, "address", 0.5, header)
        print("found " if status else "MISSED", mutant.name, flush=True)
        missed += [] if status else [mutant.name]
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
