"""Settings of a recipe: a dataclass, filled from a TOML file and the command line."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import MISSING, dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from pedgpt.files import naming_full_disk, nearest, printable, read_toml, sole_writer, toml_place, toml_value
from pedgpt.training.distributed import stop

C = TypeVar("C")
Recompute = Literal["none", "selective", "block", "offload"]
Schedule = Literal["cosine", "constant", "linear", "wsd"]
Dtype = Literal["float32", "bfloat16"]
Tracker = Literal["wandb", "tensorboard"]


@dataclass
class TrainingSettings:
    """What every training stage asks for; a recipe adds its own fields."""

    output: str  # folder for checkpoints, metrics.jsonl and the trained model
    epochs: float = 1.0  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as many as `epochs` asks for
    global_batch_size: int = 16  # rows (pairs in DFPO) per optimizer step, over all ranks
    micro_batch_size: int = 4  # rows per forward pass and rank; the rest of the batch is accumulated
    learning_rate: float = 1e-5  # peak of the schedule
    final_learning_rate_ratio: float = 0.1  # learning rate at the end, as a share of the peak
    schedule: Schedule = "cosine"  # after the warm-up: cosine, constant, linear, or wsd (constant, then linear decay)
    decay_ratio: float = 0.1  # share of the steps in which the learning rate of wsd falls
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises linearly
    weight_decay: float = 0.1  # AdamW, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not at all
    dtype: Dtype = "float32"  # of the computation: float32 or bfloat16
    weight_dtype: Dtype = "float32"  # of a model that trains (adapters: float32); bfloat16 is rounded stochastically
    optimizer_state: Dtype = "float32"  # of AdamW's two moments; bfloat16 is rounded stochastically too
    accumulate_in_float32: bool = False  # add up micro-batches' gradients in float32, not in the weights' dtype
    save_dtype: Literal[Dtype, ""] = ""  # of the result: float32 or bfloat16; empty: dtype, for adapters float32
    activation_checkpointing: Recompute = "none"  # computed again to save memory: none, selective, block, offload
    evaluate_every: int = 0  # steps between evaluations on held-out rows; 0: only at the end
    keep_best: bool = False  # the result is the model of the lowest held-out loss, not the last one
    checkpoint_every: int | str = "auto"  # steps between checkpoints; auto: about 5 % of the time goes to them; 0: none
    keep_checkpoints: int = 2  # how many of the last checkpoints stay on disk
    log_to: list[Tracker] = field(default_factory=list)  # besides metrics.jsonl: wandb, tensorboard
    seed: int = 0  # of the data order, the initial adapters and all noise
    device: str = "auto"  # auto, cpu or cuda
    plan: str = ""  # 24 or 8x80: only say what a step takes on a card of 24 GB, or on each of 8 of 80 GB

    def check(self) -> None:
        """Raise ValueError for a value out of range or a package that is not there, before anything is loaded."""
        rules: list[tuple[str, Callable[[Any], bool], str]] = [
            ("at least 1", lambda x: x >= 1, "global_batch_size micro_batch_size keep_checkpoints"),
            ("0 or more", lambda x: 0 <= x < math.inf, "max_steps evaluate_every max_grad_norm weight_decay"),
            ("positive and finite", lambda x: 0 < x < math.inf, "epochs learning_rate"),
            ("between 0 and 1", lambda x: 0 <= x <= 1, "warmup_ratio final_learning_rate_ratio decay_ratio"),
            ("at least 0 and below 1", lambda x: 0 <= x < 1, "beta1 beta2"),
            ('"auto" or a number of steps', lambda x: x == "auto" or (type(x) is int and x >= 0), "checkpoint_every"),
        ]
        for what, holds, names in rules:
            for name in names.split():
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name} must be {what}, found {value!r}")
        if self.keep_best and not self.evaluate_every:
            raise ValueError("keep_best compares evaluations during training; set evaluate_every to a number of steps")
        if self.weight_dtype == "bfloat16" != self.dtype:
            raise ValueError('weight_dtype "bfloat16" computes in bfloat16 too: set dtype to "bfloat16"')
        for name in self.log_to:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"log_to names {name}, which is not installed: pip install 'pedgpt[{name}]'")


def parse_settings(cls: type[C], arguments: Sequence[str]) -> C:
    """Fill the dataclass `cls` from `--config file.toml` and then from `--key value` flags, which win.

    A list field takes several values; of a repeated flag the last counts. Raises ValueError for an unknown key (with
    the nearest known one), a value of the wrong type, a missing required field or an unreadable file.
    """
    kinds = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    needed = [name for name, f in fields.items() if f.default is f.default_factory is MISSING]
    found: dict[str, Any] = {}

    def take(place: str, name: str, value: Any) -> None:
        if name not in fields:
            raise ValueError(f"{place} is no setting of this recipe; {nearest(name, fields, 'settings')}")
        found[name] = _convert(place, value, kinds[name])

    flags: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words = flags[name.replace("-", "_")] = [value] if equals else []
        elif not flags:
            raise ValueError(f"unexpected argument {argument!r}; settings are given as --key value")
        else:
            words.append(argument)
    if "config" in flags:
        file = _from_words("config", flags.pop("config"), str)
        for name, value in read_toml(file).items():
            take(f"{toml_place(file, name)}: {name}", name, value)
    for name, words in flags.items():
        take(f"--{name}", name, _from_words(name, words, kinds.get(name, list[str])))
    if found.get("plan"):  # It reads neither data nor weights, and writes nothing.
        found, needed = dict.fromkeys(needed, "") | found, ["model"]
    missing = [name for name in needed if found.get(name, "") == ""]  # "" would be the folder of the command
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)}; give --{missing[0]} or set it in the --config file")
    return cls(**found)


def _from_words(name: str, words: list[str], kind: Any) -> Any:
    """The words after a flag as TOML would have the value; text that fits no type of the field stays text."""
    if typing.get_origin(kind) is list:
        return words
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise ValueError(f"--{name} takes one value, found {len(words)}")
    if {int, float, bool} & {kind, *typing.get_args(kind)}:
        with suppress(ValueError, SyntaxError):
            return ast.literal_eval(words[0].title())  # "true" as Python writes it
    return words[0]


def _convert(place: str, value: Any, kind: Any) -> Any:
    """A TOML value as the type of its field, one alone also as a list; ValueError names the place."""
    origin, options = typing.get_origin(kind), typing.get_args(kind) or (kind,)
    if origin is list:
        return [_convert(place, item, *options) for item in (value if isinstance(value, list) else [value])]
    if origin is not Literal:
        return toml_value(place, value, *(option for option in options if option is not types.NoneType))
    if value not in options:
        raise ValueError(f"{place} must be one of {', '.join(filter(None, options))}, found {value!r:.100}")
    return value


def describe_settings(cls: type) -> str:
    """Every setting with its comment and default, for --help."""
    lines = ["", "settings (--config FILE.toml, --key value; the last counts):"]
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), flags=re.MULTILINE))
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "required" if default is MISSING else repr(default)
        lines.append(f"  --{f.name:<26} {comments.get(f.name, '')} [{shown}]")
    return "\n".join([inspect.getdoc(sys.modules[cls.__module__]) or "", *lines])


def run_recipe(main: Callable[[C], None], cls: type[C]) -> None:
    """Call `main` with settings from the command line; a user's mistake ends in one line instead of a traceback.

    A recipe with a setting `output` holds a lock in that folder, or beside it where `cls.lock_beside` is true, because
    it is a file or is replaced as a whole. Terminal commands in what is printed are shown, not obeyed. With
    PEDGPT_TRACEBACK=1 in the environment the traceback is shown.
    """
    make_printable(sys.stdout)
    make_printable(sys.stderr, "\r")  # a progress bar goes back to the start of its line
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(describe_settings(cls))
        return
    code = 0
    try:
        config = parse_settings(cls, arguments)
        output = str(getattr(config, "output", ""))
        writes = output and not getattr(config, "plan", "") and os.environ.get("RANK", "0") == "0"
        lock = sole_writer(output, beside=getattr(cls, "lock_beside", False)) if writes else nullcontext()
        with naming_full_disk(output or "."), lock:
            main(config)
            stop()
    except BaseException as error:
        code = explain(error)
    if code or "RANK" in os.environ:
        # NOTE: leave at once, because after a mistake other ranks may wait for this one in a collective, and because
        # Gloo's threads can abort a run that has succeeded (pytorch/pytorch#179291).
        with suppress(OSError):  # a closed pipe
            sys.stdout.flush()
        os._exit(code)


def explain(error: BaseException) -> int:
    """Say in one line what ended a recipe, and return its exit code; a bug is raised with its traceback."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # whoever stopped the run has said so
        return error.code
    if isinstance(error, KeyboardInterrupt):
        print("stopped by Ctrl-C; the same command goes on, or starts anew", file=sys.stderr)
        return 130
    left = isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error))
    if os.environ.get("PEDGPT_TRACEBACK") or not (left or isinstance(error, ValueError | OSError)):
        raise error
    line = "another process of this run has ended, and says why" if left else error
    print(printable(f"error: {line}"), file=sys.stderr, flush=True)
    return 2


def make_printable(stream: Any, kept: str = "") -> None:
    """From now on, escape in this stream what a terminal would obey, except `kept`, and what its encoding lacks."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    if stream:  # no stream at all is None
        write = partial(type(stream).write, stream)
        stream.write = lambda text: write(kept.join(map(printable, text.split(kept))) if kept else printable(text))
