"""How commands talk: errors as JSON, quiet, verbose, a log file, lines of progress, help in sections, completion."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer, models

import surgery
from surgery.cli.command import REST, SECTIONS, Command
from surgery.cli.main import main
from surgery.errors import UsageError
from surgery.formats.registry import FORMATS, named
from surgery.settings import about, flag
from surgery.upcycling.request import Upcycle
from surgery.writing import progress


def run(*words: object):
    return CliRunner().invoke(main, [str(w) for w in words])


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, click.Command]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            found += commands(command, (*path, name))
        else:
            found.append((" ".join((*path, name)), command))
    return found


ALL = commands(main)


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_every_command_can_be_quiet_and_keep_a_log(name: str, command: click.Command) -> None:
    assert isinstance(command, Command), name
    flags = {flag for p in command.params for flag in p.opts}
    assert {"--quiet", "--verbose", "--log-file"} <= flags
    assert name in ("ask",) or "--json" in flags


@pytest.mark.parametrize(
    ("words", "status", "kind", "what"),
    [
        (("inspect", "no/such/one", "--json"), 1, "FileError", "does not exist"),
        (("formats", "gguff", "--json"), 2, "UsageError", "there is no format"),
        (("convert", "a", "--json"), 2, "UsageError", "Missing argument"),
        (("convert", "a", "b", "--too", "x", "--json"), 2, "UsageError", "--too"),
        (("verify", "a", "b", "--json"), 1, "FileError", "does not exist"),
    ],
)
def test_errors_are_objects(words, status: int, kind: str, what: str) -> None:
    done = run(*words)
    error = json.loads(done.stdout)["error"]
    assert done.exit_code == status and error["kind"] == kind and what in error["what"]
    assert done.stderr.startswith("error: ") and "Traceback" not in done.output


def test_mistakes_in_flags_read_like_all_others() -> None:
    done = run("convert", "a", "b", "--too", "x")
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and "surgery convert --help" in done.stderr


def test_quiet_prints_errors_only(tiny_hf, tmp_path) -> None:
    assert run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta", "--quiet").output == ""
    assert run("inspect", tmp_path / "a", "-q").output == ""
    done = run("verify", tiny_hf("llama"), tiny_hf("llama3"), "-q")
    assert done.exit_code == 1 and done.output == ""
    assert "does not exist" in run("inspect", tmp_path / "b", "-q").stderr
    assert "llama" in run("inspect", tmp_path / "a").output  # and it was for once


def test_verbose_says_what_is_done_and_where_an_error_comes_from(tiny_hf, tmp_path) -> None:
    text = run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta", "-v").stderr
    assert re.search(r"opened .*: hf llama, \d+ parts", text) and "published" in text
    assert "Traceback" in run("inspect", tmp_path / "none", "-v").stderr


def test_a_log_file_holds_all_of_it(tiny_hf, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    log = tmp_path / "log"
    run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta", "--log-file", log)
    run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta", "--log-file", log)
    text = log.read_text()
    assert re.search(r"^20\d\d-.* INFO convert, 100\.0%", text, re.M) and "ERROR" in text and "exists already" in text
    assert not logging.getLogger("surgery").handlers
    assert "cannot be written" in run("formats", "--log-file", tmp_path / "no/log").output


def test_progress_in_lines_where_there_is_no_terminal(tiny_hf, tmp_path, monkeypatch) -> None:
    run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    for words in (
        ("convert", tiny_hf("llama"), tmp_path / "b", "--to", "meta"),
        ("verify", tiny_hf("llama"), tmp_path / "a"),
        ("upcycle", tiny_hf("llama"), tmp_path / "c", "--experts", 4, "--top-k", 2, "--verify-tokens", 8),
    ):
        done = run(*words)
        assert done.exit_code == 0 and re.search(r"\d%, [\d.]+ [kMG]?B/s", done.stderr), done.output
        assert "%, " not in run(*words, "--force", "-q").stderr


def test_help_in_sections() -> None:
    text = run("upcycle", "--help").output
    titles = re.findall(r"^(\S.*):$", text, re.M)
    assert titles[-1] == REST and {"Mixture", "Output", "Proof"} <= set(titles)
    part = text.split("\nMixture:")[1].split("\nNeurons")[0]
    assert "--experts" in part and "--to " not in part and "Options:" not in text
    assert "Options:" in run("formats", "--help").output


def test_sections_name_flags_that_there_are() -> None:
    flags = {name: {o.lstrip("-") for p in command.params for o in p.opts} for name, command in ALL}
    assert set(" ".join(SECTIONS.values()).split()) <= set().union(*flags.values())
    for name, command in ALL:
        if command.sections is not SECTIONS:
            assert set(" ".join(command.sections.values()).split()) <= flags[name], name
    router = {name for name, command in ALL if "Neurons and router:" in run(*name.split(), "--help").output}
    assert router == {"upcycle", "experts"}


def test_a_shell_completes_formats() -> None:
    env = os.environ | {"_SURGERY_COMPLETE": "bash_complete", "COMP_WORDS": "surgery convert a b --to meg",
                        "COMP_CWORD": "5"}  # fmt: skip
    code = "from surgery.cli.main import main; main(prog_name='surgery')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert [line.split(",")[1] for line in done.stdout.split()] == [f for f in FORMATS if f.startswith("meg")]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("huggingface", "hf"),
        ("HF", "hf"),
        ("Megatron-LM", "megatron"),
        ("gpt-neox", "neox"),
        ("olmo_core", "olmo-core"),
    ],
)
def test_other_names_of_formats(name: str, format: str) -> None:
    assert named(name).name == format


def test_other_names_of_dtypes_and_the_nearest_of_what_there_is(tiny_hf, tmp_path) -> None:
    done = run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "huggingface", "--dtype", "bfloat16")
    assert done.exit_code == 0 and json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "did you mean megatron?" in run("convert", "a", "b", "--to", "megatrn").output
    assert "formats: hf, meta" in run("convert", "a", "b").output
    done = run("convert", tiny_hf("llama"), tmp_path / "b", "--to", "meta", "-O", "embeding=vocab")
    assert "did you mean embedding?" in done.output


def test_sizes_that_would_do(tiny_hf, tmp_path) -> None:
    text = run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta", "--tp", 3).output
    assert text.count("\n") <= 3 and "w{k,o,q,v}" in text and "--tp 1, 2 or 4" in text
    assert "--pp 1, 2, 3, 6" in run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "megatron", "--pp", 4).output
    text = run("convert", tiny_hf("qwen3_moe"), tmp_path / "a", "--to", "megatron", "--ep", 3).output
    assert "--ep 1, 2, 4 or 8" in text


def test_line_and_column_in_yaml_and_json(tmp_path) -> None:
    (tmp_path / "m.yaml").write_text("merge_method: linear\nmodels:\n  - {model: a\n")
    assert re.search(r"line \d, column \d", run("soup", tmp_path / "m.yaml", tmp_path / "x").output)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"x")
    (tmp_path / "model/config.json").write_text('{\n "a": 1,\n "b" 2}')
    assert "line 3, column 6" in run("convert", tmp_path / "model", tmp_path / "x", "--to", "meta").output


def test_every_setting_of_an_upcycling_is_a_flag() -> None:
    from dataclasses import fields

    text = run("upcycle", "--help").output
    assert all(flag(f) in text for f in fields(Upcycle) if about(f))


def test_a_tokenizer_for_every_command_that_asks_for_one(tiny_hf, tmp_path) -> None:
    """The note of an output without one names a flag; the command has it."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(264)}, unk_token="w0"))
    (tmp_path / "words").mkdir()
    tokenizer.save(str(tmp_path / "words/tokenizer.json"))
    recipe = tmp_path / "m.yaml"
    recipe.write_text(f"merge_method: linear\nmodels:\n  - {{model: {tiny_hf('llama')}, parameters: {{weight: 1}}}}\n")
    sizes = ("--experts", 4, "--top-k", 2, "--verify-tokens", 0)
    for i, words in enumerate((("convert", tiny_hf("llama")), ("soup", recipe), ("upcycle", tiny_hf("llama"), *sizes))):
        assert (
            "(--tokenizer PATH adds one)"
            in run(words[0], *words[1:2], tmp_path / f"{i}a", *words[2:], "--to", "hf").output
        )
        done = run(*words[:2], tmp_path / f"{i}b", *words[2:], "--to", "hf", "--tokenizer", tmp_path / "words")
        assert done.exit_code == 0, done.output
        assert (tmp_path / f"{i}b/tokenizer.json").is_file()


def test_what_was_written_is_called_kept_only_if_it_was(tiny_hf, tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    text = run("convert", tiny_hf("llama"), tmp_path / "file/out", "--to", "meta").output
    assert "error:" in text and "is kept" not in text


@pytest.mark.parametrize(("size", "words"), [("1KB", "at least 65.5 kB"), ("1", "at least 65.5 kB")])
def test_too_little_memory_is_refused_with_the_least(size: str, words: str, tiny_hf, tmp_path) -> None:
    same = ("verify", tiny_hf("llama"), tiny_hf("llama"))
    for command in (("convert", tiny_hf("llama"), tmp_path / "a", "--to", "meta"), same):
        done = run(*command, "--max-memory", size)
        assert done.exit_code == 2 and words in done.output
    with pytest.raises(UsageError, match="at least"):
        surgery.convert(tiny_hf("llama"), tmp_path / "a", to="meta", max_memory=1024)


def test_a_shard_of_a_few_bytes_is_refused(tiny_hf, tmp_path) -> None:
    assert "at least 1.0 kB" in run("convert", tiny_hf("llama"), tmp_path / "a", "--to", "hf", "--shard-size", 5).output
