"""Files of a tokenizer's folder: added tokens, saved copies, links; broken and hostile ones are named."""

import copy
import json
import random
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pedgpt.data import StreamDecoder, load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")


MARKED = ["baichuan", "qwen"]

CHILD = "孩子发烧38.5度，𠮷龘😀👩‍⚕️\n\nfever  3 days\t。"

JUNK = [
    None, True, 0, -1, 2**31, 2**32, 2**63, 10**30, 1.5, 1e308, "", "a", "<s>", "\ud800", "\0", "▁", "BPE", "x" * 5000,
    [], {}, [[]], {"": {}}, ["a"],
]  # fmt: skip


def test_saving_copies_the_files_it_came_with(tmp_path, folders):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    given_files = {
        "tokenizer.json": (folders["qwen_unmarked"] / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": b'{"eos_token":  "<|im_end|>", "chat_template": "{{ x }}"}',
        "tokenizer.model": b"\x00not read when there is a tokenizer.json",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": "模板".encode(),
        "generation_config.json": b'{"top_k": 5}',
    }
    for name, content in {**given_files, "model.safetensors": b"weights", "README.md": b"#"}.items():
        (source / name).write_bytes(content)
    ours = load_tokenizer(source)
    ours.save(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == given_files
    ours.save(source)  # onto itself: nothing changes
    assert (source / "tokenizer.json").read_bytes() == given_files["tokenizer.json"]
    assert load_tokenizer(target).encode(CHILD) == ours.encode(CHILD)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ({}, "tokenizer.json or tokenizer.model"),
        ({"tokenizer.json": b"{"}, "tokenizer.json"),
        ({"tokenizer.json": b'{"model": {"type": "NoSuchModel"}}'}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json"),
        ({"tokenizer.model": b""}, "tokenizer.model"),
        ({"tokenizer.model": b"\x0a\xff\xff\xff"}, "tokenizer.model"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"{"}, "tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"\xff"}, "tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"[]"}, "tokenizer_config.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"eos_token": "<x>"}'}, "tokenizer_config.json.*<x>"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"eos_token": 2}'}, "tokenizer_config.json.*eos_token"),
    ],
)
def test_missing_and_broken_files_are_named(tmp_path, folders, broken, named):
    for name, content in broken.items():
        whole = (folders["baichuan"] / name).read_bytes() if content is None else content
        (tmp_path / name).write_bytes(whole)
    with pytest.raises(ValueError, match=named) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def entry(name, **flags):
    plain = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": name, **plain, **flags}


@pytest.fixture
def folder(tmp_path, folders):
    shutil.copytree(folders["qwen"], tmp_path / "copy")
    return tmp_path / "copy"


def test_added_tokens_of_the_config_match_transformers(folder):
    size = load_tokenizer(folder).vocab_size
    added = [
        entry("<ctl>", special=True), entry("[词]"), entry("[L]", lstrip=True), entry("[R]", rstrip=True),
        entry("word", single_word=True), entry("[N]", normalized=True),
    ]  # fmt: skip
    config = {"eos_token": "<|im_end|>", "pad_token": "<ctl>"}
    config["added_tokens_decoder"] = {str(size + i): token for i, token in reversed(list(enumerate(added)))}
    write(folder, "tokenizer_config.json", config)
    ours, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert [ours.token_id(token["content"]) for token in added] == list(range(size, size + 6))
    assert (ours.pad_id, ours.eos_id, ours.vocab_size) == (size, reference.eos_token_id, len(reference))
    for text in ["烧 [L] 热", "烧 [R] 热", "word keyword word", "[N]烧[N] [N]", CHILD]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        ids = [*ids, size, *ids, size + 1]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert size not in ours.encode("<ctl>热")


def test_added_tokens_file_completes_a_sentencepiece_model(tmp_path, sp_folders):
    shutil.copytree(sp_folders["llama2"], tmp_path, dirs_exist_ok=True)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = oracle.get_piece_size()
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": None})
    write(tmp_path, "added_tokens.json", {"[TOOL]": size + 1, "<pad>": size, "[CTL]": size + 2})
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "</s>", "additional_special_tokens": ["[CTL]"]}
    write(tmp_path, "special_tokens_map.json", named)
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (1, None, size, size + 3)  # null is an answer
    assert ours.encode(CHILD + "<pad>[CTL]") == oracle.encode(CHILD + "<pad>[CTL]")
    assert ours.encode("a[TOOL]b") == [*oracle.encode("a"), size + 1, *oracle.encode("b")]
    assert ours.decode([1, *oracle.encode(CHILD), size, size + 2]) == CHILD
    config = {"added_tokens_decoder": {"0": entry("<unk>", special=True), str(size): entry("<pad>", special=True)}}
    write(tmp_path, "tokenizer_config.json", config)
    again = load_tokenizer(tmp_path)
    assert again.eos_id == 2 and again.decode([0, size, 1]) == "" and again.encode("<unk>") == oracle.encode("<unk>")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"HOLE": entry("<x>")}}, "'<x>' is declared with id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": entry("<x>")}}, "'<x>' is declared with id 5"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"NEXT": entry("<|im_end|>")}}, "'<.im_end.>'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"NEXT": entry("")}}, "'' is declared"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"NEXT": entry(5)}}, "entry '[0-9]+'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"NEXT": entry("<x>", special=1)}}, "entry '[0-9]+'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": entry("<x>")}}, "entry '-1'"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<x>"]}, "list"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ("added_tokens.json", {"<x>": "NEXT"}, "the id of '<x>'"),
        ("added_tokens.json", {"<x>": 10**12}, "'<x>' is declared with id 1000000000000"),
        ("added_tokens.json", {"\ud800": 7}, "surrogates"),
        ("added_tokens.json", ["<x>"], "expected a JSON object"),
        ("special_tokens_map.json", {"bos_token": "<x>"}, "bos_token is '<x>'"),
    ],
)
def test_contradictory_files_are_named(folder, file, content, message):
    size = load_tokenizer(folder).vocab_size
    text = json.dumps(content).replace("HOLE", str(size + 1)).replace("NEXT", str(size))
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert file in str(error.value) and str(folder) in str(error.value)


def test_ids_of_tokenizer_json_are_those_it_declares(folder):
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["added_tokens"][-1]["id"] += 7  # the library would load it and give another id
    write(folder, "tokenizer.json", state)
    with pytest.raises(ValueError, match=r"tokenizer\.json: token '<tool_call>' is declared"):
        load_tokenizer(folder)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
@pytest.mark.parametrize("processor", ["none", "bytes", "template", "sequence"])
def test_document_prefix_matches_transformers(folder, config, processor):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin, end = backend.token_to_id("<|im_start|>"), backend.token_to_id("<|im_end|>")
    special = [("<|im_start|>", begin), ("<|im_end|>", end)]
    template = processors.TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=special)
    bare = processors.ByteLevel(trim_offsets=False)
    made = {"bytes": bare, "template": template, "sequence": processors.Sequence([bare, template])}
    if processor in made:
        backend.post_processor = made[processor]
    backend.save(str(folder / "tokenizer.json"))
    write(folder, "tokenizer_config.json", {"bos_token": "<|im_start|>", **config})
    ours, reference = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = [i for i in reference(CHILD)["input_ids"] if i != end]
    assert ours.document_prefix + ours.encode(CHILD) == ids
    assert begin not in ours.encode(CHILD)


def test_document_prefix_of_a_sentencepiece_model(tmp_path, sp_folders):
    shutil.copytree(sp_folders["llama2"], tmp_path, dirs_exist_ok=True)
    for config, prefix in [
        ({"tokenizer_class": "LlamaTokenizer"}, [1]),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, []),
        ({"tokenizer_class": "BaichuanTokenizer"}, []),
        ({"tokenizer_class": "BaichuanTokenizer", "add_bos_token": True}, [1]),
        ({}, []),
    ]:
        write(tmp_path, "tokenizer_config.json", {"bos_token": "<s>", **config})
        assert load_tokenizer(tmp_path).document_prefix == prefix


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "merges.txt"])
def test_links_out_of_the_folder_are_refused(folder, tmp_path, name):
    (tmp_path / "secret").write_text('{"<x>": 1}')
    ours = load_tokenizer(folder)
    (folder / name).unlink(missing_ok=True)
    for target in (tmp_path / "secret", "../secret"):
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match="link out of its folder") as error:
            ours.save(tmp_path / "target")
        assert str(folder / name) in str(error.value)
        if name.endswith("json"):
            with pytest.raises(ValueError, match="link out of its folder"):
                load_tokenizer(folder)
        (folder / name).unlink()
    (folder / name).symlink_to(name)  # a loop is as good as nothing
    assert name == "tokenizer.json" or load_tokenizer(folder).vocab_size


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(folder.iterdir()):
        shutil.copyfile(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    ours = load_tokenizer(snapshot)
    ours.save(tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    assert load_tokenizer(tmp_path / "target").encode(CHILD) == ours.encode(CHILD)
    (snapshot / "added_tokens.json").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="added_tokens.json"):
        load_tokenizer(snapshot)


def mutate_json(rng, raw):
    """Wrong types, huge numbers, deep nesting, missing, repeated and swapped entries, anywhere in the tree."""
    state, deep = json.loads(raw), ""
    for _ in range(rng.choice([1, 1, 1, 3])):
        parent, key, value = None, None, state
        while isinstance(value, dict | list) and value and (parent is None or rng.random() < 0.8):
            keys = list(value) if isinstance(value, dict) else range(len(value))
            parent, key = value, rng.choice(keys)
            value = parent[key]
        if parent is None:
            return json.dumps(rng.choice(JUNK)).encode()
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, list):
                parent.append(copy.deepcopy(value))
            case 1:
                parent[rng.choice(["", "id", "content", "type", "\ud83d"])] = copy.deepcopy(value)
            case 2:
                parent[key], depth = "DEEP", rng.choice([60, 200, 100_000])
                deep = rng.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth])
            case 3:
                parent[key] = copy.deepcopy(parent[rng.choice(keys)])
            case _:
                parent[key] = copy.deepcopy(rng.choice(JUNK))
    text = json.dumps(state, ensure_ascii=rng.random() < 0.5).replace('"DEEP"', deep or '"DEEP"')
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(rng, raw):
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(min(len(data), rng.choice([300, len(data) + 1])) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = rng.randbytes(1)
            case 1:
                data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
            case 2:
                del data[at : at + rng.choice([1, 4, 50, len(data)])]
            case _:
                data[at:at] = data[at : at + rng.choice([1, 4, 50, 200])]
    return bytes(data)


@pytest.fixture(scope="module")
def hostile_sources(folders, sp_folders):
    """Files of whole folders: every kind of model, post-processor and companion."""
    added = {"1": entry("<s>", special=True), "SIZE": entry("<pad>", special=True)}
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    config |= {"pad_token": "<pad>", "add_bos_token": True, "added_tokens_decoder": added}
    sources = [{path.name: path.read_bytes() for path in folders[name].iterdir()} for name in MARKED]
    for folder in sp_folders.values():
        model = (folder / "tokenizer.model").read_bytes()
        size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
        files = {
            "tokenizer.model": model,
            "tokenizer_config.json": json.dumps(config).replace("SIZE", str(size)).encode(),
            "added_tokens.json": json.dumps({"<pad>": size, "[X]": size + 1}).encode(),
            "special_tokens_map.json": b'{"unk_token": "<unk>", "additional_special_tokens": ["[X]"]}',
        }
        sources += [files, {name: files[name] for name in files if name != "added_tokens.json"}]
    full = tokenizers.Tokenizer.from_file(str(folders["qwen"] / "tokenizer.json"))
    full.normalizer = tokenizers.normalizers.NFC()
    begin = [("<|im_start|>", full.token_to_id("<|im_start|>"))]
    template = processors.TemplateProcessing("<|im_start|> $A", "<|im_start|> $A $B", begin)
    full.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    full.enable_padding(length=64)
    full.enable_truncation(10)
    unigram, wordpiece = tokenizers.SentencePieceUnigramTokenizer(), tokenizers.BertWordPieceTokenizer()
    for made in (unigram, wordpiece):
        made.train_from_iterator([CHILD] * 3, vocab_size=100, show_progress=False)
    return [*sources, *({"tokenizer.json": made.to_str().encode()} for made in (full, unigram, wordpiece))]


def test_mutated_files_load_or_are_named(tmp_path, hostile_sources):
    outcomes = {"loaded": 0, "refused": 0}

    @given(st.integers(0, 2**32))
    @settings(max_examples=1000, deadline=None, database=None, derandomize=True)
    def check(seed):
        rng = random.Random(seed)
        files = dict(rng.choice(hostile_sources))
        name = rng.choice(list(files))
        mutate = mutate_json if name.endswith(".json") and rng.random() < 0.7 else mutate_bytes
        files[name] = mutate(rng, files[name])
        for path in tmp_path.iterdir():
            path.unlink()
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
        try:
            ours = load_tokenizer(tmp_path)
            ids = ours.encode(CHILD)
            stream = StreamDecoder(ours)
            assert "".join(map(stream.push, ids)) + stream.finish() == ours.decode(ids)
            outcomes["loaded"] += 1
        except ValueError as error:  # a file may also contradict the one that is sound
            assert any(str(tmp_path / file) in str(error) for file in [*files, "tokenizer_config.json"])
            outcomes["refused"] += 1

    check()
    assert min(outcomes.values()) > 100


def test_a_merge_prefix_that_aborts_the_library_is_refused(folder):
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    state["model"]["continuing_subword_prefix"] = "##"
    write(folder, "tokenizer.json", state)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*continuing_subword_prefix"):
        load_tokenizer(folder)
    twice = json.dumps(state).replace('"continuing_subword_prefix": "##"', '"continuing_subword_prefix": ""')
    (folder / "tokenizer.json").write_text(twice[:-1] + f', "model": {json.dumps(state["model"])}}}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json.*occurs twice"):
        load_tokenizer(folder)


def test_a_tokenizer_that_cannot_encode_names_its_file(folder):
    write(folder, "tokenizer_config.json", {})
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    write(folder, "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    ours = load_tokenizer(folder)
    for encode in (ours.encode, lambda text: ours.encode_batch([text])):
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            encode("b")


def test_steps_that_blow_up_a_text_are_refused(folder):
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}
    nested = {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace] * 4}] * 2}
    token = {"id": "x", "ids": [0] * 1000, "tokens": ["a"] * 1000}
    template = [{"SpecialToken": {"id": "x", "type_id": 0}}] * 1000
    processor = {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": {"x": token}}
    for key, value in (("normalizer", nested), ("decoder", {"type": "Sequence", "decoders": [replace] * 9})):
        write(folder, "tokenizer.json", {**state, key: value})
        with pytest.raises(ValueError, match=r"tokenizer\.json.*times as long"):
            load_tokenizer(folder)
    write(folder, "tokenizer.json", {**state, "post_processor": processor})
    with pytest.raises(ValueError, match=r"tokenizer\.json.*times as long"):
        load_tokenizer(folder)


def test_saving_replaces_a_link_and_does_not_write_through_it(tmp_path, folders):
    (tmp_path / "other.json").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").symlink_to(tmp_path / "other.json")
    source = next(folder for folder in folders.values() if (folder / "tokenizer.json").is_file())
    load_tokenizer(source).save(tmp_path / "out")
    assert (tmp_path / "other.json").read_text() == "kept"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
