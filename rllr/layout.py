"""The one layout of token ids and the one index into it. Every stage packs and reads sequences through this file.

    sequences [B, T] = prompt | response | padding            right padding everywhere, masks carried, never re-derived
    position[b, t]   = prompt_lens[b] - 1 + t                 the position that *predicts* response token t

Log-probabilities and values are read at `position`, so V sees the text before the token that is judged. With causal
attention, right padding needs no attention mask: real tokens never look at it.
"""

import random
from typing import NamedTuple

import torch

IGNORED_ID = 0  # fills padding where the model has no pad token; any id does, nothing reads it


class Packed(NamedTuple):
    """B prompts with their responses, as the models take them: `model(*packed)`. T, R: the longest row, response."""

    sequences: torch.Tensor  # [B, T] long: prompt | response | padding
    prompt_lens: torch.Tensor  # [B] long
    response_mask: torch.Tensor  # [B, R] bool, True on real response tokens, the end token included

    @property
    def response_lens(self):
        """Response tokens of each row [B]."""
        return self.response_mask.sum(1)

    @property
    def lengths(self):
        """Tokens of each row [B], prompt and response."""
        return self.prompt_lens + self.response_lens

    def rows(self, rows) -> "Packed":
        """Some of the rows, in that order, without the columns that are padding in all of them.

        Scoring and training take their micro-batches by this one method, so both see the same shapes.
        """
        return trim(Packed(*(tensor[rows] for tensor in self)))


def pack_sequences(prompts, responses, pad_token_id=None, device=None):
    """Lists of token ids -> `Packed`: (sequences [B, T], prompt_lens [B], response_mask [B, R]).

    prompts, responses: B lists of ids each; a response includes its end token. ValueError for an empty prompt.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt without tokens has no position that predicts the first response token")
    fill = IGNORED_ID if pad_token_id is None else pad_token_id
    rows = [list(prompt) + list(response) for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    sequences = torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long, device=device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=device)
    response_lens = torch.tensor([len(response) for response in responses], device=device)
    response_mask = torch.arange(int(response_lens.max()), device=device) < response_lens.unsqueeze(1)
    return Packed(sequences, prompt_lens, response_mask)


def response_positions(prompt_lens, response_mask):
    """position [B, R]: where response token t is predicted; 0 outside the mask, where nothing may be read."""
    steps = torch.arange(response_mask.shape[1], device=response_mask.device)
    return (prompt_lens.unsqueeze(1) - 1 + steps).masked_fill(~response_mask, 0)


def response_places(prompt_lens, response_mask):
    """(rows [N], positions [N]) where the N real response tokens are predicted, row by row."""
    rows = torch.arange(len(response_mask), device=response_mask.device).unsqueeze(1).expand_as(response_mask)
    return rows[response_mask], response_positions(prompt_lens, response_mask)[response_mask]


def unflatten(values, response_mask):
    """Values [N] of the real response tokens, row by row, as [B, R] with 0 outside the mask."""
    flat = torch.zeros(response_mask.shape, dtype=values.dtype, device=values.device)
    return flat.masked_scatter(response_mask, values)


def response_tokens(sequences, prompt_lens, response_mask):
    """The response's token ids [B, R]; 0 outside the mask."""
    positions = response_positions(prompt_lens, response_mask) + 1
    return sequences.gather(1, positions.masked_fill(~response_mask, 0)).masked_fill(~response_mask, 0)


def trim(packed) -> Packed:
    """The same rows without the columns that are padding in all of them."""
    sequences, prompt_lens, response_mask = packed
    width, longest_response = int(packed.lengths.max()), int(packed.response_lens.max())
    return Packed(sequences[:, :width], prompt_lens, response_mask[:, :longest_response])


def batches_by_length(lengths, batch_size):
    """Index lists of at most batch_size rows, longest rows first, so that little padding is computed."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pack(rows, pad_token_id, device):
    """Rows that begin with (prompt ids, response ids) -> `Packed`."""
    prompts, responses, *_ = zip(*rows)
    return pack_sequences(prompts, responses, pad_token_id, device)


def shuffled_batches(rows, batch_size, seed, epoch):
    """Batches of an epoch in an order that depends on seed and epoch alone; the last one may be smaller.

    Rows of similar length come together (little padding), the batches in random order. rows: (prompt ids, response
    ids, ...).
    """
    rng = random.Random(f"batches/{seed}/{epoch}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool = 16 * batch_size
    chunks = [
        sorted(order[i : i + pool], key=lambda r: len(rows[r][0]) + len(rows[r][1])) for i in range(0, len(order), pool)
    ]
    batches = [chunk[i : i + batch_size] for chunk in chunks for i in range(0, len(chunk), batch_size)]
    rng.shuffle(batches)
    return [[rows[r] for r in batch] for batch in batches]


def micro_batches(rows, lengths, size=0, tokens=0):
    """A batch's rows in micro-batches of at most `size` rows, and of at most `tokens` padded tokens (rows x the
    longest of them).

    0 is no limit. lengths: tokens of each row. With a limit on tokens, rows of similar length come together, and a row
    that is longer than the limit goes alone.
    """
    if not tokens:
        size = size or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]
    batches: list[list] = []
    width = 0
    for i in sorted(range(len(rows)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) == (size or len(rows)) or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
            width = lengths[i]
        batches[-1].append(rows[i])
    return batches
