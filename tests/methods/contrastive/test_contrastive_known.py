"""Known positives in the contrastive objective: from the rows of the data to what is left out of the loss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from reference_contrastive import contrastive_loss
from tiny import build_objective, random_pairs, save_model, stage_of
from torch import Tensor

from toolkit.data.pair_records import PairRecord
from toolkit.data.pairs import PairBatch, PairStore, collate_pairs, write_pairs
from toolkit.data.text_store import text_key
from toolkit.losses.contrastive import negatives
from toolkit.methods.contrastive.keys import ContrastiveObjective
from toolkit.methods.contrastive.objective import Contrastive
from toolkit.methods.pair_loss import Pool

DIRECTIONS = ["query_to_document", "document_to_query", "query_to_query", "document_to_document"]
POOL = 6  # the first rows; the last two are in no pool
ROWS = [
    PairRecord("q", ["p1"], [], 1.0),
    PairRecord("q", ["p2"], ["p3", "n1"], 1.0),  # its own hard negative is a positive of the query by the last row
    PairRecord("r", ["p2"], ["n2"], 1.0),  # the positive of two queries
    PairRecord("s", ["p4"], ["p1", "p3"], 1.0),
    PairRecord("t", ["p5"], [], 1.0),
    PairRecord("u", ["p6"], ["p4", "p7"], 1.0),
    PairRecord("t", ["p7"], ["p5"], 1.0),
    PairRecord("q", ["p3"], [], 1.0),
]
OF_ROW = [set(row.positives) for row in ROWS[:POOL]]
OF_QUERY = [{text for one in ROWS if one.query == row.query for text in one.positives} for row in ROWS[:POOL]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


def build(folder: Path, directions: list[str]) -> Contrastive:
    stage = stage_of("contrastive", lora=None, objective__directions=directions)
    objective = build_objective(stage, 3, "cpu", folder, None, None).eval()
    assert isinstance(objective, Contrastive)
    return objective


def collated(folder: Path) -> PairBatch:
    """The first rows, through a store of all."""
    folder.mkdir()

    def encode(texts: list[str]) -> list[list[int]]:
        return [[*(3 + ord(letter) % 90 for letter in text), 2] for text in texts]

    write_pairs(((0, row) for row in ROWS), [("", "")], encode, folder)
    places = np.arange(POOL)
    return collate_pairs(PairStore(folder), places, 0, places, positives=1, negatives=2, seed=0, pad_id=0)


def test_a_positive_of_a_query_is_none_of_its_negatives(folder: Path, tmp_path: Path) -> None:
    objective, batch = build(folder, DIRECTIONS[:1]), collated(tmp_path / "pairs")
    query, document = objective.encoder(batch.query), objective.encoder(batch.document)
    pool = objective.pool(query, document, batch)
    rows, columns = pool.query_keys, pool.document_keys
    absent = columns[:, 0] < 0
    found = negatives(query, pool.documents, 1.0, row_keys=rows, column_keys=columns, absent=absent, with_mean=True)
    texts = [text for row in ROWS[:POOL] for text in (*row.positives, *row.negatives)]
    expected, control = ([sum(text not in own for text in texts) for own in known] for known in (OF_QUERY, OF_ROW))
    assert found.num_negatives is not None and found.num_negatives.tolist() == expected != control


@pytest.mark.parametrize("directions", [DIRECTIONS[:1], DIRECTIONS[:2], DIRECTIONS], ids=len)
def test_loss_and_gradient_are_those_of_positives_looked_up_in_all_rows(
    folder: Path, tmp_path: Path, directions: list[str]
) -> None:
    objective, batch = build(folder, directions), collated(tmp_path / "pairs")
    settings, parameters = objective.settings, list(objective.encoder.parameters())
    assert isinstance(settings, ContrastiveObjective)

    def reference(known: list[set[str]]) -> Tensor:
        keys = [[text_key(text, b"document") for text in of_row] for of_row in known]
        padded = torch.tensor([of_row + [-1] * (4 - len(of_row)) for of_row in keys])
        return contrastive_loss(objective.encoder, [batch._replace(known_key=padded)], settings, objective.scale())

    found, expected, control = objective(batch).total, reference(OF_QUERY), reference(OF_ROW)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert abs(float((control - expected).detach())) > 1e-3 * float(expected.detach())
    ours, theirs, others = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) for loss in (found, expected, control)
    )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert float((others - theirs).norm() / theirs.norm()) > 1e-3


def test_keys_that_leave_nothing_out_are_not_carried(folder: Path) -> None:
    """A thousand positives of a query cost nothing where no other query, and no row as a hard negative, has them."""
    objective = build(folder, DIRECTIONS)
    batch = random_pairs(1, 8, 1, 1)[0]
    many = torch.arange(8000).view(8, 1000) + 10_000
    many[7] = many[0]  # one query
    known = torch.cat([batch.known_key, many], 1)

    def pool(known: Tensor) -> Pool:
        return objective.pool(torch.zeros(8, 4), torch.zeros(16, 4), batch._replace(known_key=known))

    few = pool(batch.known_key)
    for found, expected in zip(pool(known), few, strict=True):
        assert torch.equal(found, expected)
    assert few.query_keys.shape[1] < batch.known_key.shape[1]
    known[1, -1] = known[5, -1]  # the control: two queries have it
    assert pool(known).query_keys.shape[1] == few.query_keys.shape[1] + 1
