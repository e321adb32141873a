"""Serving from the command line: checked before Ray starts, stopped by Ctrl-C or SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lift_ray.errors import BadInput, RunFailed, last_line
from lift_ray.ray_runtime.session import connected

NAME = "lift_ray"
STOP = (signal.SIGINT, signal.SIGTERM)


def serve_until_stopped(given: Mapping[str, Any], host: str, port: int) -> None:
    """Serve a checkpoint on the cluster, or on Ray that is started here, until the process is told to stop.

    Args:
        given: fields of `gate.Options`.

    Raises:
        BadInput: no checkpoint, a port in use, too few cores, or Ray Serve is not installed.
        RunFailed: the application did not start.
    """
    try:
        from ray import serve
        from ray.exceptions import RayError

        from lift_ray.inference.serve_http import Options
        from lift_ray.inference.serve_model import application
    except ImportError as error:
        raise BadInput(f"serve: needs packages, but got: {error}; pip install 'lift_ray[serve]'") from None
    options = Options.of(given)
    _check(options, host, port)
    with connected(dashboard=False) as nodes:
        cores = int(sum(node.get("CPU", 0) for node in nodes))
        if options.replicas * options.cpus > cores:
            raise BadInput(
                f"--replicas: must fit the cluster's {cores} cores, but got {options.replicas} with {options.cpus} "
                "each; lower it, or --cpus"
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        for number in STOP:  # only now: Ray sets handlers of its own when it starts
            signal.signal(number, _stop)
        try:
            serve.start(
                http_options={"host": host, "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(application(options), name=NAME, route_prefix="/")
            print(f"http://{host}:{port}/", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except (RuntimeError, RayError) as error:
            raise RunFailed(f"{options.checkpoint}: must start to serve, but: {last_line(error)}") from None
        finally:
            with suppress(RuntimeError, RayError):  # it may not have started
                serve.delete(NAME)


def _stop(*_: Any) -> None:
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _check(options: Any, host: str, port: int) -> None:
    """Raise BadInput for what can be known before anything starts; fit the temperature once, for all replicas."""
    from lift_ray.inference.calibration import calibrated
    from lift_ray.inference.classifier import Classifier
    from lift_ray.methods.world import Ranks
    from lift_ray.training.checkpoint import opened

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadInput(f"--port: must be free, but {host}:{port} is not ({error.strerror}); give another") from None
    with opened(options.checkpoint) as folder:
        finished = Classifier(folder, Ranks.alone(num_cpus=os.cpu_count() or 1), options.posthoc_tau)
        if options.temperature is None:
            print(calibrated(folder, finished), flush=True)
