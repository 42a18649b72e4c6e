"""Reference log-probabilities come back bit for bit, under their own key only, and no crash leaves half a file."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors import safe_open

from pedgpt.data import (
    Message,
    PreferencePair,
    ReadSummary,
    StoredPairs,
    TextSource,
    TokenStore,
    chat_format,
    encode_pairs,
    load_tokenizer,
)
from pedgpt.data import store as token_store
from pedgpt.data.preference import EncodedPair
from pedgpt.data.reference import load_reference, reference_key, save_reference

ROOT = Path(__file__).resolve().parents[2]
KEY = {"model": "0123", "tokenizer": "4567", "chat_format": "ChatML", "data": "89ab", "dtype": "float32"}
REMEDY = "; delete the file, or give another path via --reference_logps"
LOGPS = torch.tensor([[-1.5, -2.25], [-0.0, -1e-40], [-3.4e38, 0.1], [-7.0, 1 / 3]])
PAIRS = [
    PreferencePair((Message("user", "孩子发烧"),), "别急，多喝水。", "喝水", "p:1"),
    PreferencePair((Message("user", "咳嗽"),), "查", "别担心，先观察。", "p:2"),
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "reference.safetensors"


def refusal(path, key=KEY, num_pairs=4):
    with pytest.raises(ValueError) as caught:
        load_reference(path, key, num_pairs)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.endswith(REMEDY) and "\n" not in message
    return message.removeprefix(f"{path}: ").removesuffix(REMEDY)


def bits(tensor):
    return tensor.view(torch.int32).tolist()


@pytest.mark.parametrize("num_pairs", [0, 1, 4])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, num_pairs):
    path = tmp_path / "new" / "folders" / "参考.safetensors"
    assert load_reference(path, KEY, num_pairs) is None
    save_reference(path, LOGPS[:num_pairs], KEY)
    found = load_reference(path, KEY, num_pairs)
    assert found.dtype == torch.float32 and found.shape == (num_pairs, 2) and bits(found) == bits(LOGPS[:num_pairs])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"")  # what was loaded does not hang on the file
    assert bits(found) == bits(LOGPS[:num_pairs])


def test_file_is_plain_safetensors_with_the_key_as_its_metadata(path):
    save_reference(str(path), LOGPS.T.contiguous().T, KEY)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    assert header["__metadata__"] == {"format": "pt", **KEY}
    assert header["logps"] == {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]}
    assert struct.unpack("<8f", content[8 + size :]) == tuple(LOGPS.flatten().tolist())
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask  # others may use it


def test_another_key_is_refused_with_every_entry_that_differs(path):
    save_reference(path, LOGPS, KEY)
    begin = "holds another run's reference log-probabilities: "
    for name in KEY:
        expected = f"{begin}{name!r} is {KEY[name]!r}, expected 'other'"
        assert refusal(path, {**KEY, name: "other"}) == expected
    both = refusal(path, {**KEY, "model": "m", "dtype": "bfloat16"}, num_pairs=9)
    assert both == f"{begin}'dtype' is 'float32', expected 'bfloat16'; 'model' is '0123', expected 'm'"
    assert refusal(path, {**KEY, "shape": "2"}) == f"{begin}'shape' is None, expected '2'"
    less = {name: value for name, value in KEY.items() if name != "data"}
    assert refusal(path, less) == f"{begin}'data' is '89ab', expected None"
    assert refusal(path, num_pairs=9).startswith(begin)
    assert load_reference(path, less, 4, must_fit=False) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_not_saved(path, value):
    logps = LOGPS.clone()
    logps[1, 1] = logps[3, 0] = value
    with pytest.raises(ValueError, match="reference.safetensors: not written: .* is not finite"):
        save_reference(path, logps, KEY)
    assert not list(path.parent.iterdir())


def test_a_damaged_file_is_refused_wherever_it_ends(path):
    save_reference(path, LOGPS, KEY)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith("cannot be read (")
    for content in (b"no safetensors at all", b"\xff" * 64, struct.pack("<Q", 2**63) + b"{}", whole + b"\0"):
        path.write_bytes(content)
        assert refusal(path).startswith("cannot be read (")
    path.unlink()
    path.mkdir()
    assert refusal(path).startswith("cannot be read (")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (str(Path.cwd() / "exploded"),))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_is_refused_and_never_loaded(path, monkeypatch, save):
    monkeypatch.chdir(path.parent)
    save({"logps": Bomb()}, path)
    assert refusal(path).startswith("cannot be read (")
    assert not (path.parent / "exploded").exists()


@pytest.mark.parametrize("crash", ["replace", "fsync"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over_another"])
def test_a_crash_leaves_the_file_as_it_was(path, monkeypatch, crash, before):
    if before:
        save_reference(path, LOGPS, KEY)

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, crash, die)
    with pytest.raises(KeyboardInterrupt):
        save_reference(path, LOGPS - 1, KEY)
    assert [file.name for file in path.parent.iterdir()] == [path.name] * before
    assert not before or bits(load_reference(path, KEY, 4)) == bits(LOGPS)


def test_file_is_on_disk_before_it_gets_its_name(path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace

    def record_sync(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):  # the folder is synced after the file has its name
            done.append(("fsync", os.fstat(handle).st_size == next(path.parent.iterdir()).stat().st_size > 32))
        fsync(handle)

    def record_rename(source, target):
        assert Path(source).parent == path.parent and Path(target) == path
        with safe_open(source, "pt") as handle:  # whole already
            done.append(("replace", bits(handle.get_tensor("logps")) == bits(LOGPS)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    save_reference(path, LOGPS, KEY)
    assert done == [("fsync", True), ("replace", True)]


def test_saving_replaces_a_link_and_leaves_its_target(path):
    target = path.with_name("elsewhere")
    target.write_text("mine", encoding="utf-8")
    path.symlink_to(target)
    save_reference(path, LOGPS, KEY)
    assert target.read_text(encoding="utf-8") == "mine" and not path.is_symlink()


@pytest.fixture
def folder(tmp_path, folders):
    """A Qwen-like tokenizer folder of our own, to change."""
    made = tmp_path / "tokenizer"
    made.mkdir()
    for file in folders["qwen"].iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    return made


def changed_json(file, change):
    state = json.loads(file.read_text(encoding="utf-8"))
    change(state)
    file.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")


def encoded(chat):
    return encode_pairs(PAIRS, chat, 999, "error", ReadSummary())


def key_of(folder, name="chatml", pairs=None, dtype="float32", model="m"):
    chat = chat_format(load_tokenizer(folder), name)
    pairs = encoded(chat) if pairs is None else pairs
    return reference_key(model=model, chat=chat, data=fingerprint(pairs, chat.tokenizer), dtype=dtype)


def fingerprint(pairs, tokenizer):
    """What the token store of these pairs calls them."""
    examples = [example for pair in pairs for example in (pair.chosen, pair.rejected)]

    def encode(source, summary):
        if examples:
            yield examples

    with tempfile.TemporaryDirectory() as folder:
        source = TextSource("files", "preferences", "preferences", ())
        for _ in token_store._write(Path(folder) / "store", [source], tokenizer, [], encode, labelled=True):
            pass
        return StoredPairs(TokenStore(Path(folder) / "store")).fingerprint


def differing(one, two):
    assert set(one) == set(two) == {"model", "tokenizer", "chat_format", "data", "dtype"}
    assert all(isinstance(value, str) and 0 < len(value) < 80 for value in [*one.values(), *two.values()])
    return {name for name in one if one[name] != two[name]}


def test_each_part_of_the_key_changes_with_its_own_cause(folder, path):
    chat = chat_format(load_tokenizer(folder), "chatml")
    first, second = encoded(chat)
    key = key_of(folder, pairs=[first, second])
    assert key["chat_format"].startswith("ChatML ") and key["dtype"] == "float32" and key["model"] == "m"
    assert differing(key, key_of(folder)) == set()

    assert differing(key, key_of(folder, model="other")) == {"model"}
    assert differing(key, key_of(folder, dtype="bfloat16")) == {"dtype"}
    labels = [*second.rejected.labels]
    labels[-1] = 3
    relabelled = EncodedPair(second.chosen, replace(second.rejected, labels=labels))
    tokens = [*first.chosen.tokens]
    tokens[0] += 1
    retokened = EncodedPair(replace(first.chosen, tokens=tokens), first.rejected)
    others = [
        [first, relabelled], [retokened, second], [second, first], [first], [first, second, second], [],
        [first, EncodedPair(second.rejected, second.chosen)],
    ]  # fmt: skip
    keys = [key_of(folder, pairs=pairs) for pairs in others]
    assert all(differing(key, other) == {"data"} for other in keys)
    assert len({other["data"] for other in keys}) == len(others)
    moved = EncodedPair(replace(first.chosen, source="elsewhere:7"), first.rejected)
    assert differing(key, key_of(folder, pairs=[moved, second])) == set()

    save_reference(path, LOGPS[:2], key)
    assert load_reference(path, key_of(folder), 2) is not None
    assert "'data' is " in refusal(path, keys[2], 2)


@pytest.mark.parametrize("part", ["vocabulary", "merges", "added", "flag"])
def test_another_tokenizer_has_another_fingerprint(folder, part):
    before = load_tokenizer(folder).description()
    assert load_tokenizer(folder).description() == before

    def change(state):
        model = state["model"]
        if part == "vocabulary":  # two ids change places
            one, two = list(model["vocab"])[5:7]
            model["vocab"][one], model["vocab"][two] = model["vocab"][two], model["vocab"][one]
        elif part == "merges":
            model["merges"][0], model["merges"][1] = model["merges"][1], model["merges"][0]
        elif part == "added":
            new = max(token["id"] for token in state["added_tokens"]) + 1
            state["added_tokens"].append({**state["added_tokens"][-1], "id": new, "content": "<pause>"})
        else:
            state["added_tokens"][-1]["lstrip"] ^= True

    changed_json(folder / "tokenizer.json", change)
    tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).description() != before


def test_using_a_tokenizer_does_not_change_its_fingerprint(tokenizer):
    before = tokenizer.description()
    chat = chat_format(tokenizer)
    encoded(chat)
    tokenizer.decode(tokenizer.encode_batch(["孩子", "<s><|im_end|>"])[1])
    assert tokenizer.description() == before


def test_the_text_of_a_template_counts_not_its_file(folder):
    config = folder / "tokenizer_config.json"

    def template(text, name=None):
        file = folder / "chat_template.jinja"
        file.unlink(missing_ok=True)
        if name == "jinja":
            file.write_text(text, encoding="utf-8")
        changed_json(config, lambda state: state.update(chat_template="unused" if name == "jinja" else text))
        return chat_format(load_tokenizer(folder), "template").fingerprint

    here = template(TEMPLATE)
    assert here.startswith("ChatFormat ") and template(TEMPLATE, "jinja") == here == template(TEMPLATE)
    # The same tokens for these conversations, and perhaps not for others.
    others = [template(TEMPLATE + "{# #}"), template(TEMPLATE.replace(": ", " : "))]
    assert len({here, *others}) == 3
    changed_json(config, lambda state: state.update(chat_template=TEMPLATE, bos_token="<|endoftext|>"))
    assert chat_format(load_tokenizer(folder), "template").fingerprint != here
    assert chat_format(load_tokenizer(folder), "chatml").fingerprint.startswith("ChatML ")


def test_key_is_the_same_in_another_process(folder):
    changed_json(folder / "tokenizer_config.json", lambda state: state.update(chat_template=TEMPLATE))
    code = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('these_tests', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps([module.key_of(sys.argv[2], name) for name in ('chatml', 'template')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [key_of(folder, name) for name in ("chatml", "template")]
