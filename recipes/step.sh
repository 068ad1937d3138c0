# Sourced by the recipes: finds `surgery`, and `step TITLE COMMAND...` announces a command as one would type it and
# runs it.  $root is the folder of the repository; steps are numbered from $STEP on.
command -v surgery >/dev/null || PATH="$root/.venv/bin:$PATH"
command -v surgery >/dev/null || { echo "surgery is not installed: run make demo, or pip install -e '.[demo]'" >&2; exit 1; }

bold='' dim='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; fi
count=${STEP:-0}
step() {
    count=$((count + 1))
    printf '\n%s%d. %s%s\n%s$' "$bold" "$count" "$1" "$plain" "$dim"
    local word
    for word in "${@:2}"; do
        case $word in
            *[\"\$\`\\!]*) printf ' %q' "$word" ;;
            *[!A-Za-z0-9_./:=@%+-]*) printf ' "%s"' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '%s\n' "$plain"
    "${@:2}"
}
