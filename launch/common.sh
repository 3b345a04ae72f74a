# shellcheck shell=bash
# What the launch scripts share; sourced by them, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

fail() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment at the head of a script is its help.
show_help() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//;T;p}' "$0"
  exit 0
}

# The configuration comes first, a file or a shipped run's name, which only the ranks can look up; a typo of an option must
# not be taken for it.
check_config() {
  [[ $# -gt 0 ]] || fail "give a configuration first, such as configs/digits_autoencoder.yaml, or the name of a shipped" \
    "one, such as digits_autoencoder (--help says more)"
  [[ $1 != -* ]] || fail "found '$1', expected a configuration first; options follow it (--help says more)"
  [[ -f $1 || $1 =~ ^[a-z0-9_]+(\.[0-9]+[a-z0-9_]*)?$ ]] || fail "$1: no such file"
}

# need_value OPTION COUNT: COUNT arguments are left, OPTION among them.
need_value() {
  [[ $2 -ge 2 ]] || fail "$1 needs a value (--help says more)"
}

# PYTHON, else this checkout's .venv, else python3.
find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
  elif [[ -x $root/.venv/bin/python ]]; then
    printf '%s\n' "$root/.venv/bin/python"
  else
    printf 'python3\n'
  fi
}

# need_count OPTION VALUE MEANING [EXAMPLE]: a launcher would answer anything else with a traceback.
need_count() {
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1: found '$2', expected a number of $3, such as ${4:-2}"
}

# The variables that ranks on other nodes need, too, as far as they are set here; a line each.
for_all_nodes() {
  compgen -e | grep -E '^(GLOO|NCCL|TORCH_NCCL)_' | LC_ALL=C sort || :
}

# Of this node's GPUs those that CUDA shows: the list ends where an entry is none, such as -1.
gpus_or_one() {
  local gpus=0 visible
  if command -v nvidia-smi > /dev/null; then
    gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU') || gpus=0
  fi
  if [[ $gpus -gt 0 && -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
    for ((gpus = 0; gpus < ${#visible[@]}; gpus++)); do
      [[ ${visible[gpus]} =~ ^\ *([0-9]|GPU-|MIG-) ]] || break
    done
  fi
  printf '%s\n' "$((gpus > 0 ? gpus : 1))"
}

# Ready to paste.
print_command() {
  local line
  printf -v line '%q ' "$@"
  printf '%s\n' "${line% }"
  exit 0
}

# attend COMMAND...: runs a launcher, and ends as it does.
#
#   TERM or USR1 → this script → USR1 → ranks: save, exit 0 → launcher: exit 0 → this script: exit 0
#
# The launcher hears neither: TERM makes it kill ranks that are slow to save and end with an error, USR1 would end it
# and leave them behind. Only where it has no ranks here does it get TERM: it waits for other nodes, or began over ssh.
attend() {
  # Whoever does not train, or not yet, leaves USR1 to the others. What bash starts with & ignores INT and QUIT.
  (
    trap '' USR1
    trap - INT QUIT
    exec "$@"
  ) &
  agent=$!
  teller=''
  trap stop TERM USR1
  end_with_agent
}

end_with_agent() {
  trap : INT # a terminal tells the launcher, too
  # A signal ends `wait` before the launcher has ended.
  while kill -0 "$agent" 2> /dev/null; do wait "$agent" || :; done
  local code=0
  wait "$agent" || code=$?
  [[ -z ${teller:-} ]] || kill "$teller" 2> /dev/null || :
  exit "$code"
}

# shellcheck disable=SC2329  # invoked by a trap
stop() {
  [[ -z $teller ]] || return 0
  printf '%s: told to stop; the run saves its state\n' "$(basename "$0")" >&2
  tell > /dev/null 2>&1 & # whoever reads our output does not wait for its `sleep`
  teller=$!
}

# shellcheck disable=SC2329  # invoked by `stop`
tell() {
  local listeners told=false
  # More than once: ranks that have not begun to train do not hear it.
  while kill -0 "$agent"; do
    mapfile -t listeners < <(ranks_of "$agent")
    if [[ ${#listeners[@]} -gt 0 ]]; then
      kill -USR1 "${listeners[@]}" || : # some may have ended
      told=true
    elif [[ $told == false ]]; then
      kill -TERM "$agent"
      return
    fi
    sleep 2
  done
}

# Of all that a process has started, those that were given a rank; a line each.
# shellcheck disable=SC2329  # invoked by `tell`
ranks_of() {
  local child children
  read -ra children < <(cat "/proc/$1"/task/*/children) || : # no newline ends it
  for child in "${children[@]}"; do
    if grep -qz '^LOCAL_RANK=' "/proc/$child/environ"; then
      printf '%s\n' "$child"
    else
      ranks_of "$child"
    fi
  done
}
