"""The whole-step groups of `gpu.py`: training by the recipes' own code, decoding, and every stage from disk."""

import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import gpu
import torch
from gpu import CUDA, DEVICE, HALF, ROOT, Results, Skipped, fresh_memory, optional, peak_gib
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "1b": dict(hidden_size=2048, intermediate_size=5504, num_hidden_layers=24, num_attention_heads=16),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13696, num_hidden_layers=40, num_attention_heads=40),
}
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
LENGTH, STEPS = 4096, 9
WAYS = ("none", "selective", "block")
EXPERTS = {"rank": 8, "alpha": 16, "num_specific_experts": 3}


def sizes_of(shape: str) -> dict[str, Any]:
    """A shape's part of config.json."""
    return {**(TINY if gpu.tiny else SHAPES[shape]), "vocab_size": 3072 if gpu.tiny else gpu.VOCABULARY}


def model_folder(shape: str, positions: str = "rope") -> Path:
    """A folder with a config.json of the shape and a small tokenizer, and training data of known lengths beside it."""
    from pedgpt.data import load_tokenizer, read_documents, train_tokenizer

    folder = Path(tempfile.gettempdir()) / f"pedgpt-gpu-{'tiny' if gpu.tiny else shape}-{positions}"
    if (folder / "ready").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes_of(shape)
    config = {
        "model_type": "baichuan", **sizes, "model_max_length": LENGTH, "pedgpt_positions": positions,
        "pedgpt_norm_head": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    texts = [document.text for document in read_documents([ROOT / "recipes/sample_corpus/textbook.jsonl"])]
    special = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
    train_tokenizer(texts, vocab_size=3072, special_tokens=special).save(folder)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("".join(texts))
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(
            tokenizer.decode(ids[(at := draw.randrange(len(ids) - 64)) : at + 64]) for _ in range(-(-count // 64))
        )

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")

    length, count = row_length(), 2 * STEPS + 8
    write("one.jsonl", [{"question": text(16), "answer": text(2 * length)} for _ in range(count)])
    lengths = [draw.randrange(length // 20, length // 5) for _ in range(9 * count)]
    write("packed.jsonl", [{"question": text(16), "answer": text(n)} for n in lengths])
    pair = {name: length // part for name, part in (("prompt", 4), ("chosen", 16), ("rejected", 16))}
    write("pairs.jsonl", [{name: text(n) for name, n in pair.items()} for _ in range(2 * count)])
    (folder / "ready").touch()
    return folder


def row_length() -> int:
    return 128 if gpu.tiny else LENGTH


def random_weights(model: nn.Module, folder: object, *, dtype: torch.dtype, device: torch.device, **_: Any) -> None:
    """In place of `load_weights`: the same tensors with random numbers, quantised where the model wants codes."""
    from pedgpt.kernels.quantized import Quantization

    for module in model.modules():
        quantization = getattr(module, "quantization", None)
        if isinstance(quantization, Quantization):
            quantization.to_empty(device=device)
            codes = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=device)
            blocks = (len(rows) for rows in codes.split(1024))
            quantization.quantize_(codes, (0.02 * torch.randn(n, module.in_features, device=device) for n in blocks))
            module.weight, quantization.dtype = nn.Parameter(codes, requires_grad=False), dtype
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                value.normal_(0, 0.02) if value.ndim > 1 else value.fill_(1)
                setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def recipe_steps(
    script: str, shape: str, data: dict[str, str], positions: str = "rope", **settings: Any
) -> dict[str, float]:
    """Tokens per second and peak memory of the recipe's own steps."""
    from pedgpt.training import parse_settings

    folder = model_folder(shape, positions)
    spec = importlib.util.spec_from_file_location(f"recipe_{script}", ROOT / f"recipes/{script}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    defaults = {
        "model": folder, **{name: folder / file for name, file in data.items()}, "max_steps": STEPS,
        "global_batch_size": 1, "micro_batch_size": 1, "learning_rate": 1e-4, "checkpoint_every": 0,
        "dtype": "bfloat16", "row_length": row_length(), "on_long_row": "truncate",
    }  # fmt: skip
    if script == "continued_pretrain":
        del defaults["on_long_row"]
    with tempfile.TemporaryDirectory() as output, fresh_memory():
        flags = [str(word) for name, value in {**defaults, "output": f"{output}/run", **settings}.items()
                 for word in (f"--{name}", value)]  # fmt: skip
        config = parse_settings(module.Config, flags)
        constant = dict.fromkeys(("model_fingerprint", "weights_fingerprint"), lambda folder: "random weights")
        with (
            patch.multiple(module.stage.models, load_weights=random_weights, **constant),
            patch.object(module.stage.training, "gather_weights", lambda *_, **__: None),
        ):
            module.main(config)
        lines = (Path(output) / "run/metrics.jsonl").read_text("utf-8").splitlines()
        rates = [json.loads(line)["tokens_per_second"] for line in lines][3:]
        return {"tokens_per_s": statistics.median(rates), "slowest": min(rates), "peak_gib": peak_gib()}


def peer_steps(shape: str, *, adapter: bool, liger: bool, checkpointed: bool) -> dict[str, float]:
    """The same rows, one document each, through transformers, with PEFT where an adapter is trained."""
    transformers = optional("transformers")
    from pedgpt.data import (
        ReadSummary,
        chat_format,
        collate,
        encode_conversations,
        load_tokenizer,
        pack,
        read_conversations,
    )

    folder = model_folder(shape)
    chat = chat_format(load_tokenizer(folder), "auto", None, "")
    conversations = read_conversations([folder / "one.jsonl"])
    examples = encode_conversations(conversations, chat, row_length(), "error", ReadSummary(), "truncate")
    rows = pack(examples, row_length())
    sizes = sizes_of(shape)
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=LENGTH, attn_implementation="sdpa", use_cache=False, tie_word_embeddings=False,
        num_key_value_heads=sizes["num_attention_heads"],
    )  # fmt: skip
    with fresh_memory():
        torch.set_default_dtype(HALF if adapter else torch.float32)
        try:
            with DEVICE:
                model = transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        if liger:
            optional("liger_kernel.transformers").apply_liger_kernel_to_llama(model=model)
        if adapter:
            peft = optional("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if adapter:
                model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        rates = []
        for step in range(STEPS):
            batch = collate([rows[step]], [step]).to(DEVICE)
            began = time.perf_counter()
            with torch.autocast(DEVICE.type, HALF):
                labels = {"labels": batch.labels, "shift_labels": batch.labels}
                loss = model(input_ids=batch.tokens, use_cache=False, **labels).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            rates.append(batch.num_tokens / (time.perf_counter() - began))
        return {"tokens_per_s": statistics.median(rates[3:]), "slowest": min(rates[3:]), "peak_gib": peak_gib()}


def base_steps(shape: str, checkpointing: str) -> dict[str, float]:
    """Forward and backward through the frozen model: what a step with adapters has to be compared with."""
    from pedgpt.losses import linear_cross_entropy
    from pedgpt.models import load_model

    with fresh_memory():
        model = load_model(model_folder(shape), dtype=HALF, device="meta").train()
        random_weights(model, None, dtype=HALF, device=DEVICE)
        model.requires_grad_(False).activation_checkpointing = checkpointing
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        tokens = torch.randint(5, 3000, (1, row_length()), device=DEVICE)

        def step() -> None:
            hidden = model.hidden_states(tokens)
            linear_cross_entropy(hidden, model.lm_head.weight, tokens).backward()

        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            step()
            if CUDA:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return {"tokens_per_s": row_length() / statistics.median(times[3:]), "peak_gib": peak_gib()}


def product_limit(results: Results, shape: str, factor: int) -> dict[str, float]:
    """Tokens per second at the rate of cuBLAS, where a token takes factor · N operations (4: frozen, 6: all train)."""
    sizes = sizes_of(shape)
    d, inner = sizes["hidden_size"], sizes["intermediate_size"]
    numbers = sizes["num_hidden_layers"] * (4 * d * d + 3 * d * inner) + d * sizes["vocab_size"]
    rate = results.limit("products")
    return {"limit_tokens_per_s": rate / (factor * numbers)} if rate else {}


def measure(results: Results, group: str, case: str, form: str, run: Callable[[], dict[str, float]], **more: Any):
    """Measure one form, unless it has been measured; what does not fit into memory or is not installed is told."""
    if results.done(group, case, form):
        return
    try:
        figures: dict[str, Any] = {**run(), **more}
    except Skipped as reason:
        print(f"  {case}, {form}: left out, {reason}")
        return
    except torch.OutOfMemoryError:
        figures = {"outcome": "out of memory"}
    results.add(group, case, form, **figures)


def stage4(results: Results) -> None:
    """7B: recipes/expert_finetune.py beside the frozen base, each at every kind of checkpointing."""
    limit = product_limit(results, "7b", 4)
    for way in WAYS:
        measure(results, "stage4", "7b frozen base", f"checkpointing {way}", partial(base_steps, "7b", way), **limit)
    for rows in ("one", "packed"):
        for way in WAYS:
            run = partial(
                recipe_steps, "expert_finetune", "7b", {"instructions": f"{rows}.jsonl"},
                activation_checkpointing=way, **EXPERTS,
            )  # fmt: skip
            measure(results, "stage4", f"7b experts, {rows}", f"checkpointing {way}", run, **limit)


def stage4_peers(results: Results) -> None:
    """The same rows, one document each, by transformers and PEFT of rank 32, with and without Liger."""
    for liger in (False, True):
        for checkpointed in (False, True):
            form = f"PEFT{' + Liger' * liger}, checkpointing {'block' if checkpointed else 'none'}"
            run = partial(peer_steps, "7b", adapter=True, liger=liger, checkpointed=checkpointed)
            measure(results, "stage4_peers", "7b LoRA 32, one", form, run)


def stage4_13b(results: Results) -> None:
    """13B with ALiBi, packed documents."""
    for way in WAYS:
        run = partial(
            recipe_steps, "expert_finetune", "13b", {"instructions": "packed.jsonl"}, positions="alibi",
            activation_checkpointing=way, **EXPERTS,
        )  # fmt: skip
        limit = product_limit(results, "13b", 4)
        measure(results, "stage4_13b", "13b ALiBi experts, packed", f"checkpointing {way}", run, **limit)


def memory(results: Results) -> None:
    """Less memory: 13B experts over 4 and 8 bits within 24 GB, 7B over 4 bits, all parameters of 7B in bfloat16."""
    nf4, int8 = {"quantize": "nf4"}, {"quantize": "int8"}
    all_in = {"weight_dtype": "bfloat16", "optimizer_state": "bfloat16"}
    cases: list[tuple[str, str, str, dict[str, Any], float]] = [  # with the GiB that are allowed
        ("13b experts, packed", "nf4", "block", nf4, 22), ("13b experts, packed", "int8", "block", int8, 22),
        ("13b experts, packed", "nf4", "offload", nf4, 22), ("13b experts, packed", "bf16", "block", {}, 139),
        ("7b experts, packed", "nf4", "block", nf4, 9), ("7b all parameters, packed", "bf16", "block", all_in, 72),
    ]  # fmt: skip
    for case, kind, way, settings, allowed in cases:
        shape, trains_all = case.split()[0], "weight_dtype" in settings
        run = partial(
            recipe_steps, "full_finetune" if trains_all else "expert_finetune", shape, {"instructions": "packed.jsonl"},
            "alibi" if shape == "13b" else "rope", **({} if trains_all else EXPERTS), **settings,
            activation_checkpointing=way,
        )  # fmt: skip
        limit = product_limit(results, shape, 6 if trains_all else 4)
        with at_most(24e9 if "quantize" in settings else None):
            form = f"{kind}, checkpointing {way}"
            measure(results, "memory", case, form, run, allowed_gib=allowed, **limit)


@contextmanager
def at_most(size: float | None) -> Iterator[None]:
    """In here this process may take no more than so many bytes of the GPU."""
    if CUDA and size:
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


def full(results: Results, shape: str = "1b") -> None:
    """All parameters of a 1B model in float32 under autocast: recipes/full_finetune.py beside transformers."""
    way, group, case = "none" if shape == "1b" else "block", f"full_{shape}", f"{shape} all parameters"
    for rows in ("one", "packed"):
        data = {"instructions": f"{rows}.jsonl"}
        run = partial(recipe_steps, "full_finetune", shape, data, activation_checkpointing=way)
        limit = product_limit(results, shape, 6)
        measure(results, group, f"{case}, {rows}", f"pedgpt, checkpointing {way}", run, **limit)
    for liger in (False, True):
        run = partial(peer_steps, shape, adapter=False, liger=liger, checkpointed=way == "block")
        form = f"transformers{' + Liger' * liger}, checkpointing {way}"
        measure(results, group, f"{case}, one", form, run)


def full_7b(results: Results) -> None:
    """All parameters of 7B: 16 bytes a parameter, so a card of 139 GiB."""
    if CUDA and torch.cuda.mem_get_info()[1] < 130 * 2**30:
        print("  left out: 7B takes 108 GiB for weights, gradients and AdamW's moments, and this card has less")
        return
    full(results, "7b")


def dfpo(results: Results) -> None:
    """recipes/dfpo.py with LoRA on a 7B shape: prompts shared by both answers, against two rows."""
    for shared in (True, False):
        run = partial(
            recipe_steps, "dfpo", "7b", {"preferences": "pairs.jsonl"}, adapter="lora", rank=32, alpha=64,
            global_batch_size=2, micro_batch_size=2, shared_prompt=str(shared).lower(), activation_checkpointing="none",
        )  # fmt: skip
        form = "prompt shared" if shared else "two rows"
        measure(results, "dfpo", "7b LoRA 32, 2 pairs of 1,024 + 2 × 256", form, run)


def decoding(results: Results) -> None:
    """Greedy decoding of a 7B shape, also with experts and by the server's scheduler, beside transformers."""
    from pedgpt.adapters import inject_experts, pack_adapters
    from pedgpt.models import generate, load_model

    def ours(experts: bool, served: bool = False) -> Callable[[list[list[int]], int], object]:
        model = load_model(model_folder("7b"), dtype=HALF, device="meta")
        random_weights(model, None, dtype=HALF, device=DEVICE)
        if experts:
            inject_experts(model, **EXPERTS)
            pack_adapters(model)
        model.eval()
        if served:
            return by_scheduler(model)
        return lambda prompts, count: generate(model, prompts, max_new_tokens=count)

    makers = {"pedgpt": partial(ours, False), "transformers": their_generation, "pedgpt, experts": partial(ours, True)}
    makers |= {"server": partial(ours, False, True), "server, experts": partial(ours, True, True)}
    for form, make in makers.items():
        with fresh_memory():
            call = None
            for batch in (1, 8, 16):
                if results.done("decoding", f"7b, batch {batch}", form):
                    continue
                try:
                    call = call or make()
                except Skipped as reason:
                    print(f"  {form}: left out, {reason}")
                    break
                measure(results, "decoding", f"7b, batch {batch}", form, partial(decode, results, call, batch))
            getattr(call, "close", lambda: None)()


def by_scheduler(model: nn.Module) -> Callable[[list[list[int]], int], object]:
    """A call that hands all prompts to one scheduler of 16 slots and waits for the last token."""
    from pedgpt.serving import Scheduler
    from pedgpt.serving.scheduler import Request

    decoder = SimpleNamespace(push=lambda token: "", finish=lambda: "", stopped=False)
    scheduler = Scheduler({"base": model}, slots=16, capacity=1024, queue=64, prefill=256)

    def call(prompts: list[list[int]], count: int) -> object:
        ended = threading.Semaphore(0)

        def deliver(_: Request, piece: Any) -> None:
            if piece.finish:
                ended.release()

        scheduler.submit([Request("base", prompt, count, decoder, frozenset(), deliver) for prompt in prompts])
        return [ended.acquire() for _ in prompts]

    call.close = partial(scheduler.close, 0)  # Its thread holds the model.
    return call


def decode(results: Results, call: Callable[[list[list[int]], int], object], batch: int) -> dict[str, float]:
    """Tokens per second from the difference of two lengths, which leaves out the prompt and the capture of graphs."""
    new, length = (8, 6) if gpu.tiny else (128, 256)
    prompts = torch.randint(5, 3000, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
    times = {}
    for count in (new // 2, new):
        call(prompts, count)
        began = time.perf_counter()
        call(prompts, count)
        times[count] = time.perf_counter() - began
    sizes, rate = sizes_of("7b"), results.limit("memory")
    d, inner = sizes["hidden_size"], sizes["intermediate_size"]
    read = 2 * (sizes["num_hidden_layers"] * (4 * d * d + 3 * d * inner) + d * sizes["vocab_size"])
    limit = {"limit_tokens_per_s": batch * rate / 2 / read} if rate else {}  # a copy reads and writes
    took = max(times[new] - times[new // 2], 1e-9)
    return {"tokens_per_s": batch * (new - new // 2) / took, "whole_call_s": times[new], **limit}


def their_generation() -> Callable[[list[list[int]], int], object]:
    transformers = optional("transformers")
    sizes = sizes_of("7b")
    torch.set_default_dtype(HALF)
    try:
        with DEVICE:
            config = transformers.LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"])
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)

    def call(prompts: list[list[int]], count: int) -> object:
        ids = torch.tensor(prompts, device=DEVICE)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()

    return call


def recipes(results: Results) -> None:
    """Every stage for ten steps from disk under torchrun, as a user starts it; toy model, sample corpus."""
    configs, data = ROOT / "recipes/configs/demo", ROOT / "recipes/sample_corpus"

    def started(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT)

    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        train, tasks = run / "corpus/train", run / "corpus/train/tasks"
        started("recipes/build_corpus.py", "--source", data, "--output", run / "corpus").check_returncode()
        started(
            "recipes/init_model.py", "--config", configs / "base.toml", "--output", run / "base",
            "--text", train / "text", "--instructions", tasks,
        ).check_returncode()  # fmt: skip
        stages = {
            "continued_pretrain": ("cpt", "--corpus", run / "corpus"),
            "full_finetune": ("sft", "--instructions", tasks),
            "dfpo": ("dfpo", "--preferences", train / "preferences"),
            "expert_finetune": ("experts", "--instructions", tasks),
        }
        for recipe, (stage, *flags) in stages.items():
            if results.done("recipes", recipe, "torchrun, 10 steps"):
                continue
            began = time.perf_counter()
            done = started(
                "-m", "torch.distributed.run", "--nproc-per-node", 1, f"recipes/{recipe}.py", "--config",
                configs / f"{stage}.toml", "--model", run / "base", "--output", run / stage, "--max_steps", 10, *flags,
            )  # fmt: skip
            outcome = "finished" if done.returncode == 0 else done.stderr.strip()[-300:]
            results.add("recipes", recipe, "torchrun, 10 steps", outcome=outcome, seconds=time.perf_counter() - began)
