"""A stage's train step, compiled from shapes alone: no weights, no data, and no device."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cpt_jax.adapt import Method
from cpt_jax.core.errors import UserError
from cpt_jax.core.precision import Precision
from cpt_jax.core.tree import Tree, flatten, partition, unflatten
from cpt_jax.data.mixture import domains_of
from cpt_jax.models.config import DecoderConfig
from cpt_jax.models.decoder import Network
from cpt_jax.models.families import family_for
from cpt_jax.models.kernels.choice import AttentionChoice
from cpt_jax.plan.hardware import Hardware
from cpt_jax.recipe.model import Model
from cpt_jax.recipe.recipe import Recipe, Stage
from cpt_jax.sharding.hardware import compiling_for
from cpt_jax.sharding.mesh import MeshShape, make_mesh, preset
from cpt_jax.sharding.rules import RULES
from cpt_jax.training.program import Settings
from cpt_jax.training.retention import start_of
from cpt_jax.training.step import Controls

# What JAX calls a platform's programs.
LOWERED = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A stage and the model that it begins with.

    Args:
      config: as the method lays it out, the vocabulary grown and padded.
    """

    stage: Stage
    config: DecoderConfig
    hf_config: dict
    precision: Precision = Precision()
    attention: AttentionChoice = "auto"
    layer_loop: str = "auto"

    @property
    def method(self) -> Method:
        return self.stage.method

    def network(self, platform: str, context: int = 1) -> Network:
        """As it is compiled for a platform, rows cut into `context` parts: the layers' loop and the attention kernel are
        chosen for it."""
        model = Model(config=self.config, weights={}, hf_config=self.hf_config, lora=self.method.lora_config())
        with compiling_for(platform):
            model = model.for_training(platform, self.stage.remat, self.layer_loop)  # type: ignore[arg-type]
            # JAX asks cuDNN's library what it can do, which takes a GPU: another kernel, without the scores either.
            attention = "blocks" if platform == "gpu" else self.attention
            model = model.attending(attention, self.stage.sequence_length, self.precision.dtype, context=context)
        return model.network


def planned_stages(recipe: Recipe, hf_config: dict) -> list[PlannedStage]:
    """The stages of a recipe, each with the model that the earlier ones leave."""
    if recipe.context is not None:
        hf_config = recipe.context.over(hf_config)
    config = family_for(hf_config).config_from_hf(hf_config)
    new_rows = 0 if recipe.vocabulary is None else recipe.vocabulary.extension.new_tokens
    config = dataclasses.replace(config, new_rows=new_rows, row_multiple=recipe.pad_vocabulary_to)
    stages = []
    for stage in recipe.stages:
        config = stage.method.layout(dataclasses.replace(config, layer_groups=()))
        stages.append(
            PlannedStage(
                stage=stage,
                config=config,
                hf_config=hf_config,
                precision=recipe.precision,
                attention=recipe.attention,
                layer_loop=recipe.layer_loop,
            )
        )
    return stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStage:
    """What the compiler made of a stage, or that it found no room.

    Args:
      held: bytes a device of weights, optimizer, average and what else a step is given; trained: of the weights that do.
      text: the program; "" where it does not fit.
      arguments, temporaries: the compiler's bytes a device.
      refusal: what the compiler said, where it does not fit.
    """

    planned: PlannedStage
    hardware: Hardware
    network: Network
    mesh: Mesh
    held: dict[str, int]
    trained: int
    arguments: int
    temporaries: int
    text: str = ""
    refusal: str | None = None
    seconds: float = 0.0


def compile_stage(planned: PlannedStage, hardware: Hardware, shape: MeshShape | None = None) -> CompiledStage:
    """Compiles the step that `cpt run` would run on that hardware.

    Raises:
      UserError: the batch or the sequence cannot be cut over the mesh, the mesh does not cover the devices, or what
        `Hardware.devices` raises.
    """
    stage, devices = planned.stage, hardware.devices()
    shape = (shape or preset(devices, stage.batch_size // stage.accumulate, stage.sequence_length)).over(len(devices))
    stage.check_mesh(shape)
    mesh = make_mesh(devices, shape)
    platform = hardware.platform
    network = planned.network(platform, shape.context)
    program, arguments = arguments_of(planned, network, mesh)
    state, frozen, start, batch, _ = arguments
    held = {
        "weights": _bytes((state.trainable, frozen)),
        "optimizer": _bytes(state.optimizer_state),
        "ema": _bytes(state.average),
        "start": _bytes(start),
        "batch": _bytes(batch),
    }
    made: dict[str, Any] = dict(
        planned=planned,
        hardware=hardware,
        network=network,
        mesh=mesh,
        held=held,
        trained=_bytes(state.trainable),
        arguments=sum(held.values()),
    )
    started = time.perf_counter()
    with jax.set_mesh(mesh), compiling_for(platform):
        lowered = program.step.trace(*arguments).lower(lowering_platforms=(LOWERED[platform],))  # type: ignore[attr-defined]
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            needed, seconds = _needed(str(error)), time.perf_counter() - started
            return CompiledStage(temporaries=needed, refusal=str(error).splitlines()[0], seconds=seconds, **made)
    memory = compiled.memory_analysis()
    made["arguments"] = memory.argument_size_in_bytes
    return CompiledStage(
        # What is given back and is no argument's memory anew: metrics.
        temporaries=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        text=program_text(compiled, hardware),
        seconds=time.perf_counter() - started,
        **made,
    )


def program_text(compiled: jax.stages.Compiled, hardware: Hardware) -> str:
    """The compiled program."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        version = jax.__version__
        raise UserError(
            f"hardware {hardware.name!r}: jax {version} cannot read the program that its compiler wrote ({str(error).splitlines()[0]}): "
            f"they are not of one version; pip install 'jax[tpu]=={version}', or jax[cuda12] for GPUs"
        ) from error


def arguments_of(planned: PlannedStage, network: Network, mesh: Mesh) -> tuple[Any, tuple]:
    """(the program, the shapes of all that its step is given)."""
    stage, precision, method = planned.stage, planned.precision, planned.method
    names = frozenset(path for path in flatten(network.shapes) if method.trains(path))
    if not names:
        raise UserError(f"stage {stage.name!r}: the method trains none of the model's weights")
    program = Settings(
        network=network,
        trains=names,
        names=domains_of(stage.mixture),
        optimizer=stage.optimizer,
        ema=stage.ema,
        accumulate=stage.accumulate,
        compute=precision.compute,
        retention=stage.retention,
        z_loss=stage.z_loss,
        mesh=mesh,
    ).program()

    def placed(tree: Tree, dtype_of: Any) -> Tree:
        leaves = flatten(tree).items()
        return unflatten(
            {
                path: jax.ShapeDtypeStruct(leaf.shape, dtype_of(path), sharding=program.where[path])
                for path, leaf in leaves
            }
        )

    trained, frozen = partition(network.shapes, names.__contains__)
    trained, frozen = placed(trained, lambda path: jnp.float32), placed(frozen, precision.dtype_of)
    state = jax.eval_shape(program.begin, trained)
    kept = flatten(jax.eval_shape(lambda tree: start_of(tree, stage.retention), trained))
    start = placed(unflatten(kept), lambda path: jnp.float32)
    where = NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))
    rows = (stage.batch_size, stage.sequence_length)
    whole = ("inputs", "targets", "positions", "segment_ids", "domains")
    batch = {name: jax.ShapeDtypeStruct(rows, jnp.int32, sharding=where) for name in whole}
    batch["weights"] = jax.ShapeDtypeStruct(rows, jnp.float32, sharding=where)
    return program, (state, frozen, start, batch, Controls(np.float32(1)))


def _bytes(tree: Any) -> int:
    """Of one device's parts."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if leaf.sharding is not None
    )


def _needed(message: str) -> int:
    """The bytes that a compiler says it would need (TPU: "... temporaries (76.87G) exceeds ...")."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found: Sequence[tuple[str, str]] = re.findall(r"([\d.]+)([KMGT])", message)
    return round(float(found[0][0]) * units[found[0][1]]) if found else 0
