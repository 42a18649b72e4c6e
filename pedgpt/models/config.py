"""What a checkpoint's config.json says of the network, for all families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pedgpt.files import own_file, read_object
from pedgpt.models.families import FAMILIES
from pedgpt.models.quantized import stored_format

# Our own keys in config.json. They override what the family and the sizes imply, which small models cannot show.
OWN_KEYS = {"positions": "pedgpt_positions", "normalize_head": "pedgpt_norm_head"}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers takes for a key that is missing.
DEFAULTS = {"hidden_act": "silu", "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
MAX_SIZE, MAX_LAYERS = 2**24, 1024  # Beyond these no checkpoint is real, and the sizes of its tensors overflow.
ROPE_SCALING = {  # the numbers that each type needs
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of one decoder, in the spelling of HF's config.json.

    `positions` is "rope" or "alibi"; `normalize_head` is Baichuan2's NormHead; `fused_qkv` is Baichuan's `W_pack`;
    `quantization_config` tells which linear layers are in 8 or 4 bits; `extra` keeps the keys that the network does not
    need. Raises ValueError for values that no network can have.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    tie_word_embeddings: bool = False
    normalize_head: bool = False
    fused_qkv: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    quantization_config: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.type in KINDS:
                _check(OWN_KEYS.get(item.name, item.name), getattr(self, item.name), str(item.type))
        heads, groups, size, kind = self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.positions
        _require(self.model_type in FAMILIES, f"model_type {self.model_type!r} is not supported")
        _require(self.num_hidden_layers <= MAX_LAYERS, f"num_hidden_layers is above {MAX_LAYERS}")
        _require(heads * size <= MAX_SIZE, f"{heads} heads of {size} exceed {MAX_SIZE}")
        _require(heads % groups == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
        _require(kind in ("rope", "alibi"), f'pedgpt_positions is no "rope" or "alibi", but {kind!r}')
        _require(kind == "alibi" or size % 2 == 0, f"rotary positions need an even head_dim, found {size}")
        _require(heads == groups or not self.fused_qkv, "W_pack needs as many key-value heads as attention heads")

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a checkpoint folder, or the dictionary of its config.json.

        Raises ValueError, which says what to change, for a broken file and for a feature that may not be ignored.
        """
        if not isinstance(source, Mapping):
            if own_file(Path(source), "config.json") is None:
                raise ValueError(f"{Path(source, 'config.json')}: no such file; expected a model folder")
            source = read_object(Path(source), "config.json")
        name: Any = source.get("model_type")
        _require(name in [*FAMILIES], f"model_type {name!r} is not supported; expected one of {', '.join(FAMILIES)}")
        missing = [key for key in REQUIRED if key not in source]
        _require(not missing, f"missing {', '.join(missing)} (found: {', '.join(sorted(map(str, source)))})")
        family = FAMILIES[name]
        raw = {**DEFAULTS, **family.defaults, **source}
        for key in REQUIRED:
            _check(key, raw[key], "int")
        _refuse_features(raw)
        hidden, heads, size = raw["hidden_size"], raw["num_attention_heads"], raw.get("head_dim")
        whole = size is not None or hidden % heads == 0
        _require(whole, f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        values: dict[str, Any] = {key: raw.get(key) or False for key in ("tie_word_embeddings", *family.biases)}
        values["quantization_config"] = raw.get("quantization_config") or None
        values |= {"model_type": name, "attention_output_bias": values.get("attention_bias", False), **family.network}
        values |= {key: raw[key] for key in (*REQUIRED, "rms_norm_eps", "initializer_range") if key in raw}
        for key, told in family.by_size.items():
            values |= told.get(raw[key], {})
        values |= {name: raw[key] for name, key in OWN_KEYS.items() if raw.get(key) is not None}
        _require(not family.by_size or OWN_KEYS.keys() <= values.keys(), _UNKNOWN_SIZE.format_map(raw))
        return cls(
            num_key_value_heads=heads if (groups := raw.get("num_key_value_heads")) is None else groups,
            head_dim=hidden // heads if size is None else size,
            max_position_embeddings=raw.get("max_position_embeddings") or raw.get("model_max_length") or 4096,
            extra={key: value for key, value in source.items() if key not in _READ_KEYS},
            **values | _rope_settings(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model: what it was read from, with the values that pedgpt understands."""
        family = FAMILIES[self.model_type]
        raw = {"architectures": [family.architecture], "model_type": self.model_type, **family.written, **self.extra}
        keys = ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range")
        raw |= {key: getattr(self, key) for key in (*REQUIRED, *keys, "tie_word_embeddings", *family.biases)}
        raw |= {"hidden_act": "silu", family.length_key: self.max_position_embeddings}
        if self.positions == "rope":
            raw |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling and dict(self.rope_scaling)}
        if family.by_size or self.positions != "rope" or self.normalize_head:
            raw |= {key: getattr(self, name) for name, key in OWN_KEYS.items()}
        return raw | ({"quantization_config": dict(found)} if (found := self.quantization_config) else {})

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if rows of so many tokens are longer than the model's positions reach."""
        if tokens > (reach := self.max_position_embeddings):
            fix = "; lower it" + ", or raise that key to what rope_scaling reaches" * bool(self.rope_scaling)
            raise ValueError(f"row_length {tokens} exceeds the model's max_position_embeddings, {reach}{fix}")


_READ_KEYS = {*ModelConfig.__annotations__, "rope_parameters", "hidden_act", "model_max_length", *OWN_KEYS.values()}
_UNKNOWN_SIZE = (
    "hidden_size {hidden_size} with vocab_size {vocab_size} is no Baichuan that the vendor published (4096 or 5120 "
    'with 64000 or 125696), so it is not guessed. Add to config.json "pedgpt_positions": "rope" if the model comes '
    'from a 7B, "alibi" if from a 13B; and "pedgpt_norm_head": true if from a Baichuan2, false if from a Baichuan-1'
)
KINDS = {  # of values in config.json: their types in Python, the least and the largest, and what an error calls them
    "int": ((int,), 1, MAX_SIZE, "a positive integer"),
    "float": ((int, float), 0, 2**53 - 1, "a number of at least 0"),
    "bool": ((bool,), False, True, "true or false"),
}


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(f"config.json: {message}")


def _check(key: str, value: Any, kind: str) -> None:
    """ValueError unless a value is of its kind and in the kind's range."""
    types, least, largest, expected = KINDS[kind]
    fits = type(value) in types and least <= value <= largest  # NaN compares false
    above = f", above {largest}" if type(value) in types and value > largest else ""
    _require(fits, f"{key} must be {expected}, found {value!r}{above}")


def _refuse_features(raw: Mapping[str, Any]) -> None:
    """ValueError for what would change the outputs if it were ignored; a window that no layer uses is accepted."""
    stored_format(raw.get("quantization_config"))
    _require(not raw.get(key := "dual_chunk_attention_config"), f"{key} is set; such a checkpoint is not supported")
    activation, kinds = raw["hidden_act"], raw.get("layer_types") or []
    _require(activation in ("silu", "swish"), f"hidden_act {activation!r} is not supported, only 'silu' or 'swish'")
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    _require(full, f"layer_types is {kinds!r}; only full_attention is supported")
    window, reach, first = raw["sliding_window"], raw.get("max_position_embeddings"), raw["max_window_layers"]
    used = raw["use_sliding_window"] or False
    _check("use_sliding_window", used, "bool")
    none = window is None or kinds or (type(first) is int and first >= raw["num_hidden_layers"])
    none = none or (type(window) is type(reach) is int and window >= reach)
    fix = 'if no layer uses it, write "sliding_window": null and "use_sliding_window": false'
    _require(none or not used, f"a sliding window of {window!r} tokens is used, which is not supported; {fix}")


def _rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from either spelling: these two keys, or the newer `rope_parameters`."""
    for key in ("rope_parameters", "rope_scaling"):
        _require(isinstance(raw.get(key) or {}, Mapping), f"{key} must be an object, found {raw.get(key)!r}")
    parameters = raw.get("rope_parameters") or {}
    scaling = dict(raw.get("rope_scaling") or parameters)
    _require(not any(isinstance(v, Mapping) for v in scaling.values()), "rope_parameters differ from layer to layer")
    theta = scaling.pop("rope_theta", None) or parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    _check("rope_theta", theta, "float")
    kind: Any = scaling.setdefault("rope_type", scaling.pop("type", None) or "default")
    if kind == "default":
        return {"rope_theta": theta}
    known = isinstance(kind, str) and kind in ROPE_SCALING
    _require(known, f"rope_scaling type {kind!r} is not supported; one of default, {', '.join(ROPE_SCALING)}")
    if kind == "yarn":  # as transformers reads it
        length = "original_max_position_embeddings"
        scaling[length] = raw.get(length) or scaling.get(length) or raw.get("max_position_embeddings")
        _require(theta > 1, f"yarn needs a rope_theta above 1, found {theta}")
    missing = [key for key in ROPE_SCALING[kind] if not scaling.get(key)]
    _require(not missing, f"rope_scaling of type {kind!r} lacks {', '.join(missing)} (above 0)")
    for key in ROPE_SCALING[kind] + YARN_OPTIONS * (kind == "yarn"):
        _check(f"rope_scaling {key}", 0 if scaling.get(key) is None else scaling[key], "float")
    low, high = scaling.get("low_freq_factor", 0), scaling.get("high_freq_factor", 1)
    _require(kind != "llama3" or low < high, f"rope_scaling needs high_freq_factor above {low}, found {high}")
    return {"rope_theta": theta, "rope_scaling": scaling}
