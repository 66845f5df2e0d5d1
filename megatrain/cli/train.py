"""The arguments of `megatrain train`, and the steps before torch is imported, such as receiving stop requests."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.cli.imports import imports


def add_train(
    verbs: Any, add_verb: Callable[..., argparse.ArgumentParser], add_config: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add `train` to the verbs."""
    example = (
        "megatrain train launch/configs/gpt_tiny.yaml data.train=PREFIX optim.lr=1e-3\n"
        "  torchrun --nproc-per-node 2 -m megatrain train launch/configs/gpt_tiny.yaml parallel.tensor_parallel_size=2"
    )
    add_config(add_verb(verbs, "train", _train, "train a model; alone, under torchrun or under srun", example))


def _train(arguments: argparse.Namespace) -> int:
    from megatrain.config.load import load
    from megatrain.config.validate import validate_step
    from megatrain.lifecycle.monitor import begin_monitor
    from megatrain.lifecycle.stop import (
        DIVERGED,
        PREEMPTED,
        StopRequest,
        end_with_launcher,
        is_stopping,
        reply,
        reply_listening,
    )
    from megatrain.runtime.launch import Launch

    launch = Launch.from_environment(os.environ)
    launch.require_ranks()
    config = load(arguments.config, arguments.overrides).config
    marker = Path(config.log.dir, PREEMPTED)
    for name, code in ((PREEMPTED, os.EX_TEMPFAIL), (DIVERGED, os.EX_PROTOCOL)):
        if is_stopping(Path(config.log.dir, name), launch):
            return reply(launch, code)
    if config.model.init_from is None:  # init_from gives shapes only later
        validate_step(config, launch.world_size)  # report an impossible config at once, before torch is imported
    monitor = begin_monitor(launch.rank, config.train.start_timeout_seconds) if arguments.ends_process else None
    with StopRequest(marker, launch) as stop:
        end_with_launcher(launch)
        reply_listening(launch)
        with imports():
            from megatrain.lifecycle.spikes import Diverged
            from megatrain.program import main as train

        try:
            return reply(launch, train(arguments.config, arguments.overrides, stop, monitor))
        except Diverged as error:
            reply(launch, error.exit_code)
            raise
        finally:
            if arguments.ends_process:
                stop.ignore()  # nothing is left to stop, and the exit code must not change
