"""One of two processes that train a model whose layers are split over both.

`python two_processes.py PORT PROCESS DIRECTORY KILLED_AFTER`, see `test_processes`.
What happens before they have met is not the library's affair, so it is imported only
then.
"""

import os
import sys
import time

PROCESSES = 2
STARTED = "both processes are there"
LAYERS = 8
STEPS = 4
SAVE_EVERY = 2


def start(port, process):
    """Says so once both processes have heard of each other."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{port}", PROCESSES, process, initialization_timeout=60
    )
    assert jax.device_count() == 2 * PROCESSES
    multihost_utils.process_allgather(process)
    print(STARTED, flush=True)


def optimizers():
    """For whole arrays under `jit`, and the same inside of `shard_map`."""
    import optax

    import gradsmooth_optax as gs

    return {
        how: gs.adamw(
            0.05,
            gs.smooth_over_depth(
                gs.scanned("blocks/"),
                gs.window(optax.linear_schedule(0.5, 0.1, STEPS), radius=2),
                variant="norm_preserving",
                norm_scope="block",
                axis_name=axis_name,
            ),
            weight_decay=0.1,
        )
        for how, axis_name in (("jit", None), ("shard_map", "stage"))
    }


def new_params():
    import numpy as np

    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(LAYERS, 4, 4)).astype("float32")
    bias = rng.normal(size=(LAYERS, 4)).astype("float32")
    return {"blocks": {"kernel": kernel, "bias": bias}}


def train_step(updates_of):
    """A step of every optimizer on a batch of its own.

    `updates_of` has the `update` of each. The gradients need all layers, so those of
    both processes.
    """
    import jax
    import jax.numpy as jnp
    import optax

    def step(run, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        x, y = jax.random.normal(key, (2, 8, 4))

        def loss(params):
            kernel, bias = params["blocks"]["kernel"], params["blocks"]["bias"]
            layers = jnp.tanh(jnp.einsum("bi,lij->blj", x, kernel) + bias)
            return jnp.mean((jnp.sin(layers.sum(1)) - y) ** 2)

        new = {}
        for how, (params, state) in run.items():
            grads = jax.grad(loss)(params)
            updates, state = updates_of[how](grads, state, params)
            new[how] = (optax.apply_updates(params, updates), state)
        return new

    return step


def train(process, directory, killed_after):
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()), ("stage",))

    def spec(x):
        return P("stage") if np.shape(x)[:1] == (LAYERS,) else P()

    def placed(x):
        x, sharding = np.asarray(x), NamedSharding(mesh, spec(x))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    run, updates_of = {}, {}
    for how, tx in optimizers().items():
        params = new_params()
        state = tx.init(params)  # Sharded as the parameters are.
        run[how] = jax.tree.map(placed, (params, state))
        updates_of[how] = tx.update
    params_spec, state_spec = jax.tree.map(spec, (params, state))
    updates_of["shard_map"] = jax.shard_map(
        updates_of["shard_map"],
        mesh=mesh,
        in_specs=(params_spec, state_spec, params_spec),
        out_specs=(params_spec, state_spec),
    )
    shardings = jax.tree.map(lambda x: x.sharding, run)
    step = jax.jit(train_step(updates_of), out_shardings=shardings)

    begin = 0
    manager = open_checkpoints(directory)
    if manager.latest_step() is not None:
        begin = manager.latest_step()
        run = restore(manager, run)
    print("begins after step", begin, flush=True)
    for number in range(begin + 1, STEPS + 1):
        run = step(run, number)
        if number % SAVE_EVERY == 0:
            save(manager, number, run)
        if number == killed_after:
            jax.block_until_ready(run)
            print("waits to be killed", flush=True)
            time.sleep(600)
    write_parts(run, os.path.join(directory, f"{process}.npz"))
    print("done", flush=True)
    jax.distributed.shutdown()


def write_parts(run, path):
    """The parts of the parameters and states that this process holds."""
    import jax
    import numpy as np

    parts = {}
    for keys, x in jax.tree.leaves_with_path(run):
        for shard in x.addressable_shards:
            first = shard.index[0].start or 0 if x.ndim else 0
            parts[f"{jax.tree_util.keystr(keys)}@{first}"] = np.asarray(shard.data)
    np.savez(path, **parts)


# Checkpoints.


def open_checkpoints(directory):
    import pathlib

    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    folder = pathlib.Path(directory).absolute() / "checkpoints"
    return ocp.CheckpointManager(folder, options=options)


def save(manager, step, tree):
    import orbax.checkpoint as ocp

    manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()


def restore(manager, like):
    import orbax.checkpoint as ocp

    args = ocp.args.StandardRestore(like)
    return manager.restore(manager.latest_step(), args=args)


if __name__ == "__main__":
    port, process, directory, killed_after = sys.argv[1:]
    start(int(port), int(process))
    train(int(process), directory, int(killed_after))
