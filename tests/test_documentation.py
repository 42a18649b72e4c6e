"""The README is one page, what it names exists, and the snippets of README and tour run as they stand."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_is_one_page():
    assert len(README.encode()) <= 8_192
    assert not [line for line in README.splitlines() if len(line) > 120]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not lost


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r"`(test_\w+)`", README))
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r"def (test_\w+)", source)}
    assert len(named) >= 9 and named <= defined


@pytest.mark.parametrize("name", ["README", "tour"])
def test_the_chinese_page_has_the_same_code_figures_and_tests(name):
    """What is prose in English is prose in Chinese; the rest is the same, so that no page falls behind."""
    english, chinese = {"README": README, "tour": TOUR}[name], (ROOT / "docs" / f"{name}.zh.md").read_text("utf-8")
    same = r"^```(?:python|bash)\n.*?^```|`test_\w+`|\| *[\d.,]+(?: %)?(?: ± [\d.,]+)? *(?=\|)|^ +[\w/]+\.(?:py|sh)\b"
    assert re.findall(same, chinese, re.DOTALL | re.MULTILINE) == re.findall(same, english, re.DOTALL | re.MULTILINE)


def test_every_file_of_the_library_has_a_line_in_the_tour():
    files = {file.name for file in (ROOT / "pedgpt").rglob("*.py") if not file.name.startswith("_")}
    assert not [name for name in sorted(files) if name not in TOUR]


@pytest.mark.parametrize("number", [0, 1])
def test_snippets_of_the_readme_run(number, tmp_path, monkeypatch):
    """The second asks for a model of transformers by name, and gets a small one of that family."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = Qwen3Config(vocab_size=10_000, num_key_value_heads=2, head_dim=8, **sizes)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda _: AutoModelForCausalLM.from_config(small))
    monkeypatch.chdir(tmp_path)
    exec(snippets(README)[number], {})
    assert (tmp_path / "runs" / "experts" / "adapter_model.safetensors").is_file() == (number == 1)


def test_the_tour_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(snippets(TOUR)[0], {})
    expected = re.search(r"^It prints.*?^```\n(.*?)^```", TOUR, re.DOTALL | re.MULTILINE)[1]
    assert capsys.readouterr().out.splitlines()[:-1] == expected.splitlines()[:-1]


def test_one_command_builds_the_reference_of_all_public_names(tmp_path, python):
    """The command of `make docs`, for the pages of two packages; that the others' names come on theirs, pdoc tells."""
    doc = pytest.importorskip("pdoc.doc")
    others = r"!pedgpt\.(.+\.|(?!adapters|losses))"  # of what is left only these two packages, without their modules
    command = [python, "-m", "pdoc", "pedgpt", "!pedgpt.__main__", others, "--output-directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    for folder in ("adapters", "corpus", "data", "losses", "models", "training"):
        package = importlib.import_module(f"pedgpt.{folder}")
        told = {member.name for member in doc.Module(package).flattened_own_members}
        assert package.__all__ and set(package.__all__) <= told
        if folder in ("adapters", "losses"):
            page = (tmp_path / "pedgpt" / f"{folder}.html").read_text(encoding="utf-8")
            assert not [name for name in package.__all__ if f'id="{name}"' not in page]
