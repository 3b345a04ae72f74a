#!/bin/sh
# Whether the runs of this container are well: none has failed, and none that trains has been silent for
# HEALTHY_SECONDS. The directory may be a volume with runs of earlier containers: what their state.json said before
# STARTED, by default this container's start in seconds of the epoch, is not judged.
set -eu
directory=${1:-runs}
limit=${HEALTHY_SECONDS:-1800}

# The times of /proc/1 are not its start: they are of the first access. Field 22 is, in ticks since boot;
# the second, a name in brackets, may have spaces.
start_of_first_process() {
  boot=$(sed -n 's/^btime //p' /proc/stat)
  ticks=$(sed 's/.*) //' /proc/1/stat | cut -d ' ' -f 20)
  echo $((boot + ticks / $(getconf CLK_TCK)))
}
started=${STARTED:-$(start_of_first_process)}

now=$(date +%s)
for state in "$directory"/*/state.json; do
  [ -f "$state" ] || continue # no run yet
  case $state in *.previous/state.json | *.previous.[0-9]*/state.json) continue ;; esac
  [ "$(stat -c %Y "$state")" -ge "$started" ] || continue
  if grep -q '"state": "failed"' "$state"; then
    echo "$state says failed"
    exit 1
  fi
  grep -q '"state": "running"' "$state" || continue
  last=$(stat -c %Y "$state")
  metrics=$(dirname "$state")/metrics.jsonl
  if [ -f "$metrics" ]; then
    logged=$(stat -c %Y "$metrics")
    last=$((logged > last ? logged : last))
  fi
  if [ $((now - last)) -gt "$limit" ]; then
    echo "$metrics: nothing for $((now - last)) s"
    exit 1
  fi
done
