"""Every family through every pair of formats that hold it, at two parallel settings: every bit arrives.

Some formats pad the vocabulary; `vocab_size` cuts what the one before has added, so that digests can be compared.

A round trip proves nothing about a layout, since two mistakes may cancel; the tests of the single formats hold them
against upstream's own files and logits.  Here it is the composition that is tested: any source, any target.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import surgery
from surgery.conversion.report import Report
from surgery.errors import ConfigError
from surgery.formats.registry import FORMATS, open_checkpoint
from surgery.formats.topology import Topology
from tests import matrix, oracle, tiny
from tests.test_conversion import weights

# Two ways of dividing each format's files: 6 layers, 4 key/value heads, 8 experts.
SETTINGS = {
    "hf": (Topology(), Topology()),
    "meta": (Topology(tp=2), Topology(tp=1)),
    "neox": (Topology(tp=2), Topology(tp=4, pp=0)),
    "megatron": (Topology(tp=2, pp=3), Topology(tp=1, pp=2, vpp=3)),
    "megatron-dist": (Topology(tp=2), Topology(tp=4, pp=2)),
    "olmo": (Topology(), Topology()),
    "olmo-core": (Topology(), Topology()),
}
OPTIONS = {
    "hf": ({}, {"shard_size": "200kB"}),
    "neox": ({}, {}),
    "megatron": ({"spec": "te"}, {"vocab_multiple": "64"}),
    "megatron-dist": ({}, {"spec": "local"}),
}


@pytest.fixture(scope="module")
def made(tiny_hf, tmp_path_factory):
    """made(family, format, setting): that model in that format, converted from Hugging Face's once."""
    root, known = tmp_path_factory.mktemp("formats"), {}

    def get(family: str, name: str, setting: int) -> tuple[Path, str]:
        key = (family, name, setting)
        if key not in known:
            out = root / f"{family}-{name}-{setting}"
            known[key] = out, convert(tiny_hf(family), out, name, setting, family).content_digest
        return known[key]

    return get


def convert(src: Path, dst: Path, to: str, setting: int, family: str) -> Report:
    topology = SETTINGS[to][setting]
    if setting == 0 and to in ("megatron", "megatron-dist") and tiny.FAMILIES[family][2].get("num_experts_per_tok"):
        topology = Topology(tp=2, pp=1, ep=2)
    options = OPTIONS.get(to, ({}, {}))[setting]
    report = surgery.convert(src, dst, to=to, topology=topology, options=options, vocab_size=tiny.SIZES["v"])
    assert report.verified
    return report


def test_the_matrix_names_every_family_and_format():
    assert matrix.HOLDS.keys() == tiny.FAMILIES.keys()
    assert SETTINGS.keys() == FORMATS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_pair_of_formats(family, made, tiny_hf, tmp_path):
    digests = set()
    for a, b in itertools.permutations(("hf", *matrix.HOLDS[family]), 2):
        for setting in (0, 1):
            source, _ = made(family, a, setting)
            out = tmp_path / f"{a}-{b}-{setting}"
            digests.add(convert(source, out, b, 1 - setting, family).content_digest)
    digests |= {made(family, name, 0)[1] for name in ("hf", *matrix.HOLDS[family])}
    assert len(digests) == 1
    theirs = weights(tiny_hf(family))
    for a, b in set(itertools.permutations(matrix.HOLDS[family] or ("hf", "hf"), 2)):
        last = tmp_path / f"{a}-{b}-0" if a != b else made(family, "hf", 0)[0]
        back, same = tmp_path / f"{a}-{b}-back", {"family": tiny.FAMILIES[family][0]}
        surgery.convert(last, back, to="hf", vocab_size=tiny.SIZES["v"], verify=False, options=same)
        ours = weights(tmp_path / f"{a}-{b}-back")
        assert ours.keys() == theirs.keys()
        assert all(oracle.same_bits(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in tiny.FAMILIES for n in FORMATS if n != "hf" and n not in matrix.HOLDS[f]]
)
def test_what_a_format_cannot_hold_is_refused_with_the_reason(family, name, tiny_hf, tmp_path):
    with pytest.raises(ConfigError, match=matrix.REASONS[family, name]):
        surgery.convert(tiny_hf(family), tmp_path / "out", to=name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", list(itertools.permutations(("megatron", "megatron-dist"), 2)))
def test_a_model_that_no_hugging_face_family_holds_still_moves(way, tmp_path):
    """Dense and sparse layers, shared experts: between the formats that have them."""
    source = oracle.GOLDEN / "megatron" / "d_moemix_legacy_tp1" / "checkpoint"
    with pytest.raises(ConfigError, match=r"no Hugging Face family"):
        surgery.convert(source, tmp_path / "hf", to="hf")
    first = surgery.convert(source, tmp_path / "a", to=way[0], topology=Topology(tp=2, ep=2))
    second = surgery.convert(tmp_path / "a", tmp_path / "b", to=way[1])
    third = surgery.convert(tmp_path / "b", tmp_path / "c", to="megatron", options={"vocab_multiple": "1"})
    assert first.content_digest == second.content_digest == third.content_digest
    assert open_checkpoint(tmp_path / "c").spec == open_checkpoint(source).spec
