"""The package as a Python program meets it: names, keywords, short reprs, an edit, and mistakes in words."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery
from surgery.errors import SurgeryError, UsageError

ROOT = Path(__file__).parent.parent


def test_names() -> None:
    assert set(surgery.__all__) <= set(dir(surgery)) and not {"Any", "TYPE_CHECKING"} & set(dir(surgery))
    assert all(callable(getattr(surgery, name)) for name in surgery.__all__)
    assert surgery.SurgeryError is SurgeryError
    assert surgery.__version__[0].isdigit() or surgery.__version__ == "unknown"


@pytest.mark.slow
def test_flags_are_keywords(tiny_hf, tmp_path: Path) -> None:
    report = surgery.convert(tiny_hf("llama"), tmp_path / "a", to="meta", tp=2, max_memory="1GB")
    assert report.topology == {"tp": 2} and report.max_memory == 10**9
    assert surgery.verify(tiny_hf("llama"), tmp_path / "a", max_memory="1GB").same
    same = surgery.convert(tiny_hf("llama"), tmp_path / "b", to="meta", topology=surgery.Topology(tp=2))
    assert same.content_digest == report.content_digest
    made = surgery.upcycle(tiny_hf("llama"), tmp_path / "c", experts=4, top_k=2, strategy="copy", shared=0.5)
    assert made.made.to_json()["shared_width"] == 72 and made.made.to_json()["expert_width"] == 72


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, d: surgery.convert(m, d, to="meta", tp=2, topology=surgery.Topology(tp=2)), "said twice"),
        (lambda m, d: surgery.convert(m, d, to="meta", tp=0), "--tp 0"),
        (lambda m, d: surgery.convert(m, d, to="meta", tp="two"), "--tp"),
        (lambda m, d: surgery.convert(m, d, to="meta", topology={"tp": 2}), "surgery.Topology"),
        (lambda m, d: surgery.convert(m, d, to="meta", max_memory="lots"), "is no size"),
        (lambda m, d: surgery.convert(m, d, to="meta", max_memory=1.5), "max_memory"),
        (lambda m, d: surgery.verify(m, m, max_memory="lots"), "is no size"),
        (lambda m, d: surgery.upcycle(m, d, experts=4, top_k=2, shared=2), "2-experts"),
        (lambda m, d: surgery.upcycle(m, d, experts=4, top_k=2, shared="residual"), "1-experts"),
        (lambda m, d: surgery.save_checkpoint(m, d), "open_checkpoint"),
        (lambda m, d: surgery.save_checkpoint(surgery.open_checkpoint(m), d, to="nothing"), "there is no format"),
        (lambda m, d: surgery.save_checkpoint(surgery.open_checkpoint(m), m), "exists already"),
        (lambda m, d: surgery.save_checkpoint(surgery.open_checkpoint(m), d, parts={"embd": torch.ones(1)}),
         "did you mean embed?"),
        (lambda m, d: surgery.save_checkpoint(surgery.open_checkpoint(m), d, parts={"embed": torch.ones(2, 3)}),
         "must be 264 x 120"),
        (lambda m, d: surgery.save_checkpoint(surgery.open_checkpoint(m), d, parts={"embed": []}), "must be a tensor"),
    ],
)  # fmt: skip
def test_mistakes_are_errors_of_surgery(call, words: str, tiny_hf, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=words.replace(".", r"\.").replace("?", r"\?")):
        call(tiny_hf("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_values_are_value_errors_too(tiny_hf, tmp_path: Path) -> None:
    """As mergekit and pydantic raise them: callers of theirs need not change."""
    model = str(tiny_hf("llama"))
    recipe = {"merge_method": "task_arithmetic", "base_model": model, "models": [{"model": model + "/"}]}
    with pytest.raises(ValueError, match="named twice"):
        surgery.soup({**recipe, "models": recipe["models"] * 2}, tmp_path / "out")
    with pytest.raises(ValueError, match="is no size"):
        surgery.convert(model, tmp_path / "out", to="meta", max_memory="lots")


def test_an_edit_in_five_lines(tiny_hf, tmp_path: Path) -> None:
    model = surgery.open_checkpoint(tiny_hf("llama"))
    embed = model.parts["embed"][:]
    embed[7] = embed[8] + 1
    report = surgery.save_checkpoint(model, tmp_path / "edited", parts={"embed": embed})
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_hf("llama"), tmp_path / "edited"))
    assert report.verified and report.output_format == "hf" and old.keys() == new.keys()
    assert torch.equal(new["model.embed_tokens.weight"], embed)
    assert all(torch.equal(old[name], new[name]) for name in old if name != "model.embed_tokens.weight")


def test_a_part_of_another_checkpoint_in_another_format(tiny_hf, tmp_path: Path) -> None:
    surgery.convert(tiny_hf("llama"), tmp_path / "neox", to="neox", tp=2)
    model, other = surgery.open_checkpoint(tiny_hf("llama3")), surgery.open_checkpoint(tmp_path / "neox")
    surgery.save_checkpoint(model, tmp_path / "out", parts={"embed": other.parts["embed"]}, to="meta", tp=2)
    written = surgery.open_checkpoint(tmp_path / "out").parts
    assert torch.equal(written["embed"].full(), other.parts["embed"].full())
    assert torch.equal(written["lm_head"].full(), model.parts["lm_head"].full())


def test_parts_are_not_changed_in_silence(tiny_hf) -> None:
    model = surgery.open_checkpoint(tiny_hf("llama"))
    with pytest.raises(TypeError):
        model.parts["embed"] = torch.ones(3)  # type: ignore[index]
    with pytest.raises(KeyError, match="did you mean embed"):
        model.parts["embd"]


def test_reprs_are_short_and_tables_in_notebooks(tiny_hf, tmp_path: Path) -> None:
    model = surgery.open_checkpoint(tiny_hf("mixtral"))
    tensors = surgery.open_tensors(tiny_hf("mixtral"))
    for value in (model, model.parts, tensors):
        assert len(repr(value)) < 400, repr(value)
    assert "mixtral" in repr(model) and "hf" in repr(model)
    html = model._repr_html_()
    assert html.count("<tr>") >= min(400, len(model.parts)) and "embed" in html
    shutil.copytree(tiny_hf("llama"), tmp_path / "<script>")
    assert "<script>" not in surgery.open_checkpoint(tmp_path / "<script>")._repr_html_()


@pytest.mark.slow
def test_a_clone_that_is_called_surgery_is_not_the_package(tmp_path: Path) -> None:
    """An editable install is a path, which stands behind no namespace: not a finder, which does."""
    shutil.copytree(ROOT / "surgery", tmp_path / "clone/surgery/surgery")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone/surgery" / name)
    build = "from setuptools.build_meta import build_editable; print(build_editable('..'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "clone/surgery", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next((tmp_path / "clone").glob("*.whl"))).namelist()
    paths = [name for name in names if name.endswith(".pth")]
    assert paths and not any("finder" in name for name in names)
    site = tmp_path / "site"
    with zipfile.ZipFile(next((tmp_path / "clone").glob("*.whl"))) as wheel:
        wheel.extract(paths[0], site)
    code = f"import site, sys; site.addsitedir({str(site)!r}); import surgery; print(surgery.convert.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "clone", capture_output=True, text=True,
                          env={"PYTHONPATH": "", "PATH": ""})  # fmt: skip
    assert done.stdout == "convert\n", done.stderr


def test_usage_errors_have_a_type_of_their_own(tiny_hf, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        surgery.convert(tiny_hf("llama"), tmp_path / "x", to="hf", tp=2)
