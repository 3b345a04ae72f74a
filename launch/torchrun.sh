#!/usr/bin/env bash
# Train on one node, or on several, with torchrun.
#
#   launch/torchrun.sh CONFIG [OPTION]... [KEY=VALUE]... [TRAIN OPTION]...
#
#   launch/torchrun.sh configs/digits_autoencoder.yaml --nproc-per-node 2 train.steps=100
#   launch/torchrun.sh configs/byte_gpt.yaml --nnodes 2 --rdzv-endpoint node1:29400 --rdzv-id 7   # on both nodes
#   launch/torchrun.sh configs/byte_gpt.yaml --nnodes 1:3 --rdzv-endpoint node1:29400 --max-restarts 3
#
# Options:
#   --nproc-per-node N      ranks on each node; by default one for each GPU, or one
#   --nnodes N | MIN:MAX    nodes; a range may lose nodes and take them back
#   --rdzv-endpoint H:P     where the nodes meet: a node of the job and a free port; needed with several nodes
#   --rdzv-id ID            the job's name, the same on all nodes [kfac_dist]
#   --max-restarts N        how often the ranks start again after one of them died [0]; above 0 the run continues from
#                           its newest checkpoint (--resume auto), also at the first start
#   --dry-run               print the command, and run nothing
#   --help                  this text
# Everything else goes to `kfac-dist train`: KEY=VALUE overrides, --resume, --compare, --name, --live, --quiet.
#
# PYTHON names the interpreter; OMP_NUM_THREADS the threads of a rank [1]; GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME
# the network interface where a node has several.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || show_help
check_config "$@"
config=$1
shift

nproc='' nnodes=1 endpoint='' id=kfac_dist restarts=0 resume=false dry_run=false train=()
while [[ $# -gt 0 ]]; do
  # --option=value is --option value
  if [[ $1 =~ ^(--(nproc-per-node|nnodes|rdzv-endpoint|rdzv-id|max-restarts))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    --nproc-per-node) need_value "$@"; nproc=$2; shift ;;
    --nnodes) need_value "$@"; nnodes=$2; shift ;;
    --rdzv-endpoint) need_value "$@"; endpoint=$2; shift ;;
    --rdzv-id) need_value "$@"; id=$2; shift ;;
    --max-restarts) need_value "$@"; restarts=$2; shift ;;
    --dry-run) dry_run=true ;;
    --help | -h) show_help ;;
    --resume | --resume=* | checkpoint.resume=* | checkpoint=*resume:*) resume=true; train+=("$1") ;;
    *) train+=("$1") ;;
  esac
  shift
done
[[ $nnodes =~ ^[1-9][0-9]{0,5}(:[1-9][0-9]{0,5})?$ && ${nnodes%:*} -le ${nnodes#*:} ]] \
  || fail "--nnodes: found '$nnodes', expected N or MIN:MAX, such as 2 or 1:3"
if [[ -n $nproc ]]; then
  need_count --nproc-per-node "$nproc" ranks
  need_ranks_here --nproc-per-node "$nproc"
fi
address='^(\[[0-9A-Fa-f:.]+]|[^]:[]+):[0-9]{1,5}$' # in brackets: of IPv6
meeting='HOST:PORT, such as node1:29400'
[[ -z $endpoint || $endpoint =~ $address ]] || fail "--rdzv-endpoint: found '$endpoint', expected $meeting"
[[ -z $endpoint ]] || need_port --rdzv-endpoint "${endpoint##*:}" "$endpoint" "$meeting"
[[ $restarts =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "--max-restarts: found '$restarts', expected a number, such as 3"
[[ $restarts == 0 || $resume == true ]] || train+=(--resume auto)

if [[ -n $endpoint ]]; then
  meet=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$id")
elif [[ $nnodes == 1 ]]; then
  meet=(--standalone)
else
  fail "--nnodes $nnodes needs --rdzv-endpoint HOST:PORT, a node of the job and a free port, the same on all nodes"
fi

# A store of its own for every start of the ranks: in the shared one they would find the addresses of dead ranks, and
# none at all once the node that served it is gone. Ranks that end because the agent does have as long to save.
command=(env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" "$(find_python)" -m torch.distributed.run
  "${meet[@]}" --nproc-per-node "${nproc:-$(gpus_or_one)}" --max-restarts "$restarts"
  -m kfac_dist train "$config" "${train[@]}")
[[ $dry_run == false ]] || print_command "${command[@]}"
attend "${command[@]}"
