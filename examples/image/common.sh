# What both examples have in common: two networks with a way in, and programs in the background, of which the last to be started is the first to end.
set -euo pipefail

out=${OUT:-out/example}   # folder for everything, which must not be there
netns=${NETNS:-ark}       # begin of the names of the two network namespaces
mkdir -p "$(dirname "$out")"
mkdir "$out"

say() { printf '\n==> %s\n' "$*"; }

declare -A pids
order=()

# start NAME COMMAND… runs a command in the background, whose output goes to $out/NAME.log.
start() {
  local name=$1
  shift
  : >"$out/$name.log"
  "$@" >"$out/$name.log" 2>&1 </dev/null &
  pids[$name]=$!
  order=("$name" "${order[@]}")
}

# await NAME TEXT waits until a command has said so, and prints what it has said.
await() {
  local ended=
  until grep -m 1 -o "$2.*" "$out/$1.log"; do
    if [ "$ended" ]; then
      echo "$1 has ended:" >&2
      cat "$out/$1.log" >&2
      exit 1
    fi
    kill -0 "${pids[$1]}" 2>/dev/null && sleep 0.1 || ended=yes # it may have said so at last
  done
}

# end NAME ends a command, as Ctrl-C does: a peer saves its VM.
end() {
  kill "${pids[$1]}" 2>/dev/null || true # it may have ended
  wait "${pids[$1]}" || true
}

trap 'for name in "${order[@]}"; do end "$name"; done' EXIT
