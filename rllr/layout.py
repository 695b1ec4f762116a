"""The one layout of token ids and the one index into it. Every stage packs and reads sequences through this file.

    sequences [B, T] = prompt | response | padding            right padding everywhere, masks carried, never re-derived
    position[b, t]   = prompt_lens[b] - 1 + t                 the position that *predicts* response token t

Log-probabilities and values are read at `position`, so V sees the text before the token that is judged. With causal
attention, right padding needs no attention mask: real tokens never look at it.
"""

import torch

IGNORED_ID = 0  # fills padding where the model has no pad token; any id does, nothing reads it


def pack_sequences(prompts, responses, pad_token_id=None, device=None):
    """Lists of token ids -> (sequences [B, T] long, prompt_lens [B], response_mask [B, R] bool).

    prompts, responses: B lists of ids each; a response includes its end token. Prompts must not be empty.
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
    return sequences, prompt_lens, response_mask


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


def trim(sequences, prompt_lens, response_mask):
    """The same rows without columns that are padding in all of them: (sequences, prompt_lens, response_mask).

    Scoring and training trim a micro-batch by this one function, so both see the same shapes.
    """
    response_lens = response_mask.sum(1)
    width = int((prompt_lens + response_lens).max())
    return sequences[:, :width], prompt_lens, response_mask[:, : int(response_lens.max())]


def batches_by_length(lengths, batch_size):
    """Index lists of at most batch_size rows, longest rows first, so that little padding is computed."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
