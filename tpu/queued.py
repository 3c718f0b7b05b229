"""Run `gvl` on a Cloud TPU slice through a queued resource, with gcloud: one command, all hosts, clean-up included.

    python tpu/queued.py up --type v5p-8 --zone ZONE --bucket BUCKET -- sft configs/3b/sft.yaml …

up       create, wait, install, run, logs, and delete at the end, whatever happened (unless --keep)
create   ask for the slice                 wait     until it is there
install  the committed repository, or --git, on all hosts
run      the gvl command on all hosts; start it again when it was stopped or the node was preempted
logs     copy every host's logs here       delete   the slice; this is what ends billing

Exit codes: 0 done · 1 failed · 2 wrong usage, or not confirmed · 75 restarted too often · 130 interrupted; else gvl's.
"""

import argparse
import contextlib
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

from launch import AGAIN, LOST, MOUNT, ROOT, confirm, describe, environment, parse, parser
from slices import SLICES

VERBS = ("up", "create", "wait", "install", "run", "logs", "delete")
GONE = {"FAILED", "SUSPENDING", "SUSPENDED", "DELETING", "MISSING", "PREEMPTED", "TERMINATED"}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a closed terminal must not leave a slice behind
ARCHIVE = ".cache/gvl_jax.tar.gz"
APT = "sudo apt-get -qq -y -o DPkg::Lock::Timeout=300"  # a fresh VM updates itself first and holds the lock
KEY = "/usr/share/keyrings/cloud.google.asc"
PACKAGES = "https://packages.cloud.google.com/apt"


class LaunchError(Exception):
    """What went wrong, in one line."""


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed; what is left to do is done all the same
        print(f"queued: {text}", file=sys.stderr, flush=True)


# ---- the commands ----------------------------------------------------------------------------------------------------


def gcloud(o: argparse.Namespace, *words: str) -> list[str]:
    return ["gcloud", *words, f"--zone={o.zone}", *([f"--project={o.project}"] if o.project else [])]


def create_command(o: argparse.Namespace) -> list[str]:
    size = SLICES[o.type]
    words = ["compute", "tpus", "queued-resources", "create", o.name, f"--node-id={o.name}"]
    words += [f"--accelerator-type={size.accelerator}", f"--runtime-version={size.generation.runtime}"]
    words += [f"--valid-until-duration={o.valid_until}"]  # a request that nobody waits for any more ends by itself
    if o.capacity == "spot":
        words += ["--spot"]
    elif o.capacity == "flex-start":  # gcloud has these flags in its alpha commands only
        words = ["alpha", *words, "--provisioning-model=flex-start", f"--max-run-duration={o.max_run}"]
    return gcloud(o, *words)


def state_commands(o: argparse.Namespace) -> list[list[str]]:
    return [
        gcloud(o, "compute", "tpus", "queued-resources", "describe", o.name, "--format=value(state.state)"),
        gcloud(o, "compute", "tpus", "tpu-vm", "describe", o.name, "--format=value(state)"),
    ]


def ssh(o: argparse.Namespace, script: str) -> list[str]:
    # Of the ways that gcloud has, `tpu-vm ssh` is the one that reaches all hosts at once, without batches of 64.
    return gcloud(o, "compute", "tpus", "tpu-vm", "ssh", o.name, "--worker=all", f"--command={script}")


def install_commands(o: argparse.Namespace) -> list[list[str]]:
    steps = ["set -eu", "mkdir -p ~/gvl", "cd ~/gvl", "rm -rf src"]
    if o.git:
        steps += [f"git clone --quiet {shlex.quote(o.git)} src", f"git -C src checkout --quiet {shlex.quote(o.ref)}"]
    else:
        steps += ["mkdir src", "tar -xzf ~/gvl_jax.tar.gz -C src"]
    # The images have Python 3.10; uv brings 3.11.
    steps += ["python3 -m pip install --quiet --user uv"]
    steps += ["test -d env || python3 -m uv venv --quiet --python 3.11 env"]
    steps += ["python3 -m uv pip install --quiet --python env/bin/python gcsfs -e 'src[tpu]'"]
    if o.bucket:
        source = f"deb [signed-by={KEY}] {PACKAGES} gcsfuse-$(lsb_release -cs) main"
        steps += [
            f"command -v gcsfuse > /dev/null || {{ curl -fsS {PACKAGES}/doc/apt-key.gpg | sudo tee {KEY} > /dev/null"
            f' && echo "{source}" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null'
            f" && {APT} update && {APT} install gcsfuse; }}",
            f'sudo mkdir -p {MOUNT} && sudo chown "$(id -u)" {MOUNT}',
            f"mountpoint -q {MOUNT} || gcsfuse --implicit-dirs {o.bucket} {MOUNT}",
        ]
    copy = [
        ["mkdir", "-p", f"{ROOT}/.cache"],
        ["git", "-C", f"{ROOT}", "archive", "--format=tar.gz", f"--output={ARCHIVE}", "HEAD"],
        gcloud(o, "compute", "tpus", "tpu-vm", "scp", f"{ROOT}/{ARCHIVE}", f"{o.name}:", "--worker=all"),
    ]
    return [*([] if o.git else copy), ssh(o, "; ".join(steps))]


def run_command(o: argparse.Namespace, attempt: str) -> list[str]:
    """Start `attempt` on all hosts unless it is there already, show the first host's log, give back the exit codes.

    The job outlives the connection, and the command may be given again: gcloud does so by itself when a connection
    breaks. `live` names the attempt that runs; a file `exit` appears in its folder when it has ended.
    """
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment().items())
    folder = f"~/gvl/runs/{attempt}"
    job = f"cd ~/gvl/src; {variables} ../env/bin/gvl {shlex.join(o.gvl)} > {folder}/log 2>&1; "
    job += f"echo $? > {folder}/code; mv {folder}/code {folder}/exit"
    start = f"setsid nohup bash -c {shlex.quote(job)} < /dev/null > /dev/null 2>&1 & "
    start += f"echo $! > {folder}/pid; ln -sfn {folder} live"
    steps = [
        "cd ~/gvl && mkdir -p runs || exit 1",
        'running() { kill -0 "$(cat live/pid 2> /dev/null)" 2> /dev/null; }',
        f"if ! {{ running && [ ! -e live/exit ]; }} && mkdir {folder} 2> /dev/null; then {start}; fi",
        'case "$(hostname)" in *-w-0) tail -n 20 -F live/log 2> /dev/null & shown=$!;; esac',
        "while [ ! -e live/exit ]; do running || [ -e live/exit ] || echo 137 > live/exit; sleep 1; done",
        '[ -z "${shown-}" ] || kill "$shown"',
        f'code=$(cat live/exit); printf "\\ngvl-exit {attempt} %s %s\\n" "$(hostname)" "$code"; exit "$code"',
    ]
    return ssh(o, "; ".join(steps))


def logs_commands(o: argparse.Namespace) -> list[list[str]]:
    folders = [f"runs/logs/{o.name}/{host}" for host in range(SLICES[o.type].hosts)]
    scp = ("compute", "tpus", "tpu-vm", "scp", "--recurse", f"{o.name}:gvl/runs")  # all attempts, from one host a time
    copies = [gcloud(o, *scp, folder, f"--worker={host}") for host, folder in enumerate(folders)]
    return [["mkdir", "-p", *folders], *copies]


def delete_command(o: argparse.Namespace) -> list[str]:
    return gcloud(o, "compute", "tpus", "queued-resources", "delete", o.name, "--force", "--quiet")


def planned(o: argparse.Namespace) -> list[list[str]]:
    """What a verb runs when nothing goes wrong; `wait` and `run` look at the states again and again."""
    plan = {
        "create": [create_command(o)] if o.type else [],
        "wait": state_commands(o)[:1],
        "install": install_commands(o),
        "run": [run_command(o, "ATTEMPT"), *state_commands(o)],
        "logs": logs_commands(o) if o.type else [],
        "delete": [delete_command(o)],
    }
    if o.verb != "up":
        return plan[o.verb]
    steps = ("wait", "create", "wait", "install", "run", "logs", "delete")
    return [command for step in steps[: -1 if o.keep else None] for command in plan[step]]


# ---- running them ----------------------------------------------------------------------------------------------------


def call(command: list[str], what: str) -> None:
    """Run, with this terminal. Raises LaunchError if it fails."""
    code = subprocess.run(command).returncode
    if code:
        raise LaunchError(f"{what} failed with exit code {code}: {shlex.join(command)[:200]}")


def state(command: list[str]) -> str:
    """The state; MISSING: there is no such thing; UNKNOWN: gcloud cannot tell, the network for one."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr:
        return "MISSING"
    say(f"gcloud cannot tell: {' '.join(done.stderr.split())[-300:]}")
    return "UNKNOWN"


def gone(o: argparse.Namespace) -> bool:
    """Whether the slice was preempted or deleted, as its queued resource or its node says."""
    return any(state(command) in GONE for command in state_commands(o))


def create(o: argparse.Namespace) -> None:
    say(f"asking for {describe(o)}, in {o.zone}")
    call(create_command(o), "create")


def wait(o: argparse.Namespace) -> None:
    """Raises LaunchError if the request ended without a slice."""
    last = ""
    while (now := state(state_commands(o)[0])) != "ACTIVE":
        if now in GONE:
            raise LaunchError(f"{o.name} is {now}, expected ACTIVE; try another zone or capacity")
        if now != last:
            say(f"{o.name} is {now}")
        last = now
        time.sleep(o.poll)
    say(f"{o.name} is ACTIVE; from now on it is billed")


def install(o: argparse.Namespace) -> None:
    status = ["git", "-C", f"{ROOT}", "status", "--porcelain"]
    if not o.git and subprocess.run(status, capture_output=True, text=True).stdout:
        say("note: what is not committed is not copied")
    for command in install_commands(o):
        call(command, "install")
    say("installed")


def attach(o: argparse.Namespace, attempt: str) -> dict[str, int]:
    """Start the attempt, or find it, and wait. → the exit code of each host that told one."""
    codes: dict[str, int] = {}

    def read(lines):
        for line in lines:
            if found := re.search(rf"gvl-exit {attempt} (\S+) (\d+)$", line):
                codes[found[1]] = int(found[2])
            elif line.strip():
                print(line, end="", flush=True)

    # A session of its own: Ctrl-C comes here first, and gcloud ends together with the connections it opened.
    with subprocess.Popen(
        run_command(o, attempt), stdout=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as child:
        reader = threading.Thread(target=read, args=(child.stdout,))
        reader.start()
        try:
            while child.poll() is None:
                try:
                    child.wait(timeout=o.poll)
                except subprocess.TimeoutExpired:
                    if gone(o):
                        break
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            reader.join()
    return codes


def too_often(restarts: list[tuple[float, bool]], limit: int) -> bool:
    """restarts: when, in seconds, and whether gvl had ended by itself. → more than `limit` lie within the hour that
    ends with the last one, or more than `limit` of those that gvl is to blame for in all: they may come every hour."""
    last = restarts[-1][0]
    return sum(last - then < 3600 for then, _ in restarts) > limit or sum(own for _, own in restarts) > limit


def run(o: argparse.Namespace) -> int:
    """Until gvl is done, fails, or was restarted too often. → exit code."""
    session, restarts, number = secrets.token_hex(4), [], 0
    while True:
        codes = attach(o, f"{session}-{number}")
        told = sorted(set(codes.values()))
        all_told = len(codes) == SLICES[o.type].hosts
        if all_told and told == [0]:
            say("done")
            return 0
        while state(state_commands(o)[0]) == "UNKNOWN":  # offline; the job runs on without us
            time.sleep(o.poll)
        lost = gone(o)
        # 75, 76 and signals (a host that is killed takes the others with it): again. An error would come again,
        # whatever the hosts say that it took with it.
        failed = [code for code in told if 0 < code < 128 and code not in (AGAIN, LOST)]
        if failed and not lost:
            say(f"gvl failed: exit codes {told}; not started again")
            return failed[0]
        why = "the node was preempted" if lost else f"exit codes {told}" if all_told else "the connection was lost"
        restarts.append((time.monotonic(), all_told and not lost and told != [AGAIN]))
        if too_often(restarts, o.max_restarts):
            say(f"{why}; more than {o.max_restarts} restarts, giving up")
            return AGAIN
        say(f"{why}; restart {len(restarts)}")
        if lost:
            if not delete(o):
                raise LaunchError("the old slice could not be deleted; not creating another one")
            create(o)
            wait(o)
            install(o)
        number += lost or all_told  # after a broken connection, the same attempt: it may still run


def logs(o: argparse.Namespace) -> None:
    for command in logs_commands(o):
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            say(f"no log: {shlex.join(command)}")
    say(f"logs are in runs/logs/{o.name}")


def delete(o: argparse.Namespace) -> bool:
    """Delete, and look that nothing is left. Ctrl-C does not stop it. → whether nothing is left."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        for _ in range(3):
            done = subprocess.run(
                delete_command(o), capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True
            )
            if done.returncode:
                say(f"gcloud does not delete: {' '.join(done.stderr.split())[-300:]}")
            looks = []
            for _ in range(2):  # twice: a request that was just given up may still come through
                looks.append(state(state_commands(o)[0]))
                time.sleep(o.poll)
            if looks == ["MISSING", "MISSING"]:
                say(f"{o.name} is deleted; nothing of it is billed any more")
                return True
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    say(f"{o.name} MAY STILL EXIST AND BE BILLED. Run this until it says NOT_FOUND: {shlex.join(delete_command(o))}")
    return False


def up(o: argparse.Namespace) -> int:
    if (found := state(state_commands(o)[0])) != "MISSING":
        raise LaunchError(f"{o.name} is {found}, expected none of that name; `run` attaches to it, `delete` ends it")
    code = 1
    try:
        create(o)
        wait(o)
        install(o)
        code = run(o)
        logs(o)
    finally:
        if o.keep:
            say(f"kept, and billed until: {shlex.join(delete_command(o))}")
        elif not delete(o):
            code = 1
    return code


def main(argv: list[str]) -> int:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("verb", choices=VERBS)
    options.add_argument("--type", choices=SLICES, help="slice")
    options.add_argument("--zone", required=True)
    options.add_argument("--project", help="default: that of gcloud")
    options.add_argument("--valid-until", default="6h", help="give up waiting after (default: %(default)s)")
    options.add_argument("--max-run", default="24h", help="flex-start: deleted by Cloud after (default: %(default)s)")
    options.add_argument("--git", help="install from this repository instead of copying this one")
    options.add_argument("--ref", default="main", help="branch, tag or commit of --git (default: %(default)s)")
    options.add_argument("--poll", type=float, default=15, help="seconds between looks (default: %(default)s)")
    options.add_argument("--keep", action="store_true", help="up: do not delete at the end")
    o = parse(options, argv)
    if not o.type and o.verb not in ("wait", "install", "delete"):
        options.error(f"{o.verb} needs --type, one of {', '.join(SLICES)}")
    if not o.gvl and o.verb in ("up", "run"):
        options.error(f"{o.verb} needs a gvl command after --")
    if o.dry_run:
        print("\n".join(shlex.join(command) for command in planned(o)))
        return 0
    if not shutil.which("gcloud"):
        say("gcloud is not installed, or not in PATH: https://cloud.google.com/sdk/docs/install")
        return 1
    if o.verb in ("up", "create", "run"):
        again = " again after a preemption" if o.verb == "run" else ""
        confirm(f"This creates{again} {describe(o)}, in {o.zone}. Billing starts when it is ACTIVE and ends when it is "
                f"deleted:\n  {shlex.join(delete_command(o))}", o.yes)  # fmt: skip

    def interrupt(*_):
        raise KeyboardInterrupt

    for number in STOPS:
        signal.signal(number, interrupt)
    verbs = {"up": up, "create": create, "wait": wait, "install": install, "run": run, "logs": logs, "delete": delete}
    try:
        result = verbs[o.verb](o)
    except LaunchError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        if o.verb == "run":
            say("interrupted; the job goes on, and so does billing: `run` attaches again, `delete` ends both")
        return 130
    return int(not result) if isinstance(result, bool) else result or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
