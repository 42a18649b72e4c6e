"""What a checkpoint's config.json says of the network, for all five families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("baichuan", "llama", "qwen2", "qwen3")
BAICHUAN2_VOCAB_SIZE = 125_696

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
        """Read a checkpoint folder, a config.json, or its dictionary (SPEC: Baichuan 1/2, Llama 2/3, Qwen2/2.5, Qwen3).

        Raises ValueError for a missing or broken file, an unknown family, missing keys, or features of the
        checkpoint that would silently change its outputs if ignored (sliding window, unknown `rope_scaling`).
        """
        raw = dict(source) if isinstance(source, Mapping) else _read_json(Path(source))
        family = _check_family(raw.get("model_type"))
        layers = raw.get("layer_types") or []
        if raw.get("use_sliding_window") or not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
            raise ValueError(
                "config.json: use_sliding_window or layer_types asks for other than full attention; not supported"
            )
        for key in ("quantization_config", "dual_chunk_attention_config"):
            if raw.get(key):
                raise ValueError(f"config.json: {key} is set; such a checkpoint is not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if key not in raw
        ]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)} (found: {', '.join(sorted(raw))})")

        hidden, heads, vocab = raw["hidden_size"], raw["num_attention_heads"], raw["vocab_size"]
        head_dim = raw.get("head_dim", 128 if family == "qwen3" else None)  # Qwen3's default is no quotient
        if head_dim is None:
            if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
                raise ValueError(f"config.json: hidden_size {hidden!r} is no multiple of num_attention_heads {heads!r}")
            head_dim = hidden // heads
        theta, scaling = _rope_settings(raw)
        baichuan = family == "baichuan"
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
            # Baichuan's 7B rotates and its 13B uses ALiBi; nothing in the vendor's config.json says so but the width.
            positions=raw.get(POSITIONS_KEY) or ("alibi" if baichuan and hidden != 4096 else "rope"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            normalize_head=bool(raw.get(NORM_HEAD_KEY, baichuan and vocab == BAICHUAN2_VOCAB_SIZE)),
            fused_qkv=baichuan,
            # Qwen2 has biases on q, k and v and none on o; no key of its config says so.
            attention_bias=family == "qwen2" or (not baichuan and bool(raw.get("attention_bias", False))),
            attention_output_bias=family in ("llama", "qwen3") and bool(raw.get("attention_bias", False)),
            mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            extra={key: value for key, value in raw.items() if key not in _READ_KEYS},
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model: what it was read from, with the values that pedgpt understands."""
        architecture = {
            "baichuan": "BaichuanForCausalLM",
            "llama": "LlamaForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
        }[self.model_type]
        raw: dict[str, Any] = {"architectures": [architecture], "model_type": self.model_type, **self.extra}
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
            raise ValueError(f"row_length {tokens} exceeds the model's max_position_embeddings, {reach}; lower it")


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
}


def _check_number(name: str, value: Any, positive: bool = False) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**53:  # NaN compares false
        raise ValueError(f"config.json: {name} must be a number of at least 0 and below 2**53, found {value!r}")
    if positive and value == 0:
        raise ValueError(f"config.json: {name} must be positive, found {value!r}")
    return float(value)


def _check_family(family: Any) -> str:
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"config.json: model_type {family!r} is not supported; expected one of {', '.join(FAMILIES)}")
    return family


def _rope_settings(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either spelling: `rope_theta` + `rope_scaling`, or the newer `rope_parameters`."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise ValueError(f"config.json: {key} must be an object, found {raw[key]!r}")
    parameters = raw.get("rope_parameters") or {}
    scaling = dict(raw.get("rope_scaling") or parameters)
    theta = scaling.pop("rope_theta", None) or parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    kind = scaling.pop("type", None)
    kind = scaling.setdefault("rope_type", kind or "default")
    if kind == "default":
        return _check_number("rope_theta", theta, positive=True), None
    if not isinstance(kind, str) or kind not in _ROPE_SCALING:
        raise ValueError(f"config.json: rope_scaling type {kind!r} is not supported; one of default, linear, llama3")
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
