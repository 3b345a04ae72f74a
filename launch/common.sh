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

# The configuration comes first; a typo of an option must not be taken for it.
check_config() {
  [[ $# -gt 0 ]] || fail "give a configuration first, such as configs/digits_autoencoder.yaml (--help says more)"
  [[ $1 != -* ]] || fail "found '$1', expected a configuration first; options follow it (--help says more)"
  [[ -f $1 ]] || fail "$1: no such file"
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

gpus_or_one() {
  local gpus=0
  if command -v nvidia-smi > /dev/null; then
    gpus=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU') || gpus=0
  fi
  printf '%s\n' "$((gpus > 0 ? gpus : 1))"
}

# run_or_print DRY_RUN COMMAND...: runs it in place of this script, so that signals reach it; true prints it, ready to
# paste.
run_or_print() {
  local dry_run=$1
  shift
  if [[ $dry_run == true ]]; then
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
    exit 0
  fi
  exec "$@"
}
