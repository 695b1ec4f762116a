"""The parts of the rollout engine: slots for keys and values, the sampler, the decoding loop, packed attention.

Other modules use it through `rllr.rollout` and `rllr.logprobs`. You need nothing here to understand how RLLR trains.
"""
