"""A whole step of full-parameter training beside transformers' LlamaForCausalLM, on the same weights and tokens.

    python benchmarks/bench_pretrain_step.py
    python benchmarks/bench_pretrain_step.py --chunked      transformers with the head of TRL's SFTTrainer, in chunks

The Llama of `bench_dfpo_step.py`, of 154M parameters with a vocabulary of 125,696, on 2 rows of 1,024 tokens: every one
supervised, as in continued pre-training, then every other run of 128 masked, as in fine-tuning on conversations. A step
is forward, backward, clipping to norm 1 and fused AdamW. Each side is a process of its own, with two threads; they take
turns, the first losses must be equal, medians are compared. Peak memory is that of the process (VmHWM): imports,
weights, optimizer.
"""

import tempfile

import torch
from bench_dfpo_step import Turns, arguments_parser, compare, save_random_llama


def main() -> None:
    parser = arguments_parser(__doc__, steps=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunked", action="store_true", help="give transformers TRL's chunked head")
    arguments = parser.parse_args()
    print("             tokens/s: transformers  pedgpt  ratio   peak MiB: transformers  pedgpt  ratio", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(folder, arguments)
        tokens = torch.randint(5, arguments.vocabulary, (arguments.rows, arguments.length + 1))
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        masked = labels.masked_fill(torch.arange(arguments.length) // 128 % 2 == 0, -100)
        for name, targets in (("all", labels), ("half masked", masked)):
            theirs_first = (transformers_side, folder, inputs, targets, arguments.chunked)
            sides = (theirs_first, (our_side, folder, inputs, targets))
            (theirs, their_peak), (ours, our_peak), spread = compare(sides, arguments)
            print(
                f"{name:11}{inputs.numel() / theirs:>24,.0f}{inputs.numel() / ours:>8,.0f}{theirs / ours:>6.2f}x"
                f"{their_peak:>25,.0f}{our_peak:>8,.0f}{our_peak / their_peak:>6.2f}x  {spread}",
                flush=True,
            )


def transformers_side(turns: Turns, folder: str, inputs: torch.Tensor, labels: torch.Tensor, chunked: bool) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    kwargs = {"input_ids": inputs, "labels": labels, "shift_labels": labels, "use_cache": False}
    if chunked:
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True  # skip what is masked, as it does on GPUs
        trl.trainer.utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        kwargs["fused_lm_head"] = True
    turns.take(model, lambda: model(**kwargs).loss)


def our_side(turns: Turns, folder: str, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    from pedgpt.losses import linear_cross_entropy
    from pedgpt.models import load_model

    model = load_model(folder, dtype=torch.float32).train()
    turns.take(model, lambda: linear_cross_entropy(model.hidden_states(inputs), model.head_weight(), labels))


if __name__ == "__main__":
    main()
