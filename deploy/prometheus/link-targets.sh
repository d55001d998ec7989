#!/bin/sh
# link-targets.sh STORAGE FOLDER: keeps FOLDER/RUN.json a link to STORAGE/RUN/prometheus-targets.json for every run there is, until it is ended.
# Prometheus takes a * in the names of target files but not in those of their folders. Called by deploy.up and compose.yaml.
set -eu
while :; do
  for file in "$1"/*/prometheus-targets.json; do
    run=${file%/*}
    run=${run##*/}
    if [ -f "$file" ] && [ ! -L "$2/$run.json" ]; then ln -s "$file" "$2/$run.json"; fi
  done
  for link in "$2"/*.json; do
    if [ ! -e "$link" ]; then rm -f "$link"; fi
  done
  sleep 1
done
