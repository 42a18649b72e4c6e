"""What a checkpoint's config.json says of the network, for all families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = {
    "baichuan": "BaichuanForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",  # Llama's network; only one without a sliding window is supported
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# A Baichuan's config.json has no key for its positions and its head: only the vendor's sizes tell them.
BAICHUAN_POSITIONS = {4096: "rope", 5120: "alibi"}  # by hidden_size: 7B and 13B
BAICHUAN_NORM_HEAD = {64_000: False, 125_696: True}  # by vocab_size: Baichuan-1 and Baichuan2

# Beyond these no checkpoint is real, and the sizes of its tensors overflow.
MAX_SIZE, MAX_LAYERS = 2**24, 1024

# Our own keys in config.json. They override what the family and the sizes imply, which small models cannot show.
POSITIONS_KEY = "pedgpt_positions"
NORM_HEAD_KEY = "pedgpt_norm_head"


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of one decoder, in the spelling of HF's config.json.

    `positions` is "rope" or "alibi"; `normalize_head` is Baichuan2's NormHead; `fused_qkv` is Baichuan's `W_pack`;
    `rope_scaling` holds the checkpoint's dictionary or None; `extra` keeps the keys that the network does not need, so
    that saving loses none of them.
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
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config.json: {name} must be a positive integer, found {value!r}")
            if value > (limit := MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE):
                raise ValueError(f"config.json: {name} is {value}, more than {limit}")
        if self.num_attention_heads * self.head_dim > MAX_SIZE:
            raise ValueError(f"config.json: {self.num_attention_heads} heads of {self.head_dim} exceed {MAX_SIZE}")
        _check_family(self.model_type)
        for name in ("rms_norm_eps", "initializer_range", "rope_theta"):
            _check_number(name, getattr(self, name))
        if self.rope_scaling:
            for key in _ROPE_SCALING[self.rope_scaling["rope_type"]]:
                _check_number(f"rope_scaling {key}", self.rope_scaling[key], positive=True)
            if self.rope_scaling["rope_type"] == "yarn":
                for key in _YARN_OPTIONS:
                    if self.rope_scaling.get(key) is not None:
                        _check_number(f"rope_scaling {key}", self.rope_scaling[key])
                if self.rope_theta <= 1:
                    raise ValueError(f"config.json: yarn needs a rope_theta above 1, found {self.rope_theta}")
            if self.rope_scaling["rope_type"] == "llama3":
                low, high = self.rope_scaling["low_freq_factor"], self.rope_scaling["high_freq_factor"]
                if high <= low:
                    raise ValueError(f"config.json: rope_scaling needs high_freq_factor above {low}, found {high}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.positions not in ("rope", "alibi"):
            raise ValueError(f'config.json: {POSITIONS_KEY} must be "rope" or "alibi", found {self.positions!r}')
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"config.json: rotary positions need an even head_dim, found {self.head_dim}")
        if self.fused_qkv and self.num_key_value_heads != self.num_attention_heads:
            raise ValueError("config.json: W_pack (baichuan) needs as many key-value heads as attention heads")

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a checkpoint folder, a config.json, or its dictionary: Baichuan 1/2, Llama 2/3, Mistral, Qwen2/2.5/3.

        Raises ValueError for a missing or broken file, an unknown family, missing keys, a Baichuan of other sizes than
        the vendor's without our own keys, or features of the checkpoint that would silently change its outputs if
        ignored (a sliding window that is used, unknown `rope_scaling`).
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        family = _check_family(raw.get("model_type"))
        for key in ("quantization_config", "dual_chunk_attention_config"):
            if raw.get(key):
                raise ValueError(f"config.json: {key} is set; such a checkpoint is not supported")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
            raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only 'silu' or 'swish'")
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if key not in raw
        ]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)} (found: {', '.join(sorted(raw))})")

        _refuse_sliding_window(family, raw)
        hidden, heads, vocab = raw["hidden_size"], raw["num_attention_heads"], raw["vocab_size"]
        head_dim = raw.get("head_dim", 128 if family == "qwen3" else None)  # Qwen3's default is no quotient
        if head_dim is None:
            if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
                raise ValueError(f"config.json: hidden_size {hidden!r} is no multiple of num_attention_heads {heads!r}")
            head_dim = hidden // heads
        theta, scaling = _rope_settings(raw)
        baichuan = family == "baichuan"
        positions, normalize_head = _own_switches(raw, baichuan)
        return cls(
            model_type=family,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
            head_dim=head_dim,
            max_position_embeddings=raw.get("max_position_embeddings") or raw.get("model_max_length") or 4096,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            initializer_range=raw.get("initializer_range", 0.02),
            positions=positions,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            normalize_head=normalize_head,
            fused_qkv=baichuan,
            # Qwen2 has biases on q, k and v and none on o; no key of its config says so.
            attention_bias=family == "qwen2" or (family in ("llama", "qwen3") and _flag(raw, "attention_bias")),
            attention_output_bias=family in ("llama", "qwen3") and _flag(raw, "attention_bias"),
            mlp_bias=family == "llama" and _flag(raw, "mlp_bias"),
            qk_norm=family == "qwen3",
            extra={key: value for key, value in raw.items() if key not in _READ_KEYS},
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model: what it was read from, with the values that pedgpt understands."""
        raw: dict[str, Any] = {"architectures": [ARCHITECTURES[self.model_type]], "model_type": self.model_type}
        if self.model_type == "mistral":
            raw["sliding_window"] = None  # where the key is missing, transformers takes 4096
        raw |= self.extra
        for name in _SHARED_KEYS:
            raw[name] = getattr(self, name)
        raw["hidden_act"] = "silu"
        if self.positions == "rope":
            raw["rope_theta"] = self.rope_theta
            raw["rope_scaling"] = dict(self.rope_scaling) if self.rope_scaling else None
        if self.model_type in ("llama", "qwen3"):
            raw["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            raw["mlp_bias"] = self.mlp_bias
        if self.model_type == "baichuan":
            raw["model_max_length"] = self.max_position_embeddings
        if self.model_type == "baichuan" or self.positions != "rope" or self.normalize_head:
            raw[POSITIONS_KEY] = self.positions
            raw[NORM_HEAD_KEY] = self.normalize_head
        return raw

    @property
    def dtype(self) -> torch.dtype:
        """What config.json says the weights are stored in; float32 where it says nothing."""
        name = str(self.extra.get("dtype") or self.extra.get("torch_dtype") or "float32").removeprefix("torch.")
        if name not in ("float64", "float32", "float16", "bfloat16"):
            raise ValueError(f"config.json: dtype {name!r} is not supported")
        return getattr(torch, name)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if rows of so many tokens are longer than the model's positions reach."""
        if tokens > self.max_position_embeddings:
            reach = self.max_position_embeddings
            hint = ", or raise that key of config.json to what rope_scaling reaches" if self.rope_scaling else ""
            raise ValueError(
                f"row_length {tokens} exceeds the model's max_position_embeddings, {reach}; lower it{hint}"
            )


_SHARED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
    "tie_word_embeddings",
)  # fmt: skip
_READ_KEYS = {f.name for f in fields(ModelConfig)} | {
    "rope_parameters", "hidden_act", POSITIONS_KEY, NORM_HEAD_KEY, "model_max_length",
}  # fmt: skip


_ROPE_SCALING = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _check_number(name: str, value: Any, positive: bool = False) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**53:  # NaN compares false
        raise ValueError(f"config.json: {name} must be a number of at least 0 and below 2**53, found {value!r}")
    if positive and value == 0:
        raise ValueError(f"config.json: {name} must be positive, found {value!r}")
    return float(value)


def _check_family(family: Any) -> str:
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: model_type {family!r} is not supported; expected one of {known}")
    return family


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    """A switch of config.json; false where it is missing or null."""
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, found {value!r}")
    return value


def _own_switches(raw: Mapping[str, Any], baichuan: bool) -> tuple[str, bool]:
    """(positions, normalize_head) by our own keys, or of a Baichuan by the vendor's sizes; nothing else is guessed."""
    positions, norm_head = raw.get(POSITIONS_KEY), raw.get(NORM_HEAD_KEY)
    hidden, vocab = raw["hidden_size"], raw["vocab_size"]
    if positions is None:
        positions = next((kind for size, kind in BAICHUAN_POSITIONS.items() if size == hidden), None)
        positions = positions if baichuan else "rope"
    if norm_head is None:
        norm_head = next((kind for size, kind in BAICHUAN_NORM_HEAD.items() if size == vocab), None)
        norm_head = norm_head if baichuan else False
    if positions is None or norm_head is None:
        raise ValueError(
            f"config.json: hidden_size {hidden!r} with vocab_size {vocab!r} is no Baichuan that the vendor published "
            "(4096 or 5120 with 64000 or 125696), so its positions and its head are not known. Add to config.json "
            f'"{POSITIONS_KEY}": "rope" if the model comes from a 7B, "alibi" if from a 13B; and "{NORM_HEAD_KEY}": '
            "true if it comes from a Baichuan2 (also with a resized vocabulary), false if from a Baichuan-1"
        )
    return positions, _flag({NORM_HEAD_KEY: norm_head}, NORM_HEAD_KEY)


def _refuse_sliding_window(family: str, raw: Mapping[str, Any]) -> None:
    """ValueError if a layer attends to fewer tokens than a text may have; a window that no layer uses is accepted.

    A missing key counts as in transformers: `sliding_window` is 4096, `max_window_layers` 28.
    """
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types is {kinds!r}; only full_attention is supported")
    window = raw.get("sliding_window", 4096)
    if family == "mistral":
        used, fix = window is not None, 'if the checkpoint has no window, write "sliding_window": null'
    else:
        first = raw.get("max_window_layers", 28)
        layers = raw["num_hidden_layers"]
        inside = isinstance(first, int) and isinstance(layers, int) and first >= layers
        used = _flag(raw, "use_sliding_window") and window is not None and not kinds and not inside
        fix = 'if no layer uses it, write "use_sliding_window": false'
    reach = raw.get("max_position_embeddings")
    if used and not (isinstance(window, int) and isinstance(reach, int) and window >= reach):
        raise ValueError(f"config.json: a sliding window of {window!r} tokens is used, which is not supported; {fix}")


def _rope_settings(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling: `rope_theta` + `rope_scaling`, or the newer `rope_parameters`."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise ValueError(f"config.json: {key} must be an object, found {raw[key]!r}")
    parameters = raw.get("rope_parameters") or {}
    scaling = dict(raw.get("rope_scaling") or parameters)
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError("config.json: rope_parameters differ from layer to layer, which is not supported")
    theta = scaling.pop("rope_theta", None) or parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind == "default":
        return _check_number("rope_theta", theta, positive=True), None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        known = ", ".join(_ROPE_SCALING)
        raise ValueError(f"config.json: rope_scaling type {kind!r} is not supported; one of default, {known}")
    if kind == "yarn":  # as transformers reads it
        outside = raw.get("original_max_position_embeddings")
        length = outside or scaling.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
        scaling["original_max_position_embeddings"] = length
    missing = [key for key in _ROPE_SCALING[kind] if key not in scaling]
    if missing:
        raise ValueError(f"config.json: rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    return _check_number("rope_theta", theta, positive=True), scaling


def inside_folder(path: Path) -> Path:
    """`path`, unless it is a link that leaves its folder: then ValueError. A hub cache keeps its files in `blobs`."""
    folder = path.parent.resolve()
    allowed = [folder] + ([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [])
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(f"{path}: a link that leaves its folder, to {target}; copy the file in if you trust it")
    return path


def parse_json(file: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError that names it for anything else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of which JSONDecodeError and UnicodeDecodeError are kinds
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    return raw


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a model folder with config.json")
    return parse_json(inside_folder(file))
