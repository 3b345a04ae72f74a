#!/bin/sh
# Whether the runs of a container are well: none has failed, and none that trains has been silent for HEALTHY_SECONDS.
set -eu
directory=${1:-runs}
limit=${HEALTHY_SECONDS:-1800}

now=$(date +%s)
for state in "$directory"/*/state.json; do
  [ -f "$state" ] || continue # no run yet
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
