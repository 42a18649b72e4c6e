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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch

from pedgpt import training
from pedgpt.adapters import ExpertLoRALinear, adapted_layers, inject_experts, inject_lora
from pedgpt.files import available_memory
from pedgpt.kernels.cpu.packed import MAX_ROWS
from pedgpt.kernels.expert_gate import MAX_COLUMNS
from pedgpt.losses import linear_cross_entropy
from pedgpt.models import ModelConfig, Transformer, generate, memory
from pedgpt.models.config import NORM_HEAD_KEY, POSITIONS_KEY
from pedgpt.models.generation import LAY_OUT_FROM

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
FLEETING = ("copies", "gradients", "activations", "head")  # what comes and goes in a step
LABELS = {
    "weights": "weights", "copies": "gathered or cast copies", "gradients": "gradients", "optimizer": "AdamW's state",
    "activations": "activations", "head": "logits and head", "cache": "key-value cache",
    "layout": "weights laid out anew", "malloc": "freed, kept by malloc", "libraries": "Python and libraries",
}  # fmt: skip
Moments = dict[str, dict[str, list[int]]]  # tensors by part, in bytes, at each moment that may be the peak


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
    for name, other_stage, other in changes(stage, config, sizes):
        changed = peak(estimate(other_stage, other, sizes, host)[0])
        room = limit * config.ranks / other.ranks if shared else limit
        if changed < 0.995 * total:
            print(f"  {name:<36}{changed / GIB:>9.2f} GiB{'  fits' if changed <= room else ''}")
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
        own = {POSITIONS_KEY: keys.pop("positions"), NORM_HEAD_KEY: keys.pop("normalize_head")}
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
    model.activation_checkpointing = True
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
    """The tensors of each part, in bytes, at each moment that may be the peak; and the numbers of parameters."""
    dtype = getattr(torch, config.dtype)
    full = stage in ("cpt", "sft") or (stage == "dfpo" and not config.lora_rank)
    with torch.device("meta"):
        model = Transformer(sizes).to(torch.float32 if full else dtype)
        if stage == "experts":
            inject_experts(
                model, rank=config.rank, alpha=config.alpha, num_specific_experts=config.num_specific_experts,
                dropout=config.dropout, target_modules=config.target_modules,
            )  # fmt: skip
        elif stage == "dfpo" and config.lora_rank:
            inject_lora(model, rank=config.lora_rank, alpha=config.lora_alpha)
    counts = {"all": sum(p.numel() for p in model.parameters())}
    if stage == "generate":
        moments = generation_moments(config, sizes, model, host)
    else:
        moments = training_moments(stage, config, sizes, model, host)
        counts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if host.heap:
        small = {
            name: sum(size for part in FLEETING for size in parts.get(part, []) if size < MAPPED)
            for name, parts in moments.items()
        }
        slack = SLACK_PINNED
        if stage != "generate":
            accumulates = config.micro_batch_size * config.ranks < config.global_batch_size
            slack = SLACK + SLACK_PINNED * (config.activation_checkpointing + accumulates)
        for name, parts in moments.items():
            parts["malloc"] = [int(max(small.values()) * (1 + slack)) - small[name]]
    return {name: {**parts, "libraries": [host.libraries]} for name, parts in moments.items()}, counts


def generation_moments(config: Any, sizes: ModelConfig, model: Transformer, host: Host) -> Moments:
    """Scoring whole rows; making the head; reading the longest prompts; answering; the cache at its full length."""
    dtype = getattr(torch, config.dtype)
    length, batch, size = length_of(config, sizes), config.generation_batch_size, dtype.itemsize
    scored = memory.Pass(config.batch_size, length, dtype, dtype, trains=False, on_cuda=host.on_cuda)
    read = dataclasses.replace(scored, rows=batch)
    # Rows, or half as many pairs, which are twice as long where they have nothing in common.
    pairs = dataclasses.replace(scored, rows=max(1, config.batch_size // 2), length=2 * length)
    scoring: list[int] = []
    for each in (scored, pairs):
        blocks = memory.forward_peak(sizes, each) + memory.mask_peak(sizes, each)
        head = [size * each.tokens * sizes.hidden_size, *memory.logits_at_once(sizes, each)]
        scoring = max(scoring, blocks, head, key=sum)
    matrix = [size * sizes.vocab_size * sizes.hidden_size] * sizes.normalize_head
    sampled = [batch * sizes.vocab_size * (size + 4 + 1)]  # logits, in float32 too, and which ids were seen
    reading = memory.forward_peak(sizes, read) + memory.mask_peak(sizes, read)
    cache = [memory.cache_bytes(sizes, batch, length + config.max_new_tokens, dtype)]
    always = {"weights": [p.nbytes for p in model.parameters()]}
    lays_out = (size == 4) < batch <= MAX_ROWS and config.max_new_tokens >= LAY_OUT_FROM and not host.on_cuda
    laid_out = always["weights"] if lays_out and 2 * sum(always["weights"]) <= (available_memory() or 0) else []
    return {
        "scoring": {**always, "activations": scoring},
        # On a CPU the pages of the cache come when they are written, which is later.
        "head": {**always, "cache": cache * host.on_cuda, "head": 2 * matrix},
        "reading": {**always, "cache": cache, "head": matrix + sampled, "activations": reading},
        # Decoding's own copy of the weights, where it makes one.
        "generating": {**always, "layout": laid_out, "cache": cache, "head": matrix + sampled},
    }


def training_moments(stage: str, config: Any, sizes: ModelConfig, model: Transformer, host: Host) -> Moments:
    """The loss, its gradient, the backward pass from the last block to the embedding, and the update."""
    ranks, blocks, layers = config.ranks, sizes.num_hidden_layers, adapted_layers(model)
    dtype, stored = getattr(torch, config.dtype), model.model.embed_tokens.weight.dtype
    rows, length = min(config.micro_batch_size, -(-config.global_batch_size // ranks)), length_of(config, sizes)
    if stage == "dfpo":  # at worst a pair has nothing in common
        rows, length = (rows, 2 * length) if config.shared_prompt else (2 * rows, length)
    run = memory.Pass(
        rows=rows,
        length=length,
        stream=dtype if ranks > 1 else stored,
        compute=dtype,
        trains=not layers,
        adapted={name.rpartition(".")[2] for name in layers},
        on_cuda=host.on_cuda,
    )
    kept_by = {name: adapter_tensors(name, layer, run) for name, layer in layers.items()}
    adapters = [size for kept in kept_by.values() for size in kept]
    in_mlps = sum(sum(kept) for name, kept in kept_by.items() if ".mlp." in name)
    transient = memory.backward_peak(sizes, run, in_mlps // blocks)
    block = memory.saved_by_block(sizes, run) + adapters[len(adapters) - len(adapters) // blocks :]
    ends_kept = memory.saved_once(sizes, run)
    last = ends_kept + block + transient
    if config.activation_checkpointing:
        kept = memory.saved_by_checkpointing(sizes, run)
        # The block's input is kept already, where its first norm keeps it as it is.
        recomputed = kept + block[run.stream == torch.float32 :] + transient
    else:
        kept = memory.saved(sizes, run) + adapters
        recomputed = kept + transient
    forward, backward = memory.head_peaks(sizes, run, by_sequence=stage == "dfpo")

    # Weights as the matrix products see them: gathered by FSDP2, or cast by autocast, which keeps its copies.
    size = dtype.itemsize
    whole = [size * math.prod(shape) for shape in memory.linear_shapes(sizes).values()]
    inner = [layer for name, layer in layers.items() if name.startswith("model.layers.0.")]
    whole += [size * p.numel() for layer in inner for p in layer.adapter_parameters().values()]
    table = size * sizes.vocab_size * sizes.hidden_size
    ends = [table] * (1 if sizes.tie_word_embeddings else 2)
    copies: dict[str, list[int]] = {}
    if ranks > 1:  # the ends throughout, a block beside the next one; gradients leave in float32
        leaving = 4 // size + 1 if run.trains else 0
        copies = dict.fromkeys(("loss", "its gradient"), ends + 2 * whole)
        copies |= dict.fromkeys(("last block", "first block"), ends + (3 + leaving) * whole)
        copies["embedding"] = ends * (1 + leaving)
    elif run.stream != run.compute:
        every = blocks * whole
        released = config.activation_checkpointing  # the graph holds none, and autocast's cache ends with the forward
        copies = {"loss": every, "its gradient": [] if released else every}
        copies |= {"last block": 2 * whole if released else every + whole, "first block": 2 * whole}

    def held(parameter: torch.nn.Parameter) -> int:
        """Bytes of this rank's rows."""
        return -(-len(parameter) // ranks) * parameter[0].numel() * parameter.itemsize

    trainable = {name: held(p) for name, p in model.named_parameters() if p.requires_grad}
    gradients = list(trainable.values())
    before = [size for name, size in trainable.items() if not name.startswith(("model.embed", "model.layers.0."))]
    earlier = gradients if config.micro_batch_size * ranks < config.global_batch_size else []
    head = [held(model.lm_head.weight)] * run.trains
    again = [max(gradients)] if earlier or sizes.tie_word_embeddings else []  # before it is added to what is there
    always = {"weights": [held(p) for p in model.parameters()], "optimizer": 2 * gradients}
    moments = {
        "loss": {"gradients": earlier, "activations": kept, "head": forward},
        "its gradient": {"gradients": earlier, "activations": kept, "head": backward},
        "last block": {"gradients": earlier or head, "activations": recomputed},
        "first block": {"gradients": earlier or before, "activations": last},
        "embedding": {"gradients": gradients + again, "activations": ends_kept},
        "update": {"gradients": gradients},
    }
    if sizes.positions == "alibi":
        moments = {"mask": {"gradients": earlier, "activations": memory.mask_peak(sizes, run)}, **moments}
    return {name: {**always, **parts, "copies": copies.get(name, [])} for name, parts in moments.items()}


def adapter_tensors(name: str, layer: Any, run: memory.Pass) -> list[int]:
    """What an adapter keeps for the backward pass beside its input and the weights, in bytes.

    In half precision its hidden vector, and with it the routes that one product gave; the experts' gates and their
    slope; with dropout what A read instead of the input, and what of the input was dropped.
    """
    n, c, columns = run.tokens, run.compute.itemsize, len(layer.lora_A)
    kept = []
    if isinstance(layer, ExpertLoRALinear):
        experts = layer.num_specific_experts
        kept += [4 * n * experts] * 2
        apart = layer.dropout > 0 or (run.on_cuda and columns <= MAX_COLUMNS)  # of the routes
        columns += 0 if apart else 2 * experts
    if layer.dropout:
        leaf, size = name.rpartition(".")[2], n * layer.in_features
        inner = not (name.startswith("model.layers.0.") and leaf in memory.QKV)  # its input needs a gradient
        came_in = run.compute if leaf in ("o_proj", "down_proj") else run.stream
        kept += [c * size] + [size * (1 if run.on_cuda else came_in.itemsize)] * inner
    return kept + [c * n * columns] * (c == 2)


def changes(stage: str, config: Any, sizes: ModelConfig) -> Iterable[tuple[str, str, Any]]:
    """(what is changed, stage, settings) of the single changes that may help."""
    length = length_of(config, sizes)
    options: list[dict[str, Any]] = []
    if stage == "generate":
        options += [{name: 1} for name in ("batch_size", "generation_batch_size")]
        options += [{"max_new_tokens": max(1, config.max_new_tokens // 2)}]
    else:
        options += [{"micro_batch_size": 1}, {"activation_checkpointing": True}]
        options += [{"ranks": config.ranks * factor} for factor in (2, 4, 8)]
    options += [{"row_length": max(1, length // 2)}, {"dtype": "bfloat16"}]
    options += [{"shared_prompt": False}] * (stage == "dfpo")
    for option in options:
        ((name, value),) = option.items()
        if getattr(config, name) != value:
            shown = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
            yield f"{name} = {shown}", stage, dataclasses.replace(config, **option)
    if stage in ("cpt", "sft", "dfpo"):
        cls = settings_class(["experts"], "experts", config.file)
        shared = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(config)}
        yield "experts instead of all parameters", "experts", cls(**{name: getattr(config, name) for name in shared})


def peak(moments: Moments) -> int:
    return max(sum(map(sum, parts.values())) for parts in moments.values())


def describe(config: Any, sizes: ModelConfig, counts: dict[str, int], moments: Moments) -> str:
    """The table: parts down, moments across."""
    unit, name = (GIB, "GiB") if peak(moments) >= 10 * GIB else (2**20, "MiB")
    kind = f"{sizes.model_type}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, {sizes.vocab_size:,} tokens"
    lines = [f"{config.planned} of {kind}; {config.ranks} {'rank' if config.ranks == 1 else 'ranks'}, {config.dtype}"]
    lines += [f"  {part:<10}{count:>16,}" for part, count in memory.parameter_counts(sizes).items()]
    lines += [f"  {'parameters':<10}{counts['all']:>16,}"]
    if "trainable" in counts:
        share = counts["trainable"] / counts["all"]
        lines += [f"  {'trainable':<10}{counts['trainable']:>16,}  ({share:.2%})"]
    width = max(map(len, moments)) + 2
    lines += ["", f"{name + ' per rank, at':<26}" + "".join(f"{moment:>{width}}" for moment in moments)]
    digits = 2 if unit == GIB else 1
    for part, label in LABELS.items():
        values = [sum(parts.get(part, [])) / unit for parts in moments.values()]
        if any(values):
            lines.append(f"{label:<26}" + "".join(f"{value:>{width},.{digits}f}" for value in values))
    totals = [sum(map(sum, parts.values())) / unit for parts in moments.values()]
    lines.append(f"{'total':<26}" + "".join(f"{value:>{width},.{digits}f}" for value in totals))
    return "\n".join(lines)


if __name__ == "__main__":
    training.run_recipe(main, settings_of(sys.argv[1:]), lock=False)
