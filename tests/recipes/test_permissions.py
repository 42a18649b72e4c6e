"""Whatever is written gets the permissions that the umask gives, so that colleagues and tools can read it."""

import contextlib
import os
import stat
from pathlib import Path

import pytest

from pedgpt.adapters import inject_experts, save_adapter
from pedgpt.endpoint import Endpoint, EndpointSettings
from pedgpt.models import load_model, save_model

SAMPLE = Path(__file__).resolve().parents[2] / "recipes" / "sample_corpus"


@contextlib.contextmanager
def masked(umask):
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def check(folder, umask, least):
    paths = list(folder.rglob("*"))
    for path in paths:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert len(paths) >= least


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_models_adapters_and_caches_have_the_umasks_permissions(lab, tmp_path, umask):
    model = load_model(lab.folder / "model")
    with masked(umask):
        save_model(model, tmp_path / "model")
        inject_experts(model, target_modules=["o_proj"], rank=2)
        save_adapter(model, tmp_path / "adapter")
        settings = EndpointSettings("http://127.0.0.1:1/v1", "m", key_variable="")
        with Endpoint(settings, tmp_path / "cache" / "answers.sqlite") as endpoint:
            assert endpoint.usage.requests == 0
            check(tmp_path, umask, 9)  # with the files that SQLite has while it is open
    check(tmp_path, umask, 7)


def test_runs_and_a_corpus_have_the_umasks_permissions(lab, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    lines = (SAMPLE / "knowledge_graph.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (source / "图\x1b[2J\r.tsv").write_text("".join(lines[:60]), encoding="utf-8")
    with masked(0o027):
        shorter = {"max_steps": 1, "checkpoint_every": 1}
        for recipe in ("continued_pretrain", "dfpo"):
            extra = {"adapter": "lora", "rank": 2} if recipe == "dfpo" else {}
            result = lab.run(recipe, tmp_path / recipe, **shorter, **extra)
            assert result.code == 0, result.err
            check(tmp_path / recipe, 0o027, 5)
        result = lab.call("build_corpus", ["--source", str(source), "--output", str(tmp_path / "corpus")])
        assert result.code == 0, result.err
        check(tmp_path / "corpus", 0o027, 10)
        # What is printed of it, the file's name above all, does nothing to a terminal.
        assert not set("\x1b\r") & set(result.out + result.err.replace("\r", "")) and "图\\x1b[2J\\x0d" in result.out
