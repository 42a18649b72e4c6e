"""Stage 1, continued pre-training on a hybrid of text and instructions rewritten as text (PediatricsGPT §3.2).

    python recipes/continued_pretrain.py --config recipes/configs/demo/cpt.toml --model runs/demo/base \\
        --output runs/demo/cpt --corpus runs/demo/corpus
    torchrun --nproc-per-node 8 recipes/continued_pretrain.py --config recipes/configs/baichuan2_7b/cpt.toml \\
        --model checkpoints/Baichuan2-7B-Base --output runs/7b/cpt \\
        --text path/to/text --instructions path/to/instructions

Every token carries loss. Instructions become plain completions without chat role tokens, in several surface forms.
Token ids lie on disk, in OUTPUT/tokens, until the run is finished.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pedgpt import stage, training
from pedgpt.data import (
    PackedRows,
    TextSource,
    Tokenizer,
    TokenStore,
    discards_tokens,
    full_rows,
    heldout_files,
    load_tokenizer,
    mix,
    parse_columns,
    part_shares,
    stage_sources,
    write_tokens,
)
from pedgpt.data.manifest import DOMAIN, GENERAL, INSTRUCTIONS
from pedgpt.losses import next_token_loss
from pedgpt.models import ModelConfig
from pedgpt.training.plan import print_plan


@dataclass(kw_only=True)
class Config(stage.StageSettings):
    corpus: str = ""  # folder of build_corpus.py's manifest.json, in place of the three lists that follow
    text: list[str] = field(default_factory=list)  # documents of the domain: files or folders
    general_text: list[str] = field(default_factory=list)  # documents of no domain
    instructions: list[str] = field(default_factory=list)  # conversations that become completions
    heldout_text: list[str] = field(default_factory=list)  # documents to evaluate on; none: pediatric ones of `corpus`
    instruction_share: float = 0.5  # of all tokens; 0 trains on text only, 1 on instructions only
    domain_to_general: float = 9.0  # tokens of domain text for each token of general text
    total_tokens: int = 0  # tokens to draw; 0: as many as use the domain text (without a share, the instructions) once
    columns: list[str] = field(default_factory=list)  # field=column, e.g. text=body, if the column's name is unknown
    on_bad_row: str = "error"  # "error" stops at a bad row, "skip" counts it and goes on


def model_and_loss(config: Config, world: training.World):
    """What trains, as yet without the model's weights, and its loss, at every position."""
    return stage.build(config, world), stage.gated(next_token_loss, config)


@discards_tokens
def main(config: Config) -> None:
    config.check()
    if config.plan:
        return print_plan(config, model_and_loss, full_rows)
    if not 0 <= config.instruction_share <= 1 or config.domain_to_general <= 0 or config.total_tokens < 0:
        raise ValueError("instruction_share must be in [0, 1], domain_to_general positive, total_tokens not negative")
    if config.corpus and (config.text or config.general_text or config.instructions):
        raise ValueError("corpus and lists of files are given; give corpus, or text, general_text and instructions")
    if not config.corpus and not config.text and config.instruction_share < 1:
        raise ValueError("missing setting: text; give --text and --instructions with files, or --corpus with a folder")
    world = training.start(config.device)
    training.settle_run(config.output, world)

    # Data: each source as token ids on disk, mixed by share, packed into rows.
    tokenizer = load_tokenizer(config.model)
    sizes = ModelConfig.from_hf(config.model)
    tokenizer.check_fits(sizes.vocab_size, config.model)
    sizes.check_length(config.row_length)
    tokens = Path(config.output) / "tokens"
    training.run_on_main(write_stores(config, tokenizer, tokens), world)
    store, heldout = TokenStore(tokens / "train"), TokenStore(tokens / "heldout")
    shares = part_shares(config.instruction_share, config.domain_to_general, store.parts())
    mixture = mix(store.sources, store.sizes(), shares, total_tokens=config.total_tokens, seed=config.seed)
    rows = PackedRows(store, mixture.order, config.row_length)
    heldout_rows = PackedRows(heldout, None, config.row_length)
    about = [(store.summary + heldout.summary).describe(), mixture.describe(), rows.describe()]
    if rows.utilization < 0.99:
        about.append("warning: rows below 99 % waste time; a longer row_length or more text fills them better")

    # The model, its loss, the loop from the last checkpoint on, and the result.
    stage.train(config, world, rows, heldout_rows, model_and_loss, tokenizer.save, about=about)


def write_stores(config: Config, tokenizer: Tokenizer, folder: Path) -> Iterator[int]:
    """Write the token stores of the training and the held-out text, as `write_tokens` does each."""
    lists = ((DOMAIN, "documents", config.text), (GENERAL, "documents", config.general_text),
             (INSTRUCTIONS, "conversations", config.instructions))  # fmt: skip
    sources = [TextSource("files", part, kind, tuple(paths)) for part, kind, paths in lists if paths]
    heldout = config.heldout_text
    if config.corpus:
        sources = stage_sources(config.corpus)
        heldout = heldout or heldout_files(config.corpus, "text/pediatric")
    share = config.instruction_share
    used = [source for source in sources if (share if source.part == INSTRUCTIONS else 1 - share) > 0]
    read = {"seed": config.seed, "on_bad_row": config.on_bad_row, "columns": parse_columns(config.columns)}
    yield from write_tokens(folder / "train", used, tokenizer, **read)
    held = [TextSource("held-out files", DOMAIN, "documents", tuple(heldout))] if heldout else []
    yield from write_tokens(folder / "heldout", held, tokenizer, **read)


if __name__ == "__main__":
    training.run_recipe(main, Config)
