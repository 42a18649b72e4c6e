"""Write a Baichuan2-7B model as the Llama it is, for tools without the vendor's code: vLLM, llama.cpp, transformers.

    python recipes/export_llama.py --model runs/7b/sft/model --output runs/7b/llama

W_pack becomes q, k and v, the head's rows get their unit length, and the tokenizer becomes a tokenizer.json with the
chat format as its template. Logits and ids stay the same. The 13B has ALiBi positions, which no Llama has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from pedgpt.data import Tokenizer, chat_format, load_tokenizer
from pedgpt.data.chat import BUILT_IN
from pedgpt.data.chat_template import read_template
from pedgpt.data.tokenizer import NAMED
from pedgpt.models import ModelConfig, Transformer, load_model, save_model
from pedgpt.training import run_recipe


@dataclass(kw_only=True)
class Config:
    model: str  # folder of a Baichuan model with rotary positions
    output: str  # folder to write


def main(config: Config) -> None:
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model)
    tokenizer.check_fits(model.config.vocab_size, config.model)
    own = read_template(tokenizer.config, tokenizer.folder)  # another format may have been taught
    speaks = own or any(tokenizer.has(*kind.role_tokens) for kind in BUILT_IN.values())
    chat = chat_format(tokenizer) if speaks else None
    save_model(model, config.output, llama_weights(model), llama_config(model.config))
    settings = {key: tokenizer.config[key] for key in NAMED if key in tokenizer.config}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template := own[0] if own else chat and chat.jinja:
        settings["chat_template"] = template
    Tokenizer(tokenizer.backend, settings).save(config.output)
    if chat:
        chat.save_ends(config.output)
    print(f"{config.output}: a Llama of {sum(p.numel() for p in model.parameters()):,} parameters")


def llama_config(config: ModelConfig) -> ModelConfig:
    """The same network as a Llama, without what points to the vendor's code; ValueError for ALiBi and codes."""
    if config.model_type != "baichuan" or config.positions != "rope":
        kind = f"{config.model_type} with {config.positions} positions"
        raise ValueError(f"only a Baichuan with rotary positions (7B) is a Llama by another name; this is {kind}")
    if config.quantization_config:
        raise ValueError("the model is quantised; export the one that it was made from")
    vendor = ("architectures", "auto_map", "tokenizer_class", "_name_or_path", "_from_model_config")
    extra = {key: value for key, value in config.extra.items() if key not in vendor}
    tied = config.tie_word_embeddings and not config.normalize_head
    return replace(
        config, model_type="llama", fused_qkv=False, normalize_head=False, tie_word_embeddings=tied, extra=extra
    )


def llama_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights under a Llama's names: W_pack split into q, k and v, a normalised head's rows of unit length."""
    for key, tensor in model.state_dict().items():
        if ".W_pack." in key:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield key.replace("W_pack", f"{letter}_proj"), part
        else:
            yield key, model.head_weight() if key == "lm_head.weight" else tensor


if __name__ == "__main__":
    run_recipe(main, Config)
