"""`--plan`: what it predicts is what a step holds, its output is what a user needs, its errors one line."""

import json
import re
import tomllib
import weakref
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pedgpt.adapters import inject_experts, inject_lora, pack_adapters, set_noise_rows
from pedgpt.data import full_pairs, full_rows
from pedgpt.kernels import linear_logps
from pedgpt.losses import linear_cross_entropy, linear_sequence_logps
from pedgpt.models import ModelConfig, Transformer
from pedgpt.training import parse_settings, plan
from pedgpt.training.plan import LIBRARIES, count

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

CONFIGS = RECIPES / "configs"
STAGES = {"cpt": "continued_pretrain", "sft": "full_finetune", "dfpo": "dfpo", "experts": "expert_finetune"}
SHAPE = {
    "model_type": "baichuan", "vocab_size": 900, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "model_max_length": 256, "pedgpt_positions": "rope", "pedgpt_norm_head": True,
}  # fmt: skip


def planned(lab, tmp_path, stage, shape, changed, ranks=1):
    """(bytes by part, settings) of a stage for a model of this shape on the CPU."""
    module = lab.module(STAGES[stage])
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **shape}))
    config = parse_settings(module.Config, ["--model", str(tmp_path), "--plan", f"{ranks}x1", "--device", "cpu"])
    config = replace(config, **{"row_length": 128, "micro_batch_size": 2, "global_batch_size": 2, **changed})
    return count(module.model_and_loss, full_pairs if stage == "dfpo" else full_rows, config), config


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors alive, and their peak, counted operation by operation."""

    def __init__(self, model):
        super().__init__()
        self.seen = set()
        self.now = self.peak = 0
        for parameter in model.parameters():
            self.add(parameter)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


ROW = {"micro_batch_size": 1, "global_batch_size": 1}
CASES = [
    ("sft", {}, {}),
    ("sft", {"tie_word_embeddings": True, "pedgpt_norm_head": False, "model_type": "llama"}, {}),
    ("cpt", {"vocab_size": 40}, {"activation_checkpointing": "block"}),
    ("cpt", {"pedgpt_positions": "alibi"}, {"activation_checkpointing": "block", "dtype": "bfloat16"}),
    ("cpt", {"pedgpt_positions": "alibi", "vocab_size": 40, "num_attention_heads": 16}, {
        "activation_checkpointing": "block", "row_length": 256, "micro_batch_size": 1, "global_batch_size": 1,
    }),
    ("sft", {}, {"dtype": "bfloat16", "global_batch_size": 4}),
    ("cpt", {"vocab_size": 20_000}, {"row_length": 16, "dtype": "bfloat16"}),
    ("dfpo", {"vocab_size": 20_000}, {"row_length": 16, "dtype": "bfloat16"}),
    ("dfpo", {}, {"shared_prompt": False}),
    ("dfpo", {}, {"adapter": "lora", "rank": 4, "dtype": "bfloat16"}),
    ("dfpo", {"vocab_size": 20_000}, {"row_length": 16, "adapter": "lora", "rank": 4}),
    ("experts", {}, {}),
    ("experts", {}, {"dtype": "bfloat16", "activation_checkpointing": "block"}),
    # Few words, so that the blocks are the peak and not the head.
    ("cpt", {"vocab_size": 40, "pedgpt_positions": "alibi", "num_attention_heads": 16}, {"dtype": "bfloat16"}),
    *(
        ("experts", {"vocab_size": 40, "num_attention_heads": heads}, {
            "dtype": dtype, "activation_checkpointing": checkpointing, "row_length": 256, **ROW,
        })
        for dtype, checkpointing, heads in (
            ("float32", "none", 16), ("bfloat16", "none", 4), ("bfloat16", "block", 16),
        )
    ),
    ("experts", {"vocab_size": 40, "pedgpt_positions": "alibi"}, {"dtype": "bfloat16", "row_length": 256, **ROW}),
    ("experts", {"vocab_size": 40}, {"dtype": "bfloat16", "dropout": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "shape", "changed"), CASES)
def test_peak_is_that_of_a_step(lab, tmp_path, stage, shape, changed, monkeypatch):
    monkeypatch.setattr(linear_logps, "CHUNK", 2**17)  # where the vocabulary is large, several
    parts, config = planned(lab, tmp_path, stage, shape, changed)
    sizes = ModelConfig.from_hf(tmp_path)

    dtype = getattr(torch, config.dtype)
    adapted = stage == "experts" or (config.adapter != "none")
    model = Transformer(sizes).to(dtype if adapted else torch.float32)
    if stage == "experts":
        inject_experts(model, rank=config.rank, dropout=config.dropout)
    elif adapted:
        inject_lora(model, rank=config.rank)
    model.activation_checkpointing = config.activation_checkpointing
    trainable = [p for p in model.parameters() if p.requires_grad]

    rows, length, answers = config.micro_batch_size, config.row_length, 2 * config.micro_batch_size
    if stage == "dfpo":  # pairs with nothing in common: both answers in a row, or a row each
        rows, length = (rows, 2 * length) if config.shared_prompt else (2 * rows, length)
    tokens = torch.arange(rows * length).view(rows, -1) % sizes.vocab_size
    answer = (torch.arange(rows * length) // config.row_length).view(rows, -1)
    set_noise_rows(model, 0, torch.arange(rows))
    optimizer = torch.optim.AdamW(trainable, fused=True)
    with LiveBytes(model) as live:
        for _ in range(2):
            for _ in range(config.global_batch_size // config.micro_batch_size):
                pack_adapters(model)
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    head = (model.hidden_states(tokens, documents=tokens // 50), model.lm_head.weight, tokens)
                    if stage == "dfpo":
                        options = {"sequences": answer, "num_sequences": answers}
                        loss = linear_sequence_logps(*head, **options, normalize=sizes.normalize_head)[0].sum()
                    else:
                        loss = linear_cross_entropy(*head, num_tokens=1, normalize=sizes.normalize_head)
                    del head
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert sum(parts.values()) - LIBRARIES == pytest.approx(live.peak, rel=0.04)


def test_ranks_share_weights_gradients_and_state(lab, tmp_path):
    accumulated = {"global_batch_size": 4, "micro_batch_size": 1}  # there are gradients throughout
    one, two = (planned(lab, tmp_path, "sft", {}, accumulated, ranks)[0] for ranks in (1, 2))
    for part in ("weights", "gradients", "AdamW's state"):
        assert two[part] == pytest.approx(one[part] / 2, rel=0.01)
    whole = sum(parameter.nbytes for parameter in Transformer(ModelConfig.from_hf(tmp_path)).parameters())
    assert 0 < two["exchanged by the cards"] < whole and "exchanged by the cards" not in one


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """A step of the same settings is counted once for all commands of this file: counting takes most of its time."""
    known, real = {}, plan.count

    def count_once(build, make_batch, settings, *ranks):
        number, _ = plan.cards(settings.plan)
        key = repr((build.__module__, replace(settings, plan=""), number, ranks))
        if key not in known:
            known[key] = real(build, make_batch, settings, *ranks)
        return known[key]

    with patch.object(plan, "count", count_once):
        yield


def called(lab, stage, *flags, folder="baichuan2_7b"):
    """How the recipe's command ends, with the settings and the shape of a folder of configs."""
    settings = ["--config", CONFIGS / folder / f"{stage}.toml", "--model", CONFIGS / folder, *flags]
    return lab.call(STAGES[stage], list(map(str, settings)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with the demo model's config.json."""
    file = tmp_path_factory.mktemp("demo") / "config.json"
    file.write_text(json.dumps({**SHAPE, **tomllib.loads((CONFIGS / "demo" / "base.toml").read_text("utf-8"))}))
    return file.parent


def test_demo_fits_and_the_table_is_complete(lab, demo):
    done = called(lab, "sft", "--model", demo, "--plan", 16, "--device", "cpu", folder="demo")
    assert (done.code, done.err) == (0, "")
    # base.toml by hand: 2·3072·192 + 4·(4·192² + 3·192·512 + 2·192) + 192 = 2,950,848
    assert done.out.startswith("2,950,848 parameters, 2,950,848 train (100.00%); float32\n")
    for part in ("weights", "gradients", "AdamW's state", "activations, logits", "libraries", "total"):
        assert re.search(rf"^{part} +[\d.]+ GB$", done.out, re.M), part
    assert re.search(r"^AdamW's state +0\.02 GB", done.out, re.M)  # 2 · 4 bytes a parameter, in GB
    assert re.search(r"^fits: \d\.\d\d of 16 GB$", done.out, re.M)


def changes(out):
    """What each change that was printed takes, in GB, and whether it fits."""
    found = re.findall(r"^  (--.*?) +([\d.]+) GB(  fits)?$", out, re.M)
    return {flags: (float(held), bool(fits)) for flags, held, fits in found}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Baichuan2-7B with 2 of its 32 blocks, 1.43 billion parameters: as wide as life, and counted sooner."""
    file = tmp_path_factory.mktemp("short") / "config.json"
    sizes = json.loads((CONFIGS / "baichuan2_7b/config.json").read_text("utf-8"))
    file.write_text(json.dumps({**sizes, "num_hidden_layers": 2}))
    return file.parent


def test_what_does_not_fit_is_told_what_helps(lab, short):
    done = called(lab, "sft", "--model", short, "--plan", 20)
    assert done.code == 1 and "does not fit" in done.out
    found = changes(done.out)
    # Blocks are checkpointed, and products in bfloat16, already; the weights' dtype is the cheapest change left.
    state = "--weight_dtype bfloat16 --optimizer_state bfloat16"
    assert list(found) == ["--weight_dtype bfloat16", state]
    assert [fits for _, fits in found.values()] == [False, True] and "together" not in done.out
    again = called(lab, "sft", "--model", short, "--plan", 20, *state.split())
    assert again.code == 0 and float(re.search(r"fits: ([0-9.]+) of", again.out)[1]) == found[state][0]


def test_an_adapter_or_a_quantised_base_is_proposed_where_it_is_the_cheapest(lab, short):
    done = called(lab, "dfpo", "--model", short, "--plan", 8)
    assert done.code == 1 and changes(done.out)["--adapter lora"][1] and "int8" not in done.out
    stage4 = called(lab, "experts", "--model", short, "--plan", 4.2)
    assert changes(stage4.out)["--quantize int8"][1] and "nf4" not in stage4.out


def test_where_no_change_is_enough_several_together_are_proposed(lab, demo, tmp_path):
    sizes = json.loads((demo / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "num_hidden_layers": 1}))  # counted sooner
    command = "sft", "--model", tmp_path, "--device", "cpu", "--plan"
    done = called(lab, *command, "0.655", folder="demo")
    single, together = done.out.split("one after another\n")
    assert together.endswith("all of these together do\n")
    assert done.code == 1 and not any(fits for _, fits in changes(single).values())
    held = [held for held, _ in changes(together).values()]
    assert held == sorted(held, reverse=True) and [fits for _, fits in changes(together).values()][-1]
    flags = " ".join(changes(together)).split()
    assert called(lab, *command, "0.655", *flags, folder="demo").code == 0

    none = called(lab, *command, "0.01", folder="demo")
    assert none.code == 1 and none.out.endswith("even together they are not enough\n") and "  fits" not in none.out


def test_nothing_is_written_and_no_data_is_asked_for(lab, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ([], ["--output", tmp_path / "run"]):
        done = called(lab, "dfpo", "--model", demo, "--plan", 16, *output, folder="demo")
        assert done.code == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("sft", ["--model", "/nowhere"], "/nowhere/config.json: no such file"),
        ("sft", ["--model", ""], "missing setting: model; give --model"),
        ("sft", ["--row_length", "5000"], "max_position_embeddings, 4096"),
        ("sft", ["--micro_batch_size", "0"], "micro_batch_size must be at least 1"),
        ("experts", ["--target_modules", "q_proj"], "'q_proj' matches no linear layer"),
        ("dfpo", ["--plan", "8*80"], "plan must be the size of a card in GB"),
    ],
)
def test_mistakes_end_in_one_line(lab, stage, flags, said):
    done = called(lab, stage, "--plan", "24", *flags)
    assert done.code == 2 and done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert said in done.err
