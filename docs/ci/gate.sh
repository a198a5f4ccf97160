#!/usr/bin/env bash
# Gate every checkpoint that has an entry in the baselines; one JUnit, Markdown and HTML report each.
#
#   bash gate.sh [--out FOLDER] [--level LEVEL] [ID...]
#
# PERSONALQ_REPO: the repository (default: ./checkpoints). PERSONALQ_BASELINES: its baselines (default: beside it).
# Exit 0: all passed. 1: a check failed, or a bundle is missing. 2: usage, or there is nothing to gate.
# As a git hook: ln -s ../../gate.sh .git/hooks/pre-push, with --level numerics in place of pictures.
set -u
out=gate-reports
level=images
ids=()
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --level) level=${2:?--level needs a level}; shift 2 ;;
    -*) echo "gate.sh: unknown option $1" >&2; exit 2 ;;
    *) ids+=("$1"); shift ;;
  esac
done
export PERSONALQ_REPO=${PERSONALQ_REPO:-checkpoints}
baselines=${PERSONALQ_BASELINES:-${PERSONALQ_REPO%/}.baselines.json}
python=${PYTHON:-python3}
if [ ! -f "$baselines" ]; then
  echo "gate.sh: $baselines: no such baselines; run 'personalq verify ID --update-baseline' and commit the file" >&2
  exit 2
fi
if [ ${#ids[@]} -eq 0 ]; then
  # Entries are '<checkpoint>/<spec>'.
  mapfile -t ids < <("$python" -c 'import json, sys; print(*sorted({k.split("/")[0] for k in json.load(open(sys.argv[1]))["bundles"]}), sep="\n")' "$baselines")
fi
mkdir -p "$out"
status=0
for id in "${ids[@]}"; do
  [ -n "$id" ] || { echo "gate.sh: $baselines: no entries" >&2; exit 2; }
  said=$(personalq verify "$id" --level "$level" --baseline "$baselines" \
    --junit "$out/$id.xml" --markdown "$out/$id.md" --html "$out/$id.html") || status=1
  echo "${said%%$'\n'*}"
done
exit $status
