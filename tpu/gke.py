"""Run `gvl` on a TPU slice of GKE: a JobSet manifest for kubectl, or with --xpk the command line of xpk.

    python tpu/gke.py --type v5p-128 --image IMAGE --bucket BUCKET --dry-run -- sft configs/3b/sft.yaml …

Without --dry-run the manifest is applied, or xpk started, after a question. One pod is one host. Exit code 75 and
preempted nodes start the whole set again without end; any other failure at most --max-restarts times.
"""

import shlex
import subprocess
import sys
from typing import Any

import yaml
from launch import AGAIN, LOST, MOUNT, confirm, describe, environment, parse, parser
from slices import SLICES

GRACE_SECONDS = 300  # from SIGTERM to SIGKILL, to save a checkpoint; a preempted spot node gives far less
LOCKED_MEMORY = 68719476736  # KiB that libtpu may lock; GKE asks for it where a pod is not privileged


def jobset(o) -> dict[str, Any]:
    """A JobSet (jobset.x-k8s.io/v1alpha2) of one Job with one pod a host."""
    size = SLICES[o.type]
    container: dict[str, Any] = {
        "name": "gvl",
        "image": o.image,
        # exec: gvl itself gets SIGTERM. Kubernetes would expand $(NAME) in the words.
        "command": ["bash", "-c", f'ulimit -l {LOCKED_MEMORY}; exec gvl "$@"', "gvl"],
        "args": [word.replace("$(", "$$(") for word in o.gvl],
        "env": [{"name": name, "value": value} for name, value in environment().items()],
        "securityContext": {"runAsUser": 0, "capabilities": {"add": ["SYS_RESOURCE"]}},  # for ulimit
        "resources": {"limits": {"google.com/tpu": size.chips_per_host}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a host alone cannot start again; the set does
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": size.generation.gke,
            "cloud.google.com/gke-tpu-topology": size.topology,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}],
        "containers": [container],
    }
    template: dict[str, Any] = {"spec": pod}
    if o.capacity == "spot":
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"].append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    if o.bucket:
        bucket = {"bucketName": o.bucket, "mountOptions": "implicit-dirs"}
        pod["serviceAccountName"] = o.service_account
        pod["volumes"] = [{"name": "gcs", "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket}}]
        container["volumeMounts"] = [{"name": "gcs", "mountPath": MOUNT}]
        template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    again: list[dict[str, Any]] = [
        {"onExitCodes": {"containerName": "gvl", "operator": "In", "values": [AGAIN]}},
        {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    job = {
        "completionMode": "Indexed",
        "completions": size.hosts,
        "parallelism": size.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", **when} for when in again]},
        "template": template,
    }
    rule = {"name": "again", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": o.name,
            # all pods on the nodes of one slice
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": o.max_restarts, "rules": [rule]},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def xpk_command(o) -> list[str]:
    command = ["exec", "env", *(f"{name}={value}" for name, value in environment().items()), "gvl", *o.gvl]
    return [
        "xpk", "workload", "create", f"--workload={o.name}", f"--cluster={o.cluster}", f"--docker-image={o.image}",
        f"--tpu-type={SLICES[o.type].accelerator}", f"--command={shlex.join(command)}",
        f"--max-restarts={o.max_restarts}", f"--restart-on-exit-codes={AGAIN},{LOST}",
        f"--termination-grace-period-seconds={GRACE_SECONDS}",
        *([f"--storage={o.bucket}"] if o.bucket else []),  # attached to the cluster before, under the bucket's name
        *([f"--zone={o.zone}"] if o.zone else []), *([f"--project={o.project}"] if o.project else []),
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--type", choices=SLICES, required=True, help="slice")
    options.add_argument("--image", required=True, help="built from tpu/Dockerfile, in a registry the cluster reads")
    options.add_argument("--service-account", default="default", help="Kubernetes account that may use the bucket")
    options.add_argument("--xpk", action="store_true", help="through xpk instead of kubectl")
    options.add_argument("--cluster", help="xpk: name of the cluster")
    options.add_argument("--zone", help="xpk: default, that of gcloud")
    options.add_argument("--project", help="xpk: default, that of gcloud")
    o = parse(options, argv)
    if not o.gvl:
        options.error("no gvl command after --")
    if o.capacity == "flex-start":
        options.error("--capacity flex-start is for queued.py; with GKE the node pool has it")
    if o.xpk and not o.cluster:
        options.error("--xpk needs --cluster")
    manifest = yaml.safe_dump(jobset(o), sort_keys=False)
    command = xpk_command(o) if o.xpk else ["kubectl", "apply", "--filename=-"]
    if o.dry_run:
        print(shlex.join(command) if o.xpk else f"# {shlex.join(command)}\n{manifest}".rstrip())
        return 0
    stop = f"kubectl delete jobset {o.name}"
    if o.xpk:
        stop = f"xpk workload delete --workload={o.name} --cluster={o.cluster}"
    confirm(f"This asks the cluster for {describe(o)}. Nodes are billed as long as they exist: a node pool without "
            f"autoscaling also after the job. To stop:\n  {stop}", o.yes)  # fmt: skip
    return subprocess.run(command, input=None if o.xpk else manifest, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
