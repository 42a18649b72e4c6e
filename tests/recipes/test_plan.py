"""The memory plan: what it predicts is what a step holds, its output is what a user needs, its errors one line."""

import contextlib
import importlib.util
import io
import os
import re
import runpy
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pedgpt.adapters import inject_experts, inject_lora, set_noise_rows
from pedgpt.kernels import linear_logps
from pedgpt.losses import linear_cross_entropy, linear_sequence_logps
from pedgpt.models import ModelConfig, Transformer
from pedgpt.training import parse_settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SHAPE = {
    "model_type": "baichuan", "vocab_size": 900, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 4, "model_max_length": 256, "pedgpt_positions": "rope", "pedgpt_norm_head": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("recipe_plan", RECIPES / "plan.py")
    sys.modules["recipe_plan"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(plan, stage, **changed):
    common = {"row_length": 128, "micro_batch_size": 2, "global_batch_size": 2}
    return plan.settings_class([stage], stage)(**{**common, **changed})


def called(*arguments):
    """Exit code, output and errors of the recipe's command line."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["plan.py", *map(str, arguments)]), patch.object(os, "_exit", sys.exit),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
    ):  # fmt: skip
        try:
            runpy.run_path(str(RECIPES / "plan.py"), run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
    return code, out.getvalue(), err.getvalue()


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
    ("dfpo", {}, {"lora_rank": 4, "dtype": "bfloat16"}),
    ("dfpo", {"vocab_size": 20_000}, {"row_length": 16, "lora_rank": 4}),
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
def test_peak_is_that_of_a_step(plan, stage, shape, changed, monkeypatch):
    monkeypatch.setattr(linear_logps, "CHUNK", 2**17)  # where the vocabulary is large, several
    sizes = ModelConfig.from_hf({**SHAPE, **shape})
    config = settings(plan, stage, **changed)
    moments, counts = plan.estimate(stage, config, sizes, plan.Host())

    dtype = getattr(torch, config.dtype)
    adapted = stage == "experts" or (stage == "dfpo" and config.lora_rank)
    model = Transformer(sizes).to(dtype if adapted else torch.float32)
    if stage == "experts":
        inject_experts(model, rank=config.rank, dropout=config.dropout)
    elif adapted:
        inject_lora(model, rank=config.lora_rank)
    model.activation_checkpointing = config.activation_checkpointing
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert counts["parameters"] == sum(p.numel() for p in model.parameters())
    assert counts["trainable"] == sum(p.numel() for p in trainable)

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
    assert plan.peak(moments) == pytest.approx(live.peak, rel=0.04)


@pytest.mark.parametrize(
    ("stage", "shape", "changed"),
    [
        ("sft", {}, {"dtype": "bfloat16", "activation_checkpointing": "block"}),
        ("cpt", {"pedgpt_positions": "alibi", "vocab_size": 40}, {"ranks": 2, "dtype": "bfloat16"}),
        ("dfpo", {}, {"dtype": "bfloat16", "activation_checkpointing": "block", "global_batch_size": 4}),
        ("experts", {"vocab_size": 40}, {"dropout": 0.1, "target_modules": ["W_pack", "up_proj"]}),
        ("generate", {"pedgpt_positions": "alibi"}, {}),
    ],
)
@pytest.mark.parametrize("on_cuda", [False, True])
def test_every_further_block_adds_what_the_third_adds(plan, stage, shape, changed, on_cuda):
    sizes = ModelConfig.from_hf({**SHAPE, **shape, "num_hidden_layers": 7})
    config = settings(plan, stage, **changed) if stage != "generate" else plan.settings_class([stage], stage)()
    moments, counts = plan.estimate(stage, config, sizes, plan.Host(on_cuda))
    peaks, counted = plan.count(stage, config, sizes, plan.Host(on_cuda))
    assert counts == counted
    totals = {name: sum(parts.values()) - parts.get("layout", 0) for name, parts in moments.items()}
    assert totals == {name: found.total for name, found in peaks.items()}


def test_an_expert_in_one_block_only_is_not_counted_in_all(plan):
    sizes = ModelConfig.from_hf({**SHAPE, "num_hidden_layers": 5})
    config = settings(plan, "experts", target_modules=["model.layers.4.mlp.up_proj"])
    _, counts = plan.estimate("experts", config, sizes, plan.Host())
    # one universal and three specific experts of rank 8, and two routers
    assert counts["trainable"] == 4 * 8 * (64 + 160) + 2 * 3 * 64


def test_ranks_share_weights_gradients_and_state(plan):
    sizes = ModelConfig.from_hf(SHAPE)
    one, two = (
        plan.estimate("sft", settings(plan, "sft", ranks=ranks, global_batch_size=4), sizes, plan.Host())[0]
        for ranks in (1, 2)
    )
    for part in ("weights", "gradients", "optimizer"):
        assert two["update"][part] == pytest.approx(one["update"][part] / 2, rel=0.01)
    whole = sum(parameter.nbytes for parameter in Transformer(sizes).parameters())
    assert 0 < two["forward"]["gathered"] < whole and one["forward"].get("gathered", 0) == 0


CONFIGS = RECIPES / "configs"


def total(text):
    """The largest total of the table, in bytes."""
    unit = {"MiB": 2**20, "GiB": 2**30}[re.search(r"(\w+) per rank, at", text)[1]]
    return unit * max(map(float, re.search(r"^total +(.*)$", text, re.MULTILINE)[1].replace(",", "").split()))


def test_demo_fits_and_the_table_is_complete():
    code, out, err = called("--config", CONFIGS / "demo/sft.toml", "--memory_gib", 16)
    assert (code, err) == (0, "")
    # base.toml by hand: 2·3072·192 + 4·(4·192² + 3·192·512 + 2·192) + 192 = 2,950,848
    assert re.search(r"^  parameters +2,950,848\n  trainable +2,950,848 +\(100.00%\)$", out, re.M)
    for part in ("weights", "gradients", "AdamW's state", "activations", "logits and head", "Python and libraries"):
        assert re.search(rf"^{part} +[\d.]", out, re.M), part
    assert re.search(r"^AdamW's state +22\.5 ", out, re.M)  # 2 · 4 bytes a parameter, in MiB
    assert re.search(r"^fits: \d\.\d\d of 16\.00 GiB given$", out, re.M)


def test_what_does_not_fit_is_told_what_helps():
    common = ["--config", CONFIGS / "baichuan2_7b/sft.toml", "--memory_gib", 80, "--device", "cuda"]
    code, out, _ = called(*common)
    assert code == 1 and "does not fit" in out
    changes = dict(re.findall(r"^  (\S+) = \S+ +([\d.]+ GiB.*)$", out, re.M))
    assert set(changes) == {"ranks", "row_length"}  # the others are as low as they go already
    assert out.count("ranks = ") == 1  # more than what is enough is not tried
    code, shared, _ = called(*common, "--ranks", 2)
    assert code == 0 and f"{total(shared) / 2**30:.2f} GiB  fits" == changes["ranks"]
    assert re.search(r"^  experts instead of all parameters +[\d.]+ GiB  fits$", out, re.M)


def test_generation_counts_the_cache():
    flags = ["--batch_size", 1, "--generation_batch_size", 4, "--row_length", 512, "--max_new_tokens", 512]
    code, out, _ = called("--config", CONFIGS / "baichuan2_7b/evaluate.toml", *flags, "--memory_gib", 80)
    assert code == 0
    # 2 · 32 layers · 4 rows · 1,024 tokens · 4,096 numbers · 2 bytes = 2 GiB, and positions
    assert re.search(r"^key-value cache +0\.00 +2\.00 +2\.00$", out, re.M)


@pytest.mark.parametrize(("new", "rows", "copied"), [(16, 8, True), (15, 8, False), (16, 65, False)])
def test_decodings_copy_of_the_weights_counts_where_there_is_one(new, rows, copied):
    flags = ["--generation_batch_size", rows, "--max_new_tokens", new, "--device", "cpu", "--memory_gib", 80]
    _, out, _ = called("--config", CONFIGS / "demo/evaluate.toml", *flags)
    weights, copies = (re.search(rf"^{part} .* ([\d.]+)$", out, re.M) for part in ("weights", "weights laid out anew"))
    assert bool(copies) == copied and (not copied or copies[1] == weights[1] != "0.0")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "demo/sft.toml", "--model", "/nowhere"], "/nowhere: no such file"),
        (["--config", "demo/sft.toml", "--rank", "8"], "did you mean 'ranks'?"),
        (["--config", "demo/sft.toml", "--num_specific_experts", "3"], "is no setting of this recipe"),
        (["--config", "demo/sft.toml", "--row_length", "5000"], "max_position_embeddings, 768"),
        (["--config", "demo/sft.toml", "--micro_batch_size", "0"], "micro_batch_size must be at least 1"),
        (["--config", "demo/base.toml"], "vocab_size is no setting"),
        (["--config", "demo/experts.toml", "--target_modules", "q_proj"], "'q_proj' matches no linear layer"),
        (["--config", "demo/evaluate.toml", "--ranks", "2"], "one process"),
        (["--config", "demo/dfpo.toml", "--memory_gib", "nan"], "memory_gib"),
        (["--stage", "rlhf"], "found 'rlhf'"),
        (["--stage", "sft"], "give --model"),
        ([], "--stage must be one of cpt, sft, dfpo, experts, generate"),
    ],
)
def test_mistakes_end_in_one_line(arguments, said):
    code, out, err = called(*(CONFIGS / word if word.endswith(".toml") else word for word in arguments))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


@pytest.mark.parametrize("stage", ["cpt", "sft", "dfpo", "experts", "evaluate"])
@pytest.mark.parametrize("folder", ["demo", "baichuan2_7b", "baichuan2_13b"])
def test_every_shipped_file_can_be_planned(plan, folder, stage):
    file = str(CONFIGS / folder / f"{stage}.toml")
    config = parse_settings(plan.settings_of(["--config", file]), ["--config", file])
    moments, _ = plan.estimate(config.planned, config, plan.model_sizes("", file), plan.Host())
    assert plan.peak(moments) > 0
