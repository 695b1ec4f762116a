"""The layout of token ids: packing, the one index into it, trimming."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rllr.layout import (
    Packed,
    batches_by_length,
    pack_sequences,
    response_places,
    response_positions,
    response_tokens,
    trim,
    unflatten,
)  # fmt: skip

PROMPTS = [[5, 6, 7], [8], [9, 10]]
RESPONSES = [[11, 2], [12, 13, 14, 2], []]

rows = st.lists(
    st.tuples(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.lists(st.integers(0, 60), max_size=5)),
    min_size=1,
    max_size=4,
)


def test_pack_sequences_by_hand():
    """prompt | response | padding without a gap, and a mask that is False on padding."""
    sequences, prompt_lens, mask = pack_sequences(PROMPTS, RESPONSES, pad_token_id=60)
    assert sequences.tolist() == [[5, 6, 7, 11, 2], [8, 12, 13, 14, 2], [9, 10, 60, 60, 60]]
    assert prompt_lens.tolist() == [3, 1, 2]
    assert mask.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
    assert sequences.dtype == torch.long and mask.dtype == torch.bool


def test_positions_by_hand():
    """The position that *predicts* token t, not the token's own; 0 where nothing may be read."""
    _, prompt_lens, mask = pack_sequences(PROMPTS, RESPONSES)
    assert response_positions(prompt_lens, mask).tolist() == [[2, 3, 0, 0], [0, 1, 2, 3], [0, 0, 0, 0]]


def test_tokens_by_hand():
    sequences, prompt_lens, mask = pack_sequences(PROMPTS, RESPONSES, pad_token_id=60)
    assert response_tokens(sequences, prompt_lens, mask).tolist() == [[11, 2, 0, 0], [12, 13, 14, 2], [0, 0, 0, 0]]


@given(rows, st.integers(0, 60), st.integers(0, 3))
def test_tokens_come_back(pairs, pad, extra):
    """Whatever the padding id and however much of it; a response that contains the padding id keeps it."""
    prompts, responses = [list(p) for p, _ in pairs], [list(r) for _, r in pairs]
    sequences, prompt_lens, mask = pack_sequences(prompts, responses, pad)
    sequences = torch.nn.functional.pad(sequences, (0, extra), value=pad)
    mask = torch.nn.functional.pad(mask, (0, extra))
    tokens = response_tokens(sequences, prompt_lens, mask)
    assert [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)] == responses
    assert tokens[~mask].eq(0).all()
    positions = response_positions(prompt_lens, mask)
    for b, (prompt, response) in enumerate(pairs):
        for t in range(len(response)):
            assert positions[b, t] == len(prompt) - 1 + t


@given(rows, st.integers(1, 4))
def test_trim_undoes_padding(pairs, extra):
    """Scoring and training would otherwise see other shapes."""
    prompts, responses = [list(p) for p, _ in pairs], [list(r) for _, r in pairs]
    packed = pack_sequences(prompts, responses)
    sequences, mask = (torch.nn.functional.pad(x, (0, extra)) for x in (packed.sequences, packed.response_mask))
    for before, after in zip(packed, trim(Packed(sequences, packed.prompt_lens, mask)), strict=True):
        assert torch.equal(before, after)


def test_trim_of_some_rows():
    """A micro-batch is as wide as its own longest row and its own longest response."""
    sequences, prompt_lens, mask = pack_sequences([[1] * 6, [2, 3]], [[4], [5, 6]]).rows([1])
    assert sequences.tolist() == [[2, 3, 5, 6]] and mask.tolist() == [[True, True]]


def test_empty_prompt_is_refused():
    """Position -1 would silently read the end of the row."""
    with pytest.raises(ValueError, match="prompt without tokens"):
        pack_sequences([[1], []], [[2], [2]])


def test_counts_must_agree():
    with pytest.raises(ValueError):
        pack_sequences([[1], [2]], [[3]])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4))
def test_batches_hold_each_row_once(lengths, size):
    """Longest first, none larger than asked, equal lengths in their own order."""
    batches = batches_by_length(lengths, size)
    order = [row for batch in batches for row in batch]
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    assert all(1 <= len(batch) <= size for batch in batches)


def test_places_and_unflatten_are_row_by_row():
    """Three rows with 2, 1 and 3 response tokens behind prompts of 3, 1 and 2."""
    _, prompt_lens, mask = pack_sequences([[5, 6, 7], [8], [9, 10]], [[1, 2], [3], [4, 5, 6]])
    rows, positions = response_places(prompt_lens, mask)
    assert rows.tolist() == [0, 0, 1, 2, 2, 2] and positions.tolist() == [2, 3, 0, 1, 2, 3]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    square = unflatten(values, mask)
    assert square.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]] and square.dtype == torch.float64
