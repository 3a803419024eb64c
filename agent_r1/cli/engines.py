"""The commands for engines that are servers: install, serve."""

from __future__ import annotations

import argparse


def run_install(arguments: argparse.Namespace, rest: list[str]) -> int:
    from typing import cast

    from agent_r1.rollout import ENGINES
    from agent_r1.rollout.remote.engine import RemoteEngine
    from agent_r1.rollout.remote.install import install

    engine = cast(type[RemoteEngine], ENGINES.resolve(arguments.engine))
    python = install(engine.packages, cpu=arguments.cpu)
    print(f'{python}\nengine = "{arguments.engine}" in a recipe finds it')
    return 0


def run_serve(arguments: argparse.Namespace, rest: list[str]) -> int:
    from agent_r1.model.settings import ModelSettings
    from agent_r1.rollout.remote.serve import serve

    model = ModelSettings(path=arguments.model, dtype=arguments.dtype)
    serve(model, host=arguments.host, port=arguments.port)
    return 0
