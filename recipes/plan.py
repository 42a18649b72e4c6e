"""How much memory a stage will take on each rank, and whether it fits: asked before anything is loaded.

    python recipes/plan.py --config recipes/configs/baichuan2_7b/sft.toml --ranks 8 --memory_gib 80 --device cuda
    python recipes/plan.py --config recipes/configs/demo/experts.toml --model runs/demo/dfpo/model --micro_batch_size 16
    python recipes/plan.py --config recipes/configs/baichuan2_7b/evaluate.toml --model checkpoints/Baichuan2-7B-Chat

Reads the settings file of the stage, with exactly the keys of its recipe, and the model's config.json; without --model
the shape is that of the settings' folder. Exit status 0: it fits; 1: it does not; 2: a mistake in the settings.
Rows of data, which are not read, and a device's own fragmentation come on top.
"""

import dataclasses
import importlib.util
import math
import os
import platform
import re
import sys
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
import torch.nn.functional as F

from pedgpt import training
from pedgpt.adapters import ExpertLoRALinear, gate_metrics, inject_experts, inject_lora, record_gates, set_noise_rows
from pedgpt.data import EncodedPair, collate, collate_pairs
from pedgpt.data.examples import Example
from pedgpt.data.packing import Batch, Row
from pedgpt.data.preference import PreferenceBatch
from pedgpt.evaluation.likelihood import pair_logps, perplexity
from pedgpt.files import available_memory
from pedgpt.kernels.cpu.products import MAX_ROWS
from pedgpt.losses import IGNORE_INDEX, linear_cross_entropy, linear_dfpo_loss
from pedgpt.models import ModelConfig, Transformer, generate
from pedgpt.models.cache import KVCache
from pedgpt.models.config import OWN_KEYS
from pedgpt.models.generation import LAY_OUT_FROM
from pedgpt.training.plan import Counter, Peak, count_step, counting, on_shapes

STAGES = {
    "cpt": "continued_pretrain", "sft": "full_finetune", "dfpo": "dfpo", "experts": "expert_finetune",
    "generate": "evaluate",
}  # fmt: skip
# The published sizes, for a plan made before the checkpoint is there.
BAICHUAN2 = {"model_type": "baichuan", "vocab_size": 125_696, "model_max_length": 4096, "torch_dtype": "bfloat16"}
SHAPES = {
    "baichuan2_7b": {
        **BAICHUAN2, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "baichuan2_13b": {
        **BAICHUAN2, "hidden_size": 5120, "intermediate_size": 13696, "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}  # fmt: skip
GIB = 2**30
CUDA_LIBRARIES = 600 * 2**20  # a context with cuBLAS and its workspaces; assumed, not measured
# glibc takes tensors below 32 MiB from its heap, which seldom shrinks, and its memalign, which torch calls, cannot use
# a hole of exactly the size wanted. Measured with glibc 2.36: how much larger the heap gets than the tensors in it at
# their peak, and how much more where what stays (gradients when recomputing or accumulating, a cache) comes to stand
# between. MALLOC_MMAP_THRESHOLD_=262144 in the environment avoids it; steps then take up to 1.5 times as long.
MAPPED = 32 * 2**20
SLACK, SLACK_PINNED = 0.5, 0.5
LASTING = ("weights", "optimizer", "cache", "layout")  # everything else comes and goes in a step
LABELS = {
    "weights": "weights", "gathered": "gathered from the ranks", "copies": "cast copies", "gradients": "gradients",
    "optimizer": "AdamW's state", "activations": "activations", "head": "logits and head", "cache": "key-value cache",
    "layout": "weights laid out anew", "malloc": "freed, kept by malloc", "libraries": "Python and libraries",
}  # fmt: skip
Moments = dict[str, dict[str, int]]  # bytes by part, at each moment that may be the peak


@dataclass(frozen=True)
class Host:
    """Where the stage will run, as far as memory goes."""

    on_cuda: bool = False
    libraries: int = 0  # bytes that Python, torch and a device's context take
    heap: bool = False  # glibc's malloc serves the tensors, and keeps what it does not give back


@dataclass(kw_only=True)
class PlanSettings:
    stage: str = ""  # cpt, sft, dfpo, experts or generate; empty: as the settings file is named (evaluate: generate)
    ranks: int = 1  # processes that share the training
    memory_gib: float = 0.0  # GiB that a rank may use; 0: what the device, or this rank's share of the host, has


def recipe_config(stage: str) -> type:
    """The Config of a stage's recipe; recipes are scripts that nothing imports, so it is read from its file."""
    name = f"recipe_{STAGES[stage]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{STAGES[stage]}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Config


def settings_class(stages: Sequence[str], stage: str = "", file: str = "") -> type:
    """PlanSettings with every setting of these stages' recipes, none of them required."""
    recipes = [recipe_config(name) for name in stages]
    required = {
        f.name: (f.name, kind, field(default_factory=get_origin(kind) or kind))
        for recipe in recipes
        for f in dataclasses.fields(recipe)
        if f.default is f.default_factory is dataclasses.MISSING and (kind := get_type_hints(recipe)[f.name])
    }
    # Named as its first part, where --help finds the comments.
    return dataclasses.make_dataclass(
        "PlanSettings", required.values(), bases=(PlanSettings, *recipes), kw_only=True,
        namespace={"__module__": __name__, "planned": stage, "file": file},
    )  # fmt: skip


def settings_of(arguments: Sequence[str]) -> type:
    """The settings of the stage that the command line asks for; of all stages while it names none."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    given = {name: value for name, value in zip(words, words[1:], strict=False) if name in ("--stage", "--config")}
    file = given.get("--config", "")
    stage = given.get("--stage", {"evaluate": "generate"}.get(Path(file).stem, Path(file).stem))
    return settings_class([stage], stage, file) if stage in STAGES else Config


Config = settings_class(list(STAGES))


def main(config: Any) -> None:
    stage = config.planned
    if not stage:
        found = f"found {config.stage!r}" if config.stage else "the name of the settings file does not say it"
        raise ValueError(f"--stage must be one of {', '.join(STAGES)}; {found}")
    if config.ranks < 1 or not 0 <= config.memory_gib < math.inf:
        raise ValueError(f"ranks must be at least 1 and memory_gib positive: {config.ranks}, {config.memory_gib}")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda", found {config.device!r}')
    if stage == "generate":
        check_generation(config)
    else:
        config.check()
    sizes = model_sizes(config.model, config.file)
    sizes.check_length(length_of(config, sizes))
    if length_of(config, sizes) < 1:
        raise ValueError(f"row_length must be at least 1, found {config.row_length}")
    on_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    heap = platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ
    host = Host(True, CUDA_LIBRARIES) if on_cuda else Host(False, rehearse(stage, config.dtype), heap)
    limit, place, shared = config.memory_gib * GIB, "given", False
    if not limit:  # a device is a rank's own, the host is for all ranks
        limit, shared = free_memory(on_cuda), not on_cuda
        place = "free on the device" if on_cuda else "free on this host" + " for each rank" * (config.ranks > 1)
    limit /= config.ranks if shared else 1

    moments, counts = estimate(stage, config, sizes, host)
    total = peak(moments)
    print(describe(config, sizes, counts, moments))
    if total <= limit:
        print(f"\nfits: {total / GIB:.2f} of {limit / GIB:.2f} GiB {place}")
        return
    print(f"\ndoes not fit: {total / GIB:.2f} GiB, of {limit / GIB:.2f} GiB {place}; one change alone gives")
    enough = False  # ranks
    for name, other_stage, other in changes(stage, config, sizes):
        if enough and other.ranks != config.ranks:
            continue
        changed = peak(estimate(other_stage, other, sizes, host)[0])
        fits = changed <= (limit * config.ranks / other.ranks if shared else limit)
        enough |= fits and other.ranks != config.ranks
        if changed < 0.995 * total:
            print(f"  {name:<36}{changed / GIB:>9.2f} GiB{'  fits' if fits else ''}")
    sys.exit(1)


def check_generation(config: Any) -> None:
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {config.dtype!r}')
    if min(config.batch_size, config.generation_batch_size, config.max_new_tokens) < 1 or config.row_length < 0:
        raise ValueError("batch_size, generation_batch_size, max_new_tokens must be at least 1, row_length at least 0")
    if config.ranks > 1:
        raise ValueError(f"evaluate.py runs on one process; leave --ranks out, found {config.ranks}")


def model_sizes(model: str, file: str) -> ModelConfig:
    """From the folder or config.json given; without one the published sizes, or those of init_model.py's base.toml."""
    folder = Path(file).parent
    if model:
        return ModelConfig.from_hf(model)
    if folder.name in SHAPES:
        return ModelConfig.from_hf(SHAPES[folder.name])
    if (base := folder / "base.toml").is_file():
        keys = {"positions": "rope", "normalize_head": True, **tomllib.loads(base.read_text("utf-8"))}
        own = {key: keys.pop(name) for name, key in OWN_KEYS.items()}
        return ModelConfig.from_hf({"model_type": "baichuan", **keys, **own})
    raise ValueError("give --model, a model folder or its config.json; only that file of it is read")


def length_of(config: Any, sizes: ModelConfig) -> int:
    return config.row_length or min(1024, sizes.max_position_embeddings)


def rehearse(stage: str, dtype: str) -> int:
    """Bytes that Python and the libraries hold in this process, once a toy model has made a step."""
    # Large enough for the products, and long enough for the attention, that the stage will load.
    toy = dict(vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2)
    model = Transformer(ModelConfig.from_hf({"model_type": "llama", **toy}))
    if stage == "generate":
        generate(model.to(getattr(torch, dtype)), [[1, 2], [3]], max_new_tokens=2)
        return resident()
    if stage == "experts":
        inject_experts(model.to(getattr(torch, dtype)))
    model.activation_checkpointing = "block"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    tokens = torch.zeros(1, 256, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        linear_cross_entropy(model.hidden_states(tokens, documents=tokens), model.lm_head.weight, tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return resident()


def resident() -> int:
    """Resident bytes of this process; 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def free_memory(on_cuda: bool) -> int:
    """Bytes free on the device, or on this host within its control group's limit."""
    if on_cuda:
        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device; give --memory_gib, what one of yours has")
        return torch.cuda.mem_get_info()[0]
    if (free := available_memory()) is None:
        raise ValueError("cannot tell how much memory is free here; give --memory_gib")
    return free


def estimate(stage: str, config: Any, sizes: ModelConfig, host: Host) -> tuple[Moments, dict[str, int]]:
    """Bytes by part at each moment that may be the peak, and the numbers of parameters."""
    blocks = sizes.num_hidden_layers
    numbered = stage == "experts" and re.search(r"\d", " ".join(config.target_modules))
    if blocks <= 3 or numbered:
        peaks, counts = count(stage, config, sizes, host)
    else:  # every further block adds what the third one adds
        (two, few), (peaks, counts) = (count(stage, config, replace(sizes, num_hidden_layers=n), host) for n in (2, 3))
        peaks = {name: peak.grown(two[name], blocks - 3) for name, peak in peaks.items()}
        counts = {name: number + (blocks - 3) * (number - few[name]) for name, number in counts.items()}
    moments = {name: {**peak.parts, "libraries": host.libraries} for name, peak in peaks.items()}
    if stage == "generate" and not host.on_cuda:
        moments["generating"]["layout"] = weights_laid_out(config, moments["generating"]["weights"])
    if host.heap:
        slack = SLACK_PINNED
        if stage != "generate":
            recomputes = config.activation_checkpointing != "none"
            slack = SLACK + SLACK_PINNED * (recomputes + (rows_of_rank(config) > config.micro_batch_size))
        most = max(peak.small for peak in peaks.values())
        for name, peak in peaks.items():
            moments[name]["malloc"] = int(most * (1 + slack)) - peak.small
    return moments, counts


def count(stage: str, config: Any, sizes: ModelConfig, host: Host) -> tuple[dict[str, Peak], dict[str, int]]:
    """Run the stage on tensors without numbers: its peaks, and the numbers of parameters."""
    dtype = getattr(torch, config.dtype)
    full = stage in ("cpt", "sft") or (stage == "dfpo" and not config.lora_rank)
    with torch.device("meta"):
        model = Transformer(sizes).to(torch.float32 if full else dtype)
        counts = parameter_counts(model)
        if stage == "experts":
            inject_experts(
                model, rank=config.rank, alpha=config.alpha, num_specific_experts=config.num_specific_experts,
                dropout=config.dropout, target_modules=config.target_modules,
            )  # fmt: skip
        elif stage == "dfpo" and config.lora_rank:
            inject_lora(model, rank=config.lora_rank, alpha=config.lora_alpha)
    counts["parameters"] = sum(p.numel() for p in model.parameters())
    with counting(on_gpu=host.on_cuda, lasting=LASTING, small=MAPPED) as counter:
        if stage == "generate":
            count_generation(counter, config, sizes, model)
        else:
            model.activation_checkpointing = config.activation_checkpointing
            counts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            rows = min(config.micro_batch_size, rows_of_rank(config))
            count_step(
                counter, model, list(model.model.layers), (model.model.embed_tokens, model.model.norm),
                partial(make_batch, stage, config, rows, length_of(config, sizes)),
                preference if stage == "dfpo" else next_token, config,
                ranks=config.ranks, accumulates=rows < rows_of_rank(config),
            )  # fmt: skip
    return counter.peaks, counts


def rows_of_rank(config: Any) -> int:
    """Rows, or pairs, that one rank takes of a global batch."""
    return math.ceil(config.global_batch_size / config.ranks)


def parameter_counts(model: Transformer) -> dict[str, int]:
    """Parameters by part; a tied head counts with the embedding."""
    parts = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "mlp", "norm": "norms", "lm_head": "head"}
    counts = dict.fromkeys(parts.values(), 0)
    for name, parameter in model.named_parameters():
        counts[next(label for part, label in parts.items() if part in name)] += parameter.numel()
    return counts


def make_batch(stage: str, config: Any, rows: int, length: int) -> Batch:
    """Full rows in which every token is supervised; at worst the answers of a pair have nothing in common."""
    if stage != "dfpo":
        return collate([Row([0] * length, [0] * length, [0] * length)] * rows, range(rows))
    pair = EncodedPair(*(Example([i] * length, [i] * length, "") for i in range(2)))
    return collate_pairs([pair] * rows, range(rows), shared_prompt=config.shared_prompt)


def next_token(model: Transformer, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of stages 1, 2 and 4."""
    metrics: dict[str, torch.Tensor] = {}
    experts = any(isinstance(layer, ExpertLoRALinear) for layer in model.modules())
    set_noise_rows(model, 0, batch.row_ids)
    with record_gates(model, where=batch.labels != IGNORE_INDEX) if experts else nullcontext() as gates:
        hidden = model.hidden_states(batch.tokens, documents=batch.documents)
    if gates is not None:
        metrics |= gate_metrics(gates)
    options: dict[str, Any] = {"normalize": model.config.normalize_head, "metrics": metrics}
    return linear_cross_entropy(hidden, model.lm_head.weight, batch.labels, num_tokens=1, **options), metrics


def preference(model: Transformer, batch: PreferenceBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of stage 3."""
    hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=batch.branches)
    operands = hidden, model.lm_head.weight, batch.labels, *batch.reference_logps.chunk(2)
    return linear_dfpo_loss(*operands, sequences=batch.sequences, normalize=model.config.normalize_head).loss, {}


@torch.no_grad()
def count_generation(counter: Counter, config: Any, sizes: ModelConfig, model: Transformer) -> None:
    """Scoring of rows and of pairs, reading of the longest prompts, and an answer's last token."""
    length, rows = length_of(config, sizes), config.generation_batch_size
    model = on_shapes(model).eval()
    counter.claim(model.parameters(), "weights")
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: counter.at(counter.moment, "activations"))
    model.model.norm.register_forward_hook(lambda *_: counter.at(counter.moment, "head"))
    counter.at("scoring", "activations")
    perplexity(model, [Row([0] * length, [0] * length, [0] * length)] * config.batch_size, config.batch_size)
    pair = EncodedPair(*(Example([i] * length, [i] * length, "") for i in range(2)))  # with nothing in common
    pair_logps(model, [pair] * max(1, config.batch_size // 2), config.batch_size)

    counter.at("reading", "cache")
    cache = KVCache(model, rows, length + config.max_new_tokens)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    hidden = model.hidden_states(tokens, documents=torch.ones_like(tokens), cache=cache)  # as of unequal lengths
    head = model.head_weight()
    logits = F.linear(hidden[:, -1], head).float()
    del hidden
    counter.at("generating", "activations")
    cache.length = cache.capacity - 1
    one = tokens[:, :1]
    hidden = model.hidden_states(one, documents=torch.ones_like(one), cache=cache)
    logits = F.linear(hidden[:, -1], head).float()
    logits.abs().amax(-1)
    counter.at("", "")


def weights_laid_out(config: Any, weights: int) -> int:
    """Bytes of the copy of the weights that decoding on a CPU makes, if it makes one."""
    rows = config.generation_batch_size
    pays = rows <= MAX_ROWS and config.max_new_tokens >= LAY_OUT_FROM
    return weights if pays and 2 * weights <= (available_memory() or 0) else 0


def changes(stage: str, config: Any, sizes: ModelConfig) -> Iterable[tuple[str, str, Any]]:
    """(what is changed, stage, settings) of the single changes that may help."""
    length = length_of(config, sizes)
    options: list[dict[str, Any]] = []
    if stage == "generate":
        options += [{name: 1} for name in ("batch_size", "generation_batch_size")]
        options += [{"max_new_tokens": max(1, config.max_new_tokens // 2)}]
    else:
        options += [{"micro_batch_size": 1}, *({"activation_checkpointing": how} for how in ("selective", "block"))]
        options += [{"ranks": config.ranks * factor} for factor in (2, 4, 8)]
    options += [{"row_length": max(1, length // 2)}, {"dtype": "bfloat16"}]
    options += [{"shared_prompt": False}] * (stage == "dfpo")
    for option in options:
        ((name, value),) = option.items()
        if getattr(config, name) != value:
            shown = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
            yield f"{name} = {shown}", stage, replace(config, **option)
    if stage in ("cpt", "sft", "dfpo"):
        cls = settings_class(["experts"], "experts", config.file)
        shared = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(config)}
        yield "experts instead of all parameters", "experts", cls(**{name: getattr(config, name) for name in shared})


def peak(moments: Moments) -> int:
    return max(sum(parts.values()) for parts in moments.values())


def describe(config: Any, sizes: ModelConfig, counts: dict[str, int], moments: Moments) -> str:
    """The table: parts down, moments across."""
    unit, name = (GIB, "GiB") if peak(moments) >= 10 * GIB else (2**20, "MiB")
    kind = f"{sizes.model_type}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, {sizes.vocab_size:,} tokens"
    lines = [f"{config.planned} of {kind}; {config.ranks} {'rank' if config.ranks == 1 else 'ranks'}, {config.dtype}"]
    for part, count in counts.items():
        share = f"  ({count / counts['parameters']:.2%})" if part == "trainable" else ""
        lines.append(f"  {part:<10}{count:>16,}{share}")
    width = max(map(len, moments)) + 2
    lines += ["", f"{name + ' per rank, at':<26}" + "".join(f"{moment:>{width}}" for moment in moments)]
    digits = 2 if unit == GIB else 1
    for part, label in LABELS.items():
        values = [parts.get(part, 0) / unit for parts in moments.values()]
        if any(values):
            lines.append(f"{label:<26}" + "".join(f"{value:>{width},.{digits}f}" for value in values))
    totals = [sum(parts.values()) / unit for parts in moments.values()]
    lines.append(f"{'total':<26}" + "".join(f"{value:>{width},.{digits}f}" for value in totals))
    return "\n".join(lines)


if __name__ == "__main__":
    training.run_recipe(main, settings_of(sys.argv[1:]), lock=False)
