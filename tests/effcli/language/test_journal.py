"""What a pass has written already, and how damage in it is noticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from effcli.errors import UnfinishedError
from effcli.language.journal import Journal
from effcli.language.open_block import Part, PartRecord
from effcli.language.pairs import SharedInputs


def test_the_same_request_is_continued_and_another_begun(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "pass", "one")
    journal.record("block-00000", Part().to_json())
    journal.advance(1)
    assert Journal.open(tmp_path / "pass", "one").done == 1
    assert Journal.open(tmp_path / "pass", "other").done == 0
    assert not (tmp_path / "pass" / "block-00000.json").exists()


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "\udcff", '{"done": 1}', '{"fingerprint": "one", "done": -1}', '{"done": "1"}']
)
def test_a_damaged_journal(tmp_path: Path, damage: str) -> None:
    Journal.open(tmp_path, "one").advance(1)
    (tmp_path / "journal.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    journal = Journal.open(tmp_path, "one")
    assert journal.done == 0 and re.search(r"journal\.json is (damaged|not)", journal.damage)
    assert Journal.open(tmp_path, "one").damage == ""


PRODUCER = {"name": "norm", "how": "norm", "channel": [0, 1], "outputs": 2}
PAIR = {"consumers": ["q"], "producer": PRODUCER, "reason": "", "error": None}


@pytest.mark.parametrize(
    "damage",
    [None, {}, {"pairs": [3]}, {"pairs": [{**PAIR, "producer": {**PRODUCER, "how": "magic"}}]}, {"pairs": {"a": PAIR}}],
)
def test_damaged_shared_inputs(tmp_path: Path, damage: object) -> None:
    journal = Journal.open(tmp_path / "pass", "one")
    journal.record("pairs", {"pairs": [PAIR]})
    (found,) = journal.recall(SharedInputs, "pairs").read()
    assert found.producer is not None and found.producer.channel.tolist() == [0, 1]
    journal.record("pairs", damage)
    with pytest.raises(UnfinishedError, match=r"pairs\.json is"):
        journal.recall(SharedInputs, "pairs")


@pytest.mark.parametrize("key", ["stored", "ledger", "histograms", "remarks"])
@pytest.mark.parametrize("damage", [None, 3, [{}], {"a": {}}])
def test_a_damaged_part(tmp_path: Path, key: str, damage: object) -> None:
    journal = Journal.open(tmp_path / "pass", "one")
    journal.record("part", Part().to_json())
    assert journal.recall(PartRecord, "part").read() == Part()
    journal.record("part", {**Part().to_json(), key: damage})
    with pytest.raises(UnfinishedError, match=rf"part\.json is damaged: {key}"):
        journal.recall(PartRecord, "part")
