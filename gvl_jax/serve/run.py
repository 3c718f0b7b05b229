"""`gvl serve`: a model with its engine or on another server, the decoders and the HTTP server, until SIGTERM."""

import gc
import math
import os
import signal
import sys
from dataclasses import fields

import uvicorn

from gvl_jax.config import ConfigError, Moderate, Serve
from gvl_jax.moderate import Guard
from gvl_jax.serve.app import create_app
from gvl_jax.serve.backend import Backend
from gvl_jax.serve.engine import Engine
from gvl_jax.serve.http import load_keys
from gvl_jax.serve.media import MediaPool
from gvl_jax.serve.telemetry import LOG, log_to_stderr

SWITCH = 5e-4  # seconds that the engine's thread waits for the interpreter while requests come in; Python's own: 5e-3
KEEP_ALIVE = 75  # seconds: longer than nginx and AWS reuse an idle connection (60), which would meet its end


def run(config: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C; then no new connection is taken and what is running gets its answer.

    Raises before the port is opened: ConfigError, HubError, RuntimeError for a model that cannot judge."""
    if not config.model:
        raise ConfigError("model is not set; give a checkpoint directory or a hub id")
    if config.keys:
        load_keys(config.keys)  # found wrong now, not after the model has been loaded
    log_to_stderr()
    common = {field.name for field in fields(Moderate)} & {field.name for field in fields(Serve)}
    settings = Moderate(**{name: getattr(config, name) for name in common})
    if config.backend:
        key = os.environ.get(config.backend_key_variable)
        backend = Backend(settings, config.backend, config.backend_name or config.model, key)
        app = create_app(backend, MediaPool(backend.images, config.decoders), config, begin=backend.start)
    else:
        guard = Guard(settings)
        engine = Engine(guard, max_requests=config.max_waiting, max_tokens=config.max_waiting_tokens)
        engine.start()  # the port is opened when everything is compiled
        if not engine.ready:
            raise RuntimeError(f"{config.model} misjudges the engine's canaries; serve a trained guard")
        app = create_app(engine, MediaPool(guard.images, config.decoders), config)
    LOG.info("serving", extra={"fields": {"host": config.host, "port": config.port, "model": config.model}})
    gc.collect()
    gc.freeze()  # to look through all that compiling left takes a third of a second, in which nobody is answered
    sys.setswitchinterval(SWITCH)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it again when it is done, which is no failure
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",  # uvicorn's other parser, which it prefers where it is installed, bounds no request's head
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(max(config.deadline, config.batch_deadline)),
    )
