"""Sample one token per row from softmax(logits / temperature), with its log-probability. There is no top-k or top-p."""

import torch

BLOCK = 128  # tokens per block sum; a draw looks into one block only


class Sampler:
    """logits [B, V] -> (token [B] long, its log-probability [B] float32) under softmax(logits / temperature).

    `greedy` takes the most likely token; its log-probability is still the one at `temperature`.
    """

    def __init__(self, temperature, greedy=False, generator=None):
        self.temperature, self.greedy, self.generator = temperature, greedy, generator

    def __call__(self, logits):
        scaled = logits if self.temperature == 1.0 else logits / self.temperature
        return self.on_host(scaled) if scaled.device.type == "cpu" and not self.greedy else self.on_device(scaled)

    def on_host(self, scaled):
        uniform = torch.rand(len(scaled), 1, dtype=torch.float64, generator=self.generator)
        return inverse_cdf(scaled, uniform)

    def on_device(self, scaled):
        """Greedy, or a draw for which the host reads nothing from the device."""
        logprobs = scaled.log_softmax(-1)
        token = logprobs.argmax(-1) if self.greedy else exponential_race(logprobs, self.generator)
        return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1).float()


def exponential_race(logprobs, generator):
    """argmax of p / Exp(1), which is a sample of p. It needs no sum over the vocabulary and no host (for the GPU)."""
    # A draw of exactly 0 would win against every other token, even with p = 0.
    race = torch.empty_like(logprobs).exponential_(generator=generator).clamp_(min=1e-30)
    return (logprobs - race.log()).argmax(-1)


def inverse_cdf(logits, uniform):
    """The first token whose cumulative probability exceeds a uniform draw [B, 1] (float64), and its log-probability.

    The search has two levels, block sums and then one block: on a CPU `torch.multinomial` costs more than the LM head.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=logits.dtype, device=logits.device)
    weights[:, vocabulary:] = 0.0
    top = logits.amax(-1, keepdim=True)
    torch.sub(logits, top, out=weights[:, :vocabulary]).exp_()
    weights = weights.view(rows, blocks, BLOCK)
    block_sums = weights.sum(-1).double()
    cumulative = block_sums.cumsum(-1)  # [B, blocks]
    total = cumulative[:, -1:]
    target = uniform * total
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks - 1)
    chosen_sum = block_sums.gather(1, block)
    share = (target - (cumulative.gather(1, block) - chosen_sum)) / chosen_sum  # the draw's place within the block
    inside = weights[torch.arange(rows, device=logits.device), block.squeeze(1)].double().cumsum(-1)  # [B, BLOCK]
    # right=True finds the first token whose cumulative sum exceeds the draw, so never one of probability 0. Rounding
    # can put a draw at the block's end; nextafter keeps it below.
    end = inside[:, -1:]
    at = torch.minimum((share * end).clamp_(min=0.0), torch.nextafter(end, torch.zeros_like(end)))
    token = (block * BLOCK + torch.searchsorted(inside, at, right=True)).squeeze(1)
    token.clamp_(max=vocabulary - 1)  # only NaN logits exceed this; the caller finds the NaN in the log-probability
    logprob = (logits.gather(1, token.unsqueeze(1)) - top).double() - total.log()
    return token, logprob.squeeze(1).float()
