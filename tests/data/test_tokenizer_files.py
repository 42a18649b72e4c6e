"""Files of a tokenizer's folder: added tokens, saved copies, links; broken ones are named."""

import json
import shutil

import pytest
import tokenizers
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from pedgpt.data import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")


MARKED = ["baichuan", "qwen"]

CHILD = "孩子发烧38.5度，𠮷龘😀👩‍⚕️\n\nfever  3 days\t。"

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
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"eos_token": "<x>"}'}, "no token '<x>'"),
        ({"tokenizer.json": None, "special_tokens_map.json": b'{"bos_token": "<x>"}'}, "no token '<x>'"),
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


def test_added_tokens_match_transformers_which_saved_them(folder, tmp_path):
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>")
    size = len(reference)
    flags = {"[词]": {}, "[L]": {"lstrip": True}, "[R]": {"rstrip": True}, "word": {"single_word": True}}
    reference.add_special_tokens({"pad_token": "<ctl>"})
    reference.add_tokens([AddedToken(name, normalized=name == "[词]", **flag) for name, flag in flags.items()])
    reference.save_pretrained(tmp_path / "saved")
    ours = load_tokenizer(tmp_path / "saved")
    assert [ours.token_id(name) for name in ("<ctl>", *flags)] == list(range(size, size + 5))
    assert (ours.pad_id, ours.eos_id, ours.vocab_size) == (size, reference.eos_token_id, len(reference))
    for text in ["烧 [L] 热", "烧 [R] 热", "word keyword word", "[词]烧[词] [词]", CHILD]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        ids = [*ids, size, *ids, size + 1]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert size not in ours.encode("<ctl>热")


def test_a_token_that_the_config_alone_calls_special_is_never_text(folder):
    state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = load_tokenizer(folder).vocab_size
    state["added_tokens"].append({"id": size, **entry("[CTL]")})
    write(folder, "tokenizer.json", state)
    assert size in load_tokenizer(folder).encode("[CTL]")
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {str(size): entry("[CTL]", special=True)}})
    assert size not in load_tokenizer(folder).encode("[CTL]")


def test_special_tokens_map_names_what_the_config_does_not(tmp_path, sp_folders):
    shutil.copytree(sp_folders["llama2"], tmp_path, dirs_exist_ok=True)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": None})
    write(tmp_path, "special_tokens_map.json", {"pad_token": "<unk>", "eos_token": "</s>", "bos_token": "</s>"})
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, None, 0)  # null is an answer
    config = {"added_tokens_decoder": {"0": entry("<unk>", special=True), "2": entry("</s>", special=True)}}
    write(tmp_path, "tokenizer_config.json", config)
    again = load_tokenizer(tmp_path)
    assert again.eos_id == 2 and again.decode([0, 1]) == "" and again.encode("<unk>") == oracle.encode("<unk>")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": entry("<x>")}}, "declares '<x>' with id 5, which"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"NEXT": entry("<s>")}}, "declares '<s>'"),
        ("added_tokens.json", {"<x>": 10**12}, "'<x>' with id 1000000000000, which is not in tokenizer.model"),
        ("added_tokens.json", ["<x>"], "expected a JSON object"),
    ],
)
def test_a_tokenizer_model_without_its_added_tokens_is_refused(tmp_path, sp_folders, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(sp_folders["llama2"], folder)
    size = load_tokenizer(folder).vocab_size
    (folder / file).write_text(json.dumps(content).replace("NEXT", str(size)), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert file in str(error.value) and str(folder) in str(error.value)


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


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"])
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
    (snapshot / "special_tokens_map.json").symlink_to("../../../secret")
    with pytest.raises(ValueError, match="special_tokens_map.json"):
        load_tokenizer(snapshot)


def test_saving_replaces_a_link_and_does_not_write_through_it(tmp_path, folders):
    (tmp_path / "other.json").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").symlink_to(tmp_path / "other.json")
    source = next(folder for folder in folders.values() if (folder / "tokenizer.json").is_file())
    load_tokenizer(source).save(tmp_path / "out")
    assert (tmp_path / "other.json").read_text() == "kept"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
