"""Tables, IDX files, recipes, spaces, journals, documents of any bytes: read or refused."""

from __future__ import annotations

import base64
import os
import tempfile
import warnings
from pathlib import Path

import pytest
from guided import Guided
from tally import SHARE, Tally, rng

from tikhon.data.idx import read as read_idx
from tikhon.data.reading import read_table
from tikhon.errors import InputError, StorageError
from tikhon.report.saved import read as read_run
from tikhon.runs import checkpoint, manifest
from tikhon.runs.journal import Journal
from tikhon.training.recipe import Recipe
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.space import Space

FOLDER = Path(tempfile.mkdtemp(prefix="tikhon-chaos-"))
KEPT = Path(__file__).parent / "corpus"
SECONDS = 600 * SHARE
ALLOWED = (InputError, StorageError)  # DataError is an InputError


def _file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def _csv(content: bytes) -> None:
    read_table(_file("table.csv", content))


def _idx(content: bytes) -> None:
    read_idx(_file("numbers-idx3-ubyte", content))


def _recipe(content: bytes) -> None:
    found = Recipe.load(_file("recipe.toml", content))
    assert Recipe.from_dict(found.to_dict()) == found


def _space(content: bytes) -> None:
    Space.from_toml(_file("space.toml", content)).to_dict()


def _journal(content: bytes) -> None:
    path = _file("journal.jsonl", content)
    again = SearchJournal(path, {"seed": 0}, resume=True)
    assert [o.to_dict() for o in SearchJournal(path, {"seed": 0}, resume=True).history] == [
        o.to_dict() for o in again.history
    ]


def _document(content: bytes) -> None:
    for name in ("config.json", "result.json"):
        _file(name, content)
        read_run(FOLDER)
        (FOLDER / name).unlink()


def _manifest(content: bytes) -> None:
    _file("manifest.json", content)
    try:
        manifest.verify(FOLDER, "config.json")
    finally:
        (FOLDER / "manifest.json").unlink()


def _checkpoint(content: bytes) -> None:
    folder = FOLDER / "checkpoint"
    folder.mkdir(exist_ok=True)
    _file("checkpoint/1.json", content)
    checkpoint.load(folder)


def _line(event: str) -> bytes:
    from zlib import crc32

    return f"{event}\t{crc32(event.encode()):08x}\n".encode()


OUTCOME = (
    '{"outcomes": [{"budget": 5, "config": {"lr": 0.1}, "curve": [[1, 0.5]], "error": 0.0, '
    '"failure": "", "id": 0, "parent": null, "score": 0.25, "seconds": 1.0, "strengths": {}}]}'
)
HEADER = '{"schema_version": 1, "seed": 0}'
TARGETS = {
    "csv": (
        _csv,
        [
            b"a,b,y\n1,2,x\n3,4,z\n",
            b'a;b\n"1,5";"a ""q"""\n2,0;b\n',
            b"\xef\xbb\xbfa\tb\r\n1\t2\r\n",
        ],
    ),
    "idx": (
        _idx,
        [
            b"\x00\x00\x08\x01\x00\x00\x00\x03\x01\x02\x03",
            b"\x00\x00\x08\x03\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00\x02abcd",
            b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00",
            b"\x00\x00\x08\x11" + bytes(4) + b"\xc6" * 64,  # no rows of endless size
            b"\x00\x00\x08\x64" + b"\x00\x00\x00\x01" * 100 + b"a",
        ],
    ),
    "recipe": (
        _recipe,
        [
            b'dropout = 0.2\nclip_norm = 1.0\n[[penalties]]\npenalty = "l1"\nstrength = 1e-3\n',
            b'averaging = "ema"\n[[penalties]]\npenalty = "mcp"\nstrength = "auto"\ngamma = 3.0\n',
            b'[[penalties]]\npenalty="l2"\nstrength={kind="linear",start=0.0,end=0.1,steps=5}\n',
            b"dropout = " + b"[" * 5_000,
        ],
    ),
    "space": (
        _space,
        [
            b'lr = {kind = "log", low = 1e-4, high = 0.1}\nweight_decay = "auto"\n',
            b'dropout = {kind = "uniform", low = 0, high = 0.8}\n',
            b'mixup = {kind = "choice", values = [0, 1]}\n',
            b"lr = {kind = [1], low = 1, high = 2}",
            b"lr = " + b"[" * 5_000,
            b"space = 3",
        ],
    ),
    "journal": (
        _journal,
        [
            _line(HEADER) + _line('{"plan": {"members": 2}}') + _line(OUTCOME),
            _line(HEADER) + b"{torn",
            _line(HEADER) + _line('{"outcomes": 3}'),
            _line(HEADER) + _line('{"states": [1]}'),
            _line(HEADER) + _line('{"outcomes": [{}]}'),
            _line("[]"),
        ],
    ),
    "document": (
        _document,
        [
            b'{"schema_version": 1, "kind": "fit"}',
            b'{"schema_version": 2}',
            b"null",
            b"[" * 20_000,
        ],
    ),
    "manifest": (
        _manifest,
        [
            b'{"schema_version": 1, "files": {}, "sha256": "44136fa355b3678a1146ad16f7e8649e"}',
            b'{"schema_version": 1, "files": [], "sha256": ""}',
            b"null",
        ],
    ),
    "checkpoint": (
        _checkpoint,
        [b'{"schema_version": 1, "sha256": "", "sha256_state": "", "state": "{}"}', b"[]"],
    ),
}


def corpus_of(name: str) -> list[bytes]:
    """The seeds, and what earlier runs found."""
    kept = KEPT / f"{name}.txt"
    found = kept.read_text().split() if kept.exists() else []
    return [*TARGETS[name][1], *(base64.b64decode(line) for line in found)]


@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name):
    corpus = corpus_of(name)
    known = len(corpus)
    guided = Guided(TARGETS[name][0], corpus, ALLOWED, rng(f"guided {name}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guided.run(count=known + 60, seconds=SECONDS)
    tally = Tally(f"bytes as {name}, {len(guided.seen)} steps of its lines reached")
    tally.tried, tally.noticed = guided.tried, guided.refused
    tally.survived = guided.tried - guided.refused - len(guided.failures)
    tally.lost = [f"{text} for {content!r}" for text, content in guided.failures.items()]
    if os.environ.get("TIKHON_CHAOS_KEEP"):
        KEPT.mkdir(exist_ok=True)
        lines = [base64.b64encode(x).decode() for x in guided.corpus[len(TARGETS[name][1]) :]]
        (KEPT / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines[:60]))
    tally.close()


def test_a_journal_says_what_it_cannot_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(_line(HEADER) + _line('{"name": 3}'))
    assert Journal(path, {"seed": 0}, resume=True).events == [{"name": 3}]
