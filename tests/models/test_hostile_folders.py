"""Folders that lie: fifteen hundred mutated files, each refused with a ValueError that names it, or loaded exactly."""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file, save_file

from pedgpt.models import generation_defaults, load_model, save_model
from pedgpt.models.weight_files import Weights

SMALL = {
    "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "vocab_size": 13, "num_hidden_layers": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
TOKENS = torch.tensor([[1, 2, 3, 0]])
ALLOWANCE = 2**27  # bytes; the folders hold a few thousand, and what the lies ask for is far more

# What JSON can hold where something else is expected.
JUNK = [
    None, True, False, 0, 1, 2, 3, 4, 8, 13, 16, -1, 2**24, 2**24 + 1, 2**31, 2**53, 2**63, 2**64, 10**29, 10**30,
    -(10**30), 10**400, 0.0, -0.5, 1.5, 5e-324, 1e-300, 1e29, 1e308, float("nan"), float("inf"), -float("inf"), "", "x",
    "1", "llama", "qwen2", "qwen3", "baichuan", "rope", "alibi", "silu", "x" * 10_000, "\ud800", "\0", [], {}, [1],
    [[]], {"a": 1}, ["full_attention"], ["sliding_attention"], {"rope_type": "linear", "factor": 2},
    {"type": "dynamic", "factor": 2}, {"rope_type": []}, {"rope_type": {"a": 1}}, {"rope_theta": 10**29},
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and pickletools', of what they are about to refuse


class Chance(random.Random):
    """Whoever chooses from a list is dealt each of its values once before one comes again: few draws show them all."""

    def __init__(self):
        super().__init__(0)
        self.decks = {}

    def choice(self, values):
        deck = self.decks.setdefault((sys._getframe(1).f_lineno, len(values)), [])
        deck += [] if deck else self.sample(range(len(values)), len(values))
        return values[deck.pop()]


@pytest.fixture(autouse=True)
def little_memory():
    """Whoever asks for more than a file could need gets MemoryError, which `refused` then finds in the message."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + ALLOWANCE, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory):
    """A saved model of each kind, by its name."""
    root = tmp_path_factory.mktemp("folders")
    changes = {"llama": {"rope_scaling": LLAMA3, "num_key_value_heads": 2}, "qwen2": {"num_key_value_heads": 2}}
    for kind in ("llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"):
        save_model(make_model(kind, **SMALL, **changes.get(kind, {})), root / kind)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def folder(folders, tmp_path):
    """A llama, alone in its folder."""
    for file in folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@contextlib.contextmanager
def refused(*names):
    """Swallow a ValueError that holds one of the names; any other error fails the test."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        assert any(str(name) in message for name in names), message
        assert not re.search(r"allocat|MemoryError|\(\)$", message), message


def load(folder, *names, **settings):
    """The model, or None if it was refused for a file of these names or for the folder."""
    with refused(folder, *names):
        return load_model(folder, **settings)


def assert_same(model, weights):
    """Bit for bit, so that NaN counts too."""
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in state.items():
        assert value.shape == weights[key].shape and value.dtype == weights[key].dtype
        assert torch.equal(value.contiguous().view(torch.uint8), weights[key].contiguous().view(torch.uint8)), key


def flipped(chance, content, start=0, stop=None):
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        content[chance.randrange(start, stop or len(content))] = chance.randrange(256)
    return bytes(content)


def nested(levels, value=None):
    for _ in range(levels):
        value = [value]
    return value


DTYPES = [
    "F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "f32", "",
    None, 3, ["F32"],
]  # fmt: skip
SHAPES = [
    [], [0], [-1], [2**63], [2**32, 2**32], [2**64], [0, 2**62], [1.5], [[2]], "x", None, {}, [16, 1], [1] * 3,
    [1] * 100, [8, 16], [16, 8], [16, 16], [4, 64],
]  # fmt: skip


def mutated_safetensors(chance, content):
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(chance.choice((0, 1, 1, 2))):
        key = chance.choice(keys)
        entry, kind = header.get(key), chance.choice(range(8))
        if not isinstance(entry, dict) or not entry:  # changed already
            continue
        if kind == 0:
            entry["dtype"] = chance.choice(DTYPES)
        elif kind == 1:
            entry["shape"] = chance.choice(SHAPES)
        elif kind == 2:
            ends = [0, 64, len(body), len(body) + 1, chance.randrange(len(body)), -1, 2**63, 2**64 - 1, 2**70, 1.5, "1"]
            entry["data_offsets"] = [chance.choice(ends) for _ in range(chance.choice((0, 1, 2, 2, 2, 2, 3)))]
        elif kind == 3:
            del entry[chance.choice(list(entry))]
        elif kind == 4:
            header[chance.choice(keys)] = chance.choice([None, 1, [], {}, "x", copy.deepcopy(entry)])
        elif kind == 5:
            header["__metadata__"] = chance.choice([None, 1, [], {"a": 1}, {"a": "b"}, {"format": None}, {"a": {}}])
        elif kind == 6:
            names = ["", "x", "__metadata__", "a" * 10_000, "\0", "\ud800", "rotary_emb.inv_freq", key + " "]
            header[chance.choice([*names, *keys])] = header.pop(key)
        else:
            entry["more"] = nested(chance.choice((3, 120, 200)))
    text = json.dumps(header)
    if chance.randrange(10) == 0:  # a duplicate key, which json would merge
        twice = chance.choice(keys)
        text = text[:-1] + f', "{twice}": {json.dumps(header.get(chance.choice(keys)))}' + "}"
    raw = text.encode()
    if chance.randrange(3) == 0:
        raw = flipped(chance, raw)
    length = len(raw)
    if chance.randrange(8) == 0:
        lies = [0, 1, length - 1, length + 1, length + len(body), length + len(body) + 1]
        length = chance.choice([*lies, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1])
    content = struct.pack("<Q", length) + raw + body
    end = chance.randrange(12)
    return content[: chance.randrange(len(content))] if end == 0 else content + b"\0" * (end == 1)


def test_mutated_safetensors_are_refused_or_read_as_the_safetensors_library_reads_them(folder):
    file = folder / "model.safetensors"
    content, loaded, chance = file.read_bytes(), 0, Chance()
    shapes = {key: tensor.shape for key, tensor in load_file(file).items()}
    for _ in range(150):
        mutated = mutated_safetensors(chance, content)
        file.write_bytes(mutated)
        model = load(folder, file)
        if model is not None:
            loaded += 1
            theirs = {key: tensor for key, tensor in load_bytes(mutated).items() if "inv_freq" not in key}
            assert {key: tensor.shape for key, tensor in theirs.items()} == shapes
            assert_same(model, theirs)
    assert 4 < loaded < 101


def test_mutated_indexes_are_refused_or_load_the_same_weights(folder):
    """The folder is full of traps: pipes, links that leave or loop, folders, copies of a shard, other files."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    outside = folder.parent / f"{folder.name}-outside.safetensors"
    shards = {
        name: {key: value for i, (key, value) in enumerate(whole.items()) if i % 2 == part}
        for part, name in enumerate(("a.safetensors", "b.safetensors"))
    }
    for name, weights in shards.items():
        save_file(weights, folder / name)
    save_file(shards["a.safetensors"], folder / "copy.safetensors")
    save_file(whole, outside)
    (folder / "inner.safetensors").mkdir()
    save_file(whole, folder / "inner.safetensors" / "a.safetensors")
    (folder / "text.safetensors").write_text("text")
    (folder / "empty.safetensors").write_text("")
    torch.save(whole, folder / "whole.bin")
    os.mkfifo(folder / "pipe.safetensors")
    for name, target in {"out": outside, "loop": "loop.safetensors", "zero": "/dev/zero", "gone": "nowhere"}.items():
        (folder / f"{name}.safetensors").symlink_to(target)
    (folder / "alias.safetensors").symlink_to("a.safetensors")
    names = [
        *(file.name for file in sorted(folder.iterdir())), f"../{outside.name}", str(outside), "a.safetensors/", ".",
        "..", "inner.safetensors/a.safetensors", "inner.safetensors/../a.safetensors", "./a.safetensors", "/dev/zero",
        "a.safetensors\0", "\0", "", "\ud800.safetensors", "a" * 5000 + ".safetensors", "A.safetensors", "C:\\a", 7,
        None, [], {}, ["a.safetensors"], True,
    ]  # fmt: skip
    index = folder / "model.safetensors.index.json"
    weight_map = {key: name for name, weights in shards.items() for key in weights}
    loaded, chance = 0, Chance()
    for _ in range(150):
        changed = dict(weight_map)
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            key, kind = chance.choice(list(weight_map)), chance.choice(range(6))
            if kind == 0:
                changed.pop(key, None)
            elif kind == 1:
                changed[chance.choice(["", "x", "\0", "\ud800", "__metadata__"])] = chance.choice(list(shards))
            elif kind == 2:
                name = chance.choice(names)
                changed = dict.fromkeys(changed, name)
            else:
                changed[key] = chance.choice(names)
        value = changed if chance.randrange(12) else chance.choice(JUNK)
        text = json.dumps({"metadata": chance.choice(JUNK), "weight_map": value} if chance.randrange(20) else value)
        if chance.randrange(20) == 0:
            text = text[:-1] + ', "weight_map": {"x": "a.safetensors"}}'
        if chance.randrange(20) == 0:
            levels = chance.choice((100, 900, 980, 1000, 100_000))
            text = text[:-1] + ', "more": ' + "[" * levels + "]" * levels + "}"
        raw = text.encode()
        index.write_bytes(flipped(chance, raw) if chance.randrange(8) == 0 else raw)
        model = load(folder, index)
        if model is not None:
            loaded += 1
            assert_same(model, whole)
    assert 7 < loaded < 105


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "baichuan-rope", "baichuan-alibi"])
def test_mutated_configs_are_refused_or_compute_logits(folders, tmp_path, kind):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    file = folder / "config.json"
    raw, loaded, chance = json.loads(file.read_bytes()), 0, Chance()
    more = [
        "rope_parameters", "rope_scaling", "rope_theta", "model_max_length", "head_dim", "use_sliding_window", "dtype",
        "layer_types", "quantization_config", "dual_chunk_attention_config", "pedgpt_positions", "pedgpt_norm_head",
        "attention_bias", "mlp_bias", "auto_map",
    ]  # fmt: skip
    keys = sorted({*raw, *more})

    for i in range(120):
        changed = dict(raw)
        for _ in range(chance.choice((1, 1, 2))):
            key, kind = chance.choice(keys), chance.choice(range(8))
            if kind == 0:
                changed.pop(key, None)
            elif kind in (1, 2):
                scaling = chance.choice([dict(LLAMA3), {"rope_type": "linear", "factor": 2.0}])
                scaling[chance.choice([*scaling, "rope_theta", "type"])] = chance.choice(JUNK)
                changed[chance.choice(("rope_scaling", "rope_parameters"))] = scaling
            else:
                changed[key] = chance.choice([*JUNK, 1024, 10**9])
        text = json.dumps(changed)
        if chance.randrange(20) == 0:
            levels = chance.choice((100, 900, 960, 980, 1000, 100_000))
            text = text[:-1] + f', "{chance.choice(keys)}": ' + "[" * levels + "]" * levels + "}"
        if chance.randrange(20) == 0:
            text = text[:-1] + f', "{chance.choice(keys)}": {chance.choice(["1e400", "-1e400", "1" * 5000, "0x1"])}}}'
        mutated = text.encode()
        file.write_bytes(flipped(chance, mutated) if chance.randrange(8) == 0 else mutated)
        if i % 5 == 0:
            load(folder, "config.json", device="meta")
        model = load(folder, "config.json")
        if model is not None:
            loaded += 1
            with torch.no_grad():
                assert model(TOKENS).shape == (1, 4, 13)
    assert 12 < loaded < 96


def test_mutated_bins_are_refused_or_give_every_weight_its_shape(folder):
    """Flips in the pickle, in the zip's structures and in the data, which may pass: nothing sums them up."""
    file = folder / "pytorch_model.bin"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, file)
    content = file.read_bytes()
    code = zipfile.ZipFile(file).read("pytorch_model/data.pkl")
    start = content.index(code)
    shapes, loaded, chance = {key: tensor.shape for key, tensor in weights.items()}, 0, Chance()
    spare = bytes(sorted(set(code) | set(b"()]}tu\x85\x86\x87\x81RbQqrhjKMJX.N")))
    for _ in range(150):
        kind = chance.choice(range(10))
        mutated = bytearray(content)
        if kind < 5:
            for _ in range(chance.choice((1, 1, 2, 6))):
                mutated[start + chance.randrange(len(code))] = chance.choice(spare)
        elif kind < 7:
            mutated = flipped(chance, content, start, start + len(code))
        elif kind < 9:
            mutated = flipped(chance, content, len(content) - 2000 if kind == 8 else 0)
        else:
            mutated = mutated[: chance.randrange(len(content))]
        file.write_bytes(mutated)
        model = load(folder, file)
        if model is not None:
            loaded += 1
            assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert 7 < loaded < 105


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_pickle(file, code):
    """A torch.save file whose data.pkl is `code`."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4, 4)}, buffer)
    source = zipfile.ZipFile(buffer)
    with zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            target.writestr(name, code if name.endswith("data.pkl") else source.read(name))


CALLS = {
    "system": (os.system, "touch {marker}"),
    "eval": (eval, "open({marker!r}, 'w')"),
    "exec": (exec, "open({marker!r}, 'w')"),
    "open": (open, "{marker}", "w"),
    "import": (__import__, "antigravity"),
    "bytearray": (bytearray, 10**12),
    "tensor": (torch.FloatTensor, 10**11),
    "storage": (torch.UntypedStorage, 10**12),
    "load": (torch.load, "{marker}"),
    "getattr": (getattr, "", "join"),
}


# Every two of name, place and container occur together.
@pytest.mark.parametrize(
    ("name", "where", "container"),
    [
        (name, where, ("zip", "zip-4", "plain", "plain-0")[(i + j) % 4])
        for i, name in enumerate(CALLS)
        for j, where in enumerate(("top", "value", "key", "nested", "argument"))
    ],
)
def test_no_call_in_a_pickle_is_made(folder, name, where, container):
    (folder / "model.safetensors").unlink()
    file, marker = folder / "pytorch_model.bin", folder / "was-run"
    function, *arguments = CALLS[name]
    arguments = [text.format(marker=str(marker)) if isinstance(text, str) else text for text in arguments]
    call = Call(function, *arguments)
    value = {
        "top": call, "value": {"a": call}, "key": {("a", call): 1}, "nested": {"a": [{"b": (1, call)}]},
        "argument": {"a": Call(torch._utils._rebuild_parameter, call, False, {})},
    }[where]  # fmt: skip
    if container.startswith("zip"):
        torch.save(value, file, pickle_protocol=4 if container == "zip-4" else 2)
    else:
        file.write_bytes(pickle.dumps(value, protocol=0 if container == "plain-0" else 4))
    with refused(file):
        load_model(folder)
        pytest.fail("loaded")
    assert not marker.exists()


def instruction(name):
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(elements=16, offset=0, size=(4, 4), stride=(4, 1), kind="FloatStorage"):
    """The instructions for a tensor in the storage of 16 elements that `with_pickle` keeps."""
    place = view(elements, offset, size, stride, kind) + b"\x89" + instruction("collections OrderedDict") + b")R"
    return instruction("torch._utils _rebuild_tensor_v2") + b"(" + place + b"tR"


def view(elements=16, offset=0, size=(4, 4), stride=(4, 1), kind="FloatStorage"):
    storage = text("storage") + instruction(f"torch {kind}") + text("0") + text("cpu") + number(elements)
    return b"(" + storage + b"tQ" + number(offset) + numbers(size) + numbers(stride)


def state_dict(value):
    return b"\x80\x02}" + text("lm_head.weight") + value + b"s."


PICKLES = {
    "stride of 0": state_dict(tensor(size=(4, 2**40), stride=(4, 0))),
    "size that overflows": state_dict(tensor(size=(2**40, 2**40), stride=(0, 0))),
    "negative stride": state_dict(tensor(stride=(-4, 1))),
    "negative size": state_dict(tensor(size=(-4, -4))),
    "offset beyond the storage": state_dict(tensor(offset=1)),
    "offset of no storage": state_dict(tensor(offset=2**60)),
    "negative offset": state_dict(tensor(offset=-1)),
    "storage that lies": state_dict(tensor(elements=10**12, size=(10**6, 10**6), stride=(10**6, 1))),
    "storage of less than nothing": state_dict(tensor(elements=-16)),
    "storage of nothing": state_dict(tensor(elements=0)),
    "storage that overflows": state_dict(tensor(elements=2**70, size=(10**6, 10**6), stride=(10**6, 1))),
    "no such storage": state_dict(tensor(kind="OtherStorage")),
    "integers": state_dict(tensor(kind="IntStorage")),
    "complex": state_dict(tensor(kind="ComplexFloatStorage")),
    "storage made by call": state_dict(instruction("torch.storage UntypedStorage") + number(10**12) + b"\x85R"),
    "storage made anew": state_dict(instruction("torch.storage UntypedStorage") + number(10**12) + b"\x85\x81"),
    "name of Python 2": state_dict(instruction("__builtin__ bytearray") + number(10**12) + b"\x85R"),
    "system": state_dict(instruction("posix system") + text("touch was-run") + b"\x85R"),
    "stack global": state_dict(b"\x8c\x05posix\x8c\x06system\x93" + text("touch was-run") + b"\x85R"),
    "inst": state_dict(b"(S'touch was-run'\niposix\nsystem\n"),
    "obj": state_dict(b"(" + instruction("posix system") + text("touch was-run") + b"o"),
    "attribute": state_dict(instruction("torch._utils _rebuild_tensor_v2.__globals__")),
    "state that grows": state_dict(tensor() + b"(" + view(size=(10**6, 10**6), stride=(10**6, 1)) + b"tb"),
    "state that repeats": state_dict(tensor() + b"(" + view(size=(10**6, 10**6), stride=(0, 0)) + b"tb"),
    "text beyond the end": b"\x80\x02}X\xff\xff\xff\xff.",
    "list": b"\x80\x02].",
    "numbers as keys": b"\x80\x02}K\x01" + tensor() + b"s.",
    "no pickle": b"",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_lie_are_refused(folder, name, monkeypatch):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    with_pickle(file, PICKLES[name])
    monkeypatch.chdir(folder)
    with refused(file):
        load_model(folder)
        pytest.fail("loaded")
    assert not (folder / "was-run").exists()


def test_the_pickles_that_lie_lie_in_one_thing_only(tmp_path):
    """The control: the same instructions with nothing changed are read."""
    with_pickle(tmp_path / "pytorch_model.bin", state_dict(tensor()))
    found = Weights(tmp_path).tensors
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {"lm_head.weight": ((4, 4), torch.float32)}


OTHERS = [
    None, 3, torch.eye(4).to_sparse(), torch.ones(4, dtype=torch.int32), torch.ones(4, dtype=torch.complex64),
    torch.ones(4, dtype=torch.bool), torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4, device="meta"),
    torch.ones(1).expand(100), [torch.ones(4)], {"b": {"c": torch.ones(4)}}, torch.nn.Linear(2, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("lm_head.weight", "all") for value in OTHERS),
        *((key, value) for key in (1, None, b"lm_head.weight", ("lm_head.weight",)) for value in OTHERS[1:4]),
    ],
)
def test_bins_of_other_than_dense_floating_point_tensors_are_refused(folder, key, value):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(value if key == "all" else {key: value}, file)
    with refused(file):
        load_model(folder)
        pytest.fail("loaded")


def test_a_bin_may_name_one_tensor_twice(folder):
    """As zero_to_fp32.py writes tied weights."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert_same(load_model(folder), weights)


def test_mutated_generation_configs_are_refused_or_give_arguments(tmp_path):
    file = tmp_path / "generation_config.json"
    keys = [
        "num_beams", "penalty_alpha", "typical_p", "min_p", "eos_token_id", "do_sample", "temperature", "top_k",
        "top_p", "repetition_penalty", "max_new_tokens", "bos_token_id",
    ]  # fmt: skip
    chance = Chance()
    for _ in range(500):
        changed = {"do_sample": True} if chance.randrange(4) else {}
        changed |= {chance.choice(keys): chance.choice(JUNK) for _ in range(chance.choice((1, 1, 2, 3)))}
        raw = json.dumps(changed if chance.randrange(20) else chance.choice(JUNK)).encode()
        file.write_bytes(flipped(chance, raw) if chance.randrange(8) == 0 else raw)
        with refused(file):
            found = generation_defaults(tmp_path)
            kinds = {
                "stop_tokens": tuple, "temperature": float, "top_k": (int, type(None)), "top_p": float,
                "repetition_penalty": float, "max_new_tokens": int,
            }  # fmt: skip
            assert all(isinstance(value, kinds[key]) for key, value in found.items())
            assert all(type(end) is int for end in found["stop_tokens"])
