"""Settings of a recipe: a dataclass, filled from a TOML file and the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

from pedgpt.files import (
    DiskFull,
    disk_full,
    full_disk,
    nearest,
    printable,
    read_toml,
    sole_writer,
    toml_place,
    toml_shown,
    toml_value,
)
from pedgpt.training.distributed import stop

C = TypeVar("C")
Recompute = Literal["none", "selective", "block"]


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
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises linearly
    weight_decay: float = 0.1  # AdamW, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not at all
    dtype: str = "float32"  # of the computation: float32 or bfloat16 (trained weights stay float32)
    save_dtype: str = ""  # of the trained weights on disk: float32 or bfloat16; empty: dtype, for adapters float32
    activation_checkpointing: Recompute = "none"  # computed again to save memory: none, selective (cheap parts), block
    evaluate_every: int = 0  # steps between evaluations on held-out rows; 0: only at the end
    checkpoint_every: int | str = "auto"  # steps between checkpoints; auto: about 5 % of the time goes to them; 0: none
    keep_checkpoints: int = 2  # how many of the last checkpoints stay on disk
    seed: int = 0  # of the data order, the initial adapters and all noise
    device: str = "auto"  # auto, cpu or cuda
    plan: str = ""  # 24 or 8x80: only say what a step takes on a card of 24 GB, or on each of 8 of 80 GB

    def check(self) -> None:
        """Raise ValueError for a value out of range, before anything is loaded."""
        for f in dataclasses.fields(self):
            if isinstance(value := getattr(self, f.name), float) and not math.isfinite(value):
                raise ValueError(f"{f.name} must be a finite number, found {value}")
        for name in ("global_batch_size", "micro_batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        every = self.checkpoint_every
        if every != "auto" and not (isinstance(every, int) and every >= 0):
            raise ValueError(f'checkpoint_every must be "auto" or a number of steps, found {every!r}')
        for name in ("max_steps", "evaluate_every", "max_grad_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, found {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("warmup_ratio", "final_learning_rate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, found {getattr(self, name)}")
        for name in ("dtype", "save_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "" if name == "save_dtype" else "float32"):
                raise ValueError(f'{name} must be "float32" or "bfloat16", found {getattr(self, name)!r}')


def parse_settings(cls: type[C], arguments: Sequence[str]) -> C:
    """Fill the dataclass `cls` from `--config file.toml` and then from `--key value` flags, which win.

    A list field takes several values; of a repeated flag the last counts. Raises ValueError for an unknown key (with
    the nearest known one), a value of the wrong type, a missing required field or an unreadable file.
    """
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kinds = typing.get_type_hints(cls)
    flags = _split_flags(arguments)
    converted: dict[str, Any] = {}
    if "config" in flags:
        file = _single("config", flags.pop("config"))
        for name, value in read_toml(file).items():
            place = f"{toml_place(file, name)}: {name}"
            _require_known(name, known, place)
            converted[name] = _convert(place, value, kinds[name])
    for name, given in flags.items():
        _require_known(name, known, "--" + name.replace("_", "-"))
        converted[name] = _convert(name, given, kinds[name], flag=True)
    missing = [
        name
        for name, f in known.items()
        if converted.get(name, "") == ""  # an output "" would be the folder in which the command runs
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if converted.get("plan"):  # It reads neither data nor weights, and writes nothing.
        converted |= {name: (typing.get_origin(kinds[name]) or kinds[name])() for name in missing if name != "model"}
        missing = [name for name in missing if name == "model"]
    if missing:
        raise ValueError(f"missing setting: {', '.join(missing)}; give --{missing[0]} or set it in the --config file")
    return cls(**converted)


def run_recipe(main: Callable[[C], None], cls: type[C], *, lock: bool = True) -> None:
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
    output = ""
    try:
        config = parse_settings(cls, arguments)
        output = str(getattr(config, "output", ""))
        writes = lock and output and not getattr(config, "plan", "") and os.environ.get("RANK", "0") == "0"
        with sole_writer(output, beside=getattr(cls, "lock_beside", False)) if writes else nullcontext():
            main(config)
            stop()
    except BaseException as error:
        leave(error, output)
    if "RANK" in os.environ:
        # Gloo's threads may still drop tensors while the interpreter shuts down, which aborts a run that has succeeded
        # (pytorch/pytorch#179291): leave without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def leave(error: BaseException, output: str = "") -> NoReturn:
    """End a recipe: a user's mistake, a full disk or a signal in one line, and anything else with its traceback."""
    reason, cause = None if isinstance(error, DiskFull) else full_disk(error), True
    if isinstance(error, SystemExit):  # whoever stopped the run has said so
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif isinstance(error, KeyboardInterrupt):
        code, line = 130, "stopped by Ctrl-C; the same command goes on, or starts anew"
    elif reason:
        code, line = 2, f"error: {disk_full(getattr(error, 'filename', None) or output or '.', 0, reason)}"
    elif isinstance(error, ValueError | OSError):
        code, line = 2, f"error: {error}"
    elif isinstance(error, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(error)):
        code, line, cause = 2, "error: another process of this run has ended, and says why", False
    else:
        raise error
    if code == 2 and os.environ.get("PEDGPT_TRACEBACK"):
        raise error
    with suppress(OSError):  # standard error may be a file on a full disk
        if not isinstance(error, SystemExit):
            tell_torchrun(line, cause)
            print(printable(line), file=sys.stderr, flush=True)
    # Other ranks may wait for this one in a collective: leave at once, torchrun ends them.
    os._exit(code)


def make_printable(stream: Any, kept: str = "") -> None:
    """From now on, escape in this stream what a terminal would obey, except `kept`, and what its encoding lacks."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    if stream:  # no stream at all is None
        write = partial(type(stream).write, stream)
        stream.write = lambda text: write(kept.join(map(printable, text.split(kept))) if kept else printable(text))


def tell_torchrun(line: str, cause: bool = True) -> None:
    """Let torchrun's summary, which it prints last and at length, show this line: as the root cause, or not."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun calls the earliest failure the root cause. It compares whole seconds, so a failure that
        # only follows from another one gets a later time.
        when = int(time.time()) + (0 if cause else 60)
        said = {"message": printable(line), "extraInfo": {"timestamp": str(when)}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": said}, file)


def describe_settings(cls: type) -> str:
    """Every setting with its comment and default, for --help."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), flags=re.MULTILINE))
    lines = [
        inspect.getdoc(sys.modules[cls.__module__]) or "",
        "",
        "settings (--config FILE.toml, --key value; the last counts):",
    ]
    for f in dataclasses.fields(cls):
        default = "required"
        if f.default is not dataclasses.MISSING:
            default = repr(f.default)
        elif f.default_factory is not dataclasses.MISSING:
            default = repr(f.default_factory())
        lines.append(f"  --{f.name:<26} {comments.get(f.name, '')} [{default}]")
    return "\n".join(lines)


def _split_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            name, equals, value = argument[2:].partition("=")
            current = flags[name.replace("-", "_")] = []  # of a repeated flag the last counts
            if equals:
                current.append(value)
        elif current is None:
            raise ValueError(f"unexpected argument {argument!r}; settings are given as --key value")
        else:
            current.append(argument)
    return flags


def _require_known(name: str, known: typing.Iterable[str], where: str) -> None:
    names = list(known)
    if name not in names:
        raise ValueError(f"{where} is no setting of this recipe; {nearest(name, names, 'settings')}")


def _single(name: str, given: list[str]) -> str:
    if len(given) != 1:
        raise ValueError(f"--{name} takes one value, found {len(given)}")
    return given[0]


def _convert(name: str, value: Any, kind: Any, flag: bool = False) -> Any:
    """A TOML value, or the list of strings that followed a flag, as the type of the field."""
    kinds = [kind]
    if isinstance(kind, types.UnionType):  # such as int | str; of a flag, the first type that fits
        kinds = [option for option in typing.get_args(kind) if option is not types.NoneType]
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise ValueError(f"{name} must be a list of strings, found {toml_shown(value)}")
    if typing.get_origin(kind) is Literal:
        words, value = typing.get_args(kind), _single(name, value) if flag else value
        if value in words and isinstance(value, str):
            return value
        expected = f"{', '.join(map(json.dumps, words[:-1]))} or {json.dumps(words[-1])}"
        hint = {"true": f"; {json.dumps(words[-1])} is what true was"}.get(str(value).lower(), "")
        raise ValueError(f"{'--' * flag}{name} must be {expected}, found {toml_shown(value)}{hint}")
    if not flag:
        return toml_value(name, value, *kinds)
    value = text = "true" if bool in kinds and not value else _single(name, value)
    for kind in reversed(kinds):  # the text stays where it is no such type
        with suppress(ValueError, KeyError):
            value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    return toml_value(f"--{name}", value, *kinds)
