"""Write a Baichuan2-7B model as the Llama it is, for tools without the vendor's code: vLLM, llama.cpp, transformers.

    python recipes/export_llama.py --model runs/7b/sft/model --output runs/7b/llama

W_pack becomes q, k and v, the head's rows get their unit length, and the tokenizer becomes a tokenizer.json with the
chat format as its template. Logits stay the same, and so do ids, except for texts that a warning names. The 13B has
ALiBi positions, which no Llama has.
"""

from dataclasses import dataclass

from pedgpt.data import chat_format, load_tokenizer
from pedgpt.data.chat import BUILT_IN
from pedgpt.data.chat_template import read_template
from pedgpt.models import export_llama, load_model
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
    export_llama(model, config.output)
    tokenizer.save(config.output, convert=True, chat_template=own[0] if own else chat and chat.jinja)
    if chat:
        chat.save_ends(config.output)
    print(f"{config.output}: a Llama of {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    run_recipe(main, Config)
