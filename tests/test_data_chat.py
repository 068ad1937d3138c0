"""Conversations become tokens and a mask of those to be learnt, as trl makes them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from surgery.data.tokenizing.chat import ChatTemplate, Refused
from surgery.data.tokenizing.encoder import learnt_tokens
from surgery.data.tokenizing.prepare import Choices
from surgery.errors import ConfigError, UsageError
from tests.test_data_tokenize import ANY, GOLDEN, NAIVE, documents, ids, run

CHAT = json.loads((GOLDEN.parent / "chat" / "masks.json").read_text())
CONVERSATIONS = CHAT["conversations"]
MARKED = CHAT["chat_template"]
BARE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = """{% for m in messages %}<|pad|>{{ m['role'] }}
{{ m['content'] }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<|pad|>assistant
{% endif %}"""
ASK, ANSWER = {"role": "user", "content": "ka vu?"}, {"role": "assistant", "content": "mi zen."}


def template(source):
    return ChatTemplate(source, {"eos_token": "<|endoftext|>"}, ("<|endoftext|>", "<|pad|>"))


@pytest.fixture
def chats(tmp_path):
    """A template with marks, and choices that use it."""
    (tmp_path / "marked.jinja").write_text(MARKED)
    (tmp_path / "bare.jinja").write_text(BARE)
    return Choices(messages="messages", template=str(tmp_path / "marked.jinja"))


def masks(folder):
    """The masks of all documents, as lists."""
    [path] = Path(folder).glob("*.mask")
    mask, sizes = np.fromfile(path, "u1").tolist(), [len(d) for d in documents(folder)]
    cuts = np.cumsum([0, *sizes]).tolist()
    assert cuts[-1] == len(mask)
    return [mask[a:b] for a, b in pairwise(cuts)]


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marked", "bare"])
@pytest.mark.parametrize("workers", [1, 2])
def test_ids_and_masks_as_trl_makes_them(name, workers, tmp_path, chats):
    """With the marks that trl needs, and without: by what each answer adds, up to the token that ends it."""
    path = write(tmp_path / "a.jsonl", [{"messages": c["messages"]} for c in CONVERSATIONS])
    choices = replace(chats, template=str(tmp_path / f"{name}.jinja"))
    report = run(path, tmp_path / "out", choices, workers=workers)
    assert documents(tmp_path / "out") == [c["input_ids"] for c in CONVERSATIONS]
    assert masks(tmp_path / "out") == [c["assistant_mask"] for c in CONVERSATIONS]
    assert report.total.learnt == sum(sum(c["assistant_mask"]) for c in CONVERSATIONS)


def test_the_last_character_of_an_answer_is_learnt_to_its_end(tmp_path):
    """transformers takes one token of the last marked character, even of an emoji that has four."""
    source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    (tmp_path / "t.jinja").write_text(source + "{% else %}[{{ m.content }}]{% endif %}{% endfor %}")
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, {"role": "assistant", "content": "mi \U0001f600"}, ASK]}])
    run(path, tmp_path / "out", Choices(messages="messages", template=str(tmp_path / "t.jinja")))
    [tokens], [mask] = documents(tmp_path / "out"), masks(tmp_path / "out")
    learnt = [i for i, m in enumerate(mask) if m]
    assert learnt == list(range(learnt[0], learnt[-1] + 1))
    assert NAIVE.decode([tokens[i] for i in learnt], skip_special_tokens=False) == "mi \U0001f600"
    assert NAIVE.decode(tokens[: learnt[0]]) == NAIVE.decode(tokens[learnt[-1] + 1 :]) == "[ka vu?]"


def test_parquet_and_dolma_and_shards_and_shuffling(tmp_path, chats):
    rows = [c["messages"] for c in CONVERSATIONS]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "one", chats)
    assert documents(tmp_path / "one") == [c["input_ids"] for c in CONVERSATIONS]
    assert masks(tmp_path / "one") == [c["assistant_mask"] for c in CONVERSATIONS]
    run(tmp_path / "a.parquet", tmp_path / "many", replace(chats, format="dolma", max_size=120, seed=4))
    parts = sorted((tmp_path / "many").glob("*.npy"))
    assert len(parts) > 3
    pairs = {tuple(c["input_ids"]): c["assistant_mask"] for c in CONVERSATIONS}
    ids, learnt = (np.concatenate([np.fromfile(p.with_suffix(s), t) for p in parts]).tolist()
                   for s, t in ((".npy", "<u2"), (".mask", "u1")))  # fmt: skip
    found = documents(tmp_path / "many")
    assert sorted(map(tuple, found)) == sorted(pairs) and found != [list(p) for p in pairs]
    assert ids == [i for d in found for i in d]
    assert learnt == [m for d in found for m in pairs[tuple(d)]]


def test_spans_against_a_rendering_by_hand():
    text, spans = template(CHATML).conversation([ASK, ANSWER, ASK, ANSWER, ASK])
    turn = "<|pad|>user\nka vu?<|endoftext|>\n"
    reply = "<|pad|>assistant\nmi zen.<|endoftext|>\n"
    assert text == turn + reply + turn + reply + turn
    assert [text[a:b] for a, b in spans] == ["mi zen.<|endoftext|>"] * 2
    assert spans[0][0] == len(turn) + len("<|pad|>assistant\n")


def test_an_answer_that_ends_without_a_token_keeps_its_white_space():
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    plain = template(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    text, [(a, b)] = plain.conversation([ASK, ANSWER])
    assert text[a:b] == "mi zen.\n"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{% for %}", "is no template"),
        ("{{ messages[0].content }}", "cannot be told"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "cannot be told"),
        ("{% for m in messages %}{{ messages|length }}{% endfor %}{% if add_generation_prompt %}>{% endif %}", "anew"),
        ("{{ raise_exception('only tools') }}", "only tools"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_templates_that_cannot_tell_answers_apart(source, what):
    with pytest.raises(ConfigError, match=what):
        template(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(Refused):
        template(source + "{% generation %}{% endgeneration %}").conversation([ASK])


def test_what_transformers_offers_to_templates():
    source = """
{%- for m in messages %}
    {%- if loop.index0 == 1 %}{% continue %}{% endif %}
    {{- m | tojson }}{{ eos_token }}
{% endfor %}
{%- if strftime_now is defined %}today{% endif %}
{%- if tools %}{{ tools | tojson(indent=1) }}{% endif %}{{ mood }}
{%- generation %}x{% endgeneration %}"""
    text, spans = template(source).conversation([ASK, ANSWER], {"tools": [{"a": "ü"}], "mood": "gay"})
    assert text == '{"role": "user", "content": "ka vu?"}<|endoftext|>\n[\n {\n  "a": "ü"\n }\n]gayx'
    assert spans == [(len(text) - 1, len(text))]


def test_marks_lie_side_by_side():
    inner = "{% generation %}b{% endgeneration %}"
    with pytest.raises(Refused, match="inside each other"):
        template("{% generation %}a" + inner + "{% endgeneration %}").conversation([ASK])
    for content in ("\ufdd0", "\ufdd1", "\ufdd1 \ufdd0"):
        text, [(a, b)] = template(MARKED).conversation([ASK, {"role": "assistant", "content": content}])
        assert text[a:b] == content + "<|endoftext|>"


def test_a_token_that_shares_a_character_is_learnt():
    """Against a loop over characters, on texts whose tokens hold parts of characters and several of them."""
    bare = NAIVE.from_str(NAIVE.to_str())
    chance = random.Random(1)
    for _ in range(200):
        text = "".join(chance.choices("ab 🙂日é\n ren", k=30))
        spans = sorted(chance.sample(range(31), 4))
        spans = [(spans[0], spans[1]), (spans[2], spans[3])]
        encoding = bare.encode(text)
        inside = {i for a, b in spans for i in range(a, b)}
        expected = [int(bool(inside & set(range(s, e)))) for s, e in encoding.offsets]
        assert learnt_tokens(encoding.offsets, spans).tolist() == expected
    assert learnt_tokens([], [(0, 3)]).tolist() == []


def test_prompts_and_completions(tmp_path, chats):
    choices = Choices(prompt="p", completion="c", eos="0", template=chats.template)
    path = write(
        tmp_path / "a.jsonl",
        [
            {"p": "ka vu", "c": " mi zen"},
            {"p": [ASK], "c": [ANSWER]},
            {"p": "a", "c": ""},
            {"p": "a"},
            {"p": 1, "c": "b"},
        ],
    )
    run(path, tmp_path / "out", choices, max_bad=ANY)
    first, second, third = documents(tmp_path / "out")
    assert first == ids("ka vu mi zen") and third == ids("a")
    prompt = len(ids("ka vu", eos=False))
    assert ids("ka vu", eos=False) == first[:prompt]  # so that the mask can be told by hand
    assert masks(tmp_path / "out")[0] == [0] * prompt + [1] * (len(first) - prompt)
    assert masks(tmp_path / "out")[2] == [0, 1]
    assert second == ids("[u] ka vu?\n[a] mi zen.<|endoftext|>\n", eos=False)  # ends as the template has it
    learnt = len(ids("mi zen.<|endoftext|>", eos=False))
    assert masks(tmp_path / "out")[1][-1 - learnt :] == [1] * learnt + [0]
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert [(b["line"], b["kind"]) for b in bad] == [(4, "no text"), (5, "no conversation")]


def test_eos_after_conversations_only_if_it_is_asked_for(tmp_path, chats):
    path = write(tmp_path / "a.jsonl", [{"messages": [ASK, ANSWER]}, {"messages": [ANSWER, ASK]}])
    run(path, tmp_path / "out", replace(chats, eos="0", append_eos=True, bos="1", append_bos=True))
    assert [d[-1] for d in documents(tmp_path / "out")] == [0, 0]
    assert [d[0] for d in documents(tmp_path / "out")] == [1, 1]
    assert [m[-1] for m in masks(tmp_path / "out")] == [1, 0]  # to be learnt where an answer ends
    assert [m[0] for m in masks(tmp_path / "out")] == [0, 0]


def test_conversations_that_are_none(tmp_path, chats):
    wrong = [None, [], "hello", {"role": "user"}, [1], [{"content": "x"}], [{"role": 1}], [{"role": "\ud800"}]]
    entries = [{"messages": w} for w in wrong] + [{"messages": [ASK], "tools": "{"}, {"messages": [ASK, ANSWER]}]
    path = write(tmp_path / "a.jsonl", [*entries, {"messages": [ASK, {"role": "assistant", "content": "\ud800"}]}])
    report = run(path, tmp_path / "out", chats, max_bad=ANY)
    assert report.total.documents == 1
    bad = [json.loads(line) for line in (tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()]
    assert [b["line"] for b in bad] == [*range(1, 10), 11]
    assert {b["kind"] for b in bad} == {"no text", "no conversation", "refused by the chat template"}


def test_plain_text_has_no_conversations(tmp_path, chats):
    (tmp_path / "a.txt").write_text("hello")
    from surgery.data.tokenizing.prepare import check_sources, settings_for
    from surgery.data.tokenizing.sources import find_sources
    from tests.test_data_tokenize import VOCABULARY

    with pytest.raises(UsageError, match="holds text alone, no messages"):
        check_sources(find_sources([str(tmp_path / "a.txt")])[0], settings_for(chats, VOCABULARY))
