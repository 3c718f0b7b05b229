"""The launchers of tpu/: what they would run, and what they do against a gcloud that runs two hosts as local shells.

No real client is started, but for its --help or its schema, where it is installed. Nothing can be created.
"""

import contextlib
import importlib.util
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TPU = ROOT / "tpu"
SFT = ["--", "sft", "configs/3b/sft.yaml", "--output", "/gcs/runs/sft", "--checkpoints", "gs://my-bucket/sft"]
QUEUED = ["--type", "v5p-16", "--zone", "us-east5-a", "--bucket", "my-bucket"]
GKE = ["--image", "example.com/gvl:1", "--bucket", "my-bucket"]
SKY = ["--bucket", "my-bucket"]
SLICES = ["v5e-4", "v5e-8", "v5e-16", "v5p-8", "v5p-16", "v5p-128", "v5p-512", "v6e-4", "v6e-8", "v6e-64"]

# One slice, a file with the states it goes through, and two hosts, which are home folders. A job goes on when the
# connection ends. `plan` of a host: what the gvl there does each time it is started.
GCLOUD = """#!PYTHON
import json, os, pathlib, re, signal, subprocess, sys, time
world, words = pathlib.Path(os.environ["WORLD"]), sys.argv[1:]
slice_, hosts = world / "slice", [world / "0", world / "1"]
with open(world / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\\n")
command = next((word.removeprefix("--command=") for word in words if word.startswith("--command=")), "")
if "describe" in words:
    if not slice_.exists():
        sys.exit("ERROR: (gcloud.describe) NOT_FOUND: Resource was not found")
    states = slice_.read_text().split()
    if "tpu-vm" not in words:
        slice_.write_text(" ".join(states[1:] or states))
    print("READY" if "tpu-vm" in words else states[0])
elif "create" in words:
    slice_.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif "delete" in words:
    if (world / "undeletable").exists() or (world / "flaky").exists():
        (world / "flaky").unlink(missing_ok=True)
        sys.exit("ERROR: (gcloud.delete) INTERNAL")
    for pid in world.glob("?/gvl/runs/*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    for host in hosts:
        subprocess.run(["rm", "-rf", host / "gvl"])
    slice_.unlink(missing_ok=True)
elif "ssh" in words and "gvl-exit" not in command:
    for host in hosts:
        (host / "gvl/src").mkdir(parents=True, exist_ok=True)
        (host / "gvl/env/bin").mkdir(parents=True, exist_ok=True)
        (host / "gvl/env/bin/gvl").symlink_to(world / "gvl")
elif "ssh" in words:
    shells = [subprocess.Popen(["bash", "-c", command], env={**os.environ, "HOME": str(host)}) for host in hosts]
    if (world / "drop").exists():
        (world / "drop").unlink()
        while not all((host / "gvl/live/log").exists() for host in hosts):
            time.sleep(0.02)
        for shell in shells:
            shell.kill()
        sys.exit(255)
    sys.exit(next((code for code in [shell.wait() for shell in shells] if code), 0))
"""
GVL = """#!/bin/bash
printf '%s\\n' "$@" > ~/args
echo "$GVL_DISTRIBUTED" >> ~/starts
what=$(head -n 1 ~/plan); sed -i 1d ~/plan
echo "gvl does $what"
case $what in
  preempted) echo SUSPENDED > "$WORLD/slice"; exec /bin/sleep 60;;
  hang) exec /bin/sleep 60;;
  slow) /bin/sleep 1; exit 0;;
  killed) kill -KILL $$;;
esac
exit "$what"
"""


@pytest.fixture
def world(tmp_path):
    """A folder with the clients; PATH begins with it, and no client finds an account. At the end no job is left."""
    hostname = "#!/bin/sh\nbasename $HOME-w-1"
    gcloud = GCLOUD.replace("PYTHON", sys.executable)
    tools = {
        "gcloud": gcloud,
        "gvl": GVL,
        "hostname": hostname,
        "git": "#!/bin/sh",
        "sleep": "#!/bin/sh\n/bin/sleep .1",
    }
    recorder = f'#!/bin/bash\nprintf "%s\\n" "$0 $*" >> {tmp_path}/calls; cat > {tmp_path}/stdin'
    for name, text in {**tools, **dict.fromkeys(("kubectl", "xpk", "sky"), recorder)}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for host in "01":
        (tmp_path / host).mkdir()
    yield tmp_path
    for job in tmp_path.glob("?/gvl/runs/*/pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(job.read_text()), signal.SIGKILL)


def environment(world):
    no_account = {"CLOUDSDK_CONFIG": str(world / "none"), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    return {"PATH": f"{world}:/usr/bin:/bin", "HOME": str(world), "WORLD": str(world), **no_account}


def launch(world, script, *words, **how):
    command = [sys.executable, str(TPU / script), *words]
    how = {"stdin": subprocess.DEVNULL, "timeout": 60, **how}
    return subprocess.run(command, cwd=world, env=environment(world), capture_output=True, text=True, **how)


def calls(world):
    log = world / "calls"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def times(world, verb):
    return sum(verb in words for words in calls(world))


def plan(world, first, second):
    for host, steps in (("0", first), ("1", second)):
        (world / host / "plan").write_text("\n".join(steps) + "\n")


def up(world, *words, verb="up"):
    return launch(world, "queued.py", verb, *QUEUED, "--poll", "0.05", "--yes", *words, *SFT)


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(TPU)
    return importlib.import_module(name)


def dry(script, *words):
    done = subprocess.run([sys.executable, str(TPU / script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, accelerator, chips, hosts, machine",
    [
        ("v5e-4", "v5litepod-4", 4, 1, "ct5lp-hightpu-4t"),
        ("v5e-8", "v5litepod-8", 8, 1, "ct5lp-hightpu-8t"),
        ("v5e-16", "v5litepod-16", 16, 4, "ct5lp-hightpu-4t"),
        ("v5p-8", "v5p-8", 4, 1, "ct5p-hightpu-4t"),
        ("v5p-16", "v5p-16", 8, 2, "ct5p-hightpu-4t"),
        ("v5p-128", "v5p-128", 64, 16, "ct5p-hightpu-4t"),
        ("v5p-512", "v5p-512", 256, 64, "ct5p-hightpu-4t"),
        ("v6e-4", "v6e-4", 4, 1, "ct6e-standard-4t"),
        ("v6e-8", "v6e-8", 8, 1, "ct6e-standard-8t"),
        ("v6e-64", "v6e-64", 64, 16, "ct6e-standard-4t"),
    ],
)
def test_the_table_counts_as_google_does(name, accelerator, chips, hosts, machine, monkeypatch):
    size = module("slices", monkeypatch).SLICES[name]
    assert (size.accelerator, size.chips, size.hosts, size.machine) == (accelerator, chips, hosts, machine)


# ---- what would be run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLICES)
def test_a_dry_run_of_up_prints_every_command_and_runs_none(world, name, monkeypatch):
    size = module("slices", monkeypatch).SLICES[name]
    done = launch(world, "queued.py", "up", *QUEUED, "--type", name, "--dry-run", *SFT)
    assert done.returncode == 0 and not (world / "calls").exists()
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert {words[0] for words in commands} == {"gcloud", "mkdir", "git"}
    create = next(words for words in commands if "create" in words)
    assert f"--accelerator-type={size.accelerator}" in create and "--spot" in create
    assert f"--runtime-version={size.generation.runtime}" in create
    assert sum("--worker=all" in words for words in commands) == 3  # copy, install, run
    assert sum(any("gvl/runs" in word for word in words) and "scp" in words for words in commands) == size.hosts
    assert commands[-1][4:6] == ["delete", "gvl"]


def test_capacity_decides_the_flags_of_create():
    lines = {c: dry("queued.py", "create", *QUEUED, "--capacity", c, "--dry-run") for c in ("on-demand", "flex-start")}
    assert "--spot" not in lines["on-demand"] and "--provisioning-model" not in lines["on-demand"]
    assert lines["flex-start"].startswith("gcloud alpha ") and "--provisioning-model=flex-start" in lines["flex-start"]
    assert "--max-run-duration=24h" in lines["flex-start"] and "--spot" not in lines["flex-start"]


def test_install_from_git_copies_nothing():
    line = dry("queued.py", "install", *QUEUED, "--git", "https://example.com/gvl", "--ref", "v1", "--dry-run")
    assert "git clone --quiet https://example.com/gvl src; git -C src checkout --quiet v1" in shlex.split(line)[-2]
    assert "scp" not in line and len(line.splitlines()) == 1


# ---- nothing is created, or lost, by accident ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, words",
    [
        ("queued.py", ["up", *QUEUED]),
        ("queued.py", ["create", *QUEUED]),
        ("queued.py", ["run", *QUEUED]),
        ("gke.py", ["--type", "v5p-16", *GKE]),
        ("gke.py", ["--type", "v5p-16", *GKE, "--xpk", "--cluster", "c"]),
        ("sky.py", ["--type", "v5p-16", *SKY]),
    ],
)
def test_nothing_is_created_without_a_yes(world, script, words):
    done = launch(world, script, *words, *SFT)
    assert done.returncode == 2 and "give --yes" in done.stderr
    assert "v5p-16: 8 chips on 2 host(s), spot" in done.stderr and re.search("[Bb]ill", done.stderr)
    assert not (world / "calls").exists()


@pytest.mark.parametrize("answer, code, created", [("n\n", 2, False), ("\n", 2, False), ("y\n", 0, True)])
def test_a_terminal_is_asked(world, answer, code, created):
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    done = launch(world, "gke.py", "--type", "v5p-16", *GKE, *SFT, stdin=theirs)
    assert done.returncode == code and (world / "calls").exists() == created


@pytest.mark.parametrize(
    "words, message",
    [
        ([*QUEUED, "--", "sft", "c.yaml", "--checkpoints", "gs://b/x"], "--output /gcs/"),
        ([*QUEUED, "--", "sft", "c.yaml", "--output", "/gcs/x"], "--checkpoints gs://"),
        ([*QUEUED, "--", "rl", "c.yaml", "--output", "/gcs/x", "--checkpoints=/tmp/x"], "--checkpoints gs://"),
        ([*QUEUED, "--", "moderate", "m", "--output", "/gcs/x"], "every host would judge every row"),
        ([*QUEUED, "--type", "v6e-8", "--", "moderate", "m"], "--output /gcs/"),
        ([*QUEUED[:-2], *SFT], "--bucket"),
        ([*QUEUED], "gvl command"),
        ([*QUEUED, "--name", "a;b", *SFT], "a;b"),
        ([*QUEUED, "--bucket", "gs://b", *SFT], "gs://b"),
    ],
)
def test_what_would_be_lost_with_the_node_or_done_by_every_host_is_refused(world, words, message):
    done = launch(world, "queued.py", "up", "--yes", *words)
    assert done.returncode == 2 and message in done.stderr and not (world / "calls").exists()


# ---- queued.py against hosts that run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second, code, starts, creates",
    [
        (["0"], ["0"], 0, 1, 1),
        (["75", "0"], ["75", "0"], 0, 2, 1),
        (["killed", "0"], ["134", "0"], 0, 2, 1),  # the host that dies takes the other one with it
        (["preempted", "0"], ["hang", "0"], 0, 2, 2),
        (["1"], ["1"], 1, 1, 1),
        (["134"], ["1"], 1, 1, 1),  # an error on one host, which took the other one with it: it would come again
        (["1"], ["76"], 1, 1, 1),
        (["2"], ["2"], 2, 1, 1),
        (["75"] * 3, ["75"] * 3, 75, 3, 1),
        (["137"] * 3, ["76"] * 3, 75, 3, 1),
    ],
    ids=[
        "done",
        "75",
        "killed",
        "preempted",
        "error",
        "error on one host",
        "76 beside it",
        "usage",
        "75 for ever",
        "lost for ever",
    ],
)
def test_what_is_started_again(world, first, second, code, starts, creates):
    plan(world, first, second)
    done = up(world, "--max-restarts", "2")
    assert done.returncode == code, done.stderr
    for host in "01":
        assert (world / host / "starts").read_text().split() == ["1"] * starts  # GVL_DISTRIBUTED
    assert times(world, "create") == creates == times(world, "delete")
    assert sum("set -eu" in " ".join(words) for words in calls(world)) == creates  # installs
    assert not (world / "slice").exists()
    assert f"--worker={1}" in [word for words in calls(world) for word in words]  # logs of the second host
    if code in (1, 2):
        assert "not started again" in done.stderr
    if code == 75:
        assert "more than 2 restarts, giving up" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_kill_or_a_closed_terminal_delete_the_slice(world, number):
    plan(world, ["hang"], ["hang"])
    command = [sys.executable, str(TPU / "queued.py"), "up", *QUEUED, "--poll", "0.05", "--yes", *SFT]
    child = subprocess.Popen(command, env=environment(world), cwd=world, stderr=subprocess.PIPE, text=True)
    until(lambda: (world / "0/starts").exists() and (world / "1/starts").exists())
    if number == signal.SIGHUP:
        child.stderr.close()  # nobody reads any more, and the first try fails
        (world / "flaky").touch()
    child.send_signal(number)
    if number == signal.SIGHUP:
        child.wait(timeout=30)
    else:
        _, said = child.communicate(timeout=30)
        assert child.returncode == 130 and "is deleted" in said
    assert times(world, "delete") == 1 + (number == signal.SIGHUP) and not (world / "slice").exists()


def test_ctrl_c_in_run_leaves_the_job_and_run_attaches_to_it_again(world):
    assert up(world, verb="create").returncode == up(world, verb="install").returncode == 0
    plan(world, ["hang"], ["hang"])
    command = [sys.executable, str(TPU / "queued.py"), "run", *QUEUED, "--poll", "0.05", "--yes", *SFT]
    child = subprocess.Popen(command, env=environment(world), cwd=world, stderr=subprocess.PIPE, text=True)
    until(lambda: all((world / host / "starts").exists() for host in "01"))
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 130 and "so does billing" in said and times(world, "delete") == 0
    jobs = [int((world / host / "gvl/live/pid").read_text()) for host in "01"]
    again = subprocess.Popen(command, env=environment(world), cwd=world, stderr=subprocess.PIPE, text=True)
    until(lambda: sum("gvl-exit" in " ".join(words) for words in calls(world)) == 2)
    time.sleep(0.3)
    for job in jobs:
        os.killpg(job, signal.SIGKILL)  # the job, and what would have told its exit code: 137
    plan(world, ["0"], ["0"])
    _, said = again.communicate(timeout=30)
    assert again.returncode == 0 and "exit codes [137]; restart 1" in said
    assert [(world / host / "starts").read_text().split() for host in "01"] == [["1", "1"]] * 2


def test_a_broken_connection_starts_nothing_twice(world):
    plan(world, ["slow"], ["slow"])
    (world / "drop").touch()
    done = up(world)
    assert done.returncode == 0 and "the connection was lost; restart 1" in done.stderr
    assert [(world / host / "starts").read_text() for host in "01"] == ["1\n", "1\n"]


def test_up_leaves_a_slice_of_that_name_alone(world):
    (world / "slice").write_text("ACTIVE")
    done = up(world)
    assert done.returncode == 1 and "is ACTIVE, expected none of that name" in done.stderr
    assert times(world, "delete") == times(world, "create") == 0


def test_a_slice_that_cannot_be_deleted_is_told(world):
    plan(world, ["0"], ["0"])
    (world / "undeletable").touch()
    done = up(world)
    assert done.returncode == 1 and times(world, "delete") == 3
    assert "MAY STILL EXIST AND BE BILLED" in done.stderr and "queued-resources delete gvl" in done.stderr


def test_keep_keeps_it(world):
    plan(world, ["0"], ["0"])
    done = up(world, "--keep")
    assert done.returncode == 0 and times(world, "delete") == 0 and "kept, and billed until" in done.stderr


@pytest.mark.parametrize("own", [False, True])
def test_stops_and_preemptions_count_for_an_hour_and_what_gvl_did_itself_for_good(own, monkeypatch):
    too_often = module("queued", monkeypatch).too_often
    assert not too_often([(0.0, own), (10.0, own)], 2) and too_often([(0.0, own), (10.0, own), (3599.0, own)], 2)
    assert too_often([(0.0, own), (4000.0, own), (8000.0, own)], 2) == own


HOSTILE = """it's "one" $(touch pwned) `touch pwned`; touch pwned & *  $HOME.yaml"""


def test_words_reach_gvl_as_they_are(world):
    plan(world, ["0"], ["0"])
    words = ["sft", HOSTILE, *SFT[3:], "--x", "", "--y=ä\\"]
    done = launch(world, "queued.py", "up", *QUEUED, "--poll", "0.05", "--yes", "--", *words)
    assert done.returncode == 0, done.stderr
    assert [(world / host / "args").read_text() for host in "01"] == ["\n".join(words) + "\n"] * 2
    assert not list(world.rglob("pwned"))


# ---- GKE -------------------------------------------------------------------------------------------------------------

# The fields of a JobSet that we use, as its CRD (v1alpha2) and those of a pod declare them; another field is an error.
CONTAINER = {
    "name": str, "image": str, "command": [str], "args": [str], "env": [{"name": str, "value": str}],
    "securityContext": {"runAsUser": int, "capabilities": {"add": [str]}},
    "resources": {"limits": {"google.com/tpu": int}}, "volumeMounts": [{"name": str, "mountPath": str}],
}  # fmt: skip
POD = {
    "restartPolicy": ("Never",), "terminationGracePeriodSeconds": int, "serviceAccountName": str,
    "nodeSelector": {str: str}, "tolerations": [{"key": str, "operator": ("Exists",), "effect": ("NoSchedule",)}],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": {str: str}}}],
}  # fmt: skip
WHEN = {
    "action": ("FailJob", "FailIndex", "Ignore", "Count"),
    "onExitCodes": {"containerName": str, "operator": ("In", "NotIn"), "values": [int]},
    "onPodConditions": [{"type": str, "status": ("True", "False", "Unknown")}],
}
JOB = {
    "completionMode": ("Indexed", "NonIndexed"), "completions": int, "parallelism": int, "backoffLimit": int,
    "podFailurePolicy": {"rules": [WHEN]}, "template": {"metadata": {"annotations": {str: str}}, "spec": POD},
}  # fmt: skip
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
RULE = {"name": str, "action": ACTIONS, "onJobFailureReasons": [REASONS]}
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",), "kind": ("JobSet",),
    "metadata": {"name": str, "annotations": {str: str}},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [RULE]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def check(value, form, where="manifest"):
    if isinstance(form, dict):
        assert isinstance(value, dict), where
        for key, inner in value.items():
            assert key in form or str in form, f"{where}.{key} is no field"
            check(inner, form.get(key, form.get(str)), f"{where}.{key}")
    elif isinstance(form, list):
        assert isinstance(value, list) and value, where
        for number, inner in enumerate(value):
            check(inner, form[0], f"{where}[{number}]")
    elif isinstance(form, tuple):
        assert value in form, (where, value, form)
    else:
        assert type(value) is form, (where, value, form)


def manifest(*words):
    return yaml.safe_load(dry("gke.py", *GKE, "--dry-run", *words))


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("capacity", ["spot", "on-demand"])
def test_the_manifest_fits_the_schema_and_the_slice(name, capacity, monkeypatch):
    size = module("slices", monkeypatch).SLICES[name]
    tree = manifest("--type", name, "--capacity", capacity, *SFT)
    check(tree, JOBSET)
    job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completions"] == job["parallelism"] == size.hosts and job["completionMode"] == "Indexed"
    assert job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == size.chips
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == size.topology
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == (capacity == "spot")
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_75_restarts_the_set_for_ever_and_76_or_an_error_does_not():
    tree = manifest("--type", "v5p-16", "--max-restarts", "3", *SFT)
    job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = [rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [[75]] and job["backoffLimit"] == 0
    (rule,) = tree["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == (ACTIONS[2], ["PodFailurePolicy"])
    assert tree["spec"]["failurePolicy"]["maxRestarts"] == 3
    names = {container["name"] for container in job["template"]["spec"]["containers"]}
    assert {r["onExitCodes"]["containerName"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r} <= names


def test_a_pod_gives_gvl_its_words_as_they_are(tmp_path):
    """The command of the container, run here, with the expansion that Kubernetes makes."""
    words = ["sft", HOSTILE, *SFT[3:]]
    tree = manifest("--type", "v5p-16", "--", *words)
    container = tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "gvl").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "gvl").chmod(0o755)
    expanded = [word.replace("$$(", "$(") for word in container["args"]]
    assert all("$(" not in word.replace("$$(", "") for word in container["args"])
    command = [word.replace("ulimit -l 68719476736", "true") for word in container["command"]]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run([*command, *expanded], env=path, capture_output=True, text=True)
    assert done.stdout.splitlines() == words
    assert {"name": "GVL_DISTRIBUTED", "value": "1"} in container["env"]


def test_kubectl_gets_the_manifest_that_the_dry_run_shows(world):
    words = ["--type", "v5p-16", *GKE]
    assert launch(world, "gke.py", *words, "--yes", *SFT).returncode == 0
    shown = dry("gke.py", *words, "--dry-run", *SFT)
    assert yaml.safe_load((world / "stdin").read_text()) == yaml.safe_load(shown)
    assert (world / "calls").read_text().split("/")[-1] == "kubectl apply --filename=-\n"


def xpk(*words):
    return shlex.split(dry("gke.py", "--type", "v5e-16", *GKE, "--xpk", "--cluster", "c", "--dry-run", *words))


def test_xpk_runs_the_same_command_with_the_same_rules():
    words = xpk("--zone", "z", "--project", "p", "--", "sft", HOSTILE, *SFT[3:])
    assert words[:3] == ["xpk", "workload", "create"] and "--tpu-type=v5litepod-16" in words
    assert "--restart-on-exit-codes=75,76" in words
    command = next(word.removeprefix("--command=") for word in words if word.startswith("--command="))
    assert shlex.split(command) == ["exec", "env", "GVL_DISTRIBUTED=1", "gvl", "sft", HOSTILE, *SFT[3:]]


# ---- SkyPilot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SLICES)
def test_the_sky_task_names_the_slice_and_recovers(name, monkeypatch):
    size = module("slices", monkeypatch).SLICES[name]
    tree = yaml.safe_load(dry("sky.py", "--type", name, *SKY, "--zone", "us-east5-a", "--dry-run", *SFT))
    resources = tree["resources"]
    assert resources["accelerators"] == f"tpu-{size.accelerator}" and resources["infra"] == "gcp/us-east5/us-east5-a"
    assert resources["use_spot"] and resources["job_recovery"]["recover_on_exit_codes"] == [75]
    assert tree["file_mounts"] == {"/gcs": {"source": "gs://my-bucket", "mode": "MOUNT"}}
    assert shlex.split(tree["run"])[1:] == SFT[1:] and tree["envs"]["GVL_DISTRIBUTED"] == "1"


def test_sky_runs_the_words_as_they_are(tmp_path):
    tree = yaml.safe_load(dry("sky.py", "--type", "v6e-8", *SKY, "--dry-run", "--", "sft", HOSTILE, *SFT[3:]))
    (tmp_path / "gvl_env/bin").mkdir(parents=True)
    gvl = tmp_path / "gvl_env/bin/gvl"
    gvl.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    gvl.chmod(0o755)
    done = subprocess.run(["bash", "-c", tree["run"]], env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["sft", HOSTILE, *SFT[3:]]


# ---- the real clients, where they are installed ----------------------------------------------------------------------


def installed(client):
    return pytest.mark.skipif(not shutil.which(client), reason=f"{client} is not installed")


def missing(words, page):
    return [word for word in words if word.startswith("--") and word.split("=")[0] not in page]


@installed("gcloud")
@pytest.mark.parametrize("capacity", ["spot", "flex-start"])
def test_gcloud_knows_every_command_and_flag(world, capacity):
    env = {**environment(world), "PATH": os.environ["PATH"], "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true"}
    verbs = {}
    for line in dry("queued.py", "up", *QUEUED, "--capacity", capacity, "--dry-run", *SFT).splitlines():
        program, *words = shlex.split(line)
        if program == "gcloud":
            verbs.setdefault(tuple(words[: words.index("tpus") + 3]), []).extend(words)
    assert len(verbs) == 6
    for verb, words in verbs.items():
        page = subprocess.run(["gcloud", *verb, "--help"], env=env, capture_output=True, text=True, check=True).stdout
        assert set(missing(words, page)) <= {"--quiet", "--format=value(state)", "--format=value(state.state)"}, verb


@installed("xpk")
def test_xpk_knows_every_flag():
    words = xpk("--zone", "z", "--project", "p", *SFT)
    page = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, check=True).stdout
    assert not missing(words, page)


@installed("sky")
def test_sky_accepts_the_task(world):
    text = dry("sky.py", "--type", "v5p-128", *SKY, "--zone", "us-east5-a", "--dry-run", *SFT)
    code = (
        "import sys, yaml, jsonschema; from sky.utils import schemas; task = yaml.safe_load(sys.stdin);"
        "jsonschema.validate(task, schemas.get_task_schema());"
        "jsonschema.validate(task['resources'], schemas.get_resources_schema())"
    )
    python = Path(shutil.which("sky")).resolve().parent / "python"
    done = subprocess.run([python, "-c", code], input=text, env=environment(world), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the files beside them -------------------------------------------------------------------------------------------


def test_the_image_copies_what_is_there_and_does_not_run_as_root():
    lines = [line.split() for line in (TPU / "Dockerfile").read_text().splitlines() if line and line[0] != "#"]
    for words in lines:
        if words[0] == "COPY":
            assert all((ROOT / source).exists() for source in words[1:-1])
    assert [words[1] for words in lines if words[0] == "USER"] == ["gvl"]


README = (TPU / "README.md").read_text(encoding="utf-8")


def sessions():
    """Every `$ command` of the README, and what follows it."""
    blocks = "".join(re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    for session in re.split(r"^\$ ", blocks, flags=re.MULTILINE):
        command, output = re.fullmatch(r"((?:.*\\\n)*.*)\n?((?:.*\n)*)", session).groups()
        yield shlex.split(command.replace("\\\n", " ")), output


def test_the_readme_shows_what_the_launchers_print(monkeypatch):
    """Every `$ python tpu/…` of the README is run with --dry-run; where it has the flag, its output is what follows."""
    shown = 0
    for words, output in sessions():
        if words[1:2] and words[1].startswith("tpu/"):
            assert all((ROOT / word).is_file() for word in words if word.startswith("configs/")), words
            flags = [] if "--dry-run" in words else ["--dry-run"]
            printed = dry(words[1].removeprefix("tpu/"), *flags, *words[2:])
            if not flags:
                shown += 1
                assert output == printed.replace(str(ROOT), "/home/me/gvl_jax"), words
    assert shown >= 3
    for size in module("slices", monkeypatch).SLICES.values():
        assert f"| {size.name} | {size.chips} | {size.hosts} | {size.topology} | `{size.accelerator}` |" in README


def test_what_the_readme_runs_is_what_sizing_plans():
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "scripts" / "sizing.py")
    sizing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sizing)
    planned = set()
    for words, _ in sessions():
        if found := re.search(r"--type (\S+) .*-- (sft|rl) configs/3b/", " ".join(words)):
            planned.add(row := f"3b/{found[2]}/{found[1]}")
            assert sizing.flags(row) in " ".join(words), words
    assert {"3b/sft/v6e-8", "3b/rl/v6e-8"} <= planned <= set(sizing.ROWS)
    for stage in ("sft", "rl"):
        assert f"configs/3b/{stage}.yaml --topology v6e:2x4 {sizing.flags(f'3b/{stage}/v6e-8')}\n" in README


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
