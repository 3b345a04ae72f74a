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
# Ranks that DeepSpeed started over ssh have 30 s to save when this script is told to stop.
# PYTHON names the interpreter; OMP_NUM_THREADS the threads of a rank [1].
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || show_help
check_config "$@"
config=$1
shift

hosts='' ranks='' dry_run=false launcher=() train=()
while [[ $# -gt 0 ]]; do
  if [[ $1 =~ ^(--(hostfile|num-ranks|include|exclude|master-addr|master-port|node-rank))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    --hostfile) need_value "$1" $#; hosts=$2; shift ;;
    --num-ranks) need_value "$1" $#; ranks=$2; shift ;;
    --include | --exclude | --master-addr | --master-port | --node-rank)
      need_value "$1" $#
      option=${1//-/_}
      launcher+=("--${option#__}" "$2")
      shift
      ;;
    --no-ssh) launcher+=(--no_ssh) ;;
    --dry-run) dry_run=true ;;
    --help | -h) show_help ;;
    *) train+=("$1") ;;
  esac
  shift
done
[[ -z $hosts || -f $hosts ]] || fail "--hostfile: $hosts: no such file"
[[ -z $ranks ]] || need_count --num-ranks "$ranks" "ranks on each node"

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
attend "${command[@]}"
