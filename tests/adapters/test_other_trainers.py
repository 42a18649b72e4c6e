"""Experts under the machinery of others: transformers, accelerate, DDP, FSDP2, torch.compile and torch.export."""

import copy
import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM

from pedgpt.adapters import adapter_names, inject_experts, set_adapter, set_noise_rows

SETTINGS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.randint(3, 97, (8, 9), generator=torch.Generator().manual_seed(1))


def make(seed=0):
    """A small Qwen3 with experts of random values, the same in every process."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(Qwen3Config(**SETTINGS))
    inject_experts(model, rank=2, num_specific_experts=2, dropout=0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_transformers_trainer_with_checkpointing_in_bf16_resumes_bit_for_bit(tmp_path):
    from transformers import Trainer, TrainingArguments

    def train(model, resume=None):
        arguments = TrainingArguments(
            tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, bf16=True,
            learning_rate=0.01, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in TOKENS]
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return adapters(model)

    base = {name: p.clone() for name, p in make().named_parameters() if not p.requires_grad}
    model = make()
    before, whole = adapters(model), train(model)
    assert all(not torch.equal(before[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in base.items())
    resumed = train(make(seed=1), tmp_path / "checkpoint-2")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_accelerate_trains_as_a_plain_loop_does():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a Trainer that ran before, with its bfloat16

    def train(model, accelerator=None):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        if accelerator:
            model, optimizer = accelerator.prepare(model, optimizer)
        for step in range(3):
            torch.manual_seed(step)
            loss = model(TOKENS[:4], labels=TOKENS[:4]).loss
            accelerator.backward(loss) if accelerator else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return adapters(accelerator.unwrap_model(model) if accelerator else model)

    plain, prepared = train(make()), train(make(), Accelerator(cpu=True))
    assert all(torch.equal(prepared[name], tensor) for name, tensor in plain.items())


def loss_of(model, rows):
    """Without dropout, and with the noise of these rows, wherever they are computed."""
    for module in model.modules():
        module.dropout = 0.0 if hasattr(module, "lora_A") else None
    set_noise_rows(model, 3, rows)
    return model(TOKENS[rows], labels=TOKENS[rows]).loss


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rows = torch.arange(4)[rank::2]
    found = {}
    replicated = DistributedDataParallel(make())
    for _ in range(2):  # the second pass finds out whether a parameter had no gradient in the first
        replicated.zero_grad()
        loss_of(replicated, rows).backward()
    found["ddp"] = {name.removeprefix("module."): p.grad for name, p in replicated.named_parameters()}
    split = make()
    for block in [*split.model.layers, split]:
        fully_shard(block)
    loss_of(split, rows).backward()
    found["fsdp"] = {name: None if p.grad is None else p.grad.full_tensor() for name, p in split.named_parameters()}
    torch.save(found, f"{folder}/{rank}.pt")
    while not os.path.exists(f"{folder}/{1 - rank}.pt"):
        time.sleep(0.01)
    os._exit(0)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_have_the_gradients_of_one(kind, two_ranks):
    model = make()
    loss_of(model, torch.arange(4)).backward()
    for rank in two_ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rank[kind][name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, start_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_a_compiler_takes_the_whole_graph_and_takes_it_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
    inject_experts(model, rank=2)
    nn.init.normal_(model[0].lora_B), nn.init.normal_(model[2].lora_B)
    plain = copy.deepcopy(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = {"plain": plain, "compiled": torch.compile(model, fullgraph=True, backend="aot_eager")}
    optimizers = {name: torch.optim.AdamW(each.parameters(), lr=0.01) for name, each in models.items()}
    for training in (False, True):
        for step in range(4):
            losses = {}
            for name, each in models.items():
                each.train(training)
                torch.manual_seed(step)
                losses[name] = each(torch.randn(3, 5, 6)).square().mean()
                losses[name].backward()
                optimizers[name].step()
                optimizers[name].zero_grad()
            if not training:  # in training the compiler draws noise of its own
                torch.testing.assert_close(losses["compiled"], losses["plain"], rtol=1e-4, atol=1e-5)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + training


def test_an_export_computes_the_same():
    model = make().eval()
    exported = torch.export.export(model, (TOKENS,), kwargs={"use_cache": False}).module()
    other = TOKENS.flip(1)
    torch.testing.assert_close(exported(other, use_cache=False).logits, model(other).logits, rtol=1e-4, atol=1e-5)


def test_a_pickled_model_is_the_model():
    model = make().eval()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits) and adapter_names(again) == ["default"]
    set_adapter(again, None)
    assert not torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("cache", [True, False])
def test_generate_matches_a_loop_of_forward_passes(cache):
    model, expected = make().eval(), TOKENS[:3, :5]
    for _ in range(8):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    found = model.generate(TOKENS[:3, :5], max_new_tokens=8, do_sample=False, eos_token_id=[], use_cache=cache)
    assert torch.equal(found, expected)
