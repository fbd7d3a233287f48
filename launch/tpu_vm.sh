#!/usr/bin/env bash
# One run on one Cloud TPU slice, from creating the slice to resuming after a preemption. See --help and docs/cloud.md.
# Kept to bash 3.2, which macOS has: no mapfile, and ${list[@]+...} around lists that may be empty.
set -euo pipefail

usage() {
  cat << 'EOF'
usage: launch/tpu_vm.sh COMMAND [--FLAG=VALUE ...] [-- OVERRIDE ...]

  create   request the slice as a queued resource, wait until it is there
  setup    on all workers: mount the bucket, install Python and this checkout's last commit (or --repo at --ref)
  start    run kforcing_jax.main on all workers, detached; the work directory is /mnt/kforcing/RUN, in the bucket
  logs     follow the log of a worker
  status   state of the slice; state and last line of the process on each worker
  resume   after a preemption or a crash: create (if the slice is gone), setup, start as the last time
  stop     end the process on all workers
  delete   give the slice back; the bucket keeps the run

flags, or environment variables (KFORCING_ZONE, KFORCING_ACCELERATOR_TYPE, ...):
  --name=kforcing                  of the slice
  --zone=ZONE                      with quota for the accelerator type
  --project=PROJECT
  --accelerator-type=v5litepod-8
  --runtime-version=VERSION        by default what suits the type
  --spot, --no-spot                spot by default
  --bucket=BUCKET                  holds the runs; in the zone's region
  --config=configs/lm1b.py         a path in the repository
  --run=RUN                        by default the name of the config
  --repo=URL, --ref=HEAD           install this branch, tag or commit from git instead of this checkout
  --worker=0                       for logs
  --dry-run                        print the commands, one a line; run none

What follows -- goes to kforcing_jax.main, for example -- --config.mesh.fsdp=8. All settings are kept in
~/.local/state/kforcing_jax, so the commands after create need the name alone; a flag given again wins.
EOF
}

# Kept from one command to the next, as are the overrides of the last start.
settings=(zone project accelerator_type runtime_version spot bucket config run repo ref)
zone='' project='' accelerator_type=v5litepod-8 runtime_version='' spot=true bucket='' config=configs/lm1b.py run='' repo=''
ref=HEAD name=${KFORCING_NAME:-kforcing} worker=0 dry_run='' started='' given=() overrides=() new_overrides=()
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mount=/mnt/kforcing unit=kforcing_jax
exec 3>&1 # where --dry-run prints, also from within $(...)

fail() {
  echo "error: $*" >&2
  exit 2
}

# One argument as a shell reads it back.
quote() {
  local single="'" escaped="'\\''"
  case $1 in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "'%s'" "${1//$single/$escaped}" ;;
    *) printf '%s' "$1" ;;
  esac
}

execute() {
  local argument line=''
  if [[ ! $dry_run ]]; then
    "$@"
  else
    for argument in "$@"; do line+=" $(quote "$argument")"; done
    echo "${line# }" >&3
  fi
}

# A script of && chains as one line, so that the command around it is one.
flat() { sed 's/^ *//' | paste -sd ' ' -; }

on() { # WORKER SCRIPT
  execute gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

parse() {
  local flag
  while (($#)); do
    flag=${1%%=*} flag=${flag#--} flag=${flag//-/_}
    case $1 in
      -h | --help) usage && exit ;;
      --dry-run) dry_run=yes ;;
      --spot) given+=(spot=true) ;;
      --no-spot) given+=(spot=false) ;;
      --name=*) name=${1#*=} ;;
      --)
        new_overrides=("${@:2}")
        return
        ;;
      --*=*)
        [[ " worker ${settings[*]} " == *" $flag "* ]] || fail "unknown flag --${flag//_/-}; see --help"
        given+=("$flag=${1#*=}")
        ;;
      *) fail "unexpected argument $1; flags are --FLAG=VALUE, see --help" ;;
    esac
    shift
  done
}

# Flags win over the environment, that over the last time, and this over the defaults.
settle() {
  local setting variable
  state=${XDG_STATE_HOME:-$HOME/.local/state}/kforcing_jax/$name
  # shellcheck source=/dev/null
  [[ $command == create || ! -f $state/settings ]] || source "$state/settings"
  [[ $command != start ]] || overrides=(${new_overrides[@]+"${new_overrides[@]}"})
  for setting in worker "${settings[@]}"; do
    variable=KFORCING_$(tr '[:lower:]' '[:upper:]' <<< "$setting")
    [[ ! ${!variable-} ]] || printf -v "$setting" %s "${!variable}"
  done
  for setting in ${given[@]+"${given[@]}"}; do printf -v "${setting%%=*}" %s "${setting#*=}"; done
  bucket=${bucket#gs://} folder=${config##*/}
  folder=${run:-${folder%%.*}}
  where=(--zone="$zone" --project="$project")
}

keep() {
  local setting
  [[ ! $dry_run ]] || return 0
  mkdir -p "$state"
  {
    for setting in started "${settings[@]}"; do printf '%s=%q\n' "$setting" "${!setting}"; done
    for setting in ${overrides[@]+"${overrides[@]}"}; do printf 'overrides+=(%q)\n' "$setting"; done
  } > "$state/settings"
}

check() {
  local override
  [[ $name =~ ^[a-z][-a-z0-9]*$ ]] || fail "--name=$name should be lower-case letters, digits and hyphens"
  [[ $zone ]] || fail "--zone is missing"
  [[ $project ]] || fail "--project is missing"
  [[ $spot == true || $spot == false ]] || fail "--spot=$spot should be true or false"
  [[ $worker =~ ^[0-9]+$ ]] || fail "--worker=$worker should be a number"
  [[ $command == start || ! ${new_overrides[*]+given} ]] || fail "$command takes no overrides; start does"
  [[ $command != resume || $started ]] || fail "$name was never started from here; use create, setup and start"
  for override in ${overrides[@]+"${overrides[@]}"}; do
    [[ $override == --* && $override != *$'\n'* ]] || fail "override ${override%%$'\n'*} should be a flag of kforcing_jax.main, on one line"
  done
  case $command in create | logs | status | stop | delete) return ;; esac
  [[ $bucket ]] || fail "--bucket is missing"
  [[ $bucket =~ ^[a-z0-9][-_.a-z0-9]*$ ]] || fail "--bucket=$bucket should be the name of a bucket, without folders"
  [[ $folder =~ ^[A-Za-z0-9][-_.A-Za-z0-9]*$ ]] || fail "--run=$folder should be letters, digits and . - _"
  [[ $repo || -f $root/${config%%:*} ]] || fail "--config=$config: no such file in $root"
}

queued_state() {
  # A list, because describe fails alike for a slice that is not there and for a network that is not.
  execute gcloud compute tpus queued-resources list "${where[@]}" --filter="name~/$name\$" --format='value(state.state)'
}

node_state() { execute gcloud compute tpus tpu-vm describe "$name" "${where[@]}" --format='value(state)'; }

request() {
  local version tier=()
  [[ $spot == false ]] || tier=(--spot)
  case $accelerator_type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
  execute gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$accelerator_type" --runtime-version="${runtime_version:-$version}" ${tier[@]+"${tier[@]}"}
}

remove() { execute gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

wait_until_ready() {
  local queued node
  while true; do
    node=''
    queued=$(queued_state)
    # The node appears some time after the request is granted.
    [[ $queued != ACTIVE && ! $dry_run ]] || node=$(node_state 2> /dev/null || true)
    [[ ! $dry_run && $queued/$node != ACTIVE/READY ]] || return 0
    case $queued/$node in
      / | FAILED/ | SUSPEND*/ | DELETING/ | ACTIVE/PREEMPTED | ACTIVE/TERMINATED)
        fail "slice $name is ${queued:-not there}${node:+, its node $node}; create it, or resume" ;;
    esac
    echo "waiting for $name: $queued${node:+, node $node}" >&2
    sleep 30
  done
}

setup_script() {
  local keyring=/usr/share/keyrings/cloud.google.asc source='tar -xzf ~/kforcing_jax.tar.gz -C ~/kforcing_jax'
  local apt='sudo apt-get -qq -o DPkg::Lock::Timeout=600' # a fresh machine upgrades itself first
  if [[ $repo ]]; then
    source="cd ~/kforcing_jax && git init -q && git fetch -q --depth=1 $(quote "$repo") $(quote "$ref") &&
      git checkout -q FETCH_HEAD"
  fi
  # gcsfuse: orbax and prepare end with renaming a folder, in which a bucket without hierarchical namespace may have
  # rename-dir-limit files. Workers have to see each other's files at once, and on TPU machines the default is to look
  # once and never again. Training reads rows in random order, so whole files are cached on the local disk.
  flat << EOF
    set -o pipefail &&
    { ! systemctl is-active --quiet $unit || {
      echo "error: a run is active on \$(hostname); stop it first" >&2; exit 1; }; } &&
    { command -v gcsfuse > /dev/null || {
      curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $keyring > /dev/null &&
      echo "deb [signed-by=$keyring] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null &&
      $apt update && $apt install -y gcsfuse; }; } &&
    { ! mountpoint -q $mount || sudo umount $mount; } &&
    sudo install -d -o "\$USER" $mount &&
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0
      --cache-dir="\$HOME/.cache/gcsfuse" --file-cache-max-size-mb=40000 --file-cache-cache-file-for-range-read
      $bucket $mount &&
    rm -rf ~/kforcing_jax && mkdir ~/kforcing_jax && $source &&
    { test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
    ~/.local/bin/uv venv -q --python=3.12 ~/kforcing_jax/.venv &&
    ~/.local/bin/uv pip install -q --python="\$HOME/kforcing_jax/.venv/bin/python"
      -c "\$HOME/kforcing_jax/requirements.lock" -e "\$HOME/kforcing_jax[lm1b,parquet,tpu]" &&
    echo "\$(hostname) ready"
EOF
}

set_up() {
  local archive=$state/kforcing_jax.tar.gz
  if [[ ! $repo ]]; then
    if [[ ! $dry_run ]]; then
      git -C "$root" diff --quiet HEAD 2> /dev/null ||
        fail "$root has changes that are not committed, or is no git checkout; commit them, or give --repo"
      mkdir -p "$state"
    fi
    execute git -C "$root" archive --format=tar.gz --output="$archive" "$ref"
    execute gcloud compute tpus tpu-vm scp "$archive" "$name:kforcing_jax.tar.gz" "${where[@]}" --worker=all
  fi
  on all "$(setup_script)"
}

# HOST, STATE and the last line of the log, for every worker.
processes() {
  on all "echo \"\$(hostname) \$(systemctl is-active $unit) \$(tail -n 1 ~/kforcing_jax.log 2> /dev/null)\""
}

start_script() {
  local dollar='$' argument arguments=''
  for argument in "--config=$config" "--workdir=$mount/$folder" ${overrides[@]+"${overrides[@]}"}; do
    arguments+=" $(quote "${argument//$dollar/$dollar$dollar}")" # systemd replaces $NAME in commands, and $$ by $
  done
  # A reboot undoes the mount, and a run would fill the disk below it. Without a TPU it should fail, not train on the
  # CPU. libtpu pins its memory. A SIGTERM stops training after a step, with a checkpoint.
  flat << EOF
    { { mountpoint -q $mount && test -x ~/kforcing_jax/.venv/bin/python; } || {
      echo "error: \$(hostname) is not set up; run setup first" >&2; exit 1; }; } &&
    { sudo systemctl reset-failed $unit 2> /dev/null || true; } &&
    sudo systemd-run --quiet --unit=$unit --uid="\$USER" --working-directory="\$HOME/kforcing_jax"
      --setenv=JAX_PLATFORMS=tpu,cpu
      -p LimitMEMLOCK=infinity -p LimitNOFILE=1048576 -p TasksMax=infinity -p TimeoutStopSec=120
      -p StandardOutput=append:"\$HOME/kforcing_jax.log"
      "\$HOME/kforcing_jax/.venv/bin/python" -u -m kforcing_jax.main$arguments
EOF
}

start() {
  local active
  active=$(processes | awk '$2 == "active"')
  [[ ! $active ]] || fail "a run is active on $name; follow it with logs, or end it with stop"
  started=yes
  keep
  on all "$(start_script)"
}

stop() { on all "sudo systemctl stop $unit 2> /dev/null || true"; }

resume() {
  local queued node='' idle
  queued=$(queued_state)
  [[ $queued != ACTIVE && ! $dry_run ]] || node=$(node_state)
  case ${dry_run:+dry run}$queued/$node in
    ACTIVE/READY)
      idle=$(processes | awk '$2 != "active"')
      [[ $idle ]] || fail "the run is active on all workers of $name"
      stop # a worker that is left waits for those that are gone
      ;;
    'dry run/' | FAILED/ | SUSPEND*/ | ACTIVE/PREEMPTED | ACTIVE/TERMINATED)
      remove
      request
      ;;
    /) request ;;
  esac
  wait_until_ready
  set_up
  start
}

status() {
  local queued
  queued=$(queued_state)
  [[ $dry_run ]] || echo "$name: ${queued:-no slice}"
  [[ $queued == ACTIVE || $dry_run ]] || return 0
  node_state
  processes
}

command=${1-}
case $command in
  create | setup | start | logs | status | resume | stop | delete) ;;
  -h | --help) usage && exit ;;
  *) fail "which command? There is no ${command:-empty one}; see --help" ;;
esac
parse "${@:2}"
settle
check
[[ $dry_run ]] || command -v gcloud > /dev/null ||
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

case $command in
  create)
    request
    keep
    wait_until_ready
    ;;
  setup)
    keep
    wait_until_ready
    set_up
    ;;
  logs) on "$worker" 'tail -n 100 -F ~/kforcing_jax.log' ;;
  delete) remove ;;
  *) "$command" ;;
esac
