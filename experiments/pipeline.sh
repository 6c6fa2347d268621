# Common part of the pipelines experiments/*/*.sh, which set HERE, DATA, OUT, RUNS and PYTHON and then source this file.
#
# A stage is one command. Its result is recorded as $OUT/STAGE.json, and a recorded stage is skipped. A pipeline can
# therefore be stopped at any time and resumed with the same command. To measure a stage again, remove its JSON file and
# its folder in $RUNS, which holds checkpoints and logs. Independent stages run JOBS at a time, 2 by default, on one core
# each. That is faster than one after the other with two threads.
trap 'exit 130' INT TERM
trap 'exit 1' USR1  # sent by a stage that failed
trap 'for job in $(jobs -rp); do kill -- -"$job"; done; wait' EXIT

stages() {  # COMMAND...: see stages.py
  "$PYTHON" -m experiments.stages "$@"
}

stage() {  # STAGE COMMAND...: run the command in the background, unless its result is recorded
  local name=$1 command
  shift
  command="${*//$PYTHON/python}"
  command="${command//$DATA/DATA}"
  if [ -e "$OUT/$name.json" ]; then
    grep -qF "\"command\": \"$command\"" "$OUT/$name.json" && return
    echo "$OUT/$name.json was recorded by a different command. Remove the file to run: $command" >&2
    exit 1
  fi
  until_fewer_than "${JOBS:-2}"
  echo "== $name: $command"
  run "$name" "$command" "$@" &
}

until_fewer_than() {  # N: wait until fewer than N stages are running
  while [ "$(jobs -rp | wc -l)" -ge "$1" ]; do sleep 0.5; done
}

run() {  # STAGE TEXT COMMAND...: run and record the command; TEXT is the command as it is recorded
  local name=$1 command=$2 start=$SECONDS
  shift 2
  if [ "$(cat "$RUNS/$name.command" 2> /dev/null)" != "$command" ]; then  # the folder is of a different command
    rm -rf "${RUNS:?}/$name"
    echo "$command" > "$RUNS/$name.command"
  fi
  if ! {
    OMP_NUM_THREADS=1 "$@" && stages record "$RUNS/$name" "$OUT/$name.json" \
      --seconds $((SECONDS - start)) --command "$command"
  } > "$RUNS/$name.log" 2>&1; then
    tail -n 3 "$RUNS/$name.log" >&2
    echo "stage $name failed, see $RUNS/$name.log" >&2
    kill -USR1 $$
  fi
}

export_weights() {  # RUN FILE: export the weights of RUN, unless FILE is newer
  [ "$2" -nt "$RUNS/$1/checkpoint.pth" ] || stages export "$RUNS/$1/checkpoint.pth" "$2"
}

once() {  # FILE COMMAND...: run the command unless FILE exists; the command must write FILE last
  local file=$1
  shift
  [ -e "$file" ] || { echo "== $file"; "$@"; }
}

[ "$(type -t prepare_data)" ] || prepare_data() {  # a script of another dataset has its own
  stages split "$DATA" "$RUNS/data"
}

mkdir -p "$OUT" "$RUNS"
[ -d "$RUNS/data" ] || prepare_data
stages logs "$OUT" "$RUNS"  # the curves also need the logs of stages that ran on another machine
