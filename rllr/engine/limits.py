"""The longest sequence for which this engine gives a model's exact numbers, read from the model's configuration.

Three things limit it: the number of positions; an attention window, in which a token sees only some of the tokens
before it; and rotary embeddings that change once a batch holds a sequence longer than those they were trained for. Up
to the shortest of these limits, every token sees all tokens before it, and no number depends on the other rows of the
batch.
"""

import re

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
WINDOW = re.compile(r"^(sliding|attention|local|window)\w*(window|window_size|chunk_size)$|^window_size$")
# Windows that only some kinds of layers have: (window's name, name of the list of layer kinds, kinds with this window).
LAYERED = (
    ("sliding_window", "layer_types", ("sliding_attention",)),
    ("attention_chunk_size", "layer_types", ("chunked_attention",)),
    ("window_size", "attention_layers", ("local",)),
)
# Kinds of layers that store keys and values and nothing else.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def text_config(config):
    """The part of a configuration that describes the text decoder; a multimodal model has other parts as well."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def windows_of(config):
    """{name in the configuration: tokens} of every attention window that some layer has."""
    config, found = text_config(config), {}
    settings = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    for name, value in settings.items():
        if not WINDOW.search(name) or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            continue
        if name == "sliding_window" and getattr(config, "use_sliding_window", True) is False:
            continue
        kinds = [(getattr(config, layers, None), having) for key, layers, having in LAYERED if key == name]
        if any(layers and not set(layers) & set(having) for layers, having in kinds):
            continue
        found[name] = value
    return found


def length_limits(config):
    """[(tokens, what sets the limit)], the shortest first; empty where the architecture has no limit (Bloom)."""
    config = text_config(config)
    limits = position_limits(config)
    limits += [(tokens, f"its {name.replace('_', ' ')} of {tokens}") for name, tokens in windows_of(config).items()]
    for scaling in rotary_scalings(config):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("dynamic", "longrope"):  # up to the original length, both are rotary embeddings that do not change
            original = scaling.get("original_max_position_embeddings")
            for name in ("original_max_position_embeddings", "max_position_embeddings"):
                original = original or getattr(config, name, None)
            why = f"its rotary embeddings of type {kind}, which change beyond the original length"
            limits.append((original or 0, why))
    return sorted(limits)


def position_limits(config):
    """[(tokens, what sets the limit)] that come from the number of positions."""
    config = text_config(config)
    found = {getattr(config, name, None): name for name in reversed(POSITIONS)}  # several names may hold one number
    known = {tokens: name for tokens, name in found.items() if isinstance(tokens, int) and tokens > 0}
    return [(tokens, f"its {name} of {tokens}") for tokens, name in known.items()]


def rotary_scalings(config):
    """The dicts that describe the rotary embeddings: one, or one for each kind of layer."""
    found: list[dict] = []
    for scaling in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(scaling, dict):
            found += [part for part in scaling.values() if isinstance(part, dict)] or [scaling]
    return found


def other_layers(config):
    """Sorted kinds of layers that store more than keys and values (state-space, recurrent, linear attention)."""
    return sorted(set(getattr(text_config(config), "layer_types", None) or ()) - ATTENTION)


def length_limit(model_or_config):
    """(most tokens of prompt plus answer for this model, what sets the limit); (None, "") without a limit."""
    return next(iter(length_limits(getattr(model_or_config, "config", model_or_config))), (None, ""))


def check_cache_support(model, length):
    """Raise ValueError for what the slot cache cannot do exactly.

    These are layers that store something else than keys and values, and sequences longer than `length_limits` allow.
    """
    others = ", ".join(other_layers(model.config))
    if others:
        raise ValueError(f"rollouts need layers that store only keys and values; {type(model).__name__} has {others}")
    for tokens, why in length_limits(model.config):
        if length > tokens:
            raise ValueError(f"prompt and answer take {length} tokens, more than {why} allows; shorten the prompt")
