#!/usr/bin/env bash
# Train on the nodes of a hostfile with DeepSpeed's launcher. Needs pip install 'kfac_dist[deepspeed]'.
#
#   launch/deepspeed.sh CONFIG [OPTION]... [KEY=VALUE]... [TRAIN OPTION]...
#
#   launch/deepspeed.sh configs/digits_autoencoder.yaml --num-ranks 2
#   launch/deepspeed.sh configs/byte_gpt.yaml --hostfile hosts --master-addr node1
#   launch/deepspeed.sh configs/byte_gpt.yaml --hostfile hosts --master-addr node1 --no-ssh --node-rank 0    # on each
#
# Options:
#   --hostfile FILE    lines of `HOST slots=RANKS`; without one, this node
#   --num-ranks N      ranks on each node; by default one for each GPU, or one
#   --include HOSTS    which of the hosts, and GPUs: node1@node2:0,2
#   --exclude HOSTS    all but these
#   --master-addr H    where the ranks meet; by default the first host
#   --master-port P    [29500]
#   --no-ssh           start this node's ranks only, and no ssh to others; with --node-rank
#   --node-rank R      this node's place in the hostfile
#   --dry-run          print the command, and run nothing
#   --help             this text
# Everything else goes to `kfac-dist train`: KEY=VALUE overrides, --resume, --compare, --name, --live, --quiet.
#
# GLOO_*, NCCL_* and TORCH_NCCL_* reach the ranks of all nodes; others do by a line NAME=VALUE in ~/.deepspeed_env.
# When this script receives a signal, it signals the ranks of all hosts over ssh, which then have the time to save.
# PYTHON names the interpreter; OMP_NUM_THREADS the threads of a rank [1].
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || show_help
check_config "$@"
config=$1
shift

hosts='' ranks='' port=29500 chosen='' chosen_by='' node_rank='' over_ssh=true dry_run=false launcher=() train=()
while [[ $# -gt 0 ]]; do
  if [[ $1 =~ ^(--(hostfile|num-ranks|include|exclude|master-addr|master-port|node-rank))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    --hostfile) need_value "$@"; hosts=$2; shift ;;
    --num-ranks) need_value "$@"; ranks=$2; shift ;;
    --include | --exclude | --master-addr | --master-port | --node-rank)
      need_value "$@"
      option=${1//-/_}
      launcher+=("--${option#__}" "$2")
      case $1 in
        --include | --exclude)
          [[ -z $chosen ]] || fail "$1 and $chosen_by: give one of the two"
          chosen=$2 chosen_by=$1
          ;;
        --master-port) need_port "$1" "$2"; port=$2 ;;
        --node-rank) node_rank=$2 ;;
      esac
      shift
      ;;
    --no-ssh) launcher+=(--no_ssh) over_ssh=false ;;
    --dry-run) dry_run=true ;;
    --help | -h) show_help ;;
    *) train+=("$1") ;;
  esac
  shift
done

# The hosts and their ranks, all of which DeepSpeed would answer for with a traceback.
declare -A slots=()
host_line='^[[:space:]]*([][A-Za-z0-9_.:%@+-]+)[[:space:]]+slots=([1-9][0-9]{0,5})[[:space:]]*(#.*)?$'
if [[ -n $hosts ]]; then
  need_hostfile "$hosts" "$host_line" "HOST slots=RANKS, such as node1 slots=8"
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ $host_line ]] || continue
    [[ -z ${slots[${BASH_REMATCH[1]}]:-} ]] || fail "--hostfile: $hosts: names ${BASH_REMATCH[1]} twice"
    slots[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
  done < "$hosts"
fi
if [[ -n $ranks ]]; then
  [[ -z $chosen ]] || fail "--num-ranks and $chosen_by: give one of the two"
  need_count --num-ranks "$ranks" "ranks on each node"
  [[ -n $hosts ]] || need_ranks_here --num-ranks "$ranks"
fi
if [[ -n $chosen ]]; then
  [[ -n $hosts ]] || fail "$chosen_by chooses among the hosts of a --hostfile"
  IFS=@ read -ra parts <<< "$chosen"
  for part in "${parts[@]}"; do
    host=${part%%:*}
    [[ -n $host && -n ${slots[$host]:-} ]] || fail "$chosen_by: found '$part', expected hosts of $hosts, such as ${!slots[*]}"
    [[ $part == *:* ]] || continue
    IFS=, read -ra places <<< "${part#*:}"
    [[ ${part#*:} =~ ^[0-9]{1,6}(,[0-9]{1,6})*$ ]] || places=(none)
    for place in "${places[@]}"; do
      [[ $place != none && $((10#$place)) -lt ${slots[$host]} ]] \
        || fail "$chosen_by: found '$part', expected places of $host from 0 to $((slots[$host] - 1)), such as $host:0"
    done
  done
fi
if [[ $over_ssh == false ]]; then
  [[ -n $node_rank ]] || fail "--no-ssh needs --node-rank, this node's place in the hostfile"
  [[ $node_rank =~ ^(0|[1-9][0-9]{0,5})$ ]] \
    || fail "--node-rank: found '$node_rank', expected a place in the hostfile, from 0 on"
elif [[ -n $node_rank ]]; then
  fail "--node-rank goes with --no-ssh: over ssh, DeepSpeed itself numbers the nodes"
fi

if [[ -n $hosts ]]; then
  launcher+=(--hostfile "$hosts")
else
  ranks=${ranks:-$(gpus_or_one)}
fi
[[ -z $ranks ]] || launcher+=(--num_gpus "$ranks")
python=$(find_python)
# DeepSpeed takes little of the environment to other nodes: the command of a rank says it.
environment=("OMP_NUM_THREADS=$OMP_NUM_THREADS")
while IFS= read -r name; do environment+=("$name=${!name}"); done < <(for_all_nodes)
command=("$python" -m deepspeed.launcher.runner "${launcher[@]}" --no_local_rank --no_python
  env "${environment[@]}" "$python" -u -m kfac_dist train "$config" "${train[@]}")
[[ $dry_run == false ]] || print_command "${command[@]}"
nodes=$((${#slots[@]} > 0 ? ${#slots[@]} : 1))
[[ -z $node_rank || $node_rank -lt $nodes ]] \
  || fail "--node-rank: found '$node_rank', expected a place in the hostfile, from 0 to $((nodes - 1))"

# tell_far SIGNAL: to this run's ranks on the hosts that DeepSpeed reaches over ssh; its launchers there get no signal,
# and end as the ranks do. Processes that catch USR1 are training; KILL is for all.
# shellcheck disable=SC2329  # invoked by `attend`'s traps
tell_far() {
  local host told=1 there
  [[ -n $hosts && $over_ssh == true ]] || return 1
  printf -v there '%q ' bash -s -- "$1" "$port" "$config" # the other host's shell takes it apart again
  while read -r host; do
    ! ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" "$there" <<< "$teller_there" || told=0
  done < <(sed -n 's/^[[:space:]]*\([^#[:space:]][^[:space:]]*\).*/\1/p' "$hosts")
  return "$told"
}

# shellcheck disable=SC2016  # for the shell of another host
teller_there='
told=1 listens=$((1 << ($(kill -l USR1) - 1)))
for process in /proc/[0-9]*; do
  tr "\0" "\n" 2> /dev/null < "$process/environ" | grep -qx "MASTER_PORT=$2" || continue
  [[ $(tr "\0" "\n" 2> /dev/null < "$process/cmdline") == *$'"'\\n'"'kfac_dist$'"'\\n'"'train$'"'\\n'"'"$3"* ]] || continue
  caught=$(sed -n "s/^SigCgt:[[:space:]]*//p" "$process/status" 2> /dev/null)
  [[ $1 == KILL || (-n $caught && $((16#$caught & listens)) -ne 0) ]] || continue
  ! kill "-$1" "${process#/proc/}" 2> /dev/null || told=0
done
exit "$told"
'
attend "${command[@]}"
