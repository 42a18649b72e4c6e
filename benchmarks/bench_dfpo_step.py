"""A whole DFPO step beside TRL's DPOTrainer with loss_type ["sigmoid", "sft"], on the same weights and pairs.

    python benchmarks/bench_dfpo_step.py
    python benchmarks/bench_dfpo_step.py --prompts 128 256 384 768 1536     how the gain grows with the prompt
    python benchmarks/bench_dfpo_step.py --compact                          TRL's head on the responses alone

A Llama of 154M parameters (hidden 512, 8 layers, vocabulary 125,696, untied head), 2 pairs of a prompt and responses of
128 tokens, β 0.1, μ 1, both references precomputed, no activation checkpointing. A step is forward, backward, clipping
to norm 1 and fused AdamW; TRL's is timed inside its own training loop. Responses are equally long, so that TRL's mean
over the batch's tokens is DFPO's mean over sequences. On CPUs TRL projects prompts onto the vocabulary too; `--compact`
gives it the path it takes on GPUs. Each side is a process of its own, with two threads; they take turns, the first
losses must be equal, medians are compared. Peak memory is that of the process (VmHWM): imports, weights, optimizer.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # for children too


def main() -> None:
    parser = arguments_parser(__doc__, steps=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[384], help="tokens of the prompt, a row for each")
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--compact", action="store_true", help="let TRL's head skip the prompts, as it does on GPUs")
    arguments = parser.parse_args()
    print("prompt + response    s/step: TRL  pedgpt  ratio   peak MiB: TRL  pedgpt  ratio", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, arguments)
        for prompt in arguments.prompts:
            lengths = (prompt, arguments.response, arguments.response)
            pairs = [
                [torch.randint(5, arguments.vocabulary, (length,)).tolist() for length in lengths]
                for _ in range(arguments.pairs)
            ]
            sides = ((trl_side, folder, pairs, arguments.compact), (our_side, folder, pairs))
            (theirs, their_peak), (ours, our_peak), spread = compare(sides, arguments)
            print(
                f"{f'{prompt} + {arguments.response}':17}{theirs:>15.2f}{ours:>8.2f}{theirs / ours:>6.2f}x"
                f"{their_peak:>16,.0f}{our_peak:>8,.0f}{our_peak / their_peak:>6.2f}x  {spread}",
                flush=True,
            )


def trl_side(turns: "Turns", folder: str, pairs, compact: bool) -> None:
    import trl.trainer.utils
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if compact:
        trl.trainer.utils._use_triton = lambda device: True  # there it decides this alone

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # these are tokens already
            return dataset

        def training_step(self, *args, **kwargs):
            self.loss = super().training_step(*args, **kwargs)
            return self.loss

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, *_, **__):  # gradients are set to None by now
            turns.end(trainer.loss)

    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            folder,
            args=DPOConfig(
                output, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1, precompute_ref_log_probs=True,
                per_device_train_batch_size=len(pairs), max_steps=turns.steps, max_length=None,
                gradient_checkpointing=False, bf16=turns.dtype == torch.bfloat16, use_cpu=True,
                optim="adamw_torch_fused", learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=1.0,
                save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(
                [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True)) for pair in pairs]
            ),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>"
            ),
            callbacks=[TakeTurns],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def our_side(turns: "Turns", folder: str, pairs) -> None:
    from pedgpt.data import collate_pairs
    from pedgpt.data.examples import Example
    from pedgpt.data.preference import EncodedPair
    from pedgpt.losses import linear_dfpo_loss, linear_sequence_logps
    from pedgpt.models import load_model

    def example(prompt, response):
        tokens = prompt + response
        return Example(tokens[:-1], [-100] * (len(prompt) - 1) + response)

    encoded = [EncodedPair(example(prompt, chosen), example(prompt, rejected)) for prompt, chosen, rejected in pairs]
    model = load_model(folder, dtype=torch.float32).train()
    rows = collate_pairs(encoded, range(len(pairs)), shared_prompt=False)
    with torch.no_grad(), turns.autocast():
        hidden = model.hidden_states(rows.tokens, documents=rows.documents)
        reference, _ = linear_sequence_logps(hidden, model.head_weight(), rows.labels)
    batch = collate_pairs(encoded, range(len(pairs)), reference.view(2, -1).T)
    chosen, rejected = batch.reference_logps.chunk(2)

    def forward_loss():
        hidden = model.hidden_states(batch.tokens, documents=batch.documents, branches=batch.branches)
        return linear_dfpo_loss(
            hidden, model.head_weight(), batch.labels, chosen, rejected,
            sequences=batch.sequences, beta=0.1, mu=1.0, metrics={},  # as TRL
        ).loss  # fmt: skip

    turns.take(model, forward_loss)


def save_random_llama(folder: str, arguments: argparse.Namespace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.hidden_size, num_hidden_layers=arguments.layers,
        intermediate_size=arguments.hidden_size * 11 // 4, num_attention_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


def arguments_parser(docstring: str | None, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="timed steps, after one to warm up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: autocast")
    parser.add_argument("--vocabulary", type=int, default=125_696)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    return parser


class Turns:
    """What a side is given: how many steps to make, in which dtype, and when."""

    def __init__(self, connection, steps: int, dtype: torch.dtype) -> None:
        self.connection, self.steps, self.dtype = connection, steps, dtype

    def begin(self) -> None:
        self.connection.send("ready")
        self.connection.recv()
        self.began = time.perf_counter()

    def end(self, loss: torch.Tensor) -> None:
        value = float(loss.detach())
        self.connection.send((value, time.perf_counter() - self.began))

    def autocast(self):
        return torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else nullcontext()

    def take(self, model: torch.nn.Module, forward_loss) -> None:
        """The plain loop: steps of `forward_loss`, clipping and AdamW, each in its turn."""
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=True)
        for _ in range(self.steps):
            self.begin()
            with self.autocast():
                loss = forward_loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.end(loss)
            del loss


def serve(connection, steps: int, dtype: torch.dtype, side, *arguments) -> None:
    torch.set_num_threads(2)
    side(Turns(connection, steps, dtype), *arguments)
    status = Path("/proc/self/status").read_text()  # of this process alone, which getrusage's figure is not
    connection.send(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def compare(sides, arguments: argparse.Namespace) -> tuple[tuple[float, float], tuple[float, float], str]:
    """Median seconds of a step and peak MiB of either side, and the ratios' spread; one computes at a time."""
    context = multiprocessing.get_context("spawn")
    steps, dtype = arguments.steps + 1, getattr(torch, arguments.dtype)
    connections, peaks = [], [0.0] * len(sides)
    for side in sides:
        connection, far_end = context.Pipe()
        context.Process(target=serve, args=(far_end, steps, dtype, *side), daemon=True).start()
        far_end.close()
        connection.recv()  # ready
        connections.append(connection)
    losses: list[list[float]] = [[] for _ in sides]
    seconds: list[list[float]] = [[] for _ in sides]
    for step in range(steps):
        for i, connection in enumerate(connections):
            connection.send("step")
            loss, took = connection.recv()
            losses[i].append(loss)
            seconds[i].append(took)
            peaks[i] = connection.recv()  # after the last step; "ready" until then
        # Later losses also compare gradients; AdamW's first steps turn rounding into signs.
        first, second = losses[0][-1], losses[1][-1]
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3 if step else 1e-5
        if not abs(first - second) <= tolerance * abs(first):
            raise SystemExit(f"the losses of step {step + 1} differ: {first:.6f} and {second:.6f}")
    theirs, ours = (took[1:] for took in seconds)
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    spread = f"(ratios of the rounds {ratios[0]:.2f} to {ratios[-1]:.2f})"
    return (statistics.median(theirs), peaks[0]), (statistics.median(ours), peaks[1]), spread


if __name__ == "__main__":
    main()
