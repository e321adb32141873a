"""Server of the command line: options are checked before Ray starts, Ctrl-C or SIGTERM stops it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lift_ray.errors import BadInput, RunFailed, last_line, one_line
from lift_ray.ray_runtime.session import connected
from lift_ray.text import count, say

NAME = "lift_ray"
STOP = (signal.SIGINT, signal.SIGTERM)


def serve_until_stopped(given: Mapping[str, Any], host: str, port: int) -> None:
    """Serve a checkpoint on the cluster, or on a local Ray started here, until the process receives Ctrl-C or SIGTERM.

    Args:
        given: fields of `serve_http.Options`.
        host: address to listen on.
        port: port to listen on.

    Raises:
        BadInput: the checkpoint cannot be read, the port is in use, there are too few cores, or Ray Serve is not installed.
        RunFailed: the application did not start.
    """
    try:
        from ray import serve
        from ray.exceptions import RayError

        from lift_ray.inference.serve_http import Options
        from lift_ray.inference.serve_model import application
    except ImportError as error:
        failed = f"the import failed ({one_line(error)})"
        raise BadInput("serve", "requires Ray Serve", but=failed, remedy="pip install 'lift_ray[serve]'") from None
    options = Options.of(given)
    _check(options, host, port)
    with connected(dashboard=False) as nodes:
        cores = int(sum(node.get("CPU", 0) for node in nodes))
        if options.replicas * options.cpus_per_worker > cores:
            raise BadInput(
                "--replicas",
                f"must fit the {count(cores, 'core')} of the cluster",
                f"{count(options.replicas, 'replica')} with {options.cpus_per_worker} each",
                "lower it, or --cpus-per-worker",
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        for number in STOP:  # after Ray has started, because it installs its own handlers then
            signal.signal(number, _stop)
        try:
            serve.start(
                http_options={"host": host, "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            serve.run(application(options), name=NAME, route_prefix="/")
            say(f"http://{host}:{port}/")
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
        except (RuntimeError, RayError) as error:
            raise RunFailed(f"{options.checkpoint}: could not start serving: {last_line(error)}") from None
        finally:
            with suppress(RuntimeError, RayError):  # the application may not have started
                serve.delete(NAME)


def _stop(*_: Any) -> None:
    # Ignore further signals, so that an impatient second Ctrl-C does not interrupt the shutdown.
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _check(options: Any, host: str, port: int) -> None:
    """Check the port and the checkpoint before anything starts, and fit the temperature once for all replicas. Raises BadInput."""
    from lift_ray.inference.classifier import Classifier
    from lift_ray.methods.world import Ranks

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            taken = f"{host}:{port} is not ({error.strerror})"
            raise BadInput("--port", "must be free", but=taken, remedy="choose another") from None
    ranks = Ranks.alone(num_cpus=os.cpu_count() or 1)
    temperature, tau = options.temperature, options.posthoc_tau
    classifier = Classifier.load(options.checkpoint, temperature=temperature, posthoc_tau=tau, ranks=ranks)
    if temperature is None:
        say(classifier.calibration)
