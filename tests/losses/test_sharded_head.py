"""Two gloo processes under FSDP2: the gradients of one process on the whole batch, whoever gathers the head."""

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pedgpt.losses import linear_cross_entropy, linear_dfpo_loss, linear_sequence_logps
from pedgpt.models import ModelConfig, Transformer
from pedgpt.training import World, shard
from pedgpt.training.distributed import reshard

SIZES = {
    "model_type": "llama", "vocab_size": 37, "hidden_size": 20, "intermediate_size": 27, "num_hidden_layers": 2,
    "num_attention_heads": 5, "head_dim": 4, "num_key_value_heads": 5, "max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "NormHead": {"normalize_head": True},
    "tied NormHead": {"tie_word_embeddings": True, "normalize_head": True},
    "a unit of its own": {},  # the head, which FSDP then never gathers
    "frozen": {},  # but for the head and the embedding
    "one rank has no labels": {},
    "in two steps": {"tie_word_embeddings": True},
}
PLACEMENTS = {"split": ((2,), (Shard(0),)), "columns": ((2,), (Shard(1),)), "HSDP": ((2, 1), (Replicate(), Shard(0)))}
LOSSES = ["cross entropy", "sequences", "dfpo"]


def make(case):
    """The tiny model, tokens [4, 7] and labels, the same in every process."""
    torch.manual_seed(0)
    config = {**SIZES, **MODELS[case]}
    normalize = config.pop("normalize_head", False)
    config = ModelConfig.from_hf(config | {"pedgpt_norm_head": normalize})
    assert config.normalize_head == normalize
    model = Transformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if case == "frozen":
        model.model.layers.requires_grad_(False)
    tokens = torch.randint(37, (4, 7))
    labels = torch.randint(37, (4, 7)).masked_fill(torch.rand(4, 7) < 0.4, -100)
    if case == "one rank has no labels":
        labels[2:] = -100
    return model, tokens, labels


def direct():
    """hidden [4, 5, 6], head [11, 6] and labels of two pairs, one on each rank: chosen, then rejected."""
    torch.manual_seed(1)
    labels = torch.randint(11, (4, 5)).masked_fill(torch.rand(4, 5) < 0.3, -100)
    labels[:, 0] = 3
    return torch.randn(4, 5, 6), torch.randn(11, 6), labels


def direct_loss(name, hidden, weight, labels):
    if name == "cross entropy":
        return linear_cross_entropy(hidden, weight, labels, 10, normalize=True)
    if name == "sequences":
        return linear_sequence_logps(hidden, weight, labels, normalize=True)[0].cos().mean()
    references = torch.full((2, len(labels) // 2), -9.0)
    return linear_dfpo_loss(hidden, weight, labels, *references, normalize=True).loss


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    world, found = World(rank, 2, torch.device("cpu")), {}
    for case in MODELS:
        model, tokens, labels = make(case)
        count = (labels != -100).sum() / 2  # FSDP2 averages over ranks
        if case == "a unit of its own":
            fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (2,)))
        shard(model, model.model.layers, world, torch.float32)
        mine = range(2 * rank, 2 * rank + 2)
        losses = []
        for rows in [[row] for row in mine] if case == "in two steps" else [list(mine)]:
            hidden = model.hidden_states(tokens[rows])
            assert isinstance(model.lm_head.weight, DTensor) == (case == "a unit of its own")
            loss = linear_cross_entropy(
                hidden, model.lm_head.weight, labels[rows], count, normalize=model.config.normalize_head
            )
            loss.backward()
            losses.append(loss.item())
        reshard(model)
        found[case, "loss"] = sum(losses)
        for name, parameter in model.named_parameters():
            found[case, name] = None if parameter.grad is None else parameter.grad.full_tensor()

    hidden, weight, labels = direct()
    rows = torch.tensor([rank, rank + 2])
    for place, (shape, placements) in PLACEMENTS.items():
        for name in LOSSES:
            head = nn.Parameter(distribute_tensor(weight, init_device_mesh("cpu", shape), placements))
            leaf = hidden[rows].requires_grad_()
            loss = direct_loss(name, leaf, head, labels[rows])
            assert not isinstance(loss, DTensor)
            loss.backward()
            assert head.grad.placements == placements and head.grad.to_local().shape == head.to_local().shape
            found[place, name] = (loss.item(), head.grad.full_tensor(), leaf.grad)
            leaf.grad, before = None, leaf.grad
            direct_loss(name, leaf, head.detach(), labels[rows]).backward()
            torch.testing.assert_close(leaf.grad, before)
    torch.save(found, f"{folder}/{rank}.pt")
    while not os.path.exists(f"{folder}/{1 - rank}.pt"):  # a rank that left early would break the other's collectives
        time.sleep(0.01)
    os._exit(0)  # torch's own threads now and then abort while a spawned process winds down


@pytest.fixture(scope="module")
def found(tmp_path_factory, start_ranks):
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def close(found, expected):
    assert (found - expected).norm() <= 5e-6 * expected.norm() + 1e-9


@pytest.mark.parametrize("case", MODELS)
def test_a_split_model_has_the_gradients_of_one_process(case, found):
    model, tokens, labels = make(case)
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    assert sum(rank[case, "loss"] for rank in found) / 2 == pytest.approx(loss.item(), rel=1e-6)
    for rank in found:
        assert {name for place, name in rank if place == case} - {"loss"} == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert (rank[case, name] is None) == (parameter.grad is None), name
            if parameter.grad is not None:
                close(rank[case, name], parameter.grad)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_split_head_is_the_mean_over_ranks(name, place, found):
    hidden, weight, labels = direct()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ F.normalize(weight, dim=-1).T
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    losses = []
    for rank in range(2):
        chosen, rejected = logps[rank].sum(), logps[rank + 2].sum()
        if name == "cross entropy":
            losses.append(-(chosen + rejected) / 10)
        elif name == "sequences":
            losses.append((chosen.cos() + rejected.cos()) / 2)
        else:
            losses.append(-F.logsigmoid(0.1 * (chosen - rejected)) - chosen / (labels[rank] != -100).sum())
    dweight, dhidden = torch.autograd.grad((losses[0] + losses[1]) / 2, (weight, hidden))
    for rank in range(2):
        loss, ours, states = found[rank][place, name]
        # A log-probability of 20 nats has a float32 rounding error of 1e-6 or so, and the cosine passes that on whole.
        assert loss == pytest.approx(losses[rank].item(), rel=2e-6, abs=5e-6 if name == "sequences" else 0)
        close(ours, dweight)
        close(states, 2 * dhidden[torch.tensor([rank, rank + 2])])
