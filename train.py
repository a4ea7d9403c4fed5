"""Fine-tunes a model with an adapter: one run, told from top to bottom.

    python train.py                                       # configs/quickstart.py
    python train.py --config configs/lora_trec.py --workdir runs/lora
    python train.py --config.adapter.rank=16 --workdir runs/rank16
    python train.py --dry-run --target v5e:4x4            # what would it need there?

The same command again resumes a run that was stopped, bit for bit. Everything that
this file calls can be imported; ``run(config, workdir)`` is the whole of it.
"""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import optax

import jaxpeft as jp
from jaxpeft import console, data, interop, launch, mixtures, runs, training


def make_update(
    forward, task_loss, optimizer, *, mesh, accumulate=1, clip_norm=None, allocator=None
):
    """Returns what one step does: ``(state, frozen, batch) -> (state, metrics)``.

    ``forward`` is ``jp.adapt(model.apply)`` of a batch; it also returns what routers
    have seen. ``task_loss`` gives each row its loss and its weight.
    """

    def loss_fn(trainable, frozen, batch, keys):
        adapted = jp.combine(trainable, frozen)
        adapted = jp.with_dropout(adapted, keys.adapter, leaves_key=keys.leaves)
        outputs, seen = forward(adapted, batch, keys.model)
        values, weights = task_loss(outputs, batch)
        return values, weights, jp.tree.seen_penalty(adapted, seen)

    # The mean over the rows of all micro-batches, and once a step the methods' own
    # penalty, which is no sum over rows.
    gradient = training.loss_and_gradient(
        loss_fn, jp.penalty, mesh=mesh, accumulate=accumulate, clip_norm=clip_norm
    )

    def update(state, frozen, batch):
        losses, grads = gradient(state, frozen, batch)
        # Optax's bias correction mixes integers and floats.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.transform.update(
                grads, state.opt_state, state.trainable
            )
            trainable = optax.apply_updates(state.trainable, updates)
        made = (grads, trainable, opt_state)  # kept if it is finite
        new = training.advance(state, losses, *made, allocator=allocator)
        return new, losses | optimizer.rates(state.step)

    return update


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains, evaluates, saves and reports; returns the results.

    Args:
        config: what to do; ``configs/quickstart.py`` lists every field.
        workdir: the run's folder. If it holds a run of this config, it goes on.

    Returns:
        the ``results`` of ``report.json``.

    Raises:
        ValueError: a field of the config that does not fit.
        training.WorkdirError: the folder is in use, or of another run.
        training.NonFiniteError: an update was not finite; it says what is kept.
        training.NoRoomError: the disk is full; it says by how much.
        runs.Stopped: SIGTERM came; all is saved.
    """
    runs.check_fields(config)
    if config.stages:
        return runs.run_stages(config, workdir, run, free=runs.FREE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(launch.lost())
        return _run(config, workdir, stack)


def attach_all(config, model, params, keys, ranks=None, folder=None):
    """Puts all that will train beside a model's parameters, or beside their shapes.

    ``ranks`` were found before training; ``folder`` then holds the directions of the
    inputs, where adapters are to start at them.
    """
    if config.start:  # what another run saved, head and all
        adapted = runs.load_start(config, model, params)
    else:
        sites = {"targets": config.targets, "exclude": config.exclude or None}
        adapted = jp.attach(
            params,
            runs.make_adapter(config),
            **(sites if ranks is None else {"targets": ranks}),
            rank_pattern=dict(config.rank_pattern) or None,
            alpha_pattern=dict(config.alpha_pattern) or None,
            axes=model.axes,
            key=keys[0],
        )
        if ranks is not None and folder is not None:
            adapted = runs.start_at_inputs(adapted, ranks, folder / "allocation.npz")
        if config.head:  # trained whole: no pre-trained one fits the new task
            with runs.said_of("head"):
                adapted = jp.attach(adapted, jp.full(), config.head, key=keys[1])
    adapted = runs.attach_biases(adapted, config)
    return runs.enter_stage(adapted, config)


def make_step(config, model, adapted, key, *, mesh, total_steps):
    """Puts a tree on a mesh and makes its update; shapes do in place of arrays.

    Returns ``(specs, state, frozen, forward, loss, allocator, step)``.
    """
    # An adapter read from PEFT may have untied the head from the embedding.
    plain = jax.eval_shape(jp.detach, adapted)
    specs = training.param_specs(plain, mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    optimizer = training.adamw(trainable, total_steps=total_steps, **config.optimizer)
    allocator = runs.ranks_during(config, total_steps)
    state = training.init_state(
        trainable, optimizer, key=key, mesh=mesh, allocator=allocator
    )
    forward, loss = training.objective(model, mesh=mesh, dropout=config.model.dropout)
    cuts = dict(accumulate=config.accumulate, clip_norm=config.clip_norm)
    update = make_update(
        forward, loss, optimizer, mesh=mesh, allocator=allocator, **cuts
    )
    step = training.compile_step(update, state, frozen, mesh=mesh)
    return specs, state, frozen, forward, loss, allocator, step


def _run(config, workdir, stack):
    started = time.perf_counter()

    # ----------------- Refused is what can be, before anything is read ----------------

    runs.check_run(config, workdir, attach_all, free=runs.FREE)
    kept = console.keep_compiled(config.log.compilation_cache)
    mesh = training.make_mesh(**config.mesh)

    # ------------------------------- The task, its steps ------------------------------

    inputs = runs.read_inputs(config, mesh)
    stack.callback(inputs.batches.close)
    task, total_steps = inputs.task, inputs.total_steps
    # Once more, now that the task is known.
    runs.rehearse(config, inputs.outline, attach_all, total_steps)

    # ------------------------------------ The model -----------------------------------

    keys = iter(jax.random.split(jax.random.key(config.seed), 4))
    head_key, adapter_key = next(keys), next(keys)
    both = (adapter_key, next(keys) if config.head else None)
    load_base = functools.partial(runs.load_base, config, task, mesh, head_key)
    model, params = load_base()

    # ---------------------------------- The adapter -----------------------------------

    ranks = None
    if config.start:  # an adapter of another base is refused before the folder is ours
        adapted = attach_all(config, model, params, both)
    folder = stack.enter_context(runs.open_workdir(workdir, config, free=runs.FREE))
    if not config.start:
        ranks = runs.ranks_before(config, folder, model, params, inputs.sample)
        adapted = attach_all(config, model, params, both, ranks, folder)
    sizes = jp.count(adapted)
    if jax.process_index() == 0:
        (folder / "sites.txt").write_text(f"{jp.describe(adapted)}\n")

    # ------------------------------ Update and evaluation -----------------------------

    specs, state, frozen, forward, loss, allocator, step_fn = make_step(
        config, model, adapted, next(keys), mesh=mesh, total_steps=total_steps
    )
    del params, adapted  # the base lives on in `frozen`; nothing is held twice
    eval_fn = training.eval_step(forward, loss, state, frozen, mesh=mesh)

    # ----------------------------- Resume, or start anew ------------------------------

    checkpoints = stack.enter_context(
        training.Checkpointer(
            folder / "checkpoints", config=config.to_dict(), free=runs.FREE, **task.best
        )
    )
    stack.enter_context(checkpoints.told_of_room())
    first_step, carried, due = 0, {"seconds": 0.0}, False
    if checkpoints.latest is not None:
        restored = checkpoints.restore(state, frozen)
        state, frozen, first_step = restored.state, restored.frozen, restored.step
        inputs.batches.set_state(restored.data_state)
        carried = restored.extra
        due = carried.pop("due", False)  # SIGTERM came before it was evaluated
    # No checkpoint yet: what was written is written anew.
    there = dict(after=first_step or -1, again="eval" if due else None)
    writer = stack.enter_context(
        runs.MetricsWriter(folder, **there, tensorboard=config.log.tensorboard)
    )
    stop_asked = runs.StopAsked()
    bar = stack.enter_context(runs.progress(total_steps, done=first_step))
    title = f"{config.adapter.name} on {config.model.name}, {task.name}"
    parts = runs.Parts(
        title=title,
        config=config,
        inputs=inputs,
        folder=folder,
        mesh=mesh,
        specs=specs,
        sizes=sizes,
        ranks=ranks,
        load_base=load_base,
        allocator=allocator,
        step_fn=step_fn,
        evaluate=functools.partial(
            *(runs.score_split, config, inputs, eval_fn),
            **dict(mesh=mesh, bar=bar, stop_asked=stop_asked),
        ),
        checkpoints=checkpoints,
        writer=writer,
        bar=bar,
        stop_asked=stop_asked,
        seconds=lambda: carried["seconds"] + time.perf_counter() - started,
    )
    writer.write("start", first_step, versions=runs.versions(), command=sys.argv)
    bar.note(
        f"{title}: {sizes[0]:,} of {sizes[1]:,} parameters train, {total_steps} steps "
        f"of {config.batch_size} rows on {mesh.size} device(s); {folder}"
    )
    bar.note(kept.said)
    for line in data.notes(task):  # rows held out that were trained on
        bar.note(line)
    if first_step == total_steps:
        bar.note("This run is complete. Another one: --workdir=PATH.")
    elif first_step:
        bar.note(f"Resuming after step {first_step}.")
    else:
        carried["before"] = _before(parts, state, frozen)
    with stop_asked.heeded():
        state = _train(parts, state, frozen, first_step, carried, due)
    return _finish(parts, state, frozen, carried["before"])


def _before(parts, state, frozen):
    """The scores before the first step."""
    held_out, metric = parts.inputs.held_out, parts.inputs.task.best["metric"]
    scores, _ = parts.evaluate(state.trainable, frozen, "validation")
    parts.writer.write("eval", 0, **scores)
    if held_out != "validation":
        scores, _ = parts.evaluate(state.trainable, frozen, held_out)
    parts.bar.note(f"before training: {held_out} {metric} {scores[metric]:.4f}")
    return scores


def _train(parts, state, frozen, first_step, carried, due):
    """The train loop: returns the state after the last step."""
    config, inputs, checkpoints = parts.config, parts.inputs, parts.checkpoints
    writer, bar, allocator = parts.writer, parts.bar, parts.allocator
    metric = inputs.task.best["metric"]  # decides which checkpoint is the best
    settled = allocator.settled if allocator else 0  # from then on: the best can be
    if due:
        scores, _ = parts.evaluate(state.trainable, frozen, "validation")
        writer.write("eval", first_step, **scores)
        checkpoints.complete(
            first_step,
            extra=carried | {"seconds": parts.seconds()},
            scores=scores if first_step >= settled else None,
        )
    watch, waiting = runs.Stopwatch(), []
    for step in range(first_step + 1, inputs.total_steps + 1):
        with watch.waiting():
            rows, batch = next(inputs.batches)  # on the host, on the devices
        state, metrics = parts.step_fn(state, frozen, batch)
        watch.count(tokens=int(rows["attention_mask"].sum()) * jax.process_count())
        waiting.append((step, metrics))  # still on the device: fetched all at once
        bar.advance()

        if allocator and allocator.decide and step == settled:
            state = runs.decide_ranks(
                allocator, state, frozen, parts.folder, writer, bar
            )
        evaluates = step % inputs.evaluate_every == 0 or step == inputs.total_steps
        stops = parts.stop_asked()  # all processes after the same one
        saves = evaluates or stops or step % inputs.save_every == 0
        if not saves and step % config.log.every:
            continue
        for number, values in jax.device_get(waiting):
            writer.write("train", number, **values)
        waiting.clear()
        lap = watch.lap()
        writer.write("speed", step, **lap, **runs.memory(), seconds=parts.seconds())
        runs.stop_if_not_finite(state, checkpoints, writer)
        rate = max(v for k, v in values.items() if k.startswith("learning_rate/"))
        shown = {"loss": float(values["loss"]), "lr": float(rate)}
        shown["tokens/s"], scores = lap["tokens_per_second"], None
        if step % inputs.save_every == 0 and inputs.keeps:
            runs.keep_adapter(parts, jp.combine(state.trainable, frozen), step)
        if evaluates and not stops:
            try:
                scores, _ = parts.evaluate(state.trainable, frozen, "validation")
                writer.write("eval", step, **scores)
                shown[metric] = scores[metric]
            except runs.Stopped:
                stops = True  # evaluated when the run goes on
        if saves:
            due = evaluates and scores is None
            checkpoints.save(
                state,
                frozen,
                data_state=inputs.batches.get_state(),
                extra=carried | {"seconds": parts.seconds(), "due": due},
                scores=scores if step >= settled else None,
            )
        bar.show(step, **shown)
        if stops:
            checkpoints.wait()
            raise runs.Stopped(f"after step {step}, which is saved")
        watch.restart()
    return state


def _finish(parts, state, frozen, before):
    """Saves the adapter, reads it again, scores it, and reports: the results."""
    inputs, folder, held_out = parts.inputs, parts.folder, parts.inputs.held_out
    last, _ = parts.evaluate(state.trainable, frozen, held_out)
    best = parts.checkpoints.restore(state, frozen, step="best")
    after = last
    if best.step != inputs.total_steps:
        after, _ = parts.evaluate(best.state.trainable, best.frozen, held_out)
    saved = folder / "adapter"
    interop.save_adapter(
        jp.combine(best.state.trainable, best.frozen),
        saved,
        metadata={**inputs.metadata, held_out: after, "step": best.step},
        overwrite=True,  # by a run that was complete
    )
    model, fresh = parts.load_base()
    reloaded = interop.load_adapter(saved, fresh, names=model.names)
    reloaded = training.place(reloaded, parts.mesh, parts.specs)
    kept = folder / "predictions.npz"
    again, routing = parts.evaluate(*jp.partition(reloaded), held_out, keep=kept)
    if again != after:
        raise RuntimeError(f"the saved adapter scores {again} when read, not {after}.")
    parts.writer.write("after", inputs.total_steps, best_step=best.step, **after)
    parts.bar.note(
        f"the adapter, saved and read onto a fresh base, scores the same: {after}"
    )
    parts.bar.close()
    found = runs.ranks_report(folder, reloaded, parts.ranks, parts.allocator)
    if routing:  # the adapters have routers
        routes = mixtures.routing_report(reloaded, routing)
        found["routing"] = runs.save_routing(folder, routes, title=parts.title)
    facts = {name: s.facts for name, s in inputs.splits.items() if s.facts}
    results = {
        "task": inputs.task.name,
        "split": held_out,
        **inputs.task.best,
        "before": before,
        "after": after,
        "after_last_step": last,
        "best_step": best.step,
        "steps": inputs.total_steps,
        **dict(zip(("trainable", "total"), parts.sizes, strict=True)),
        "seconds": parts.seconds(),
        "data": inputs.task.facts | facts,
        **found,
    }
    return runs.report(folder, results, parts.config, title=parts.title)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs.

    Returns:
        the exit status: 0, also after SIGTERM; 2 where something is refused, with one
        message and, but after ``--traceback``, nothing else; 3 where a NaN or an
        infinity stopped the run; 4 where another process has gone; 130 after Ctrl-C.
    """
    quickstart = Path(__file__).parent / "configs/quickstart.py"
    command = runs.parse_command(argv, quickstart, description=__doc__)
    logging.basicConfig(format="%(message)s")  # before a library chooses another
    if command.dry_run:
        step = dict(attach=attach_all, make_step=make_step, target=command.target)
        return runs.obey(command, lambda config, _: runs.dry_run(config, **step))
    return runs.obey(command, run)


if __name__ == "__main__":
    sys.exit(main())
