"""Checkpoints in a bucket, against a stand-in for Google Cloud Storage: gcsfs lists, renames and removes there, and
tensorstore reads and writes the arrays. By hand, with a Python that has the package, gcsfs and gcp-storage-emulator:
once in five the stand-in answers tensorstore with a generation that is none."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import gcsfs
import jax.numpy as jnp
import numpy as np
from gcp_storage_emulator.server import create_server

from gvl_jax.checkpoint import Checkpoints

server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="bucket")
server.start()
try:
    bucket, folder = gcsfs.GCSFileSystem(token="anon"), "gs://bucket/runs/sft"
    state = {"w": jnp.arange(8.0), "m": {"v": jnp.ones((3, 4))}}
    first = Checkpoints("unused", folder, keep=2)
    for step in (1, 2, 3):
        first.save(step, {"w": state["w"] + step, "m": state["m"]}, {"step": step})
    first.close()
    again = Checkpoints("unused", folder, keep=2)
    restored, meta = again.restore(state)
    assert again.latest() == meta["step"] == 3
    np.testing.assert_array_equal(restored["w"], state["w"] + 3)
    again.keep_part(4, 0, {"index": np.arange(3)})
    again.close()

    names = bucket.find("bucket/runs/sft/3")
    (lost,) = [name for name in names if name.endswith("meta/metadata")]
    bucket.rm_file(lost)
    after = Checkpoints("unused", folder, keep=2)
    restored, meta = after.restore(state)
    np.testing.assert_array_equal(restored["w"], state["w"] + 2)
    assert meta["step"] == after.latest() == 2
    (part,) = after.parts(4)
    assert part["index"].tolist() == [0, 1, 2]
    after.save(3, restored, {"step": 3})
    after.close()
    bucket.invalidate_cache()
    assert {name.split("/")[3] for name in bucket.find("bucket/runs/sft")} == {"2", "3", "damaged-3"}
    print("as on a disk")
finally:
    server.stop()
"""


@pytest.mark.skipif("GVL_BUCKET_PYTHON" not in os.environ, reason="a minute by hand: GVL_BUCKET_PYTHON=PATH pytest")
def test_checkpoints_in_a_bucket(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "TENSORSTORE_GCS_HTTP_VERSION": "1.1",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google over gRPC what kind of bucket it is
    }
    command = [os.environ["GVL_BUCKET_PYTHON"], "-c", RUN.replace("PORT", str(port))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("as on a disk\n"), done.stderr[-3000:]
