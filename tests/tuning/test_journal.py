"""The journal survives a crash at any byte and refuses another search's settings."""

from __future__ import annotations

import math

import pytest

from tikhon.errors import InputError, StorageError
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.trials import Outcome, Trial

HEADER = {"space": {"lr": 0.1}, "data": {"rows": 10, "sha256": "ab"}, "seed": 0}
OUTCOMES = [
    Outcome(Trial(0, {"lr": 0.1, "weight_decay": "auto"}, 5), 0.25, curve=((1, 0.5), (5, 0.25))),
    Outcome(Trial(1, {"lr": 0.2}, 5), math.nan, failure="diverged at epoch 2"),
    Outcome(Trial(2, {"lr": 0.1}, 9, parent=0), 0.2, strengths={"0.weight": 0.3}),
]


def written(path):
    journal = SearchJournal(path, HEADER, resume=False)
    journal.record_plan({"members": 2, "epochs": 5})
    journal.extend(OUTCOMES[:2])
    journal.extend(OUTCOMES[2:])
    return journal


def same(a, b):
    return [o.to_dict() for o in a] == [o.to_dict() for o in b]


def test_a_journal_read_back_is_the_history(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    journal = SearchJournal(path, HEADER, resume=True)
    assert same(journal.history, OUTCOMES)
    assert journal.plan == {"members": 2, "epochs": 5}
    assert journal.record.torn is None


def test_a_journal_cut_at_any_byte_keeps_its_whole_lines_and_goes_on(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in range(len(lines[0]), len(data), 7):
        path.write_bytes(data[:cut])
        kept = (0, 0, 0, 2, 3)[data[:cut].count(b"\n")]
        journal = SearchJournal(path, HEADER, resume=True)
        assert same(journal.history, OUTCOMES[:kept])
        journal.extend(OUTCOMES[kept:])
        assert same(SearchJournal(path, HEADER, resume=True).history, OUTCOMES)


def test_a_torn_tail_is_kept_beside_the_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with path.open("ab") as file:
        file.write(b'{"id": 3, "sco')
    journal = SearchJournal(path, HEADER, resume=True)
    assert journal.record.torn == f"{path}.torn"
    assert (tmp_path / "journal.jsonl.torn").read_bytes() == b'{"id": 3, "sco'
    assert same(journal.history, OUTCOMES)


def test_outcomes_that_a_journal_says_twice_count_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    path.write_bytes(path.read_bytes() * 2)
    assert same(SearchJournal(path, HEADER, resume=True).history, OUTCOMES)


def test_a_flipped_bit_is_not_believed(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"score": 0.2,', b'"score": 0.1,'))
    assert len(SearchJournal(path, HEADER, resume=True).history) == 2


def test_another_space_or_other_data_are_refused_by_name(tmp_path):
    path = tmp_path / "journal.jsonl"
    written(path)
    with pytest.raises(InputError, match="different space"):
        SearchJournal(path, {**HEADER, "space": {"lr": 0.2}}, resume=True)
    with pytest.raises(InputError, match="'rows': 10"):
        SearchJournal(path, {**HEADER, "data": {"rows": 11, "sha256": "cd"}}, resume=True)


def test_an_existing_journal_is_not_overwritten_and_a_missing_one_not_resumed(tmp_path):
    path = tmp_path / "journal.jsonl"
    with pytest.raises(InputError, match="nothing to resume"):
        SearchJournal(path, HEADER, resume=True)
    written(path)
    with pytest.raises(InputError, match="is there already"):
        SearchJournal(path, HEADER, resume=False)


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    journal = written(tmp_path / "journal.jsonl")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageError, match="No space left"):
        journal.extend(OUTCOMES[:1])
