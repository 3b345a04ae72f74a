# shellcheck shell=bash
# Common functions of the launch scripts, which source this file; never run.

invocation=("$0" "$@")
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

# need_value OPTION [VALUE]...: the rest of the command line, from the option on.
need_value() {
  [[ $# -ge 2 && -n $2 ]] || fail "$1 needs a value (--help says more)"
  [[ $2 != --* ]] || fail "$1 needs a value, found the option '$2' (--help says more)"
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
  [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1: found '$2', expected a number of $3, such as ${4:-2}"
}

# Larger numbers of ranks are typing errors: they would fill a node's memory before a rank could report it.
ranks_per_core=16

# need_ranks_here OPTION VALUE: ranks that all start on this node.
need_ranks_here() {
  local cores
  cores=$(env -u OMP_NUM_THREADS nproc 2> /dev/null) || return 0
  [[ $2 -le $((ranks_per_core * cores)) ]] \
    || fail "$1: found '$2', expected at most $((ranks_per_core * cores)) ranks on this node, which has $cores cores"
}

# need_port OPTION VALUE [FOUND EXPECTED]
need_port() {
  [[ $2 =~ ^[1-9][0-9]{0,4}$ && $2 -le 65535 ]] \
    || fail "$1: found '${3:-$2}', expected ${4:-a port from 1 to 65535, such as 29500}"
}

# need_hostfile FILE PATTERN EXPECTED: lines that match, beside empty ones and comments; at least one.
need_hostfile() {
  local line number=0 hosts=0
  [[ -e $1 ]] || fail "--hostfile: $1: no such file"
  [[ -f $1 && -r $1 ]] || fail "--hostfile: $1: not a file that can be read"
  while IFS= read -r line || [[ -n $line ]]; do
    number=$((number + 1))
    [[ ! $line =~ ^[[:space:]]*(#.*)?$ ]] || continue
    [[ $line =~ $2 ]] || fail "--hostfile: $1:$number: found $(printf '%q' "${line:0:60}"), expected $3"
    hosts=$((hosts + 1))
  done < <(tr -d '\0' < "$1")
  [[ $hosts -gt 0 ]] || fail "--hostfile: $1: no line names a host, expected $3"
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
#   TERM, USR1 or HUP → this script → USR1 → ranks: save, exit 0 → launcher: exit 0 → this script: exit 0
#   INT (Ctrl-C)      → this script → INT  → ranks: save, exit 0 → launcher: exit 0 → this script: the resuming command, exit 130
#   a second INT      → this script → KILL → launcher and ranks                    → this script: exit 130
#
# The launcher gets none of these signals: TERM and INT make it kill ranks that are slow to save and end with an error,
# USR1 would end it and leave them behind. Only without ranks, while it waits for other nodes, does it get TERM. A launcher
# that passes signals on itself is the only one signalled: `pass_on` does so. `tell_far SIGNAL` signals ranks started over
# ssh, and fails if none of them catches the signal.
passes_on=false
pass_on() { :; }
tell_far() { return 1; }

attend() {
  # A separate session: a terminal signals only this script. Processes that don't train, or not yet, ignore USR1.
  # Background jobs of bash ignore INT and QUIT.
  local apart=''
  ! command -v setsid > /dev/null || apart=setsid
  (
    [[ $passes_on == true ]] || trap '' USR1
    trap - INT QUIT
    # shellcheck disable=SC2086  # one word, or none
    exec $apart "$@"
  ) &
  agent=$!
  teller='' interrupted=false
  trap 'stop TERM' TERM HUP
  trap 'stop USR1' USR1
  trap interrupt INT
  trap 'end_at_once' QUIT
  exec {terminal}>&2
  # A signal ends `wait` before the launcher has ended. Bash's own message about a killed one is dropped.
  while kill -0 "$agent" 2> /dev/null; do { wait "$agent" || :; } 2> /dev/null; done
  local code=0
  { wait "$agent" || code=$?; } 2> /dev/null
  [[ -z $teller ]] || kill "$teller" 2> /dev/null || :
  [[ $interrupted == false ]] || say_how_to_go_on
  exit "$code"
}

# shellcheck disable=SC2329  # invoked by a trap
stop() {
  if [[ -z $teller ]]; then
    printf '%s: told to stop; the run saves its state\n' "$(basename "$0")" >&"$terminal"
    tell "$1" > /dev/null 2>&1 & # readers of our output do not wait for its `sleep`
    teller=$!
  fi
}

# shellcheck disable=SC2329  # invoked by `stop`
tell() {
  local listeners told=false
  if [[ $passes_on == true ]]; then
    pass_on "$1"
    return
  fi
  # More than once: ranks that have not begun to train do not hear it.
  while kill -0 "$agent"; do
    mapfile -t listeners < <(ranks_of "$agent")
    if [[ ${#listeners[@]} -gt 0 ]]; then
      kill -USR1 "${listeners[@]}" || : # some may have ended
      told=true
    elif tell_far USR1; then
      told=true
    elif [[ $told == false ]]; then
      kill -TERM "$agent"
      return
    fi
    sleep 2
  done
}

# No `return` here: bash takes it for one of the function that waits, and ends.
# shellcheck disable=SC2329  # invoked by a trap
interrupt() {
  local listeners
  if [[ $interrupted == true ]]; then
    end_at_once
  else
    interrupted=true
    printf '%s: Ctrl-C: the run saves its state and ends; once more ends it at once\n' "$(basename "$0")" >&"$terminal"
    mapfile -t listeners < <(ranks_of "$agent")
    if [[ -n $teller ]]; then
      : # the ranks know already
    elif [[ $passes_on == true ]]; then
      pass_on INT
    elif begun "${listeners[@]}"; then
      kill -INT "${listeners[@]}" 2> /dev/null || :
    elif [[ ${#listeners[@]} -gt 0 ]] || ! tell_far INT; then
      end_at_once # there is nothing to save
    fi
  fi
}

# The launcher first: it would take the ranks' end for a failure, and start them again.
# shellcheck disable=SC2329  # invoked by a trap
end_at_once() {
  local listeners
  mapfile -t listeners < <(ranks_of "$agent")
  tell_far KILL 2> /dev/null || :
  kill -KILL -- "-$agent" 2> /dev/null || kill -KILL "$agent" 2> /dev/null || :
  [[ ${#listeners[@]} -eq 0 ]] || kill -KILL "${listeners[@]}" 2> /dev/null || :
  interrupted=true
}

# begun RANK...: there are ranks, and all of them listen to USR1, as ranks do from their start on.
# shellcheck disable=SC2329  # invoked by `interrupt`
begun() {
  local rank caught
  [[ $# -gt 0 ]] || return 1
  for rank in "$@"; do
    caught=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$rank/status" 2> /dev/null) || return 1
    [[ -n $caught && $((16#$caught & 1 << ($(kill -l USR1) - 1))) -ne 0 ]] || return 1
  done
}

# The command that resumes the run, ready to paste.
say_how_to_go_on() {
  local command=() word skip=false line
  for word in "${invocation[@]}"; do
    if [[ $skip == true ]]; then
      skip=false
    elif [[ $word == --resume ]]; then
      skip=true
    elif [[ $word != --resume=* && $word != checkpoint.resume=* && $word != --overwrite ]]; then
      command+=("$word")
    fi
  done
  printf -v line '%q ' "${command[@]}" --resume auto
  printf '%s: interrupted; continue with: %s\n' "$(basename "$0")" "${line% }" >&2
  exit 130
}

# Of all that a process has started, those that were given a rank; a line each.
# shellcheck disable=SC2329  # invoked by `tell` and others
ranks_of() {
  local child children
  read -ra children < <(cat "/proc/$1"/task/*/children 2> /dev/null) || : # no newline ends it
  for child in "${children[@]}"; do
    if grep -qsz '^LOCAL_RANK=' "/proc/$child/environ"; then
      printf '%s\n' "$child"
    else
      ranks_of "$child"
    fi
  done
}
