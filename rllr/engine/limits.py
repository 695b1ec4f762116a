"""How long a sequence may be for this engine to give a model's exact numbers, read from the model's configuration.

Positions end somewhere; an attention window lets a token see only so many before it; some rotary embeddings change once a
batch holds a sequence beyond the length they were trained for. Up to the shortest of these every token sees all before it and
no number depends on its neighbours in the batch.
"""

import re

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
WINDOW = re.compile(r"^(sliding|attention|local|window)\w*(window|window_size|chunk_size)$|^window_size$")
# A window that only some kinds of layers have: (key, the list of the layers' kinds, the kinds that have it).
LAYERED = (
    ("sliding_window", "layer_types", ("sliding_attention",)),
    ("attention_chunk_size", "layer_types", ("chunked_attention",)),
    ("window_size", "attention_layers", ("local",)),
)
ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
}  # layers that keep keys and values alone


def text_config(config):
    """The part of a configuration that describes the decoder of text: a multimodal model's has others beside it."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def windows_of(config):
    """{name in the configuration: tokens} of every attention window that some layer has."""
    config, found = text_config(config), {}
    for name, value in (config.to_dict() if hasattr(config, "to_dict") else vars(config)).items():
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
    """[(tokens, what sets the limit)], the shortest first; empty where the architecture sets none (Bloom)."""
    config = text_config(config)
    limits = position_limits(config)
    limits += [(tokens, f"its {name.replace('_', ' ')} of {tokens}") for name, tokens in windows_of(config).items()]
    for scaling in rotary_scalings(config):
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind in ("dynamic", "longrope"):  # below the original length both are plain rotary embeddings of one kind
            original = scaling.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            original = original or getattr(config, "max_position_embeddings", None)
            limits.append(
                (original or 0, f"its rotary embeddings of type {kind}, which change beyond the original length")
            )
    return sorted(limits)


def position_limits(config):
    """[(tokens, what sets the limit)] of the positions alone."""
    config = text_config(config)
    found = {
        getattr(config, name, None): name for name in reversed(POSITIONS)
    }  # several names may stand for one number
    return [
        (tokens, f"its {name} of {tokens}") for tokens, name in found.items() if isinstance(tokens, int) and tokens > 0
    ]


def rotary_scalings(config):
    """The dicts that describe rotary embeddings: one, or one for each kind of layer."""
    found = []
    for scaling in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(scaling, dict):
            found += [part for part in scaling.values() if isinstance(part, dict)] or [scaling]
    return found


def other_layers(config):
    """Names of the layers, sorted, whose memory is not keys and values alone (state-space, recurrent, linear attention)."""
    return sorted(set(getattr(text_config(config), "layer_types", None) or ()) - ATTENTION)


def length_limit(model_or_config):
    """(tokens of prompt and answer together that this model takes here, what sets the limit); (None, "") without a limit."""
    return next(iter(length_limits(getattr(model_or_config, "config", model_or_config))), (None, ""))


def check_cache_support(model, length):
    """ValueError for what this cache cannot do exactly: layers that keep something else than keys and values, and sequences beyond
    a sliding window, beyond the positions, or beyond where rotary embeddings change with the length of the batch."""
    others = other_layers(model.config)
    if others:
        raise ValueError(
            f"rollouts need layers that keep keys and values alone; {type(model).__name__} has {', '.join(others)}"
        )
    for tokens, why in length_limits(model.config):
        if length > tokens:
            raise ValueError(f"prompt and answer take {length} tokens, more than {why} allows; shorten the prompt")
