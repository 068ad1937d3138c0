"""Print the losses of several models on what a data plan holds out, domain by domain, and what beats what.

    python recipes/domain_losses.py plan base=base.hf annealed=a.hf annealed=b.hf soup=soup --soup seeds/soup.json

Models of any format, under names; several of one name are numbered: the ingredients of `soup`, which is compared with
the best of them.  --soup writes down what `surgery report` then says of it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.midtraining.evaluation.opened import Opened, open_for_evaluation
from surgery.midtraining.evaluation.run import Wanted, evaluate
from surgery.midtraining.report.tables import worth

ROWS = 96  # of each domain
SOUP = "soup"


def heldout(plan: str, opened: Opened) -> dict[str, dict[str, Any]]:
    """`loss` and `bpb` of each domain, in fp32."""
    found: dict[str, dict[str, Any]] = evaluate(opened, Wanted(data=[plan], limit=ROWS))[0]["heldout"]
    return found


def named(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of NAME=MODEL; names that occur several times get a number."""
    pairs = [tuple(text.split("=", 1)) for text in models]
    often, seen = Counter(name for name, _ in pairs), Counter[str]()
    for name, model in pairs:
        seen[name] += 1
        yield (name if often[name] == 1 else f"{name} {seen[name]}"), model


def mean(losses: Mapping[str, Mapping[str, Any]]) -> float:
    return sum(each["loss"] for each in losses.values()) / len(losses)


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    domains, width = list(next(iter(found.values()))), max(map(len, found)) + 2
    yield " " * width + "".join(f"{name:>9}" for name in (*domains, "mean"))
    for name, losses in found.items():
        yield f"{name:{width}}" + "".join(f"{x:9.4f}" for x in (*(losses[d]["loss"] for d in domains), mean(losses)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("plan")
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--soup", type=Path, metavar="FILE")
    args = parser.parse_args()
    found, sizes = {}, []
    for name, model in named(args.models):
        opened = open_for_evaluation(model)
        found[name] = heldout(args.plan, opened)
        sizes.append(opened.model.num_parameters())
    print("\n".join([*table(found), "", *worth(min(sizes))]))
    ingredients = {name: losses for name, losses in found.items() if name[-1].isdigit()}
    best = min(ingredients, key=lambda name: mean(ingredients[name]))
    gain = mean(ingredients[best]) - mean(found[SOUP])
    print(f"The soup is {abs(gain):.4f} {'better' if gain > 0 else 'worse'} than its best ingredient, {best}.")
    if args.soup:
        told = {"ingredients": [{"name": name, "heldout": losses} for name, losses in ingredients.items()],
                "soup": {"heldout": found[SOUP]}, "kept": SOUP if gain > 0 else best}  # fmt: skip
        args.soup.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
