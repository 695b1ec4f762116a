"""Sample one token per row from softmax(logits / temperature), with its log-probability. There is no top-k or top-p.

The random number of a token is a function of (key, place of the answer, token's number): SplitMix64 (Steele, Lea,
Flood, "Fast splittable pseudorandom number generators", 2014), once to split the key by place and once along the
answer. So an answer does not depend on its slot, on its neighbours, on the batch size or on the device; only rounding
of the logits can change a token. There is no state that a recorded step would have to carry.
"""

import torch

BLOCK = 128  # tokens per block sum; a draw looks into one block only
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants


class Sampler:
    """(logits [B, V], places [B], counts [B]) -> (token [B] long, its log-probability [B] float32).

    places: each answer's own number in the whole call; counts: the tokens that it has so far. key: 64 random bits of
    the whole call, an integer, or a tensor [] long for a step that is recorded once for many calls. `greedy` takes the
    most likely token; its log-probability is still the one at `temperature`.
    """

    def __init__(self, temperature, greedy=False, key=0):
        self.temperature, self.greedy = temperature, greedy
        self.key = key if isinstance(key, torch.Tensor) else signed(key)

    def __call__(self, logits, places, counts):
        scaled = logits if self.temperature == 1.0 else logits / self.temperature
        if not self.greedy:
            return inverse_cdf(scaled, uniforms(self.key, places, counts).unsqueeze(1))
        logprobs = scaled.log_softmax(-1)
        token = logprobs.argmax(-1)
        return token, logprobs.gather(-1, token.unsqueeze(-1)).squeeze(-1).float()


def uniforms(key, places, counts):
    """Draws [B] in [0, 1), float64: output number `counts` of the SplitMix64 stream that `key` and `places` name."""
    stream = mix(key + (places + 1) * signed(STEP))
    bits = mix(stream + (counts + 1) * signed(STEP))
    return shifted(bits, 11).double() * 2.0**-53


def mix(x):
    """SplitMix64's output function on 64-bit integers [B]; torch's products wrap around as it wants."""
    x = (x ^ shifted(x, 30)) * signed(FIRST)
    x = (x ^ shifted(x, 27)) * signed(SECOND)
    return x ^ shifted(x, 31)


def shifted(x, bits):
    """x >> bits for unsigned numbers: torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x):
    """The 64 bits of an integer as torch's signed int64 has them."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def inverse_cdf(logits, uniform):
    """The first token whose cumulative probability exceeds a uniform draw [B, 1] (float64), and its log-probability.

    The search has two levels, block sums and then one block: on a CPU `torch.multinomial` costs more than the LM head.
    """
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    weights = torch.empty(rows, blocks * BLOCK, dtype=logits.dtype, device=logits.device)
    weights[:, vocabulary:].zero_()
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
