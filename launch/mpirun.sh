#!/usr/bin/env bash
# Train on the ranks that mpirun starts: MPICH and Intel MPI (Hydra), or Open MPI. Needs pip install 'kfac_dist[mpi]'.
#
#   launch/mpirun.sh CONFIG [OPTION]... [KEY=VALUE]... [TRAIN OPTION]...
#
#   launch/mpirun.sh configs/digits_autoencoder.yaml -n 2
#   launch/mpirun.sh configs/byte_gpt.yaml -n 16 --ppn 8 --hostfile hosts kfac.distribution.backend=mpi
#
# Options:
#   -n N               ranks; by default one for each GPU of this node, or one
#   --ppn N            ranks on each node
#   --hostfile FILE    the nodes, in mpirun's own notation
#   --mpirun PATH      which mpirun; by default the one beside the interpreter, then the first on the PATH
#   --dry-run          print the command, and run nothing
#   --help             this text
# Everything else goes to `kfac-dist train`: KEY=VALUE overrides, --resume, --compare, --name, --live, --quiet.
#
# The ranks meet over MPI and train over gloo or NCCL; kfac.distribution.backend=mpi sends K-FAC's factors and inverses
# over MPI as well. MASTER_ADDR chooses the address of rank 0 where its host name isn't the right one.
# GLOO_*, NCCL_*, TORCH_NCCL_*, MASTER_ADDR, MASTER_PORT and PYTHONPATH reach the ranks of all nodes.
# PYTHON names the interpreter; OMP_NUM_THREADS the threads of a rank [1].
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} != --help && ${1:-} != -h ]] || show_help
check_config "$@"
config=$1
shift

ranks='' per_node='' hosts='' mpirun='' dry_run=false train=()
while [[ $# -gt 0 ]]; do
  if [[ $1 =~ ^(--(ppn|hostfile|mpirun))=(.*)$ ]]; then
    set -- "${BASH_REMATCH[1]}" "${BASH_REMATCH[3]}" "${@:2}"
  fi
  case $1 in
    -n) need_value "$@"; ranks=$2; shift ;;
    --ppn) need_value "$@"; per_node=$2; shift ;;
    --hostfile) need_value "$@"; hosts=$2; shift ;;
    --mpirun) need_value "$@"; mpirun=$2; shift ;;
    --dry-run) dry_run=true ;;
    --help | -h) show_help ;;
    *) train+=("$1") ;;
  esac
  shift
done
[[ -z $hosts ]] || need_hostfile "$hosts" '^[[:space:]]*[][A-Za-z0-9_.:%+@-]+([[:space:]]|$)' "a host, such as node1"
[[ -z $ranks ]] || need_count -n "$ranks" ranks
# A batch system's hosts mpirun knows by itself.
if [[ -n $ranks && -z "$hosts${SLURM_JOB_ID:-}${PBS_NODEFILE:-}${PE_HOSTFILE:-}${LSB_JOBID:-}${HYDRA_HOST_FILE:-}" ]]; then
  need_ranks_here -n "$ranks"
fi
[[ -z $per_node ]] || need_count --ppn "$per_node" "ranks on each node"

python=$(find_python)
if [[ -z $mpirun ]]; then
  mpirun=$(dirname "$(command -v "$python" || printf '%s' "$python")")/mpirun
  [[ -x $mpirun ]] || mpirun=$(command -v mpirun) \
    || fail "no mpirun on the PATH: load this cluster's MPI module, or pip install mpich"
fi

command=("$mpirun" -n "${ranks:-$(gpus_or_one)}")
open_mpi=false
case $("$mpirun" --version 2>&1 || true) in
  *"Open MPI"* | *OpenRTE*)
    open_mpi=true
    [[ -z $hosts ]] || command+=(--hostfile "$hosts")
    [[ -z $per_node ]] || command+=(--map-by "ppr:$per_node:node")
    # Hydra passes on the whole environment, Open MPI only named variables.
    command+=(-x OMP_NUM_THREADS)
    for name in MASTER_ADDR MASTER_PORT PYTHONPATH; do [[ -z ${!name+set} ]] || command+=(-x "$name"); done
    while IFS= read -r name; do command+=(-x "$name"); done < <(for_all_nodes)
    ;;
  *)
    [[ -z $hosts ]] || command+=(-f "$hosts")
    [[ -z $per_node ]] || command+=(-ppn "$per_node")
    ;;
esac
command+=("$python" -m kfac_dist train "$config" "${train[@]}")
[[ $dry_run == false ]] || print_command "${command[@]}"
# Hydra passes every signal on, and waits for the ranks. On TERM and INT Open MPI kills ranks that are slow to save; USR1
# it passes on to those of all nodes: once, because ranks that have saved would die of another.
passes_on=true
# shellcheck disable=SC2329  # invoked by `attend`'s traps
pass_on() {
  if [[ $open_mpi == false ]]; then
    kill "-$1" "$agent"
  else
    trap '' TERM USR1
    kill -USR1 "$agent"
  fi
}
attend "${command[@]}"
