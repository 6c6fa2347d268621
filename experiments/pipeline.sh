# What the chains of experiments/*/run.sh have in common; they set HERE, DATA, OUT, RUNS and PYTHON and source it.
#
# A stage is one command; when it has ended there is $OUT/STAGE.json, and it is not run again. So a chain can be
# stopped at any time, and goes on with the same command. To measure a stage anew, remove its JSON file and its folder
# in $RUNS, where checkpoints and logs of stages under way or done are. Stages that do not need each other run two at a
# time, a core each: that is faster than one after the other with two threads.
trap 'exit 130' INT TERM
trap 'exit 1' USR1  # a stage has failed
trap 'for job in $(jobs -rp); do kill -- -"$job"; done; wait' EXIT

stages() {  # COMMAND...: see stages.py
  "$PYTHON" -m experiments.stages "$@"
}

stage() {  # STAGE COMMAND...: runs it beside one other, unless it has been
  local name=$1 command
  shift
  command="${*//$PYTHON/python}"
  command="${command//$DATA/DATA}"
  if [ -e "$OUT/$name.json" ]; then
    grep -qF "\"command\": \"$command\"" "$OUT/$name.json" && return
    echo "$OUT/$name.json is of another command; remove it, to run: $command" >&2
    exit 1
  fi
  until_fewer_than 2
  echo "== $name: $command"
  run "$name" "$command" "$@" &
}

until_fewer_than() {  # N stages run
  while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do sleep 0.5; done
}

run() {  # STAGE TEXT COMMAND...; TEXT is the command as it is recorded
  local name=$1 command=$2 start=$SECONDS
  shift 2
  if [ "$(cat "$RUNS/$name.command" 2> /dev/null)" != "$command" ]; then  # what is there is of another command
    rm -rf "${RUNS:?}/$name"
    echo "$command" > "$RUNS/$name.command"
  fi
  if ! {
    OMP_NUM_THREADS=1 "$@" && stages record "$RUNS/$name" "$OUT/$name.json" \
      --seconds $((SECONDS - start)) --command "$command"
  } > "$RUNS/$name.log" 2>&1; then
    tail -n 3 "$RUNS/$name.log" >&2
    echo "$name has failed: $RUNS/$name.log" >&2
    kill -USR1 $$
  fi
}

export_weights() {  # RUN FILE; anew where the run is newer than what was kept
  [ "$2" -nt "$RUNS/$1/checkpoint.pth" ] || stages export "$RUNS/$1/checkpoint.pth" "$2"
}

once() {  # FILE COMMAND...: makes it, unless it is there; the last of what the command writes
  local file=$1
  shift
  [ -e "$file" ] || { echo "== $file"; "$@"; }
}

mkdir -p "$OUT" "$RUNS"
[ -d "$RUNS/data" ] || stages split "$DATA" "$RUNS/data"
stages logs "$OUT" "$RUNS"  # for the curves, of stages that another machine has run
