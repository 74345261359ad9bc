"""The configuration of a run: nested frozen dataclasses, read by tyro, checked once.

Nothing here imports JAX, so `python train.py --help` stays fast. `validate` is handed the
names that exist (`Registries`), so this module imports nothing above it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import runpy
from pathlib import Path
from typing import Any, Literal, NamedTuple


class ConfigError(ValueError):
    """A configuration that cannot run; the message says which field to change, and how."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    name: str = "synthetic"
    """Data set: synthetic, lastfm, musique or jsonl."""
    manual_dir: str = ""
    """Folder with the raw files of the data set (not used by synthetic)."""
    prepared_dir: str = "~/.cache/fgrpo_jax"
    """Where prepared data sets are kept, one folder per data set and content fingerprint."""
    pool_size: int = 20
    """Candidates per training query where negatives are sampled (synthetic, lastfm)."""
    history_max: int = 10
    """History items shown in the prompt: the most recent ones."""
    history_dropout: float = 0.0
    """Chance that a history item is left out of a training prompt (never the newest one)."""
    prompt_buckets: tuple[int, ...] = (40, 256, 1024, 2048, 4096, 8192)
    """Padded prompt lengths, ascending; one program is compiled per bucket that occurs."""


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    instruction: str = ""
    """First line(s) of every prompt; empty: the data set's own default."""
    chat: bool = False
    """Wrap the prompt in the tokenizer's chat template (instruction-tuned checkpoints)."""


@dataclasses.dataclass(frozen=True)
class TranscriptConfig:
    identifier: Literal["text", "index"] = "text"
    """How a transcript names a candidate: its text, or its number in the prompt, `[7]`."""
    constrained: bool = True
    """Mask tokens the grammar forbids, in sampling and in training alike."""
    slate_open: str = "<SLATE>"
    separator: str = ""
    """Between two identifiers; empty only where the identifiers of a pool are prefix-free."""
    slate_close: str = "</SLATE><RANK>"
    rank_close: str = "</RANK>"
    slate_min: int = 10
    slate_max: int = 10
    rank_min: int = 5
    rank_max: int = 5


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    checkpoint: str = ""
    """Hugging Face directory (config.json and safetensors) to start from; empty: random weights."""
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_size: int = 192
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02
    """Standard deviation of random weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations and of the weights while computing."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the stored weights and of the optimizer's moments."""
    remat: bool = False
    """Recompute each layer in the backward pass: less memory, more time."""
    logit_chunk: int = 4096
    """Completion tokens whose full-vocabulary logits exist at once (unconstrained only)."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    decay: Literal["constant", "linear", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down."""


@dataclasses.dataclass(frozen=True)
class CreditConfig:
    terms: tuple[tuple[Literal["slate", "rank"], str, float], ...] = (
        ("slate", "recall", 1.0),
        ("rank", "ndcg", 1.0),
    )
    """(phase, reward, weight), repeated: which reward trains which phase."""
    normalise: Literal["none", "each", "sum"] = "none"
    """none: centred by the group; each / sum: divided by the group's std, before / after summing."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "clipped_pg"
    """clipped_pg or nll."""
    weighting: Literal["token", "phase", "constant"] = "token"
    """Loss weight of an action: 1 / all trained tokens; each phase of each transcript sums to
    1 / (phases x rollouts); or a constant 1 / (rollouts x longest transcript)."""
    ratio: Literal["token", "phase", "sequence"] = "phase"
    """Level at which the importance ratio is formed and clipped."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    """Weight of the KL penalty to the policy the stage started from."""
    epochs: int = 1
    """Updates per rollout batch; above 1 the old log-probabilities are recomputed once."""


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    fill: Literal["first", "shuffled"] = "first"
    """Slate target: relevant candidates first in gain order and then fill, or all shuffled.
    Fill is drawn uniformly from the rest of the pool, up to transcript.slate_min; the ranking
    is the relevant candidates in gain order, filled from the slate up to rank_min."""
    train_fill: bool = True
    """Whether the loss counts the tokens of fill items too."""


@dataclasses.dataclass(frozen=True)
class StageConfig:
    steps: int = 0
    """Rollout batches; 0 skips the stage."""
    source: Literal["logged", "sampled"] = "sampled"
    """Transcripts written from the relevance labels, or sampled from the policy."""
    batch_queries: int = 64
    """Queries per step, over all devices and hosts."""
    group_size: int = 8
    """Rollouts per query."""
    microbatches: int = 1
    """Parts the batch is split into while gradients accumulate; never changes the gradient."""
    subset: tuple[float, float] = (0.0, 1.0)
    """Share of the training queries the stage sees, by hash of their user or query id."""
    eval_every: int = 100
    """Steps between evaluations on the validation split (each also saves a checkpoint)."""
    patience: int = 0
    """Stop after this many evaluations without improvement; 0: never."""
    optim: OptimConfig = OptimConfig()
    credit: CreditConfig = CreditConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    target: TargetConfig = TargetConfig()


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    k: int = 5
    """Cut-off of ndcg, mrr and hit as rewards."""
    broken: float = -0.1
    """Reward of a phase whose transcript broke a rule with no value of its own below
    (the paper's format penalty; its value is unspecified in the paper)."""
    rules: tuple[tuple[str, float], ...] = ()
    """(outcome, reward) pairs: a reward of its own for a broken rule, as in
    ("slate_duplicate", -0.5); the outcomes are listed in fgrpo_jax/transcript.py."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    split: str = "validation"
    metric: str = "ndcg@5"
    """Chooses the best checkpoint, and decides patience."""
    cutoffs: tuple[int, ...] = (1, 3, 5)
    batch_queries: int = 256
    train_queries: int = 512
    """Validation queries used while training (the first ones of the split); 0: all."""
    baselines: tuple[str, ...] = ("random", "popularity", "covisitation", "bm25")
    """Baselines that make no sense for the task are named and left out."""
    bootstrap: int = 2000
    """Resamples behind every 95 % interval."""
    versus: str = "sft"
    """Method that paired differences are taken against."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints, besides those at evaluations."""
    keep: int = 2
    """Latest checkpoints kept, besides the best one."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """Devices along which queries are split; -1: all that remain."""
    fsdp: int = 1
    """Devices along which queries and parameters are split."""
    tensor: int = 1
    """Devices along which heads, MLP and vocabulary are split."""


_SFT = StageConfig(
    source="logged",
    batch_queries=128,
    group_size=1,
    objective=ObjectiveConfig(name="nll"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    run_dir: str = "runs/synthetic"
    """Everything the run writes; a run directory that is not empty is resumed."""
    start_from: str = ""
    """Run directory whose best SFT checkpoint `rl` starts from, where sft.steps = 0."""
    tokenizer: str = "catalogue"
    """`catalogue` (each candidate text is one token) or a Hugging Face tokenizer directory."""
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    transcript: TranscriptConfig = TranscriptConfig()
    model: ModelConfig = ModelConfig()
    reward: RewardConfig = RewardConfig()
    sft: StageConfig = _SFT
    rl: StageConfig = StageConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    """Steps between progress lines and metrics.jsonl rows."""
    tensorboard: bool = False
    """Also write TensorBoard files (needs the `log` extra)."""
    compilation_cache: str = "~/.cache/fgrpo_jax/xla"
    """Where compiled programs are kept between runs; empty: nowhere."""


class Registries(NamedTuple):
    """The names that exist, handed to `validate` by train.py."""

    datasets: frozenset[str]
    rewards: frozenset[str]
    objectives: frozenset[str]
    baselines: frozenset[str]
    outcomes: frozenset[str]
    metrics: frozenset[str]  # without cut-off, as "ndcg"


# --------------------------------------------------------------------- loading and saving


def load_file(path: str | Path) -> Config:
    """The Config that a configs/NAME.py file's `get_config()` returns.

    Raises ConfigError when the file is missing, has no get_config, or returns another type.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file at {path}: give a path such as configs/synthetic.py")
    names = runpy.run_path(str(path))
    if "get_config" not in names:
        raise ConfigError(f"{path} defines no get_config(); it must return a fgrpo_jax.config.Config")
    config = names["get_config"]()
    if type(config).__name__ != "Config" or not dataclasses.is_dataclass(config):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a Config")
    return config


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`. Raises ConfigError on fields this version does not know."""
    return _build(Config, json.loads(text), "config")


def _build(cls: type, value: dict[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(value) - set(fields)):
        raise ConfigError(f"{where}: unknown field(s) {', '.join(unknown)}")
    if missing := sorted(set(fields) - set(value)):
        raise ConfigError(f"{where}: missing field(s) {', '.join(missing)}")
    built = {}
    for name, field in fields.items():
        default = field.default
        if dataclasses.is_dataclass(default):
            built[name] = _build(type(default), value[name], f"{where}.{name}")
        else:
            built[name] = _tuples(value[name])
    return cls(**built)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The fields in which two configs differ, as `rl.steps: 100 -> 200`."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        found = []
        for field in dataclasses.fields(old):
            name = f"{where}.{field.name}" if where else field.name
            found += differences(getattr(old, field.name), getattr(new, field.name), name)
        return found
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def fingerprint(value: Any) -> str:
    """16 hex digits of anything JSON can hold; stable across processes."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# --------------------------------------------------------------------- validation


def validate(config: Config, known: Registries) -> None:
    """Refuse a config that cannot run, before anything compiles.

    Raises ConfigError listing every problem found, each with what to change.
    """
    problems = [
        *_check_names(config, known),
        *_check_transcript(config),
        *_check_model(config.model),
        *_check_data(config),
    ]
    if config.start_from and config.sft.steps:
        problems.append("start_from replaces the sft stage: set sft.steps=0, or leave start_from empty")
    if config.start_from and config.model.checkpoint:
        problems.append("start_from and model.checkpoint both say where to start: leave one empty")
    for name in ("sft", "rl"):
        problems += _check_stage(name, getattr(config, name), known)
    if config.log_every < 1 or config.checkpoint.every < 1 or config.checkpoint.keep < 1:
        problems.append("log_every, checkpoint.every and checkpoint.keep must be at least 1")
    if problems:
        raise ConfigError("this configuration cannot run:\n" + "\n".join(f"  - {p}" for p in problems))


def _check_names(config: Config, known: Registries) -> list[str]:
    problems = []

    def check(where: str, name: str, names: frozenset[str]) -> None:
        if name not in names:
            problems.append(f"{where}: {name!r} is not one of {', '.join(sorted(names))}")

    check("data.name", config.data.name, known.datasets)
    for name in config.eval.baselines:
        check("eval.baselines", name, known.baselines)
    methods = set(config.eval.baselines) | {name for name in ("sft", "rl") if getattr(config, name).steps}
    methods |= {"sft"} if config.start_from else set()
    check("eval.versus", config.eval.versus, frozenset(methods))
    for outcome, _ in config.reward.rules:
        check("reward.rules", outcome, known.outcomes)
    metric, _, cutoff = config.eval.metric.partition("@")
    check("eval.metric", metric, known.metrics)
    if cutoff and (not cutoff.isdigit() or int(cutoff) not in config.eval.cutoffs):
        problems.append(f"eval.metric: cut-off of {config.eval.metric!r} is not in eval.cutoffs {config.eval.cutoffs}")
    return problems


def _check_transcript(config: Config) -> list[str]:
    t, problems = config.transcript, []
    for phase, low, high in (("slate", t.slate_min, t.slate_max), ("rank", t.rank_min, t.rank_max)):
        if not 1 <= low <= high:
            problems.append(
                f"transcript.{phase}_min={low} and transcript.{phase}_max={high}: need 1 <= min <= max"
            )
    if t.rank_max > t.slate_max:
        problems.append(
            f"transcript.rank_max={t.rank_max} exceeds transcript.slate_max={t.slate_max}: "
            "only items of the slate can be ranked"
        )
    if t.rank_min > t.slate_min:
        problems.append(
            f"transcript.rank_min={t.rank_min} exceeds transcript.slate_min={t.slate_min}: "
            "a slate of the least length could not be ranked; lower rank_min or raise slate_min"
        )
    for name in ("slate_open", "slate_close", "rank_close"):
        if not getattr(t, name):
            problems.append(f"transcript.{name} must not be empty")
    if t.identifier == "index" and config.tokenizer == "catalogue":
        problems.append(
            "tokenizer='catalogue' makes each candidate one token and has no numbers: "
            "set transcript.identifier='text', or tokenizer to a Hugging Face directory"
        )
    if config.prompt.chat and config.tokenizer == "catalogue":
        problems.append("prompt.chat needs a tokenizer with a chat template; the catalogue has none")
    return problems


def _check_model(m: ModelConfig) -> list[str]:
    problems = []
    if not m.checkpoint:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"):
            if getattr(m, name) < 1:
                problems.append(f"model.{name}={getattr(m, name)} must be at least 1")
        if m.num_kv_heads >= 1 and m.num_heads % m.num_kv_heads:
            problems.append(f"model.num_heads={m.num_heads} must be a multiple of num_kv_heads={m.num_kv_heads}")
        if m.head_dim % 2:
            problems.append(f"model.head_dim={m.head_dim} must be even (rotary embedding)")
    if m.logit_chunk < 1:
        problems.append("model.logit_chunk must be at least 1")
    return problems


def _check_data(config: Config) -> list[str]:
    d, problems = config.data, []
    if not d.prompt_buckets or list(d.prompt_buckets) != sorted(set(d.prompt_buckets)) or d.prompt_buckets[0] < 1:
        problems.append(f"data.prompt_buckets={d.prompt_buckets} must be ascending, distinct and positive")
    if d.pool_size < 2:
        problems.append(f"data.pool_size={d.pool_size} must be at least 2")
    if not 0 <= d.history_dropout < 1:
        problems.append(f"data.history_dropout={d.history_dropout} must be in [0, 1)")
    if d.history_max < 1:
        problems.append("data.history_max must be at least 1")
    if d.name != "synthetic" and not d.manual_dir:
        problems.append(f"data.name={d.name!r} reads files: set data.manual_dir to their folder")
    if config.eval.batch_queries < 1 or config.eval.bootstrap < 1 or config.eval.train_queries < 0:
        problems.append("eval.batch_queries and eval.bootstrap must be positive, eval.train_queries not negative")
    if not config.eval.cutoffs or min(config.eval.cutoffs) < 1:
        problems.append("eval.cutoffs must hold positive numbers")
    return problems


def _check_stage(name: str, s: StageConfig, known: Registries) -> list[str]:
    problems = []
    if s.steps < 0:
        problems.append(f"{name}.steps={s.steps} is negative; 0 skips the stage")
    if not s.steps:
        return problems
    for field in ("batch_queries", "group_size", "microbatches", "eval_every"):
        if getattr(s, field) < 1:
            problems.append(f"{name}.{field}={getattr(s, field)} must be at least 1")
    if s.microbatches >= 1 and s.batch_queries % s.microbatches:
        problems.append(
            f"{name}.batch_queries={s.batch_queries} is not divisible by {name}.microbatches={s.microbatches}"
        )
    if s.objective.name not in known.objectives:
        problems.append(
            f"{name}.objective.name: {s.objective.name!r} is not one of {', '.join(sorted(known.objectives))}"
        )
    if s.source == "logged" and (s.group_size != 1 or s.objective.name != "nll"):
        problems.append(f"{name}.source='logged' needs {name}.group_size=1 and {name}.objective.name='nll'")
    if s.source == "sampled":
        problems += _check_credit(name, s, known)
    if not 0 <= s.subset[0] < s.subset[1] <= 1:
        problems.append(f"{name}.subset={s.subset}: need 0 <= low < high <= 1")
    if s.objective.epochs < 1:
        problems.append(f"{name}.objective.epochs must be at least 1")
    if s.objective.kl_weight < 0 or s.objective.clip_low < 0 or s.objective.clip_high < 0 or s.objective.clip_low >= 1:
        problems.append(f"{name}.objective: kl_weight and clips must be >= 0, and clip_low < 1")
    for field in ("learning_rate", "clip_norm"):
        value = getattr(s.optim, field)
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{name}.optim.{field}={value} must be positive")
    if s.optim.warmup_steps < 0 or s.optim.weight_decay < 0:
        problems.append(f"{name}.optim: warmup_steps and weight_decay must not be negative")
    if s.patience < 0:
        problems.append(f"{name}.patience must not be negative")
    return problems


def _check_credit(name: str, s: StageConfig, known: Registries) -> list[str]:
    problems = []
    if s.group_size == 1:
        problems.append(
            f"{name}.group_size=1: an advantage centred by its group is then always 0; use 2 or more"
        )
    if s.objective.name == "nll":
        problems.append(f"{name}.objective.name='nll' ignores rewards; sampled rollouts need 'clipped_pg'")
    if not s.credit.terms:
        problems.append(f"{name}.credit.terms is empty: nothing would be trained")
    for phase, reward, weight in s.credit.terms:
        if phase not in ("slate", "rank"):
            problems.append(f"{name}.credit.terms: phase {phase!r} is not slate or rank")
        if reward not in known.rewards:
            problems.append(
                f"{name}.credit.terms: {reward!r} is not one of {', '.join(sorted(known.rewards))}"
            )
        if not math.isfinite(weight):
            problems.append(f"{name}.credit.terms: weight {weight} is not finite")
    return problems
