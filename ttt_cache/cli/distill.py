"""`ttt-cache distill`: stage 0 alone, from the YAML of a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .train import Config, run

if TYPE_CHECKING:
    from ttt_cache.training.settings import Settings


def distill(config: Config) -> None:
    """Train only the memory, layer by layer, to answer as full context would.

    It is the cheapest training there is: no gradient goes through Moshi, and one
    forward pass serves all layers. The YAML is that of ttt-cache train; of its
    stages only those that distill are run, or if there are none, one of
    max_steps steps at optim.lr: 3e-3 suits a new memory.

    What comes out is as of ttt-cache train, in a folder beside run_dir whose name
    ends in -distill. To go on from it, let the key ttt_cache.adapter of another
    YAML name the adapter in it.

    Resume: give the same command again.

    Example: ttt-cache distill examples/cpu.yaml
    """
    run(config, distillation_of)


def distillation_of(settings: Settings) -> Settings:
    """The same run with nothing but distillation, in a folder of its own."""
    from ttt_cache.training.settings import Stage

    given = settings.ttt_cache.stages
    stages = [stage for stage in given if stage.train == "distill"] or [Stage(train="distill")]
    cache = settings.ttt_cache.model_copy(update={"stages": stages})
    folder = f"{settings.run_dir.rstrip('/')}-distill"
    return settings.model_copy(update={"ttt_cache": cache, "run_dir": folder})
