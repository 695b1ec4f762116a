"""The rollout engine's machinery: slots for keys and values, the sampler, the decoding loop, attention over packed rows.

`rllr.rollout` and `rllr.logprobs` are the doors to it; nothing here is needed to follow how RLLR trains.
"""
