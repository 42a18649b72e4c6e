"""Tiny models with their tokenizer and data, and ways to run the recipes as their users do."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from pedgpt import training
from pedgpt.data import train_tokenizer
from pedgpt.models import ModelConfig, Transformer, save_model

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"]
DISEASES = ("感冒", "肺炎", "腹泻", "湿疹", "哮喘", "贫血")
ANSWERS = ("多喝水。", "及时就医，听医生的。", "观察体温，注意休息，必要时复诊。", "清淡饮食。", "保持通风。")
# 21 rows over the whole training, so the last step has one row and the second of two processes nothing; the rest of the
# batch does not divide by two either. High rates, so that a wrong update shows.
COMMON = {
    "row_length": 96, "global_batch_size": 5, "micro_batch_size": 2, "learning_rate": 3e-3, "warmup_ratio": 0.2,
    "seed": 7, "device": "cpu",
}  # fmt: skip
SPECIFIC = {
    "continued_pretrain": {
        "text": "text.jsonl", "instructions": "train.jsonl", "heldout_text": "heldout_text.jsonl", "epochs": 1.75,
    },
    "full_finetune": {"instructions": "train.jsonl", "heldout_instructions": "heldout.jsonl", "epochs": 1.25},
    "dfpo": {"preferences": "pairs.jsonl", "heldout_preferences": "heldout_pairs.jsonl"},
    "expert_finetune": {
        "instructions": "train.jsonl", "heldout_instructions": "heldout.jsonl", "epochs": 1.25, "rank": 2,
        "learning_rate": 1e-2,
    },
}  # fmt: skip


TIMES = ("seconds", "tokens_per_second")


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


class Died(Exception):
    """Stands for the death of a process."""


class Lab:
    """Runs recipes on the tiny model and reads what they leave."""

    recipes = tuple(SPECIFIC)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: dict[str, Path] = {}

    def arguments(self, recipe: str, output: str | Path, **settings) -> list[str]:
        """The command line of a recipe on the tiny data; `settings` add to it, None leaves one out."""
        chosen = {"model": "model", "output": output, **COMMON, **SPECIFIC[recipe], **settings}
        flags = []
        for name, value in chosen.items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                flags += [f"--{name.replace('_', '-')}", *(self._path(item) for item in values)]
        return flags

    def _path(self, value) -> str:
        return str(self.folder / value) if (self.folder / str(value)).exists() and str(value) else str(value)

    def module(self, recipe: str):
        """The recipe as a module, loaded from its path."""
        name = f"recipe_{recipe}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, RECIPES / f"{recipe}.py")
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[name]

    def run(self, recipe: str, output: str | Path, *, die_after: int | None = None, **settings) -> Result:
        """The recipe in this process; with `die_after` it dies once the checkpoint of that step is written."""
        return self.call(recipe, self.arguments(recipe, output, **settings), die_after=die_after)

    def call(self, recipe: str, arguments: list[str], *, die_after: int | None = None) -> Result:
        """The recipe in this process with a literal command line, up to its exit code."""
        module = self.module(recipe)
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            patch.object(sys, "argv", [f"{recipe}.py", *arguments]),
            patch.object(os, "_exit", sys.exit),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                with dying_after(die_after):
                    training.run_recipe(module.main, module.Config)
            except SystemExit as exit:
                code = exit.code
            except Died:
                code = -9
        return Result(code, out.getvalue(), err.getvalue())

    def reference(self, recipe: str) -> Path:
        """The output of an uninterrupted run on one process, made once."""
        if recipe not in self.references:
            output = self.folder / "references" / recipe
            result = self.run(recipe, output)
            assert result.code == 0, result.err
            self.references[recipe] = output
        return self.references[recipe]

    def start(self, command: list[str], python: str = sys.executable, **environment: str) -> subprocess.Popen:
        """A Python process of one thread."""
        return subprocess.Popen(
            [python, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    def torchrun(self, python: str, script: str | Path, arguments: list[str]) -> subprocess.Popen:
        """`torchrun --nproc-per-node 2`, gloo, where this stands in for Python, for the launcher and for the ranks."""
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(self.free_port())]
        return self.start([*launcher, "--no-python", python, str(script), *arguments], python)

    def free_port(self) -> int:
        """A port that nobody listens on."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return free.getsockname()[1]

    def fork(self, script: str | Path, arguments: list[str], ranks: int = 1) -> list[multiprocessing.Process]:
        """The processes of a script, each a copy of a server that has imported torch already, which takes seconds."""
        forked = multiprocessing.get_context("forkserver")
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.free_port())}
        processes = []
        for rank in range(ranks):
            environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), **world} if ranks > 1 else {}
            given = {"argv": [str(script), *arguments], "environ": environ, "log": str(self.folder / f"rank_{rank}")}
            processes.append(forked.Process(target=exec, args=(FORKED, given), daemon=True))
            processes[-1].start()
        return processes

    def ended(self, processes: list[multiprocessing.Process]) -> Result:
        """How forked processes have ended, all together, with what they have written."""
        for process in processes:
            process.join(120)
            assert process.exitcode is not None, "the process does not end"
        out, err = ("".join((self.folder / f"rank_{rank}.{kind}").read_text("utf-8") for rank in range(len(processes)))
                    for kind in ("out", "err"))  # fmt: skip
        return Result(next((process.exitcode for process in processes if process.exitcode), 0), out, err)

    def two_ranks(self, jobs: list[tuple]) -> Result:
        """Several (recipe, output, settings, die_after) one after the other in the same two processes, gloo."""
        script = self.folder / "jobs.py"
        script.write_text(JOBS, encoding="utf-8")
        rows = [
            [str(RECIPES / f"{recipe}.py"), self.arguments(recipe, output, **settings), die_after]
            for recipe, output, settings, die_after in jobs
        ]
        return self.ended(self.fork(script, [json.dumps(rows)], ranks=2))

    def script(self, recipe: str) -> str:
        """The recipe's file."""
        return str(RECIPES / f"{recipe}.py")

    def metrics(self, output: Path) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def weights(self, output: Path) -> dict[str, torch.Tensor]:
        """What a run saved, model or adapter."""
        (file,) = output.glob("*/*.safetensors")
        return load_file(file)

    def assert_as_if_nothing_happened(self, output: Path, expected: Path) -> None:
        """The same weights and metrics bit for bit, every step once, and no checkpoint left."""
        found, wanted = self.weights(output), self.weights(expected)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
        mine, theirs = (
            [{name: value for name, value in line.items() if name not in TIMES} for line in self.metrics(folder)]
            for folder in (output, expected)
        )
        assert [line["step"] for line in mine] == list(range(1, len(theirs) + 1))
        assert mine == theirs
        seconds = [line["seconds"] for line in self.metrics(output)]
        assert seconds == sorted(seconds)
        assert {path.name for path in output.iterdir()} == {path.name for path in expected.iterdir()}
        assert not (output / "checkpoints").exists()


FORKED = """
import multiprocessing, os, runpy, sys, torch
multiprocessing.set_start_method("fork", force=True)  # as where nobody has forked
for number, kind in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    setattr(sys, f"std{kind}", open(number, "w", buffering=1, encoding="utf-8", closefd=False))
torch.set_num_threads(1)
os.environ.update(environ)
sys.argv = argv
runpy.run_path(argv[0], run_name="__main__")
"""

JOBS = """
import json, os, runpy, sys
from unittest.mock import patch
from pedgpt import training
from pedgpt.training import checkpoint

class Died(Exception): pass

for path, arguments, die_after in json.loads(sys.argv[1]):
    recipe = runpy.run_path(path)
    real = checkpoint.Checkpoints.save
    def save(self, step, **notes):
        real(self, step, **notes)
        if step == die_after:
            raise Died
    try:
        with patch.object(checkpoint.Checkpoints, "save", save):
            recipe["main"](training.parse_settings(recipe["Config"], arguments))
    except Died:
        print("died as asked")
training.stop()
sys.stdout.flush()
os._exit(0)  # as run_recipe does
"""


@contextlib.contextmanager
def dying_after(step: int | None):
    real = training.checkpoint.Checkpoints.save

    def save(self, at, **notes):
        real(self, at, **notes)
        if at == step:
            raise Died

    with patch.object(training.checkpoint.Checkpoints, "save", save):
        yield


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Lab:
    """A Lab with tiny models ("model" of Baichuan2's shape, "tied" a Llama with tied heads) and data files."""
    folder = tmp_path_factory.mktemp("lab")
    ages = ("婴儿", "幼儿", "学龄儿童")
    documents = [f"{d}常见于{ages[i % 3]}。{ANSWERS[i % 5]}" for i, d in enumerate(DISEASES * 4)]
    turns = [(f"孩子{d}怎么办？", ANSWERS[(i + i // 5) % 5]) for i, d in enumerate(DISEASES * 5)]
    conversations = []
    for i, (question, answer) in enumerate(turns):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if i % 4 == 0:  # two turns
            messages += [{"role": "user", "content": "要吃药吗？"}, {"role": "assistant", "content": "先看医生。"}]
        if i % 7 == 0:
            messages.insert(0, {"role": "system", "content": "你是儿科医生。"})
        conversations.append({"messages": messages})
    pairs = [{"prompt": q, "chosen": f"别担心，{a}", "rejected": a[::-1]} for q, a in turns]
    write(folder / "text.jsonl", [{"text": text} for text in documents[:-3]])
    write(folder / "heldout_text.jsonl", [{"text": text} for text in documents[-3:]])
    write(folder / "train.jsonl", conversations[:-5])
    write(folder / "heldout.jsonl", conversations[-5:])
    write(folder / "pairs.jsonl", pairs[:21])
    write(folder / "heldout_pairs.jsonl", pairs[21:24])

    tokenizer = train_tokenizer(documents, vocab_size=300, special_tokens=SPECIAL_TOKENS)
    baichuan2 = {"model_type": "baichuan", "num_key_value_heads": 2, "normalize_head": True, "fused_qkv": True}
    tied = {"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": True}
    for name, family in (("model", baichuan2), ("tied", tied)):
        torch.manual_seed(0)
        # Weights large enough that the loss depends on the context from the start.
        config = ModelConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            head_dim=16, max_position_embeddings=128, initializer_range=0.1, **family,
        )  # fmt: skip
        save_model(Transformer(config), folder / name)
        tokenizer.save(folder / name)
    return Lab(folder)


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
