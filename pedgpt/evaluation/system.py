"""A trained system: a model, an adapter on it if there is one, and the chat format that it was taught."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from pedgpt.adapters import adapter_base, adapter_fingerprint, check_base, load_adapter, pack_adapters
from pedgpt.data import ChatFormat, FormatSettings, load_tokenizer, taught_folder
from pedgpt.models import ModelConfig, Transformer, load_model, weights_fingerprint, weights_format


@dataclass(kw_only=True)
class SystemSettings(FormatSettings):
    """Which model is used, with which adapter."""

    model: str = ""  # folder of the model; empty: the one that the adapter was trained on
    adapter: str = ""  # folder of an adapter to attach
    any_base: bool = False  # use the adapter although it was trained on another model
    uniform_routing: bool = False  # equal gates where an adapter of the published code lacks its routers
    dtype: str = "float32"  # of the weights: float32 or bfloat16
    quantize: Literal["none", "int8", "nf4"] = "none"  # the linear layers: in 8 bits, in 4 bits, or as they are
    device: str = "auto"  # auto, cpu or cuda

    def load_chat(self) -> ChatFormat:
        """The chat format, before the weights are loaded; ValueError where model, adapter and tokenizer do not fit."""
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype must be "float32" or "bfloat16", found {self.dtype!r}')
        if not self.model:
            if not self.adapter:
                raise ValueError("give --model, or --adapter with the model that it names")
            self.model = adapter_base(self.adapter)
            if not os.path.isdir(self.model):
                raise ValueError(f"{self.adapter}: was trained on {self.model}, which is not there; give its --model")
        if self.adapter and not self.any_base:
            kind = weights_format(self.model, self.quantize)
            check_base(self.adapter, self.model, weights_fingerprint(self.model), kind)
        tokenizer = load_tokenizer(self.taught)
        tokenizer.check_fits(ModelConfig.from_hf(self.model).vocab_size, self.model)
        return self.format(tokenizer)

    @property
    def taught(self) -> str:
        """The folder that holds the tokenizer, the template and the end tokens."""
        return taught_folder(self.model, self.adapter)

    def weights(self) -> str:
        """A short name of the model's weights and of the adapter's files; training either of them changes it."""
        found = weights_fingerprint(self.model)
        return f"{found}+{adapter_fingerprint(self.adapter)}" if self.adapter else found

    def load_model(self, device: torch.device) -> Transformer:
        """The model with its adapter on the device, in evaluation mode."""
        dtype = getattr(torch, self.dtype)
        model = load_model(self.model, dtype=dtype, device=device, quantize=self.quantize)
        if self.adapter:
            load_adapter(model, self.adapter, uniform_routing=self.uniform_routing)
            pack_adapters(model)
        return model.eval()
