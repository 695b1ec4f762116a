"""The order of an epoch's batches, and micro-batches."""

import pytest
import torch

from rllr.layout import micro_batches, pack, shuffled_batches


def length_rows(count):
    return [([i] * (1 + (7 * i) % 40), [i]) for i in range(count)]


def test_shuffled_batches_hold_every_row_once():
    rows = length_rows(101)
    batches = shuffled_batches(rows, 8, seed=0, epoch=0)
    assert sorted(row[1][0] for batch in batches for row in batch) == list(range(101))
    assert sorted(map(len, batches)) == [5] + [8] * 12
    assert [len(b) for b in shuffled_batches(length_rows(3), 8, 0, 0)] == [3]
    many = shuffled_batches(length_rows(300), 4, 0, 0)  # in more than one pool
    assert sorted(row[1][0] for batch in many for row in batch) == list(range(300)) and len(many) == 75


def test_shuffled_batches_hang_on_seed_and_epoch_alone():
    rows = length_rows(101)
    first = shuffled_batches(rows, 8, seed=1, epoch=2)
    torch.manual_seed(3)
    assert shuffled_batches(rows, 8, seed=1, epoch=2) == first
    assert shuffled_batches(rows, 8, seed=2, epoch=2) != first != shuffled_batches(rows, 8, seed=1, epoch=3)
    epochs = (first, shuffled_batches(rows, 8, seed=1, epoch=3))
    neighbours = [{frozenset(row[1][0] for row in batch) for batch in batches} for batches in epochs]
    assert neighbours[0] != neighbours[1]  # not only another order of the batches


def test_batches_hold_rows_of_similar_length_in_random_order():
    batches = shuffled_batches(length_rows(128), 8, 0, 0)
    widths = [max(len(row[0]) for row in batch) for batch in batches]
    assert sum(8 * width - sum(len(row[0]) for row in batch) for batch, width in zip(batches, widths)) < 200
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


def test_micro_batches_and_pack():
    rows = [([1], [2]), ([3, 4], [5, 6]), ([7], [8, 9, 10])]
    lengths = [2, 4, 4]
    assert micro_batches(rows, lengths) == [rows] and micro_batches(rows, lengths, 2) == [rows[:2], rows[2:]]
    assert micro_batches(rows, lengths, 3) == micro_batches(rows, lengths, 9) == [rows]
    sequences, prompt_lens, mask = pack(rows, 0, "cpu")
    assert sequences.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert prompt_lens.tolist() == [1, 2, 1] and mask.sum(1).tolist() == [1, 2, 3]


@pytest.mark.parametrize("size, tokens, expected", [
    (0, 100, ["ebdac"]), (0, 14, ["eb", "da", "c"]), (0, 13, ["e", "bd", "ac"]), (0, 3, list("ebdac")),
    (2, 100, ["eb", "da", "c"]),
    (1, 14, list("ebdac")), (0, 20, ["eb", "dac"]),
])  # fmt: skip
def test_micro_batches_by_tokens(size, tokens, expected):
    """Longest first (ties in their order): the padded size is the first row's length times the rows."""
    assert ["".join(part) for part in micro_batches("abcde", [5, 6, 4, 6, 7], size, tokens)] == expected
