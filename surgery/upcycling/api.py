"""The three changes as one call each, from folder to folder; the command line prepares and carries out the same.

surgery.upcycle("SmolLM2-135M", "moe", experts=64, top_k=8).proof.verdict              # "exact"
surgery.experts("moe", "twice", duplicate=2)
surgery.collapse("moe", "dense").report.content_digest
"""

from __future__ import annotations

from surgery.settings import taking
from surgery.storage.outgoing import outgoing
from surgery.upcycling.request import Collapse, Edit, Upcycle
from surgery.upcycling.run import Outcome, Path_, carry_out, prepare, prepare_collapse, prepare_edit
from surgery.writing.staging import check_free


@taking(Upcycle)
def upcycle(src: Path_, dst: Path_, request: Upcycle) -> Outcome:
    """Turn a dense checkpoint into a mixture of experts, and prove whether it still computes the same.

    surgery.upcycle("SmolLM2-135M", "moe", experts=8, top_k=2, strategy="copy")

    `progress` and `proving` are told numbers of bytes, of writing and of the proof.  Raises SurgeryError; `dst`
    appears whole, read back and proven as promised, or not at all.
    """
    with outgoing(dst, request) as place:
        check_free(place, request.force)
        return carry_out(prepare(src, request), place)


@taking(Edit)
def experts(src: Path_, dst: Path_, request: Edit) -> Outcome:
    """Prune, keep, duplicate, merge or permute the experts of a mixture, or change how many are chosen.

    surgery.experts("moe", "fewer", keep=[0, 2], layers={5: {"keep": [1, 3]}}, top_k=1, force_lossy=True)

    The rest is as for `upcycle`.  Raises SurgeryError.
    """
    with outgoing(dst, request) as place:
        check_free(place, request.force)
        return carry_out(prepare_edit(src, request), place)


@taking(Collapse)
def collapse(src: Path_, dst: Path_, request: Collapse) -> Outcome:
    """Turn a mixture back into a dense model: exactly, or with force_lossy by "average" or "by-router".

    surgery.collapse("moe", "dense").proof.verdict          # "exact"

    The rest is as for `upcycle`.  Raises SurgeryError.
    """
    with outgoing(dst, request) as place:
        check_free(place, request.force)
        return carry_out(prepare_collapse(src, request), place)
