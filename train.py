"""Fine-tunes a model with an adapter: one run, told from top to bottom.

    python train.py                                       # configs/quickstart.py
    python train.py --config configs/lora_trec.py --workdir runs/lora
    python train.py --config.adapter.rank=16 --workdir runs/rank16

The same command again resumes a run that was stopped, bit for bit. Everything that
this file calls can be imported; ``run(config, workdir)`` is the whole of it.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

import jaxpeft as jp
from jaxpeft import adapters, allocate, data, interop, mixtures, models, runs, training

# What a resumed run may do differently: where it runs, and what it shows.
FREE = ("mesh", "log")


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
    """
    runs.check_fields(config)
    if config.stages:
        return runs.run_stages(config, workdir, run, free=FREE)
    with contextlib.ExitStack() as stack:
        return _run(config, workdir, stack)


def attach(config, model, params, keys, ranks=None, start=lambda adapted: adapted):
    """Puts all that will train beside a model's parameters, or beside their shapes."""
    if config.start:  # what another run saved, head and all
        shapes = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
        with runs.said_of("start"):
            adapted = interop.load_adapter(
                config.start, params, check_base=not shapes, names=model.names
            )
    else:
        adapter = runs.call_named(adapters, config.adapter, "adapter")
        sites = {"targets": config.targets, "exclude": config.exclude or None}
        adapted = jp.attach(
            params,
            adapter,
            **(sites if ranks is None else {"targets": ranks}),
            rank_pattern=dict(config.rank_pattern) or None,
            alpha_pattern=dict(config.alpha_pattern) or None,
            axes=model.axes,
            key=keys[0],
        )
        adapted = start(adapted)
        if config.head:  # trained whole: no pre-trained one fits the new task
            with runs.said_of("head"):
                adapted = jp.attach(
                    adapted, jp.full(), targets=config.head, key=keys[1]
                )
    if config.allocate and (biases := config.allocate.get("biases")):
        with runs.said_of("allocate.biases"):
            adapted = jp.attach(  # nodes of their own; draws nothing
                adapted, jp.bitfit(), targets=biases, key=keys[0]
            )
    if config.stage:
        with runs.said_of("stage"):
            adapted = runs.enter_stage(adapted, config.stage, seed=config.seed)
    return adapted


def _run(config, workdir, stack):
    started = time.perf_counter()

    # ----------------- Refused is what can be, before anything is read ----------------

    runs.check_run(config, workdir, attach, free=FREE)
    main_process = jax.process_index() == 0
    if config.log.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.log.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    mesh = training.make_mesh(**config.mesh)

    # ------------------------------- The task, its steps ------------------------------

    task = data.task(config.data)
    model = runs.outline(config, head=task.head, num_labels=task.num_labels)
    limits = dict(vocab_size=model.config.vocab_size, max_length=config.max_length)
    with runs.said_of("tokenizer"):
        tokenizer = models.tokenizer(config.model.name, **config.tokenizer)
    told = {  # goes with every adapter that is saved, for all that is done with it
        "config": config.to_dict(),
        "tokenizer": models.tokenizer_options(tokenizer),
        **data.task_metadata(task),
    }
    splits = data.tokenize(task, tokenizer, **limits)
    batches = iter(
        data.batches(
            splits["train"], config.batch_size, seed=config.seed, lengths=config.lengths
        )
    )
    per_epoch = data.batches_per_epoch(splits["train"], config.batch_size)
    count = lambda field: runs.count_steps(config[field], per_epoch, field=field)
    total_steps = count("train_for")
    evaluate_every = count("evaluate_every")
    saving = config.save_every.removesuffix(", kept")
    save_every = runs.count_steps(saving, per_epoch, field="save_every")
    runs.rehearse(config, model, attach, total_steps)  # now that these are known

    # ------------------------------------ The model -----------------------------------

    def where(path, shape):  # every leaf is read straight to its place on the mesh
        return jax.NamedSharding(mesh, training.leaf_spec(path, shape, mesh))

    keys = iter(jax.random.split(jax.random.key(config.seed), 4))
    head_key, adapter_key = next(keys), next(keys)
    whole_key = next(keys) if config.head else None
    load_base = lambda: models.load(
        config.model.name,
        head=task.head,
        num_labels=task.num_labels,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        scan_layers=config.model.scan_layers,
        remat=config.model.remat,
        sharding=where,
        key=head_key,
    )
    model, params = load_base()
    if config.start:  # an adapter of another base is refused before the folder is ours
        adapted = attach(config, model, params, (adapter_key, whole_key))
    folder = stack.enter_context(runs.open_workdir(workdir, config, free=FREE))

    # ---------------------------------- The adapter -----------------------------------

    start_ranks = None
    if config.allocation:  # from the pretrained model, or from a file

        def draw(samples, seed):
            texts = splits["train"]
            if texts.segments is not None:  # several to a row
                texts = data.tokenize(
                    data.unpacked(task), tokenizer, **limits, splits=["train"]
                )["train"]
            drawn = data.sample(texts, samples, seed=seed)
            rows, lengths = config.eval_batch_size, config.lengths
            return drawn.rows, data.evaluation_batches(drawn, rows, lengths=lengths)

        setting = config.allocation
        start_ranks = runs.starting_allocation(
            setting if isinstance(setting, str) else setting.to_dict(),
            *(folder, model, params, draw),
            adapter=runs.call_named(adapters, config.adapter, "adapter"),
            targets=config.targets,
            exclude=config.exclude or None,
        )

    def start(adapted):
        if start_ranks is None or not runs.starts_at_inputs(start_ranks):
            return adapted
        file = folder / "allocation.npz"
        return runs.start_at_inputs(adapted, start_ranks, file)

    if not config.start:
        both = (adapter_key, whole_key)
        adapted = attach(config, model, params, both, start_ranks, start)
    # An adapter read from PEFT may have untied the head from the embedding.
    specs = training.param_specs(jp.detach(adapted), mesh, axes=model.axes)
    adapted = training.place(adapted, mesh, specs)
    trainable, frozen = jp.partition(adapted)
    sizes = jp.count(adapted)
    if main_process:
        (folder / "sites.txt").write_text(f"{jp.describe(adapted)}\n")
    del params, adapted  # the base lives on in `frozen`; nothing is held twice

    # ---------------------------------- Update step -----------------------------------

    optimizer = training.adamw(trainable, total_steps=total_steps, **config.optimizer)
    allocation = runs.find_allocation(config, total_steps)
    settled = allocation.settled if allocation else 0  # from then on: the best can be
    state = training.init_state(
        trainable, optimizer, key=next(keys), mesh=mesh, allocation=allocation
    )
    forward, loss = training.objective(model, mesh=mesh, dropout=config.model.dropout)
    step_fn = training.train_step(
        *(forward, loss, optimizer, state, frozen),
        mesh=mesh,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        allocation=allocation,
    )

    # ----------------------------------- Evaluation -----------------------------------

    eval_fn = training.eval_step(forward, loss, state, frozen, mesh=mesh)
    metric = task.best["metric"]  # decides which checkpoint is the best
    # GLUE keeps the labels of its test splits; there, validation is all there is.
    held_out = "test" if "test" in task.splits else "validation"

    routing = {}  # of the last evaluation, by task

    def evaluate(trainable, frozen, split, bar):
        rows, lengths, scores = config.eval_batch_size, config.lengths, {}
        for name, (encoded, score) in data.held_out(task, splits, split).items():
            with bar.phase(f"{split} {name}".strip(), encoded.rows) as advance:
                found = training.predict(
                    eval_fn,
                    trainable,
                    frozen,
                    data.evaluation_batches(encoded, rows, lengths=lengths),
                    mesh=mesh,
                    rows=rows // jax.process_count(),
                    advance=advance,
                )
            scores[name] = training.scores_of(found, score)
            routing[name or task.name] = found.routing
        return data.gather_scores(task, scores)

    # ----------------------------- Resume, or start anew ------------------------------

    checkpoints = stack.enter_context(
        training.Checkpointer(
            folder / "checkpoints", config=config.to_dict(), free=FREE, **task.best
        )
    )
    first_step, carried = 0, {"seconds": 0.0}
    if checkpoints.latest is not None:
        restored = checkpoints.restore(state, frozen)
        state, frozen, first_step = restored.state, restored.frozen, restored.step
        batches.set_state(restored.data_state)
        carried = restored.extra
    seconds = lambda: carried["seconds"] + time.perf_counter() - started
    after = first_step or -1  # no checkpoint yet: what was written is written anew
    writer = stack.enter_context(
        runs.MetricsWriter(folder, after=after, tensorboard=config.log.tensorboard)
    )
    writer.write("start", first_step, versions=runs.versions(), command=sys.argv)
    bar = stack.enter_context(runs.progress(total_steps, done=first_step))
    title = f"{config.adapter.name} on {config.model.name}, {task.name}"
    bar.note(
        f"{title}: {sizes[0]:,} of {sizes[1]:,} parameters train, {total_steps} steps "
        f"of {config.batch_size} rows on {mesh.size} device(s); {folder}"
    )
    for line in data.notes(task):  # rows held out that were trained on
        bar.note(line)
    if first_step == total_steps:
        bar.note("This run is complete. Another one: --workdir=PATH.")
    elif first_step:
        bar.note(f"Resuming after step {first_step}.")
    else:
        scores = evaluate(state.trainable, frozen, "validation", bar)
        writer.write("eval", 0, **scores)
        if held_out != "validation":
            scores = evaluate(state.trainable, frozen, held_out, bar)
        carried["before"] = scores
        bar.note(f"before training: {held_out} {metric} {scores[metric]:.4f}")

    # ----------------------------------- Train loop -----------------------------------

    watch, waiting = runs.Stopwatch(), []
    for step in range(first_step + 1, total_steps + 1):
        batch = next(batches)
        tokens = int(batch["attention_mask"].sum()) * jax.process_count()
        batch = training.put_batch(batch, mesh, accumulate=config.accumulate)
        state, metrics = step_fn(state, frozen, batch)
        watch.count(tokens=tokens)
        waiting.append((step, metrics))  # still on the device: fetched all at once
        bar.advance()

        if allocation and allocation.decide and step == settled:
            state, chosen = training.decide(allocation, state)
            if main_process:
                chosen.save(folder / "decided.json")
            kept = {
                n: chosen.facts[n] for n in ("nodes", "chosen", "trained", "stored")
            }
            writer.write("decided", step, **kept)
            bar.note(f"After step {step}: {kept}; decided.json says which.")
        evaluates = step % evaluate_every == 0 or step == total_steps
        saves = evaluates or step % save_every == 0
        if not saves and step % config.log.every:
            continue
        for number, values in jax.device_get(waiting):
            writer.write("train", number, **values)
        waiting.clear()
        lap = watch.lap()
        writer.write("speed", step, **lap, **runs.memory(), seconds=seconds())
        try:
            training.check_finite(state)
        except training.NonFiniteError as error:
            checkpoints.wait()
            error = error.keeping(checkpoints.latest)
            writer.write("stopped", error.step, reason=str(error))
            raise error from None
        rate = max(v for k, v in values.items() if k.startswith("learning_rate/"))
        shown = {"loss": float(values["loss"]), "lr": float(rate)}
        shown["tokens/s"], scores = lap["tokens_per_second"], None
        if evaluates:
            scores = evaluate(state.trainable, frozen, "validation", bar)
            writer.write("eval", step, **scores)
            shown[metric] = scores[metric]
        if step % save_every == 0 and saving != config.save_every:
            interop.save_adapter(
                jp.combine(state.trainable, frozen),
                folder / f"adapters/{step}",
                metadata={**told, "step": step},
                overwrite=True,  # by a run that was stopped right here
            )
        if saves:
            checkpoints.save(
                state,
                frozen,
                data_state=batches.get_state(),
                extra=carried | {"seconds": seconds()},
                scores=scores if step >= settled else None,
            )
        bar.show(step, **shown)
        watch.restart()

    # ------------------- Save the adapter, read it again, score it --------------------

    last = evaluate(state.trainable, frozen, held_out, bar)
    best = checkpoints.restore(state, frozen, step="best")
    after = last
    if best.step != total_steps:
        after = evaluate(best.state.trainable, best.frozen, held_out, bar)
    saved = folder / "adapter"
    interop.save_adapter(
        jp.combine(best.state.trainable, best.frozen),
        saved,
        metadata={**told, held_out: after, "step": best.step},
        overwrite=True,  # by a run that was complete
    )
    _, fresh = load_base()
    reloaded = interop.load_adapter(saved, fresh, names=model.names)
    reloaded = training.place(reloaded, mesh, specs)
    again = evaluate(*jp.partition(reloaded), held_out, bar)
    if again != after:
        raise RuntimeError(f"the saved adapter scores {again} when read, not {after}.")
    writer.write("after", total_steps, best_step=best.step, **after)
    bar.note(f"the adapter, saved and read onto a fresh base, scores the same: {after}")
    bar.close()
    ranks = {}
    if allocation and allocation.decide:
        ranks["ranks"] = allocate.Allocation.load(folder / "decided.json").ranks()
    elif allocation:
        ranks["ranks"] = allocate.kept_ranks(reloaded)
    if start_ranks is not None:
        shown = {"ranks": start_ranks.ranks(), "facts": start_ranks.facts}
        ranks["allocation"] = shown
    if any(routing.values()):  # the adapters have routers
        routes = mixtures.routing_report(reloaded, routing)
        ranks["routing"] = runs.save_routing(folder, routes, title=title)

    # ------------------------------------- Report -------------------------------------

    results = {
        "task": task.name,
        "split": held_out,
        "metric": metric,
        "before": carried["before"],
        "after": after,
        "after_last_step": last,
        "best_step": best.step,
        "steps": total_steps,
        **dict(zip(("trainable", "total"), sizes, strict=True)),
        "seconds": seconds(),
        "data": task.facts | {name: s.facts for name, s in splits.items() if s.facts},
        **ranks,
    }
    return runs.report(folder, results, config, title=title)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs.

    Returns:
        the exit status: 0; 2 where something is refused, with one message and, but
        after ``--traceback``, nothing else; 3 where a NaN or an infinity stopped the
        run; 130 after Ctrl-C.
    """
    quickstart = Path(__file__).parent / "configs/quickstart.py"
    command = runs.parse_command(argv, quickstart, description=__doc__)
    logging.basicConfig(format="%(message)s")  # before a library chooses another

    def start():
        if command.distributed:
            jax.distributed.initialize()
        run(command.config, command.workdir)

    return runs.ended(
        "train.py",
        start,
        traceback=command.traceback,
        interrupted="stopped; the same command goes on after the last checkpoint",
    )


if __name__ == "__main__":
    sys.exit(main())
