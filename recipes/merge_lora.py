"""Add a LoRA to its base model's weights: one folder that any tool loads, with no adapter to carry along.

    python recipes/merge_lora.py --model runs/7b/sft/model --adapter runs/7b/dfpo/adapter --output runs/7b/dfpo/model

Each weight is summed in float32 and rounded once. It prints by how much this rounding changed a logit at most, on a
short text. Experts are refused, because what they add depends on the input. With --universal_only the expert that is
always on is merged, which is exact for it, and the others are left out; it prints what that changes on the same text.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pedgpt.adapters import adapted_layers, check_base, load_adapter, merge_lora
from pedgpt.data import load_tokenizer, taught_folder
from pedgpt.models import load_model, save_model, weights_fingerprint, weights_format
from pedgpt.training import run_recipe

DTYPES = ("float32", "bfloat16", "float16")
TEXT = "孩子三岁，发热两天，最高38.5℃，咳嗽、流涕，精神还好。多喝水，注意休息，持续高热时到医院就诊。"


@dataclass(kw_only=True)
class Config:
    model: str  # folder of the base model that the adapter was trained on
    adapter: str  # folder of a LoRA, ours or PEFT's
    output: str  # folder to write
    universal_only: bool = False  # merge the expert that is always on and leave the others out
    quantize: Literal["none", "int8", "nf4"] = "none"  # as the base was in training: its rounded weights are merged
    any_base: bool = False  # use the adapter although it was trained on another model
    dtype: str = ""  # of the weights, before the merge and after: float32, bfloat16 or float16; empty: as stored


def main(config: Config) -> None:
    if config.dtype and config.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, found {config.dtype!r}")
    if Path(config.output).resolve() in (Path(config.model).resolve(), Path(config.adapter).resolve()):
        raise ValueError(f"output: {config.output} would replace what is merged; give another folder")
    if not config.any_base:
        kind = weights_format(config.model, config.quantize)
        check_base(config.adapter, config.model, weights_fingerprint(config.model), kind)
    tokenizer = load_tokenizer(taught_folder(config.model, config.adapter))
    dtype = getattr(torch, config.dtype) if config.dtype else None
    model = load_model(config.model, dtype=dtype, quantize=config.quantize)
    tokenizer.check_fits(model.config.vocab_size, config.model)
    names = load_adapter(model, config.adapter, uniform_routing=config.universal_only)
    text = torch.tensor([tokenizer.encode(TEXT)])
    whole = logits(model, text)
    merge_lora(model, universal_only=config.universal_only)
    change = (logits(model, text) - whole).abs().max().item()
    if not math.isfinite(change):
        raise ValueError("the merged model computes infinities; give --dtype float32 or bfloat16, which reach further")
    layers = adapted_layers(model)  # those that still hold experts
    left_out = {f"{name}.{key}" for name, layer in layers.items() for key in layer.adapter_parameters()}
    save_model(model, config.output, {key: w for key, w in model.state_dict().items() if key not in left_out})
    load_tokenizer(config.model).save(config.output)
    tokenizer.save(config.output)  # the end tokens and the template that training taught
    print(f"{config.output}: merged into {len(names)} layers; the largest change of a logit is {change:.3g}")
    if config.universal_only:
        for layer in layers.values():
            layer.enabled = False
        merged = logits(model, text)
        count = next(iter(layers.values())).num_specific_experts
        same = (merged.argmax(-1) == whole.argmax(-1)).double().mean().item()
        print(
            f"left out: {count} specific experts with their router in each of these layers, which changes a logit on "
            f"{text.numel()} tokens by {(merged - whole).abs().mean():.3g} on average and "
            f"{(merged - whole).abs().max():.3g} at most; the likeliest next token stays the same at {same:.0%} of them"
        )


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model.eval()(tokens).float()


if __name__ == "__main__":
    run_recipe(main, Config)
