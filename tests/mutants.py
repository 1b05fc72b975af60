"""`python -m tests.mutants [NAME ...]`: does anything notice when the leader or a tier decides otherwise?

Each mutant is a change of the text of the package, applied to a copy. Of each it is said from which histories on the
decision log is another one, and which test fails, of the files that concern it, without the log. Prints a table for
docs/proof.md; ends with 1 where a mutant is noticed by neither.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/kvbm")
STAGES = (100, 1000)
"""Histories that are tried, until the log is another one."""


class Mutant(NamedTuple):
    """`old` is there once; `tests` are what is run without the log."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    # What a change of the house could bring in.
    Mutant(
        "a block is registered before the last rank answered", "link/tally.py",
        "        return not self.ranks\n", "        return True\n", "leader/test_leader tiers/test_demote",
    ),
    Mutant(
        "checksums of what lands are noted after registering", "tiers/host.py",
        "        for listener in self._listeners:\n            listener.landing(staged.slots, staged.keys, how)\n"
        "        if how.priority:\n            staged.raise_to(how.priority)\n        there = staged.register(done)\n",
        "        into, keys = staged.slots, staged.keys\n"
        "        if how.priority:\n            staged.raise_to(how.priority)\n        there = staged.register(done)\n"
        "        for listener in self._listeners:\n            listener.landing(into, keys, how)\n",
        "tiers/test_host leader/test_leader tiers/test_promote tiers/peers/test_whole",
    ),
    Mutant(
        "a source's lease is dropped before a cancelled read ended", "tiers/promote.py",
        "        if not staging.left and staging.kept:\n", "        if staging.kept:\n",
        "tiers/test_promote tiers/test_lower_machine",
    ),
    Mutant(
        "slots are used again before a cancelled read ended", "tiers/moves.py",
        "            self.tell(Cancel(live))\n",
        "            self.tell(Cancel(live))\n"
        "            for job in live:\n"
        "                for rank in self.links:\n"
        "                    self.answer(Result(job, rank, b'', 0, 0.0, CANCELLED))\n",
        "tiers/test_promote tiers/disk/test_tier tiers/test_lower_machine",
    ),
    Mutant(
        "a clear lets what is being read go on, and be published", "tiers/stack.py",
        "        self.promotion.clear()\n        for tier in self:\n            tier.clear(lasting=False)\n",
        "        for tier in self:\n            tier.clear(lasting=False)\n",
        "tiers/test_promote tiers/disk/test_tier tiers/test_lower_machine",
    ),
    Mutant(
        "a clear lets a running move publish", "blocks/transitions.py",
        "        if terms.generation != self._generation:\n", "        if False:\n",
        "blocks/test_leases blocks/test_machine leader/test_leader tiers/test_demote tiers/test_promote",
    ),
    Mutant(
        "what was allocated before a clear is waited for", "blocks/ledger.py",
        "            current = terms.generation == self._generation\n", "            current = True\n",
        "blocks/test_leases blocks/test_machine blocks/test_load leader/test_leader",
    ),
    Mutant(
        "what is read ahead counts as 0 in the gate", "tiers/promote.py",
        "        ahead = sum(other.left for other in before if other.offer.queue is offer.queue)\n",
        "        ahead = 0\n", "tiers/test_promote tiers/test_gate",
    ),
    Mutant(
        "leaf and root are exchanged where a request ends", "leader/leader.py",
        "            self.core.pool.touch(blocks := self._coverage.in_order(request))\n",
        "            self.core.pool.touch([*reversed(blocks := self._coverage.in_order(request))])\n",
        "leader/test_endings leader/test_leader",
    ),
    Mutant(
        "leaf and root are exchanged on disk", "tiers/disk/side.py",
        "        self.pool.touch(keys)\n\n    # ----", "        self.pool.touch([*reversed(keys)])\n\n    # ----",
        "tiers/test_demote tiers/disk/test_tier",
    ),
    Mutant(
        "an exclusive landing tells the disk to forget", "tiers/disk/side.py",
        "            self.pool.discard(keys)\n", "            self.tier.discard(keys)\n",
        "tiers/test_promote tiers/test_demote",
    ),
    Mutant(
        "demotion while KVBM stands aside", "leader/core.py",
        "            stack.stand_aside()\n\n    @contextmanager",
        "            stack.stand_aside()\n"
        "            for tier in stack:\n"
        "                tier.pump()\n\n    @contextmanager",
        "tiers/test_demote tiers/test_promote",
    ),
    # The leader.
    Mutant(
        "two requests load the same blocks at once", "leader/requests.py",
        "        return None if owner == request.id else owner\n", "        return None\n", "leader/test_leader",
    ),
    Mutant(
        "holds are not bounded", "leader/core.py",
        "        return Room(max(1, int(self.pool.total * self.limits.share)), self.held)\n",
        "        return Room(self.pool.total, self.held)\n",
        "leader/test_leader tiers/test_promote",
    ),
    Mutant(
        "what could not be loaded stays published", "leader/core.py",
        "zip(hold.keys, wrong.tolist(), strict=True) if bad)\n",
        "zip(hold.keys, wrong.tolist(), strict=True) if bad is None)\n", "leader/test_leader",
    ),
    Mutant(
        "a step does not wait for copies of what it overwrites", "leader/leader.py",
        "            self._step.fence |= self.core.overwritten(g1)\n", "            self.core.overwritten(g1)\n",
        "leader/test_leader",
    ),
    Mutant(
        "what was computed before a reset is stored after it", "leader/leader.py",
        "            request.stale = True\n", "            request.stale = False\n",
        "leader/test_leader leader/test_provenance",
    ),
    Mutant(
        "a silent worker is waited for without end", "leader/copies.py",
        "            if job.id <= begun and job.due is None:\n", "            if job.id < 0:\n", "leader/test_leader",
    ),
    Mutant(
        "an answer of an adapter that changed is published", "leader/variants.py",
        "            job.outcomes[job.places >= request.confirmed] = Outcome.FAILED\n", "            pass\n",
        "leader/test_variants leader/test_variants_machine",
    ),
    # The disk, up and down.
    Mutant(
        "a disk that fails is used ten times as long", "tiers/disk/tier.py", "_FAILURES = 3\n", "_FAILURES = 30\n",
        "tiers/disk/test_tier tiers/test_demote",
    ),
    Mutant(
        "the answer to an older probe counts", "tiers/disk/tier.py",
        "        if answer.number != self._number:\n", "        if False:\n", "tiers/disk/test_tier",
    ),
    Mutant(
        "what was given up counts as the disk's failure", "tiers/disk/tier.py",
        "        elif passage.wanted:\n", "        else:\n", "tiers/disk/test_tier tiers/test_promote",
    ),
    Mutant(
        "a new generation leaves what is on disk", "tiers/disk/tier.py",
        "        self._generations.lasting &= lasting\n        self.pool.clear()\n",
        "        self._generations.lasting &= lasting\n",
        "tiers/disk/test_tier tiers/test_lower_machine",
    ),
    Mutant(
        "what was written exclusively stays in G2", "tiers/demote.py",
        "                hold.select(np.flatnonzero(move.done).tolist()).evict()\n", "                hold.drop()\n",
        "tiers/test_demote",
    ),
    Mutant(
        "nothing is refused a write", "tiers/demote.py",
        "        mask = self.rules.admission.admit(tags, ~missing) & missing\n", "        mask = missing.copy()\n",
        "tiers/test_demote",
    ),
    Mutant(
        "a block that could not be read once is lost", "tiers/disk/side.py",
        " and passage.wanted and key in self.failed):\n", " and passage.wanted):\n",
        "tiers/test_promote tiers/disk/test_tier",
    ),
    Mutant(
        "what has arrived is held for a second", "tiers/promote.py", "_KEEP = 30.0\n", "_KEEP = 1.0\n",
        "tiers/test_promote",
    ),
    Mutant(
        "a request waits on after a read failed", "tiers/promote.py",
        "                record.gated = True\n", "                record.gated = False\n", "tiers/test_promote",
    ),
    Mutant(
        "blocks of all layer groups count as whole blocks in the gate", "tiers/gate.py",
        "        computing = self.computing_s(blocks * worth)\n", "        computing = self.computing_s(blocks)\n",
        "tiers/test_gate leader/test_hybrid tiers/test_promote",
    ),
    # Layer groups.
    Mutant(
        "blocks that left the window are offloaded", "leader/groups.py",
        "            least = max(_of(request).passed, group.after(request.computed))\n",
        "            least = _of(request).passed\n", "leader/test_windows",
    ),
    Mutant(
        "what is in G2 already is read first", "leader/groups.py",
        "        order = [] if near.all() else np.argsort(near, kind=\"stable\").tolist()\n",
        "        order = [] if near.all() else [*range(len(near))]\n", "leader/test_hybrid",
    ),
    # Peers.
    Mutant(
        "a promise that is over is read from", "tiers/peers/offer.py",
        "        if self.broken is None and now > self.until:\n", "        if now < 0:\n",
        "tiers/peers/test_promises::test_a_lease_that_is_shorter_than_the_deadline_is_of_use"
        " tiers/peers/test_promises::test_a_promise_that_comes_too_late_is_given_back tiers/peers/test_serving",
    ),
    Mutant(
        "blocks are promised whose checksums are not known", "tiers/peers/serving.py",
        "        hold.narrow(self.sums.known(hold.slots))\n", "", "tiers/peers/test_serving tiers/peers/test_whole",
    ),
    Mutant(
        "what a reader did not fetch is held for ever", "tiers/peers/serving.py",
        "            if now > hold.until:\n", "            if now < 0:\n",
        "tiers/peers/test_failures::test_a_lease_that_nobody_ends_ends",
    ),
    Mutant(
        "memory of a peer that is gone stays attached", "tiers/peers/tier.py",
        "            self._moves.tell(to_rank(Detach(attached)))\n", "            pass\n",
        "tiers/peers/test_failures::test_who_is_gone_is_forgotten",
    ),
)  # fmt: skip


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of those to try; none: all")
    parser.add_argument("--first", type=int, default=0, help="the first to try")
    parser.add_argument("--every", type=int, default=1, help="and every so-manieth after it")
    parser.add_argument("--log", action="store_true", help="the log alone")
    given = parser.parse_args()
    chosen = [each for each in MUTANTS if not given.names or any(name in each.name for name in given.names)]
    unnoticed = 0
    print("| Mutant | In | The log | A test without it |\n| --- | --- | --- | --- |", flush=True)
    for mutant in chosen[given.first :: given.every]:
        with tempfile.TemporaryDirectory() as folder:
            where = _copy(Path(folder), mutant)
            log = _log(where)
            test = None if given.log else _test(where, mutant)
        unnoticed += log is None and test is None
        print(
            f"| {mutant.name} | `{mutant.file}` | {log or 'the same'} | {f'`{test}`' if test else 'none'} |", flush=True
        )
    return 1 if unnoticed else 0


def _copy(folder: Path, mutant: Mutant) -> Path:
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    file = folder / PACKAGE / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.file} has its text {text.count(mutant.old)} times"
    file.write_text(text.replace(mutant.old, mutant.new))
    return folder


def _run(where: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{where / 'src'}:{where}", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(
            [sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "FAILED it hangs", "")


def _log(where: Path) -> str | None:
    """Where the log is another one, if it is."""
    for first, last in zip((0, *STAGES), STAGES, strict=False):
        these = ("--first", str(first), "--histories", str(last - first))
        done = _run(where, "-m", "tests.decisions", *these, "--jobs", "1", "--stop")
        if done.returncode:
            if (raised := re.search(r"history (\d+): (raised \w+)", done.stderr)) is not None:
                return f"history {raised[1]} {raised[2]}"
            found = re.search(r"histories (\d+ to \d+)", done.stdout)
            return f"another, histories {found[1]}" if found else "it hangs"
    return None


def _test(where: Path, mutant: Mutant) -> str | None:
    """The first test that fails, without the log."""
    parts = [each.partition("::") for each in mutant.tests.split()]
    files = [f"tests/{name}.py{separator}{test}" for name, separator, test in parts]
    done = _run(where, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *files)
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    assert done.returncode == 0 or found, done.stdout + done.stderr
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
