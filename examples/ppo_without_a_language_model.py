"""The PPO mathematics of rllr in a loop of your own: no language model, no tokenizer, two small tables.

    python -m examples.ppo_without_a_language_model     # in the repository's folder, a few seconds

A policy writes up to six symbols: a, b, c, or a full stop, which ends the answer. A finished answer scores one point
for each pair of neighbours that go on in the round a, b, c, a, ... So "abcab." scores 4, the most there is. A random
policy scores 0.28 on average. The policy is a table of logits: of each symbol, by position and previous symbol. The
value function is a table, too: `expected` is its value where an answer begins. The six acts are those of train_ppo.py.
"""

import torch

from rllr.ppo import gae, kl_estimate, masked_mean, masked_whiten, policy_loss, value_loss
from rllr.rewards import shape_rewards

SYMBOLS, END, LONGEST = "abc.", 3, 6
ROLLOUTS, ANSWERS, EPOCHS, MINIBATCHES = 40, 256, 4, 4  # answers to a rollout, passes over it, parts of a pass
KL_COEF, LEARNING_RATE = 0.05, 0.05
STEPS = torch.arange(LONGEST)  # positions in an answer


def sample(logits, generator):
    """Answers drawn from the policy: symbols [B, R], and a mask that is True up to the full stop, which it includes."""
    symbols, mask = torch.full((ANSWERS, LONGEST), END), torch.zeros(ANSWERS, LONGEST, dtype=torch.bool)
    previous, writing = torch.full((ANSWERS,), END), torch.ones(ANSWERS, dtype=torch.bool)
    for t in STEPS:
        drawn = torch.multinomial(logits[t, previous].softmax(-1), 1, generator=generator).squeeze(1)
        previous = symbols[:, t] = torch.where(writing, drawn, END)
        mask[:, t] = writing
        writing = writing & (previous != END)
    return symbols, mask


def previous_of(symbols):
    """What stands before each symbol; before the first one the full stop of the answer before."""
    return torch.cat([torch.full_like(symbols[:, :1], END), symbols[:, :-1]], dim=1)


def logprobs_of(logits, symbols):
    """The log-probability of each symbol [B, R] under a table of logits."""
    return logits.log_softmax(-1)[STEPS, previous_of(symbols), symbols]


def score(symbols):
    """Points of each answer [B]; none for one without its full stop."""
    before, after = symbols[:, :-1], symbols[:, 1:]
    points = ((before != END) & (after == (before + 1) % 3)).sum(1)
    return torch.where((symbols == END).any(1), points, 0).float()


def train(seed=0, log=print):
    """Learns for ROLLOUTS rollouts; returns the mean score of each."""
    generator = torch.Generator().manual_seed(seed)
    logits, values = torch.zeros(LONGEST, 4, 4, requires_grad=True), torch.zeros(LONGEST, 4, requires_grad=True)
    reference = logits.detach().clone()  # what the KL measures the distance from: the start policy
    optimizer, means = torch.optim.Adam([logits, values], LEARNING_RATE), []
    for rollout in range(ROLLOUTS):
        with torch.no_grad():
            symbols, mask = sample(logits, generator)  # 1 act
            old_logprobs, ref_logprobs = logprobs_of(logits, symbols), logprobs_of(reference, symbols)  # 2 analyse
            old_values = values[STEPS, previous_of(symbols)]
            scores = score(symbols)  # 3 judge
            rewards = shape_rewards(scores, old_logprobs, ref_logprobs, mask, KL_COEF)  # 4 shape
            advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)  # 5 credit
            advantages = masked_whiten(advantages, mask)
        for _ in range(EPOCHS):  # 6 improve
            for rows in torch.randperm(ANSWERS, generator=generator).chunk(MINIBATCHES):
                new_logprobs, new_values = logprobs_of(logits, symbols[rows]), values[STEPS, previous_of(symbols[rows])]
                actor, stats = policy_loss(new_logprobs, old_logprobs[rows], advantages[rows], mask[rows])
                critic, _ = value_loss(new_values, old_values[rows], returns[rows], mask[rows])
                optimizer.zero_grad()
                (actor + critic).backward()
                optimizer.step()
        means.append(scores.mean().item())
        if rollout % 5 == 0 or rollout == ROLLOUTS - 1:
            kl = masked_mean(kl_estimate(old_logprobs, ref_logprobs), mask)
            answer = "".join(SYMBOLS[symbol] for symbol in symbols[0][mask[0]])
            shown = f"score {means[-1]:.2f} of 4  expected {values[0, END]:.2f}  KL {kl:.2f} nats per symbol"
            log(f"rollout {rollout:2}  {shown}  e.g. {answer}")
    return means


if __name__ == "__main__":
    train()
