"""The README's example and commands say what really happens."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

from labkit import papers

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def example() -> tuple[str, str]:
    """The import example and the output printed below it."""
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = [block for block in blocks if "NACLPress" in block]
    output = re.search(r"```text\n(.*?)```", TEXT, re.DOTALL)
    assert len(code) == 1
    assert output
    return code[0], output[1]


def test_the_import_example_prints_what_the_readme_says():
    code, expected = example()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_sweep_example_is_a_sweep_of_registered_parameters():
    (call,) = re.findall(r"lab\.sweep\((.*?)\)  #", TEXT)
    slug, grid = ast.literal_eval(f"({call.replace('range(0, 15, 3)', '[0]')})")
    paper = papers.load(slug)
    for name, values in grid.items():
        for value in values:
            paper.check({name: value})
    used = set(re.findall(r"claim\.([a-z-]+)", TEXT))
    assert used <= {claim.id for claim in paper.claims}


def test_the_whole_cache_is_as_large_as_the_readme_says():
    import torch

    from labkit.kv import cache_bytes
    from labkit.testbeds import models

    model = models.tiny("llama", width=64, layers=2, heads=4, kv_heads=2, vocab=200).eval()
    prompt = torch.randint(1, 200, (1, 1000), generator=torch.Generator().manual_seed(0))
    cache = model.generate(
        prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    assert f"{cache.get_seq_length()} entries and {cache_bytes(cache)} bytes" in TEXT


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_links_inside_the_repository_resolve(link):
    assert (README.parent / link).exists()
