"""How training speeds up with more workers: 1, 2 and 4 on this machine, and a model for 8 to 64 GPUs.

Each worker is a process with one thread for the step, bound to one core, where decoding takes turns with it; so two workers
have twice the cores of one. Workers beyond the machine's cores share them. They form a process group (gloo) and take the
steps of lift_ray's own `Run` on the same global batches; Ray Train starts workers and has no part in a step. Sizes take turns,
round by round, so that a drift of the machine's speed meets all alike. Bytes are counted where they are handed to all_reduce.

The model: a step of one GPU takes t seconds for its b images, and then the gradients of all trained parameters, B bytes,
travel once around a ring (Patarasuk and Yuan 2009), with nothing overlapped, as `Ranks.average` does it:

    t(N) = t + 2 (N - 1) / N * B / bandwidth + 2 (N - 1) * latency        efficiency(N) = t / t(N)

for a batch of b on each GPU (weak scaling). For one global batch shared out (strong scaling), t / N takes the place of t, and
efficiency is t / (N t(N)). Waiting for data is left out: measure it with train's `data_wait_frac`.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --gpu-step-s 0.12 --bandwidth-gbit-s 100 --workers 1 2
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import rich.box
import torch
import torch.distributed
import torch.multiprocessing
from ports import free_ports
from record import record
from rich.table import Table

from lift_ray.methods.world import Ranks, join_group
from lift_ray.settings.run import RunConfig
from lift_ray.terminal.tables import console
from lift_ray.training.run import Run
from lift_ray.training.workspace import Workspace

DATASET, SEED, WARM_UP = "embedded:caltech101-lt", 0, 2
GPUS = (8, 16, 32, 64)


def work(rank: int, workers: int, port: int, batch: int, steps: int, answers: Any) -> None:
    """One worker: a few steps to warm up, then `steps` steps by the clock; the first rank answers."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    if workers > 1:
        join_group(rank, workers, "127.0.0.1", port, torch.device("cpu"))
    sent: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor) -> None:
        sent.append(tensor.numel() * tensor.element_size())
        all_reduce(tensor)

    torch.distributed.all_reduce = counted
    config = RunConfig.model_validate({"seed": SEED, "optim": {"global_batch_size": batch}})
    run = Run(config, Workspace(DATASET, Ranks(rank, workers, torch.device("cpu"))))
    batches = run.batches()
    for _ in range(WARM_UP):
        run.train_step(next(batches))
    sent.clear()
    waited, began, worked = run.seconds["data_wait_s"], time.perf_counter(), time.process_time()
    for _ in range(steps):
        run.train_step(next(batches))
    seconds, processor_s = time.perf_counter() - began, time.process_time() - worked
    if rank == 0:
        answers.put(
            {
                "step_s": seconds / steps,
                "processor_s": processor_s / steps,
                "bytes": sum(sent) / steps,
                "trained": run.num_trained,
                "digest": run.config.digest(),
                "data_wait_frac": (run.seconds["data_wait_s"] - waited) / seconds,
            }
        )
    if workers > 1:
        torch.distributed.destroy_process_group()


def measure(workers: int, batch: int, steps: int) -> dict[str, Any]:
    """The first worker's figures. Raises SystemExit when a worker fails."""
    (port,) = free_ports(1)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=work, args=(rank, workers, port, batch, steps, answers)) for rank in range(workers)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{workers} workers: one ended with code {[p.exitcode for p in ranks]}")
    figures: dict[str, Any] = answers.get()
    return figures


def summary(rounds: Sequence[dict[int, dict[str, Any]]], batch: int) -> dict[int, dict[str, float]]:
    """By number of workers the medians over rounds; speed-up within each round, against one worker.

    processor_speedup: by the first worker's processor time, which a busy machine changes less; waiting is not in it.
    bytes_times_trained: bytes a step over 4 bytes for each trained parameter.
    """
    out = {}
    for workers, first in rounds[0].items():
        speedups = sorted(r[1]["step_s"] / r[workers]["step_s"] for r in rounds)
        out[workers] = {
            "step_s": median(r[workers]["step_s"] for r in rounds),
            "images_per_s": median(batch / r[workers]["step_s"] for r in rounds),
            "speedup": median(speedups),
            "speedup_least": speedups[0],
            "speedup_most": speedups[-1],
            "processor_speedup": median(r[1]["processor_s"] / r[workers]["processor_s"] for r in rounds),
            "efficiency": median(speedups) / workers,
            "bytes": first["bytes"],
            "bytes_times_trained": first["bytes"] / (4 * first["trained"]),
            "data_wait_frac": median(r[workers]["data_wait_frac"] for r in rounds),
        }
    return out


def model(step_s: float, num_bytes: float, gbit_s: float, latency_s: float) -> dict[int, dict[str, float]]:
    """The docstring's model, by number of GPUs: seconds of communication, and both efficiencies."""
    out = {}
    for gpus in GPUS:
        talk_s = 2 * (gpus - 1) / gpus * num_bytes / (gbit_s * 1e9 / 8) + 2 * (gpus - 1) * latency_s
        out[gpus] = {
            "communication_s": talk_s,
            "weak": step_s / (step_s + talk_s),
            "strong": step_s / (step_s + gpus * talk_s),
        }
    return out


def show(found: dict[int, dict[str, float]], modelled: dict[int, dict[str, float]], args: argparse.Namespace) -> None:
    """Both tables."""
    headings = (
        "workers",
        "step, ms",
        "images/s",
        "speed-up (least to most)",
        "by CPU time",
        "efficiency",
        "bytes a step",
        "of 4 x trained",
    )
    measured, predicted = (
        Table(*names, box=rich.box.SIMPLE_HEAD)
        for names in (
            headings,
            ("GPUs", "communication, ms", "efficiency, same batch on each", "efficiency, one batch shared out"),
        )
    )
    for workers, f in found.items():
        measured.add_row(
            str(workers),
            f"{1e3 * f['step_s']:.1f}",
            f"{f['images_per_s']:.1f}",
            f"{f['speedup']:.2f} ({f['speedup_least']:.2f}-{f['speedup_most']:.2f})",
            f"{f['processor_speedup']:.2f}",
            f"{f['efficiency']:.0%}",
            f"{f['bytes']:,.0f}",
            f"{f['bytes_times_trained']:.3f}",
        )
    for gpus, f in modelled.items():
        predicted.add_row(str(gpus), f"{1e3 * f['communication_s']:.2f}", f"{f['weak']:.1%}", f"{f['strong']:.1%}")
    console().print(measured, f"model: {args.bandwidth_gbit_s:g} Gbit/s, {args.latency_us:g} us", predicted, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="1 is always among them")
    parser.add_argument("--batch", type=int, default=128, help="images a step over all workers")
    parser.add_argument("--steps", type=int, default=10, help="by the clock, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--gpu-step-s", type=float, help="of one GPU, for the model (default: one worker's, as measured)"
    )
    parser.add_argument("--gpu-bytes", type=float, help="all-reduced in a step, for the model (default: as measured)")
    parser.add_argument("--bandwidth-gbit-s", type=float, default=10.0, help="between two nodes, for the model")
    parser.add_argument("--latency-us", type=float, default=30.0, help="of one message, for the model")
    parser.add_argument("--record", action="store_true", help="append a row to benchmarks/results/scaling.jsonl")
    args = parser.parse_args()
    sizes = sorted({1, *args.workers})
    rounds = [{workers: measure(workers, args.batch, args.steps) for workers in sizes} for _ in range(args.rounds)]
    found = summary(rounds, args.batch)
    num_bytes = args.gpu_bytes or 4.0 * rounds[0][1]["trained"]
    modelled = model(args.gpu_step_s or found[1]["step_s"], num_bytes, args.bandwidth_gbit_s, args.latency_us * 1e-6)
    show(found, modelled, args)
    if args.record:
        figures = {"batch": args.batch, "rounds": args.rounds, "measured": found, "model": modelled}
        command = shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]])
        print(record("scaling", command, figures, seeds=[SEED], digest=rounds[0][1]["digest"]))


if __name__ == "__main__":
    main()
