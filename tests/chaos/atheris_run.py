"""`python tests/chaos/atheris_run.py TARGET SECONDS`: a target under Atheris.

Prints how many inputs were tried, read and refused, and fails with the input that raised anything
else. What reached new lines joins the corpus in `corpus/`.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tikhon.data", "tikhon.runs", "tikhon.regularizer.terms",
                                         "tikhon.training.recipe", "tikhon.tuning"]):  # fmt: skip
    from test_documents import ALLOWED, KEPT, TARGETS, corpus_of

from guided import Guided
from tally import rng

MOST = 120  # inputs of a corpus that are kept


class Counted:
    """A target that counts what becomes of its inputs, and ends the process in time."""

    def __init__(self, name: str, seconds: float, folder: Path) -> None:
        self.name, self.end, self.folder = name, time.monotonic() + seconds, folder
        self.tried = self.refused = 0

    def __call__(self, content: bytes) -> None:
        self.tried += 1
        try:
            TARGETS[self.name][0](content)
        except ALLOWED:
            self.refused += 1
        if time.monotonic() > self.end:
            read = self.tried - self.refused
            print(f"\nbytes as {self.name} under Atheris: {self.tried} tried, {read} survived, "
                  f"{self.refused} noticed, 0 lost", flush=True)  # fmt: skip
            keep(self.name, [path.read_bytes() for path in sorted(self.folder.iterdir())])
            os._exit(0)


def keep(name: str, found: list[bytes]) -> None:
    """Of all inputs those that reach lines which none before them does."""
    target, seeds = TARGETS[name]
    guided = Guided(target, [], ALLOWED, rng("kept"))
    known = [*seeds, *(x for x in corpus_of(name) if x not in seeds)]
    kept = [x for x in known if guided.once(x) and x not in seeds]
    kept += [x for x in sorted(found, key=len) if len(x) < 20_000 and guided.once(x)]
    lines = [base64.b64encode(x).decode() for x in kept[:MOST]]
    (KEPT / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    folder = Path(tempfile.mkdtemp(prefix="tikhon-atheris-"))
    for number, content in enumerate(corpus_of(name)):
        (folder / str(number)).write_bytes(content)
    warnings.simplefilter("ignore")
    options = [
        "-max_len=20000",
        "-timeout=60",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={folder}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], Counted(name, seconds, folder))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
