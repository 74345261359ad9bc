"""A training step beside TRL's, with a model of the same shape: rollouts of a query, and the update.

    python -m fgrpo_jax.bench trl [--workload smollm2] [--layers N] [--batch N] [--prompt N] [--group N] [--length N]
                                  [--repeats N] [--threads N] [--json FILE]

TRL's GRPOTrainer samples `group` completions of exactly `length` tokens for each prompt with `generate` of
transformers, and updates once on them (no KL term, gradient clipping, AdamW, no gradient checkpointing);
ours does the same with the programs of `bench`. Random weights, random prompts. TRL has a process of its own, and
both are called in turns, so what slows the machine slows both. Needs `pip install trl` beside the `parity` extra.

On CPUs in float32. On a GPU, which both need to see, in bfloat16: TRL's weights and moments too, where ours are in
float32 and cast to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from fgrpo_jax.bench import measure
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.bench.ranker import spread
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models.decoder import DecoderSpec
from fgrpo_jax.run.launch import keep_memory

_WARM_UP = 1
_EOS = 0  # of their tokenizer; no completion is ended by it


# --------------------------------------------------------------------- the other process


def _serve(line: Connection, spec: DecoderSpec, shape: Shape, steps: int, threads: int) -> None:
    """Trains for `steps` steps; each begins when asked for, and its seconds are the answer."""
    jax.config.update("jax_platforms", "cpu")  # JAX computes nothing here
    keep_memory()
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    begun = 0.0

    class InTurns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **also: Any) -> None:
            nonlocal begun
            line.recv()
            begun = time.perf_counter()

        def on_step_end(self, *args: Any, **also: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            line.send(time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, shape, steps, folder)
        trainer.add_callback(InTurns())
        line.send(sum(p.numel() for p in trainer.model.parameters()))
        trainer.train()


def _model(spec: DecoderSpec) -> tuple[Any, Any]:
    """Of that shape, with random weights; and its tokenizer, whose words are t0, t1, ..."""
    import tokenizers
    import torch
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(spec.vocab_size)}, "t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0")
    sizes = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.mlp_size,
        tie_word_embeddings=spec.tie_embeddings,
        eos_token_id=_EOS,
        pad_token_id=_EOS,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(sizes).to(getattr(torch, spec.dtype)), tokenizer


def _trainer(spec: DecoderSpec, shape: Shape, steps: int, folder: str) -> Any:
    import datasets
    import trl

    model, tokenizer = _model(spec)
    on_cpu = spec.dtype == "float32"  # see main
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, spec.vocab_size, (shape.batch * steps, shape.prompt))
    prompts = [" ".join(f"t{i}" for i in row) for row in tokens]
    arguments = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.batch * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.length,
        generation_kwargs={"min_new_tokens": shape.length},
        max_steps=steps,
        beta=0.0,
        learning_rate=1e-5,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **also: rng.normal(size=len(completions)).tolist(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )


@contextlib.contextmanager
def trl_process(spec: DecoderSpec, shape: Shape, steps: int, threads: int) -> Iterator[tuple[int, Callable[[], float]]]:
    """How many parameters it trains, and what makes it take one step and tells its seconds."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see bench/ranker.py
    context = multiprocessing.get_context("spawn")
    line, end = context.Pipe()
    process = context.Process(target=_serve, args=(end, spec, shape, steps, threads), daemon=True)
    process.start()
    end.close()  # so that its death is noticed here

    def step() -> float:
        line.send(True)
        return line.recv()

    try:
        yield line.recv(), step
    finally:
        line.close()
        process.join(10)
        process.kill()


# --------------------------------------------------------------------- measured


def compare(spec: DecoderSpec, shape: Shape, repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of both steps, in turns; the first ones are dropped. Raises ConfigError without TRL."""
    if lacking := [name for name in ("torch", "trl") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"bench trl needs {' and '.join(lacking)}: pip install 'fgrpo_jax[parity]' trl")
    if spec.dtype == "bfloat16" and not importlib.import_module("torch").cuda.is_available():
        raise ConfigError("JAX computes on a GPU that this PyTorch does not see: install its CUDA build")
    programs, steps = measure.build(spec, shape, shape.batch, ()), _WARM_UP + repeats
    state, times = programs.state, {name: [] for name in ("rollout", "update", "step", "trl")}
    ours = sum(x.size for x in jax.tree.leaves(state.params))
    with trl_process(spec, shape, steps, threads) as (count, their_step):
        if count != ours:
            raise AssertionError(f"TRL trains {count} parameters, we {ours}")
        for _ in range(steps):
            rollout_s, rollout = measure.timed(programs.rollout, state.params, programs.batch.query, jax.random.key(1))
            batch = programs.batch.replace(rollout=rollout)
            update_s, (state, _) = measure.timed(programs.update, state, batch)
            for name, seconds in zip(times, (rollout_s, update_s, rollout_s + update_s, their_step()), strict=True):
                times[name].append(seconds)
    versions = measure.versions("jax", "jaxlib", "torch", "transformers", "trl")
    found = {name: spread(seconds[_WARM_UP:]) for name, seconds in times.items()}
    sizes = {"spec": spec._asdict(), "shape": shape._asdict(), "parameters": ours, "threads": threads}
    return found | sizes | {"versions": versions, "device": jax.local_devices()[0].device_kind}


def table(found: dict[str, Any]) -> str:
    """The comparison for people."""
    sizes = ", ".join(f"{key} {value}" for key, value in found["shape"].items())
    told = f"{found['parameters']:,} parameters, {found['spec']['num_layers']} layers, {found['spec']['dtype']}"
    lines = [f"{told} on {found['device']}: {sizes}"]
    for name, said in {
        "step": "fgrpo_jax",
        "rollout": "  its rollouts",
        "update": "  its update",
        "trl": f"TRL {found['versions']['trl']}",
    }.items():
        x = found[name]
        lines.append(f"{said:16}{x['median']:9.3f} s (quartiles {x['low']:.3f} to {x['high']:.3f}, n={x['n']})")
    lines.append(f"{'ratio':16}{found['trl']['median'] / found['step']['median']:9.2f}")
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench trl", description=__doc__.splitlines()[0])
    shapes = [name for name, (spec, _) in measure.WORKLOADS.items() if not spec.qk_norm]
    parser.add_argument("--workload", choices=shapes, default="smollm2", help="sizes; default: smollm2")
    measure.add_sizes(parser)
    parser.add_argument(
        "--repeats", type=measure.positive, default=5, metavar="N", help="timed steps after the warm-up"
    )
    threads_help = "of PyTorch; default: one for each core"
    parser.add_argument("--threads", type=measure.positive, default=os.cpu_count(), metavar="N", help=threads_help)
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU's memory, which TRL needs too
    keep_memory()
    spec, shape = measure.sized(args)
    on_cpu = jax.default_backend() == "cpu"
    spec = spec._replace(dtype="float32" if on_cpu else "bfloat16", rows_first=on_cpu)
    try:
        found = compare(spec, shape, args.repeats, args.threads)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0
